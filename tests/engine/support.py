"""What the engines' tests share: a bucket and a disk that fail when told to, events kept, files on a disk."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeVar

from ckpt_sidecar.bucket import (
    Abilities,
    Bucket,
    Condition,
    ObjectRef,
    Part,
    Sink,
    Source,
    Span,
    Unchanged,
    Unreachable,
    Upload,
)
from ckpt_sidecar.checkpoint import Checkpoint, File
from ckpt_sidecar.disk import Disk
from ckpt_sidecar.document import parse
from ckpt_sidecar.events import Event
from ckpt_sidecar.ledger import Ledger, Times
from ckpt_sidecar.manifest import Holder, Manifest
from ckpt_sidecar.spool import Spool
from tests.fakes import MemoryBucket

T = TypeVar("T")
E = TypeVar("E", bound=Event)
PREFIX = "job/"
LATEST = "job/latest.json"
SECOND = 1_000_000_000
BORN = 1_700_000_000 * SECOND  # ns since the epoch: when the tests' files were saved


class Told(list[Event]):
    """The events that were told, in order."""

    def __init__(self) -> None:
        super().__init__()
        self._more = asyncio.Event()

    def __call__(self, event: Event) -> None:
        """Take it in."""
        self.append(event)
        self._more.set()

    async def until(self, so: Callable[[], object]) -> None:
        """Wait until it is so; it is looked at whenever something was told."""
        async with asyncio.timeout(30):
            while not so():
                self._more.clear()
                await self._more.wait()

    def of(self, kind: type[E]) -> list[E]:
        """Return those of one kind."""
        return [event for event in self if isinstance(event, kind)]


# --- a bucket on whose way something happens ----------------------------------------------------------


class Gate:
    """Where a call stops until it is opened."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def __call__(self) -> None:
        """Stop here."""
        self.reached.set()
        await self.opened.wait()


async def _nothing() -> None:
    pass


@dataclass
class _Rule:
    verb: str
    key: str
    passing: int
    times: int
    before: Callable[[], Awaitable[None]]
    after: Callable[[], Awaitable[None]]


