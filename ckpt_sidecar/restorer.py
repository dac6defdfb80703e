"""The newest good checkpoint back into the watch dir.

How it can go wrong, and what is done:
- the object is missing, replaced by a stranger's, or its bytes do not agree, and once more do not: said,
  counted, the next one;
- a newer save of the same name stands at the key, completed but not committed: it is adopted;
- the object changes under the download: If-Match fails, and the key is looked at anew;
- the watch dir has it already: verified and kept; has a torn file of that name: set aside, never deleted;
- the trainer writes the same name meanwhile: its file stays;
- a symlink is in the way, or what is no file stands at the name: nothing is touched, the next one;
- the disk refuses: that says nothing about the checkpoint, and no older one is taken for it;
- killed at any step: what had arrived lies out of sight, and the next start clears it.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

from ckpt_sidecar.bucket import (
    Bucket,
    BucketError,
    Conflict,
    Corrupt,
    Denied,
    Missing,
    ObjectRef,
    Refused,
    Span,
    Unreachable,
    crc64,
    decode_crc64,
    encode_crc64,
    join_crc64,
    spans,
)
from ckpt_sidecar.checkpoint import Checkpoint, File, Id
from ckpt_sidecar.disk import is_full
from ckpt_sidecar.events import Event, FellBack, Progress, Restored
from ckpt_sidecar.landing import Incoming, Landing, NoRoom
from ckpt_sidecar.manifest import Entry, Manifest, described
from ckpt_sidecar.patience import together

FETCHES = 3  # a key that is replaced under so many downloads in a row is passed over
# What the disk says of one name, and of no other; anything else says nothing about the checkpoint.
OF_THE_NAME = frozenset(
    {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL}
)
MOST_PARTS = 4  # of an object's parts in one request: it costs no memory, a request 1 to 2 ms of CPU
RANGES = 4  # for each worker at least, so that all are busy to the end
READ_BYTES = 1024 * 1024  # a local file is verified in pieces of this many bytes


class NothingRestored(Exception):
    """The bucket holds checkpoints, and none of them could be restored."""


class Remembering(Protocol):
    """Who knows which files of the watch dir are durable; from any thread."""

    def restored(self, file: File, id_: Id) -> None:
        """The file is in the bucket under that id: it is not to be uploaded again."""

    def forget(self, file: File) -> None:
        """It does not stand there after all."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the restore came to. `word`: restored, kept or empty; `adopted` is to be committed."""

    word: str
    entry: Entry | None = None
    adopted: Entry | None = None
    path: Path | None = None


