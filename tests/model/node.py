"""A node of the cluster: a real directory, a trainer that saves into it, the sidecar's lives beside it."""

# ruff: noqa: D102 (the methods are the disk's and the judge's own, and are described there)

from __future__ import annotations

import asyncio
import errno
import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ckpt_sidecar.checkpoint import Book, Id
from ckpt_sidecar.completion import Evidence
from ckpt_sidecar.events import Claimed, Event, Fenced, Ready, Restored
from ckpt_sidecar.hints import Listener
from ckpt_sidecar.identity import SpoolError
from ckpt_sidecar.ledger import Times
from ckpt_sidecar.manifest import Holder
from ckpt_sidecar.names import HOME
from ckpt_sidecar.patience import PatientBucket
from ckpt_sidecar.settings import Settings
from ckpt_sidecar.sidecar import End, Exit, Sidecar, World
from ckpt_sidecar.spool import Spool
from tests.engine.support import Asking
from tests.model import world as simulated

YEAR = 365 * 86_400 * 10**9  # ns
PART = 256  # bytes of a part in this world
GHOST_STEPS = 20_000


def archive(n: int, size: int) -> bytes:
    """A checkpoint as torch.save makes it, sealed by its end; no two are the same."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as made:
        made.writestr(zipfile.ZipInfo("data"), f"save {n} ".encode() + b"x" * size)
    return raw.getvalue()


class Mortal(Asking):
    """A life's disk: each call is a step of that life, perhaps its last, and may be refused."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def asked(self, call: str, path: Path) -> None:
        node = self._life.node
        self._life.tick()
        code = node.hurt.get(call)
        if code is not None:
            raise OSError(code, os.strerror(code))
        if call == "unlink":
            node.about_to_delete(path)
        if call == "remove_tree":
            node.about_to_release(path)


class Hints:
    """In place of hints.Tree: the trainer's own calls are the hints, and some of them get lost."""

    def __init__(self, root: Path, listener: Listener) -> None:
        self.alive = True
        self._node = Node.at[root]
        self._node.listener = listener

    def watch(self, name: str) -> None:
        """All of it is watched."""

    def close(self) -> None:
        self.alive = False
        self._node.listener = None


