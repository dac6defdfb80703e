"""Every interleaving of two real sidecars on one prefix, within bounds.

A state is the bucket, where each of the two stands, which requests may still land, and what may still happen.
Where a sidecar stands is given by all that it has observed since it started, and by its disk before: nothing
is left out, so two states that are taken for one are one. Its real code is run once for every such history.

What a sidecar does between two answers touches nobody else, so a request lands and is answered in one step,
which may come at any time; a read that is stale by the time it is used is a sidecar that stalls after it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tests.model import promises
from tests.model.life import SIDES, Life, Save, Tree, View, freeze, pins_in, thaw
from tests.model.promises import Broken
from tests.model.store import (
    SILENCE,
    Answer,
    Create,
    PutPart,
    Range,
    Request,
    Store,
    Write,
    answered,
    in_vain,
)

KEPT_ALIVE = 200  # lives that are not taken down yet, for what they observe next


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much may happen: saves of these names and kinds, crashes, answers that get lost, late requests."""

    saves: int
    crashes: int = 0
    lost: int = 0
    late: int = 0
    names: tuple[str, ...] = ("x.pt",)
    kinds: tuple[str, ...] = ("small", "large")
    bound: bool = True  # the store honours conditions on complete
    sides: int = 2
    settled: bool = False  # the first has claimed the prefix and restored before anything else happens


class Start(NamedTuple):
    """The process starts."""


class Saved(NamedTuple):
    """The trainer saves."""

    name: str
    kind: str


class Answered(NamedTuple):
    """An answer has come to the call that waits there."""

    at: int
    answer: Answer


Observation: TypeAlias = Start | Saved | Answered


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a sidecar stands: after its parent's place and an observation; or down, with its disk."""

    view: View
    parent: int = -1
    observed: Observation | None = None
    tree: Tree = ()


class Lives:
    """All places that a sidecar can come to; the real code is run where a new one is asked for."""

    def __init__(self, scratch: Path, *, bound: bool) -> None:
        self.places: list[_Place] = []
        self.runs = self.steps = 0
        self._scratch = scratch
        self._bound = bound
        self._next: dict[tuple[int, Observation], int] = {}
        self._crashed: dict[int, int] = {}
        self._down: dict[tuple[Tree, View], int] = {}
        self._alive: dict[int, Life] = {}
        self._resting: dict[Hashable, int] = {}

    def down(self, tree: Tree, view: View) -> int:
        """The place of a sidecar that does not run, and has that disk."""
        if (tree, view) not in self._down:
            self._down[tree, view] = self._enter(_Place(view, tree=tree))
        return self._down[tree, view]

    def _enter(self, place: _Place) -> int:
        self.places.append(place)
        return len(self.places) - 1

    def after(self, at: int, observed: Observation) -> int:
        """Where it comes to from there, when it observes that."""
        found = self._next.get((at, observed))
        if found is None:
            found = self._next[at, observed] = self._come_to(at, observed)
        return found

    def _come_to(self, at: int, observed: Observation) -> int:
        if not self.places[at].view.up and isinstance(observed, Saved):
            return self._saved_while_down(self.places[at], observed)
        life = self._alive.pop(at, None) or (None if isinstance(observed, Start) else self._again(at))
        if life is None:
            place = self.places[at]
            self.runs += 1
            life = Life(self._scratch / f"{self.runs}", place.tree, _started(place.view), bound=self._bound)
        else:
            _observe(life, observed)
        self.steps += 1
        return self._found(life, at, observed)

    def _found(self, life: Life, at: int, observed: Observation) -> int:
        """The place where the life stands now: where it rests, what it knows says which."""
        memory = life.memory()
        place = self._resting.get((life.view, memory), -1)
        if memory is None or place < 0:
            place = self._enter(_Place(life.view, at, observed))
        if memory is not None:
            self._resting[life.view, memory] = place
        self._keep(place, life)
        return place

    def _keep(self, at: int, life: Life) -> None:
        if at in self._alive:
            self._alive.pop(at).end()
        self._alive[at] = life
        if len(self._alive) > KEPT_ALIVE:
            self._alive.pop(next(iter(self._alive))).end()

    def _again(self, at: int) -> Life:
        """The life that stands there, lived from its start once more."""
        way: list[int] = []
        place = self.places[at]
        while isinstance(place.observed, Saved | Answered):
            way.append(at)
            at = place.parent
            place = self.places[at]
        below = self.places[place.parent]
        self.runs += 1
        life = Life(self._scratch / f"{self.runs}", below.tree, _started(below.view), bound=self._bound)
        for each in reversed(way):
            observed = self.places[each].observed
            assert observed is not None
            _observe(life, observed)
            life.rest()
            self.steps += 1
            assert life.view == self.places[each].view, "the same observations led to another place"
        return life

    def crashed(self, at: int) -> int:
        """Where it is after a crash there."""
        if at not in self._crashed:
            life = self._alive.get(at)
            if life is None:
                life = self._again(at)
                self._keep(at, life)
            tree = freeze(life.root)
            was = life.view
            view = View(
                was.side,
                was.life,
                up=False,
                saves=was.saves,
                pinned=was.pinned,
                pins=pins_in(tree),
                claimed=was.claimed,
            )
            self._crashed[at] = self.down(tree, view)
        return self._crashed[at]

    def _saved_while_down(self, place: _Place, observed: Saved) -> int:
        self.runs += 1
        root = self._scratch / f"{self.runs}"
        thaw(place.tree, root)
        view = place.view
        save = Save(view.side, len(view.saves) + 1, observed.name, observed.kind)
        save.write(root)
        tree = freeze(root)
        return self.down(tree, replace(view, saves=(*view.saves, save)))

    def end(self) -> None:
        """Take down what is kept."""
        while self._alive:
            self._alive.popitem()[1].end()


