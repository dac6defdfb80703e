"""`latest.json` as text: written from the value, and read as hostile input."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ckpt_sidecar.bucket import MAX_OBJECT_BYTES, ObjectRef, decode_crc64
from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.manifest import Announced, Entry, Expiring, Holder, Manifest, parse_rfc3339, rfc3339
from ckpt_sidecar.names import MANIFEST_NAME, flaw_of_name, step_of

T = TypeVar("T")

SCHEMA = 1
MAX_MANIFEST_BYTES = 16 * 1024 * 1024  # 100 entries take about 50 KiB; directories add their files
MAX_VALUES = 500_000  # a value read takes up to 250 bytes; 10,000 entries have 130,000
MAX_DEPTH = 32  # so that what was read can be written again, however deep in the stack


class Mangled(ValueError):
    """What the bucket holds as `latest.json` cannot be read as one; says the place and why."""


class UnknownSchema(ValueError):
    """`latest.json` was written by a newer ckpt-sidecar: it is left alone."""

    reason = "refused"
    hint = "use that ckpt-sidecar, or another --prefix"

    def __str__(self) -> str:
        return f"{MANIFEST_NAME}: {self.args[0]} ({self.hint})"


# --- writing -----------------------------------------------------------------------------------------


class Writer:
    """Writes one version after the other; an entry that stood in the last one is not made into text again."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self._lines: dict[Id, tuple[Entry, str]] = {}

    def dump(self, manifest: Manifest) -> bytes:
        """Return the manifest as `latest.json`: a line for each of its fields, and for each entry.

        It is not left to `json` to indent it: with that, all of it goes through an encoder in Python.
        """
        entries = [(each, self._line(each)) for each in manifest.checkpoints]
        self._lines = {entry.id: (entry, line) for entry, line in entries}
        lines = [f"{_text(name)}: {_text(value)}" for name, value in _dump_head(manifest).items()]
        lines += [
            _list("checkpoints", [line for _, line in entries]),
            _list("uploads", [_text(_dump_upload(each)) for each in manifest.uploads]),
            _list("expiring", [_text(_dump_expiring(each)) for each in manifest.expiring]),
        ]
        return ("{\n " + ",\n ".join(lines) + "\n}\n").encode("ascii")

    def _line(self, entry: Entry) -> str:
        written, line = self._lines.get(entry.id, (None, ""))
        return line if written is entry else _text(dump_entry(entry, bucket=self._bucket))


def dump(manifest: Manifest, *, bucket: str) -> bytes:
    """Return the manifest as `latest.json`, once."""
    return Writer(bucket).dump(manifest)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)


def _list(name: str, lines: Sequence[str]) -> str:
    return f'"{name}": [\n  ' + ",\n  ".join(lines) + "\n ]" if lines else f'"{name}": []'


def _dump_head(manifest: Manifest) -> dict[str, Any]:
    holder = manifest.holder
    return dict(manifest.extra) | {
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
    }


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
    return dict(upload.extra) | {
        "id": str(upload.id),
        "name": upload.name,
        "key": upload.key,
        "upload_id": upload.upload_id,
        "size": upload.size,
        "saved_at": rfc3339(upload.saved_at),
        "spool": upload.spool,
    }


def _dump_expiring(expiring: Expiring) -> dict[str, Any]:
    return dict(expiring.extra) | {
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
_UPLOAD_FIELDS = frozenset("id name key upload_id size saved_at spool".split())  # noqa: SIM905
_EXPIRING_FIELDS = frozenset("id key etag version_id".split())  # noqa: SIM905
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

    def token(self, name: str) -> str:
        """What the store made up: it goes into headers and addresses again as it is."""
        text = self.text(name)
        if not (text.isascii() and text.isprintable()):
            raise self.fail(name, "has characters that no store would give it")
        return text

    def maybe_token(self, name: str) -> str | None:
        return None if self.data.get(name) is None else self.token(name)

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

    def others(self, known: Collection[str]) -> dict[str, Any]:
        """The fields that a later version has added: they outlive our rewrite."""
        return {name: value for name, value in self.data.items() if name not in known}

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
    shown = reprlib.repr(schema)  # however large it is
    if type(schema) is not int or schema < SCHEMA:
        raise node.fail("schema", f"is {shown}, not {SCHEMA}")
    if schema > SCHEMA:
        raise UnknownSchema(f"schema {shown} is newer than the {SCHEMA} that this ckpt-sidecar knows")
    entries = [_entry(child, prefix) for child in node.children("checkpoints")]
    if [each.id for each in entries] != sorted({each.id for each in entries}, reverse=True):
        raise node.fail("checkpoints", "are not newest first, each id once")
    expiring = [_expiring(child, prefix) for child in node.children("expiring")]
    if {each.key for each in expiring} & {ref.key for each in entries for ref in each.objects}:
        raise node.fail("expiring", "would delete one of the checkpoints")
    return Manifest(
        generation=node.number("generation", 10**15),
        holder=_holder(node),
        write=node.text("write"),
        updated_at=node.parsed("updated_at", parse_rfc3339),
        checkpoints=tuple(entries),
        uploads=tuple(_upload(child, prefix) for child in node.children("uploads")),
        expiring=tuple(expiring),
        extra=node.others(_FIELDS),
    )


def _load(raw: bytes) -> Mapping[str, Any]:
    if sum(raw.count(each) for each in (b",", b"[", b"{")) > MAX_VALUES:
        raise Mangled(f"has more than {MAX_VALUES} values")
    try:
        data = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_once,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except RecursionError:
        raise Mangled("nested too deep") from None
    except ValueError as error:
        raise Mangled(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise Mangled("not a JSON object")
    if _deeper(data, MAX_DEPTH):
        raise Mangled("nested too deep")
    return data


def _deeper(value: Any, than: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return than < 0 or any(_deeper(each, than - 1) for each in inner)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a field stands twice in one object")
    return dict(pairs)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # it would be written as Infinity, which is no JSON
        raise ValueError(f"{text[:40]} is no number that can be written again")
    return value


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
        etag=node.token("etag"),
        crc64nvme=None if node.data.get("crc64nvme") is None else node.parsed("crc64nvme", _crc),
        version_id=node.maybe_token("version_id"),
    )
    return Entry(
        id=node.parsed("id", Id.parse),
        name=name,
        objects=(ref,),
        saved_at=node.parsed("saved_at", parse_rfc3339),
        stored_at=node.parsed("stored_at", parse_rfc3339),
        extra=node.others(_ENTRY_FIELDS),
    )


def _upload(node: _Node, prefix: str) -> Announced:
    name = node.parsed("name", _name)
    return Announced(
        id=node.parsed("id", Id.parse),
        name=name,
        key=_key(node, prefix, name),
        upload_id=node.token("upload_id"),
        size=node.number("size", MAX_OBJECT_BYTES),
        saved_at=node.parsed("saved_at", parse_rfc3339),
        spool=node.text("spool"),
        extra=node.others(_UPLOAD_FIELDS),
    )


def _expiring(node: _Node, prefix: str) -> Expiring:
    return Expiring(
        id=node.parsed("id", Id.parse),
        key=_key(node, prefix, None),
        etag=node.token("etag"),
        version_id=node.maybe_token("version_id"),
        extra=node.others(_EXPIRING_FIELDS),
    )
