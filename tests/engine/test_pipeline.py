"""From found to durable: the newest first, nothing let go before it is safe, nobody held up by another."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt_sidecar.bucket import MIB, Absent, Bucket, Conflict, Denied, ObjectRef, Unreachable
from ckpt_sidecar.checkpoint import (
    Book,
    Changed,
    Checkpoint,
    Committed,
    File,
    Id,
    Skipped,
    Stored,
    Superseded,
    Uploading,
    advance,
    state_name,
)
from ckpt_sidecar.events import Deleted, Failed, Moved, PinnedByDescriptor, Progress, Rescanned, Retrying
from ckpt_sidecar.formats import Rules
from ckpt_sidecar.landing import Landing
from ckpt_sidecar.ledger import FencedOff, Ledger
from ckpt_sidecar.patience import PatientBucket
from ckpt_sidecar.pipeline import Keep, Pipeline
from ckpt_sidecar.policy import Supersede, Upload, next_step
from ckpt_sidecar.spool import Spool
from ckpt_sidecar.watcher import Found, Watcher
from tests.engine.support import (
    LATEST,
    PREFIX,
    Hurt,
    Steps,
    Told,
    holder,
    ledger_of,
    listed,
    manifest_in,
    opened_spool,
    save,
    times,
)
from tests.fakes import MemoryBucket

LARGE = random.Random(9).randbytes(6 * MIB)  # two parts


class Line:
    """All between a watch dir and a bucket, as one sidecar has it."""

    def __init__(
        self,
        root: Path,
        memory: MemoryBucket | None = None,
        *,
        bucket: Bucket | None = None,
        workers: int = 2,
        keep: Keep | None = None,
        rules: Rules | None = None,
        rescan_every: float = 3600.0,
        events: bool = False,
    ) -> None:
        self.root = root
        self.memory = memory or MemoryBucket()
        self.steps = Steps(bucket or self.memory)
        self.disk = Hurt()
        self.told = Told()
        self.workers = workers
        self.stop = asyncio.Event()
        self.spool: Spool = opened_spool(root, disk=self.disk)
        self.ledger: Ledger = ledger_of(self.steps, self.told)
        bucket = PatientBucket(
            self.steps, sleep=lambda _: asyncio.sleep(0), chance=lambda: 0.0, tell=self.told, tries=2
        )
        self.watcher = Watcher(
            root,
            rules or Rules(settle=0.0, patience=0.1),
            catcher=self.spool,
            known=self.spool.known.is_known,
            tell=self.told,
            rescan_every=rescan_every,
            clock=time.monotonic,
            wall=time.time,
            events=events,
        )
        self.pipeline = Pipeline(
            bucket,
            self.spool,
            landing=Landing(root, self.disk),
            ledger=self.ledger,
            watcher=self.watcher,
            book=Book(),
            prefix=PREFIX,
            part_bytes=5 * MIB,
            workers=workers,
            keep=keep or Keep(),
            times=times(chance=0.002),
            seconds=time.monotonic,
            tell=self.told,
        )

    async def save(self, name: str, content: bytes = b"", *, at: int = 0) -> File:
        """Save a file, and have it found."""
        file = save(self.root, name, content or name.encode(), at=at)
        caught = self.spool.catch(name)
        assert caught is not None
        await self.pipeline.pin([Found(caught, file)])
        return file

    async def drain(self) -> None:
        """Work until all is durable; retention is not run."""
        self.stop.set()
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(self.pipeline.take_in(self.stop))
            for _ in range(self.workers):
                group.create_task(self.pipeline.work())

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Work while something is looked at, then drain."""
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(self.pipeline.take_in(self.stop))
            for _ in range(self.workers):
                group.create_task(self.pipeline.work())
            await self.told.until(lambda: self.told.of(Rescanned))  # or it would find what is saved by hand
            try:
                yield
            finally:
                self.stop.set()

    def fates(self, state: type) -> list[str]:
        """The names of the checkpoints that came to that, in order."""
        moves = self.told.of(Moved)
        return [each.checkpoint.name for each in moves if isinstance(each.checkpoint.state, state)]

    def committed(self, *names: str) -> Callable[[], bool]:
        """Ask whether these have been committed."""
        return lambda: set(names) <= set(self.fates(Committed))

    @property
    def pins(self) -> list[str]:
        """What the spool still holds."""
        return sorted(path.name for path in (self.spool.home / "pins").iterdir())

    def body(self, name: str) -> bytes:
        """Return what the bucket has."""
        return self.memory.body(PREFIX + name)


