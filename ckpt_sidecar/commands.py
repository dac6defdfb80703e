"""The commands that ask or do one thing and end: the other composition root."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import click

from ckpt_sidecar.bucket import PART_BYTES, BucketError
from ckpt_sidecar.document import UnknownSchema, dump_entry
from ckpt_sidecar.events import Event
from ckpt_sidecar.formats import flaw_of
from ckpt_sidecar.landing import Landing, NoRoom
from ckpt_sidecar.ledger import Ledger
from ckpt_sidecar.names import MANIFEST_NAME
from ckpt_sidecar.outside import Tell, opened_bucket, opened_log, opened_spool, real_times, with_progress
from ckpt_sidecar.reading import read
from ckpt_sidecar.restorer import NothingRestored, Restorer
from ckpt_sidecar.settings import Settings
from ckpt_sidecar.sidecar import Exit
from ckpt_sidecar.spool import Spool


def run_restore(settings: Settings) -> tuple[Exit, dict[str, Any]]:
    """Restore once, without claiming the prefix; return the exit code and what was done."""
    log = opened_log(settings)
    tell = with_progress(log.tell)
    with opened_spool(settings, tell) as spool:
        return asyncio.run(_restore(settings, spool, tell))


async def _restore(settings: Settings, spool: Spool, tell: Tell) -> tuple[Exit, dict[str, Any]]:
    landing = Landing(settings.watch)
    landing.clear()
    async with opened_bucket(settings, tell) as bucket:
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
            ledger = Ledger(bucket, prefix=settings.prefix, times=real_times(), tell=tell)
            manifest = await ledger.load(durable=spool.known.newest)
            outcome = await restorer.restore(manifest)
        except NothingRestored as error:
            return Exit.NOTHING_RESTORED, {"outcome": "failed", "path": None, "error": str(error)}
        except (BucketError, UnknownSchema, NoRoom, OSError) as error:
            raise click.ClickException(str(error)) from None
    entry = outcome.entry
    return Exit.DURABLE, {
        "outcome": outcome.word,
        "path": None if outcome.path is None else str(outcome.path),
        "checkpoint": None if entry is None else dump_entry(entry, bucket=settings.bucket),
    }


def read_manifest(settings: Settings) -> list[dict[str, Any]]:
    """Return the entries of `latest.json`, newest first, as they stand there."""
    return asyncio.run(_read_manifest(settings))


async def _read_manifest(settings: Settings) -> list[dict[str, Any]]:
    def tell(_event: Event) -> None:
        """Nobody listens."""

    async with opened_bucket(settings, tell) as bucket:
        try:
            seen = await read(bucket, settings.prefix)
        except (BucketError, UnknownSchema) as error:
            raise click.ClickException(str(error)) from None
    if seen.etag is None:
        return []
    if seen.manifest is None:
        raise click.ClickException(f"{MANIFEST_NAME}: {seen.flaw}")
    return [dump_entry(each, bucket=settings.bucket) for each in seen.manifest.checkpoints]
