"""Lives of the daemon, seen from outside: each is a process of its own, and can be cut at each of its steps.

The parent keeps the bucket (`Store`), which outlives the lives and remembers all that was ever written; and
it is the trainer (`Trainer`), who saves while the sidecar lives, and goes on while it is dead.
"""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import os
import random
import re
import signal
import zipfile
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import count
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from ckpt_sidecar.bucket import BucketError, Condition, ObjectRef, Unchanged
from ckpt_sidecar.checkpoint import state_name
from ckpt_sidecar.events import Event, Moved
from ckpt_sidecar.settings import Settings
from tests.crash.life import live
from tests.engine.support import BORN, SECOND, save
from tests.fakes import BytesSink, MemoryBucket

_BETWEEN: ContextVar[Callable[[], Awaitable[None]]] = ContextVar("between the look and the write")
_FRAME_BYTES = 30 + 46 + 22 + 2 * len("data")  # of a zip archive with one record
SECONDS = 60.0  # for one life, which takes a fraction of one
_NUMBERED = re.compile(r"(probe-|caught/|incoming/|aside/|pins/)[\w-]+")


@cache
def _nursery() -> ForkServerContext:
    """A process that has imported everything and has no threads; from it each life is forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "tests.crash.life"])
    return context


# --- the bucket --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Written:
    """One object that was written, whenever it was; deleted where there is no `ref`."""

    key: str
    ref: ObjectRef | None = None
    body: bytes = b""


class Store(MemoryBucket):
    """A bucket in memory that remembers all that was ever written, and takes small parts.

    Where it does not honour a condition there is a step between the look at the key and the write.
    """

    def __init__(self, **named: Any) -> None:
        super().__init__(min_part_bytes=1, **named)
        self.written: list[Written] = []

    async def _check(self, key: str, when: Condition, *, honoured: bool) -> None:
        await super()._check(key, when, honoured=honoured)
        if not honoured:
            await _BETWEEN.get()()

    def _keep(self, key: str, body: bytes, etag: str, metadata: Mapping[str, str]) -> ObjectRef:
        ref = super()._keep(key, body, etag, metadata)
        self.written.append(Written(key, ref, body))
        return ref

    async def delete(self, key: str, *, when: Unchanged, version_id: str | None = None) -> None:
        """As promised."""
        await super().delete(key, when=when, version_id=version_id)
        self.written.append(Written(key))

    async def answer(self, verb: str, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Do what a life asks for; return what it is told, which may be an error."""
        try:
            if verb == "list":
                return [each async for each in self.list(*given)]
            if verb == "get_range":
                ref, span = given
                sink = BytesSink(ref.size)
                await self.get_range(ref, span, sink)
                return bytes(sink.content[span.offset : span.end])
            return await getattr(self, verb)(*given, **named)
        except BucketError as error:
            return error


# --- the trainer -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that the trainer has completed: `number` is its place in the order of all."""

    number: int
    name: str
    content: bytes

    @property
    def saved_at(self) -> int:
        """In ns since the epoch."""
        return BORN + self.number * SECOND


@dataclass(frozen=True, slots=True)
class Save:
    """Save so many bytes under the name, once `after` was told."""

    after: str
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Rotate:
    """Delete the file, but only once `after` was told: that the sidecar has it."""

    after: str
    name: str


class Trainer:
    """Acts one after the other, each once what it waits for was told."""

    def __init__(self, root: Path, acts: Sequence[Save | Rotate], *, first: int = 1) -> None:
        self.root = root
        self.saved: list[Saved] = []
        self._started = False
        self._numbers = count(first)
        self._todo = list(acts)

    @property
    def idle(self) -> bool:
        """Has it done all?"""
        return not self._todo

    def told(self, what: str) -> None:
        """Hear what has happened in the sidecar."""
        self._started |= what == "Ready"
        if self._todo and self._todo[0].after == what:
            self._act(self._todo.pop(0))

    def go_on(self) -> None:
        """Do, while the sidecar is dead, what one does without it; nobody trains who was not started yet."""
        for act in [act for act in self._todo if isinstance(act, Save) and self._started]:
            self._todo.remove(act)
            self._act(act)

    def save(self, name: str, size: int) -> None:
        """Save a checkpoint whose bytes are like no other's."""
        number = next(self._numbers)
        saved = Saved(number, name, _archive(size, random.Random(f"{name} {number}")))
        save(self.root, name, saved.content, at=number)
        self.saved.append(saved)

    def _act(self, act: Save | Rotate) -> None:
        if isinstance(act, Save):
            self.save(act.name, act.size)
        else:
            (self.root / act.name).unlink()