Make = Callable[..., AbstractAsyncContextManager[Line]]


@pytest.fixture
def line(tmp_path: Path) -> Make:
    """Make one that has claimed; its spool is closed afterwards."""

    @asynccontextmanager
    async def make(**more: object) -> AsyncIterator[Line]:
        made = Line(tmp_path, **more)  # type: ignore[arg-type]
        generation = await made.ledger.claim(holder())
        made.spool.claimed(generation=generation, attempt="attempt-1")
        try:
            yield made
        finally:
            made.watcher.close()
            made.spool.close()

    return make


# --- the way -----------------------------------------------------------------------------------------


async def test_what_is_saved_becomes_durable_and_its_pin_goes(line: Make) -> None:
    """Object, entry, and only then no pin any more; the trainer's file stays."""
    async with line() as it:
        small = await it.save("small.pt")
        large = await it.save("large.pt", LARGE, at=1)
        await it.drain()
        assert listed(it.memory) == ["1-2 large.pt", "1-1 small.pt"]
        assert (it.body("small.pt"), it.body("large.pt")) == (b"small.pt", LARGE)
        assert it.pins == []
        assert it.spool.known.durable_files() == {Id(1, 1): small, Id(1, 2): large}
        assert sorted(path.name for path in it.root.glob("*.pt")) == ["large.pt", "small.pt"]
        assert repr(it.pipeline.book) == "<0 checkpoints: none on its way; 0 B>"


@pytest.mark.fault("H2")
async def test_the_newest_goes_first(line: Make) -> None:
    """A backlog goes up from the newest to the oldest."""
    async with line(workers=1) as it:
        for n in range(5):
            await it.save(f"{n}.pt", at=n)
        await it.drain()
        assert it.fates(Committed) == ["4.pt", "3.pt", "2.pt", "1.pt", "0.pt"]


@pytest.mark.fault("H2")
async def test_a_newer_one_overtakes_the_backlog(line: Make) -> None:
    """What is saved while a backlog is sent goes next, before what is older."""
    async with line(workers=1) as it:
        for n in range(3):
            await it.save(f"{n}.pt", at=n)
        gate = it.steps.hold("put", "2.pt")
        async with it.working():
            await gate.reached.wait()
            await it.save("9.pt", at=9)
            gate.opened.set()
        assert it.fates(Committed) == ["2.pt", "9.pt", "1.pt", "0.pt"]


@pytest.mark.fault("A16")
async def test_a_batch_is_numbered_in_the_order_in_which_it_was_found(line: Make) -> None:
    """The watcher knows what came first; the trainer's clock may have been set back in between."""
    async with line() as it:
        found = []
        for name, at in (("b.pt", 2), ("c.pt", 3), ("a.pt", 1)):
            file = save(it.root, name, name.encode(), at=at)
            caught = it.spool.catch(name)
            assert caught is not None
            found.append(Found(caught, file))
        await it.pipeline.pin(found)
        assert [each.name for each in it.pipeline.book] == ["b.pt", "c.pt", "a.pt"]
        await it.drain()


async def test_no_pin_is_let_go_before_the_commit(line: Make) -> None:
    """The object is whole in the bucket, the entry is not: the pin stays."""
    async with line() as it:
        await it.save("x.pt")
        gate = it.steps.hold("put", "latest.json")
        async with it.working():
            await gate.reached.wait()
            assert it.body("x.pt") == b"x.pt"
            assert it.pins == ["1-1", "1-1.json"]
            assert it.fates(Committed) == []
            gate.opened.set()
        assert it.pins == []


# --- one name again and again ------------------------------------------------------------------------


@pytest.mark.fault("A6")
async def test_of_one_name_only_the_newest_in_line_is_sent(line: Make) -> None:
    """last.pt is replaced faster than we upload: what lies in between is superseded, and said."""
    async with line(workers=1) as it:
        for n in range(5):
            await it.save("last.pt", b"save %d" % n, at=n)
        await it.drain()
        assert it.body("last.pt") == b"save 4"
        assert listed(it.memory) == ["1-5 last.pt"]
        assert it.fates(Superseded) == ["last.pt"] * 4
        assert [each.bytes for each in it.told.of(Progress)] == [6]
        assert it.pins == []


