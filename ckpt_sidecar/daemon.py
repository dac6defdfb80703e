"""The composition root: the daemon, put together and run."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import socket
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import click

from ckpt_sidecar import __version__
from ckpt_sidecar.bodies import started
from ckpt_sidecar.bucket import MIB
from ckpt_sidecar.checkpoint import Book
from ckpt_sidecar.child import ENDS, FORWARDED, STOPS, CannotRun, Child, reap_orphans
from ckpt_sidecar.events import Event, Failed
from ckpt_sidecar.log import Log, Outlet, default_stream
from ckpt_sidecar.manifest import Holder
from ckpt_sidecar.metrics import Metrics
from ckpt_sidecar.notices import endpoint_of, watch_notices
from ckpt_sidecar.outside import Tell, opened_bucket, opened_log, opened_spool, real_times, with_progress
from ckpt_sidecar.pace import Pace
from ckpt_sidecar.settings import Settings, attempt_of
from ckpt_sidecar.sidecar import End, Exit, Sidecar, World
from ckpt_sidecar.spool import Spool
from ckpt_sidecar.web import CannotListen, Status, serve

LAST_LINES_SECONDS = 2.0  # for the log's last lines to leave, where nobody reads


def _attempt(host: str) -> str:
    """Which run of the job this is, as the environment tells."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot_id = "unknown-boot"
    return attempt_of(os.environ, host=host, boot_id=boot_id)


def _me(settings: Settings) -> Holder:
    host = socket.gethostname()
    return Holder("", settings.attempt or _attempt(host), host, os.getpid(), time.time_ns())


# --- the daemon --------------------------------------------------------------------------------------


def run_daemon(settings: Settings, command: Sequence[str], leave: Callable[[int, str], None]) -> End:
    """Run one sidecar's life, around `command` if there is one; return how it ended.

    `leave` ends the process at once, with a code and a reason, where its end cannot be waited for.
    """
    early: list[int] = []  # what comes before the loop takes it; PID 1 would not even notice
    for number in _heard(ENDS):
        signal.signal(number, lambda number, _frame: early.append(number))
    try:
        outlet = Outlet(default_stream().fileno())
    except RuntimeError:
        raise click.ClickException(_threads_needed(settings)) from None

    def leave_now(end: End) -> None:
        outlet.settle(LAST_LINES_SECONDS)
        leave(end.code, end.reason)

    try:
        log = opened_log(settings, outlet)
        return _live(settings, command, log=log, early=early, leave=leave_now)
    finally:
        outlet.settle(LAST_LINES_SECONDS)


def _live(
    settings: Settings,
    command: Sequence[str],
    *,
    log: Log,
    early: Sequence[int],
    leave: Callable[[End], None],
) -> End:
    threading.excepthook = log.thread_crashed
    book = Book()
    readers: list[Tell] = [with_progress(log.tell)]

    def tell(event: Event) -> None:
        for reader in readers:
            reader(event)

    try:
        with opened_spool(settings, tell) as spool:
            daemon = _daemon(
                settings,
                command,
                spool=spool,
                book=book,
                readers=readers,
                tell=tell,
                early=early,
                leave=leave,
            )
            return asyncio.run(daemon)
    except click.ClickException:
        raise
    except Exception as error:  # noqa: BLE001  (a bug: the journal makes a restart safe)
        leaf = _leaf(error)
        if isinstance(leaf, CannotRun | CannotListen):
            raise click.ClickException(str(leaf)) from None
        if isinstance(leaf, RuntimeError) and "start new thread" in str(leaf):
            raise click.ClickException(_threads_needed(settings)) from None
        log.crashed(error)
        return End(Exit.CRASHED, f"a bug has ended it: {type(leaf).__name__}: {leaf}")


def _threads_needed(settings: Settings) -> str:
    count = 3 + settings.workers + _disk_threads(settings)  # the loop's, the log's, inotify's
    return (
        f"it needs {count} threads, and cannot start them all "
        "(raise `ulimit -u`, or the container's limit of pids, or give fewer --workers)"
    )


def _disk_threads(settings: Settings) -> int:
    return settings.workers + 2  # each may read or write; so may take-in, and a name be looked up