def _archive(size: int, chance: random.Random) -> bytes:
    """So many bytes that are whole by their own format, as those of torch.save are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("data"), chance.randbytes(size - _FRAME_BYTES))
    return buffer.getvalue()


# --- a life ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Step:
    """A place in a life: before or after a call, the `nth` of those that look the same."""

    where: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.where} [{self.nth}]"


At = Callable[["Life", Step], Awaitable[None] | None]


class Life:
    """One life. At each of its steps `at` is asked, and may kill it, or hold this step up.

    It is asked to stop once `enough`. `steps` are those that it has reached, `told` what it said of itself.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        trainer: Trainer,
        *,
        log: Path,
        at: At,
        enough: Callable[[Life], bool] | None = None,
    ) -> None:
        self.steps: list[Step] = []
        self.told: list[str] = []
        self.killed = False
        self._store, self._trainer, self._at = store, trainer, at
        self._enough = enough or (lambda life: "Ready" in life.told and trainer.idle)
        self._log = log
        self._met: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked = False
        self._failed: BaseException | None = None
        context = _nursery()
        self._calls, theirs = context.Pipe()
        gate, self._gate = context.Pipe(duplex=False)
        self._process = context.Process(target=live, args=(settings, str(log), theirs, gate))
        self._root = str(settings.watch)
        self._process.start()
        theirs.close()
        gate.close()

    async def end(self) -> int | None:
        """Live it to its end; return its exit code, None where it was killed."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._process.sentinel, ended.set)
        loop.add_reader(self._calls.fileno(), self._take)
        try:
            async with asyncio.timeout(SECONDS):
                await ended.wait()
        except TimeoutError:
            raise AssertionError(f"it does not end; {self}") from None
        finally:
            loop.remove_reader(self._process.sentinel)
            loop.remove_reader(self._calls.fileno())
            if not ended.is_set():
                self.kill()
            self._process.join()
            code = self._process.exitcode
            for each in (self._calls, self._gate, self._process):
                each.close()
            await asyncio.gather(*self._tasks)
        if self._failed is not None:
            raise self._failed
        return None if self.killed else code

    def kill(self) -> None:
        """Kill it, here and now. What it has not been answered by now it never will be."""
        self.killed = True
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process.pid
        os.kill(self._process.pid, number)

    def __str__(self) -> str:
        tail = self._log.read_text()[-4000:] if self._log.exists() else ""
        last = "\n  ".join(str(each) for each in self.steps[-20:])
        return f"its last steps:\n  {last}\nand its log:\n{tail}"

    # what it says

    def _take(self) -> None:
        try:
            kind, what = self._calls.recv()
        except (EOFError, ConnectionResetError):
            asyncio.get_running_loop().remove_reader(self._calls.fileno())
            return
        if self.killed:
            return
        if kind == "event":
            self._hear(what)
            return
        work = self._stepped(what) if kind == "step" else self._called(*what)
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failed = self._failed or task.exception()
            self.kill()

    def _hear(self, event: Event) -> None:
        if isinstance(event, Moved):
            text = f"{event.checkpoint.name} {state_name(event.checkpoint.state)}"
        else:
            text = type(event).__name__
        self.told.append(text)
        self._trainer.told(text)
        if not self._asked and self._enough(self):
            self._asked = True
            self.signal(signal.SIGTERM)

    async def _reached(self, where: str) -> None:
        where = _NUMBERED.sub(
            r"\1#", f"{where} ".replace(f"{self._root}/", "").replace(f"{self._root} ", ". ").rstrip()
        )
        self._met[where] += 1
        step = Step(where, self._met[where])
        self.steps.append(step)
        waiting = self._at(self, step)
        if waiting is not None:
            await waiting

    async def _stepped(self, where: str) -> None:
        await self._reached(where)
        if not self.killed:
            self._gate.send(None)

    async def _called(self, number: int, verb: str, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        what = f"bucket.{verb} {_target(given)}"
        await self._reached(f"before {what}")
        if self.killed:
            return
        _BETWEEN.set(lambda: self._reached(f"within {what}"))
        answer = await self._store.answer(verb, given, named)
        await self._reached(f"after {what}")
        if not self.killed:
            self._calls.send((number, answer))


def _target(given: Sequence[Any]) -> str:
    """What a call is about: a key, and the number of a part."""
    words = [getattr(given[0], "key", given[0])]
    words += [f"part {each.number}" for each in given[1:] if hasattr(each, "number")]
    return " ".join(words)