@pytest.mark.fault("A6")
async def test_an_upload_under_way_is_finished_before_the_next_of_its_name(line: Make) -> None:
    """There is one upload at a time for each key, and it is not thrown away because a newer save came."""
    async with line(workers=3) as it:
        await it.save("last.pt", b"first")
        gate = it.steps.hold("put", "last.pt")
        async with it.working():
            await gate.reached.wait()
            for n in range(1, 4):
                await it.save("last.pt", b"save %d" % n, at=n)
            await it.save("other.pt")
            await it.told.until(it.committed("other.pt"))
            assert "job/last.pt" not in it.memory.objects
            gate.opened.set()
        assert it.fates(Committed) == ["other.pt", "last.pt", "last.pt"]
        assert it.body("last.pt") == b"save 3"
        assert listed(it.memory) == ["1-5 other.pt", "1-4 last.pt"]


async def test_an_upload_that_had_begun_is_aborted_before_its_successor_begins(line: Make) -> None:
    """Of the older save no upload and no announcement is left."""
    async with line(workers=1) as it:
        await it.save("last.pt", LARGE)
        it.steps.fail("part", Unreachable("reset"), times=999)
        async with it.working():
            await it.told.until(lambda: it.told.of(Retrying)[2:])
            await it.save("last.pt", b"newer", at=1)
        assert it.body("last.pt") == b"newer"
        assert it.memory.uploads == {}
        assert manifest_in(it.memory).uploads == ()
        assert it.fates(Superseded) == ["last.pt"]


async def test_an_abort_that_is_refused_holds_up_only_its_name(line: Make) -> None:
    """Until it is answered the next of that name waits; others go on, and it is not asked without end."""
    async with line(workers=1) as it:
        await it.save("last.pt", LARGE)
        it.steps.fail("part", Unreachable("reset"), times=99)
        it.steps.fail("abort", Denied("not allowed"), times=99)
        async with it.working():
            await it.told.until(lambda: it.told.of(Retrying)[2:])
            await it.save("last.pt", b"newer", at=1)
            await it.told.until(lambda: it.told.of(Failed))
            await it.save("other.pt", at=2)
            await it.told.until(it.committed("other.pt"))
            assert "job/last.pt" not in it.memory.objects
            it.steps.relent()
            await it.told.until(it.committed("last.pt"))
        assert it.body("last.pt") == b"newer"
        assert it.memory.uploads == {}


def book_of(*waiting: Checkpoint) -> Book:
    """Return the book that has these."""
    book = Book()
    for each in waiting:
        book.put(each)
    return book


def test_a_supersede_that_failed_rests_and_keeps_its_name() -> None:
    """Neither is it asked for at every moment, nor does the successor overtake it."""
    old, new, other = (
        Checkpoint(Id(1, n), name, (File(name, 1, n),), n) for n, name in enumerate(["a.pt", "a.pt", "b.pt"])
    )
    resting = {old.id: 5.0}
    assert next_step(book_of(old, new, other), busy=(), resting=resting, now=1.0) == Upload(other)
    assert next_step(book_of(old, new), busy=(), resting=resting, now=1.0) is None
    assert next_step(book_of(old, new), busy=(), resting=resting, now=5.0) == Supersede(old, new.id)


# --- trouble -----------------------------------------------------------------------------------------


@pytest.mark.fault("C15")
async def test_a_bucket_that_goes_and_comes_back_costs_nothing(line: Make) -> None:
    """Everything rests, is told, and becomes durable once the bucket answers again."""
    async with line() as it:
        names = [f"{n}.pt" for n in range(4)]
        for verb in ("put", "head", "get"):
            it.steps.fail(verb, Unreachable("no route", reason="connection"), times=999)
        async with it.working():
            for n, name in enumerate(names):
                await it.save(name, at=n)
            await it.told.until(lambda: len(it.told.of(Retrying)) > 20)
            assert len(it.pipeline.book) == 4
            it.steps.relent()
            await it.told.until(it.committed(*names))
        assert sorted(it.memory.objects) == [*(PREFIX + name for name in names), LATEST]
        assert it.pins == []