class Steps:
    """A bucket around another one: before or after its calls something happens.

    A rule is for the calls of one verb on keys that end with `key`, after the first `passing` of them, so
    many `times`.
    """

    def __init__(self, inner: Bucket) -> None:
        self.inner = inner
        self._rules: list[_Rule] = []

    def on(
        self,
        verb: str,
        key: str = "",
        *,
        before: Callable[[], Awaitable[None]] = _nothing,
        after: Callable[[], Awaitable[None]] = _nothing,
        passing: int = 0,
        times: int = 1,
    ) -> None:
        """Do something around a call."""
        self._rules.append(_Rule(verb, key, passing, times, before, after))

    def fail(self, verb: str, error: Exception, key: str = "", *, passing: int = 0, times: int = 1) -> None:
        """Raise before anything has happened."""
        self.on(verb, key, before=_raising(error), passing=passing, times=times)

    def lose(self, verb: str, key: str = "", *, passing: int = 0, times: int = 1) -> None:
        """Lose the answer: it has happened, and nobody says so."""
        lost = Unreachable("the answer was lost", reason="timeout")
        self.on(verb, key, after=_raising(lost), passing=passing, times=times)

    def hold(self, verb: str, key: str = "", *, passing: int = 0, times: int = 1) -> Gate:
        """Have the call wait before anything has happened."""
        gate = Gate()
        self.on(verb, key, before=gate, passing=passing, times=times)
        return gate

    def relent(self) -> None:
        """Forget all rules."""
        self._rules.clear()

    def _rule(self, verb: str, key: str) -> _Rule | None:
        for rule in self._rules:
            if rule.verb == verb and key.endswith(rule.key) and rule.times:
                if not rule.passing:
                    rule.times -= 1
                    return rule
                rule.passing -= 1
        return None

    async def _step(self, verb: str, key: str, call: Callable[[], Awaitable[T]]) -> T:
        rule = self._rule(verb, key)
        if rule is None:
            return await call()
        await rule.before()
        result = await call()
        await rule.after()
        return result

    @property
    def name(self) -> str:
        """As the other's."""
        return self.inner.name

    @property
    def abilities(self) -> Abilities:
        """As the other's."""
        return self.inner.abilities

    async def probe(self, key: str) -> Abilities:
        """As the other's."""
        return await self._step("probe", key, lambda: self.inner.probe(key))

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectRef]:
        """As the other's."""
        return await self._step("get", key, lambda: self.inner.get(key, limit=limit))

    async def head(self, key: str) -> ObjectRef | None:
        """As the other's."""
        return await self._step("head", key, lambda: self.inner.head(key))

    async def put(
        self, key: str, body: bytes | tuple[Source, int], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """As the other's."""
        return await self._step("put", key, lambda: self.inner.put(key, body, when=when, metadata=metadata))

    async def create_multipart(self, key: str, *, metadata: Mapping[str, str]) -> str:
        """As the other's."""
        return await self._step("create", key, lambda: self.inner.create_multipart(key, metadata=metadata))

    async def put_part(self, upload: Upload, span: Span, source: Source) -> Part:
        """As the other's."""
        return await self._step("part", upload.key, lambda: self.inner.put_part(upload, span, source))

    async def list_parts(self, upload: Upload) -> list[Part]:
        """As the other's."""
        return await self._step("list_parts", upload.key, lambda: self.inner.list_parts(upload))

    async def complete_multipart(
        self, upload: Upload, parts: Sequence[Part], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """As the other's."""
        return await self._step(
            "complete",
            upload.key,
            lambda: self.inner.complete_multipart(upload, parts, when=when, metadata=metadata),
        )

    async def abort_multipart(self, upload: Upload) -> None:
        """As the other's."""
        await self._step("abort", upload.key, lambda: self.inner.abort_multipart(upload))

    async def list_uploads(self, key: str) -> list[Upload]:
        """As the other's."""
        return await self._step("list_uploads", key, lambda: self.inner.list_uploads(key))

    def list(self, prefix: str) -> AsyncIterator[ObjectRef]:
        """As the other's."""
        return self.inner.list(prefix)

    async def delete(self, key: str, *, when: Unchanged, version_id: str | None = None) -> None:
        """As the other's."""
        await self._step("delete", key, lambda: self.inner.delete(key, when=when, version_id=version_id))

    async def get_range(self, ref: ObjectRef, span: Span, sink: Sink) -> int:
        """As the other's."""
        return await self._step("get_range", ref.key, lambda: self.inner.get_range(ref, span, sink))


def _raising(error: Exception) -> Callable[[], Awaitable[None]]:
    async def raise_it() -> None:
        raise error

    return raise_it


# --- a disk that fails when told to ------------------------------------------------------------------


class Asking(Disk):
    """The real file system, but each call is asked for first; `asked` may raise in its place."""

    def asked(self, call: str, path: Path) -> None:
        """May it be done?"""

    def make_dir(self, path: Path, *, mode: int = 0o700) -> None:
        """As on any disk."""
        self.asked("make_dir", path)
        super().make_dir(path, mode=mode)

    def link(self, source: Path, target: Path) -> None:
        """As on any disk."""
        self.asked("link", target)
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """As on any disk."""
        self.asked("rename", target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        """As on any disk."""
        self.asked("unlink", path)
        super().unlink(path)

    def remove_tree(self, path: Path) -> None:
        """As on any disk."""
        self.asked("remove_tree", path)
        super().remove_tree(path)

    def sync_dir(self, path: Path) -> None:
        """As on any disk."""
        self.asked("sync_dir", path)
        super().sync_dir(path)

    def write_file(self, path: Path, data: bytes, *, sync: bool, in_place: bool = False) -> None:
        """As on any disk."""
        self.asked("write_file", path)
        super().write_file(path, data, sync=sync, in_place=in_place)

    def append(self, path: Path, data: bytes) -> None:
        """As on any disk."""
        self.asked("append", path)
        super().append(path, data)

    def create(self, path: Path, size: int) -> int:
        """As on any disk."""
        self.asked("create", path)
        return super().create(path, size)

    def write_at(self, descriptor: int, offset: int, view: memoryview) -> None:
        """As on any disk."""
        self.asked("write_at", Path())
        super().write_at(descriptor, offset, view)

    def finish(self, descriptor: int, mtime_ns: int) -> None:
        """As on any disk."""
        self.asked("finish", Path())
        super().finish(descriptor, mtime_ns)


class Hurt(Asking):
    """A disk that raises what `refuse` has for a call ("link"), or for one on such a file ("link x.pt")."""

    def __init__(self) -> None:
        self.refuse: dict[str, OSError] = {}

    def asked(self, call: str, path: Path) -> None:
        """Raise what is to be raised."""
        error = self.refuse.get(call) or self.refuse.get(f"{call} {path.name}")
        if error is not None:
            raise error

    def free_bytes(self, path: Path) -> int:
        """As on any disk, or nearly none."""
        return 3 if "free" in self.refuse else super().free_bytes(path)


def descriptors() -> int:
    """How many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


# --- files, spools, ledgers --------------------------------------------------------------------------


def times(chance: float = 0.0) -> Times:
    """Return times in which no sleep lasts, and every token is another."""
    numbers = count(1)
    unique = os.urandom(4).hex()
    return Times(
        wall=lambda: BORN + 3600 * SECOND,
        sleep=lambda _: asyncio.sleep(0),
        chance=lambda: chance,
        token=lambda: f"write-{unique}-{next(numbers)}",
    )


def save(root: Path, name: str, content: bytes, *, at: int = 0) -> File:
    """Write a file as a trainer does, saved so many seconds after BORN; return what it is."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.utime(temporary, ns=(BORN + at * SECOND, BORN + at * SECOND))
    temporary.rename(path)
    status = path.stat()
    return File(name, status.st_size, status.st_mtime_ns)


def pin(spool: Spool, file: File) -> Checkpoint:
    """Catch and pin the file that stands in the watch dir."""
    caught = spool.catch(file.name)
    assert caught is not None
    (pinned,), failed = spool.pin([(caught, file)])
    assert failed == []
    return pinned


def opened_spool(
    root: Path, *, name: str = "spool-a", generation: int = 0, disk: Disk | None = None
) -> Spool:
    """Return an open spool, which has claimed that generation."""
    spool = Spool(root, disk=disk)
    assert spool.open(new_id=name) == []
    if generation:
        spool.claimed(generation=generation, attempt="attempt-1")
    return spool


def holder(spool: str = "spool-a", attempt: str = "attempt-1", host: str = "node-a") -> Holder:
    """Return one who claims."""
    return Holder(spool, attempt, host, 42, BORN)


def ledger_of(bucket: Bucket, told: Told, *, history: int = 100) -> Ledger:
    """Return a ledger of the tests' prefix that has not claimed yet."""
    return Ledger(bucket, prefix=PREFIX, times=times(), tell=told, history=history)


def manifest_in(bucket: MemoryBucket) -> Manifest:
    """Return what stands in the bucket as latest.json."""
    return parse(bucket.body(LATEST), prefix=PREFIX)


def listed(bucket: MemoryBucket) -> list[str]:
    """Return the checkpoints that latest.json lists, as `id name`, newest first."""
    return [f"{each.id} {each.name}" for each in manifest_in(bucket).checkpoints]
