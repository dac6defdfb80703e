"""The life of a sidecar: claim, restore, ready, work, drain. The one owner of the event loop.

    services   the web server, from the first second to the last; the trainer, where it is our child
      take-in  pins what is saved, from before the claim to the last look after the stop, or fenced
      work     the workers, retention: until all is drained, the deadline, or fenced

Trouble that a rest may mend is handled where it happens. Whatever else comes out of a task ends the
process: the journal makes a restart safe, a half-dead daemon is not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

from ckpt_sidecar.bucket import PART_BYTES, BucketError, Refused, Upload
from ckpt_sidecar.checkpoint import Book, Uploading
from ckpt_sidecar.child import Child
from ckpt_sidecar.disk import mend_of
from ckpt_sidecar.document import UnknownSchema
from ckpt_sidecar.events import Drained, Draining, Event, Failed, Interruption, NotReady, Probed, Ready
from ckpt_sidecar.formats import Rules, flaw_of
from ckpt_sidecar.landing import Landing, NoRoom
from ckpt_sidecar.ledger import FencedOff, Ledger, Times
from ckpt_sidecar.manifest import Holder
from ckpt_sidecar.names import HOME, NOTICE_NAME
from ckpt_sidecar.patience import PatientBucket
from ckpt_sidecar.pipeline import Keep, Pipeline
from ckpt_sidecar.policy import drain_order, retry_delay
from ckpt_sidecar.restorer import NothingRestored, Restorer
from ckpt_sidecar.settings import Settings
from ckpt_sidecar.spool import Spool
from ckpt_sidecar.watcher import Watcher

Service = Callable[[], Coroutine[None, None, None]]
NOTICE_RESCAN_SECONDS = 5.0  # then no save may be found late only because its event was lost
OVERTIME = 2.0  # seconds after the drain deadline for whoever works to hear that it is over


class Exit(IntEnum):
    """Exit codes; 2 (usage) is the command line's."""

    DURABLE = 0
    ERROR = 1
    NOT_DURABLE = 3
    FENCED = 4
    NOTHING_RESTORED = 5
    CRASHED = 70  # EX_SOFTWARE of sysexits.h