@pytest.mark.fault("C12")
async def test_one_key_that_is_denied_holds_up_no_other(line: Make) -> None:
    """An explicit deny on one key is named; the others become durable meanwhile."""
    async with line(workers=1) as it:
        it.steps.fail("put", Denied("explicit deny", hint="allow s3:PutObject"), "no.pt", times=999)
        async with it.working():
            await it.save("a.pt", at=1)
            await it.save("no.pt", at=2)
            await it.save("b.pt", at=3)
            await it.told.until(it.committed("a.pt", "b.pt"))
            await it.told.until(lambda: it.told.of(Failed))
            assert [each.name for each in it.pipeline.book] == ["no.pt"]
            assert it.told.of(Failed)[0] == Failed(
                "upload", "denied", "no.pt", "explicit deny", "allow s3:PutObject"
            )
            it.steps.relent()
        assert it.fates(Committed)[-1] == "no.pt"


@pytest.mark.fault("D7")
async def test_what_is_stored_is_not_sent_again_for_a_commit(line: Make) -> None:
    """The swap fails again and again: the object stays, and only the swap is repeated."""
    async with line() as it:
        it.steps.fail("put", Conflict("beaten"), "latest.json", times=50)
        await it.save("x.pt")
        await it.drain()
        assert it.fates(Stored) == ["x.pt"]
        assert [each.bytes for each in it.told.of(Progress)] == [4]
        assert listed(it.memory) == ["1-1 x.pt"]


def test_what_is_stored_is_committed_before_anything_newer_is_sent() -> None:
    """One swap makes it durable: that is done first when time is short."""
    old, new = (Checkpoint(Id(1, n), f"{n}.pt", (File(f"{n}.pt", 1, n),), n) for n in (1, 2))
    stored = advance(old, Stored((ObjectRef("job/1.pt", 1, "etag"),)))
    assert next_step(book_of(new, stored), busy=(), resting={}, now=1.0) == Upload(stored)
    assert next_step(book_of(new, stored), busy=(), resting={old.id: 2.0}, now=1.0) == Upload(new)


async def test_a_stop_ends_every_rest(line: Make) -> None:
    """What rests for minutes, because the bucket was away for long, is tried at once when it is to end."""
    async with line() as it:
        await it.save("x.pt")
        (checkpoint,) = it.pipeline.book
        it.pipeline._rests.after(checkpoint.id, unanswered=False, least=3600.0)
        await it.drain()
        assert it.committed("x.pt")()


@pytest.mark.fault("A7")
async def test_bytes_that_change_are_taken_up_again(line: Make) -> None:
    """A file rewritten in place under the upload: nothing torn is stored, the new bytes are."""
    async with line() as it:
        gate = it.steps.hold("put", "x.pt")
        async with it.working():
            await it.save("x.pt", b"weights")
            await gate.reached.wait()
            (it.root / "x.pt").write_bytes(b"new weights")
            gate.opened.set()
            await it.told.until(it.committed("x.pt"))
        assert it.body("x.pt") == b"new weights"
        assert listed(it.memory) == ["1-2 x.pt"]
        assert it.pins == []


@pytest.mark.fault("A7")
async def test_a_save_that_came_while_the_one_before_it_changed_is_not_put_behind_it(line: Make) -> None:
    """Rewritten under its upload, replaced, deleted: what stood there last is what is durable in the end."""
    async with line(workers=1) as it:
        await it.save("last.pt", LARGE)
        gate = it.steps.hold("part", "last.pt")
        async with it.working():
            await gate.reached.wait()
            with (it.root / "last.pt").open("r+b") as file:
                file.write(b"changed")
            await it.save("last.pt", b"newer", at=1)
            (it.root / "last.pt").unlink()
            gate.opened.set()
            await it.told.until(it.committed("last.pt"))
        assert it.fates(Changed) == ["last.pt"]
        assert it.body("last.pt") == b"newer"
        assert it.memory.uploads == {}
        assert it.pins == []


