"""One checkpoint from pin to stored: resume, send, verify, look.

The rules that it keeps (docs/architecture.md gives the reasons):
- journal and manifest know an upload before it may be completed;
- every write is conditional on what was seen at the key, and the id at a key only grows;
- an answer that says nothing (conflict, 5xx, silence, "no such upload") is followed by a look;
- nothing is completed unless the pinned inode is as it was when it was pinned.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ckpt_sidecar.bucket import (
    MIB,
    Absent,
    Bucket,
    Condition,
    Conflict,
    Corrupt,
    Denied,
    Missing,
    ObjectRef,
    Part,
    Refused,
    Span,
    Unchanged,
    Unreachable,
    Upload,
    crc64,
    encode_crc64,
    part_bytes_for,
    spans,
)
from ckpt_sidecar.checkpoint import (
    Changed,
    Checkpoint,
    Id,
    Pinned,
    Skipped,
    State,
    Stored,
    Superseded,
    Uploading,
    advance,
)
from ckpt_sidecar.disk import BytesChanged, PinnedFile
from ckpt_sidecar.events import Event, Failed, Progress, Replacing, UploadAborted
from ckpt_sidecar.manifest import Announced, Entry, described, self_description
from ckpt_sidecar.patience import together
from ckpt_sidecar.slots import Slots
from ckpt_sidecar.spool import Spool

LOOKS = 5  # a key that changes under us this often in a row is somebody else's playground: said, and rested


class Announcer(Protocol):
    """What the uploader needs of the ledger."""

    async def announce(self, upload: Announced) -> None:
        """Enter the upload in the manifest."""

    async def forget(self, upload_id: str) -> None:
        """Take an upload that is gone out of the manifest."""

    async def met(self, theirs: Entry) -> None:
        """Be told of a greater id at a key: somebody may have claimed since, or never committed it."""


@dataclass(slots=True)
class _Job:
    """One file on its way up. `checkpoint` is as it is now, the rest stays."""

    checkpoint: Checkpoint
    key: str
    source: PinnedFile

    @property
    def size(self) -> int:
        return self.checkpoint.files[0].size

    @property
    def metadata(self) -> dict[str, str]:
        return self_description(self.checkpoint.id, self.checkpoint.saved_at, self.size)


class Uploader:
    """Sends pinned checkpoints. What the bucket raises comes out when a rest may mend it."""

    def __init__(
        self,
        bucket: Bucket,
        spool: Spool,
        announcer: Announcer,
        *,
        prefix: str,
        part_bytes: int,
        workers: int,
        moved: Callable[[Checkpoint], None],
        tell: Callable[[Event], None],
    ) -> None:
        self._bucket = bucket
        self._spool = spool
        self._announcer = announcer
        self._prefix = prefix
        self._part_bytes = part_bytes
        self._workers = workers
        self._slots = Slots(workers)
        self._moved = moved
        self._tell = tell
        self._doubtful: set[str] = set()  # keys at which an upload may be under way that nobody wrote down
        self._begun_anew: set[Id] = set()  # after the store refused their parts

    def doubt(self, name: str) -> None:
        """An upload of `name` may have been created whose id was never written down."""
        self._doubtful.add(self._prefix + name)

    def one_at_a_time(self) -> None:
        """From now on no part of an older checkpoint is sent while a newer one is being sent."""
        self._slots.one_at_a_time()

    def in_one_put(self, checkpoint: Checkpoint) -> bool:
        """Is it small enough for that?"""
        return checkpoint.size <= self._part_bytes

    async def upload(self, checkpoint: Checkpoint, seen: ObjectRef | None) -> Checkpoint:
        """Bring the checkpoint to Stored, Superseded or Changed; each step on the way is told by `moved`.

        `seen` is the object that the manifest has at its key. Raises what the bucket raises, and OSError
        when the pin cannot be read: the checkpoint then is as `moved` told it last.
        """
        when: Condition = Absent() if seen is None else Unchanged(seen.etag)
        with self._spool.reading(checkpoint, checkpoint.files[0]) as source, self._slots.using(checkpoint.id):
            job = _Job(checkpoint, self._prefix + checkpoint.name, source)
            try:
                source.check()
                if self.in_one_put(checkpoint) and isinstance(checkpoint.state, Pinned):
                    return await self._in_one_put(job, when)
                return await self._in_parts(job, when)
            except BytesChanged:
                return await self.abandon(job.checkpoint, Changed())

    async def abandon(self, checkpoint: Checkpoint, to: Changed | Skipped | Superseded) -> Checkpoint:
        """End the checkpoint; an upload that had begun is aborted first, and the abort answered."""
        if isinstance(checkpoint.state, Uploading):
            await self._abort(checkpoint, checkpoint.state)
        else:
            await self._clear_doubt(checkpoint)
        return self._move(checkpoint, to)

    async def _abort(self, checkpoint: Checkpoint, state: Uploading) -> None:
        for upload_id in filter(None, state.upload_ids):
            await self._aborted(Upload(self._prefix + checkpoint.name, upload_id))
            await self._announcer.forget(upload_id)

    async def _aborted(self, upload: Upload) -> None:
        try:
            await self._bucket.abort_multipart(upload)
        except Missing as error:  # gone already; not so if it is the bucket that is said to be gone
            if error.reason == "bucket":
                raise

    def _move(self, checkpoint: Checkpoint, to: State) -> Checkpoint:
        moved = advance(checkpoint, to)
        self._moved(moved)
        return moved

    # --- a small file: one put ---

    async def _in_one_put(self, job: _Job, when: Condition) -> Checkpoint:
        for _ in range(LOOKS):
            try:
                async with self._slots.taken(job.checkpoint.id):
                    ref = await self._bucket.put(
                        job.key, (job.source, job.size), when=when, metadata=job.metadata
                    )
                self._tell(Progress(job.checkpoint.name, "up", job.size, job.size, job.size))
                return self._move(job.checkpoint, Stored((ref,)))
            except (Conflict, Unreachable) as error:
                found = await self._look(job)
                if not isinstance(found, Absent | Unchanged):
                    return await self._end(job, found)
                if isinstance(error, Unreachable):
                    raise
                when, beaten = found, error
        raise beaten

    async def _end(self, job: _Job, found: Stored | Superseded) -> Checkpoint:
        if isinstance(found, Stored):
            return self._move(job.checkpoint, found)
        return await self.abandon(job.checkpoint, found)

    async def _look(self, job: _Job) -> Stored | Superseded | Condition:
        """What stands at the key: this very checkpoint, a newer one, or what the next write is bound to."""
        ref = await self._bucket.head(job.key)
        if ref is None:
            return Absent()
        theirs = described(ref, job.checkpoint.name, 0)
        if theirs is not None and theirs.id > job.checkpoint.id:
            await self._announcer.met(theirs)
            return Superseded(theirs.id)
        if theirs is not None and theirs.id == job.checkpoint.id:
            crc = await asyncio.to_thread(crc_of, job.source, job.size)
            if ref.crc64nvme in (None, crc):
                return Stored((replace(ref, crc64nvme=crc),))
        if theirs is None:
            self._tell(Replacing(job.checkpoint.name, job.key))
        return Unchanged(ref.etag)

    # --- a large file: parts ---

    async def _in_parts(self, job: _Job, when: Condition) -> Checkpoint:
        layout = spans(job.size, part_bytes_for(job.size, self._part_bytes))
        for _ in range(LOOKS):
            try:
                upload, have = await self._begin(job, layout)
                parts = await self._send(job, upload, layout, have=have)
                return await self._complete(job, upload, parts, when=when)
            except (Missing, Corrupt) as error:  # the upload is gone, or its parts are not what we sent
                if error.reason == "bucket":
                    raise
                lost = error
            found = await self._look(job)
            if not isinstance(found, Absent | Unchanged):
                return await self._end(job, found)
            when = found
            await self._begin_anew(job)
        raise lost

    async def _begin(self, job: _Job, layout: Sequence[Span]) -> tuple[Upload, dict[int, Part]]:
        """The upload to go on with, and the parts that it has already; Missing when it is gone.

        It may have been completed: then no part is sent, which moto would answer with 500 for ever.
        """
        if isinstance(job.checkpoint.state, Uploading):
            upload = Upload(job.key, job.checkpoint.state.upload_ids[0] or "")
            return upload, await self._agreeing(job, upload, layout)
        await self._clear_doubt(job.checkpoint)
        self._doubtful.add(job.key)  # until its id is written down
        await self._journal(replace(job.checkpoint, state=Uploading((None,))))
        upload_id = await self._bucket.create_multipart(job.key, metadata=job.metadata)
        begun = advance(job.checkpoint, Uploading((upload_id,)))
        if await self._journal(begun):
            self._doubtful.discard(job.key)
        job.checkpoint = begun
        self._moved(begun)
        return Upload(job.key, upload_id), {}

    async def _journal(self, checkpoint: Checkpoint) -> bool:
        """Write it down; a disk that does not take it holds up nothing: a restart would ask the bucket."""
        try:
            await asyncio.to_thread(self._spool.write, checkpoint)
        except OSError as error:
            self._tell(Failed("upload", "disk", checkpoint.name, str(error), "make room on the spool's disk"))
            return False
        return True

    async def _begin_anew(self, job: _Job) -> None:
        if isinstance(job.checkpoint.state, Uploading):
            await self._abort(job.checkpoint, job.checkpoint.state)
            job.checkpoint = self._move(job.checkpoint, Pinned())
            await self._journal(job.checkpoint)

    async def _clear_doubt(self, checkpoint: Checkpoint) -> None:
        """Abort what we have begun at the key and did not write down; with parts it is a stranger's."""
        key, name = self._prefix + checkpoint.name, checkpoint.name
        try:
            for upload in await self._bucket.list_uploads(key) if key in self._doubtful else ():
                if await self._parts_of(upload) == []:
                    await self._announcer.forget(upload.upload_id)  # first: it may be the next holder's
                    await self._aborted(upload)
                    self._tell(UploadAborted(name, upload.upload_id))
        except (Denied, Refused) as error:  # then only the bucket's lifecycle rule can throw it away
            if error.reason in ("credentials", "region"):  # of all requests: the upload waits for the mend
                raise
            self._tell(Failed("upload", error.reason, name, str(error.args[0]), error.hint))
        self._doubtful.discard(key)

    async def _parts_of(self, upload: Upload) -> list[Part] | None:
        """Its parts; None when it is gone. Missing where the store says that, and lists it all the same."""
        try:
            return await self._bucket.list_parts(upload)
        except Missing as error:
            if error.reason == "bucket" or upload in await self._bucket.list_uploads(upload.key):
                raise
            return None

    async def _agreeing(self, job: _Job, upload: Upload, layout: Sequence[Span]) -> dict[int, Part]:
        """The parts that the bucket has and that agree with the local bytes, by number."""
        listed = {each.number: each for each in await self._bucket.list_parts(upload)}
        return await asyncio.to_thread(_agreeing_parts, job.source, layout, listed)

    async def _send(
        self, job: _Job, upload: Upload, layout: Sequence[Span], *, have: dict[int, Part]
    ) -> list[Part]:
        """Send what is missing, the announcement beside it; return all parts once both are answered."""
        missing = [span for span in layout if span.number not in have]
        todo, parts = iter(missing), dict(have)
        done = job.size - sum(span.size for span in missing)

        async def sender() -> None:
            nonlocal done
            for span in todo:
                async with self._slots.taken(job.checkpoint.id):
                    parts[span.number] = await self._bucket.put_part(upload, span, job.source)
                job.source.uncache(span.offset, span.size)
                done += span.size
                self._tell(Progress(job.checkpoint.name, "up", span.size, done, job.size))

        await together(self._announce(job, upload), *(sender() for _ in range(self._workers)))
        return [parts[number] for number in sorted(parts)]

    async def _announce(self, job: _Job, upload: Upload) -> None:
        it = job.checkpoint
        await self._announcer.announce(
            Announced(
                id=it.id,
                name=it.name,
                key=job.key,
                upload_id=upload.upload_id,
                size=job.size,
                saved_at=it.saved_at,
                spool=self._spool.record.spool,
            )
        )

    async def _complete(
        self, job: _Job, upload: Upload, parts: Sequence[Part], *, when: Condition
    ) -> Checkpoint:
        for _ in range(LOOKS):
            job.source.check()
            try:
                ref = await self._bucket.complete_multipart(upload, parts, when=when, metadata=job.metadata)
                return self._move(job.checkpoint, Stored((ref,)))
            except (Conflict, Unreachable) as error:
                found = await self._look(job)
                if not isinstance(found, Absent | Unchanged):
                    return await self._end(job, found)
                if isinstance(error, Unreachable):
                    raise
                when, beaten = found, error
            except Refused as error:  # the parts are not there like that: begun anew, but only once
                if job.checkpoint.id in self._begun_anew:
                    raise
                self._begun_anew.add(job.checkpoint.id)
                raise Corrupt(str(error.args[0])) from error
        raise beaten