class Life:
    """One sidecar's process, the real one from the spool to the drain, on this world's time and network."""

    def __init__(self, node: Node, *, attempt: str, take_over: bool = False) -> None:
        self.node, self.world = node, node.world
        self.loop = simulated.Loop(lambda: node.world.now)
        self.dead = False
        self.fenced_at: float | None = None
        self.fuse: tuple[int, str] | None = None  # in so many steps: "kill" or "stall"
        self.told: list[Event] = []
        self.book = Book()
        self.end: End | None = None
        self.least: Id | None = None  # the newest that was committed when it claimed
        self.flipped_before = node.world.store.flipped
        self.spool = Spool(node.root, disk=Mortal(self))
        self._attempt, self._take_over = attempt, take_over
        self.running: asyncio.Task[End] | None = None

    def start(self) -> None:
        """Begin to live; the disk may refuse, or the end come at once."""
        try:
            self.spool.open(new_id=f"spool-{next(self.world.numbers)}")
        except SpoolError as error:
            if not self.node.hurt:
                self.world.complain(str(error))
            self.dead = True
        except simulated.Killed:
            self.spool.close()
        if not self.dead:
            self._begin()

    def _begin(self) -> None:
        it = self.world
        times = Times(
            wall=it.wall,
            sleep=asyncio.sleep,
            chance=it.chance.random,
            token=self._token,
        )
        wire = PatientBucket(
            simulated.Wire(it, self), sleep=asyncio.sleep, chance=it.chance.random, tell=self.tell
        )
        me = Holder("", self._attempt, self.node.name, 42, it.wall() + next(it.numbers))
        outside = World(wire, times, lambda: it.now, me, self.tell)
        settings = Settings(
            watch=self.node.root,
            bucket="memory",
            prefix="job",
            rescan_every=900.0,
            workers=2,
            drain_timeout=60.0,
            take_over=self._take_over,
            **self.node.choices,
        )
        sidecar = Sidecar(settings, outside, spool=self.spool, book=self.book)
        sidecar._landing._disk = self.spool.disk
        self.sidecar = sidecar
        self.running = self.loop.create_task(sidecar.run(_serve))
        it.alive.append(self)

    def _token(self) -> str:
        token = f"write-{next(self.world.numbers)}"
        self.node.judge.writers[token] = self.spool.record.spool
        return token

    # --- what happens to it ---

    def tick(self) -> None:
        """Do one step; Killed when that was the last one."""
        if self.fuse is not None:
            left, what = self.fuse
            self.fuse = (left - 1, what) if left > 1 else None
            if left <= 1 and what == "kill":
                self.dead = True
            elif left <= 1:
                self.stall()
        if self.dead:
            raise simulated.Killed

    def stall(self) -> None:
        """Stop it, as SIGSTOP would: what it has sent travels on."""
        if self in self.world.alive:
            self.world.alive.remove(self)

    def wake(self) -> None:
        """Let it go on."""
        if not self.dead and self not in self.world.alive:
            self.world.alive.append(self)

    def stepped(self) -> None:
        """Has it died, or ended, in the step that it has just done?"""
        assert self.running is not None
        if not self.dead:
            with suppress(simulated.Killed):
                self.tick()
        if self.dead:
            self.bury()
        elif self.running.done():
            self._ended()
        elif self.loop.troubles:
            self.world.complain(f"{self.loop.troubles}")

    def bury(self) -> None:
        """Give back what the process held, as the kernel would: whatever it still tries is Killed."""
        self.dead = True
        self.stall()
        self.node.listener = None
        if self.running is not None:
            self.running.cancel()
            for _ in range(GHOST_STEPS):
                if self.running.done():
                    break
                if self.loop.due() == float("inf"):
                    self.running.cancel()
                self.loop.step(hurry=True)
            assert self.running.done()
            if not self.running.cancelled():
                self.running.exception()
        self.spool.close()

    def _ended(self) -> None:
        assert self.running is not None
        self.stall()
        self.dead = True
        self.spool.close()
        error = self.running.exception()
        if error is None:
            self.end = self.running.result()
            self.node.judge_end(self)
        elif not (self.node.was_hurt and _leaf_is_of_the_disk(error)):
            self.world.complain(f"it ended with {error!r}")

    # --- what it says ---

    def tell(self, event: Event) -> None:
        """Hold what it says against what is so."""
        if self.dead:
            return
        self.told.append(event)
        match event:
            case Claimed():
                self.node.claimed(self, event)
            case Fenced():
                self.fenced_at = self.world.now
                self.node.fenced(self, event)
            case Restored():
                self.node.restored(self, event)
            case _:
                pass

    @property
    def ready(self) -> bool:
        """May a trainer start?"""
        return any(isinstance(each, Ready) for each in self.told)


async def _serve() -> None:
    await asyncio.Event().wait()


def _leaf_is_of_the_disk(error: BaseException) -> bool:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return isinstance(error, OSError)


# --- the trainer, and its node -----------------------------------------------------------------------


@dataclass(slots=True)
class Writing:
    """A save in place that is not finished."""

    file: BinaryIO
    rest: bytes
    content: bytes


@dataclass
class Saves:
    """What all trainers have ever completed under each name, with the order in which they did."""

    order: dict[tuple[str, bytes], int] = field(default_factory=dict)
    by: dict[tuple[str, bytes], str] = field(default_factory=dict)  # the node of its trainer
    durable: set[tuple[str, bytes]] = field(default_factory=set)
    ahead: set[tuple[str, bytes]] = field(default_factory=set)  # their time lies in the future
    plain: set[tuple[str, bytes]] = field(default_factory=set)  # renamed into place, told of, and left alone

    def completed(self, name: str, content: bytes, n: int, by: str) -> None:
        """These bytes were a whole save of that name."""
        self.order[name, content] = n
        self.by[name, content] = by


