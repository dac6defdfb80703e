"""One life of the real daemon, in a process of its own that can be killed at any of its steps.

`live` is what runs in that process: `daemon.run_daemon`, the composition as it is, but for two seams. The
bucket is `Remote`, whose calls the parent answers, so that the bucket outlives the process. And each step on
the file system stops until the parent says "go": it may kill instead.

The steps are those that the code makes, found by looking and not from a list: the interpreter tells its audit
hook of each call that may change the file system, in whichever module it stands, just before it is made; and
every method of `Disk` is wrapped, so that there is a step behind each as well, and before what the
interpreter does not tell of (the writing of bytes).
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from aiohttp import web  # noqa: F401  (half a second to import, once for all lives)

from ckpt_sidecar import bucket as bucket_module
from ckpt_sidecar import daemon, landing, outside, sidecar, spool
from ckpt_sidecar.bucket import (
    MIN_PART_BYTES,
    Abilities,
    BucketError,
    Condition,
    ObjectRef,
    Part,
    Sink,
    Source,
    Span,
    Unchanged,
    Upload,
    crc64,
)
from ckpt_sidecar.disk import Disk
from ckpt_sidecar.events import Event
from ckpt_sidecar.log import Log
from ckpt_sidecar.settings import Settings

PART_BYTES = 256  # so that a checkpoint of many parts is small
_HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes that were read from a source, and where they lay in it."""

    offset: int
    content: bytes

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill the view, as far as there are bytes."""
        found = self.content[offset - self.offset :][: len(view)]
        view[: len(found)] = found
        return len(found)


class Line:
    """The line to the parent. What is said on it arrives in the order in which it was said."""

    def __init__(self, calls: Connection, steps: Connection) -> None:
        self.calls = calls
        self._steps = steps
        self._saying, self._stepping = threading.Lock(), threading.Lock()

    def say(self, kind: str, what: Any) -> None:
        """Tell the parent, without an answer."""
        with self._saying:
            self.calls.send((kind, what))

    def hear(self) -> Any:
        """Return what the parent has to say; where it is gone this life has no purpose any more."""
        try:
            return self.calls.recv()
        except (EOFError, ConnectionResetError):
            os._exit(1)

    def step(self, where: str) -> None:
        """Stop until the parent says that life goes on; from any thread."""
        with self._stepping:
            self.say("step", where)
            self._steps.recv()


# --- the bucket --------------------------------------------------------------------------------------


class Remote:
    """A bucket that the parent keeps. Any number of calls may be under way."""

    def __init__(self, name: str, line: Line) -> None:
        self.name = name
        self.abilities = Abilities(
            conditional_put=False, conditional_complete=False, conditional_delete=False, checksum=False
        )
        self._line = line
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    def take_answer(self) -> None:
        """Pass an answer on to whoever waits for it."""
        number, answer = self._line.hear()
        waiting = self._waiting.pop(number, None)
        if waiting is None or waiting.done():
            return
        if isinstance(answer, BucketError):
            waiting.set_exception(answer)
        else:
            waiting.set_result(answer)

    async def _ask(self, verb: str, *given: Any, **named: Any) -> Any:
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._line.say("call", (number, verb, given, named))
        return await answer

    async def probe(self, key: str) -> Abilities:
        """As promised."""
        self.abilities = await self._ask("probe", key)
        return self.abilities

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectRef]:
        """As promised."""
        content, ref = await self._ask("get", key, limit=limit)
        return content, ref

    async def head(self, key: str) -> ObjectRef | None:
        """As promised."""
        ref: ObjectRef | None = await self._ask("head", key)
        return ref

    async def get_range(self, ref: ObjectRef, span: Span, sink: Sink) -> int:
        """As promised; the bytes are written in a thread, as those from S3 are."""
        content: bytes = await self._ask("get_range", ref, span)
        await asyncio.to_thread(sink.write_at, span.offset, memoryview(content))
        return crc64(content)

    async def list(self, prefix: str) -> AsyncIterator[ObjectRef]:
        """As promised."""
        for ref in await self._ask("list", prefix):
            yield ref

    async def put(
        self, key: str, body: bytes | tuple[Source, int], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """As promised; a source is read in a thread."""
        if not isinstance(body, bytes):
            body = (await asyncio.to_thread(_read, body[0], Span(1, 0, body[1]))).content
        ref: ObjectRef = await self._ask("put", key, body, when=when, metadata=dict(metadata))
        return ref

    async def delete(self, key: str, *, when: Unchanged, version_id: str | None = None) -> None:
        """As promised."""
        await self._ask("delete", key, when=when, version_id=version_id)

    async def create_multipart(self, key: str, *, metadata: Mapping[str, str]) -> str:
        """As promised."""
        return str(await self._ask("create_multipart", key, metadata=dict(metadata)))

    async def put_part(self, upload: Upload, span: Span, source: Source) -> Part:
        """As promised; the source is read in a thread."""
        part: Part = await self._ask("put_part", upload, span, await asyncio.to_thread(_read, source, span))
        return part

    async def list_parts(self, upload: Upload) -> list[Part]:  # type: ignore[valid-type]
        """As promised."""
        parts: list[Part] = await self._ask("list_parts", upload)
        return parts

    async def complete_multipart(
        self, upload: Upload, parts: Sequence[Part], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """As promised."""
        given = {"when": when, "metadata": dict(metadata)}
        ref: ObjectRef = await self._ask("complete_multipart", upload, tuple(parts), **given)
        return ref

    async def abort_multipart(self, upload: Upload) -> None:
        """As promised."""
        await self._ask("abort_multipart", upload)

    async def list_uploads(self, key: str) -> list[Upload]:  # type: ignore[valid-type]
        """As promised."""
        uploads: list[Upload] = await self._ask("list_uploads", key)
        return uploads


def _read(source: Source, span: Span) -> Body:
    content = bytearray(span.size)
    got = source.read_into(span.offset, memoryview(content))
    return Body(span.offset, bytes(content[:got]))


# --- the file system ---------------------------------------------------------------------------------


def stepping_disk(line: Line) -> type[Disk]:
    """A `Disk` that stops before and after each of its calls, whichever there are."""

    def stepping(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def step(self: Disk, *given: Any, **named: Any) -> Any:
            where = f"disk.{name} {_paths(each for each in given if isinstance(each, Path))}"
            line.step(f"before {where}")
            result = call(self, *given, **named)
            line.step(f"after {where}")
            return result

        return step

    calls = inspect.getmembers(Disk, inspect.isfunction)
    return type("SteppingDisk", (Disk,), {n: stepping(n, call) for n, call in calls if not n.startswith("_")})


def _audit(line: Line) -> None:
    """Stop before each call that may change the file system, in whichever module it stands."""

    def told(event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            given = given[:1] if given[2] & _WRITES else ()
        elif not event.startswith(("os.", "shutil.")) or event in _HARMLESS:
            return
        if paths := _paths(given):
            line.step(f"before {event} {paths}")

    sys.addaudithook(told)


def _paths(given: Iterable[Any]) -> str:
    return " ".join(os.fsdecode(each) for each in given if isinstance(each, str | bytes | Path))


# --- the life ----------------------------------------------------------------------------------------


def live(settings: Settings, log: str, calls: Connection, steps: Connection) -> None:
    """Run the daemon until it ends by itself; its exit code is this process's.

    With an endpoint in its settings it is on a real store, and nothing of the bucket is replaced.
    """
    faulthandler.enable()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    line = Line(calls, steps)

    @asynccontextmanager
    async def opened(name: str, **_: Any) -> AsyncIterator[Remote]:
        remote = Remote(name, line)
        asyncio.get_running_loop().add_reader(calls.fileno(), remote.take_answer)
        yield remote
        asyncio.get_running_loop().remove_reader(calls.fileno())

    class TellingLog(Log):
        """The log; and the parent is told as well."""

        def tell(self, event: Event) -> None:
            super().tell(event)
            line.say("event", event)

    no_rest = SimpleNamespace(random=lambda: 0.0)
    replacements: dict[ModuleType, dict[str, Any]] = {
        spool: {"Disk": (disk := stepping_disk(line))},
        landing: {"Disk": disk},
        sidecar: {"PART_BYTES": MIN_PART_BYTES},
        outside: {"Log": TellingLog, "random": no_rest},
    }
    if not settings.endpoint_url:
        replacements[bucket_module] = {"MIB": 1, "MIN_PART_BYTES": 1}
        replacements[sidecar] = {"PART_BYTES": PART_BYTES}
        replacements[outside]["S3Bucket"] = SimpleNamespace(open=opened)
    for module, names in replacements.items():  # in this process, which has no other use
        for name, value in names.items():
            assert hasattr(module, name), f"{module.__name__} has no {name} any more"
            setattr(module, name, value)
    _audit(line)
    sys.exit(daemon.run_daemon(settings, (), lambda code, _: os._exit(code)).code)
