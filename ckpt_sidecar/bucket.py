"""What a bucket promises, as values and one protocol; no effects.

The sizes and counts are S3's published limits. Every checksum is CRC64NVME, the one whole-object checksum
that can be put together from the checksums of parts.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from awscrt import checksums

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

MIN_PART_BYTES = 5 * MIB  # S3 refuses a smaller part, the last one excepted
MAX_PART_BYTES = 5 * GIB
MAX_PARTS = 10_000
MAX_OBJECT_BYTES = MAX_PARTS * MAX_PART_BYTES  # 48.8 TiB, what parts can make; a store may allow less
MAX_KEY_BYTES = 1024  # of the key in UTF-8
PART_BYTES = 8 * MIB  # 8 MiB x 10,000 = 78 GiB before parts must grow


# --- checksums ---------------------------------------------------------------------------------------


def crc64(data: bytes | bytearray | memoryview, previous: int = 0) -> int:
    """Return the CRC64NVME of `data`, going on from `previous`."""
    return int(checksums.crc64nvme(data, previous))


def join_crc64(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC64NVME of two runs of bytes laid end to end, from the checksum of each."""
    return int(checksums.combine_crc64nvme(first, second, second_bytes))


def encode_crc64(value: int) -> str:
    """Return a CRC64NVME as S3 writes it: base64 of eight bytes, big end first."""
    return base64.b64encode(value.to_bytes(8, "big")).decode("ascii")


def decode_crc64(text: str) -> int:
    """Return the number behind `encode_crc64`'s text; ValueError when it is not one."""
    raw = base64.b64decode(text, validate=True)
    if len(raw) != 8:
        raise ValueError(f"a CRC64NVME has 8 bytes, this has {len(raw)}: {text!r}")
    return int.from_bytes(raw, "big")


# --- conditions, references, parts -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Absent:
    """The write may happen only where nothing stands (`If-None-Match: *`)."""


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The write may happen only while the object is the one with this etag (`If-Match`)."""

    etag: str


Condition = Absent | Unchanged


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """An object as the bucket showed it.

    `etag` has no quotes. `crc64nvme` is None where the store keeps no whole-object checksum, `version_id`
    where the bucket is not versioned. `metadata` is the user metadata, lower-case keys.
    """

    key: str
    size: int
    etag: str
    crc64nvme: str | None = None
    version_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a multipart upload; `number` counts from 1, `crc64nvme` is None where not kept."""

    number: int
    size: int
    etag: str
    crc64nvme: str | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart upload under way at `key`."""

    key: str
    upload_id: str


@dataclass(frozen=True, slots=True)
class Span:
    """A run of bytes: part `number` (from 1), at `offset`, `size` bytes long."""

    number: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """The offset behind its last byte."""
        return self.offset + self.size


def part_bytes_for(size: int, at_least: int = PART_BYTES) -> int:
    """Return the part size in bytes for an object of `size` bytes: it grows only as 10,000 parts demand.

    Raises Refused when no layout can hold it.
    """
    if size > MAX_OBJECT_BYTES:
        raise Refused(
            f"{size} bytes are more than S3 can hold in one object ({MAX_OBJECT_BYTES})",
            hint="save the checkpoint in several files (shards)",
        )
    needed = -(-size // MAX_PARTS)
    rounded = -(-needed // MIB) * MIB  # whole MiB, so that a page never lies in two parts
    return max(at_least, MIN_PART_BYTES, rounded)


def spans(size: int, part_bytes: int) -> list[Span]:
    """Cut `size` bytes into parts of `part_bytes`, the last one shorter; an empty object has no part."""
    starts = range(0, size, part_bytes)
    return [Span(n, start, min(part_bytes, size - start)) for n, start in enumerate(starts, 1)]


# --- abilities ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the probe saw the store honour; never guessed from its name.

    `conditional_put` is what fencing stands on. `checksum`: a wrong CRC64NVME is refused and the right one
    is kept and shown.
    """

    conditional_put: bool
    conditional_complete: bool
    conditional_delete: bool
    checksum: bool


# --- errors: few, named by what one can do -----------------------------------------------------------


