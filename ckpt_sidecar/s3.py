"""A bucket on S3, or on a store that speaks like it.

Control calls are asyncio's (aioboto3), the bodies of parts go through threads (boto3): see `bodies.py`.
How the clients are set up stands in `clients.py`, what a refusal means in `answers.py`; what the store can do
is found out by `probe.py`.
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from ckpt_sidecar.answers import Asked, bare, etag_of, scrubbed, translated, version_of
from ckpt_sidecar.bodies import BodyThreads, Checks, Held, length_of
from ckpt_sidecar.bucket import (
    MIB,
    PART_BYTES,
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
    decode_crc64,
    encode_crc64,
    join_crc64,
)
from ckpt_sidecar.clients import made, say_owner
from ckpt_sidecar.events import Requested
from ckpt_sidecar.pace import Pace
from ckpt_sidecar.probe import FULL_OBJECT, Manners, probe

T = TypeVar("T")
WORKERS = 4  # threads for bodies
SMALL_BYTES = MIB  # a larger body at hand goes through the threads, like those that are read
PAGE = 1000  # what a page holds at most; moto loses parts with smaller ones


class S3Bucket:
    """One bucket behind boto3. `tell` gets each request, on the event loop; use `open` to make one."""

    def __init__(
        self,
        name: str,
        *,
        control: Any,
        bodies: BodyThreads,
        tell: Callable[[Requested], None],
        owner: str = "",
    ) -> None:
        self._name = name
        self._owner = owner
        self._control = control
        self._bodies = bodies
        self._tell = tell
        self._manners = Manners()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        name: str,
        *,
        endpoint_url: str | None = None,
        owner: str = "",
        workers: int = WORKERS,
        part_bytes: int = PART_BYTES,
        pace: Pace | None = None,
        nice: int = 0,
        tell: Callable[[Requested], None],
    ) -> AsyncIterator[S3Bucket]:
        """Connect to nothing yet, but have all that is needed; credentials and region by the AWS chain.

        With an `owner` every request is refused where the bucket is another account's. Bodies leave at the
        pace, where there is one; the threads that move them are nicer than this one by `nice`.
        Memory for bodies is `workers` times `part_bytes`, also where parts are larger.
        """
        async with AsyncExitStack() as stack:
            try:
                client, control = await asyncio.to_thread(made, endpoint_url, workers)
                control = await stack.enter_async_context(control)
            except ValueError as error:
                raise Refused(f"the endpoint is no URL: {scrubbed(str(error))}") from error
            except Exception as error:
                raise translated(error, Asked("open", name)) from error
            stack.callback(client.close)
            for each in (client, control) if owner else ():
                say_owner(each, owner)
            bodies = BodyThreads(client, workers=workers, buffer_bytes=part_bytes, pace=pace, nice=nice)
            stack.callback(bodies.close)
            yield cls(name, control=control, bodies=bodies, tell=tell, owner=owner)

    @property
    def name(self) -> str:
        """The bucket's name."""
        return self._name

    @property
    def abilities(self) -> Abilities:
        """What the probe saw; before it, nothing is relied upon."""
        return self._manners.abilities

    async def probe(self, key: str) -> Abilities:
        """As `Bucket.probe`; two at a time need two keys."""
        self._manners = await probe(self._call, key)
        return self.abilities

    # --- reading ---

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectRef]:
        """As `Bucket.get`; checked against the checksum where the store keeps one."""
        return await self._asked("get_object", key, self._get(key, limit))

    async def _get(self, key: str, limit: int) -> tuple[bytes, ObjectRef]:
        answer = await self._control.get_object(Bucket=self._name, Key=key, **self._showing())
        async with answer["Body"] as stream:
            ref = self._ref(key, answer)
            if ref.size > limit:
                raise Refused(f"{key} has {ref.size} bytes, more than the {limit} that are expected of it")
            body: bytes = await stream.read()
        if len(body) != ref.size or ref.crc64nvme not in (None, encode_crc64(crc64(body))):
            raise Corrupt(f"{key} was damaged on its way: its size or its checksum does not agree")
        return body, ref

    async def head(self, key: str) -> ObjectRef | None:
        """As `Bucket.head`."""
        try:
            return self._ref(key, await self._call("head_object", Key=key, **self._showing()))
        except Missing:
            return None

    async def get_range(self, ref: ObjectRef, span: Span, sink: Sink) -> int:
        """As `Bucket.get_range`."""
        if span.size == 0:
            return 0
        arguments = {"Bucket": self._name, "Key": ref.key, "IfMatch": f'"{ref.etag}"'}
        if ref.version_id:
            arguments["VersionId"] = ref.version_id
        fetched = self._bodies.fetch(sink, span, etag=ref.etag, arguments=arguments)
        return await self._asked("get_object", ref.key, fetched)

    async def list(self, prefix: str) -> AsyncIterator[ObjectRef]:
        """As `Bucket.list`."""
        markers = {"ContinuationToken": "NextContinuationToken"}
        async for page in self._pages("list_objects_v2", markers, Prefix=prefix, MaxKeys=PAGE):
            for found in page.get("Contents", ()):
                yield ObjectRef(found["Key"], found["Size"], bare(found["ETag"]))

    # --- writing at once ---

    async def put(
        self, key: str, body: bytes | tuple[Source, int], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """As `Bucket.put`."""
        await self._look_first(key, when, honoured=self.abilities.conditional_put)
        arguments: dict[str, Any] = {"Bucket": self._name, "Key": key, "Metadata": dict(metadata)}
        arguments |= self._manners.put.headers(when)
        if isinstance(body, bytes) and len(body) <= SMALL_BYTES:
            sent = self._put_small(body, arguments)
        else:
            source, size = (Held(body), len(body)) if isinstance(body, bytes) else body
            span, checks = Span(1, 0, size), self._checks_of_put()
            sent = self._bodies.send("put_object", source, span, checks=checks, arguments=arguments)
        answer, crc = await self._asked("put_object", key, sent)
        size = len(body) if isinstance(body, bytes) else body[1]
        return self._written(key, size, encode_crc64(crc), answer=answer, metadata=metadata)

    async def _put_small(self, body: bytes, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        checks = self._checks_of_put()
        checks.add(body)
        content = bytearray(body)  # bytes would be wrapped as a file, and wait for 100-continue
        return await self._control.put_object(Body=content, **checks.headers(), **arguments), checks.crc

    def _checks_of_put(self) -> Checks:
        return Checks(crc64nvme=self._manners.declared, md5=not self._manners.checksum)

    async def delete(self, key: str, *, when: Unchanged, version_id: str | None = None) -> None:
        """As `Bucket.delete`. A version never changes, so with `version_id` there is nothing to look at."""
        if version_id:
            await self._call("delete_object", Key=key, VersionId=version_id)
            return
        if not self.abilities.conditional_delete:
            await self._look_first(key, when, honoured=False, gone=Missing(f"{key} is gone already"))
        await self._call("delete_object", Key=key, **self._manners.delete.headers(when))

    # --- writing in parts ---

    async def create_multipart(self, key: str, *, metadata: Mapping[str, str]) -> str:
        """As `Bucket.create_multipart`."""
        whole = FULL_OBJECT if self.abilities.checksum else {}
        answer = await self._call("create_multipart_upload", Key=key, Metadata=dict(metadata), **whole)
        return str(answer["UploadId"])

    async def put_part(self, upload: Upload, span: Span, source: Source) -> Part:
        """As `Bucket.put_part`."""
        kept = self.abilities.checksum
        sent = self._bodies.send(
            "upload_part",
            source,
            span,
            checks=Checks(crc64nvme=kept, md5=not kept),
            arguments={**_at(upload), "Bucket": self._name, "PartNumber": span.number},
        )
        answer, crc = await self._asked("upload_part", upload.key, sent)
        return Part(span.number, span.size, etag_of(answer, upload.key), encode_crc64(crc))

    async def list_parts(self, upload: Upload) -> builtins.list[Part]:
        """As `Bucket.list_parts`."""
        parts: list[Part] = []
        markers = {"PartNumberMarker": "NextPartNumberMarker"}
        async for page in self._pages("list_parts", markers, **_at(upload), MaxParts=PAGE):
            parts += [self._part(found) for found in page.get("Parts", ())]
        return sorted(parts, key=lambda part: part.number)

    def _part(self, found: Mapping[str, Any]) -> Part:
        crc = found.get("ChecksumCRC64NVME") if self.abilities.checksum else None
        return Part(found["PartNumber"], found["Size"], bare(found["ETag"]), crc)

    async def complete_multipart(
        self, upload: Upload, parts: Sequence[Part], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """As `Bucket.complete_multipart`; where no checksum is kept, the object's size is looked at after."""
        await self._look_first(upload.key, when, honoured=self.abilities.conditional_complete)
        size, crc = sum(part.size for part in parts), _whole_crc(parts)
        listed = [_listed(part, checksum=self.abilities.checksum) for part in parts]
        arguments = {
            **_at(upload),
            "MultipartUpload": {"Parts": listed},
            **self._manners.complete.headers(when),
        }
        if self.abilities.checksum and crc:
            arguments |= {"ChecksumType": "FULL_OBJECT", "ChecksumCRC64NVME": crc, "MpuObjectSize": size}
        answer = await self._call("complete_multipart_upload", **arguments)
        ref = self._written(upload.key, size, crc, answer=answer, metadata=metadata)
        return ref if self.abilities.checksum else await self._confirmed(ref)

    async def _confirmed(self, ref: ObjectRef) -> ObjectRef:
        """Return the object as HEAD shows it: rclone's has another etag than the one that it gave."""
        seen = await self.head(ref.key)
        if seen is None:
            raise Unreachable(f"{ref.key} was completed, and yet is not there: look", reason="server")
        if dict(seen.metadata) != dict(ref.metadata):
            raise Conflict(f"{ref.key} was completed, and then written over by another")
        if seen.size != ref.size:
            raise Corrupt(f"{ref.key} has {seen.size} bytes, its parts have {ref.size}")
        return replace(ref, etag=seen.etag, version_id=seen.version_id or ref.version_id)

    async def abort_multipart(self, upload: Upload) -> None:
        """As `Bucket.abort_multipart`."""
        await self._call("abort_multipart_upload", **_at(upload))

    async def list_uploads(self, key: str) -> builtins.list[Upload]:
        """As `Bucket.list_uploads`."""
        uploads: list[Upload] = []
        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        async for page in self._pages("list_multipart_uploads", markers, Prefix=key, MaxUploads=PAGE):
            found = [Upload(each["Key"], each["UploadId"]) for each in page.get("Uploads", ())]
            uploads += [upload for upload in found if upload.key == key]
        return uploads

    # --- how it is asked ---

    async def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Send one control call and return its answer; raises our six errors."""
        answer = getattr(self._control, operation)(Bucket=self._name, **arguments)
        return await self._asked(operation, arguments.get("Key", ""), answer)

    async def _pages(
        self, operation: str, markers: Mapping[str, str], **arguments: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield all pages of a list; `markers`: what the next one is asked with, and where a page says it."""
        while True:
            page = await self._call(operation, **arguments)
            yield page
            if not page.get("IsTruncated"):
                return
            further = {asked: page.get(told) for asked, told in markers.items()}
            if None in further.values() or further.items() <= arguments.items():
                raise Refused(f"{operation}: the store gives no next page, or this one over and over")
            arguments |= further

    async def _asked(self, operation: str, key: str, answer: Awaitable[T]) -> T:
        """Wait for the answer, tell of it, translate its error. A "no such key" is an answer, no failure."""
        clock = asyncio.get_running_loop().time
        began = clock()
        outcome = "failed"
        try:
            result = await answer
            outcome = "ok"
        except Exception as error:
            raised = translated(error, Asked(operation, self._name, key, self._owner))
            if isinstance(raised, Missing | Conflict):
                outcome = "ok"
            raise raised from error
        finally:
            self._tell(Requested(operation, outcome, clock() - began))
        return result

    async def _look_first(
        self, key: str, when: Condition, *, honoured: bool, gone: BucketError | None = None
    ) -> None:
        """Where the store does not check the condition, check it just before."""
        if honoured:
            return
        seen = await self.head(key)
        if seen is None and gone:
            raise gone
        if (seen.etag if seen else None) != (when.etag if isinstance(when, Unchanged) else None):
            raise Conflict(f"{key}: what stands there is {seen.etag if seen else 'nothing'}, not {when}")

    def _showing(self) -> dict[str, str]:
        return {"ChecksumMode": "ENABLED"} if self.abilities.checksum else {}

    def _ref(self, key: str, answer: Mapping[str, Any]) -> ObjectRef:
        """Read an object out of the answer to HEAD or GET."""
        full = self.abilities.checksum and answer.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
        return ObjectRef(
            key,
            length_of(answer),
            etag_of(answer, key),
            answer.get("ChecksumCRC64NVME") if full else None,
            version_of(answer),
            {name.lower(): value for name, value in answer.get("Metadata", {}).items()},
        )

    def _written(
        self, key: str, size: int, crc: str | None, *, answer: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> ObjectRef:
        """Read an object out of the answer to a write; Corrupt when it shows another checksum than ours."""
        shown = answer.get("ChecksumCRC64NVME") if self.abilities.checksum else None
        if crc and shown and crc != shown:
            raise Corrupt(f"{key} was stored with the checksum {shown}, it should be {crc}")
        told = {name.lower(): value for name, value in metadata.items()}  # as it will be shown
        return ObjectRef(key, size, etag_of(answer, key), crc or shown, version_of(answer), told)


def _at(upload: Upload) -> dict[str, Any]:
    return {"Key": upload.key, "UploadId": upload.upload_id}


def _whole_crc(parts: Sequence[Part]) -> str | None:
    """Put the whole checksum together; None when a part's is not known."""
    whole = 0
    for part in parts:
        if part.crc64nvme is None:
            return None
        whole = join_crc64(whole, decode_crc64(part.crc64nvme), part.size)
    return encode_crc64(whole)


def _listed(part: Part, *, checksum: bool) -> dict[str, Any]:
    kept = {"ChecksumCRC64NVME": part.crc64nvme} if checksum and part.crc64nvme else {}
    return {"PartNumber": part.number, "ETag": f'"{part.etag}"', **kept}