@pytest.mark.fault("B3")
async def test_a_spool_that_somebody_removed_costs_no_file_that_stands(line: Make) -> None:
    """The pin is gone, the trainer's file is not: that is taken up in its place, and it is said."""
    async with line() as it:
        await it.save("x.pt", b"weights")
        await it.save("gone.pt", b"weights")
        it.disk.remove_tree(it.spool.home)
        (it.root / "gone.pt").unlink()
        async with it.working():
            await it.told.until(it.committed("x.pt"))
        assert it.body("x.pt") == b"weights"
        assert {each.what for each in it.told.of(Failed)} == {"x.pt", "gone.pt"}
        assert "do not remove .ckpt-sidecar" in it.told.of(Failed)[0].hint
        assert len(it.pipeline.book) == 0


async def test_what_cannot_be_held_by_a_link_is_said_and_sent(line: Make) -> None:
    """A descriptor holds it, which a crash would lose: the log says so."""
    async with line() as it:
        it.disk.refuse["link"] = OSError(1, "not permitted")
        await it.save("x.pt", b"weights")
        (it.root / "x.pt").unlink()
        await it.drain()
        assert it.body("x.pt") == b"weights"
        assert [each.name for each in it.told.of(PinnedByDescriptor)] == ["x.pt"]


async def test_who_is_fenced_ends_and_keeps_its_pins(line: Make) -> None:
    """Another has claimed: the error comes out of the workers, and nothing was let go."""
    async with line() as it:
        await ledger_of(it.memory, Told()).claim(holder("spool-b"))
        await it.save("x.pt")
        with pytest.raises(ExceptionGroup) as failed:
            await it.drain()
        assert failed.group_contains(FencedOff)
        assert it.pins == ["1-1", "1-1.json"]
        assert listed(it.memory) == []


# --- what a restart finds ----------------------------------------------------------------------------


async def restarted(it: Line, **more: object) -> Line:
    """Return the line of the next process, which has claimed and recovered."""
    it.spool.close()
    after = Line(it.root, it.memory, **more)  # type: ignore[arg-type]
    after.pipeline.recover()
    after.spool.claimed(generation=await after.ledger.claim(holder()), attempt="attempt-1")
    return after


async def test_a_restart_goes_on_with_what_was_on_its_way(line: Make) -> None:
    """Pinned, uploading, stored but not committed: each becomes durable once, under its own id."""
    async with line() as it:
        await it.save("pinned.pt")
        await it.save("uploading.pt", LARGE, at=1)
        await it.save("stored.pt", at=2)
        it.steps.fail("put", Unreachable("no route"), "latest.json", times=999)
        it.steps.fail("put", Unreachable("no route"), "pinned.pt", times=999)
        working = asyncio.ensure_future(it.drain())
        await it.told.until(
            lambda: it.fates(Stored) == ["stored.pt"] and it.fates(Uploading) == ["uploading.pt"]
        )
        working.cancel()
        await asyncio.wait([working])
        after = await restarted(it)
        assert sorted(state_name(each.state) for each in after.pipeline.book) == [
            "pinned",
            "pinned",
            "uploading",
        ]
        await after.drain()
        assert listed(it.memory) == ["1-3 stored.pt", "1-2 uploading.pt", "1-1 pinned.pt"]
        assert it.body("uploading.pt") == LARGE
        assert it.memory.uploads == {}
        assert after.pins == []
        assert [each.name for each in after.told.of(Progress) if each.name == "stored.pt"] == []
        after.spool.close()


async def test_a_pin_that_was_rewritten_and_has_lost_its_entry_is_judged_anew(line: Make) -> None:
    """Killed between pin and entry, or between the end of either: half a file is no checkpoint."""
    async with line() as it:
        await it.save("x.pt")
        (it.spool.home / "pins" / "1-1.json").unlink()
        (it.root / "x.pt").write_bytes(b"")  # the next save in place has just begun
        after = await restarted(it)
        assert len(after.pipeline.book) == 0
        assert after.pins == []
        assert [path.name for path in (it.spool.home / "caught").rglob("*.pt")] == ["x.pt"]
        await after.drain()
        assert it.memory.objects.keys() == {LATEST}
        after.spool.close()


async def unpinned(it: Line, name: str) -> Found:
    """Save a file that the disk does not let be pinned."""
    file = save(it.root, name, b"older")
    caught = it.spool.catch(name)
    assert caught is not None
    it.disk.refuse["rename"] = OSError(28, "no space left on device")
    await it.pipeline.pin([Found(caught, file)])
    it.disk.refuse.clear()
    return Found(caught, file)