def _agreeing_parts(
    source: PinnedFile, layout: Sequence[Span], listed: Mapping[int, Part]
) -> dict[int, Part]:
    """Which listed parts have the local bytes: by checksum, by MD5 etag where the store keeps none."""
    have = {}
    buffer = memoryview(bytearray(max(span.size for span in layout)))
    for span in layout:
        part = listed.get(span.number)
        if part is None or part.size != span.size:
            continue
        view = buffer[: span.size]
        if source.read_into(span.offset, view) == span.size:
            crc = encode_crc64(crc64(view))
            if crc == part.crc64nvme or (part.crc64nvme is None and part.etag == _md5(view)):
                have[span.number] = replace(part, crc64nvme=crc)
        source.uncache(span.offset, span.size)
    return have


def _md5(view: memoryview) -> str:
    return hashlib.md5(view, usedforsecurity=False).hexdigest()


def crc_of(source: PinnedFile, size: int) -> str:
    """The CRC64NVME of the whole source as S3 writes it, read in small pieces."""
    crc, offset, view = 0, 0, memoryview(bytearray(MIB))
    while offset < size:
        got = source.read_into(offset, view[: min(MIB, size - offset)])
        if got == 0:
            break
        source.uncache(offset, got)
        crc, offset = crc64(view[:got], crc), offset + got
    return encode_crc64(crc)
