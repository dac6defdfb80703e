"""A real HTTP/1.1 proxy in front of a real store, which hurts the requests that it is told to hurt.

Requests go on as they came, byte for byte: they are signed. By rules some are answered by the proxy itself,
cut, stalled, slowed down or damaged. It counts what it did, so that a test can see that the fault happened:

    with Proxy(endpoint) as proxy:
        lost = proxy.on("CompleteMultipartUpload", Broken("done"), key="big.pt")
        ...                     # the sidecar works by way of proxy.url
        assert lost.hits == 1

It runs in a thread of its own, for tests that start a process and for those that are coroutines alike. As
somebody's HTTP_PROXY or HTTPS_PROXY it serves too; with `tls` it is itself spoken to by TLS.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, Literal, Self, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

T = TypeVar("T")
PIECE = 262_144  # bytes that are passed on at a time
FOR_LONG = 1_000_000  # times
EVERY = ""  # the operation of a rule for all of them
Fields = Sequence[tuple[str, str]]


def operation_of(method: str, target: str) -> tuple[str, str]:
    """Return S3's name of what is asked for, and the key; of a list the prefix."""
    parts = urlsplit(target)
    key = unquote(parts.path.lstrip("/").partition("/")[2])
    query = parse_qs(parts.query, keep_blank_values=True)
    marks = [mark for mark in ("uploads", "uploadId", "list-type", "partNumber") if mark in query]
    operation = _OPERATIONS.get((method, bool(key), *marks), f"{method} {'+'.join(marks)}".strip())
    return operation, key or query.get("prefix", [""])[0]


_OPERATIONS: Mapping[tuple[Any, ...], str] = {
    ("GET", True): "GetObject",
    ("GET", True, "uploadId"): "ListParts",
    ("GET", False, "uploads"): "ListMultipartUploads",
    ("GET", False, "list-type"): "ListObjectsV2",
    ("HEAD", True): "HeadObject",
    ("PUT", True): "PutObject",
    ("PUT", True, "uploadId", "partNumber"): "UploadPart",
    ("POST", True, "uploads"): "CreateMultipartUpload",
    ("POST", True, "uploadId"): "CompleteMultipartUpload",
    ("DELETE", True): "DeleteObject",
    ("DELETE", True, "uploadId"): "AbortMultipartUpload",
}


# --- one message --------------------------------------------------------------------------------------


@dataclass
class Head:
    """The first line of a request or of an answer, and its fields."""

    line: str
    fields: Fields

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Self:
        """Read one."""
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        split = (line.partition(":") for line in lines[1:-2])
        return cls(lines[0], [(name, value.strip()) for name, _, value in split])

    def get(self, name: str) -> str:
        """Return a field; "" where it is not there."""
        return next((value for each, value in self.fields if each.lower() == name), "")

    def without(self, *names: str) -> Fields:
        """Return the fields but these."""
        return [(name, value) for name, value in self.fields if name.lower() not in names]

    def dump(self) -> bytes:
        """Write it."""
        fields = "".join(f"{name}: {value}\r\n" for name, value in self.fields)
        return f"{self.line}\r\n{fields}\r\n".encode("latin-1")

    @property
    def status(self) -> int:
        """The status of an answer."""
        return int(self.line.split(" ")[1])

    async def body(self, reader: asyncio.StreamReader, *, to_the_end: bool) -> AsyncIterator[bytes]:
        """Yield what follows it, as it comes; without a length all `to_the_end`, or nothing."""
        if "chunked" in self.get("transfer-encoding").lower():
            async for piece in _chunks(reader):
                yield piece
        else:
            told = self.get("content-length")
            left = int(told) if told else sys.maxsize if to_the_end else 0
            while left > 0 and (piece := await reader.read(min(left, PIECE))):
                yield piece
                left -= len(piece)
            if told and left > 0:
                raise ConnectionResetError("the message was cut")


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    size = 1
    while size:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        yield line + await reader.readexactly(size + 2)


# --- what can be done to it ------------------------------------------------------------------------------


class Fault:
    """What is done to one request; this one passes it on."""

    async def play(self, exchange: Exchange) -> None:
        """Do it."""
        await exchange.relay(await exchange.forward())


@dataclass(frozen=True)
class Answer(Fault):
    """Answer in the store's place; where it is `done`, the store has done it all the same.

    `code` makes an error as S3 writes it, `body` is anything. `early`: before the body is read.
    """

    status: int
    code: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    inside: str = ""  # of the error
    done: bool = False
    early: bool = False

    async def play(self, exchange: Exchange) -> None:
        """Do it."""
        if self.done:
            (await exchange.forward()).close()
        elif not self.early:
            await exchange.swallow()
        error = f"<Error><Code>{self.code}</Code><Message>so says the proxy</Message>{self.inside}</Error>"
        body = f'<?xml version="1.0"?>\n{error}'.encode() if self.body is None else self.body
        fields = {"Date": formatdate(usegmt=True), "Content-Length": str(len(body))} | dict(self.fields)
        exchange.writer.write(Head(f"HTTP/1.1 {self.status} Told", list(fields.items())).dump())
        exchange.writer.write(body if exchange.method != "HEAD" else b"")
        exchange.keep = exchange.keep and not self.early


