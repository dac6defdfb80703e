"""What only S3 has: what each server can do, what goes over the wire, and what comes of bad answers.

The bad answers come from a small HTTP server that says what the test wants, byte by byte.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import random
import socket
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest

from ckpt_sidecar import s3
from ckpt_sidecar.bucket import (
    KIB,
    MIB,
    MIN_PART_BYTES,
    Abilities,
    Absent,
    Bucket,
    BucketError,
    Corrupt,
    Denied,
    Missing,
    ObjectRef,
    Part,
    Refused,
    Span,
    Unchanged,
    Unreachable,
    Upload,
    crc64,
    encode_crc64,
)
from ckpt_sidecar.events import Requested
from ckpt_sidecar.probe import Manner, Manners
from ckpt_sidecar.s3 import S3Bucket
from tests.conftest import SERVERS, admin, create_bucket
from tests.fakes import BytesSink, BytesSource

CONTENT = random.Random(3).randbytes(24 * MIB)
UPLOAD = Upload("x", "upload-1")
KEPT = Manners(put=Manner(honoured=True), complete=Manner(honoured=True), checksum=True)

# --- real servers -------------------------------------------------------------------------------------

ABILITIES = {
    "moto": Abilities(
        conditional_put=True, conditional_complete=False, conditional_delete=True, checksum=False
    ),
    "localstack": Abilities(
        conditional_put=True, conditional_complete=True, conditional_delete=False, checksum=True
    ),
    "ceph": Abilities(
        conditional_put=True, conditional_complete=False, conditional_delete=False, checksum=False
    ),
    "rclone": Abilities(
        conditional_put=False, conditional_complete=False, conditional_delete=False, checksum=False
    ),
}


def kind_of(endpoint: str) -> str:
    """Return which server it is."""
    return next(kind for kind, url in SERVERS.items() if url == endpoint)


def opened(name: str, endpoint: str, tell: Callable[[Requested], None] = lambda _: None, **more: Any) -> Any:
    """Open a bucket, not probed."""
    return S3Bucket.open(name, endpoint_url=endpoint, tell=tell, **more)


@pytest.mark.fault("C19")
async def test_the_probe_sees_what_a_server_honours(s3_endpoint: str) -> None:
    """As written down for each of them; before the probe nothing is relied upon."""
    async with opened(create_bucket(s3_endpoint), s3_endpoint) as bucket:
        assert bucket.abilities == ABILITIES["rclone"]
        assert await bucket.probe("some/probe") == ABILITIES[kind_of(s3_endpoint)]
        assert bucket.abilities == ABILITIES[kind_of(s3_endpoint)]


async def test_a_probe_throws_away_what_a_killed_one_has_left(s3_endpoint: str) -> None:
    """Killed between create and complete: the next one at that key aborts the upload."""
    async with opened(create_bucket(s3_endpoint), s3_endpoint) as bucket:
        await bucket.create_multipart("some/probe", metadata={})
        await bucket.probe("some/probe")
        assert await bucket.list_uploads("some/probe") == []


@pytest.mark.parametrize("versioned", [False, True])
async def test_the_probe_leaves_nothing_behind(s3_endpoint: str, *, versioned: bool) -> None:
    """No object, no version, no mark of a delete, no upload; also where something was left by another."""
    name = create_bucket(s3_endpoint, versioned=versioned)
    async with opened(name, s3_endpoint) as bucket:
        for _ in range(2):
            await bucket.probe("some/probe")
        assert [each async for each in bucket.list("")] == []
        assert await bucket.list_uploads("some/probe") == []
    if versioned and kind_of(s3_endpoint) != "rclone":
        found = admin(s3_endpoint).list_object_versions(Bucket=name)
        assert (found.get("Versions", []), found.get("DeleteMarkers", [])) == ([], [])


@pytest.mark.fault("C14")
async def test_a_bucket_that_does_not_exist_is_missing_by_name(s3_endpoint: str) -> None:
    """With the name in the hint, for every verb that can tell; it is never an empty list."""
    async with opened("no-such-bucket-here", s3_endpoint) as bucket:
        for asking in (
            bucket.probe(".probe"),
            bucket.put("x", b"", when=Absent(), metadata={}),
            bucket.put("x", (BytesSource(b"a"), 1), when=Absent(), metadata={}),
            bucket.get("x", limit=1),
            bucket.create_multipart("x", metadata={}),
            bucket.list_uploads("x"),
            anext(bucket.list("")),
        ):
            with pytest.raises(Missing) as caught:
                await asking
            assert caught.value.reason == "bucket"
            assert "there is no bucket 'no-such-bucket-here'" in caught.value.hint


@pytest.mark.fault("C17")
async def test_all_pages_are_read(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of objects, of uploads and of parts."""
    monkeypatch.setattr(s3, "PAGE", 2)
    async with opened(create_bucket(s3_endpoint), s3_endpoint) as bucket:
        keys = [f"a{n}" for n in range(5)]
        for key in keys:
            await bucket.put(key, b"", when=Absent(), metadata={})
        assert [each.key async for each in bucket.list("a")] == keys
        uploads = [Upload("up +", await bucket.create_multipart("up +", metadata={})) for _ in range(5)]
        assert sorted(await bucket.list_uploads("up +"), key=repr) == sorted(uploads, key=repr)
        numbers = [1, 2, 3, 4, 5] if kind_of(s3_endpoint) == "moto" else [1, 2, 3, 5, 8]  # it loses some then
        for n in reversed(numbers):
            await bucket.put_part(uploads[0], Span(n, 0, 1), BytesSource(b"a"))
        assert [part.number for part in await bucket.list_parts(uploads[0])] == numbers