@dataclass(frozen=True, slots=True)
class End:
    """How it ended: the exit code, and in words for the log and the pod's termination message."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class World:
    """What is outside: the bucket, time and chance, who we are, and who listens to events.

    `seconds` is monotonic. `me` is this process as the manifest names it (its spool is filled in). `leave`
    ends the process at once: for a drain that is over while a thread still waits for a dead socket or disk.
    """

    bucket: PatientBucket
    times: Times
    seconds: Callable[[], float]
    me: Holder
    tell: Callable[[Event], None]
    leave: Callable[[End], None] = lambda _: None


class Sidecar:
    """One life. `stop` asks for the drain, `hurry` ends it at once."""

    def __init__(self, settings: Settings, world: World, *, spool: Spool, book: Book) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self._settings = settings
        self._world = world
        self._spool = spool
        self._holder = _named(world.me, spool.record.spool)
        self._claimed_in = spool.record.attempt
        self._landing = Landing(settings.watch)
        self._failed_restore = ""
        self._trained = 0
        self._taking: asyncio.Task[None] | None = None
        self._not_ready = "the bucket had not answered yet"
        self._ledger = Ledger(
            world.bucket,
            prefix=settings.prefix,
            times=world.times,
            tell=world.tell,
            history=settings.history,
        )
        self._watcher = Watcher(
            settings.watch,
            Rules(settings.pattern, settle=settings.settle),
            catcher=spool,
            known=spool.known.is_known,
            tell=world.tell,
            rescan_every=settings.rescan_every,
            clock=world.seconds,
            wall=lambda: world.times.wall() / 1e9,
        )
        self._pipeline = Pipeline(
            world.bucket,
            spool,
            landing=self._landing,
            ledger=self._ledger,
            watcher=self._watcher,
            book=book,
            prefix=settings.prefix,
            part_bytes=PART_BYTES,
            workers=settings.workers,
            keep=Keep(settings.keep_local, settings.keep_remote),
            times=world.times,
            seconds=world.seconds,
            tell=world.tell,
        )

    async def run(self, *beside: Service, child: Child | None = None) -> End:
        """Live until stopped, or until the child has ended; `beside` run as long. Return how it ended."""
        async with asyncio.TaskGroup() as group:
            services = [group.create_task(self._overdue(), name="overdue")]
            services += [group.create_task(each(), name=each.__name__) for each in beside]
            try:
                return await self._live(child)
            finally:
                self._watcher.close()
                for service in services:
                    service.cancel()

    async def noticed(self, notice: Interruption | None) -> None:
        """Be told that the node will be taken away: send the newest alone, now. None: it will not."""
        text = None
        if notice is not None:
            self._world.tell(notice)
            self._pipeline.hurry()
            self._watcher.hurry(NOTICE_RESCAN_SECONDS)
            text = json.dumps(notice.note) + "\n"
        try:
            await asyncio.to_thread(self._landing.notice, text)
        except OSError as error:
            self._world.tell(Failed("notices", "disk", NOTICE_NAME, str(error)))

    async def _live(self, child: Child | None) -> End:
        await self._take_up()
        async with asyncio.TaskGroup() as group:
            self._taking = group.create_task(self._pipeline.take_in(self.stop), name="take-in")
            try:
                return await self._beside(self._taking, child)
            finally:
                self._taking.cancel()

    async def _beside(self, taking: asyncio.Task[None], child: Child | None) -> End:
        """Claim, restore, work and drain, while whatever is saved is pinned."""
        try:
            if not await self._unless_stopped(self._prepare()):
                await self._last_look(taking)
                end = self._end()
                return End((child.stopped if child else 0) or end.code, end.reason)
        except FencedOff as fenced:
            return await self._hold(fenced, child)
        if child is None:
            return await self._work_or_hold()
        if self._failed_restore:
            return End(Exit.NOTHING_RESTORED, self._failed_restore)
        async with asyncio.TaskGroup() as beside:
            training = beside.create_task(self._train(child), name="child")
            end = await self._work_or_hold()
        return End(training.result() or end.code, end.reason)

    async def _last_look(self, taking: asyncio.Task[None]) -> None:
        """Let what was saved be pinned, for the next life; not longer than a drain, or until hurried."""
        hurried = asyncio.ensure_future(self.hurry.wait())
        try:
            ends, longest = {taking, hurried}, self._settings.drain_timeout + self._settings.settle
            await asyncio.wait(ends, timeout=longest, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurried.cancel()

    async def _train(self, child: Child) -> int:
        try:
            self._trained = await child.run()
            return self._trained
        finally:
            self.stop.set()

    # --- before ready ---

    async def _take_up(self) -> None:
        """What the spool holds, and what lies in the watch dir: numbered before the claim (rule 4)."""
        self._landing.clear()
        self._pipeline.recover()
        self._watcher.start()
        await self._pipeline.pin(await self._watcher.first(self.stop))

    async def _prepare(self) -> None:
        """Claim, deal with what predecessors left, restore; repeated until the bucket lets us."""
        started = self._world.seconds()
        tries = 0
        while True:
            try:
                await self._claim()
                await self._restore()
                break
            except (BucketError, UnknownSchema, NoRoom, OSError) as error:
                tries += 1
                self._say_not_ready(error)
                await self._world.times.sleep(retry_delay(tries, chance=self._world.times.chance(), base=1.0))
        self._not_ready = ""
        if not self._failed_restore:
            self._world.tell(Ready(self._world.seconds() - started))

    def _say_not_ready(self, error: Exception) -> None:
        reason = error.reason if isinstance(error, BucketError | UnknownSchema) else "disk"
        hint = mend_of(error) if isinstance(error, OSError) else getattr(error, "hint", "")
        self._world.tell(Failed("start", reason, self._settings.target, str(error), hint))
        self._not_ready = str(error)
        self._world.tell(NotReady(self._not_ready))

    async def _claim(self) -> None:
        generation = self._ledger.generation or await self._claim_next()
        # Before anything is sent by it: else what the next life finds would be numbered before that.
        await asyncio.to_thread(self._spool.claimed, generation=generation, attempt=self._holder.attempt)

    async def _claim_next(self) -> int:
        settings, record = self._settings, self._spool.record
        bucket = self._world.bucket
        abilities = await bucket.probe(f"{settings.prefix}{HOME}/probe-{record.spool}")
        self._world.tell(Probed(abilities))
        if not abilities.conditional_put and not settings.allow_unfenced:
            raise Refused(
                "this store has no conditional writes, so two sidecars at once could not notice each other",
                hint="use a store that has them, or say --allow-unfenced",
            )
        return await self._ledger.claim(
            self._holder,
            claimed_in=self._claimed_in,
            at_least=record.generation,
            durable=self._spool.known.newest,
            take_over=settings.take_over,
        )

    async def _restore(self) -> None:
        states = [each.state for each in self._pipeline.book]
        resumed = {id_ for state in states if isinstance(state, Uploading) for id_ in state.upload_ids if id_}
        await self._ledger.settle_predecessors(resumed)
        restorer = Restorer(
            self._world.bucket,
            self._landing,
            known=self._spool.known,
            workers=self._settings.workers,
            part_bytes=PART_BYTES,
            flaw_of=flaw_of,
            seconds=self._world.seconds,
            tell=self._world.tell,
        )
        try:
            outcome = await restorer.restore(self._ledger.manifest, self._pipeline.book)
        except NothingRestored as error:
            # What the trainer saves is still made durable; but nobody is told that this is a good start.
            self._failed_restore = str(error)
            self._world.tell(NotReady(str(error)))
            return
        if outcome.adopted is not None:
            await self._ledger.adopt(outcome.adopted)

    async def _unless_stopped(self, work: Awaitable[None]) -> bool:
        """Do the work, or give it up when the stop comes first; was it done?"""
        working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
            return working.done()
        finally:
            for task in (working, stopping):
                task.cancel()
            await asyncio.wait({working})  # not `await working`: a cancel of ours is no cancel of the work
            if not working.cancelled():
                working.result()

    # --- work and drain ---

    async def _work_or_hold(self) -> End:
        try:
            await self._work()
        except* FencedOff as group:
            fenced = group.exceptions[0]
        else:
            return self._end()
        while isinstance(fenced, BaseExceptionGroup):
            fenced = fenced.exceptions[0]
        return await self._hold(fenced)

    async def _work(self) -> None:
        deadline = asyncio.timeout(None)
        with suppress(TimeoutError):
            async with deadline, asyncio.TaskGroup() as work:
                draining = work.create_task(self._arm(deadline), name="drain")
                retaining = work.create_task(self._pipeline.retain(), name="retention")
                async with asyncio.TaskGroup() as workers:
                    for n in range(self._settings.workers):
                        workers.create_task(self._pipeline.work(), name=f"upload-{n}")
                await self._pipeline.retain_once()
                draining.cancel()
                retaining.cancel()

    async def _arm(self, deadline: asyncio.Timeout) -> None:
        """Once a stop is asked for, so many seconds are left; none when it is asked for again."""
        await self.stop.wait()
        now = asyncio.get_running_loop().time()
        deadline.reschedule(now + self._settings.drain_timeout)
        self._world.tell(Draining(self._settings.drain_timeout, len(self._pipeline.book)))
        await self.hurry.wait()
        deadline.reschedule(now)

    async def _overdue(self) -> None:
        """End without those who do not hear that the drain is over: a kill is safe, and so is this."""
        await self.stop.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout):
                await self.hurry.wait()
        await asyncio.sleep(OVERTIME + self._settings.settle)
        end = self._end()
        self._world.leave(End(self._trained or end.code, end.reason))

    def _end(self) -> End:
        left = (*(each.name for each in drain_order(self._pipeline.book)), *self._watcher.undecided())
        self._world.tell(Drained(left))
        if left:
            return End(Exit.NOT_DURABLE, f"not durable at the drain deadline: {', '.join(left[:20])}")
        if self._failed_restore:
            return End(Exit.NOTHING_RESTORED, self._failed_restore)
        if self._not_ready:
            return End(Exit.DURABLE, f"nothing was saved, and it never became ready: {self._not_ready}")
        return End(Exit.DURABLE, "all checkpoints are durable")

    # --- fenced ---

    async def _abort_own(self) -> None:
        """Throw away our uploads that the holder cannot know of; it has dealt with the announced ones."""
        for checkpoint in self._pipeline.book:
            if isinstance(checkpoint.state, Uploading):
                for upload_id in filter(None, checkpoint.state.upload_ids):
                    with suppress(BucketError):
                        key = self._settings.prefix + checkpoint.name
                        await self._world.bucket.abort_multipart(Upload(key, upload_id))

    async def _hold(self, fenced: FencedOff, child: Child | None = None) -> End:
        """Stay alive, harmless and visible: an exit would only be restarted, into a duel (rule 2).

        A child that has not been started never will be: then there is nothing to stay for.
        """
        if self._taking is not None:
            self._taking.cancel()
        await self._abort_own()
        await asyncio.to_thread(self._watcher.close)  # what nobody will send must not fill the trainer's disk
        self._world.tell(NotReady(str(fenced)))
        if child is None:
            await self.stop.wait()
        return End(Exit.FENCED, str(fenced))


def _named(me: Holder, spool: str) -> Holder:
    return Holder(spool, me.attempt, me.host, me.pid, me.since)
