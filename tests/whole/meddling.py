"""A proxy in front of a real S3 server that meddles with what it likes, and hands on the rest."""

from __future__ import annotations

import http.client
import http.server
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

from tests.loopback import served


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked; header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What is answered instead of the store; the length is that of the body unless the headers say."""

    status: int
    body: bytes | Iterator[bytes] = b""
    headers: Mapping[str, str] = field(default_factory=dict)


Meddle = Callable[[Request], Answer | None]


@contextmanager
def meddling(endpoint: str, meddle: Meddle) -> Iterator[str]:
    """Answer as `meddle` says, or as the server at `endpoint` does; yield where."""

    class Handler(_Handler):
        to = endpoint.removeprefix("http://")
        meddled = staticmethod(meddle)

    with served(Handler) as url:
        yield url


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    to = ""
    meddled: Meddle

    def handle(self) -> None:
        """Serve one connection, until the client goes away."""
        with suppress(ConnectionError):
            super().handle()

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.meddled(Request(self.command, self.path, headers)) or self._asked(body)
        self.send_response(answer.status)
        length = {"content-length": str(len(answer.body))} if isinstance(answer.body, bytes) else {}
        for name, value in (length | dict(answer.headers)).items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # it wants no more
            for piece in [answer.body] if isinstance(answer.body, bytes) else answer.body:
                if self.command != "HEAD":
                    self.wfile.write(piece)

    def _asked(self, body: bytes) -> Answer:
        onward = http.client.HTTPConnection(self.to, timeout=60)
        try:
            onward.request(self.command, self.path, body, dict(self.headers.items()))
            given = onward.getresponse()
            skipped = {"transfer-encoding", "connection", "date", "server"}
            skipped |= set() if self.command == "HEAD" else {"content-length"}
            headers = {
                name.lower(): value for name, value in given.getheaders() if name.lower() not in skipped
            }
            return Answer(given.status, given.read(), headers)
        finally:
            onward.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


def refusal(status: int, code: str, message: str) -> Answer:
    """Return a refusal as S3 words it."""
    text = f"<Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>"
    return Answer(
        status,
        f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode(),
        {"content-type": "application/xml"},
    )