async def test_a_part_longer_than_the_buffer_goes_through_it(s3_endpoint: str) -> None:
    """Piece by piece, up and down."""
    async with opened(create_bucket(s3_endpoint), s3_endpoint, part_bytes=MIB, workers=1) as bucket:
        await bucket.probe(".probe")
        size = 2 * MIB + 12345
        upload = Upload("x", await bucket.create_multipart("x", metadata={}))
        part = await bucket.put_part(upload, Span(1, 1000, size), BytesSource(CONTENT))
        ref = await bucket.complete_multipart(upload, [part], when=Absent(), metadata={})
        sink = BytesSink(size)
        expected = CONTENT[1000 : 1000 + size]
        assert await bucket.get_range(ref, Span(1, 0, size), sink) == crc64(expected)
        assert sink.content == expected
        assert ref.crc64nvme == part.crc64nvme == encode_crc64(crc64(expected))


async def test_every_request_is_told_once(s3_endpoint: str) -> None:
    """Its operation, how it ended, how long it took; that a key is missing, or another, is an answer."""
    told: list[Requested] = []
    async with opened(create_bucket(s3_endpoint), s3_endpoint, told.append) as bucket:
        await bucket.probe(".probe")
        told.clear()
        ref = await bucket.put("x", b"1", when=Absent(), metadata={})
        await bucket.get("x", limit=1)
        await bucket.get_range(ref, Span(1, 0, 1), BytesSink(1))
        with pytest.raises(Missing):
            await bucket.get("y", limit=1)
        upload = Upload("z", await bucket.create_multipart("z", metadata={}))
        await bucket.put_part(upload, Span(1, 0, 1), BytesSource(b"a"))
        await bucket.list_parts(upload)
        await bucket.abort_multipart(upload)
        await bucket.list_uploads("z")
        assert [each.key async for each in bucket.list("")] == ["x"]
    looked = [] if bucket.abilities.conditional_put else ["head_object"]
    assert [each.operation for each in told] == [
        *looked,
        "put_object",
        "get_object",
        "get_object",
        "get_object",
        "create_multipart_upload",
        "upload_part",
        "list_parts",
        "abort_multipart_upload",
        "list_multipart_uploads",
        "list_objects_v2",
    ]
    assert {each.outcome for each in told} == {"ok"}
    assert all(0 < each.seconds < 60 for each in told)