class BucketError(Exception):
    """The bucket did not do what was asked; `hint` says how to mend it, `reason` is a short stable word."""

    reason = "other"

    def __init__(self, message: str, *, hint: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.reason = reason or type(self).reason

    def __str__(self) -> str:
        text = str(self.args[0])
        return f"{text} ({self.hint})" if self.hint else text


class Missing(BucketError):
    """There is no such thing. `reason` says which: "key", "bucket" or "upload"."""

    reason = "key"


class Conflict(BucketError):
    """A condition did not hold, or another write was under way (412, 409). Look before you decide."""

    reason = "conflict"


class Denied(BucketError):
    """Not allowed: `reason` is "denied" (a permission) or "credentials" (none, wrong or expired)."""

    reason = "denied"


class Unreachable(BucketError):
    """No answer that says what happened: 5xx, throttling, timeout, connection. Never to be read as empty.

    `reason`: throttled, server, timeout, connection, clock. `retry_after` in seconds where the store asked.
    """

    reason = "connection"

    def __init__(self, message: str, *, hint: str = "", reason: str = "", retry_after: float = 0.0) -> None:
        super().__init__(message, hint=hint, reason=reason)
        self.retry_after = retry_after


class Corrupt(BucketError):
    """Bytes and checksum disagree, or the bytes came short."""

    reason = "checksum"


class Refused(BucketError):
    """The store will not do this, however often it is asked."""

    reason = "refused"


# --- the seam ----------------------------------------------------------------------------------------


class Source(Protocol):
    """Bytes at rest that a part is read from, by offset, in any thread."""

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill `view` from `offset`; return how many bytes there were (fewer only at the end)."""


class Sink(Protocol):
    """Where downloaded bytes go, by offset, in any thread."""

    def write_at(self, offset: int, view: memoryview) -> None:
        """Write all of `view` at `offset`."""


class Bucket(Protocol):
    """One bucket. Keys are whole keys. No verb repeats itself: who calls knows what is safe to repeat.

    Every verb may raise Denied, Unreachable or Refused, and Missing with the reason "bucket". An Unreachable
    from a verb that writes says nothing about whether the write happened, and a Conflict may be the echo of
    one's own earlier write: look before you decide.
    """

    @property
    def name(self) -> str:
        """The bucket's name."""

    @property
    def abilities(self) -> Abilities:
        """What the store was seen to honour; valid once `probe` has returned."""

    async def probe(self, key: str) -> Abilities:
        """Find out what the store honours by writing, and removing, one small object at `key`."""

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectRef]:
        """Return a small object of at most `limit` bytes. Missing("key"); Refused when it is larger."""

    async def head(self, key: str) -> ObjectRef | None:
        """Return the object at `key` with its metadata and checksum, or None when nothing is there.

        A bucket that does not exist cannot be told from a missing key here: S3's HEAD has no body.
        """

    async def put(
        self, key: str, body: bytes | tuple[Source, int], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """Write an object in one request, atomically: bytes at hand, or (source, size) read in a thread.

        The checksum is computed from the very bytes that are sent, declared, and stands in the result
        whether the store keeps it or not. Conflict when `when` does not hold; Corrupt when the source
        came short or the store saw other bytes. Where the store ignores or refuses conditions the key is
        looked at just before.
        """

    async def create_multipart(self, key: str, *, metadata: Mapping[str, str]) -> str:
        """Begin a multipart upload and return its id; the metadata will be the object's."""

    async def put_part(self, upload: Upload, span: Span, source: Source) -> Part:
        """Send one part, read from `source` into a reused buffer in a thread; the same number replaces.

        The returned part always has the checksum of the bytes that were sent. Missing("upload");
        Corrupt when the source came short or the store saw other bytes. Cancelling waits for the thread.
        """

    async def list_parts(self, upload: Upload) -> list[Part]:
        """Return the parts that the store has, by number, all pages. Missing("upload")."""

    async def complete_multipart(
        self, upload: Upload, parts: Sequence[Part], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """Make the object out of its parts, atomically; the result carries the whole checksum of `parts`.

        Corrupt when the store shows another size or whole-object checksum than the parts have. Missing
        ("upload") also when it was completed before. Conflict as for `put`. A 200 that holds an error, or no
        etag, is raised as Unreachable: look.
        """

    async def abort_multipart(self, upload: Upload) -> None:
        """Throw the parts away; Missing("upload"). Once this returns, no complete of it makes the object."""

    async def list_uploads(self, key: str) -> list[Upload]:
        """Return the multipart uploads under way at exactly this key."""

    def list(self, prefix: str) -> AsyncIterator[ObjectRef]:
        """Yield all objects whose key begins with `prefix`, in key order; without metadata or checksum."""

    async def delete(self, key: str, *, when: Unchanged, version_id: str | None = None) -> None:
        """Delete the object while it is the one with that etag.

        Missing("key") where it is gone already; Conflict when another stands there. Where the store cannot
        check the condition, the key is looked at just before.
        """

    async def get_range(self, ref: ObjectRef, span: Span, sink: Sink) -> int:
        """Read `span` of this very object into `sink` in a thread; return the CRC64NVME of those bytes.

        Conflict when the key now holds another object than `ref`; Missing("key"); Corrupt when the bytes
        came short. A store that answers a ranged GET with the whole object is handled.
        """