def _heard(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those that we take; under `nohup` a hang-up is none of them."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [each for each in signals if not (ignored and each is signal.SIGHUP)]


async def _daemon(
    settings: Settings,
    command: Sequence[str],
    *,
    spool: Spool,
    book: Book,
    readers: list[Tell],
    tell: Tell,
    early: Sequence[int],
    leave: Callable[[End], None],
) -> End:
    metrics = Metrics(version=__version__, python=platform.python_version(), clock=time.time, book=book)
    status = Status(
        version=__version__,
        bucket=settings.bucket,
        prefix=settings.prefix,
        watch=str(settings.watch),
        spool=spool.record.spool,
        book=book,
    )
    readers += [metrics.tell, status.tell]
    asyncio.get_running_loop().set_default_executor(started(_disk_threads(settings), "disk"))
    host, port = settings.address()

    def bound(port: int) -> None:
        try:
            spool.serving(address=f"{_reachable(host)}:{port}", pid=os.getpid())
        except OSError as error:  # then `status` and `wait` do not find us; nothing else is worse for it
            tell(Failed("start", "disk", str(spool.home), str(error), "look at the watch dir's disk"))

    pace = Pace(settings.max_bandwidth * MIB, clock=time.monotonic)
    readers.append(pace.tell)
    async with opened_bucket(settings, tell, pace=pace) as bucket:
        world = World(bucket, real_times(), time.monotonic, _me(settings), tell, leave)
        sidecar = Sidecar(settings, world, spool=spool, book=book)
        child = Child(command, grace=settings.drain_timeout) if command else None

        async def web() -> None:
            await serve(host, port, status=status, metrics=metrics, now=time.time, on_bound=bound)

        async def notices() -> None:
            endpoint = endpoint_of(os.environ)
            await watch_notices(
                endpoint, sleep=asyncio.sleep, wall=time.time, noticed=sidecar.noticed, tell=tell
            )

        beside = [web, notices] if settings.ec2_notices else [web]
        async with _no_bug_is_lost():
            with _signals(sidecar, child, early):
                return await sidecar.run(*beside, child=child)


@asynccontextmanager
async def _no_bug_is_lost() -> AsyncIterator[None]:
    """End also at an error of ours that no task would raise: in a callback, or in a task nobody waits for.

    What the libraries do among themselves (a connection that was lost twice) is only logged.
    """
    loop = asyncio.get_running_loop()
    lost: asyncio.Future[None] = loop.create_future()

    def take(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception) and _is_ours(error) and not lost.done():
            lost.set_exception(error)
        else:
            loop.default_exception_handler(context)

    async def raise_lost() -> None:
        await lost

    loop.set_exception_handler(take)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(raise_lost(), name="bugs")]
        if os.getpid() == 1:
            tasks.append(group.create_task(reap_orphans(), name="orphans"))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


def _is_ours(error: BaseException) -> bool:
    """Has it come through our code?"""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").startswith(f"{__package__}.") for frame in frames)


def _reachable(host: str) -> str:
    """Where a neighbour on this host finds a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104


@contextmanager
def _signals(sidecar: Sidecar, child: Child | None, early: Sequence[int]) -> Iterator[None]:
    """The first stop signal drains, the second ends. A child gets them instead, and its end drains.

    Those of `early` have come already.
    """
    loop = asyncio.get_running_loop()

    def take(number: signal.Signals) -> None:
        if child is not None and child.send(number, has_it=number == signal.SIGINT and _in_foreground()):
            return
        if number in STOPS and sidecar.stop.is_set():
            sidecar.hurry.set()
        elif number in ENDS:
            sidecar.stop.set()

    taken = _heard(FORWARDED if child is not None else ENDS)
    for number in taken:
        loop.add_signal_handler(number, take, number)
    for number in map(signal.Signals, early):
        take(number)
    try:
        yield
    finally:
        for number in taken:
            loop.remove_signal_handler(number)


def _in_foreground() -> bool:
    """Does a terminal send its Ctrl-C to our process group, and so to a child of ours as well?"""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _leaf(error: BaseException) -> BaseException:
    """The first single error, where it is a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
