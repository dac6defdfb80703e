"""The composition root: the real bucket, disk, clock and chance, put together and run."""

from __future__ import annotations

import asyncio
import os
import platform
import random
import secrets
import signal
import socket
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

import click

from ckpt_sidecar import __version__
from ckpt_sidecar.bodies import started
from ckpt_sidecar.bucket import PART_BYTES, BucketError, Missing
from ckpt_sidecar.checkpoint import Book
from ckpt_sidecar.child import ENDS, FORWARDED, STOPS, CannotRun, Child, reap_orphans
from ckpt_sidecar.document import MAX_MANIFEST_BYTES, Mangled, UnknownSchema, dump_entry, parse
from ckpt_sidecar.events import Event, Failed, Progress
from ckpt_sidecar.formats import flaw_of
from ckpt_sidecar.landing import Landing, NoRoom
from ckpt_sidecar.ledger import Ledger, Times
from ckpt_sidecar.log import Log, Outlet, configure, default_stream, on_terminal
from ckpt_sidecar.manifest import Holder
from ckpt_sidecar.metrics import Metrics
from ckpt_sidecar.names import MANIFEST_NAME
from ckpt_sidecar.notices import endpoint_of, watch_notices
from ckpt_sidecar.patience import PatientBucket
from ckpt_sidecar.restorer import NothingRestored, Restorer
from ckpt_sidecar.s3 import S3Bucket
from ckpt_sidecar.settings import Settings, attempt_of
from ckpt_sidecar.sidecar import End, Exit, Sidecar, World
from ckpt_sidecar.spool import Spool, SpoolError
from ckpt_sidecar.web import CannotListen, Status, serve

Tell = Callable[[Event], None]
LAST_LINES_SECONDS = 2.0  # for the log's last lines to leave, where nobody reads


def _times() -> Times:
    return Times(
        wall=time.time_ns,
        sleep=asyncio.sleep,
        chance=random.random,
        token=lambda: secrets.token_hex(16),
    )


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


def _start_log(settings: Settings, outlet: Outlet | None = None) -> Log:
    stream = default_stream()
    terminal = on_terminal(stream)
    readable = settings.log_format == "console" or (settings.log_format == "auto" and terminal)
    to = cast("TextIO", outlet or stream)
    configure(to, readable=readable, colors=terminal and "NO_COLOR" not in os.environ)
    return Log(seconds=time.monotonic)


@asynccontextmanager
async def _bucket(settings: Settings, tell: Tell) -> AsyncIterator[PatientBucket]:
    """The bucket; a configuration that cannot be used is said, and ends the program."""
    opening = S3Bucket.open(
        settings.bucket,
        endpoint_url=settings.endpoint_url or None,
        owner=settings.expected_bucket_owner,
        workers=settings.workers,
        part_bytes=PART_BYTES,
        tell=tell,
    )
    async with AsyncExitStack() as stack:
        try:
            bucket = await stack.enter_async_context(opening)
        except BucketError as error:
            raise click.ClickException(str(error)) from None
        yield PatientBucket(bucket, sleep=asyncio.sleep, chance=random.random, tell=tell)


@contextmanager
def _spool(settings: Settings, tell: Tell) -> Iterator[Spool]:
    """The opened spool; what cannot be used is said, and ends the program."""
    spool = Spool(settings.watch, home=Path(settings.spool) if settings.spool else None)
    try:
        complaints = spool.open(new_id=uuid.uuid4().hex)
    except SpoolError as error:
        raise click.ClickException(str(error)) from None
    for complaint in complaints:
        tell(Failed("start", "disk", str(spool.home), complaint))
    try:
        yield spool
    finally:
        spool.close()


# --- the daemon --------------------------------------------------------------------------------------


def run_daemon(settings: Settings, command: Sequence[str], leave: Callable[[int, str], None]) -> End:
    """Run one sidecar's life, around `command` if there is one; return how it ended.

    `leave` ends the process at once, with a code and a reason, where its end cannot be waited for.
    """
    for number in _heard(ENDS):  # until the loop takes them; PID 1 would not even notice
        signal.signal(number, _stopped_early)
    try:
        outlet = Outlet(default_stream().fileno())
    except RuntimeError:
        raise click.ClickException(_threads_needed(settings)) from None

    def leave_now(end: End) -> None:
        outlet.settle(LAST_LINES_SECONDS)
        leave(end.code, end.reason)

    try:
        return _live(settings, command, log=_start_log(settings, outlet), leave=leave_now)
    finally:
        outlet.settle(LAST_LINES_SECONDS)