Point = Literal["start", "body", "end", "done", "answer"]


@dataclass(frozen=True)
class Broken(Fault):
    """It goes as far as a point, and no further: the connection is reset, closed or left in silence for ever.

    start: the head was read; body: half of the body has reached the store; end: it was read, and the store
    asked for nothing; done: the store has done it; answer: half of the answer's body was passed on.
    """

    at: Point
    then: Literal["reset", "closed", "silent"] = "reset"

    async def play(self, exchange: Exchange) -> None:
        """Do it."""
        match self.at:
            case "body":
                await exchange.forward(half=True)
            case "end":
                await exchange.swallow()
            case "done":
                await exchange.forward()
            case "answer":
                await exchange.relay(await exchange.forward(), half=True)
        exchange.keep = False
        if self.then == "reset":
            exchange.reset()
        elif self.then == "silent":
            await asyncio.Event().wait()  # until the proxy ends


@dataclass(frozen=True)
class Slow(Fault):
    """A slow link, a long one, or both."""

    bytes_per_second: float = 0.0
    latency: float = 0.0

    async def play(self, exchange: Exchange) -> None:
        """Do it."""
        exchange.rate = self.bytes_per_second
        await asyncio.sleep(self.latency)
        await exchange.relay(await exchange.forward())


@dataclass(frozen=True)
class Damaged(Fault):
    """One bit in the middle of the body is flipped on its way up, or down."""

    way: Literal["up", "down"]

    async def play(self, exchange: Exchange) -> None:
        """Do it."""
        answer = await exchange.forward(damaged=self.way == "up")
        await exchange.relay(answer, damaged=self.way == "down")


class Whole(Fault):
    """A store that knows no ranges: 200, and all of the object."""

    async def play(self, exchange: Exchange) -> None:
        """Do it."""
        exchange.head.fields = exchange.head.without("range", "x-amz-range")
        await exchange.relay(await exchange.forward())


@dataclass
class Rule:
    """A fault for requests of an operation on keys with `key` in them: after `passing`, so many `times`."""

    operation: str
    fault: Fault
    key: str
    having: str
    passing: int
    times: int
    hits: int = 0  # how often it was played

    def takes(self, it: Exchange) -> bool:
        """Is this request one to be hurt? It counts as such then."""
        meant = self.operation in (EVERY, it.operation) and self.key in it.key
        if not meant or self.hits >= self.times or self.having not in it.head.dump().decode("latin-1"):
            return False
        if self.passing:
            self.passing -= 1
            return False
        self.hits += 1
        return True


@dataclass(frozen=True)
class Seen:
    """A request that came by: what the store said to it (0 where it was not asked)."""

    operation: str
    key: str
    hurt: bool
    status: int


# --- one request -----------------------------------------------------------------------------------------


@dataclass
class Upstream:
    """The store's answer, on a connection of its own."""

    head: Head
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def close(self) -> None:
        """Want no more of it."""
        self.writer.close()


