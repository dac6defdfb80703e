"""Events as log lines: structlog, one event a line, JSON unless a person is watching.

The event's name in the log is `checkpoint.event_name`; its fields are the event's own. What happens for
every request or part is not logged, progress only every few seconds.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import fields
from typing import Any, TextIO

import structlog

from ckpt_sidecar.checkpoint import Id, Pinned, Stored, Uploading
from ckpt_sidecar.events import (
    Event,
    Failed,
    FellBack,
    Fenced,
    Ignored,
    Moved,
    NotReady,
    PinnedByDescriptor,
    Probed,
    Progress,
    Rebuilt,
    RecoveryPoint,
    Replacing,
    Requested,
    Rescanned,
    Restored,
    Retrying,
    Torn,
    WatchLost,
    event_name,
)

PROGRESS_SECONDS = 10.0
WARNINGS = (
    Retrying,
    Torn,
    Ignored,
    WatchLost,
    PinnedByDescriptor,
    Replacing,
    Rebuilt,
    NotReady,
)
ERRORS = (Failed, Fenced, FellBack)


def configure(stream: TextIO, *, readable: bool, colors: bool) -> None:
    """Set structlog up to write to `stream`, and the standard library's warnings with it."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
        structlog.processors.format_exc_info,
    ]
    render: Any = structlog.processors.JSONRenderer(ensure_ascii=True)
    if readable:
        shared.append(_visible)
        render = structlog.dev.ConsoleRenderer(
            colors=colors,
            timestamp_key="at",
            repr_native_str=True,
            exception_formatter=structlog.dev.plain_traceback,
        )
    structlog.configure(
        processors=[*shared, render],
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("aiohttp.server").addFilter(_no_bad_request)
    logging.captureWarnings(capture=True)


def _no_bad_request(record: logging.LogRecord) -> bool:
    """Keep out what is answered with 400: anybody may send it, and have a traceback written each time."""
    error = record.exc_info[1] if record.exc_info else None
    return type(error).__module__ != "aiohttp.http_exceptions"


def _visible(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Show what a terminal would obey, in the two texts that the renderer writes as they are."""
    for key, kept in (("event", ""), ("exception", "\n")):
        if key in line:
            line[key] = "".join(
                each if each.isprintable() or each in kept else each.encode("unicode_escape").decode("ascii")
                for each in str(line[key])
            )
    return line


class Log:
    """A reader of events. `seconds` is monotonic."""

    def __init__(self, *, seconds: Callable[[], float]) -> None:
        self._log = structlog.get_logger()
        self._seconds = seconds
        self._told: dict[tuple[str, str], float] = {}

    def tell(self, event: Event) -> None:
        """Write the event's line, if it has one."""
        if isinstance(event, Progress) and not self._due(event):
            return
        if isinstance(event, Moved) and not event.checkpoint.waiting:
            self._told.pop(("up", event.checkpoint.name), None)
        level = _level(event)
        if level is not None:
            getattr(self._log, level)(event_name(event), **fields_of(event))

    def _due(self, event: Progress) -> bool:
        key, now = (event.direction, event.name), self._seconds()
        if event.done >= event.total:
            self._told.pop(key, None)
            return False
        since = self._told.setdefault(key, now)
        if now - since < PROGRESS_SECONDS:
            return False
        self._told[key] = now
        return True


def _level(event: Event) -> str | None:
    if isinstance(event, Requested | RecoveryPoint):
        return None
    if isinstance(event, Moved):
        return None if isinstance(event.checkpoint.state, Uploading | Stored) else "info"
    if isinstance(event, Rescanned):
        return "warning" if event.missed else None
    if isinstance(event, ERRORS) or (isinstance(event, Restored) and event.outcome == "failed"):
        return "error"
    return "warning" if isinstance(event, WARNINGS) else "info"


def fields_of(event: Event) -> Mapping[str, Any]:
    """Return the event's fields as plain values."""
    if isinstance(event, Moved):
        it = event.checkpoint
        told: dict[str, Any] = {"id": str(it.id), "name": it.name, "bytes": it.size}
        if not isinstance(it.state, Pinned):
            told |= {
                "seconds": round(event.seconds, 3),
                "lag_seconds": round(event.at - it.saved_at / 1e9, 3),
            }
        return told | {
            each.name: _plain(getattr(it.state, each.name))
            for each in fields(it.state)
            if each.name != "objects"
        }
    if isinstance(event, Probed):
        return {each.name: getattr(event.abilities, each.name) for each in fields(event.abilities)}
    # `event` is structlog's own word for the line's name
    return {each.name: _plain(getattr(event, each.name)) for each in fields(event)}


def _plain(value: Any) -> Any:
    if isinstance(value, Id):
        return str(value)
    return round(value, 3) if isinstance(value, float) else value


def on_terminal(stream: TextIO) -> bool:
    """Is a person watching?"""
    return stream.isatty()


def default_stream() -> TextIO:
    """Where logs go: standard error, so that a command's own output stays clean."""
    return sys.stderr