def _started(view: View) -> View:
    return replace(view, life=view.life + 1)


def _observe(life: Life, observed: Observation) -> None:
    match observed:
        case Saved(name, kind):
            life.save(name, kind)
        case Answered(at, answer):
            life.answer(at, answer)
        case _:
            raise AssertionError(observed)


# --- states ------------------------------------------------------------------------------------------


class Late(NamedTuple):
    """A request that nobody waits for any more, and that may still land."""

    side: str
    life: int
    request: Write


class State(NamedTuple):
    """All there is. The first numbers stand for the bucket, the places, the late requests."""

    store: int
    places: tuple[int, ...]
    late: tuple[int, ...]
    saves: int
    crashes: int
    lost: int
    delays: int


class _Numbers:
    """A number for each value, and back."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Hashable, int] = {}

    def of(self, value: Hashable) -> int:
        """The value's number."""
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


def _matters(view: View) -> bool:
    """Does it matter whether a crash or a save comes just here?

    Between two requests that only read the disk stays as it is, and nobody looks whether there is more to
    do: so it may as well come at the next that writes, or where the sidecar rests.
    """
    return not view.asked or any(isinstance(each, Write | PutPart | Range) for each in view.asked)


class Explorer:
    """Goes through all states, and looks at each whether a promise is broken there."""

    def __init__(self, bounds: Bounds, scratch: Path) -> None:
        self.bounds = bounds
        self.lives = Lives(scratch, bound=bounds.bound)
        self.transitions = 0
        self._doing = ""
        self._stores = _Numbers()
        self._late = _Numbers()
        self._before: dict[State, State | None] = {}

    def __str__(self) -> str:
        return (
            f"{len(self._before)} states, {self.transitions} steps, {len(self._stores.values)} buckets; "
            f"{len(self.lives.places)} places of a sidecar, found in {self.lives.runs} runs of its code"
        )

    def explore(self) -> None:
        """See all states. Raises Broken with the way to the first state that breaks a promise."""
        first = self._first()
        self._before[first] = None
        todo = [first]
        try:
            while todo:
                state = todo.pop()
                try:
                    for doing, after in self._steps(state):
                        self._doing = doing
                        self.transitions += 1
                        if after not in self._before:
                            self._before[after] = state
                            self._judge(after)
                            todo.append(after)
                except Broken as broken:
                    way = [*self._way(state), self._doing]
                    raise Broken(f"{broken}\n" + "\n".join(way) + f"\n{self}") from None
        finally:
            self.lives.end()

    def _first(self) -> State:
        empty = self._stores.of(Store())
        nothing: Tree = ()
        places = tuple(
            self.lives.down(nothing, View(side, 0, up=False, saves=(), pinned=(), pins=frozenset()))
            for side in SIDES[: self.bounds.sides]
        )
        it = self.bounds
        first = State(empty, places, (), 0, 0, 0, 0)
        while it.settled and not self._views(first)[0].ready:
            first = next(after for _, after in self._steps(first))
        return first._replace(saves=it.saves, crashes=it.crashes, lost=it.lost, delays=it.late)

    def _way(self, state: State) -> list[str]:
        """What happened on the way there."""
        way = [state]
        while (before := self._before[way[-1]]) is not None:
            way.append(before)
        way.reverse()
        return [
            next(label for label, each in self._steps(before) if each == after)
            for before, after in pairwise(way)
        ]

    # --- what may happen next ---

    def _steps(self, state: State) -> Iterator[tuple[str, State]]:
        """What may happen next, and the state after it. A part that is sent lands before anything else."""
        sides = [(side, self.lives.places[place].view) for side, place in enumerate(state.places)]
        sending = [
            (side, view) for side, view in sides if any(isinstance(each, PutPart) for each in view.asked)
        ]
        for side, view in sending[:1] or sides:
            if not view.up:
                yield f"{view.side} starts", self._moved(state, side, Start())
            elif state.crashes and _matters(view):
                yield from self._crashes(state, side)
            yield from self._saves(state, side)
            for at, request in enumerate(view.asked):
                if not sending or isinstance(request, PutPart):
                    yield from self._asks(state, side, (at, request))
        if not sending:
            yield from self._lands_late(state)

    def _moved(self, state: State, side: int, observed: Observation, **changes: Any) -> State:
        """The state after the side has observed that; what it gave up on the way may still land."""
        place = self.lives.after(state.places[side], observed)
        places = tuple(place if n == side else each for n, each in enumerate(state.places))
        after = state._replace(places=places, **changes)
        return self._pending(after, side, self.lives.places[place].view.given_up)

    def _pending(self, state: State, side: int, requests: Iterable[Request]) -> State:
        """The state in which those requests may still land, but for those that would change nothing."""
        life = self._views(state)[side].life
        late = [self._late.of(Late(SIDES[side], life, each)) for each in requests if isinstance(each, Write)]
        return self._without_vain(state._replace(late=(*state.late, *late)))

    def _without_vain(self, state: State) -> State:
        store: Store = self._stores.values[state.store]
        late = [each for each in state.late if not in_vain(store, self._late.values[each].request)]
        return state._replace(late=tuple(sorted(late)))

    def _crashes(self, state: State, side: int) -> Iterator[tuple[str, State]]:
        """What it asks for has landed just before the crash; or never does; or lands after."""
        at = state.places[side]
        view = self.lives.places[at].view
        down = self.lives.crashed(at)
        places = tuple(down if n == side else each for n, each in enumerate(state.places))
        after = state._replace(places=places, crashes=state.crashes - 1)
        yield f"{view.side} crashes", after
        for request in view.asked:
            if isinstance(request, Write):
                landed, answer = self._land(state, side, request)
                crashed = self._without_vain(after._replace(store=landed))
                yield f"{view.side} crashes, after {request} -> {answer!r}", crashed
                if state.delays:
                    later = self._pending(after._replace(delays=state.delays - 1), side, [request])
                    yield f"{view.side} crashes, and {request} may still land", later

    def _saves(self, state: State, side: int) -> Iterator[tuple[str, State]]:
        view = self.lives.places[state.places[side]].view
        can = view.ready and _matters(view) if view.up else view.life
        if not state.saves or view.fenced or not can:
            return
        for name in self.bounds.names:
            for kind in self.bounds.kinds:
                after = self._moved(state, side, Saved(name, kind), saves=state.saves - 1)
                yield f"{view.side} saves {name}, {kind}", after

    def _asks(self, state: State, side: int, asked: tuple[int, Request]) -> Iterator[tuple[str, State]]:
        """The request lands and is answered; or the answer is lost; or the request comes late."""
        at, request = asked
        who = SIDES[side]
        self._doing = f"{who}: {request}"
        store, answer = self._land(state, side, request)
        landed = self._without_vain(state._replace(store=store))
        yield f"{who}: {request} -> {answer!r}", self._moved(landed, side, Answered(at, answer))
        if not isinstance(request, Write):
            return
        if state.lost:
            after = self._moved(landed, side, Answered(at, SILENCE), lost=state.lost - 1)
            yield f"{who}: {request} -> {answer!r}, and the answer is lost", after
        if state.delays:
            after = self._moved(state, side, Answered(at, SILENCE), delays=state.delays - 1)
            yield f"{who}: {request} times out", self._pending(after, side, [request])

    def _lands_late(self, state: State) -> Iterator[tuple[str, State]]:
        for n, each in enumerate(state.late):
            late: Late = self._late.values[each]
            self._doing = f"late from {late.side}: {late.request}"
            store, answer = self._land(state, SIDES.index(late.side), late.request, late=True)
            after = state._replace(store=store, late=state.late[:n] + state.late[n + 1 :])
            yield f"late from {late.side}: {late.request} -> {answer!r}", self._without_vain(after)

    def _land(self, state: State, side: int, request: Request, *, late: bool = False) -> tuple[int, Answer]:
        """The number of the bucket after the request, and what it says."""
        before: Store = self._stores.values[state.store]
        after, answer = answered(before, request)
        if after is before:
            return state.store, answer
        if late and isinstance(request, Create):
            begun = after.upload(request.nonce)
            assert begun is not None
            after = after.begin(replace(begun, late=True))
        sender = self._views(state)[side]
        promises.nothing_goes_back(before, after, sender, bound=self.bounds.bound)
        promises.nobody_displaced_comes_back(before, after, sender)
        return self._stores.of(after), answer

    def _views(self, state: State) -> list[View]:
        return [self.lives.places[each].view for each in state.places]

    def _judge(self, state: State) -> None:
        store: Store = self._stores.values[state.store]
        views = self._views(state)
        promises.whole(store, views)
        promises.nothing_is_let_go(views, store)
        for late in (self._late.values[each] for each in state.late):
            view = views[SIDES.index(late.side)]
            rests = view.up and not view.asked and view.life == late.life
            assert not (rests and late.request.key == promises.LATEST), "it may meet an old write token again"
        for view in views:
            promises.fenced_rightly(view, store)
            promises.restored_enough(view, store, views)
            promises.alive(view)
            promises.all_is_well_in_the_end(view, views, store)
