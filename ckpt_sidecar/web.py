"""`/metrics`, `/healthz`, `/readyz` and `/status.json`: read-only, a reader of events."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ckpt_sidecar.checkpoint import Book, Committed, state_name
from ckpt_sidecar.events import (
    Claimed,
    Drained,
    Draining,
    Event,
    Fenced,
    Interruption,
    Moved,
    NotReady,
    Probed,
    Progress,
    Ready,
    RecoveryPoint,
    Retrying,
)
from ckpt_sidecar.metrics import CONTENT_TYPE, Metrics
from ckpt_sidecar.names import step_of

SCHEMA = 1
CLIENT_SECONDS = 10  # a client that does not read or ask for so long is dropped
MOST_CLIENTS = 256  # at a time; fewer where descriptors are few


class CannotListen(Exception):
    """The address to listen on cannot be had; the message names it and the mend."""


class Status:
    """How things stand, as `/status.json` tells it. `state`: starting, ready, draining, fenced, stopped."""

    def __init__(self, *, version: str, bucket: str, prefix: str, watch: str, spool: str, book: Book) -> None:
        self.ready = False
        self.reason = "has not claimed the prefix yet"
        self._fixed = {"schema": SCHEMA, "version": version, "watch": watch, "spool": spool}
        self._bucket = bucket
        self._prefix = prefix
        self._book = book
        self._state = "starting"
        self._generation = 0
        self._abilities: dict[str, bool] = {}
        self._newest: dict[str, Any] | None = None
        self._interruption: dict[str, str] | None = None
        self._committed = 0
        self._done: dict[str, int] = {}

    def tell(self, event: Event) -> None:  # noqa: C901, PLR0912  (a table, one line for each event)
        """Take the event in."""
        match event:
            case Moved():
                self._moved(event)
            case Progress() if event.direction == "up":
                self._done[event.name] = event.done
            case Probed():
                self._abilities = {
                    name: getattr(event.abilities, name) for name in event.abilities.__dataclass_fields__
                }
            case Claimed():
                self._generation = event.generation
                self.reason = "is restoring"
            case RecoveryPoint():
                self._newest = self._as_newest(event)
            case Ready():
                self.ready, self.reason, self._state = True, "", "ready"
            case Retrying() if self._state == "starting":
                self.reason = f"tries again: {event.error}"
            case NotReady():
                self.ready, self.reason = False, event.reason
            case Fenced():
                self.ready, self._state = False, "fenced"
            case Interruption():
                self._interruption = event.note
            case Draining():
                self._state = "draining"
            case Drained():
                self._state = "stopped"
            case _:
                pass

    def _moved(self, event: Moved) -> None:
        it = event.checkpoint
        if not it.waiting:
            self._done.pop(it.name, None)
        if isinstance(it.state, Committed):
            self._committed += 1

    def _as_newest(self, event: RecoveryPoint) -> dict[str, Any]:
        return {
            "id": str(event.id),
            "name": event.name,
            "size": event.size,
            "step": step_of(event.name),
            "saved_at": _text(event.saved_at),
            "stored_at": _text(event.stored_at),
            "uri": f"s3://{self._bucket}/{self._prefix}{event.name}",
        }

    def as_dict(self, now: float) -> dict[str, Any]:
        """Return it all as plain values; `now` in seconds since the epoch."""
        return self._fixed | {
            "state": self._state,
            "ready": self.ready,
            "reason": self.reason,
            "bucket": self._bucket,
            "prefix": self._prefix,
            "generation": self._generation,
            "store": self._abilities,
            "newest": self._newest,
            "interruption": self._interruption,
            "committed": self._committed,
            "lag_seconds": round(self._book.lag(now), 3),
            "queue": [
                {
                    "id": str(each.id),
                    "name": each.name,
                    "size": each.size,
                    "sent": self._done.get(each.name, 0),
                    "state": state_name(each.state),
                }
                for each in self._book
            ],
        }


def _text(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


async def serve(
    host: str,
    port: int,
    *,
    status: Status,
    metrics: Metrics,
    now: Callable[[], float],
    on_bound: Callable[[int], None],
) -> None:
    """Answer on the address until cancelled; `on_bound` is told the port (port 0 takes a free one).

    Raises CannotListen.
    """
    from aiohttp import web  # noqa: PLC0415  (half a second to import)

    async def show_metrics(_request: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def show_health(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def show_ready(_request: web.Request) -> web.Response:
        if status.ready:
            return web.Response(text="ready\n")
        # What the bucket holds may stand in the reason, and need not be valid text.
        reason = status.reason.encode("utf-8", "backslashreplace").decode("utf-8")
        return web.Response(status=503, text=f"not ready: {reason}\n")

    async def show_status(_request: web.Request) -> web.Response:
        return web.json_response(status.as_dict(now()))

    app = web.Application(client_max_size=1024)
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", show_health)
    app.router.add_get("/readyz", show_ready)
    app.router.add_get("/status.json", show_status)
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, keepalive_timeout=CLIENT_SECONDS, shutdown_timeout=1.0
    )
    await runner.setup()
    listening = await _listen(_Door(runner.server), host, port)
    try:
        on_bound(listening.sockets[0].getsockname()[1])
        await asyncio.Event().wait()
    finally:
        listening.close()
        await runner.cleanup()


class _Door:
    """Takes clients in, or turns them away when there are too many: uploads need descriptors, too."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.most = max(1, min(MOST_CLIENTS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._coming = 0

    def __call__(self) -> asyncio.Protocol:
        """Give the protocol for one more."""
        if len(self._server.connections) + self._coming >= self.most:
            return _TurnedAway()
        self._coming += 1
        asyncio.get_running_loop().call_later(0, self._has_come)  # by then it is one of the connections
        protocol: asyncio.Protocol = self._server()
        return protocol

    def _has_come(self) -> None:
        self._coming -= 1


class _TurnedAway(asyncio.Protocol):
    """One client too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


async def _listen(door: _Door, host: str, port: int) -> asyncio.Server:
    try:
        return await asyncio.get_running_loop().create_server(door, host, port, backlog=door.most)
    except OSError as error:
        raise CannotListen(
            f"cannot listen on {host}:{port}: {error.strerror} (choose another --listen)"
        ) from error
