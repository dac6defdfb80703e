"""The bytes of parts, up and down: a few worker threads, each with one buffer of its own that it reuses.

What goes up is checked before it leaves, what comes down as it arrives, a piece at a time. Memory is the
number of threads times the buffer, however large a part is. A buffer is filled and sent by one and the same
thread, so it is never refilled under a living socket.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ckpt_sidecar.bucket import Conflict, Corrupt, Sink, Source, Span, crc64, encode_crc64
from ckpt_sidecar.pace import PIECE_BYTES, Pace

T = TypeVar("T")


class Stopped(Exception):
    """Whoever waited for this body was cancelled; nobody gets to see it."""


class Checks:
    """The checksums of bytes that are about to leave, as the store is told them."""

    def __init__(self, *, crc64nvme: bool, md5: bool) -> None:
        self._declare_crc = crc64nvme
        self._md5 = hashlib.md5(usedforsecurity=False) if md5 else None
        self.crc = 0

    def add(self, block: bytes | memoryview) -> None:
        """Go on with these bytes."""
        self.crc = crc64(block, self.crc)
        if self._md5:
            self._md5.update(block)

    def headers(self) -> dict[str, str]:
        """Return what to declare."""
        headers = {"ChecksumCRC64NVME": encode_crc64(self.crc)} if self._declare_crc else {}
        if self._md5:
            headers["ContentMD5"] = base64.b64encode(self._md5.digest()).decode("ascii")
        return headers


class Body:
    """A run of a source, to be sent piece by piece out of the buffer, with no copy of it anywhere.

    A run longer than the buffer is read twice: for its checksum, then to be sent.
    """

    def __init__(
        self, source: Source, span: Span, buffer: memoryview, *, pace: Pace, stop: threading.Event
    ) -> None:
        self._source = source
        self._span = span
        self._buffer = buffer
        self._pace = pace
        self._stop = stop
        self._held = False  # the buffer holds all of it
        self._crcs: list[int] = []  # of everything up to the end of each buffer's worth
        self.failure: Exception | None = None  # botocore would hide it behind an error of its own

    def read_through(self, checks: Checks) -> None:
        """Read it all once, for its checksums."""
        for block in self._blocks():
            checks.add(block)
            self._crcs.append(checks.crc)

    def __iter__(self) -> Iterator[memoryview]:
        try:
            yield from self._pieces()
        except Exception as error:
            self.failure = error
            raise

    def _pieces(self) -> Iterator[memoryview]:
        crc = 0
        for block, expected in zip(self._blocks(), self._crcs, strict=True):
            crc = expected if self._held else crc64(block, crc)
            if crc != expected:
                raise Corrupt(f"part {self._span.number}: the bytes on the disk changed while they were sent")
            done = 0
            while done < len(block):
                piece = block[done : done + self._pace.piece_bytes]
                self._stop.wait(self._pace.wait_for(len(piece)))
                _check(self._stop)
                yield piece
                done += len(piece)

    def _blocks(self) -> Iterator[memoryview]:
        """Yield all bytes, a buffer's worth at a time."""
        for start in range(0, self._span.size, len(self._buffer)):
            _check(self._stop)
            block = self._buffer[: self._span.size - start]
            if not self._held:
                self._read(start, block)
            yield block

    def _read(self, start: int, block: memoryview) -> None:
        count = self._source.read_into(self._span.offset + start, block)
        if count < len(block):
            raise Corrupt(f"part {self._span.number}: the source came {len(block) - count} bytes short")
        self._held = len(block) == self._span.size


class Held:
    """Bytes at hand, as a source."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill the view."""
        found = self._body[offset : offset + len(view)]
        view[: len(found)] = found
        return len(found)


def started(count: int, name: str, *, nice: int = 0) -> ThreadPoolExecutor:
    """Return a pool whose threads all run already: none is missing later, when others have used a limit up.

    They are nicer by so much than who starts them: on Linux that is a matter of each thread, and while no
    I/O priority is set, the kernel derives it from that. RuntimeError when they cannot be had.
    """
    pool = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=_be_nice, initargs=(nice,))
    all_here = threading.Barrier(count)
    try:
        for job in [pool.submit(all_here.wait) for _ in range(count)]:
            job.result()
    except RuntimeError:
        all_here.abort()
        pool.shutdown()
        raise
    return pool


def _be_nice(by: int) -> None:
    with suppress(OSError):  # a sandbox that does not let it be is none of our business
        os.nice(by)