class Exchange:
    """One request and its answer, between a client and the store."""

    def __init__(
        self, store: tuple[str, int], head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.head = head
        self.writer = writer
        self.keep = head.get("connection").lower() != "close"
        self.rate = 0.0
        self.status = 0
        self.method, target, _ = head.line.split(" ")
        self.operation, self.key = operation_of(self.method, target)
        self._store = store
        self._reader = reader
        self._upstreams: list[asyncio.StreamWriter] = []

    async def _body(self) -> AsyncIterator[bytes]:
        """Yield the request's body as it comes; who waits for leave to send it gets it."""
        if self.head.get("expect").lower() == "100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        async for piece in self.head.body(self._reader, to_the_end=False):
            yield piece

    async def swallow(self) -> None:
        """Read the body, for nothing."""
        async for _ in self._body():
            pass

    async def forward(self, *, half: bool = False, damaged: bool = False) -> Upstream:
        """Ask the store, and return its answer; with `half` of the body it gives none, and is left."""
        reader, writer = await asyncio.open_connection(*self._store, limit=PIECE)
        self._upstreams.append(writer)
        method, target, version = self.head.line.split(" ")
        target = target[len("http://") :].partition("/")[2] if target.startswith("http://") else target[1:]
        fields = self.head.without("connection", "proxy-connection", "expect")
        writer.write(Head(f"{method} /{target} {version}", [*fields, ("Connection", "close")]).dump())
        await self._pass(self.head, self._body(), writer, half=half, damaged=damaged)
        if half:
            writer.close()
            return Upstream(Head("HTTP/1.1 000", []), reader, writer)
        head = await Head.read(reader)
        while head.status < 200:
            head = await Head.read(reader)
        self.status = head.status
        return Upstream(head, reader, writer)

    async def relay(self, answer: Upstream, *, half: bool = False, damaged: bool = False) -> None:
        """Pass the store's answer on."""
        head = Head(f"HTTP/1.1 {answer.head.line.split(' ', 1)[1]}", answer.head.without("connection"))
        self.writer.write(head.dump())
        silent = self.method == "HEAD" or head.status in (204, 304)
        if not silent:
            body = head.body(answer.reader, to_the_end=True)
            await self._pass(head, body, self.writer, half=half, damaged=damaged)
        if not silent and not head.get("content-length") and not head.get("transfer-encoding"):
            self.keep = False
        answer.close()

    async def _pass(
        self, head: Head, body: AsyncIterator[bytes], to: asyncio.StreamWriter, *, half: bool, damaged: bool
    ) -> None:
        middle, done = int(head.get("content-length") or 2) // 2, 0
        async for piece in body:
            sent = piece
            if damaged and done <= middle < done + len(piece):
                at = middle - done
                sent = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
            if half and done + len(piece) > middle:
                sent = piece[: middle - done]
            to.write(sent)
            await to.drain()
            if half and len(sent) < len(piece):
                return
            done += len(piece)
            if self.rate:
                await asyncio.sleep(len(piece) / self.rate)

    def reset(self) -> None:
        """Drop the client without a word, not even a goodbye."""
        option = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        self.writer.transport.abort()

    async def end(self) -> None:
        """Leave the store."""
        for writer in self._upstreams:
            writer.close()
            with suppress(OSError, ssl.SSLError):
                await writer.wait_closed()


# --- the proxy -------------------------------------------------------------------------------------------


class Proxy:
    """The proxy in front of the store at `endpoint`; a context manager. `url` is where it listens."""

    def __init__(self, endpoint: str, *, tls: ssl.SSLContext | None = None) -> None:
        where = urlsplit(endpoint)
        self._store = (where.hostname or "", where.port or 80)
        self.tls = tls
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._rules: list[Rule] = []
        self._under_way: Counter[str] = Counter()
        self._most: Counter[str] = Counter()
        self.seen: list[Seen] = []  # every request that has ended, in the order of their ends
        self.tunnels: list[str] = []  # where clients were connected to (CONNECT)
        self.port = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def on(
        self,
        operation: str,
        fault: Fault,
        *,
        key: str = "",
        having: str = "",
        passing: int = 0,
        times: int = 1,
    ) -> Rule:
        """Hurt the requests of an operation (all: EVERY), on such keys, `having` that in their heads.

        The first rule that takes a request has it.
        """
        rule = Rule(operation, fault, key, having, passing, times)
        self._rules.append(rule)
        return rule

    def relent(self, *rules: Rule) -> None:
        """Forget these rules, or all; what hangs already goes on to hang."""
        for rule in rules or tuple(self._rules):
            self._rules.remove(rule)

    def most_at_once(self, operation: str) -> int:
        """How many requests of an operation were under way at one time."""
        return self._most[operation]

    def down(self) -> None:
        """Refuse connections, and reset those that are open."""
        self._run(self._down())

    def up(self) -> None:
        """Listen, at the same port as before."""
        self._run(self._up())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _up(self) -> None:
        self._server = await asyncio.start_server(
            self._connected, "127.0.0.1", self.port, limit=PIECE, ssl=self.tls
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def _down(self) -> None:
        if self._server is not None:
            self._server.close()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:  # those that accept are among them
            for task in others:
                task.cancel()
            await asyncio.wait(others)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._serving.add(task)  # a loop alone does not hold its tasks
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        with suppress(OSError, ssl.SSLError, asyncio.IncompleteReadError, asyncio.CancelledError):
            keep = True
            while keep:
                head = await Head.read(reader)
                if head.line.startswith("CONNECT "):
                    await self._tunnel(head, reader, writer)
                    break
                keep = await self._exchange(Exchange(self._store, head, reader, writer))
                await writer.drain()
        writer.close()
        with suppress(OSError, ssl.SSLError, asyncio.CancelledError):
            await writer.wait_closed()

    async def _exchange(self, exchange: Exchange) -> bool:
        """Serve one request; return whether the connection serves another."""
        operation, key = exchange.operation, exchange.key
        rule = next((rule for rule in tuple(self._rules) if rule.takes(exchange)), None)
        self._under_way[operation] += 1
        self._most[operation] = max(self._most[operation], self._under_way[operation])
        try:
            await (rule.fault if rule else Fault()).play(exchange)
        finally:
            self._under_way[operation] -= 1
            self.seen.append(Seen(operation, key, hurt=rule is not None, status=exchange.status))
            await exchange.end()
        return exchange.keep

    async def _tunnel(self, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connect the client to wherever it wants, and look no further."""
        where = head.line.split(" ")[1]
        self.tunnels.append(where)
        host, _, port = where.rpartition(":")
        onward, upward = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        try:
            await asyncio.gather(_pump(reader, upward), _pump(onward, writer))
        finally:
            upward.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(PIECE):
            writer.write(piece)
            await writer.drain()
    with suppress(OSError):
        writer.write_eof()