@pytest.mark.fault("E4")
async def test_what_the_disk_let_be_pinned_late_keeps_its_place(line: Make) -> None:
    """A newer save was pinned meanwhile: that one stays the newest."""
    async with line() as it:
        old = await unpinned(it, "old.pt")
        await it.save("new.pt", at=1)
        await it.pipeline.pin([old])
        await it.drain()
        assert listed(it.memory) == ["1-2 new.pt", "1-1 old.pt"]


@pytest.mark.fault("E4")
@pytest.mark.parametrize("name", ["old.pt", "last.pt"])
async def test_what_a_life_could_not_pin_is_not_the_newest_of_the_next(line: Make, name: str) -> None:
    """Held, never pinned, and deleted by the trainer: it comes before what was durable by then."""
    async with line() as it:
        await unpinned(it, name)
        await it.save("last.pt", b"newer", at=1)
        await it.drain()
        (it.root / "last.pt").unlink()
        (it.root / "old.pt").unlink(missing_ok=True)
        after = await restarted(it)
        await after.drain()
        assert [each.name for each in manifest_in(it.memory).checkpoints] == [
            *dict.fromkeys(["last.pt", name])
        ]
        assert it.body("last.pt") == b"newer"
        assert name == "last.pt" or it.body(name) == b"older"
        assert after.pins == []
        assert list((it.spool.home / "caught").iterdir()) == []
        after.spool.close()


@pytest.mark.fault("A7")
async def test_a_pin_that_could_not_be_let_go_and_was_written_anew_gets_an_id_of_its_own(line: Make) -> None:
    """Durable, its pin refused to go, the next save in place, a crash: one id is never two saves."""
    async with line() as it:
        await it.save("x.pt", b"weights")
        it.disk.refuse["remove_tree"] = OSError(28, "no space left on device")
        async with it.working():
            await it.told.until(lambda: it.told.of(Failed))
        it.disk.refuse.clear()
        (it.root / "x.pt").write_bytes(b"new weights")
        after = await restarted(it)
        await after.drain()
        (entry,) = manifest_in(it.memory).checkpoints
        assert entry.id > Id(1, 1)
        assert it.body("x.pt") == b"new weights"
        assert after.pins == []
        after.spool.close()


async def test_what_was_caught_last_is_the_newest_although_it_is_gone(line: Make) -> None:
    """Killed before it was pinned, and deleted by the trainer: it is newer than all that was durable."""
    async with line() as it:
        await it.save("old.pt")
        await it.drain()
        save(it.root, "new.pt", b"newer", at=1)
        assert it.spool.catch("new.pt")
        (it.root / "new.pt").unlink()
        after = await restarted(it)
        await after.drain()
        assert [each.name for each in manifest_in(it.memory).checkpoints] == ["new.pt", "old.pt"]
        after.spool.close()


async def test_a_restart_between_commit_and_release_commits_nothing_twice(line: Make) -> None:
    """The entry is there, the pin still is: the pin goes, and the file is known as durable."""
    async with line() as it:
        file = await it.save("x.pt")
        it.steps.lose("put", "latest.json")
        for verb in ("get", "put"):
            it.steps.fail(verb, Unreachable("no route"), "latest.json", times=999)
        working = asyncio.ensure_future(it.drain())
        await it.told.until(lambda: it.told.of(Retrying))
        working.cancel()
        await asyncio.wait([working])
        assert listed(it.memory) == ["1-1 x.pt"]
        assert it.pins == ["1-1", "1-1.json"]
        after = await restarted(it)
        await after.drain()
        assert listed(it.memory) == ["1-1 x.pt"]
        assert after.told.of(Progress) == []
        assert after.pins == []
        assert after.spool.known.durable_files() == {Id(1, 1): file}
        after.spool.close()


@pytest.mark.parametrize("end", [Skipped, Superseded])
async def test_what_is_not_sent_after_all_leaves_no_upload_behind(line: Make, end: type) -> None:
    """Killed between create and the journal of its id, and then not sent: nobody else knows of it."""
    async with line() as it:
        await it.save("old.pt", at=1)
        await it.save("new.pt" if end is Skipped else "old.pt", b"newer", at=2)
        it.spool.write(replace(next(iter(it.pipeline.book)), state=Uploading((None,))))
        await it.memory.create_multipart(PREFIX + "old.pt", metadata={})
        after = await restarted(it, keep=Keep(remote=1), workers=1)
        await after.drain()
        assert after.fates(end) == ["old.pt"]
        assert it.memory.uploads == {}
        after.spool.close()