class Restorer:
    """Restores into one watch dir. `flaw_of(file, name)` says why a file is not whole, or None."""

    def __init__(
        self,
        bucket: Bucket,
        landing: Landing,
        *,
        known: Remembering,
        workers: int,
        part_bytes: int,
        flaw_of: Callable[[BinaryIO, str], str | None],
        seconds: Callable[[], float],
        tell: Callable[[Event], None],
    ) -> None:
        self._bucket = bucket
        self._landing = landing
        self._known = known
        self._workers = workers
        self._part_bytes = part_bytes
        self._flaw_of = flaw_of
        self._seconds = seconds
        self._tell = tell
        self._waiting: Iterable[Checkpoint] = ()
        self._stood: dict[str, File | None] = {}  # what stood at each name when the restore began

    async def restore(self, manifest: Manifest, waiting: Iterable[Checkpoint] = ()) -> Outcome:
        """Put the newest good checkpoint in place, or keep what is at least as new.

        `waiting` is what this spool holds and has not yet made durable. Raises NothingRestored when the
        bucket has checkpoints and none is good; Unreachable, Denied and OSError when that is not known;
        NoRoom when the disk is too small.
        """
        started = self._seconds()
        newest = manifest.newest
        self._waiting = waiting
        self._stood = {each.name: self._landing.look(each.name) for each in manifest.checkpoints}
        held = max((each for each in waiting if self._stands(each)), key=lambda each: each.id, default=None)
        if held is not None and (newest is None or held.id > newest.id):
            self._told("kept", held.id, held.name, size=0, started=started)
            return Outcome("kept")
        if newest is None:
            self._told("empty", None, None, size=0, started=started)
            return Outcome("empty")
        for entry in manifest.checkpoints:
            outcome = await self._try(entry)
            if outcome is not None and outcome.entry is not None:
                it = outcome.entry
                size = it.size if outcome.word == "restored" else 0
                self._told(outcome.word, it.id, it.name, size=size, started=started)
                return outcome
        self._told("failed", newest.id, newest.name, size=0, started=started)
        raise NothingRestored(
            f"none of the {len(manifest.checkpoints)} checkpoints in the manifest could be restored; "
            "the log says of each one why"
        )

    def _told(self, word: str, id_: Id | None, name: str | None, *, size: int, started: float) -> None:
        self._tell(Restored(word, id_, name, size, self._seconds() - started))

    def _stands(self, checkpoint: Checkpoint) -> bool:
        """Is the checkpoint's very file still in the watch dir under its name?"""
        return all(self._landing.look(file.name) == file for file in checkpoint.files)

    def _is_newer(self, checkpoint: Checkpoint, entry: Entry) -> bool:
        """Does a newer save stand under the entry's name, that this spool holds?"""
        newer = checkpoint.name == entry.name and checkpoint.id > entry.id
        return newer and self._stands(checkpoint)

    async def _try(self, entry: Entry) -> Outcome | None:
        """Restore this entry, or say why not and return None.

        Trouble that says nothing about the entry comes out.
        """
        try:
            self._check_way(entry.name)
            if await asyncio.to_thread(self._has, entry):
                return Outcome("kept", entry, path=self._landing.root / entry.name)
            with suppress(Corrupt):  # on its way, perhaps: an older checkpoint costs more than a download
                return await self._fetch_still(entry)
            return await self._fetch_still(entry)
        except (Unreachable, Denied):
            raise
        except (BucketError, OSError) as error:
            if isinstance(error, BucketError) and error.reason in ("bucket", "region"):
                raise
            if isinstance(error, OSError) and is_full(error):
                raise NoRoom(
                    f"the checkpoint has {entry.size} bytes, and the disk is full: {error}"
                ) from error
            if isinstance(error, OSError) and error.errno not in OF_THE_NAME:
                raise
            self._tell(FellBack(entry.id, entry.name, str(error)))
            return None

    def _check_way(self, name: str) -> None:
        """Raise Refused where it would be written through a symlink, or over what is no file."""
        if not self._landing.inside(name):
            raise Refused("a symlink is in the way inside the watch dir")
        if not self._landing.takes(name):
            raise Refused("what stands at its name in the watch dir is no file")

    def _has(self, entry: Entry) -> bool:
        """Is the watch dir's file of that name this very checkpoint, byte for byte?"""
        ref = entry.objects[0]
        file = File(entry.name, ref.size, entry.saved_at)
        if self._landing.look(entry.name) != file or ref.crc64nvme is None:
            return False
        try:
            same = _crc_of(self._landing.root / entry.name) == ref.crc64nvme
        except OSError:
            return False
        if same:
            self._known.restored(file, entry.id)
        return same

    async def _fetch_still(self, entry: Entry) -> Outcome | None:
        for _ in range(FETCHES - 1):
            with suppress(Conflict):  # replaced under the download: look again at what is there
                return await self._fetch(entry)
        return await self._fetch(entry)

    async def _fetch(self, entry: Entry) -> Outcome | None:
        ref, found = await self._locate(entry)
        with self._landing.incoming(ref.size) as incoming:
            ref = replace(ref, crc64nvme=await self._download(ref, found.name, incoming))
            with incoming.open() as file:
                flaw = await asyncio.to_thread(self._flaw_of, file, found.name)
            if flaw is not None:
                raise Refused(f"the object is no whole checkpoint: {flaw}")
            newer = any(self._is_newer(each, found) for each in self._waiting)  # it was taken up meanwhile
            path = None if newer else await asyncio.to_thread(self._place, incoming, found)
        done = replace(found, objects=(ref,))
        adopted = done if found is not entry else None
        return Outcome(
            "restored" if path is not None else "kept", done, adopted, self._landing.root / found.name
        )

    def _place(self, incoming: Incoming, entry: Entry) -> Path | None:
        """Put the file in place; None when the trainer has written that name meanwhile: its file stays."""
        self._check_way(entry.name)  # it was clear when the download began
        before = self._stood.get(entry.name)
        if before is not None and self._landing.look(entry.name) == before:
            self._landing.aside(entry.name)
        file = incoming.seal(entry.name, entry.saved_at)
        self._known.restored(file, entry.id)  # before the watcher can see it
        try:
            incoming.place(entry.name)
        except OSError as error:
            self._known.forget(file)
            if isinstance(error, FileExistsError):
                return None
            raise
        return self._landing.root / entry.name

    async def _locate(self, entry: Entry) -> tuple[ObjectRef, Entry]:
        """The object to read, and the entry that it is: the manifest's, or a newer one that is adopted."""
        listed = entry.objects[0]
        there = await self._bucket.head(listed.key)
        if there is not None and there.etag == listed.etag and there.size == listed.size:
            return replace(listed, version_id=there.version_id), entry
        newer = described(there, entry.name, entry.stored_at) if there is not None else None
        if there is not None and newer is not None and newer.id > entry.id:
            return there, newer
        if listed.version_id is not None:
            return listed, entry
        if there is not None and newer is not None and newer.id == entry.id:
            return replace(there, crc64nvme=listed.crc64nvme), entry  # copied: another etag, the same bytes
        if there is None:
            raise Missing(f"the object {listed.key} is gone")
        raise Missing(f"the object {listed.key} was replaced by one that is not ours")

    async def _fetch_range(self, ref: ObjectRef, span: Span, incoming: Incoming) -> int:
        """A range of the object into `incoming`; part by part where so much does not come through at once."""
        try:
            return await self._bucket.get_range(ref, span, incoming)
        except Unreachable:
            if span.size <= self._part_bytes:
                raise
        parts = spans(span.size, self._part_bytes)
        crcs = {
            part.number: await self._bucket.get_range(
                ref, replace(part, offset=span.offset + part.offset), incoming
            )
            for part in parts
        }
        return _joined(parts, crcs)

    async def _download(self, ref: ObjectRef, name: str, incoming: Incoming) -> str:
        """All bytes of the object into `incoming`, checked as they arrive; return their CRC64NVME."""
        parts = ref.size // (RANGES * self._workers * self._part_bytes)
        layout = spans(ref.size, self._part_bytes * max(1, min(MOST_PARTS, parts)))
        crcs: dict[int, int] = {}
        todo, done = iter(layout), 0

        async def fetcher() -> None:
            nonlocal done
            for span in todo:
                crcs[span.number] = await self._fetch_range(ref, span, incoming)
                done += span.size
                self._tell(Progress(name, "down", span.size, done, ref.size))

        await together(*(fetcher() for _ in range(self._workers)))
        crc = encode_crc64(_joined(layout, crcs))
        if ref.crc64nvme is not None and decode_crc64(ref.crc64nvme) != decode_crc64(crc):
            raise Corrupt(f"the bytes of {ref.key} do not agree with their checksum {ref.crc64nvme}: {crc}")
        return crc


def _joined(layout: Sequence[Span], crcs: dict[int, int]) -> int:
    whole = 0
    for span in layout:
        whole = join_crc64(whole, crcs[span.number], span.size)
    return whole


def _crc_of(path: Path) -> str:
    crc = 0
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(READ_BYTES)
        while got := file.readinto(buffer):
            crc = crc64(memoryview(buffer)[:got], crc)
    return encode_crc64(crc)
