"""The way to the bucket: a `Bucket` whose every call waits on the wire until somebody answers it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ckpt_sidecar.bucket import (
    Abilities,
    BucketError,
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
    Unreachable,
    Upload,
    crc64,
    encode_crc64,
)
from ckpt_sidecar.manifest import META_ID
from tests.model.store import (
    Abort,
    Answer,
    Complete,
    Create,
    Get,
    Head,
    Meta,
    No,
    Object,
    Objects,
    Parts,
    Put,
    PutPart,
    Range,
    Request,
    Uploads,
    etag_of,
)


class Wire:
    """One life's way to the bucket. `by` names the life; `bound`: conditions on complete are honoured."""

    name = "bucket"

    def __init__(self, by: str, *, bound: bool) -> None:
        self.abilities = Abilities(
            conditional_put=True, conditional_complete=bound, conditional_delete=bound, checksum=True
        )
        self.waiting: list[tuple[Request, asyncio.Future[Answer]]] = []
        self.given_up: list[Request] = []
        self._by = by
        self._begun: Counter[Meta] = Counter()

    def answer(self, at: int, answer: Answer) -> None:
        """Give the answer to the call that waits there."""
        _, future = self.waiting.pop(at)
        future.set_result(answer)

    async def _ask(self, request: Request) -> Any:
        call = request, asyncio.get_running_loop().create_future()
        self.waiting.append(call)
        try:
            answer = await call[1]
        except asyncio.CancelledError:
            if call in self.waiting:
                self.waiting.remove(call)
                self.given_up.append(request)
            raise
        if isinstance(answer, No):
            raise _error(answer, request)
        return answer

    async def probe(self, key: str) -> Abilities:
        """As promised: known beforehand."""
        return self.abilities

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectRef]:
        """As promised."""
        found = await self._ask(Get(key))
        return found.body, found.ref

    async def head(self, key: str) -> ObjectRef | None:
        """As promised."""
        found: Object | None = await self._ask(Head(key))
        return found.ref if found is not None else None

    async def put(
        self, key: str, body: bytes | tuple[Source, int], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """As promised."""
        content = body if isinstance(body, bytes) else _read(body[0], Span(1, 0, body[1]))
        made: Object = await self._ask(Put(key, content, etag_of(when), _meta(metadata)))
        return made.ref

    async def create_multipart(self, key: str, *, metadata: Mapping[str, str]) -> str:
        """As promised."""
        meta = _meta(metadata)
        self._begun[meta] += 1
        nonce = f"{self._by} {metadata[META_ID]} {self._begun[meta]}"
        return str(await self._ask(Create(key, meta, nonce, self._by)))

    async def put_part(self, upload: Upload, span: Span, source: Source) -> Part:
        """As promised."""
        content = _read(source, span)
        etag = await self._ask(PutPart(upload.upload_id, span.number, content))
        return Part(span.number, span.size, etag, encode_crc64(crc64(content)))

    async def list_parts(self, upload: Upload) -> list[Part]:
        """As promised."""
        begun = await self._ask(Parts(upload.upload_id))
        return list(begun.listed)

    async def complete_multipart(
        self, upload: Upload, parts: Sequence[Part], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """As promised: where the store does not look at the condition, the key is looked at just before."""
        bound, match = self.abilities.conditional_complete, etag_of(when)
        if not bound:
            there = await self._ask(Head(upload.key))
            if (there and there.etag) != match:
                raise Conflict(f"{upload.key}: another object stands there")
        etags = tuple(part.etag for part in parts)
        made: Object = await self._ask(Complete(upload.key, upload.upload_id, etags, match, bound))
        return made.ref

    async def abort_multipart(self, upload: Upload) -> None:
        """As promised."""
        await self._ask(Abort(upload.key, upload.upload_id))

    async def list_uploads(self, key: str) -> list[Upload]:
        """As promised."""
        return [Upload(key, upload_id) for upload_id in await self._ask(Uploads(key))]

    async def list(self, prefix: str) -> AsyncIterator[ObjectRef]:
        """As promised."""
        for each in await self._ask(Objects(prefix)):
            yield each.ref

    async def delete(self, key: str, *, when: Unchanged, version_id: str | None = None) -> None:
        """Nothing is deleted here: all is kept."""
        raise NotImplementedError

    async def get_range(self, ref: ObjectRef, span: Span, sink: Sink) -> int:
        """As promised."""
        body = await self._ask(Range(ref.key, ref.etag, span.offset, span.end))
        sink.write_at(span.offset, memoryview(body))
        return crc64(body)


def _error(no: No, request: Request) -> BucketError:
    said = f"{no.kind}: {request}"
    match no.kind:
        case "silence":
            return Unreachable(said, reason="timeout")
        case "conflict":
            return Conflict(said)
        case "parts":
            return Refused(said)
        case _:
            return Missing(said, reason=no.kind)


def _meta(metadata: Mapping[str, str]) -> Meta:
    return tuple(sorted(metadata.items()))


def _read(source: Source, span: Span) -> bytes:
    content = bytearray(span.size)
    if source.read_into(span.offset, memoryview(content)) < span.size:
        raise Corrupt(f"part {span.number}: the source came short")
    return bytes(content)
