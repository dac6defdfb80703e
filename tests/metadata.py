"""A stand-in for EC2's instance metadata service, version 2, on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.loopback import served

SPOT = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


class MetadataService:
    """Gives tokens, and answers only those who show one that is good."""

    def __init__(self) -> None:
        self.url = ""
        self.notices: dict[str, bytes] = {}
        self.answers = 0  # to questions with a good token
        self.given = 0
        self.sound = True  # else every answer is 503
        self._good = ""

    def forget_tokens(self) -> None:
        """Let the token that was given out run out."""
        self._good = ""

    def put(self, path: str, ttl: str | None) -> tuple[int, bytes]:
        """Give a token out."""
        if path != "/latest/api/token" or ttl is None or not 1 <= int(ttl) <= 21_600:
            return 400, b""
        self.given += 1
        self._good = f"token-{self.given}"
        return 200, self._good.encode()

    def get(self, path: str, token: str | None) -> tuple[int, bytes]:
        """Answer a question."""
        if not token or token != self._good:
            return 401, b""
        self.answers += 1
        return (200, self.notices[path]) if path in self.notices else (404, b"not found")


@contextmanager
def metadata_service() -> Iterator[MetadataService]:
    """Serve until the end of the block."""
    service = MetadataService()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
            self._answer(*service.put(self.path, ttl))

        def do_GET(self) -> None:
            self._answer(*service.get(self.path, self.headers.get("X-aws-ec2-metadata-token")))

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status if service.sound else 503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with served(Handler) as service.url:
        yield service
