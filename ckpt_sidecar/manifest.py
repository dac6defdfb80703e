"""`latest.json` as a value: read as hostile input, changed by pure functions, written back.

Every change here may be applied twice to the same end (a swap whose answer was lost is said again), and
`checkpoints` stays sorted, newest first, one entry for each name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from ckpt_sidecar.bucket import MAX_OBJECT_BYTES, ObjectRef, decode_crc64
from ckpt_sidecar.checkpoint import Id, flaw_of_name, step_of

T = TypeVar("T")

SCHEMA = 1
MAX_MANIFEST_BYTES = 16 * 1024 * 1024  # 100 entries take about 50 KiB; directories add their files
HISTORY = 100  # entries kept by default

# The metadata that every object carries about itself (rule 7).
META_ID = "ckpt-id"
META_SAVED_AT = "ckpt-saved-at"
META_SIZE = "ckpt-size"


class Mangled(ValueError):
    """What the bucket holds as `latest.json` cannot be read as one; says the place and why."""


class UnknownSchema(ValueError):
    """`latest.json` was written by a newer ckpt-sidecar: it is left alone."""


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


@dataclass(frozen=True, slots=True)
class Expiring:
    """An object that retention has let go and is about to delete."""

    id: Id
    key: str
    etag: str
    version_id: str | None


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
_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", re.ASCII)


def rfc3339(ns: int) -> str:
    """Nanoseconds since the epoch as RFC 3339 in UTC, to the nanosecond (so that an mtime comes back)."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return f"{(_EPOCH + timedelta(seconds=seconds)).replace(tzinfo=None).isoformat()}.{rest:09d}Z"