@pytest.mark.s3
@pytest.mark.skipif("ceph" not in SERVERS, reason="the other servers do not check signatures")
@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
async def test_wrong_credentials_are_denied(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """And nothing of them is in the error."""
    name = create_bucket(SERVERS["ceph"])
    monkeypatch.setenv(wrong, "wrong-and-secret")
    async with opened(name, SERVERS["ceph"]) as bucket:
        for asking in (
            bucket.get("x", limit=1),
            bucket.probe(".probe"),
            bucket.put("x", (BytesSource(b"a"), 1), when=Unchanged("e"), metadata={}),
            bucket.create_multipart("x", metadata={}),
            anext(bucket.list("")),
        ):
            with pytest.raises(Denied) as caught:
                await asking
            assert "secret" not in str(caught.value)
            if caught.value.reason != "denied":  # HEAD has no body to say why
                assert caught.value.reason == "credentials"
                assert "check the credentials" in caught.value.hint


# --- a server that says what the test wants -------------------------------------------------------------


@dataclass
class Request:
    """What came over the wire."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Wire:
    """One request's connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def head(self) -> Request:
        """Read the request as far as its headers."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("ascii").splitlines()
        method, target, _ = lines[0].split(" ")
        fields = (line.split(": ", 1) for line in lines[1:-1])
        return Request(method, target, {name.lower(): value for name, value in fields})

    async def body(self, request: Request) -> None:
        """Read the rest of it."""
        left = int(request.headers.get("content-length", "0")) - len(request.body)
        request.body += await self.reader.readexactly(left)

    def reset(self) -> None:
        """Drop the connection without a word."""
        option = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        self.writer.transport.abort()


Answer = Callable[[Wire, Request], Awaitable[None]]


class Store:
    """The server, and an S3Bucket on it; one request for each connection, answered as `answer` does."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[Request] = []
        self.told: list[Requested] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        wire = Wire(reader, writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            request = await wire.head()
            self.asked.append(request)
            await self.answer(wire, request)
            await writer.drain()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def store(answer: Answer, **more: Any) -> AsyncIterator[tuple[S3Bucket, Store]]:
    """Start it."""
    serving = Store(answer)
    async with asyncio.timeout(30), await asyncio.start_server(serving.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with opened("store", f"http://127.0.0.1:{port}", serving.told.append, **more) as bucket:
            yield bucket, serving
        # First the connections, also one just begun: asyncio loses an accepted socket of a closed server.
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.gather(*others)
        server.close()


def saying(status: str, body: bytes = b"", **headers: object) -> Answer:
    """Read the body, then answer like that; Content-Length is the body's, if not said otherwise."""

    async def answer(wire: Wire, request: Request) -> None:
        await wire.body(request)
        fields = {"Content_Length": len(body), "Connection": "close"} | headers
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
        shown = b"" if request.method == "HEAD" else body
        wire.writer.write(f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + shown)

    return answer


def error(code: str, message: str = "because") -> bytes:
    """Return an error as S3 writes it."""
    return f'<?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()


def resetting(answer: Answer) -> Answer:
    """Answer like that, and drop the connection then."""

    async def reset(wire: Wire, request: Request) -> None:
        await answer(wire, request)
        await wire.writer.drain()
        wire.reset()

    return reset


def waiting(event: asyncio.Event, answer: Answer) -> Answer:
    """Answer like that, and then leave the connection open until the event."""

    async def wait(wire: Wire, request: Request) -> None:
        await answer(wire, request)
        await event.wait()

    return wait


async def nothing(_wire: Wire, _request: Request) -> None:
    """Answer nothing at all."""


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request is signed with, and nothing of the machine's own settings."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "some-access")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "some-secret")


def asking_all(bucket: Bucket) -> dict[str, Awaitable[Any]]:
    """Return a request of every kind."""
    ref = ObjectRef("x", 10, "e")
    return {
        "get": bucket.get("x", limit=10),
        "head": bucket.head("x"),
        "get_range": bucket.get_range(ref, Span(1, 0, 10), BytesSink(10)),
        "list": anext(aiter(bucket.list(""))),
        "put": bucket.put("x", b"abc", when=Absent(), metadata={}),
        "put of a source": bucket.put("x", (BytesSource(b"abc"), 3), when=Absent(), metadata={}),
        "delete": bucket.delete("x", when=Unchanged("e")),
        "create_multipart": bucket.create_multipart("x", metadata={}),
        "put_part": bucket.put_part(UPLOAD, Span(1, 0, 3), BytesSource(b"abc")),
        "list_parts": bucket.list_parts(UPLOAD),
        "complete_multipart": bucket.complete_multipart(
            UPLOAD, [Part(1, 3, "e")], when=Absent(), metadata={}
        ),
        "abort_multipart": bucket.abort_multipart(UPLOAD),
        "list_uploads": bucket.list_uploads("x"),
        "probe": bucket.probe(".probe"),
    }


async def raised(bucket: Bucket) -> dict[str, BucketError]:
    """Ask everything; return the errors that come out."""
    found = {}
    for verb, asking in asking_all(bucket).items():
        with pytest.raises(BucketError) as caught:
            await asking
        found[verb] = caught.value
    return found


NOT_WANTED = {  # of a body: the wait for leave to send it, and the encoding of AWS's own
    "expect",
    "transfer-encoding",
    "content-encoding",
    "x-amz-trailer",
    "x-amz-decoded-content-length",
}

# --- what leaves ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("credentials")
async def test_a_part_leaves_as_it_is_with_its_checksum() -> None:
    """In one piece of a known length, without waiting for leave to send it, and without a trailer."""
    async with store(saying("200 OK", ETag='"e"'), part_bytes=MIB) as (bucket, serving):
        bucket._manners = KEPT
        size = MIB + 1
        part = await bucket.put_part(UPLOAD, Span(7, 5, size), BytesSource(CONTENT))
    (request,) = serving.asked
    assert part == Part(7, size, "e", encode_crc64(crc64(CONTENT[5 : 5 + size])))
    assert (request.method, request.target) == ("PUT", "/store/x?uploadId=upload-1&partNumber=7")
    assert request.body == CONTENT[5 : 5 + size]
    assert request.headers["content-length"] == str(size)
    assert request.headers["x-amz-checksum-crc64nvme"] == part.crc64nvme
    assert not request.headers.keys() & {"content-md5", *NOT_WANTED}
    assert [(each.operation, each.outcome) for each in serving.told] == [("upload_part", "ok")]


@pytest.mark.usefixtures("credentials")
async def test_a_part_carries_an_md5_where_no_checksum_is_kept() -> None:
    """Nearly every store checks that one."""
    async with store(saying("200 OK", ETag='"e"')) as (bucket, serving):
        await bucket.put_part(UPLOAD, Span(1, 0, 3), BytesSource(b"abc"))
    (request,) = serving.asked
    md5 = hashlib.md5(b"abc", usedforsecurity=False).digest()
    assert request.headers["content-md5"] == base64.b64encode(md5).decode()
    assert "x-amz-checksum-crc64nvme" not in request.headers
    assert request.body == b"abc"


@pytest.mark.usefixtures("credentials")
async def test_a_put_leaves_as_it_is_with_its_condition() -> None:
    """Bytes at hand, none, few or many, and a source."""
    bodies: list[tuple[int, Any]] = [
        (size, body) for size in (0, 3, MIB + 1) for body in (CONTENT[:size], (BytesSource(CONTENT), size))
    ]
    async with store(saying("200 OK", ETag='"e"')) as (bucket, serving):
        bucket._manners = KEPT
        for size, body in bodies:
            ref = await bucket.put("a/b +", body, when=Unchanged("old"), metadata={"step": "7"})
            request = serving.asked[-1]
            assert (request.method, request.target) == ("PUT", "/store/a/b%20%2B")
            assert request.body == CONTENT[:size]
            assert request.headers["if-match"] == '"old"'
            assert request.headers["content-length"] == str(size)
            assert request.headers["x-amz-checksum-crc64nvme"] == ref.crc64nvme
            assert ref.crc64nvme == encode_crc64(crc64(CONTENT[:size]))
            assert request.headers["x-amz-meta-step"] == "7"
            assert not request.headers.keys() & NOT_WANTED
    assert len(serving.asked) == len(bodies)


class Gated(BytesSource):
    """A source that stops at one of its readings until it is let go."""

    def __init__(self, content: bytes, *, reading: int) -> None:
        super().__init__(content)
        self.reached = asyncio.Event()
        self.let_go = threading.Event()
        self._left = reading
        self._loop = asyncio.get_running_loop()

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill the view, and stop with it in hand when it is time."""
        count = super().read_into(offset, view)
        self._left -= 1
        if self._left == 0:
            self._loop.call_soon_threadsafe(self.reached.set)
            assert self.let_go.wait(30)
        return count


@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize("reading", [3, 30], ids=["checksum", "sending"])
async def test_cancelling_a_part_waits_until_its_thread_lets_go(reading: int) -> None:
    """What was under way ends, half read or half sent; the buffer is then free for the next part."""
    received: list[bytes] = []

    async def take_in(wire: Wire, _request: Request) -> None:
        while piece := await wire.reader.read(MIB):
            received.append(piece)

    async with store(take_in, workers=1, part_bytes=MIB) as (bucket, serving):
        source = Gated(CONTENT, reading=reading)  # 24 for the checksum, then 24 to be sent
        sending = asyncio.create_task(bucket.put_part(UPLOAD, Span(1, 0, len(CONTENT)), source))
        await source.reached.wait()
        await cancelled_in_vain(sending)
        source.let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await sending
        serving.answer = saying("200 OK", ETag='"e"')
        part = await bucket.put_part(UPLOAD, Span(2, 100, 3 * MIB), source)
    assert len(b"".join(received)) < len(CONTENT)
    assert serving.asked[-1].body == CONTENT[100 : 100 + 3 * MIB]
    assert part.crc64nvme == encode_crc64(crc64(CONTENT[100 : 100 + 3 * MIB]))
    assert [(each.operation, each.outcome) for each in serving.told] == [
        ("upload_part", "failed"),
        ("upload_part", "ok"),
    ]


@pytest.mark.usefixtures("credentials")
async def test_cancelling_a_part_waits_for_the_answer_of_a_stalling_store() -> None:
    """So that nothing is under way any more when it is over."""
    stalled, go_on = asyncio.Event(), asyncio.Event()
    good = saying("200 OK", ETag='"e"')

    async def stall(wire: Wire, request: Request) -> None:
        await wire.body(request)
        stalled.set()
        await go_on.wait()
        await good(wire, request)

    async with store(stall, workers=1) as (bucket, serving):
        sending = asyncio.create_task(bucket.put_part(UPLOAD, Span(1, 0, 3), BytesSource(b"abc")))
        await stalled.wait()
        await cancelled_in_vain(sending)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await bucket.put_part(UPLOAD, Span(1, 0, 3), BytesSource(b"def"))
    assert [request.body for request in serving.asked] == [b"abc", b"def"]


async def cancelled_in_vain(task: asyncio.Task[Any]) -> None:
    """Cancel it, more than once; it does not end."""
    for _ in range(3):
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()


@pytest.mark.usefixtures("credentials")
async def test_cancelling_a_part_that_waits_for_a_thread_sends_nothing() -> None:
    """The one before it is not disturbed."""
    stalled, go_on = asyncio.Event(), asyncio.Event()
    good = saying("200 OK", ETag='"e"')

    async def stall(wire: Wire, request: Request) -> None:
        stalled.set()
        await go_on.wait()
        await good(wire, request)

    async with store(stall, workers=1) as (bucket, serving):
        first = asyncio.create_task(bucket.put_part(UPLOAD, Span(1, 0, 3), BytesSource(b"abc")))
        await stalled.wait()
        second = asyncio.create_task(bucket.put_part(UPLOAD, Span(2, 0, 3), BytesSource(b"def")))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        go_on.set()
        assert (await first).number == 1
    assert [request.body for request in serving.asked] == [b"abc"]


# --- bad answers ------------------------------------------------------------------------------------------


@pytest.mark.fault("C2")
@pytest.mark.usefixtures("credentials")
async def test_where_nobody_listens_the_store_is_unreachable_at_once() -> None:
    """For every verb: nothing is missing, nothing is empty."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    async with asyncio.timeout(10), opened("store", f"http://127.0.0.1:{port}") as bucket:
        for verb, found in (await raised(bucket)).items():
            assert isinstance(found, Unreachable), verb
            assert (found.reason, found.retry_after) == ("connection", 0.0)
            assert "check the endpoint" in found.hint


@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize("url", ["", "no url", "127.0.0.1:9000", "http://", "http://user:secret@[::1"])
async def test_an_endpoint_that_is_no_url_is_refused(url: str) -> None:
    """At once, and without the password that it may hold."""
    with pytest.raises(Refused) as caught:
        async with opened("store", url):
            pass
    assert "the endpoint is no URL" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("credentials")
async def test_a_name_that_no_bucket_can_have_is_refused() -> None:
    """With the way to mend it."""
    async with opened("no bucket!", "http://127.0.0.1:1") as bucket:
        with pytest.raises(Refused) as caught:
            await bucket.get("x", limit=1)
    assert "check the AWS configuration" in caught.value.hint


@pytest.mark.usefixtures("credentials")
async def test_without_credentials_all_is_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is sent."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    async with store(nothing) as (bucket, serving):
        for verb, found in (await raised(bucket)).items():
            assert isinstance(found, Denied), verb
            assert found.reason == "credentials"
    assert serving.asked == []


@pytest.mark.fault("C3")
@pytest.mark.usefixtures("credentials")
async def test_a_silent_store_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the timeout, for every verb; each request is sent once, and told once."""
    monkeypatch.setattr(s3, "READ_TIMEOUT", 0.05)
    end = asyncio.Event()
    async with store(waiting(end, nothing)) as (bucket, serving):
        for verb, found in (await raised(bucket)).items():
            assert isinstance(found, Unreachable), verb
            assert found.reason == "timeout"
        end.set()
    assert len(serving.asked) == len(serving.told)
    assert {each.outcome for each in serving.told} == {"failed"}


@pytest.mark.fault("C2")
@pytest.mark.usefixtures("credentials")
async def test_a_store_that_hangs_up_or_babbles_is_unreachable() -> None:
    """A connection that is closed or reset before the answer, and an answer that is no XML."""
    answers = {
        "closed": nothing,
        "reset": resetting(nothing),
        "no XML": saying("200 OK", b"<Half", ETag='"e"'),
    }
    async with store(nothing) as (bucket, serving):
        for ask in (
            lambda: anext(bucket.list("")),
            lambda: bucket.list_uploads("x"),
            lambda: bucket.list_parts(UPLOAD),
            lambda: bucket.create_multipart("x", metadata={}),
        ):
            assert await kinds_of(serving, answers, ask) == dict.fromkeys(answers, "Unreachable")


@pytest.mark.fault("C1")
@pytest.mark.usefixtures("credentials")
async def test_a_throttling_store_says_how_long_to_wait() -> None:
    """`Retry-After` comes out with the error, for every verb."""
    answer = saying("503 Slow Down", error("SlowDown", "Please reduce your request rate."), Retry_After=7)
    async with store(answer) as (bucket, serving):
        for verb, found in (await raised(bucket)).items():
            assert isinstance(found, Unreachable), verb
            assert (found.reason, found.retry_after) == ("throttled", 7.0)
    assert len(serving.asked) == len(serving.told)
    assert {each.outcome for each in serving.told} == {"failed"}


@pytest.mark.fault("C1")
@pytest.mark.usefixtures("credentials")
async def test_a_page_of_a_proxy_is_one_line_of_an_error() -> None:
    """Not the whole page, and never a success."""
    page = b"<html>\n<body>" + b"sorry\n" * 10_000 + b"</body></html>"
    async with store(saying("502 Bad Gateway", page, Content_Type="text/html")) as (bucket, _):
        for verb, found in (await raised(bucket)).items():
            assert isinstance(found, Unreachable), verb
            assert found.reason == "server"
            assert len(str(found)) < 600
            assert "\n" not in str(found)


MADE = b"<CompleteMultipartUploadResult>%s</CompleteMultipartUploadResult>"


@pytest.mark.fault("C6")
@pytest.mark.usefixtures("credentials")
async def test_a_complete_that_fails_after_its_200_did_not_happen_as_far_as_we_know() -> None:
    """An error in the body of a success, or no etag: look. Blanks before a success do not matter."""
    answers = {
        "error": saying("200 OK", error("InternalError")),
        "error behind blanks": saying("200 OK", b"\n\n  " + error("InternalError")),
        "nothing": saying("200 OK"),
        "no etag": saying("200 OK", MADE % b"<Bucket>store</Bucket>"),
        "success behind blanks": saying("200 OK", b"\n\n  " + MADE % b"<ETag>e</ETag>"),
    }
    async with store(nothing) as (bucket, serving):
        bucket._manners = KEPT
        parts = [Part(1, 3, "e")]
        assert await kinds_of(
            serving,
            answers,
            lambda: bucket.complete_multipart(UPLOAD, parts, when=Absent(), metadata={}),
        ) == {
            "error": "Unreachable",
            "error behind blanks": "Unreachable",
            "nothing": "Unreachable",
            "no etag": "Unreachable",
            "success behind blanks": "ok",
        }


@pytest.mark.fault("C6")
@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize("etag", [{}, {"ETag": '""'}])
async def test_an_answer_without_an_etag_says_nothing(etag: dict[str, Any]) -> None:
    """A gateway's 200 for whatever it is asked: neither written nor there, nor a reason to die."""
    async with store(saying("200 OK", **etag)) as (bucket, _):
        asking = asking_all(bucket)
        verbs = ["get", "head", "put", "put of a source", "put_part", "complete_multipart", "probe"]
        for verb in verbs:
            with pytest.raises(Unreachable, match="etag") as caught:
                await asking.pop(verb)
            assert caught.value.reason == "server", verb
        for unasked in asking.values():
            unasked.close()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("credentials")
async def test_an_object_of_another_size_or_checksum_than_its_parts_is_corrupt() -> None:
    """Whether the answer shows it, or a look afterwards."""
    etag = b"<ETag>&quot;e&quot;</ETag>"
    part = Part(1, 3, "e", encode_crc64(crc64(b"abc")))
    wrong = b"<ChecksumCRC64NVME>" + encode_crc64(0).encode() + b"</ChecksumCRC64NVME>"
    async with store(saying("200 OK", MADE % (etag + wrong))) as (bucket, serving):
        bucket._manners = KEPT
        with pytest.raises(Corrupt, match="checksum"):
            await bucket.complete_multipart(UPLOAD, [part], when=Absent(), metadata={})

    async def answer(wire: Wire, request: Request) -> None:
        if request.method == "HEAD":
            looked = [each for each in serving.asked if each.method == "HEAD"]
            gone = saying("404 Not Found")
            await (gone if len(looked) == 1 else saying("200 OK", ETag='"f"', Content_Length=2))(
                wire, request
            )
        else:
            await saying("200 OK", MADE % etag)(wire, request)

    async with store(answer) as (bucket, serving):
        with pytest.raises(Corrupt, match="2 bytes"):
            await bucket.complete_multipart(UPLOAD, [part], when=Absent(), metadata={})


@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize("marker", [b"", b"<NextContinuationToken>same</NextContinuationToken>"])
async def test_a_list_that_goes_in_circles_is_refused(marker: bytes) -> None:
    """LocalStack's does where a key has signs in it; it would never end."""
    page = b"<ListBucketResult><IsTruncated>true</IsTruncated>%s</ListBucketResult>" % marker
    async with store(saying("200 OK", page)) as (bucket, serving):
        with pytest.raises(Refused, match="over and over"):
            [each async for each in bucket.list("")]
    assert len(serving.asked) <= 2


@pytest.mark.fault("C14")
@pytest.mark.usefixtures("credentials")
async def test_a_bucket_of_another_region_is_refused_with_that_region() -> None:
    """So that one need not look it up."""
    answer = saying("301 Moved", error("PermanentRedirect"), x_amz_bucket_region="eu-north-1")
    async with store(answer) as (bucket, _):
        with pytest.raises(Refused) as caught:
            await bucket.get("x", limit=1)
    assert caught.value.reason == "region"
    assert "set AWS_REGION=eu-north-1" in caught.value.hint


# --- bad bytes --------------------------------------------------------------------------------------------

BYTES = CONTENT[:1000]
REF = ObjectRef("x", 1000, "e")
MIDDLE = Span(1, 300, 400)
PARTIAL = {"ETag": '"e"', "Content_Range": "bytes 300-699/1000"}


@pytest.mark.fault("F3")
@pytest.mark.usefixtures("credentials")
async def test_a_run_is_found_in_whatever_the_store_answers() -> None:
    """The run, the whole object, or the run that calls itself whole (rclone)."""
    async with store(nothing) as (bucket, serving):
        for answer in (
            saying("206 Partial Content", BYTES[300:700], **PARTIAL),
            saying("206 Partial Content", BYTES[300:700], Content_Range="bytes 300-699/1000"),
            saying("200 OK", BYTES, ETag='"e"'),
            saying("200 OK", BYTES[300:700], ETag='"e"'),
        ):
            serving.answer = answer
            sink = BytesSink(1000)
            assert await bucket.get_range(REF, MIDDLE, sink) == crc64(BYTES[300:700])
            assert sink.content == bytes(300) + BYTES[300:700] + bytes(300)
    assert {request.headers["range"] for request in serving.asked} == {"bytes=300-699"}
    assert {request.headers["if-match"] for request in serving.asked} == {'"e"'}


async def kinds_of(
    serving: Store, answers: Mapping[str, Answer], ask: Callable[[], Awaitable[Any]]
) -> dict[str, str]:
    """Return what comes of each answer: the name of an error, or "ok"."""
    found = {}
    for name, serving.answer in answers.items():
        try:
            await ask()
            found[name] = "ok"
        except BucketError as raised:
            found[name] = type(raised).__name__
    return found


@pytest.mark.fault("F3")
@pytest.mark.usefixtures("credentials")
async def test_a_run_that_does_not_come_whole_is_no_success() -> None:
    """Of another object, too short, cut in the middle."""
    cut = saying("206 Partial Content", BYTES[300:600], **PARTIAL, Content_Length=400)
    answers = {
        "whole, of another": saying("200 OK", BYTES, ETag='"f"'),
        "range, of another": saying("206 Partial Content", BYTES[300:700], ETag='"f"'),
        "412": saying("412 Precondition Failed", error("PreconditionFailed")),
        "range, short": saying("206 Partial Content", BYTES[300:600], **PARTIAL),
        "whole, short": saying("200 OK", BYTES[:600], ETag='"e"'),
        "416": saying("416 Range Not Satisfiable", error("InvalidRange")),
        "range, cut": cut,
        "range, reset": resetting(cut),
        "whole, cut in it": saying("200 OK", BYTES[:600], ETag='"e"', Content_Length=1000),
        "whole, cut before it": saying("200 OK", BYTES[:100], ETag='"e"', Content_Length=1000),
        "404": saying("404 Not Found", error("NoSuchKey")),
    }
    async with store(nothing) as (bucket, serving):
        sink = BytesSink(1000)
        assert await kinds_of(serving, answers, lambda: bucket.get_range(REF, MIDDLE, sink)) == {
            "whole, of another": "Conflict",
            "range, of another": "Conflict",
            "412": "Conflict",
            "range, short": "Corrupt",
            "whole, short": "Corrupt",
            "416": "Corrupt",
            "range, cut": "Unreachable",
            "range, reset": "Unreachable",
            "whole, cut in it": "Unreachable",
            "whole, cut before it": "Unreachable",
            "404": "Missing",
        }
    assert [each.operation for each in serving.told] == ["get_object"] * len(answers)


CHECKED = {"ETag": '"e"', "x_amz_checksum_crc64nvme": encode_crc64(crc64(BYTES))}


@pytest.mark.usefixtures("credentials")
async def test_an_object_that_does_not_come_whole_is_no_success() -> None:
    """Cut in the middle, or damaged on its way where the store shows its checksum."""
    cut = saying("200 OK", BYTES[:600], **CHECKED, Content_Length=1000)
    answers = {
        "whole": saying("200 OK", BYTES, **CHECKED),
        "cut": cut,
        "reset": resetting(cut),
        "damaged": saying("200 OK", BYTES[:999] + b"?", **CHECKED),
        "gone": saying("404 Not Found", error("NoSuchKey")),
    }
    async with store(nothing) as (bucket, serving):
        bucket._manners = KEPT
        assert await kinds_of(serving, answers, lambda: bucket.get("x", limit=1000)) == {
            "whole": "ok",
            "cut": "Unreachable",
            "reset": "Unreachable",
            "damaged": "Corrupt",
            "gone": "Missing",
        }
    assert [each.operation for each in serving.told] == ["get_object"] * len(answers)


@pytest.mark.fault("C3", "F3")
@pytest.mark.usefixtures("credentials")
async def test_bytes_that_stop_coming_are_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the timeout, small objects and runs alike."""
    monkeypatch.setattr(s3, "READ_TIMEOUT", 0.1)
    end = asyncio.Event()
    half = saying("200 OK", BYTES[:600], **CHECKED, Content_Length=1000)

    async def answer(wire: Wire, request: Request) -> None:
        await half(wire, request)
        await wire.writer.drain()
        await end.wait()

    async with store(answer) as (bucket, _):
        for reading in (
            bucket.get("x", limit=1000),
            bucket.get_range(REF, Span(1, 0, 1000), BytesSink(1000)),
        ):
            with pytest.raises(Unreachable) as caught:
                await reading
            assert caught.value.reason == "timeout"
        end.set()


class Full:
    """A sink that has no room; a source that cannot be read."""

    def write_at(self, offset: int, view: memoryview) -> None:
        """Fail as a disk does."""
        raise OSError(28, "No space left on device")

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fail as a disk does."""
        raise TimeoutError(110, "Connection timed out")  # as NFS says it


@pytest.mark.usefixtures("credentials")
async def test_a_disks_error_is_not_the_stores() -> None:
    """It comes out as it is."""
    async with store(saying("206 Partial Content", BYTES[300:700], **PARTIAL)) as (bucket, _):
        with pytest.raises(OSError, match="No space left"):
            await bucket.get_range(REF, MIDDLE, Full())
        with pytest.raises(TimeoutError, match="Connection timed out"):
            await bucket.put_part(UPLOAD, Span(1, 0, 5), Full())


class Changing(BytesSource):
    """A source whose bytes are others on the second reading."""

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill the view, and change what was read from."""
        count = super().read_into(offset, view)
        if offset + count == len(self.content):
            self.content = bytes(len(self.content))
        return count


@pytest.mark.fault("C9")
@pytest.mark.usefixtures("credentials")
async def test_a_part_whose_bytes_change_while_it_is_sent_is_corrupt() -> None:
    """What would arrive is not what was promised."""
    async with store(saying("200 OK", ETag='"e"'), part_bytes=64 * KIB) as (bucket, _):
        source = Changing(CONTENT[: 2 * MIN_PART_BYTES])
        with pytest.raises(Corrupt, match="changed while they were sent"):
            await bucket.put_part(UPLOAD, Span(1, 0, 2 * MIN_PART_BYTES), source)