def _live(settings: Settings, command: Sequence[str], *, log: Log, leave: Callable[[End], None]) -> End:
    threading.excepthook = log.thread_crashed
    book = Book()
    readers: list[Tell] = [_with_progress(log.tell)]

    def tell(event: Event) -> None:
        for reader in readers:
            reader(event)

    try:
        with _spool(settings, tell) as spool:
            daemon = _daemon(
                settings,
                command,
                spool=spool,
                book=book,
                readers=readers,
                tell=tell,
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


def _stopped_early(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


async def _daemon(
    settings: Settings,
    command: Sequence[str],
    *,
    spool: Spool,
    book: Book,
    readers: list[Tell],
    tell: Tell,
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

    async with _bucket(settings, tell) as bucket:
        world = World(bucket, _times(), time.monotonic, _me(settings), tell, leave)
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
            with _signals(sidecar, child):
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
def _signals(sidecar: Sidecar, child: Child | None) -> Iterator[None]:
    """The first stop signal drains, the second ends. A child gets them instead, and its end drains."""
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


# --- one-shot commands -------------------------------------------------------------------------------


def run_restore(settings: Settings) -> tuple[Exit, dict[str, Any]]:
    """Restore once, without claiming the prefix; return the exit code and what was done."""
    log = _start_log(settings)
    tell = _with_progress(log.tell)
    with _spool(settings, tell) as spool:
        return asyncio.run(_restore(settings, spool, tell))


async def _restore(settings: Settings, spool: Spool, tell: Tell) -> tuple[Exit, dict[str, Any]]:
    landing = Landing(settings.watch)
    landing.clear()
    async with _bucket(settings, tell) as bucket:
        restorer = Restorer(
            bucket,
            landing,
            known=spool.known,
            workers=settings.workers,
            part_bytes=PART_BYTES,
            flaw_of=flaw_of,
            seconds=time.monotonic,
            tell=tell,
        )
        try:
            ledger = Ledger(bucket, prefix=settings.prefix, times=_times(), tell=tell)
            manifest = await ledger.load(durable=spool.known.newest)
            outcome = await restorer.restore(manifest)
        except NothingRestored as error:
            return Exit.NOTHING_RESTORED, {"outcome": "failed", "path": None, "error": str(error)}
        except (BucketError, UnknownSchema, NoRoom) as error:
            raise click.ClickException(str(error)) from None
    entry = outcome.entry
    return Exit.DURABLE, {
        "outcome": outcome.word,
        "path": None if outcome.path is None else str(outcome.path),
        "checkpoint": None if entry is None else dump_entry(entry, bucket=settings.bucket),
    }


def _with_progress(tell: Tell) -> Tell:
    """A progress bar for what comes down, in place of its log lines, where a person is watching."""
    if not on_terminal(default_stream()):
        return tell
    bars: dict[str, Any] = {}

    def told(event: Event) -> None:
        if not isinstance(event, Progress) or event.direction != "down":
            tell(event)
            return
        bar = bars.get(event.name)
        if bar is None:
            bar = bars[event.name] = click.progressbar(
                length=event.total, label=event.name, file=default_stream()
            )
        bar.update(event.bytes)
        if event.done >= event.total:
            bar.render_finish()
            del bars[event.name]

    return told


def read_manifest(settings: Settings) -> list[dict[str, Any]]:
    """Return the entries of `latest.json`, newest first, as they stand there."""
    return asyncio.run(_read_manifest(settings))


async def _read_manifest(settings: Settings) -> list[dict[str, Any]]:
    def tell(_event: Event) -> None:
        """Nobody listens."""

    async with _bucket(settings, tell) as bucket:
        try:
            raw, _ = await bucket.get(settings.prefix + MANIFEST_NAME, limit=MAX_MANIFEST_BYTES)
            manifest = parse(raw, prefix=settings.prefix)
        except Missing as error:
            if error.reason == "key":
                return []
            raise click.ClickException(str(error)) from None
        except (BucketError, UnknownSchema, Mangled) as error:
            raise click.ClickException(f"{MANIFEST_NAME}: {error}") from None
    return [dump_entry(each, bucket=settings.bucket) for each in manifest.checkpoints]
