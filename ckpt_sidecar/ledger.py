"""The keeper of `latest.json`: claims the prefix, swaps, and finds out what became of a swap.

How it can go wrong, and what is done:
- the answer to a swap is lost, or its retry meets its own echo: read back; the `write` token tells;
- another sidecar has claimed since: `FencedOff`, and nothing is written any more;
- somebody deleted, mangled or set back the manifest: put back as last seen, or as the objects tell, loudly;
- many workers commit at once: what waits travels in one swap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from typing import NoReturn

from ckpt_sidecar.bucket import (
    Absent,
    Bucket,
    BucketError,
    Conflict,
    Denied,
    Missing,
    Refused,
    Unchanged,
    Unreachable,
    Upload,
)
from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.document import UnknownSchema, Writer
from ckpt_sidecar.events import Adopted, Claimed, Event, Fenced, Rebuilt, RecoveryPoint, UploadAborted
from ckpt_sidecar.manifest import (
    HISTORY,
    Announced,
    Change,
    Entry,
    Expiring,
    Holder,
    Manifest,
    announced,
    claimed,
    committed,
    deleted,
    described,
    expired,
    forgotten,
)
from ckpt_sidecar.names import HOME, MANIFEST_NAME
from ckpt_sidecar.policy import retry_delay
from ckpt_sidecar.reading import Seen, entries_from_objects, read

SWAP_TRIES = 20  # a foreign writer that beats us twenty times in a row is said, not fought


class FencedOff(Exception):
    """Another sidecar holds the prefix: `generation` is its, `holder` says where it runs."""

    def __init__(self, generation: int, holder: str) -> None:
        super().__init__(
            f"generation {generation} is held by {holder}: this sidecar writes to the bucket no more "
            "(stop the other and start this one with --take-over to have the prefix back)"
        )
        self.generation = generation
        self.holder = holder


@dataclass(slots=True, eq=False)
class _Turn:
    """One change that waits for a swap."""

    change: Change
    done: bool = False


@dataclass(frozen=True, slots=True)
class Times:
    """Where time and chance come from: `wall` in ns since the epoch, `chance` uniform in [0, 1)."""

    wall: Callable[[], int]
    sleep: Callable[[float], Awaitable[None]]
    chance: Callable[[], float]
    token: Callable[[], str]


class Ledger:
    """One prefix's manifest. `manifest` is the newest that we have seen or written."""

    def __init__(
        self,
        bucket: Bucket,
        *,
        prefix: str,
        times: Times,
        tell: Callable[[Event], None],
        history: int = HISTORY,
    ) -> None:
        self.manifest = Manifest()
        self.generation = 0  # ours; 0 before the claim
        self._bucket = bucket
        self._writer = Writer(bucket.name)
        self._prefix = prefix
        self._key = prefix + MANIFEST_NAME
        self._times = times
        self._tell = tell
        self._history = history
        self._etag: str | None = None
        self._holder: Holder | None = None
        self._fenced = False
        self._lock = asyncio.Lock()
        self._pending: list[_Turn] = []

    # --- reading ---

    async def load(self, *, durable: Id | None = None) -> Manifest:
        """Read the manifest; make it anew from the objects where it is absent, mangled or an older copy.

        An older copy has nothing as new as `durable`, which the caller knows to have been committed. Refused
        when there is nothing at all then: that is no fresh run, but a loss.
        """
        seen = await read(self._bucket, self._prefix)
        if seen.manifest is None and seen.etag is not None:  # mangled: on its way, perhaps
            seen = await read(self._bucket, self._prefix)
        newest = seen.manifest.newest if seen.manifest else None
        if durable and not seen.flaw and (newest is None or newest.id < durable):
            seen = replace(seen, flaw=f"it is an older copy, from before {durable} was committed")
        self._etag = seen.etag
        self._see(seen.manifest if seen.manifest and not seen.flaw else await self._rebuild(seen, durable))
        if durable and self.manifest.newest is None:
            raise Refused(
                f"no checkpoint is there, and yet this spool knows {durable} to be durable: the bucket was "
                "emptied or made anew, or it is another one",
                hint=f"put the objects back, or correct bucket and prefix; to begin anew, remove {HOME}",
                reason="bucket",
            )
        return self.manifest

    def _see(self, manifest: Manifest) -> None:
        """Take it for what stands in the bucket, and tell when that makes another checkpoint the newest."""
        before, newest = self.manifest.newest, manifest.newest
        self.manifest = manifest
        if newest is not None and (before is None or before.id != newest.id):
            saved_at, stored_at = newest.saved_at / 1e9, newest.stored_at / 1e9
            self._tell(RecoveryPoint(newest.id, newest.name, newest.size, saved_at, stored_at))

    async def _rebuild(self, seen: Seen, durable: Id | None) -> Manifest:
        entries = await entries_from_objects(self._bucket, self._prefix, self._times.wall())
        made = seen.manifest or Manifest()
        made = replace(made, generation=max([made.generation, *(each.id.generation for each in entries)]))
        for entry in sorted(entries, key=lambda each: each.id):
            made = committed(made, entry, history=self._history)
        if entries or seen.etag or durable:
            self._tell(Rebuilt(len(entries), seen.flaw))
        return made

    # --- the swap ---

    async def swap(self, change: Change) -> Manifest:
        """Apply the change to the manifest in the bucket; what waits meanwhile travels together.

        Raises FencedOff; Conflict after too many; what the bucket raises, and then it is not known whether
        it was written: the change may be asked for again.
        """
        turn = _Turn(change)
        self._pending.append(turn)
        try:
            async with self._lock:
                if not turn.done:
                    await self._swap_pending()
        finally:
            if turn in self._pending:  # it failed, or nobody waits for it any more
                self._pending.remove(turn)
        return self.manifest

    async def _swap_pending(self) -> None:
        batch, self._pending = self._pending, []
        try:
            await self._swap_all(batch)
        except BaseException:
            self._pending = batch + self._pending
            raise

    async def _swap_all(self, batch: list[_Turn]) -> None:
        for tries in range(1, SWAP_TRIES + 1):
            self.check_fence()
            if await self._write(batch):
                for each in batch:
                    each.done = True
                return
            await self._times.sleep(retry_delay(tries, chance=self._times.chance(), cap=1.0))
        raise self._beaten()

    def _beaten(self) -> Conflict:
        return Conflict(
            f"{self._key} was changed by somebody else {SWAP_TRIES} times in a row",
            hint="find the other writer of this prefix",
        )

    async def _write(self, batch: list[_Turn]) -> bool:
        """One compare-and-swap; True when it is known to stand in the bucket."""
        token = self._times.token()
        new = self.manifest
        for each in batch:
            new = each.change(new)
        new = replace(new, write=token, updated_at=self._times.wall())
        when = Absent() if self._etag is None else Unchanged(self._etag)
        body = self._writer.dump(new)
        try:
            ref = await self._bucket.put(self._key, body, when=when, metadata={})
        except (Conflict, Unreachable):
            return await self._look(token)
        self._etag = ref.etag
        self._see(new)
        return True

    async def _look(self, token: str) -> bool:
        """What became of our swap: read back, bring our view up to date, and say whether it won."""
        try:
            seen = await read(self._bucket, self._prefix)
        except UnknownSchema as error:
            self._fence(f"a newer ckpt-sidecar: {error}")
        self._etag = seen.etag
        if seen.manifest is None or self._went_back(seen.manifest):
            # What we saw last is put back by the next try.
            flaw = seen.flaw or "it was replaced by an older copy"
            self._tell(Rebuilt(len(self.manifest.checkpoints), flaw))
            return False
        self._see(seen.manifest)
        return seen.manifest.write == token

    def _went_back(self, found: Manifest) -> bool:
        """Is what stands in the bucket older than what we saw there before?"""
        if (found.generation, found.holder) == (self.manifest.generation, self.manifest.holder):
            ours, theirs = self.manifest.newest, found.newest
            return ours is not None and (theirs is None or theirs.id < ours.id)
        return found.generation < self.manifest.generation

    def check_fence(self) -> None:
        """Raise FencedOff when what we have seen last is another's."""
        seen = self.manifest
        ours = seen.generation < self.generation or seen.holder == self._holder
        if self._holder is not None and not ours:
            self._fence()

    def _fence(self, who: str = "an unknown holder") -> NoReturn:
        generation, holder = self.manifest.generation, self.manifest.holder
        if holder and holder != self._holder:
            who = f"{holder.host} pid {holder.pid} (attempt {holder.attempt})"
        if not self._fenced:  # many may ask; it is said once
            self._fenced = True
            self._tell(Fenced(generation, who))
        raise FencedOff(generation, who)

    # --- claiming ---

    async def claim(
        self,
        holder: Holder,
        *,
        claimed_in: str = "",
        at_least: int = 0,
        durable: Id | None = None,
        take_over: bool = False,
    ) -> int:
        """Take the next generation, greater than `at_least`; return it.

        `claimed_in` is the attempt in which this spool has claimed before, "" for never; `durable` the newest
        that it knows to be committed. Raises FencedOff when another has claimed since in this same attempt
        (rule 3), unless a person says `take_over`.
        """
        await self.load(durable=durable)
        for tries in range(1, SWAP_TRIES + 1):
            other = self.manifest.holder
            displaced = claimed_in == holder.attempt and other is not None and other.spool != holder.spool
            if displaced and not take_over:
                self._fence()
            if await self._write([_Turn(lambda seen: claimed(seen, holder, at_least=at_least))]):
                break
            await self._times.sleep(retry_delay(tries, chance=self._times.chance(), cap=1.0))
        else:
            raise self._beaten()
        self.generation, self._holder = self.manifest.generation, holder
        self._tell(Claimed(self.generation, other.host if other else None))
        return self.generation

    # --- what others left (rule 5) ---

    async def settle_predecessors(self, resumed: Collection[str]) -> None:
        """Deal with every announced upload but those that we resume: abort it, or adopt what it became."""
        for upload in [each for each in self.manifest.uploads if each.upload_id not in resumed]:
            adopted = None
            try:
                await self._bucket.abort_multipart(Upload(upload.key, upload.upload_id))
                self._tell(UploadAborted(upload.name, upload.upload_id))
            except Missing as error:
                if error.reason == "bucket":
                    raise
                adopted = await self._completed(upload)
            await self._settled(upload, adopted)

    async def _completed(self, upload: Announced) -> Entry | None:
        """The entry of the object that the upload became, if it was completed."""
        ref = await self._bucket.head(upload.key)
        entry = described(ref, upload.name, self._times.wall()) if ref is not None else None
        return entry if entry is not None and entry.id == upload.id else None

    async def _settled(self, upload: Announced, adopted: Entry | None) -> None:
        def change(seen: Manifest) -> Manifest:
            seen = forgotten(seen, {upload.upload_id})
            return seen if adopted is None else committed(seen, adopted, history=self._history)

        await self.swap(change)
        if adopted is not None:
            self._tell(Adopted(adopted.id, adopted.name))

    async def adopt(self, entry: Entry) -> None:
        """Enter a checkpoint that was found completed but not committed."""
        await self.commit(entry)
        self._tell(Adopted(entry.id, entry.name))

    # --- a checkpoint's two entries ---

    async def announce(self, upload: Announced) -> None:
        """Enter a multipart upload; only once this returns may it be completed."""
        await self.swap(lambda seen: announced(seen, upload))

    async def forget(self, upload_id: str) -> None:
        """Take out an upload that was aborted, or that is gone.

        It is always written: an announcement that was given up may have landed without our knowledge.
        """
        await self.swap(lambda seen: forgotten(seen, {upload_id}))

    async def met(self, theirs: Entry) -> None:
        """A newer save than ours stands at its key: adopt it where it was never committed.

        Who sent it may have been fenced before it could commit. FencedOff if another holds the prefix.
        """
        if theirs.id.generation > self.generation:
            async with self._lock:
                await self._look(token="")
                self.check_fence()
        listed = self.manifest.entry_of(theirs.name)
        if listed is None or listed.id < theirs.id:
            await self.adopt(replace(theirs, stored_at=self._times.wall()))

    async def commit(self, entry: Entry) -> None:
        """Enter the checkpoint: when this returns it is durable."""
        await self.swap(lambda seen: committed(seen, entry, history=self._history))

    # --- retention (rule 9) ---

    async def expire(self, keep: int, *, spare: Callable[[str], bool]) -> list[Expiring]:
        """Let all but the newest `keep` checkpoints go; delete their objects, but not where `spare(key)`.

        `spare` says that a newer save of that key is under way. Returns what was deleted. A key that holds
        another object by now is left alone. What may not be deleted stays to be, and comes out once the
        others are.
        """
        if len(self.manifest.checkpoints) > keep:
            await self.swap(lambda seen: expired(seen, keep))
        gone: list[Expiring] = []
        refused: BucketError | None = None
        for each in [each for each in self.manifest.expiring if not spare(each.key)]:
            try:
                await self._delete(each)
                gone.append(each)
            except (Conflict, Denied, Refused) as error:
                refused = error
        if gone:
            await self.swap(lambda seen: deleted(seen, gone))
        if refused is not None:
            raise refused
        return gone

    async def _delete(self, each: Expiring) -> None:
        try:
            await self._bucket.delete(each.key, when=Unchanged(each.etag), version_id=each.version_id)
        except Missing:
            return  # gone already
        except Conflict:
            there = await self._bucket.head(each.key)
            if there is not None and there.etag == each.etag:
                raise  # the store was busy with it
