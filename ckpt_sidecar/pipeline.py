"""The way of a checkpoint from found to durable: take-in, the workers, retention.

`_make_durable` is the product: upload, commit, and only then let the pin go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product

from ckpt_sidecar.bucket import BucketError, ObjectRef, Unreachable
from ckpt_sidecar.checkpoint import (
    Book,
    Changed,
    Checkpoint,
    Committed,
    Id,
    Pinned,
    Skipped,
    Stored,
    Superseded,
    Uploading,
    advance,
)
from ckpt_sidecar.disk import BytesChanged, mend_of
from ckpt_sidecar.events import Deleted, Event, Failed, Moved, PinnedByDescriptor, Retrying
from ckpt_sidecar.formats import flaw_of
from ckpt_sidecar.landing import Landing
from ckpt_sidecar.ledger import Ledger, Times
from ckpt_sidecar.manifest import Entry
from ckpt_sidecar.patience import PatientBucket
from ckpt_sidecar.policy import Skip, Step, Supersede, expired_local, next_step
from ckpt_sidecar.rests import Rests
from ckpt_sidecar.spool import Spool
from ckpt_sidecar.uploader import Uploader, crc_of
from ckpt_sidecar.watcher import Found, Watcher

URGENT_REST = 1.0  # seconds, the longest rest once the node is about to be taken away
REMEMBERED = 10_000  # names whose inodes are kept in memory
LOCAL_TROUBLE_REST = 5.0  # seconds; a disk that is full or failing is not asked every moment


@dataclass(frozen=True, slots=True)
class Keep:
    """What retention keeps, in the watch dir and in the bucket; 0 keeps all."""

    local: int = 0
    remote: int = 0


class Pipeline:
    """All checkpoints on their way, and the tasks that move them. One event loop owns it."""

    def __init__(
        self,
        bucket: PatientBucket,
        spool: Spool,
        *,
        landing: Landing,
        ledger: Ledger,
        watcher: Watcher,
        book: Book,
        prefix: str,
        part_bytes: int,
        workers: int,
        keep: Keep,
        times: Times,
        seconds: Callable[[], float],
        tell: Callable[[Event], None],
    ) -> None:
        self.book = book
        self._bucket = bucket
        self._spool = spool
        self._landing = landing
        self._ledger = ledger
        self._watcher = watcher
        self._prefix = prefix
        self._workers = workers
        self._keep = keep
        self._times = times
        self._seconds = seconds
        self._tell = tell
        self._uploader = Uploader(
            bucket,
            spool,
            ledger,
            prefix=prefix,
            part_bytes=part_bytes,
            workers=workers,
            moved=self.moved,
            tell=tell,
        )
        self._busy: set[str] = set()
        self._rests = Rests(seconds, times.chance)
        self._began: dict[Id, float] = {}
        self._asked: set[Id] = set()  # small ones, of which a put may have been answered to nobody
        self._sent: dict[str, tuple[int, int]] = {}  # the inodes that are durable, by name, the oldest first
        self._all_taken_in = False
        self._urgent = False
        self._woken = asyncio.Event()
        self._retention_due = asyncio.Event()
        self._retaining = asyncio.Lock()

    def hurry(self) -> None:
        """The node is about to be taken away: the newest alone, now; no long rests, and no retention."""
        self._urgent = True
        self._uploader.one_at_a_time()
        self._rests.longest = URGENT_REST
        self._end_rests()

    def _end_rests(self) -> None:
        self._rests.end_all()
        self._wake()

    def moved(self, checkpoint: Checkpoint) -> None:
        """Note and tell that a checkpoint is in a new state; the effect has happened."""
        self.book.put(checkpoint)
        began = self._began.get(checkpoint.id)
        took = 0.0 if began is None else self._seconds() - began
        self._tell(Moved(checkpoint, self._times.wall() / 1e9, took))

    # --- take-in ---

    def recover(self) -> None:
        """Take up what a predecessor left in the spool."""
        found = self._spool.recover()
        for what, error in found.broken:
            self._tell(Failed("pin", "disk", what, error))
        for checkpoint in found.checkpoints:
            if checkpoint.state == Uploading((None,)):  # killed before its id was written down
                self._uploader.doubt(checkpoint.name)
                checkpoint = replace(checkpoint, state=Pinned())  # noqa: PLW2901
            elif isinstance(checkpoint.state, Pinned) and self._is_torn(checkpoint):
                found.caught += filter(None, [self._spool.reconsider(checkpoint)])
                continue
            elif isinstance(checkpoint.state, Pinned):
                self._note_asked(checkpoint)
            self.moved(checkpoint)
        for caught in found.caught:
            standing = self._landing.look(caught.name)
            if standing is not None and self._spool.known.is_known(standing):
                self._spool.let_go(caught)  # a newer save of its name has been taken
            else:
                self._watcher.take_back(caught)

    def _note_asked(self, checkpoint: Checkpoint) -> None:
        if self._uploader.in_one_put(checkpoint):  # a larger one is not asked for before it is journalled
            self._asked.add(checkpoint.id)

    def _is_torn(self, checkpoint: Checkpoint) -> bool:
        """Was a pin rewritten in place that has lost its entry, which would tell?"""
        try:
            with self._spool.reading(checkpoint, checkpoint.files[0]) as pinned, pinned.open() as file:
                return flaw_of(file, checkpoint.name) is not None
        except OSError:  # the upload will say so
            return False

    async def pin(self, batch: Sequence[Found]) -> None:
        """Make checkpoints of what was found, durably queued, in this order."""
        doubts: list[OSError] = []
        pinned, failed = await asyncio.to_thread(
            self._spool.pin, [(each.caught, each.file) for each in batch], doubts.append
        )
        for each in batch:
            if each.caught.descriptor is not None:
                self._tell(PinnedByDescriptor(each.file.name, "no hard link could be made"))
        for caught, error in failed:
            self._tell(Failed("pin", "disk", caught.name, str(error), mend_of(error)))
            self._watcher.take_back(caught, after=LOCAL_TROUBLE_REST)
        for error, checkpoint in product(doubts, pinned):  # it is sent all the same, and then durable
            what = f"it is pinned, but a power loss may undo that: {error}"
            self._tell(Failed("pin", "disk", checkpoint.name, what, mend_of(error)))
        for checkpoint in pinned:
            for older in self.book.named(checkpoint.name):
                self._rests.end(older.id)  # it is to be ended, and at once
            self.moved(checkpoint)
        self._wake()

    async def take_in(self, stop: asyncio.Event) -> None:
        """Pin whatever the watcher finds, until the stop, and what it finds in its last look."""
        async for batch in self._watcher.batches(stop):
            await self.pin(batch)
        self._all_taken_in = True
        self._end_rests()  # the drain has no time for them

    # --- the workers ---

    async def work(self) -> None:
        """Move checkpoints until all is taken in and nothing is on its way."""
        while not self._all_taken_in or len(self.book):
            step = self._next()
            if step is None:
                await self._until_woken()
                continue
            self._busy.add(step.checkpoint.name)
            try:
                await self._do(step)
            except (BucketError, OSError) as error:
                self._rest(step.checkpoint.id, step.checkpoint.name, error)
            finally:
                self._busy.discard(step.checkpoint.name)
                self._wake()

    def _next(self) -> Step | None:
        self._ledger.check_fence()  # what the holder has made durable is no reason to let a pin of ours go
        return next_step(
            self.book,
            busy=self._busy,
            resting=self._rests,
            now=self._seconds(),
            keep_remote=self._keep.remote,
            durable=[each.id for each in self._ledger.manifest.checkpoints],
            asked=self._asked,
        )

    async def _do(self, step: Step) -> None:
        checkpoint = step.checkpoint
        if isinstance(step, Supersede):
            await self._supersede(checkpoint, step.by, durable_as=None)
        elif isinstance(step, Skip):
            await self._uploader.abandon(checkpoint, Skipped(step.because))
            await self._release(checkpoint, durable_as=None)
        else:
            await self._make_durable(checkpoint)

    async def _make_durable(self, checkpoint: Checkpoint) -> None:
        """Upload, commit, release: in this order, each only when the one before has succeeded."""
        listed = self._ledger.manifest.entry_of(checkpoint.name)
        if listed is not None:
            same = _same_file(checkpoint, listed) or await self._only_touched(checkpoint, listed)
            if same or listed.id > checkpoint.id:
                await self._supersede(checkpoint, listed.id, durable_as=listed.id if same else None)
                return
            if listed.id == checkpoint.id and not isinstance(checkpoint.state, Stored):
                # Not let go of before a crash, and written anew in place: other bytes need their own id.
                await self._take_up_again(await self._uploader.abandon(checkpoint, Changed()))
                return
        self._began.setdefault(checkpoint.id, self._seconds())
        if not isinstance(checkpoint.state, Stored):
            self._note_asked(checkpoint)
            seen = listed.objects[0] if listed is not None else None
            try:
                checkpoint = await self._uploader.upload(checkpoint, seen)
            except FileNotFoundError as error:
                await self._lose(self.book.checkpoints[checkpoint.id], error)
                return
        match checkpoint.state:
            case Stored(objects):
                await self._commit(checkpoint, objects)
            case Changed():
                await self._take_up_again(checkpoint)
            case _:
                await self._release(checkpoint, durable_as=None)

    async def _only_touched(self, checkpoint: Checkpoint, listed: Entry) -> bool:
        """Does it have the bytes of the object that is listed, and only another time?

        It is read through for that where it may be the very inode that was sent: a save that is renamed
        into place, as of last.pt, is another one.
        """
        crc = listed.objects[0].crc64nvme
        if crc is None or listed.size != checkpoint.size:
            return False
        with suppress(OSError, BytesChanged), self._spool.reading(checkpoint, checkpoint.files[0]) as pinned:
            if self._sent.get(checkpoint.name, pinned.inode) == pinned.inode:
                return await asyncio.to_thread(crc_of, pinned, checkpoint.size) == crc
        return False

    async def _commit(self, checkpoint: Checkpoint, objects: tuple[ObjectRef, ...]) -> None:
        entry = Entry(checkpoint.id, checkpoint.name, objects, checkpoint.saved_at, self._times.wall())
        await self._ledger.commit(entry)
        self.moved(advance(checkpoint, Committed(objects)))
        self._remember(checkpoint)
        await self._release(checkpoint, durable_as=checkpoint.id)
        self._retention_due.set()

    def _remember(self, checkpoint: Checkpoint) -> None:
        """Note which inode was sent under that name, for the last names only."""
        self._sent.pop(checkpoint.name, None)
        with suppress(OSError), self._spool.reading(checkpoint, checkpoint.files[0]) as pinned:
            self._sent[checkpoint.name] = pinned.inode
        if len(self._sent) > REMEMBERED:
            del self._sent[next(iter(self._sent))]

    async def _supersede(self, checkpoint: Checkpoint, by: Id, *, durable_as: Id | None) -> None:
        await self._uploader.abandon(checkpoint, Superseded(by))
        await self._release(checkpoint, durable_as=durable_as)

    async def _take_up_again(self, checkpoint: Checkpoint) -> None:
        if any(each.id > checkpoint.id for each in self.book.named(checkpoint.name)):
            await self._release(checkpoint, durable_as=None)  # else it would be numbered after that one
            return
        self._forget_times(checkpoint.id)
        caught = await asyncio.to_thread(self._spool.reconsider, checkpoint)
        if caught is not None:
            self._watcher.take_back(caught)

    async def _lose(self, checkpoint: Checkpoint, error: OSError) -> None:
        """Somebody removed the pinned bytes: what stands at the name now is taken up in their place."""
        self._tell(
            Failed(
                "pin", "disk", checkpoint.name, str(error), "do not remove .ckpt-sidecar from the watch dir"
            )
        )
        await self._take_up_again(await self._uploader.abandon(checkpoint, Changed()))

    async def _release(self, checkpoint: Checkpoint, *, durable_as: Id | None) -> None:
        self._forget_times(checkpoint.id)
        await asyncio.to_thread(self._spool.release, checkpoint, durable_as=durable_as)

    def _forget_times(self, id_: Id) -> None:
        self._rests.forget(id_)
        self._began.pop(id_, None)
        self._asked.discard(id_)

    def _rest(self, id_: Id, name: str, error: BucketError | OSError) -> None:
        """Leave this one alone for a while, and let others go first."""
        least = LOCAL_TROUBLE_REST if isinstance(error, OSError) else 0.0
        unanswered = isinstance(error, Unreachable) and error.reason in ("connection", "timeout")
        delay = self._rests.after(id_, unanswered=unanswered, least=least)
        if isinstance(error, Unreachable):
            self._tell(Retrying("upload", error.reason, delay, str(error)))
        elif isinstance(error, BucketError):
            self._tell(Failed("upload", error.reason, name, str(error.args[0]), error.hint))
        else:
            self._tell(Failed("pin", "disk", name, str(error), "look at the watch dir's disk"))

    def _wake(self) -> None:
        self._woken.set()
        self._woken = asyncio.Event()

    async def _until_woken(self) -> None:
        """Wait until something has changed, or the first that rests has rested."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._rests.soonest()):
                await self._woken.wait()

    # --- retention ---

    async def retain(self) -> None:
        """Delete what retention lets go, after every commit; for ever."""
        while True:
            await self._retention_due.wait()
            self._retention_due.clear()
            if not self._urgent:
                await self.retain_once()

    async def retain_once(self) -> None:
        """Delete what retention lets go now. What is not durable, and the newest, are never let go."""
        async with self._retaining:  # the last one, in the drain, waits for the one under way
            try:
                if self._keep.remote:
                    await self._retain_remote()
                if self._keep.local:
                    for name in await asyncio.to_thread(self._retain_local):
                        self._tell(Deleted(name, "watch dir"))
            except (BucketError, OSError) as error:
                reason = error.reason if isinstance(error, BucketError) else "disk"
                self._tell(Failed("retention", reason, self._prefix, str(error)))

    async def _retain_remote(self) -> None:
        held: set[str] = set()

        def spare(key: str) -> bool:
            name = key.removeprefix(self._prefix)
            if name in self._busy:
                return True
            held.add(name)
            self._busy.add(name)  # no save of that name may begin while its old object is deleted
            return False

        try:
            gone = await self._ledger.expire(self._keep.remote, spare=spare)
        finally:
            self._busy -= held
            self._wake()
        for each in gone:
            self._tell(Deleted(each.key.removeprefix(self._prefix), "bucket"))

    def _retain_local(self) -> list[str]:
        """Delete the trainer's oldest durable files, in a thread; return their names."""
        deleted = []
        files = self._spool.known.durable_files()
        newest = self._ledger.manifest.newest
        names = {id_: file.name for id_, file in files.items()}
        for id_ in expired_local(names, keep=self._keep.local, newest=newest.id if newest else None):
            if self._landing.delete(files[id_]):
                deleted.append(files[id_].name)
            self._spool.known.forget(files[id_])
        return deleted


def _same_file(checkpoint: Checkpoint, listed: Entry) -> bool:
    """Is it the very file that the manifest lists: restored, or found again by a spool that was wiped?"""
    return (listed.size, listed.saved_at) == (checkpoint.size, checkpoint.saved_at)
