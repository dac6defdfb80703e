"""One sidecar's life, one observation at a time: its code, its spool and its watch dir are the real ones.

The event loop, the clock and the wire to the bucket are ours: a life runs until it waits for the bucket or
for nothing, and what it does next depends on nothing but what it has observed. So the same observations lead
to the same place, every time.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from ckpt_sidecar import sidecar
from ckpt_sidecar.checkpoint import Book, Id, Pinned
from ckpt_sidecar.completion import Evidence
from ckpt_sidecar.disk import Disk
from ckpt_sidecar.events import Event, Fenced, Moved, Ready, Restored
from ckpt_sidecar.ledger import Times
from ckpt_sidecar.manifest import Holder
from ckpt_sidecar.names import HOME
from ckpt_sidecar.patience import PatientBucket
from ckpt_sidecar.settings import Settings
from ckpt_sidecar.sidecar import Sidecar, World
from ckpt_sidecar.spool import Spool
from ckpt_sidecar.watcher import Watcher
from tests.model.loop import Loop
from tests.model.memory import memory_of
from tests.model.store import Answer, Request
from tests.model.wire import Wire

SECOND = 1_000_000_000
BORN = 1_700_000_000 * SECOND  # ns since the epoch
PREFIX = "job/"
PART_BYTES = 16  # in place of 8 MiB: what is larger goes up in parts
KINDS = {"small": 12, "large": 20}  # bytes
SIDES = ("A", "B")


@contextmanager
def small_world() -> Iterator[None]:
    """Parts of a few bytes, and a watcher that hears of a save from us, not from the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sidecar, "PART_BYTES", PART_BYTES)
        patch.setattr(sidecar, "Watcher", partial(Watcher, events=False))
        yield


# --- what a trainer saves ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Save:
    """The n-th save on a side."""

    side: str
    n: int
    name: str
    kind: str

    @property
    def saved_at(self) -> int:
        """When: another time for each, and never later on one side than all on the other."""
        return BORN + (2 * self.n + SIDES.index(self.side)) * SECOND

    @property
    def content(self) -> bytes:
        """What: other bytes for each."""
        text = f"{self.side}{self.n} {self.name} {self.kind}"
        return text.encode().ljust(KINDS[self.kind], b".")[: KINDS[self.kind]]

    def write(self, root: Path) -> None:
        """Save it as a trainer does: under another name, then renamed."""
        temporary = root / "saving.tmp"
        temporary.write_bytes(self.content)
        os.utime(temporary, ns=(self.saved_at, self.saved_at))
        temporary.rename(root / self.name)


# --- a disk at rest ----------------------------------------------------------------------------------

Tree: TypeAlias = tuple[tuple[str, bytes | None, int, str], ...]  # path, content, mtime, first link to it


class Unsynced(Disk):
    """The real file system without waiting for it: no power is lost here."""

    def sync_dir(self, path: Path) -> None:
        """Not needed."""

    def write_file(self, path: Path, data: bytes, *, sync: bool, in_place: bool = False) -> None:
        """Write, but wait for nothing."""
        super().write_file(path, data, sync=False, in_place=in_place)


def freeze(root: Path) -> Tree:
    """Everything below root that a start can see: names, bytes, links, and the times of what was saved."""
    links: dict[int, str] = {}
    found: list[tuple[str, bytes | None, int, str]] = []
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir():
            found.append((name, None, 0, ""))
        elif not name.startswith(f"{HOME}/incoming/"):  # a start clears it before it looks
            status = path.stat()
            ours = path.suffix in (".json", ".jsonl") or path.name == "lock"
            first = links.setdefault(status.st_ino, name)
            found.append((name, path.read_bytes(), 0 if ours else status.st_mtime_ns, first))
    return tuple(found)


def thaw(tree: Tree, root: Path) -> None:
    """Lay it out again."""
    root.mkdir()
    for name, content, mtime_ns, first in tree:
        path = root / name
        if content is None:
            path.mkdir()
        elif first != name:
            path.hardlink_to(root / first)
        else:
            path.write_bytes(content)
            if mtime_ns:
                os.utime(path, ns=(mtime_ns, mtime_ns))


def pins_in(tree: Tree) -> frozenset[Pin]:
    """What the spool holds, told by its files."""
    parts = [name.split("/", 3) for name, content, _, _ in tree if content is not None]
    return frozenset(
        (Id.parse(each[2]), each[3]) for each in parts if each[:2] == [HOME, "pins"] and each[3:]
    )


# --- a life ------------------------------------------------------------------------------------------

Pin: TypeAlias = tuple[Id, str]


@dataclass(frozen=True, slots=True)
class View:
    """Where a life stands, as far as anybody else may care. `given_up`, `restored`: in the last step."""

    side: str
    life: int  # how often it has started
    up: bool
    saves: tuple[Save, ...]
    pinned: tuple[tuple[Id, str, int], ...]  # all checkpoints that there ever were: id, name, saved_at
    pins: frozenset[Pin]
    claimed: int = 0  # the generation that the spool has noted
    asked: tuple[Request, ...] = ()
    given_up: tuple[Request, ...] = ()
    generation: int = 0
    ready: bool = False
    fenced: bool = False
    waiting: int = 0
    restored: tuple[str, Id | None, bytes | None] | None = None
    died_of: str = ""