class BodyThreads:
    """Sends and fetches bodies through a boto3 client; errors come out as it, source or sink raise them.

    A body is put into the request when that is signed and about to leave. Given as `Body=`, bytes would be
    wrapped as a file (100-continue, 16 KiB writes), awscrt's signer would copy a bytearray, and all of it
    would have to leave within one timeout.
    """

    def __init__(
        self, client: Any, *, workers: int, buffer_bytes: int, pace: Pace | None = None, nice: int = 0
    ) -> None:
        self._client = client
        self._pace = pace or Pace(0.0, clock=time.monotonic)
        client.meta.events.register("before-send.s3", self._put_in)
        self._buffer_bytes = buffer_bytes
        self._own = threading.local()
        self._threads = started(workers, "body", nice=nice)

    def close(self) -> None:
        """End the threads; none is at work any more, for every await of one was waited for."""
        self._threads.shutdown()

    async def send(
        self, operation: str, source: Source, span: Span, *, checks: Checks, arguments: Mapping[str, Any]
    ) -> tuple[dict[str, Any], int]:
        """Send one run of the source; return the store's answer and the CRC64NVME of what was sent."""

        def work(buffer: memoryview, stop: threading.Event) -> tuple[dict[str, Any], int]:
            body = Body(source, span, buffer, pace=self._pace, stop=stop)
            body.read_through(checks)
            ask = getattr(self._client, operation)
            with self._sending(body):
                return ask(ContentLength=span.size, **checks.headers(), **arguments), checks.crc

        return await self._run(work)

    async def fetch(self, sink: Sink, span: Span, *, etag: str, arguments: Mapping[str, Any]) -> int:
        """Read one run of the object into the sink; return its CRC64NVME."""

        def work(_buffer: memoryview, stop: threading.Event) -> int:
            answer = self._client.get_object(Range=f"bytes={span.offset}-{span.end - 1}", **arguments)
            try:
                to_skip = _to_skip(answer, span, etag)
                return _pour(answer["Body"], span, sink, to_skip=to_skip, stop=stop)
            finally:
                answer["Body"].close()  # keeps the connection if all was read, else gives it up

        return await self._run(work)

    async def _run(self, work: Callable[[memoryview, threading.Event], T]) -> T:
        """Run it in a thread. Cancelling waits until the thread has let go of buffer, source and sink."""
        stop = threading.Event()
        job = self._threads.submit(lambda: work(self._buffer(), stop))
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            stop.set()
            await _ended(job)
            raise

    @contextmanager
    def _sending(self, body: Body) -> Iterator[None]:
        """Let this body leave with what this thread asks for."""
        self._own.body = body
        try:
            yield
        except Exception:
            if body.failure:
                raise body.failure from None
            raise
        finally:
            self._own.body = None

    def _put_in(self, request: Any, **_rest: Any) -> None:
        """Be called by botocore just before it sends a request, in the thread that asks."""
        request.body = getattr(self._own, "body", None) or request.body

    def _buffer(self) -> memoryview:
        """Return this thread's own buffer; what is used of it takes memory, in pages that copy faster."""
        if not hasattr(self._own, "buffer"):
            own = mmap.mmap(-1, self._buffer_bytes)
            with suppress(OSError):  # a kernel without huge pages
                own.madvise(mmap.MADV_HUGEPAGE)
            self._own.buffer = memoryview(own)
        buffer: memoryview = self._own.buffer
        return buffer


async def _ended(job: Future[Any]) -> None:
    """Wait until the thread is through, however often the wait is cancelled; its outcome is nobody's now."""
    waiting = asyncio.wrap_future(job)
    while not waiting.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([waiting])
    if not waiting.cancelled():
        waiting.exception()


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped


def length_of(answer: Mapping[str, Any]) -> int:
    """Return how many bytes the answer announces; Corrupt when it does not say."""
    if answer.get("ContentLength") is None:
        raise Corrupt("the answer does not tell its length", hint="look at the proxy in between")
    return int(answer["ContentLength"])


def _to_skip(answer: Mapping[str, Any], span: Span, etag: str) -> int:
    """Return how many bytes of the answer come before the span; Conflict when it is of another object."""
    seen = str(answer.get("ETag", "")).strip('"')
    if seen and seen != etag:
        raise Conflict(f"the object has another etag ({seen}) than it should have ({etag})")
    size = length_of(answer)
    whole = size != span.size and "ContentRange" not in answer  # rclone says 200, and yet sends the range
    to_skip = span.offset if whole else 0
    if size - to_skip < span.size:
        raise Corrupt(f"the object came short: {size - to_skip} bytes instead of {span.size}")
    return to_skip


def _pour(stream: Any, span: Span, sink: Sink, *, to_skip: int, stop: threading.Event) -> int:
    crc = 0
    done = -to_skip
    while done < span.size:
        _check(stop)
        wanted = span.size - done if done >= 0 else -done
        piece = stream.read(min(wanted, PIECE_BYTES))  # `readinto` would copy it once more
        if not piece:
            raise Corrupt(f"the object came short: {done} bytes instead of {span.size}")
        if done >= 0:
            crc = crc64(piece, crc)
            sink.write_at(span.offset + done, memoryview(piece))
        done += len(piece)
    return crc