class Node:
    """A directory, its trainer, and at most one sidecar at a time."""

    at: dict[Path, Node] = {}  # noqa: RUF012  (where Hints finds it)

    def __init__(self, root: Path, judge: Any, *, attempt: str, choices: dict[str, Any]) -> None:
        self.root, self.name, self.judge = root, root.name, judge
        self.world: simulated.World = judge.world
        self.saves: Saves = judge.saves
        self.attempt, self.choices = attempt, choices
        self.life: Life | None = None
        self.lost = False
        self.listener: Listener | None = None
        self.hurt: dict[str, int] = {}
        self.was_hurt = self.ever_hurt = False
        self.refused: set[str] = set()  # all that it ever refused
        self.writing: dict[str, Writing] = {}
        self.written: set[int] = set()  # inodes that the trainer itself has written
        self.in_place: set[int] = set()  # inodes that were written more than once
        self.rotated: set[int] = set()  # inodes that had another name before
        root.mkdir()
        Node.at[root] = self

    def start(self, *, another_attempt: bool = False, take_over: bool = False) -> None:
        """Start a sidecar, where none lives."""
        if another_attempt:
            self.attempt = f"attempt-{next(self.world.numbers)}"
        self.was_hurt = bool(self.hurt)
        self.life = Life(self, attempt=self.attempt, take_over=take_over)
        self.life.start()

    def lose(self) -> None:
        """Lose the machine, and its disk with it."""
        if self.life is not None and not self.life.dead:
            self.life.bury()
        for each in self.writing.values():
            each.file.close()
        self.writing.clear()
        self.lost = True
        shutil.rmtree(self.root)

    @property
    def living(self) -> Life | None:
        """The sidecar's process, stopped or not."""
        return self.life if self.life is not None and not self.life.dead else None

    # --- what the trainer does ---

    def _hint(self, name: str, evidence: Evidence, *, lost: bool) -> None:
        life, listener = self.living, self.listener
        if life is not None and listener is not None and not lost:
            life.loop.call_soon(listener.heard, name, evidence)

    def _moment(self, kind: str) -> tuple[int, int]:
        """An mtime, no two the same: now, long ago, or still to come."""
        unique = next(self.world.numbers)
        at = {"now": self.world.wall(), "1970": 0, "future": self.world.wall() + 10 * YEAR}[kind] + unique
        return at, at

    def save(self, name: str, size: int, *, at: str = "now", hint_lost: bool = False) -> None:
        """Save under another name and rename: complete at once."""
        self._give_up(name)
        n = next(self.world.numbers)
        content = archive(n, size)
        temporary = self.root / "being-written.tmp"
        temporary.write_bytes(content)
        os.utime(temporary, ns=self._moment(at))
        self.written.add(temporary.stat().st_ino)
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        temporary.rename(path)
        self.saves.completed(name, content, n, self.name)
        if at == "now" and not hint_lost:
            self.saves.plain.add((name, content))
        if at == "future":
            self.saves.ahead.add((name, content))
        self._hint(name, Evidence.PLACED, lost=hint_lost)

    def begin(self, name: str, size: int, *, hint_lost: bool = False) -> None:
        """Truncate the file in place, and write a half of it."""
        self._give_up(name)
        n = next(self.world.numbers)
        content = archive(n, size)
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        if path.exists() and path.stat().st_ino in self.rotated:
            path.unlink()  # a pin under the old name would get the new one's bytes
        new = not path.exists()
        file = path.open("wb", buffering=0)
        self.in_place.add(os.fstat(file.fileno()).st_ino)
        half = len(content) // 2
        file.write(content[:half])
        os.utime(file.fileno(), ns=self._moment("now"))
        self.written.add(os.fstat(file.fileno()).st_ino)
        self.writing[name] = Writing(file, content[half:], content)
        if new:
            self._hint(name, Evidence.CREATED, lost=hint_lost)

    def finish(self, name: str, *, hint_lost: bool = False) -> None:
        """Write the other half, and close."""
        writing = self.writing.pop(name)
        writing.file.write(writing.rest)
        os.utime(writing.file.fileno(), ns=self._moment("now"))
        writing.file.close()
        self.saves.completed(name, writing.content, next(self.world.numbers), self.name)
        self._hint(name, Evidence.CLOSED, lost=hint_lost)

    def _give_up(self, name: str) -> None:
        if name in self.writing:
            self.writing.pop(name).file.close()

    def append(self, name: str) -> None:
        """Spoil a file by what does not belong there."""
        path = self.root / name
        self.saves.plain.discard((name, path.read_bytes()))
        with path.open("ab") as file:
            file.write(b"junk")
        self.written.add(path.stat().st_ino)
        os.utime(path, ns=self._moment("now"))
        self._hint(name, Evidence.CLOSED, lost=False)

    def touch(self, name: str, *, at: str) -> None:
        """Change its time and nothing else."""
        self.saves.plain.discard((name, (self.root / name).read_bytes()))
        os.utime(self.root / name, ns=self._moment(at))

    def delete(self, name: str) -> None:
        """Remove it; a writer of it writes on into nowhere."""
        (self.root / name).unlink()

    def rotate(self, name: str, to: str) -> None:
        """Give a file that is not being written another name, in place of what stands there."""
        path = self.root / to
        path.parent.mkdir(exist_ok=True)
        content = (self.root / name).read_bytes()
        self.saves.plain.discard((name, content))
        (self.root / name).rename(path)
        self.rotated.add(path.stat().st_ino)
        if (name, content) in self.saves.order:
            self.saves.completed(to, content, next(self.world.numbers), self.name)
        self._give_up(to)
        self._hint(to, Evidence.PLACED, lost=False)

    def standing(self) -> Iterator[tuple[str, Path]]:
        """The checkpoints that stand in the watch dir, by name."""
        for path in sorted(self.root.rglob("*.pt")):
            if HOME not in path.parts:
                yield path.relative_to(self.root).as_posix(), path

    def held(self) -> Iterator[tuple[str, bytes]]:
        """The names and bytes of what the spool holds: pins, and catches that were not cut in the middle."""
        for path in sorted((self.root / HOME).glob("[cp]*/**/*.pt")):
            _, folder, *name = path.relative_to(self.root / HOME).parts
            if not folder.startswith("new-"):
                yield "/".join(name), path.read_bytes()

    def break_disk(self, verbs: list[str], code: int = errno.ENOSPC) -> None:
        """Refuse these calls until it is mended."""
        self.hurt = dict.fromkeys(verbs, code)
        self.refused.update(verbs)
        self.was_hurt = self.ever_hurt = True

    def mend(self) -> None:
        """Refuse nothing."""
        self.hurt = {}

    # --- what the judge must know ---

    def about_to_delete(self, path: Path) -> None:
        """The sidecar deletes a file: a trainer's only when it has been durable."""
        if HOME not in path.parts and path.exists():
            name = path.relative_to(self.root).as_posix()
            if (name, path.read_bytes()) not in self.saves.durable:
                self.world.complain(f"{name} is deleted, and was never durable")

    def about_to_release(self, path: Path) -> None:
        """The sidecar lets a pin go: what is durable, or was saved anew, or by another, under that name."""
        pin = path.parent.name == "pins" and not self.choices["keep_remote"]  # else it may be skipped
        files = [each for each in path.rglob("*.pt") if pin]
        for file in files:
            save = file.relative_to(path).as_posix(), file.read_bytes()
            n = self.saves.order.get(save)
            others = [each for each in self.saves.order if each[0] == save[0]]
            newer = any(self.saves.order[it] > (n or 0) or self.saves.by[it] != self.name for it in others)
            held = sum(each.samefile(file) for each in (self.root / HOME).glob("[cp]*/**/*.pt"))
            held += file.stat().st_ino in self.in_place  # the trainer's own; what was sent is older
            held += self._has_descriptor_of(file)
            if n is not None and save not in self.saves.durable and not newer and held == 1:
                self.world.complain(f"{save[0]} is let go, and is not durable")

    def _has_descriptor_of(self, file: Path) -> bool:
        living = self.living
        pins = living.spool._pinned_descriptors.values() if living is not None else ()
        return any(os.path.samestat(os.fstat(each), file.stat()) for each in pins)

    def claimed(self, life: Life, event: Claimed) -> None:
        self.judge.claimed(life, event)

    def fenced(self, life: Life, event: Fenced) -> None:
        self.judge.fenced(life, event)

    def restored(self, life: Life, event: Restored) -> None:
        self.judge.restored(life, event)

    def judge_end(self, life: Life) -> None:
        assert life.end is not None
        if (
            life.end.code == Exit.DURABLE
            and not self.was_hurt
            and any((self.root / HOME / "pins").glob("*/**/*.pt"))
        ):
            self.world.complain("it says that all is durable, and holds pins")
        if life.end.code not in (Exit.DURABLE, Exit.NOT_DURABLE, Exit.FENCED):
            self.judge.ended_badly(life)