class Life:
    """A sidecar from its start to its crash."""

    def __init__(self, root: Path, tree: Tree, before: View, *, bound: bool) -> None:
        self.root = root
        self._before = before
        self._saves = before.saves
        self._told: list[Event] = []
        self._pinned = before.pinned
        self._tokens: list[str] = []
        self._loop = Loop()
        self._wire = Wire(f"{before.side}{before.life}", bound=bound)
        thaw(tree, root)
        self._spool = Spool(root, disk=Unsynced())
        self._spool.open(new_id=f"spool {before.side}")
        self._sidecar = self._made(before)
        self._running = self._loop.create_task(self._sidecar.run(asyncio.Event().wait))  # type: ignore[arg-type]
        self.view = self._settled()

    def _made(self, before: View) -> Sidecar:
        times = Times(
            wall=lambda: BORN + 3600 * SECOND,
            sleep=lambda _: asyncio.sleep(0),
            chance=lambda: 0.0,
            token=self._token,
        )
        bucket = PatientBucket(
            self._wire, sleep=times.sleep, chance=times.chance, tell=self._told.append, tries=2
        )
        me = Holder("", f"attempt {before.side}", f"node {before.side}", 42, BORN)
        world = World(bucket, times, self._loop.time, me, self._told.append)
        settings: dict[str, Any] = {"settle": 0.0, "rescan_every": 3600.0, "workers": 1}
        made = Settings(watch=self.root, bucket="bucket", prefix=PREFIX, **settings)
        return Sidecar(made, world, spool=self._spool, book=Book())

    def _token(self) -> str:
        """Another than may still be met: those used since the last rest, and the one seen last."""
        by = f"{self._before.side}{self._before.life}"
        tokens = (f"{by}-{n}" for n in count(1))
        met = {*self._tokens, self._sidecar._ledger.manifest.write}
        self._tokens.append(next(each for each in tokens if each not in met))
        return self._tokens[-1]

    def memory(self) -> Hashable:
        """All that it would go on with, where it rests; None where it does not."""
        return (memory_of(self._sidecar, self.root), freeze(self.root)) if self.rest() else None

    def rest(self) -> bool:
        """Does nobody wait for the bucket?

        Then every task waits at the head of its loop, with nothing in hand: what it knows is in the objects.
        """
        if self.view.asked or self.view.died_of:
            return False
        self._tokens.clear()
        return True

    def _settled(self) -> View:
        given_up, told = len(self._wire.given_up), len(self._told)
        self._loop.settle()
        new = self._told[told:]
        self._pinned += tuple(
            (each.checkpoint.id, each.checkpoint.name, each.checkpoint.saved_at)
            for each in new
            if isinstance(each, Moved) and isinstance(each.checkpoint.state, Pinned)
        )
        pins = self.root / HOME / "pins"
        return View(
            self._before.side,
            self._before.life,
            up=True,
            saves=self._saves,
            pinned=tuple(dict.fromkeys(self._pinned)),
            pins=frozenset(
                (Id.parse(id_), name)
                for id_ in (each.name for each in pins.iterdir())
                if not id_.endswith(".json")
                for name in (each.name for each in (pins / id_).iterdir())
            ),
            claimed=self._spool.record.generation,
            asked=tuple(request for request, _ in self._wire.waiting),
            given_up=tuple(self._wire.given_up[given_up:]),
            generation=self._sidecar._ledger.generation,
            ready=any(isinstance(each, Ready) for each in self._told),
            fenced=any(isinstance(each, Fenced) for each in self._told),
            waiting=len(self._sidecar._pipeline.book),
            restored=next((self._shown(each) for each in new if isinstance(each, Restored)), None),
            died_of=self._died_of(),
        )

    def _shown(self, it: Restored) -> tuple[str, Id | None, bytes | None]:
        path = self.root / (it.name or "")
        return it.outcome, it.id, path.read_bytes() if path.is_file() else None

    def _died_of(self) -> str:
        if self._running.done() and not self._running.cancelled():
            return repr(self._running.exception() or self._running.result())
        return "; ".join(self._loop.trouble)

    def answer(self, at: int, answer: Answer) -> None:
        """The bucket answers the call that waits there."""
        self._wire.answer(at, answer)
        self.view = self._settled()

    def save(self, name: str, kind: str) -> None:
        """The trainer saves, and the kernel says so."""
        save = Save(self._before.side, len(self._saves) + 1, name, kind)
        self._saves += (save,)
        save.write(self.root)
        self._sidecar._watcher._inbox.heard(name, Evidence.PLACED)
        self.view = self._settled()

    def end(self) -> None:
        """Take everything down; what it does on the way is nobody's business any more."""
        self._running.cancel()
        self._loop.settle()
        self._spool.close()
        shutil.rmtree(self.root)
