"""`latest.json` as a value, changed by pure functions; `document.py` reads and writes it.

Every change here may be applied twice to the same end (a swap whose answer was lost is said again), and
`checkpoints` stays sorted, newest first, one entry for each name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from ckpt_sidecar.bucket import ObjectRef
from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.names import flaw_of_name

HISTORY = 100  # entries kept by default

# The metadata that every object carries about itself (rule 7).
META_ID = "ckpt-id"
META_SAVED_AT = "ckpt-saved-at"
META_SIZE = "ckpt-size"


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the prefix. `since` is in ns since the epoch."""

    spool: str
    attempt: str
    host: str
    pid: int
    since: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A durable checkpoint: one object for each file. Times in ns since the epoch."""

    id: Id
    name: str
    objects: tuple[ObjectRef, ...]
    saved_at: int
    stored_at: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all its objects."""
        return sum(each.size for each in self.objects)


@dataclass(frozen=True, slots=True)
class Announced:
    """A multipart upload under way. `spool` says who is at it, and so who may resume it."""

    id: Id
    name: str
    key: str
    upload_id: str
    size: int
    saved_at: int
    spool: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Expiring:
    """An object that retention has let go and is about to delete."""

    id: Id
    key: str
    etag: str
    version_id: str | None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The newest durable checkpoint, the history that restore falls back on, and the fencing token."""

    generation: int = 0
    holder: Holder | None = None
    write: str = ""
    updated_at: int = 0
    checkpoints: tuple[Entry, ...] = ()
    uploads: tuple[Announced, ...] = ()
    expiring: tuple[Expiring, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def newest(self) -> Entry | None:
        """The one true newest checkpoint."""
        return self.checkpoints[0] if self.checkpoints else None

    def entry_of(self, name: str) -> Entry | None:
        """The entry under that name, if there is one."""
        return next((each for each in self.checkpoints if each.name == name), None)


Change = Callable[[Manifest], Manifest]


# --- changes -----------------------------------------------------------------------------------------


def claimed(manifest: Manifest, holder: Holder, *, at_least: int = 0) -> Manifest:
    """The next generation, held by `holder`, and greater than `at_least`."""
    return replace(manifest, generation=max(manifest.generation, at_least) + 1, holder=holder)


def committed(manifest: Manifest, entry: Entry, *, history: int = HISTORY) -> Manifest:
    """The manifest with the entry in its place and its announced uploads taken out.

    A newer entry of the same name stays, an older one gives way: its bytes are gone.
    """
    others = [each for each in manifest.checkpoints if each.name != entry.name or each.id > entry.id]
    if not any(each.name == entry.name for each in others):
        others.append(entry)
    ordered = sorted(others, key=lambda each: each.id, reverse=True)[:history]
    uploads = tuple(each for each in manifest.uploads if each.id != entry.id)
    keys = {each.key for each in entry.objects}
    expiring = tuple(each for each in manifest.expiring if each.key not in keys)
    return replace(manifest, checkpoints=tuple(ordered), uploads=uploads, expiring=expiring)


def announced(manifest: Manifest, upload: Announced) -> Manifest:
    """The manifest with the upload entered once."""
    others = tuple(each for each in manifest.uploads if each.upload_id != upload.upload_id)
    return replace(manifest, uploads=(*others, upload))


def forgotten(manifest: Manifest, upload_ids: Collection[str]) -> Manifest:
    """The manifest without these uploads."""
    return replace(
        manifest, uploads=tuple(each for each in manifest.uploads if each.upload_id not in upload_ids)
    )


def expired(manifest: Manifest, keep: int) -> Manifest:
    """The manifest with all but the newest `keep` checkpoints moved to `expiring`; at least one stays."""
    kept, gone = manifest.checkpoints[: max(1, keep)], manifest.checkpoints[max(1, keep) :]
    leaving = tuple(Expiring(e.id, o.key, o.etag, o.version_id) for e in gone for o in e.objects)
    return replace(manifest, checkpoints=kept, expiring=(*manifest.expiring, *leaving))


def deleted(manifest: Manifest, done: Collection[Expiring]) -> Manifest:
    """The manifest without the objects that are gone."""
    return replace(manifest, expiring=tuple(each for each in manifest.expiring if each not in done))


def self_description(id_: Id, saved_at: int, size: int) -> dict[str, str]:
    """The metadata that an object carries: who it is, without any manifest."""
    return {META_ID: str(id_), META_SAVED_AT: rfc3339(saved_at), META_SIZE: str(size)}


def described(ref: ObjectRef, name: str, stored_at: int) -> Entry | None:
    """The entry that an object's own metadata tells, or None when it is not one of ours, or not whole."""
    try:
        id_ = Id.parse(ref.metadata[META_ID])
        saved_at = parse_rfc3339(ref.metadata[META_SAVED_AT])
        size = int(ref.metadata[META_SIZE])
    except (KeyError, ValueError):
        return None
    if size != ref.size or flaw_of_name(name) is not None:
        return None
    return Entry(id_, name, (ref,), saved_at, stored_at)


# --- time as text ------------------------------------------------------------------------------------

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST, _LAST = -62_135_596_800, 253_402_300_799  # the years 1 to 9999, in s since the epoch
_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", re.ASCII)


def rfc3339(ns: int) -> str:
    """Nanoseconds since the epoch as RFC 3339 in UTC, to the nanosecond (so that an mtime comes back).

    Some file systems take an mtime beyond the years that can be written: it becomes the nearest of those.
    """
    seconds, rest = divmod(min(max(ns, _FIRST * 1_000_000_000), _LAST * 1_000_000_000), 1_000_000_000)
    return f"{(_EPOCH + timedelta(seconds=seconds)).replace(tzinfo=None).isoformat()}.{rest:09d}Z"


def parse_rfc3339(text: str) -> int:
    """Read RFC 3339 in UTC as nanoseconds since the epoch; ValueError when it is not that."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError(f"not a time in RFC 3339 UTC: {text!r}")
    whole = datetime.fromisoformat(match[1]).replace(tzinfo=UTC) - _EPOCH
    return (whole.days * 86_400 + whole.seconds) * 1_000_000_000 + int((match[2] or "").ljust(9, "0"))
