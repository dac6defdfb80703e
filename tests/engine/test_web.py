"""What the sidecar answers over HTTP, asked over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from ckpt_sidecar import web
from ckpt_sidecar.checkpoint import Book
from ckpt_sidecar.events import Claimed, Event, Fenced, Moved, NotReady, Ready, Retrying
from ckpt_sidecar.metrics import Metrics

HOST = "127.0.0.1"
NOW = 1_700_000_000  # seconds since the epoch


class Sidecar:
    """All that the web server looks at, with a clock that stands."""

    def __init__(self) -> None:
        self.book = Book()
        self.now = float(NOW)
        self.metrics = Metrics(version="0", python="3", clock=lambda: self.now, book=self.book)
        self.status = web.Status(
            version="0", bucket="b", prefix="run/", watch="/ckpt", spool="s", book=self.book
        )

    def tell(self, *events: Event) -> None:
        """Let these happen."""
        for event in events:
            if isinstance(event, Moved):
                self.book.put(event.checkpoint)
            self.status.tell(event)
            self.metrics.tell(event)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    text: str
    kind: str

    @property
    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.text)


class Client:
    """A client of a server that is up."""

    def __init__(self, port: int, session: aiohttp.ClientSession) -> None:
        self.port = port
        self._session = session

    async def ask(self, path: str, method: str = "GET") -> Answer:
        """Send the request and read the answer."""
        async with self._session.request(method, f"http://{HOST}:{self.port}{path}") as answer:
            return Answer(answer.status, await answer.text(), answer.headers.get("Content-Type", ""))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection and say nothing."""
        return await asyncio.open_connection(HOST, self.port)


@asynccontextmanager
async def served(sidecar: Sidecar) -> AsyncIterator[Client]:
    """Serve on a free port, until the block ends."""
    bound: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(serve(sidecar, 0, bound))
        async with aiohttp.ClientSession() as session:
            yield Client(await bound, session)
        serving.cancel()


async def serve(sidecar: Sidecar, port: int, bound: asyncio.Future[int]) -> None:
    """Serve until cancelled; the future gets the port."""
    await web.serve(
        HOST,
        port,
        status=sidecar.status,
        metrics=sidecar.metrics,
        now=lambda: sidecar.now,
        on_bound=bound.set_result,
    )


# --- the paths ------------------------------------------------------------------------------------------


async def test_healthz_answers_from_the_first_second() -> None:
    """Whatever the bucket says, the process works; also when fenced."""
    sidecar = Sidecar()
    async with served(sidecar) as client:
        assert await client.ask("/healthz") == Answer(200, "ok\n", "text/plain; charset=utf-8")
        sidecar.tell(Fenced(2, "other"))
        assert (await client.ask("/healthz")).status == 200


async def test_readyz_says_why_not_then_that_it_is() -> None:
    """503 with the reason, 200 once a trainer may start, 503 again when displaced."""
    sidecar = Sidecar()
    async with served(sidecar) as client:
        before = await client.ask("/readyz")
        assert (before.status, before.text) == (503, "not ready: has not claimed the prefix yet\n")
        sidecar.tell(Retrying("probe", "connection", 1.0, "no way to the store"))
        assert "no way to the store" in (await client.ask("/readyz")).text
        sidecar.tell(NotReady("no credentials"))
        assert "no credentials" in (await client.ask("/readyz")).text
        sidecar.tell(Claimed(1, None))
        assert "is restoring" in (await client.ask("/readyz")).text
        sidecar.tell(Ready(0.5))
        assert (await client.ask("/readyz")).status == 200
        sidecar.tell(Fenced(2, "other"), NotReady("held by other"), Retrying("abort", "server", 1.0, "no"))
        assert "held by other" in (await client.ask("/readyz")).text


async def test_metrics_are_what_prometheus_reads() -> None:
    """With the content type of its text format."""
    async with served(Sidecar()) as client:
        answer = await client.ask("/metrics")
        assert answer.kind == "text/plain; version=0.0.4; charset=utf-8"
        assert "\nckpt_sidecar_upload_lag_seconds 0.0\n" in answer.text


