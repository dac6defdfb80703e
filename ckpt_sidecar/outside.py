"""What is outside, as it really is: the bucket, the spool, the log, time and chance."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

import click

from ckpt_sidecar.bucket import PART_BYTES, BucketError
from ckpt_sidecar.events import Event, Failed, Progress
from ckpt_sidecar.identity import SpoolError
from ckpt_sidecar.ledger import Times
from ckpt_sidecar.log import Log, Outlet, configure, default_stream, on_terminal
from ckpt_sidecar.pace import Pace
from ckpt_sidecar.patience import PatientBucket
from ckpt_sidecar.s3 import S3Bucket
from ckpt_sidecar.settings import Settings
from ckpt_sidecar.spool import Spool

Tell = Callable[[Event], None]


def real_times() -> Times:
    """Time and chance."""
    return Times(
        wall=time.time_ns,
        sleep=asyncio.sleep,
        chance=random.random,
        token=lambda: secrets.token_hex(16),
    )


def opened_log(settings: Settings, outlet: Outlet | None = None) -> Log:
    """The log, readable for a person or JSON, to standard error or through the outlet to it."""
    stream = default_stream()
    terminal = on_terminal(stream)
    readable = settings.log_format == "console" or (settings.log_format == "auto" and terminal)
    to = cast("TextIO", outlet or stream)
    configure(to, readable=readable, colors=terminal and "NO_COLOR" not in os.environ)
    return Log(seconds=time.monotonic)


@asynccontextmanager
async def opened_bucket(
    settings: Settings, tell: Tell, *, pace: Pace | None = None
) -> AsyncIterator[PatientBucket]:
    """The bucket; a configuration that cannot be used is said, and ends the program."""
    opening = S3Bucket.open(
        settings.bucket,
        endpoint_url=settings.endpoint_url or None,
        owner=settings.expected_bucket_owner,
        workers=settings.workers,
        part_bytes=PART_BYTES,
        pace=pace,
        nice=settings.nice,
        tell=tell,
    )
    async with AsyncExitStack() as stack:
        try:
            bucket = await stack.enter_async_context(opening)
        except BucketError as error:
            raise click.ClickException(str(error)) from None
        yield PatientBucket(bucket, sleep=asyncio.sleep, chance=random.random, tell=tell)


@contextmanager
def opened_spool(settings: Settings, tell: Tell) -> Iterator[Spool]:
    """The opened spool; what cannot be used is said, and ends the program."""
    spool = Spool(settings.watch, home=Path(settings.spool) if settings.spool else None)
    try:
        complaints = spool.open(new_id=uuid.uuid4().hex, target=settings.target)
    except SpoolError as error:
        raise click.ClickException(str(error)) from None
    for complaint in complaints:
        tell(Failed("start", "disk", str(spool.home), complaint))
    try:
        yield spool
    finally:
        spool.close()


def with_progress(tell: Tell) -> Tell:
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
