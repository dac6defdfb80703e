"""What stands in the bucket, as `latest.json` says, or as the objects say of themselves."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_sidecar.bucket import Bucket, Missing
from ckpt_sidecar.document import MAX_MANIFEST_BYTES, Mangled, parse
from ckpt_sidecar.manifest import Entry, Manifest, described
from ckpt_sidecar.names import MANIFEST_NAME


@dataclass(frozen=True, slots=True)
class Seen:
    """What a read found: no manifest when it is absent (no etag either) or mangled; `flaw` says how."""

    manifest: Manifest | None
    etag: str | None
    flaw: str


async def read(bucket: Bucket, prefix: str) -> Seen:
    """What stands in the bucket. Raises UnknownSchema, and what the bucket raises."""
    try:
        raw, ref = await bucket.get(prefix + MANIFEST_NAME, limit=MAX_MANIFEST_BYTES)
    except Missing as error:
        if error.reason != "key":
            raise
        return Seen(None, None, "it is not there")
    try:
        return Seen(parse(raw, prefix=prefix), ref.etag, "")
    except Mangled as error:
        return Seen(None, ref.etag, str(error))


async def entries_from_objects(bucket: Bucket, prefix: str, now: int) -> list[Entry]:
    """Every object under the prefix that describes itself as a checkpoint of ours.

    What lies below another manifest is another job's, whose prefix is inside this one.
    """
    entries, others = [], []
    async for listed in bucket.list(prefix):
        name = listed.key.removeprefix(prefix)
        if name.endswith(f"/{MANIFEST_NAME}"):
            others.append(name.removesuffix(MANIFEST_NAME))
            continue
        ref = await bucket.head(listed.key)
        entry = described(ref, name, now) if ref is not None else None
        if entry is not None:
            entries.append(entry)
    return [each for each in entries if not each.name.startswith(tuple(others))]