def parse_rfc3339(text: str) -> int:
    """Read RFC 3339 in UTC as nanoseconds since the epoch; ValueError when it is not that."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError(f"not a time in RFC 3339 UTC: {text!r}")
    whole = datetime.fromisoformat(match[1]).replace(tzinfo=UTC) - _EPOCH
    return (whole.days * 86_400 + whole.seconds) * 1_000_000_000 + int((match[2] or "").ljust(9, "0"))


# --- writing -----------------------------------------------------------------------------------------


def dump(manifest: Manifest, *, bucket: str) -> bytes:
    """Return the manifest as `latest.json`."""
    holder = manifest.holder
    data: dict[str, Any] = dict(manifest.extra) | {
        "schema": SCHEMA,
        "updated_at": rfc3339(manifest.updated_at),
        "write": manifest.write,
        "generation": manifest.generation,
        "holder": holder
        and {
            "spool": holder.spool,
            "attempt": holder.attempt,
            "host": holder.host,
            "pid": holder.pid,
            "since": rfc3339(holder.since),
        },
        "checkpoints": [dump_entry(each, bucket=bucket) for each in manifest.checkpoints],
        "uploads": [_dump_upload(each) for each in manifest.uploads],
        "expiring": [_dump_expiring(each) for each in manifest.expiring],
    }
    return (json.dumps(data, indent=1, ensure_ascii=True) + "\n").encode("ascii")


def dump_entry(entry: Entry, *, bucket: str) -> dict[str, Any]:
    """Return the entry as it stands in `latest.json`."""
    first = entry.objects[0]
    return dict(entry.extra) | {
        "id": str(entry.id),
        "name": entry.name,
        "key": first.key,
        "uri": f"s3://{bucket}/{first.key}",
        "version_id": first.version_id,
        "size": first.size,
        "crc64nvme": first.crc64nvme,
        "etag": first.etag,
        "saved_at": rfc3339(entry.saved_at),
        "stored_at": rfc3339(entry.stored_at),
        "step": step_of(entry.name),
    }


def _dump_upload(upload: Announced) -> dict[str, Any]:
    return {
        "id": str(upload.id),
        "name": upload.name,
        "key": upload.key,
        "upload_id": upload.upload_id,
        "size": upload.size,
        "saved_at": rfc3339(upload.saved_at),
        "spool": upload.spool,
    }


def _dump_expiring(expiring: Expiring) -> dict[str, Any]:
    return {
        "id": str(expiring.id),
        "key": expiring.key,
        "etag": expiring.etag,
        "version_id": expiring.version_id,
    }


# --- reading, as hostile input -----------------------------------------------------------------------

MAX_TEXT = 4096
_ENTRY_FIELDS = frozenset(
    "id name key uri version_id size crc64nvme etag saved_at stored_at step".split()  # noqa: SIM905
)
_FIELDS = frozenset(
    "schema updated_at write generation holder checkpoints uploads expiring".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class _Node:
    """A JSON object and the place where it stands, so that every complaint names it."""

    data: Mapping[str, Any]
    place: str

    def fail(self, name: str, why: str) -> Mangled:
        return Mangled(f"{self.place}{name} {why}")

    def text(self, name: str) -> str:
        value = self.data.get(name)
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            raise self.fail(name, "is not a text")
        return value

    def maybe_text(self, name: str) -> str | None:
        return None if self.data.get(name) is None else self.text(name)

    def number(self, name: str, top: int) -> int:
        value = self.data.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= top:
            raise self.fail(name, f"is not a whole number from 0 to {top}")
        return value

    def parsed(self, name: str, parse: Callable[[str], T]) -> T:
        try:
            return parse(self.text(name))
        except ValueError as error:
            raise self.fail(name, str(error)) from None

    def children(self, name: str) -> list[_Node]:
        value = self.data.get(name, [])
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.fail(name, "is not a list of objects")
        return [_Node(each, f"{self.place}{name}[{n}].") for n, each in enumerate(value)]


def parse(raw: bytes, *, prefix: str) -> Manifest:
    """Read `latest.json`; every key must lie under `prefix`.

    Raises UnknownSchema for one of a newer ckpt-sidecar, Mangled (naming the place) for anything else that
    it should not be.
    """
    node = _Node(_load(raw), "")
    schema = node.data.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise UnknownSchema(f"schema {schema} is newer than the {SCHEMA} that this ckpt-sidecar knows")
    if schema != SCHEMA:
        raise node.fail("schema", f"is {schema!r}, not {SCHEMA}")
    entries = [_entry(child, prefix) for child in node.children("checkpoints")]
    if [each.id for each in entries] != sorted({each.id for each in entries}, reverse=True):
        raise node.fail("checkpoints", "are not newest first, each id once")
    return Manifest(
        generation=node.number("generation", 10**15),
        holder=_holder(node),
        write=node.text("write"),
        updated_at=node.parsed("updated_at", parse_rfc3339),
        checkpoints=tuple(entries),
        uploads=tuple(_upload(child, prefix) for child in node.children("uploads")),
        expiring=tuple(_expiring(child, prefix) for child in node.children("expiring")),
        extra={name: value for name, value in node.data.items() if name not in _FIELDS},
    )


def _load(raw: bytes) -> Mapping[str, Any]:
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise Mangled("nested too deep") from None
    except ValueError as error:
        raise Mangled(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise Mangled("not a JSON object")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a field stands twice in one object")
    return dict(pairs)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _holder(node: _Node) -> Holder | None:
    data = node.data.get("holder")
    if data is None:
        return None
    if not isinstance(data, dict):
        raise node.fail("holder", "is not an object")
    child = _Node(data, "holder.")
    return Holder(
        spool=child.text("spool"),
        attempt=child.text("attempt"),
        host=child.text("host"),
        pid=child.number("pid", 2**32),
        since=child.parsed("since", parse_rfc3339),
    )


def _name(text: str) -> str:
    flaw = flaw_of_name(text)
    if flaw is not None:
        raise ValueError(f"{text!r} {flaw}")
    return text


def _crc(text: str) -> str:
    decode_crc64(text)
    return text


def _key(node: _Node, prefix: str, name: str | None) -> str:
    """The key: just that of `name`, or where there is no name, one under the prefix that could be."""
    key = node.text("key")
    inside = key.removeprefix(prefix)
    if key != prefix + inside or (inside != name if name is not None else flaw_of_name(inside) is not None):
        raise node.fail("key", f"{key!r} is not a checkpoint's under the prefix {prefix!r}")
    return key


def _entry(node: _Node, prefix: str) -> Entry:
    name = node.parsed("name", _name)
    ref = ObjectRef(
        key=_key(node, prefix, name),
        size=node.number("size", MAX_OBJECT_BYTES),
        etag=node.text("etag"),
        crc64nvme=None if node.data.get("crc64nvme") is None else node.parsed("crc64nvme", _crc),
        version_id=node.maybe_text("version_id"),
    )
    return Entry(
        id=node.parsed("id", Id.parse),
        name=name,
        objects=(ref,),
        saved_at=node.parsed("saved_at", parse_rfc3339),
        stored_at=node.parsed("stored_at", parse_rfc3339),
        extra={name: value for name, value in node.data.items() if name not in _ENTRY_FIELDS},
    )


def _upload(node: _Node, prefix: str) -> Announced:
    name = node.parsed("name", _name)
    return Announced(
        id=node.parsed("id", Id.parse),
        name=name,
        key=_key(node, prefix, name),
        upload_id=node.text("upload_id"),
        size=node.number("size", MAX_OBJECT_BYTES),
        saved_at=node.parsed("saved_at", parse_rfc3339),
        spool=node.text("spool"),
    )


def _expiring(node: _Node, prefix: str) -> Expiring:
    return Expiring(
        id=node.parsed("id", Id.parse),
        key=_key(node, prefix, None),
        etag=node.text("etag"),
        version_id=node.maybe_text("version_id"),
    )