@pytest.mark.fault("G4")
async def test_other_paths_are_not_found() -> None:
    """Nothing else is served, least of all files."""
    async with served(Sidecar()) as client:
        assert (await client.ask("/nothing")).status == 404
        assert (await client.ask("/%2e%2e/etc/passwd")).status == 404


@pytest.mark.fault("G4")
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/status.json"])
async def test_no_call_changes_anything(path: str, method: str) -> None:
    """There are only questions."""
    async with served(Sidecar()) as client:
        assert (await client.ask(path, method)).status == 405


# --- trouble --------------------------------------------------------------------------------------------


@pytest.mark.fault("E10")
async def test_a_port_that_is_taken_is_said_with_the_address_and_the_mend() -> None:
    """Before anything else is done in vain."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        bound: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        with pytest.raises(web.CannotListen, match=rf"127\.0\.0\.1:{port}.*in use.*--listen"):
            await serve(Sidecar(), port, bound)
        assert not bound.done()


@pytest.mark.fault("E10")
async def test_a_hundred_scrapes_at_once_are_all_answered() -> None:
    """Whoever scrapes too often gets answers, not an outage."""
    async with served(Sidecar()) as client:
        answers = await asyncio.gather(*(client.ask("/metrics") for _ in range(100)))
        assert {answer.status for answer in answers} == {200}


@pytest.mark.fault("E10", "G4")
async def test_a_client_that_says_nothing_holds_nobody_up_and_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one that stops in the middle of its question."""
    monkeypatch.setattr(web, "CLIENT_SECONDS", 0.3)
    async with served(Sidecar()) as client:
        silent = [await client.connect() for _ in range(20)]
        for _, writer in silent[:10]:
            writer.write(b"GET /metrics HTT")
        assert (await client.ask("/healthz")).status == 200
        async with asyncio.timeout(10):
            assert {await reader.read() for reader, _ in silent} == {b""}
        for _, writer in silent:
            writer.close()


@pytest.mark.fault("E10")
async def test_a_client_that_never_reads_holds_nobody_up_not_even_the_end() -> None:
    """It asks for more than the socket's buffers hold; the server ends within seconds all the same."""
    async with served(Sidecar()) as client:
        _, writer = await client.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport of a stream reads
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 500)
        for _ in range(5):
            assert (await client.ask("/readyz")).status == 503
        began = time.monotonic()
    assert time.monotonic() - began < 30  # aiohttp's own patience is 60
    writer.transport.abort()


@pytest.mark.fault("E10")
async def test_a_client_that_asks_by_the_letter_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request must be whole in so many seconds, however busily it drips; others are answered meanwhile."""
    monkeypatch.setattr(web, "CLIENT_SECONDS", 0.3)
    async with served(Sidecar()) as client:
        reader, writer = await client.connect()
        writer.write(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        async with asyncio.timeout(20):
            with suppress(ConnectionError):
                while not reader.at_eof():
                    writer.write(b"x")
                    await writer.drain()
                    assert (await client.ask("/healthz")).status == 200
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.02):
                            assert await reader.read() == b""
        writer.close()


@pytest.mark.fault("E10")
async def test_one_client_too_many_is_turned_away_until_another_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many come in the same moment; uploads need descriptors, too."""
    monkeypatch.setattr(web, "MOST_CLIENTS", 5)
    async with served(Sidecar()) as client:
        silent = await asyncio.gather(*(client.connect() for _ in range(12)))
        ends = [asyncio.ensure_future(reader.read()) for reader, _ in silent]
        async with asyncio.timeout(10):
            while sum(end.done() for end in ends) < 7:
                await asyncio.wait([end for end in ends if not end.done()], return_when="FIRST_COMPLETED")
        assert sum(end.done() for end in ends) == 7
        for _, writer in silent:
            writer.close()
        async with asyncio.timeout(10):
            while True:
                with suppress(aiohttp.ClientError):
                    assert (await client.ask("/healthz")).status == 200
                    break
        await asyncio.gather(*ends)
