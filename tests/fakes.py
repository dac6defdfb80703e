"""Small real implementations to test against: a bucket in memory, bytes as source and sink, a clock."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from ckpt_sidecar.bucket import (
    MIN_PART_BYTES,
    Abilities,
    Condition,
    Conflict,
    Corrupt,
    Missing,
    ObjectRef,
    Part,
    Refused,
    Sink,
    Source,
    Span,
    Unchanged,
    Upload,
    crc64,
    encode_crc64,
)

ABLE = Abilities(conditional_put=True, conditional_complete=True, conditional_delete=True, checksum=True)
CARELESS = Abilities(
    conditional_put=False, conditional_complete=False, conditional_delete=False, checksum=False
)


class BytesSource:
    """Bytes that parts are read from; they may be changed on the way."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill the view, as far as there are bytes."""
        found = self.content[offset : offset + len(view)]
        view[: len(found)] = found
        return len(found)


class BytesSink:
    """Room for `size` bytes."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)

    def write_at(self, offset: int, view: memoryview) -> None:
        """Take the bytes; none may lie outside."""
        assert offset + len(view) <= len(self.content)
        self.content[offset : offset + len(view)] = view


# --- a bucket in memory ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Object:
    ref: ObjectRef
    body: bytes


@dataclass(slots=True)
class _Upload:
    key: str
    metadata: Mapping[str, str]
    parts: dict[int, tuple[Part, bytes]] = field(default_factory=dict)

    def content(self, part: Part) -> bytes:
        kept, content = self.parts.get(part.number, (None, b""))
        if kept is None or kept.etag != part.etag:
            raise Refused(f"part {part.number} is not there like that")
        return content


class MemoryBucket:
    """A bucket that keeps its promises in memory; `abilities` takes some of the store's away.

    Where a condition is not honoured, the key is looked at just before, and others may come in between, as
    with a real store of that kind.
    """

    def __init__(
        self,
        name: str = "memory",
        *,
        abilities: Abilities = ABLE,
        versioned: bool = False,
        min_part_bytes: int = MIN_PART_BYTES,
    ) -> None:
        self.name = name
        self.min_part_bytes = min_part_bytes
        self.abilities = abilities
        self.versioned = versioned
        self.objects: dict[str, _Object] = {}
        self.versions: dict[tuple[str, str], _Object | None] = {}  # in the order of time; None was a delete
        self.uploads: dict[str, _Upload] = {}
        self._numbers = count(1)

    def body(self, key: str) -> bytes:
        """Return what stands at the key, for assertions."""
        return self.objects[key].body

    async def probe(self, key: str) -> Abilities:
        """Say what it was made to honour."""
        await asyncio.sleep(0)
        return self.abilities

    # --- reading ---

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectRef]:
        """As promised."""
        await asyncio.sleep(0)
        found = self._at(key)
        if len(found.body) > limit:
            raise Refused(f"{key} has {len(found.body)} bytes, more than {limit}")
        return found.body, self._shown(found)

    async def head(self, key: str) -> ObjectRef | None:
        """As promised."""
        await asyncio.sleep(0)
        return self._shown(self.objects[key]) if key in self.objects else None

    async def get_range(self, ref: ObjectRef, span: Span, sink: Sink) -> int:
        """As promised."""
        await asyncio.sleep(0)
        found = self.versions.get((ref.key, ref.version_id)) if ref.version_id else self._at(ref.key)
        if found is None:
            raise Missing(f"there is no {ref.key} of version {ref.version_id}")
        if found.ref.etag != ref.etag:
            raise Conflict(f"{ref.key} is another object now")
        body = memoryview(found.body)[span.offset : span.end]
        if len(body) < span.size:
            raise Corrupt(f"{ref.key} came short")
        if body:
            sink.write_at(span.offset, body)
        return crc64(body)

    async def list(self, prefix: str) -> AsyncIterator[ObjectRef]:
        """As promised."""
        await asyncio.sleep(0)
        for key in sorted(self.objects, key=str.encode):
            if key.startswith(prefix):
                yield replace(self.objects[key].ref, metadata={}, crc64nvme=None, version_id=None)

    # --- writing ---

    async def put(
        self, key: str, body: bytes | tuple[Source, int], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """As promised."""
        content = body if isinstance(body, bytes) else _read(body[0], Span(1, 0, body[1]))
        await self._check(key, when, honoured=self.abilities.conditional_put)
        return self._keep(key, content, _md5(content), metadata)

    async def delete(self, key: str, *, when: Unchanged, version_id: str | None = None) -> None:
        """As promised."""
        await asyncio.sleep(0)
        if version_id:
            self._forget(key, version_id)
            return
        self._at(key)
        await self._check(key, when, honoured=self.abilities.conditional_delete)
        self.objects.pop(key, None)
        if self.versioned:
            self.versions[key, self._new_version()] = None

    async def create_multipart(self, key: str, *, metadata: Mapping[str, str]) -> str:
        """As promised."""
        await asyncio.sleep(0)
        upload_id = f"upload-{next(self._numbers)}"
        self.uploads[upload_id] = _Upload(key, dict(metadata))
        return upload_id

    async def put_part(self, upload: Upload, span: Span, source: Source) -> Part:
        """As promised."""
        await asyncio.sleep(0)
        content = _read(source, span)
        part = Part(span.number, span.size, _md5(content), encode_crc64(crc64(content)))
        self._under_way(upload).parts[span.number] = part, content
        return part

    async def list_parts(self, upload: Upload) -> list[Part]:  # type: ignore[valid-type]
        """As promised."""
        await asyncio.sleep(0)
        parts = [part for _, (part, _) in sorted(self._under_way(upload).parts.items())]
        return parts if self.abilities.checksum else [replace(part, crc64nvme=None) for part in parts]

    async def complete_multipart(
        self, upload: Upload, parts: Sequence[Part], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """As promised; a refused one leaves the upload as it was."""
        await self._check(upload.key, when, honoured=self.abilities.conditional_complete)
        under_way = self._under_way(upload)
        contents = [under_way.content(part) for part in parts]
        if any(len(content) < self.min_part_bytes for content in contents[:-1]):
            raise Refused("a part before the last one is too small")
        numbers = [part.number for part in parts]
        if not numbers or numbers != sorted(numbers):
            raise Refused(f"these parts are no object: {numbers}")
        del self.uploads[upload.upload_id]
        etag = f"{_md5(*contents)}-{len(contents)}"
        return self._keep(upload.key, b"".join(contents), etag, under_way.metadata)

    async def abort_multipart(self, upload: Upload) -> None:
        """As promised."""
        await asyncio.sleep(0)
        self._under_way(upload)
        del self.uploads[upload.upload_id]

    async def list_uploads(self, key: str) -> list[Upload]:  # type: ignore[valid-type]
        """As promised."""
        await asyncio.sleep(0)
        return [
            Upload(key, upload_id) for upload_id, under_way in self.uploads.items() if under_way.key == key
        ]

    # --- how ---

    def _at(self, key: str) -> _Object:
        if key not in self.objects:
            raise Missing(f"there is no {key}")
        return self.objects[key]

    def _under_way(self, upload: Upload) -> _Upload:
        found = self.uploads.get(upload.upload_id)
        if found is None or found.key != upload.key:
            raise Missing(f"there is no upload {upload.upload_id}", reason="upload")
        return found

    async def _check(self, key: str, when: Condition, *, honoured: bool) -> None:
        if honoured:
            await asyncio.sleep(0)
        standing = self.objects[key].ref.etag if key in self.objects else None
        if standing != (when.etag if isinstance(when, Unchanged) else None):
            raise Conflict(f"{key}: {standing or 'nothing'} stands there, not {when}")
        if not honoured:
            await asyncio.sleep(0)  # here another may write

    def _shown(self, found: _Object) -> ObjectRef:
        return found.ref if self.abilities.checksum else replace(found.ref, crc64nvme=None)

    def _keep(self, key: str, body: bytes, etag: str, metadata: Mapping[str, str]) -> ObjectRef:
        version = self._new_version() if self.versioned else None
        lowered = {name.lower(): value for name, value in metadata.items()}
        ref = ObjectRef(key, len(body), etag, encode_crc64(crc64(body)), version, lowered)
        self.objects[key] = _Object(ref, body)
        if version:
            self.versions[key, version] = self.objects[key]
        return ref

    def _new_version(self) -> str:
        return f"version-{next(self._numbers)}"

    def _forget(self, key: str, version_id: str) -> None:
        """Delete a version; the newest that is left stands there then, unless that was a delete."""
        if self.versions.pop((key, version_id), None) is None:
            return
        left = [found for (at, _), found in self.versions.items() if at == key]
        if left and left[-1]:
            self.objects[key] = left[-1]
        else:
            self.objects.pop(key, None)


def _md5(*contents: bytes) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def _read(source: Source, span: Span) -> bytes:
    content = bytearray(span.size)
    if source.read_into(span.offset, memoryview(content)) < span.size:
        raise Corrupt(f"part {span.number}: the source came short")
    return bytes(content)


# --- time --------------------------------------------------------------------------------------------


class Clock:
    """Seconds since the epoch that pass only when told to, or while someone sleeps if it `runs`."""

    def __init__(self, now: float = 1_700_000_000.0, *, runs: bool = False) -> None:
        self.now = now
        self._runs = runs
        self._order = count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def __call__(self) -> float:
        """Tell the time."""
        return self.now

    @property
    def sleepers(self) -> int:
        """How many are asleep."""
        return sum(not sleeper.done() for _, _, sleeper in self._sleepers)

    def advance(self, seconds: float) -> None:
        """Let time pass, and wake whose time has come, in order."""
        self.now += seconds
        while self._sleepers and self._sleepers[0][0] <= self.now:
            sleeper = heapq.heappop(self._sleepers)[-1]
            if not sleeper.done():
                sleeper.set_result(None)

    async def sleep(self, seconds: float) -> None:
        """Sleep until so much time has passed."""
        if self._runs:
            self.advance(seconds)
            await asyncio.sleep(0)
            return
        sleeper = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), sleeper))
        await sleeper
