"""Events as log lines: structlog, one event a line, JSON unless a person is watching.

The event's name in the log is `checkpoint.event_name`; its fields are the event's own. What happens for
every request or part is not logged, progress only every few seconds.
"""

from __future__ import annotations

import io
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
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
    Interruption,
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
LINES_WAITING = 2000  # for a reader who does not read; what comes then is dropped, and the gap is told
WARNINGS = (
    Retrying,
    Torn,
    Ignored,
    WatchLost,
    PinnedByDescriptor,
    Replacing,
    Rebuilt,
    NotReady,
    Interruption,
)
ERRORS = (Failed, Fenced, FellBack)


class Outlet(io.TextIOBase):
    """A stream that makes nobody wait and never fails: a thread carries the lines to where they go.

    Whoever reads our log may be slow, stuck or gone, and the disk that it goes to may be full.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting: deque[str] = deque()
        self._dropped = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._carry, name="log", daemon=True).start()

    def write(self, text: str) -> int:
        """Take in whole lines."""
        with self._changed:
            if len(self._waiting) < LINES_WAITING:
                self._waiting.append(text)
                self._changed.notify_all()
            else:
                self._dropped += 1
        return len(text)

    def settle(self, seconds: float) -> bool:
        """Wait until all has left, but not longer than that; has it?"""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def _carry(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                text = self._waiting[0]
            self._put(memoryview(text.encode("utf-8", "backslashreplace")))
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()
                dropped, self._dropped = self._dropped, 0
            if dropped:
                structlog.get_logger().warning("log_lines_dropped", lines=dropped)

    def _put(self, left: memoryview) -> None:
        """Write all of it, however long that takes; where that cannot be, nobody is told."""
        with suppress(OSError):
            while left:
                try:
                    left = left[os.write(self._descriptor, left) :]
                except BlockingIOError:  # somebody who shares it has made it so
                    select.select([], [self._descriptor], [])


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
        logger_factory=structlog.WriteLoggerFactory(stream),
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

    def crashed(self, error: BaseException) -> None:
        """Write what a bug has raised, all of it, in one line."""
        self._log.error("crashed", error=f"{type(error).__name__}: {error}", exc_info=error)

    def thread_crashed(self, thread: threading.ExceptHookArgs) -> None:
        """Write, in one line, what has ended a thread; whoever owns it notices that by itself."""
        name = thread.thread.name if thread.thread else ""
        self._log.error("thread_crashed", thread=name, exc_info=thread.exc_value)

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
                "lag_seconds": round(max(0.0, event.at - it.saved_at / 1e9), 3),
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
