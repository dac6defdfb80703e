"""The crash-point matrix: every state that a kill can leave, and what becomes of it.

An undisturbed life is watched: at each of its steps one notes which state a kill there would leave. Then one
life is killed for each state, and its successor, which is left alone, must come to the same end; and it is
watched the same way, which tells where it, too, can be killed. Steps that leave the same state need one kill.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.crash.lives import Life, Step
from tests.crash.oracle import Ending, caught
from tests.crash.scenes import Stage, World, killing
from tests.engine.support import LATEST

Cuts = tuple[Step, ...]
TRIES = 5  # to reach a step
# What happens before these was seen at the step before them.
_READS = ("probe", "get", "head", "list")  # and what begins so: get_range, list_parts, list_uploads
_AS_BEFORE = (
    "before disk.",
    "within ",
    *(f"{side} bucket.{verb}" for side in ("before", "after") for verb in _READS),
)


@dataclass(slots=True)
class Matrix:
    """What was played on one stage. `failures` says of each history that went wrong where it was cut."""

    stage: Stage
    expected: Ending | None = None
    steps: int = 0
    lives: int = 0
    kills: int = 0
    missed: list[Cuts] = field(default_factory=list)
    met: set[str] = field(default_factory=set)
    states: set[str] = field(default_factory=set)
    ends: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)

    async def undisturbed(self) -> list[Cuts]:
        """Play it without a kill; return where a first kill leaves which new state."""
        return await self.play(())

    async def kill_at_all(self, places: Iterable[Cuts]) -> list[Cuts]:
        """Kill at each of these, until one goes wrong; return where one kill more leaves a new state."""
        found = await asyncio.gather(*(self._reach(cuts) for cuts in places))
        return [cuts for each in found for cuts in each]

    async def _reach(self, cuts: Cuts) -> list[Cuts]:
        """Play it, a few times where a step is not reached: a life may go another way by chance."""
        found = await self.play(cuts)
        for _ in range(TRIES - 1):
            if cuts in self.missed:
                self.missed.remove(cuts)
                found += await self.play(cuts)
        return found

    async def play(self, cuts: Cuts) -> list[Cuts]:
        """Cut life after life, let the last one live, and judge; return where it would leave new states."""
        async with self.stage.world() as world:
            if self.failures:
                return []
            for cut in cuts:
                self.kills += 1
                if await world.live(killing(cut)) is not None:
                    self.missed.append(cuts)
                    self.kills -= 1
                    break
            found = _Watching(world, self.states)
            code = await world.live(found.at)
            if not cuts:
                self.steps, self.expected = len(world.lives[-1].steps), world.ending()
            await self._judge(world, cuts, code)
            self.lives += len(world.lives)
            self.met |= {step.where for life in world.lives for step in life.steps}
            return [(*cuts, step) for step in found.new]

    async def _judge(self, world: World, cuts: Cuts, code: int | None) -> None:
        flaws = [f"it ended with {code}"] if code else world.flaws()
        end = world.ending()
        if not flaws and (end.listed != world.scene.listed or set(end.objects.values()) != set(end.listed)):
            flaws = [f"{world.scene.listed} should be listed, and nothing else be there: {end}"]
        if not flaws and end != self.expected:
            flaws = [f"it came to {end}, undisturbed to {self.expected}"]
        if not flaws and (state := world.state()) not in self.ends:
            flaws = await self._live_once_more(world)
            self.ends.add(state)
        if flaws:
            where = ", then ".join(map(str, cuts)) or "nowhere"
            self.failures.append(f"killed {where}: {'; '.join(flaws)}\n{world.lives[-1]}")

    async def _live_once_more(self, world: World) -> list[str]:
        """Nothing is left to do: what is durable is known to be."""
        before = len(world.store.written)
        code = await world.live(lambda life, step: None)
        sent = [each.key for each in world.store.written[before:] if each.key != LATEST]
        flaws = [f"one life more ended with {code}"] if code else world.flaws()
        flaws += [f"one life more wrote or deleted {sent}"] if sent else []
        flaws += [f"{each} stays caught" for each in caught(world.trainer.root, world.saved)]
        return flaws + ([] if world.ending() == self.expected else ["one life more came to another end"])

    def __str__(self) -> str:
        return (
            f"{self.steps} steps, {len(self.states)} states, {self.kills} kills, {self.lives} lives, "
            f"{len(self.ends)} ends, {len(self.missed)} not reached"
        )


def sample(places: Sequence[Cuts], number: int, chance: random.Random) -> list[Cuts]:
    """So many of the places, spread evenly over the kinds of the last step, and over the first steps."""
    left = chance.sample(places, len(places))
    met: Counter[str | Step] = Counter()
    chosen: list[Cuts] = []
    while left and len(chosen) < number:
        cuts = min(left, key=lambda each: (met[each[-1].where], met[each[0]]))
        left.remove(cuts)
        chosen.append(cuts)
        met.update({cuts[-1].where: 1, cuts[0]: 1})
    return chosen


class _Watching:
    """Notes at which steps a life leaves a state that was not met before."""

    def __init__(self, world: World, states: set[str]) -> None:
        self.new: list[Step] = []
        self._world, self._states = world, states

    def at(self, life: Life, step: Step) -> None:
        """Look what a kill here would leave, if anything has happened since the last look."""
        if step.where.startswith(_AS_BEFORE):
            return
        state = self._world.state()
        if state not in self._states:
            self._states.add(state)
            self.new.append(step)
