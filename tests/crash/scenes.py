"""What is played on the crash points: what the trainer does, and what it finds."""

from __future__ import annotations

import asyncio
import copy
import os
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ckpt_sidecar.bucket import Abilities
from ckpt_sidecar.settings import Settings
from tests.crash.life import PART_BYTES
from tests.crash.lives import At, Life, Rotate, Save, Saved, Step, Store, Trainer
from tests.crash.oracle import Ending, ending, fingerprint, flaws_at_rest, flaws_in_history
from tests.engine.support import PREFIX, save
from tests.fakes import ABLE

WEAK = Abilities(conditional_put=True, conditional_complete=False, conditional_delete=False, checksum=False)
STORES = {"able": ABLE, "weak": WEAK}
SMALL, LARGE = PART_BYTES - 10, 3 * PART_BYTES + 20  # one put; four parts: a first, two in the middle, a last
Act = Save | Rotate
SEED = int(os.environ.get("CRASH_SEED", random.randrange(10**6)))  # of what is only sampled


@dataclass(frozen=True, slots=True)
class Predecessor:
    """Another sidecar, on a node that was lost at `cut`."""

    acts: tuple[Act, ...]
    cut: Step


@dataclass(frozen=True, slots=True)
class Scene:
    """What the trainer does, after what, and with which settings; `torn` stands in the watch dir before.

    `listed` is what the bucket has in the end, by the trainer's numbers, the newest first.
    """

    acts: tuple[Act, ...]
    listed: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    predecessor: Predecessor | None = None
    torn: str = ""


_BEFORE = (Save("Ready", "step_1.pt", SMALL), Save("step_1.pt committed", "last.pt", LARGE))
SCENES = {
    "one put": Scene(
        (
            Save("Ready", "step_1.pt", SMALL),
            Rotate("step_1.pt pinned", "step_1.pt"),
            Save("step_1.pt committed", "sub/step_2.pt", SMALL),
        ),
        listed=(2, 1),
    ),
    "parts": Scene((Save("Ready", "big.pt", LARGE),), listed=(1,)),
    "replaced": Scene(
        (
            Save("Ready", "last.pt", LARGE),
            Save("last.pt uploading", "last.pt", LARGE + 1),
            Save("last.pt committed", "last.pt", LARGE + 2),
        ),
        listed=(3,),
    ),
    "retention": Scene(
        (
            Save("Ready", "a.pt", SMALL),
            Save("a.pt committed", "b.pt", LARGE),
            Save("b.pt committed", "a.pt", SMALL + 1),
        ),
        listed=(3,),
        settings={"keep_remote": 1, "keep_local": 1},
    ),
    "claim": Scene(
        (Save("Ready", "last.pt", LARGE),),
        listed=(3, 1),
        predecessor=Predecessor(_BEFORE, Step("after bucket.put_part job/last.pt part 3")),
    ),
    "adoption": Scene(
        (Save("Ready", "step_3.pt", SMALL),),
        listed=(3, 2, 1),
        predecessor=Predecessor(_BEFORE, Step("after bucket.complete_multipart job/last.pt")),
        torn="last.pt",
    ),
}


@dataclass(slots=True)
class World:
    """One history under way: the bucket, the watch dir, the trainer."""

    scene: Scene
    store: Store
    trainer: Trainer
    saved_before: Sequence[Saved]
    logs: Path
    lives: list[Life] = field(default_factory=list)

    @property
    def saved(self) -> list[Saved]:
        """All that any trainer has completed."""
        return [*self.saved_before, *self.trainer.saved]

    def state(self) -> str:
        """What a kill here and now would leave."""
        return fingerprint(self.store, self.trainer.root, len(self.trainer.saved))

    async def live(self, at: At) -> int | None:
        """One life more; its exit code, None where it was killed."""
        log = self.logs / f"life-{len(self.lives)}.log"
        settings = settings_of(self.trainer.root, **self.scene.settings)
        self.lives.append(Life(settings, self.store, self.trainer, log=log, at=at))
        code = await self.lives[-1].end()
        if code is None:
            self.trainer.go_on()
        return code

    def ending(self) -> Ending:
        """Where it has come to; files that were not sent because newer ones were durable may stay."""
        found = ending(self.store, self.trainer.root, self.saved)
        skipped = {each for life in self.lives for each in life.told if each.endswith(" skipped")}
        files = {
            name: number
            for name, number in found.files.items()
            if number in found.listed or f"{name} skipped" not in skipped
        }
        return replace(found, files=files)

    def flaws(self) -> list[str]:
        """What is wrong, once all is at rest."""
        strays = {str(step) for life in self.lives for step in life.steps if " /" in step.where}
        flaws = [f"{each}: outside the watch dir" for each in strays]
        return [
            *flaws,
            *flaws_in_history(self.store, self.saved),
            *flaws_at_rest(self.store, self.trainer.root),
        ]


def settings_of(root: Path, *, attempt: str = "attempt-1", **more: Any) -> Settings:
    """The settings of a life on that watch dir."""
    return Settings(
        watch=root,
        bucket="memory",
        prefix=PREFIX,
        listen="127.0.0.1:0",
        workers=1,
        settle=0.0,
        rescan_every=3600.0,
        drain_timeout=60.0,
        attempt=attempt,
        log_format="json",
        **more,
    )


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory, in memory if possible: SIGKILL does not ask whether bytes are on the disk."""
    memory = Path("/dev/shm")
    where = tempfile.mkdtemp(prefix="lives-", dir=memory if os.access(memory, os.W_OK) else None)
    try:
        yield Path(where)
    finally:
        shutil.rmtree(where)


# --- on a stage --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stage:
    """A scene on one kind of store. `undisturbed` is how it goes and ends when nobody is killed."""

    scene: Scene
    before: Store
    saved_before: Sequence[Saved]
    seats: asyncio.Semaphore  # so many worlds at a time as there are processors

    @classmethod
    async def of(cls, scene: Scene, abilities: Abilities) -> Self:
        """Set the stage: let the predecessor, if there is one, live and be lost."""
        stage = cls(scene, Store(abilities=abilities), [], asyncio.Semaphore(os.cpu_count() or 1))
        if scene.predecessor is not None:
            with scratch() as where:
                trainer = Trainer(where / "theirs", scene.predecessor.acts)
                trainer.root.mkdir()
                settings = settings_of(trainer.root, attempt="attempt-0")
                cut = scene.predecessor.cut
                life = Life(settings, stage.before, trainer, log=where / "log", at=killing(cut))
                assert await life.end() is None, f"the predecessor did not come to {cut}; {life}"
            stage.saved_before = trainer.saved
        return stage

    @asynccontextmanager
    async def world(self) -> AsyncIterator[World]:
        """A world in which nothing has happened yet."""
        async with self.seats:
            with scratch() as where:
                trainer = Trainer(where / "watch", self.scene.acts, first=len(self.saved_before) + 1)
                (trainer.root / "sub").mkdir(parents=True)
                if self.scene.torn:
                    save(trainer.root, self.scene.torn, bytes(SMALL), at=-1)
                yield World(self.scene, copy.deepcopy(self.before), trainer, self.saved_before, where)


def killing(cut: Step) -> At:
    """Kill at that step."""

    def at(life: Life, step: Step) -> None:
        if step == cut:
            life.kill()

    return at