@pytest.mark.fault("D5")
async def test_a_wiped_spool_does_not_send_what_is_durable(line: Make) -> None:
    """The files are there, the bucket knows them: none is sent again, all are known as durable."""
    async with line() as it:
        await it.save("a.pt", at=1)
        await it.save("b.pt", LARGE, at=2)
        await it.drain()
        it.spool.close()
        it.disk.remove_tree(it.spool.home)
        after = Line(it.root, it.memory)
        after.watcher.start()
        await after.pipeline.pin(await after.watcher.first())
        assert len(after.pipeline.book) == 2
        after.spool.claimed(generation=await after.ledger.claim(holder("spool-b")), attempt="attempt-2")
        before = listed(it.memory)
        await after.drain()
        assert listed(it.memory) == before
        assert after.told.of(Progress) == []
        assert sorted(after.spool.known.durable_files()) == [Id(1, 1), Id(1, 2)]
        after.spool.close()


# --- retention ---------------------------------------------------------------------------------------


async def test_the_bucket_keeps_so_many(line: Make) -> None:
    """The newest stay, the rest is deleted and told; latest.json forgets them."""
    async with line(keep=Keep(remote=2)) as it:
        for n in range(4):
            await it.save(f"{n}.pt", at=n)
            it.pipeline._all_taken_in = True
            await it.pipeline.work()
            await it.pipeline.retain_once()
        assert sorted(it.memory.objects) == ["job/2.pt", "job/3.pt", LATEST]
        assert listed(it.memory) == ["1-4 3.pt", "1-3 2.pt"]
        assert it.told.of(Deleted) == [Deleted("0.pt", "bucket"), Deleted("1.pt", "bucket")]
        assert sorted(path.name for path in it.root.glob("*.pt")) == [f"{n}.pt" for n in range(4)]


async def test_what_retention_would_delete_at_once_is_not_sent(line: Make) -> None:
    """Behind, with a backlog: the newest are sent, and the others are counted as skipped."""
    async with line(keep=Keep(remote=2), workers=1) as it:
        for n in range(5):
            await it.save(f"{n}.pt", at=n)
        await it.drain()
        assert it.fates(Committed) == ["4.pt", "3.pt"]
        assert it.fates(Skipped) == ["2.pt", "1.pt", "0.pt"]
        assert it.pins == []


@pytest.mark.fault("D10")
@pytest.mark.parametrize("killed", [False, True])
async def test_what_may_stand_in_the_bucket_already_is_not_skipped(line: Make, *, killed: bool) -> None:
    """Its put was done, and the answer lost: its object is not left in the bucket for ever, unlisted."""
    async with line(keep=Keep(remote=1), workers=1) as it:
        await it.save("old.pt")
        it.steps.lose("put", "old.pt")
        it.steps.fail("head", Unreachable("no route"), "old.pt", times=2)
        working = asyncio.ensure_future(it.pipeline.work())
        await it.told.until(lambda: it.told.of(Retrying))
        working.cancel()
        await asyncio.wait([working])
        assert it.body("old.pt") == b"old.pt"
        await it.save("new.pt", at=1)
        after = await restarted(it, keep=Keep(remote=1), workers=1) if killed else it
        after.pipeline._end_rests()
        await after.drain()
        await after.pipeline.retain_once()
        assert it.memory.objects.keys() == {"job/new.pt", LATEST}
        assert after.pins == []
        after.spool.close()


@pytest.mark.fault("D10")
async def test_retention_spares_a_name_that_is_being_sent(line: Make) -> None:
    """The old object of a name whose next save is on its way is not deleted under it."""
    async with line(keep=Keep(remote=1)) as it:
        await it.save("last.pt", b"old")
        await it.save("other.pt", at=1)
        await it.drain()
        gate = it.steps.hold("put", "last.pt")
        await it.save("last.pt", b"newest", at=2)
        working = asyncio.ensure_future(it.pipeline.work())
        await gate.reached.wait()
        await it.pipeline.retain_once()
        assert it.body("last.pt") == b"old"
        gate.opened.set()
        await working
        await it.pipeline.retain_once()
        assert it.body("last.pt") == b"newest"
        assert sorted(it.memory.objects) == ["job/last.pt", LATEST]


@pytest.mark.fault("D10")
async def test_no_save_begins_while_its_old_object_is_deleted(line: Make) -> None:
    """The key is locked from the look to the delete, also where the store checks no condition."""
    async with line(keep=Keep(remote=1)) as it:
        await it.save("last.pt", b"old")
        await it.save("other.pt", at=1)
        await it.drain()
        gate = it.steps.hold("delete", "last.pt")
        retaining = asyncio.ensure_future(it.pipeline.retain_once())
        await gate.reached.wait()
        await it.save("last.pt", b"newest", at=2)
        working = asyncio.ensure_future(it.pipeline.work())
        for _ in range(50):
            await asyncio.sleep(0)
        assert it.body("last.pt") == b"old"
        gate.opened.set()
        await retaining
        await working
        assert it.body("last.pt") == b"newest"


@pytest.mark.fault("C12")
async def test_retention_that_is_denied_is_said_and_holds_up_nothing(line: Make) -> None:
    """Without the permission to delete, checkpoints still become durable."""
    async with line(keep=Keep(remote=1)) as it:
        it.steps.fail("delete", Denied("not allowed"), times=999)
        for n in range(3):
            await it.save(f"{n}.pt", at=n)
            it.pipeline._all_taken_in = True
            await it.pipeline.work()
            await it.pipeline.retain_once()
        assert it.fates(Committed) == ["0.pt", "1.pt", "2.pt"]
        assert {(each.stage, each.reason) for each in it.told.of(Failed)} == {("retention", "denied")}
        assert len(manifest_in(it.memory).expiring) == 2


async def test_the_watch_dir_keeps_so_many_durable_files(line: Make) -> None:
    """The oldest durable ones go; what is not durable is not even counted."""
    async with line(keep=Keep(local=2)) as it:
        for n in range(4):
            await it.save(f"{n}.pt", at=n)
        await it.drain()
        await it.save("waiting.pt", at=9)
        await it.pipeline.retain_once()
        assert sorted(path.name for path in it.root.glob("*.pt")) == ["2.pt", "3.pt", "waiting.pt"]
        assert it.told.of(Deleted) == [Deleted("0.pt", "watch dir"), Deleted("1.pt", "watch dir")]
        assert sorted(it.memory.objects) == [*(f"job/{n}.pt" for n in range(4)), LATEST]


async def test_local_retention_leaves_what_the_trainer_has_replaced(line: Make) -> None:
    """A file that is another one by now is not the one that is durable."""
    async with line(keep=Keep(local=1)) as it:
        for n in range(3):
            await it.save(f"{n}.pt", at=n)
        await it.drain()
        save(it.root, "0.pt", b"new and nowhere else", at=50)
        await it.pipeline.retain_once()
        assert (it.root / "0.pt").read_bytes() == b"new and nowhere else"
        assert sorted(path.name for path in it.root.glob("*.pt")) == ["0.pt", "2.pt"]


async def test_local_retention_never_deletes_the_newest_durable_file(line: Make) -> None:
    """The one that latest.json names first stays, whatever this spool calls newer."""
    async with line(keep=Keep(local=1)) as it:
        await it.save("a.pt", at=1)
        await it.drain()
        newest = await it.save("b.pt", at=2)
        it.spool.known.settled(newest, Id(9, 9))  # as durable under a greater id than the manifest has
        await it.pipeline.retain_once()
        assert (it.root / "a.pt").exists()
        await it.drain()


async def test_a_strangers_object_under_the_prefix_is_left_alone(line: Make) -> None:
    """Nothing that we did not write is ever deleted."""
    async with line(keep=Keep(local=1, remote=1)) as it:
        await it.memory.put("job/theirs.pt", b"theirs", when=Absent(), metadata={})
        save(it.root, "notes.txt", b"theirs")
        for n in range(3):
            await it.save(f"{n}.pt", at=n)
        await it.drain()
        await it.pipeline.retain_once()
        assert it.body("theirs.pt") == b"theirs"
        assert (it.root / "notes.txt").exists()
