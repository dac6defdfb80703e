"""The life of a sidecar, from its start to its end: what is durable, what is left, and what it says."""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ckpt_sidecar.bucket import MIB, Absent, Denied, Unreachable
from ckpt_sidecar.checkpoint import Book, Committed, Id, Pinned, Skipped, Stored, Uploading
from ckpt_sidecar.child import Child
from ckpt_sidecar.disk import Disk, files_below
from ckpt_sidecar.events import (
    Claimed,
    Deleted,
    Drained,
    Draining,
    Failed,
    Fenced,
    Interruption,
    Moved,
    NotReady,
    Progress,
    Ready,
    Rebuilt,
    Restored,
    Retrying,
)
from ckpt_sidecar.manifest import self_description
from ckpt_sidecar.names import NOTICE_NAME
from ckpt_sidecar.patience import PatientBucket
from ckpt_sidecar.settings import Settings
from ckpt_sidecar.sidecar import End, Exit, Sidecar, World
from ckpt_sidecar.spool import Spool
from tests.engine.support import (
    BORN,
    LATEST,
    PREFIX,
    SECOND,
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
from tests.fakes import CARELESS, MemoryBucket

LARGE = random.Random(11).randbytes(17 * MIB)  # three parts


class Life:
    """One sidecar on a watch dir and a bucket; `running` until it has ended."""

    def __init__(
        self,
        root: Path,
        memory: MemoryBucket,
        *,
        attempt: str = "",
        disk: Disk | None = None,
        **settings: Any,
    ) -> None:
        self.root = root
        self.memory = memory
        self.steps = Steps(memory)
        self.told = Told()
        self.spool: Spool = opened_spool(root, name=f"spool {root.name}", disk=disk)
        self.book = Book()
        defaults: dict[str, Any] = {
            "watch": root,
            "bucket": "memory",
            "prefix": "job",
            "settle": 0.0,
            "rescan_every": 3600.0,
            "workers": 1,
            "drain_timeout": 30.0,
        }
        bucket = PatientBucket(
            self.steps, sleep=lambda _: asyncio.sleep(0), chance=lambda: 0.0, tell=self.told, tries=2
        )
        me = holder("", attempt or f"attempt of {root.name}", f"node of {root.name}")
        world = World(bucket, times(chance=0.002), time.monotonic, me, self.told)
        self.sidecar = Sidecar(Settings(**defaults | settings), world, spool=self.spool, book=self.book)
        self.running: asyncio.Task[End] | None = None

    def start(self, child: Child | None = None) -> None:
        """Begin to live."""

        async def serve() -> None:
            await asyncio.Event().wait()

        self.running = asyncio.create_task(self.sidecar.run(serve, child=child))

    async def ready(self) -> None:
        """Begin to live, and wait until a trainer may start."""
        self.start()
        await self.told.until(lambda: self.told.of(Ready) or (self.running and self.running.done()))

    async def end(self) -> End:
        """Wait for the end."""
        assert self.running is not None
        async with asyncio.timeout(30):
            return await self.running

    async def stop(self) -> End:
        """Ask for the drain, and wait for the end."""
        self.sidecar.stop.set()
        return await self.end()

    async def save(self, name: str, content: bytes = b"", *, at: int = 0) -> None:
        """Save a file as a trainer does, and wait until it is pinned."""
        before = len(self.fates(Pinned))
        save(self.root, name, content or name.encode(), at=at)
        await self.told.until(lambda: len(self.fates(Pinned)) > before)

    def fates(self, state: type) -> list[str]:
        """The names of the checkpoints that came to that, in order."""
        moves = self.told.of(Moved)
        return [each.checkpoint.name for each in moves if isinstance(each.checkpoint.state, state)]

    def committed(self, name: str) -> Callable[[], bool]:
        """Ask whether it has been committed."""
        return lambda: name in self.fates(Committed)

    def not_ready(self) -> bool:
        """Was a reason told why a trainer must not start?"""
        return bool(self.told.of(NotReady))

    def files(self) -> dict[str, bytes]:
        """What stands in the watch dir, for everybody to see."""
        return {path.name: path.read_bytes() for path in self.root.iterdir() if path.is_file()}

    @property
    def pins(self) -> list[str]:
        """The names of the files that the spool still holds."""
        paths = (self.spool.home / "pins").rglob("*.pt")
        return sorted(path.name for path in paths)

    @property
    def restored(self) -> tuple[str, str | None]:
        """How the restore ended."""
        (each,) = self.told.of(Restored)
        return each.outcome, each.name


@pytest.fixture
def memory() -> MemoryBucket:
    """An empty bucket."""
    return MemoryBucket()


@asynccontextmanager
async def living(root: Path, memory: MemoryBucket, **more: Any) -> AsyncIterator[Life]:
    """Give a life; at the end it is stopped, hurried if it must be."""
    root.mkdir(exist_ok=True)
    life = Life(root, memory, **more)
    try:
        yield life
    finally:
        if life.running is not None and not life.running.done():
            life.sidecar.stop.set()
            life.sidecar.hurry.set()
            await asyncio.wait([life.running], timeout=30)
        life.spool.close()


# --- a straight life ---------------------------------------------------------------------------------


async def test_what_is_saved_is_durable_at_the_end(tmp_path: Path, memory: MemoryBucket) -> None:
    """Claim, ready, work, drain: exit 0, and nothing is left in the spool."""
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        assert life.restored == ("empty", None)
        await life.save("x.pt", b"weights")
        await life.save("large.pt", LARGE, at=1)
        assert await life.stop() == End(Exit.DURABLE, "all checkpoints are durable")
        assert listed(memory) == ["1-2 large.pt", "1-1 x.pt"]
        assert memory.body("job/large.pt") == LARGE
        assert life.pins == []
        assert life.told.of(Claimed) == [Claimed(1, None)]
        assert life.told[-1] == Drained(())


async def test_the_next_node_finds_the_newest(tmp_path: Path, memory: MemoryBucket) -> None:
    """Another node, another attempt: byte for byte, with its time, and not uploaded again."""
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        await life.save("1.pt", b"older", at=1)
        await life.save("2.pt", LARGE, at=2)
        await life.stop()
    before = {key: each for key, each in memory.objects.items() if key != LATEST}
    async with living(tmp_path / "b", memory) as life:
        await life.ready()
        assert life.files() == {"2.pt": LARGE}
        assert (life.root / "2.pt").stat().st_mtime_ns == BORN + 2 * SECOND
        assert (await life.stop()).code == Exit.DURABLE
        assert {key: each for key, each in memory.objects.items() if key != LATEST} == before
        assert life.fates(Pinned) == []
        assert life.told.of(Claimed)[0].generation == 2


async def test_a_restart_on_the_same_node_keeps_what_is_there(tmp_path: Path, memory: MemoryBucket) -> None:
    """The restarted container finds its newest file in place, and downloads nothing."""
    for outcome in ("empty", "kept"):
        async with living(tmp_path / "a", memory) as life:
            await life.ready()
            assert life.restored[0] == outcome
            if outcome == "empty":
                await life.save("x.pt", b"weights")
            await life.stop()
            assert [each for each in life.told.of(Progress) if each.direction == "down"] == []
    assert listed(memory) == ["1-1 x.pt"]


async def test_what_was_saved_while_nobody_watched_is_taken_up(tmp_path: Path, memory: MemoryBucket) -> None:
    """Files that were completed between two lives become durable in the second."""
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        await life.save("1.pt", at=1)
        await life.stop()
    save(tmp_path / "a", "2.pt", b"saved meanwhile", at=2)
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        assert life.restored == ("kept", "2.pt")
        await life.stop()
        assert [each.split()[1] for each in listed(memory)] == ["2.pt", "1.pt"]


async def test_what_a_predecessor_has_begun_is_settled_before_the_restore(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """A node is lost in the middle of an upload: its successor aborts it, and says what it found."""
    async with living(tmp_path / "a", memory) as lost:
        await lost.ready()
        await lost.save("1.pt", at=1)
        gate = lost.steps.hold("part", "2.pt", passing=1)
        await lost.save("2.pt", LARGE, at=2)
        await gate.reached.wait()
        await lost.told.until(lambda: manifest_in(memory).uploads)
        async with living(tmp_path / "b", memory) as life:
            await life.ready()
            assert life.files() == {"1.pt": b"1.pt"}
            assert memory.uploads == {}
            assert manifest_in(memory).uploads == ()
            gate.opened.set()
            await lost.told.until(lambda: lost.told.of(Fenced))
            assert memory.uploads == {}
            assert (await life.stop()).code == Exit.DURABLE
        assert (await lost.stop()).code == Exit.FENCED
        assert lost.pins == ["2.pt"]
        assert listed(memory) == ["1-1 1.pt"]


@pytest.mark.fault("D4")
async def test_old_pins_are_committed_as_history(tmp_path: Path, memory: MemoryBucket) -> None:
    """A new attempt on an old node: what its spool still held becomes durable, but never the newest."""
    async with living(tmp_path / "a", memory, attempt="attempt-1") as life:
        await life.ready()
        life.steps.fail("put", Denied("not now"), "old.pt", times=999)
        await life.save("old.pt", at=9)
        life.sidecar.hurry.set()
        assert (await life.stop()).code == Exit.NOT_DURABLE
    async with living(tmp_path / "b", memory, attempt="attempt-2") as life:
        await life.ready()
        await life.save("new.pt", at=5)
        await life.stop()
    async with living(tmp_path / "a", memory, attempt="attempt-3") as life:
        await life.ready()
        assert life.restored == ("restored", "new.pt")
        await life.stop()
        assert listed(memory) == ["2-1 new.pt", "1-1 old.pt"]


# --- the drain ---------------------------------------------------------------------------------------


@pytest.mark.fault("E2")
async def test_a_drain_sends_the_newest_first(tmp_path: Path, memory: MemoryBucket) -> None:
    """Stopped with a backlog: from the newest to the oldest, and all of it in time."""
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        gate = life.steps.hold("put", "0.pt")
        for n in range(5):
            await life.save(f"{n}.pt", at=n)
        await gate.reached.wait()
        life.sidecar.stop.set()
        await life.told.until(lambda: life.told.of(Draining))
        gate.opened.set()
        assert (await life.end()).code == Exit.DURABLE
        assert life.fates(Committed) == ["0.pt", "4.pt", "3.pt", "2.pt", "1.pt"]
        assert life.told.of(Draining) == [Draining(30.0, 5)]


@pytest.mark.fault("E2")
async def test_what_is_completed_just_before_the_stop_is_sent(tmp_path: Path, memory: MemoryBucket) -> None:
    """The last look of the watcher finds it, whether an event told of it or not."""
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        save(life.root, "last.pt", b"weights")
        assert (await life.stop()).code == Exit.DURABLE
        assert listed(memory) == ["1-1 last.pt"]


async def test_what_is_stored_is_committed_before_the_end(tmp_path: Path, memory: MemoryBucket) -> None:
    """The swap failed and rests: the stop does not wait for the rest, and commits it."""
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        life.steps.fail("put", Denied("not now"), "latest.json", times=999)
        await life.save("x.pt")
        await life.told.until(lambda: life.told.of(Failed))
        assert life.fates(Stored) == ["x.pt"]
        life.steps.relent()
        assert (await life.stop()).code == Exit.DURABLE
        assert listed(memory) == ["1-1 x.pt"]
        assert [each.bytes for each in life.told.of(Progress)] == [4]


@pytest.mark.fault("E2")
async def test_a_second_stop_leaves_pins_and_says_so(tmp_path: Path, memory: MemoryBucket) -> None:
    """Asked again it ends at once with 3, names what is left, and the next life finishes it."""
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        gate = life.steps.hold("put", "2.pt")
        await life.save("1.pt", at=1)
        await life.told.until(lambda: life.fates(Committed))
        await life.save("2.pt", at=2)
        await gate.reached.wait()
        await life.save("3.pt", at=3)
        life.sidecar.stop.set()
        life.sidecar.hurry.set()
        assert await life.end() == End(Exit.NOT_DURABLE, "not durable at the drain deadline: 3.pt, 2.pt")
        assert life.told[-1] == Drained(("3.pt", "2.pt"))
        assert life.pins == ["2.pt", "3.pt"]
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        assert (await life.stop()).code == Exit.DURABLE
        assert listed(memory) == ["1-3 3.pt", "1-2 2.pt", "1-1 1.pt"]


@pytest.mark.fault("E3")
async def test_a_deadline_that_passes_leaves_pins_and_says_so(tmp_path: Path, memory: MemoryBucket) -> None:
    """What cannot be sent in time is listed; an upload under way is resumed by the next life."""
    async with living(tmp_path / "a", memory, drain_timeout=0.05) as life:
        await life.ready()
        gate = life.steps.hold("part", passing=2)
        await life.save("large.pt", LARGE)
        await gate.reached.wait()
        assert await life.stop() == End(Exit.NOT_DURABLE, "not durable at the drain deadline: large.pt")
        assert life.fates(Uploading) == ["large.pt"]
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        assert (await life.stop()).code == Exit.DURABLE
        assert memory.body("job/large.pt") == LARGE
        assert sum(each.bytes for each in life.told.of(Progress)) == MIB  # 16 were there
        assert memory.uploads == {}


@pytest.mark.fault("E2")
async def test_a_stop_before_ready_is_not_lost(tmp_path: Path, memory: MemoryBucket) -> None:
    """The bucket never answers: the sidecar ends when it is told to, and says what is not durable."""
    (tmp_path / "a").mkdir()
    save(tmp_path / "a", "x.pt", b"weights")
    async with living(tmp_path / "a", memory) as life:
        for verb in ("get", "probe", "put"):
            life.steps.fail(verb, Unreachable("no route"), times=10**9)
        life.start()
        await life.told.until(lambda: len(life.told.of(NotReady)) > 3)
        assert await life.stop() == End(Exit.NOT_DURABLE, "not durable at the drain deadline: x.pt")
        assert life.pins == ["x.pt"]
        assert life.told.of(Ready) == []


@pytest.mark.fault("E2")
async def test_a_stop_before_the_start_is_not_lost(tmp_path: Path, memory: MemoryBucket) -> None:
    """A signal may come before anything else has happened."""
    async with living(tmp_path / "a", memory) as life:
        life.sidecar.stop.set()
        life.start()
        assert (await life.end()).code == Exit.DURABLE


async def test_who_never_became_ready_does_not_say_that_all_is_well(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """Nothing was saved, so nothing is at risk; but the last words are why it was never ready."""
    async with living(tmp_path / "a", memory) as life:
        life.steps.fail("probe", Denied("no credentials", reason="credentials"), times=10**9)
        life.start()
        await life.told.until(lambda: life.told.of(NotReady))
        end = await life.stop()
    assert end == End(Exit.DURABLE, "nothing was saved, and it never became ready: no credentials")


# --- the bucket at the start -------------------------------------------------------------------------


@pytest.mark.fault("F7")
async def test_a_bucket_that_comes_late_is_waited_for(tmp_path: Path, memory: MemoryBucket) -> None:
    """Not ready, with the reason, and never a fresh run; ready once it answers."""
    async with living(tmp_path / "z", memory) as life:
        await life.ready()
        await life.save("x.pt", b"weights")
        await life.stop()
    async with living(tmp_path / "a", memory) as life:
        life.steps.fail("get", Unreachable("no route", reason="connection"), times=10**9)
        life.start()
        await life.told.until(lambda: len(life.told.of(NotReady)) > 3)
        assert life.told.of(Ready) == []
        assert {(each.stage, each.reason) for each in life.told.of(Failed)} == {("start", "connection")}
        life.steps.relent()
        await life.told.until(lambda: life.told.of(Ready))
        assert life.files() == {"x.pt": b"weights"}
        await life.stop()


@pytest.mark.fault("C19")
async def test_a_store_that_cannot_fence_is_refused_unless_a_person_says_so(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """Without conditional writes nothing is written, until --allow-unfenced; then all works."""
    memory.abilities = CARELESS
    async with living(tmp_path / "a", memory) as life:
        life.start()
        await life.told.until(lambda: life.told.of(NotReady))
        assert "--allow-unfenced" in life.told.of(NotReady)[0].reason
        assert memory.objects == {}
        await life.stop()
    async with living(tmp_path / "a", memory, allow_unfenced=True) as life:
        await life.ready()
        await life.save("x.pt", b"weights")
        assert (await life.stop()).code == Exit.DURABLE
        assert memory.body("job/x.pt") == b"weights"


@pytest.mark.fault("F1")
async def test_what_cannot_be_restored_keeps_the_trainer_away_and_nothing_else(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """The bucket has checkpoints and none is good: never ready, what is saved is durable, exit 5."""
    async with living(tmp_path / "z", memory) as life:
        await life.ready()
        await life.save("x.pt", b"weights")
        await life.stop()
    del memory.objects["job/x.pt"]
    async with living(tmp_path / "a", memory) as life:
        life.start()
        await life.told.until(lambda: life.told.of(NotReady))
        await life.save("new.pt", at=9)
        end = await life.stop()
        assert end.code == Exit.NOTHING_RESTORED
        assert "none of the 1 checkpoints" in end.reason
        assert life.told.of(Ready) == []
        assert listed(memory) == ["2-1 new.pt", "1-1 x.pt"]


async def test_a_lost_manifest_costs_no_checkpoint(tmp_path: Path, memory: MemoryBucket) -> None:
    """latest.json was deleted: the next life rebuilds it from the objects, restores, and is above all ids."""
    async with living(tmp_path / "z", memory) as life:
        await life.ready()
        await life.save("1.pt", at=1)
        await life.save("2.pt", at=2)
        await life.stop()
    del memory.objects[LATEST]
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        assert life.restored == ("restored", "2.pt")
        assert [each.found for each in life.told.of(Rebuilt)] == [2]
        await life.save("3.pt", at=0)
        await life.stop()
        assert listed(memory) == ["2-1 3.pt", "1-2 2.pt", "1-1 1.pt"]


async def test_an_object_that_was_not_committed_is_adopted(tmp_path: Path, memory: MemoryBucket) -> None:
    """Completed over a committed key by one who died: restored and committed, not sent again."""
    async with living(tmp_path / "z", memory) as life:
        await life.ready()
        await life.save("last.pt", b"committed")
        await life.stop()
    later = self_description(Id(1, 2), BORN + SECOND, 5)
    del memory.objects["job/last.pt"]
    await memory.put("job/last.pt", b"newer", when=Absent(), metadata=later)
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        assert life.files() == {"last.pt": b"newer"}
        assert listed(memory) == ["1-2 last.pt"]
        await life.stop()


# --- fenced ------------------------------------------------------------------------------------------


async def test_who_is_fenced_in_the_middle_holds_until_it_is_stopped(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """It stays alive and harmless, keeps its pins, holds nothing more, and exits with 4 when told to."""
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        await life.save("1.pt", at=1)
        await life.told.until(lambda: life.fates(Committed))
        other = ledger_of(memory, Told())
        await other.claim(holder("spool-b", "attempt-2", "node-b"))
        before = dict(memory.objects)
        await life.save("2.pt", at=2)
        await life.told.until(lambda: life.told.of(NotReady))
        assert life.running is not None
        assert not life.running.done()
        assert [each.generation for each in life.told.of(Fenced)] == [2]
        save(life.root, "3.pt", b"of the zombie", at=3)
        end = await life.stop()
        assert end.code == Exit.FENCED
        assert life.files().keys() == {"1.pt", "2.pt", "3.pt"}
        assert list((life.spool.home / "caught").rglob("3.pt")) == []
        assert "generation 2 is held by node-b" in end.reason
        assert life.pins == ["2.pt"]
        assert {key: each for key, each in memory.objects.items() if key in before} == before
        assert listed(memory) == ["1-1 1.pt"]


async def test_who_is_fenced_in_the_middle_of_parts_leaves_no_upload(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """Its own uploads, of which the holder cannot know, are aborted."""
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        await ledger_of(memory, Told()).claim(holder("spool-b", "attempt-2", "node-b"))
        await life.save("large.pt", LARGE)
        await life.told.until(lambda: life.told.of(NotReady))
        assert memory.uploads == {}
        assert (await life.stop()).code == Exit.FENCED
        assert life.pins == ["large.pt"]


@pytest.mark.fault("D3")
async def test_who_was_displaced_in_this_attempt_holds_from_the_start(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """Restarted by its supervisor again and again it never takes the prefix back, and restores nothing."""
    async with living(tmp_path / "a", memory, attempt="attempt-1") as life:
        await life.ready()
        await life.stop()
    async with living(tmp_path / "b", memory, attempt="attempt-1") as holding:
        await holding.ready()
        await holding.save("x.pt", b"weights")
        await holding.told.until(lambda: holding.fates(Committed))
        before = memory.body(LATEST)
        for _ in range(3):
            async with living(tmp_path / "a", memory, attempt="attempt-1") as life:
                life.start()
                await life.told.until(life.not_ready)
                assert (await life.stop()).code == Exit.FENCED
                assert life.files() == {}
        assert memory.body(LATEST) == before
        await holding.save("y.pt", at=1)
        assert (await holding.stop()).code == Exit.DURABLE
    async with living(tmp_path / "a", memory, attempt="attempt-1", take_over=True) as life:
        await life.ready()
        assert life.files() == {"y.pt": b"y.pt"}
        await life.stop()


# --- retention over a life ---------------------------------------------------------------------------


async def test_retention_keeps_so_many_here_and_there(tmp_path: Path, memory: MemoryBucket) -> None:
    """Over a whole life the watch dir and the bucket stay bounded, and the newest is in both."""
    async with living(tmp_path / "a", memory, keep_local=2, keep_remote=3) as life:
        await life.ready()
        for n in range(8):
            await life.save(f"{n}.pt", at=n)
            await life.told.until(life.committed(f"{n}.pt"))
        assert (await life.stop()).code == Exit.DURABLE
        assert sorted(life.files()) == ["6.pt", "7.pt"]
        assert sorted(memory.objects) == [*(f"{PREFIX}{n}.pt" for n in (5, 6, 7)), LATEST]
        assert sorted(each.name for each in life.told.of(Deleted) if each.where == "bucket") == [
            f"{n}.pt" for n in range(5)
        ]


async def test_retention_touches_nothing_that_is_not_durable(tmp_path: Path, memory: MemoryBucket) -> None:
    """While the bucket takes nothing, every file stays where it is."""
    async with living(tmp_path / "a", memory, keep_local=1, keep_remote=1) as life:
        await life.ready()
        await life.save("0.pt")
        await life.told.until(lambda: life.fates(Committed))
        life.steps.fail("put", Unreachable("no route"), ".pt", times=10**9)
        for n in range(1, 5):
            await life.save(f"{n}.pt", at=n)
        await life.told.until(lambda: len(life.told.of(Retrying)) > 20)
        assert sorted(life.files()) == [f"{n}.pt" for n in range(5)]
        assert memory.body("job/0.pt") == b"0.pt"
        life.steps.relent()
        assert (await life.stop()).code == Exit.DURABLE
        assert sorted(memory.objects) == ["job/4.pt", LATEST]
        assert {"4.pt"} | {*life.fates(Skipped)} <= {*life.files()}  # what was skipped stands nowhere else
        assert "0.pt" not in life.files()


# --- with the trainer as a child ---------------------------------------------------------------------


async def test_a_child_starts_after_the_restore_and_what_it_saves_is_durable(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """It finds the restored file; when it ends the sidecar drains, and hands on its exit code."""
    async with living(tmp_path / "z", memory) as life:
        await life.ready()
        await life.save("x.pt", b"weights")
        await life.stop()
    script = 'cd "$0" && cp x.pt y.tmp && mv y.tmp y.pt && exit 7'
    async with living(tmp_path / "a", memory) as life:
        life.start(Child(["sh", "-c", script, str(life.root)], grace=5.0))
        assert (await life.end()).code == 7
        assert memory.body("job/y.pt") == b"weights"


async def test_a_child_that_a_stop_kept_from_starting_has_not_succeeded(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """Else the scheduler would take the job for done: 128 + 15, as if the trainer itself had been stopped."""
    child = Child(["sh", "-c", 'touch "$0/started"', str(tmp_path)], grace=5.0)
    async with living(tmp_path / "a", memory) as life:
        life.steps.fail("get", Unreachable("no route"), times=10**9)
        life.start(child)
        await life.told.until(lambda: life.told.of(NotReady))
        assert not child.send(signal.SIGTERM)
        assert (await life.stop()).code == 128 + signal.SIGTERM
    assert not (tmp_path / "started").exists()


async def test_a_child_is_not_started_where_nothing_could_be_restored(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """It would begin from nothing and call that a run: exit 5 at once."""
    async with living(tmp_path / "z", memory) as life:
        await life.ready()
        await life.save("x.pt", b"weights")
        await life.stop()
    del memory.objects["job/x.pt"]
    async with living(tmp_path / "a", memory) as life:
        life.start(Child(["sh", "-c", 'touch "$0/started"', str(life.root)], grace=5.0))
        assert (await life.end()).code == Exit.NOTHING_RESTORED
        assert life.files() == {}


# --- before the node is taken away --------------------------------------------------------------------


@pytest.mark.fault("E14")
async def test_after_a_notice_the_newest_is_sent_alone(tmp_path: Path, memory: MemoryBucket) -> None:
    """An older upload pauses between two parts until the newest is durable."""
    async with living(tmp_path, memory, workers=2) as life:
        held = [life.steps.hold("part", "old.pt"), life.steps.hold("part", "old.pt")]
        await life.ready()
        await life.save("old.pt", LARGE, at=1)
        await asyncio.gather(*(each.reached.wait() for each in held))
        await life.sidecar.noticed(Interruption("spot", "terminate", "", 0.0))
        second = life.steps.hold("part", "newest.pt", passing=1)
        await life.save("newest.pt", LARGE[: 9 * MIB], at=2)
        for each in held:
            each.opened.set()
        await second.reached.wait()
        await life.told.until(lambda: [each for each in life.told.of(Progress) if each.name == "newest.pt"])
        await asyncio.sleep(0.1)  # a slot is free, and the last part of old.pt waits
        (old,) = [each for each in memory.uploads.values() if each.key == "job/old.pt"]
        assert len(old.parts) == 2
        second.opened.set()
        await life.told.until(life.committed("old.pt"))
        assert life.fates(Committed) == ["newest.pt", "old.pt"]
        await life.stop()


@pytest.mark.fault("E14")
async def test_after_a_notice_nothing_older_is_sent(tmp_path: Path, memory: MemoryBucket) -> None:
    """A free worker stays free: the newest has the whole line."""
    save(tmp_path, "a.pt", b"a", at=1)
    save(tmp_path, "newest.pt", LARGE, at=2)
    async with living(tmp_path, memory, workers=2) as life:
        complete = life.steps.hold("complete", "newest.pt")
        await life.sidecar.noticed(Interruption("spot", "terminate", "", 0.0))
        await life.ready()
        await complete.reached.wait()
        assert "job/a.pt" not in memory.objects
        complete.opened.set()
        await life.told.until(life.committed("a.pt"))
        assert life.fates(Committed) == ["newest.pt", "a.pt"]
        await life.stop()


@pytest.mark.fault("E14")
async def test_after_a_notice_nothing_is_deleted(tmp_path: Path, memory: MemoryBucket) -> None:
    """Retention would spend the last two minutes on deletes."""
    async with living(tmp_path, memory, keep_remote=1) as life:
        await life.ready()
        await life.save("a.pt", at=1)
        await life.told.until(life.committed("a.pt"))
        await life.sidecar.noticed(Interruption("rebalance", "", "", 0.0))
        await life.save("b.pt", at=2)
        await life.told.until(life.committed("b.pt"))
        await asyncio.sleep(0.1)  # retention is due, and would take a moment
        assert "job/a.pt" in memory.objects
        await life.stop()
        assert "job/a.pt" not in memory.objects  # the drain has the time


@pytest.mark.fault("E14")
async def test_a_note_that_cannot_be_left_is_said(tmp_path: Path, memory: MemoryBucket) -> None:
    """A directory stands in its way: uploads go on."""
    (tmp_path / NOTICE_NAME).mkdir()
    async with living(tmp_path, memory) as life:
        await life.ready()
        await life.sidecar.noticed(Interruption("spot", "stop", "", 0.0))
        (failed,) = [each for each in life.told.of(Failed) if each.stage == "notices"]
        assert failed.what == NOTICE_NAME
        await life.save("a.pt")
        assert (await life.stop()).code == Exit.DURABLE


@pytest.mark.fault("C14")
async def test_a_bucket_that_was_emptied_is_no_fresh_run(tmp_path: Path, memory: MemoryBucket) -> None:
    """Not ready, with the mend, however often it is restarted; ready once the objects are put back."""
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        await life.save("x.pt", b"weights")
        await life.stop()
    (tmp_path / "a/x.pt").unlink()
    before, memory.objects = memory.objects, {}
    for _ in range(2):
        async with living(tmp_path / "a", memory) as life:
            life.start()
            await life.told.until(life.not_ready)
            (failed, *_) = life.told.of(Failed)
            assert (failed.stage, failed.reason) == ("start", "bucket")
            assert "knows 1-1 to be durable" in failed.error
            assert "put the objects back" in failed.hint
            await life.stop()
            assert life.told.of(Ready) == []
            assert memory.objects == {}
    memory.objects = before
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        assert life.files() == {"x.pt": b"weights"}
        await life.stop()


@pytest.mark.fault("E3")
async def test_what_looks_whole_and_is_not_known_to_be_completed_is_said_at_the_end(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """Its writer has it open, and its format has no end: the next life will judge it."""
    async with living(tmp_path, memory) as life:
        await life.ready()
        with (tmp_path / "open.pt").open("wb") as writer:
            writer.write(b"weights")
            writer.flush()
            while not list(files_below(life.spool.home / "caught")):  # the event has come
                await asyncio.sleep(0.01)
            end = await life.stop()
        assert end == End(Exit.NOT_DURABLE, "not durable at the drain deadline: open.pt")
        assert life.told.of(Drained) == [Drained(("open.pt",))]


async def test_a_cancel_is_not_taken_for_the_end_of_the_work(tmp_path: Path, memory: MemoryBucket) -> None:
    """While what was begun before ready is given up for a stop, the life itself may be cancelled."""
    async with living(tmp_path, memory) as life:
        giving_up, gone = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                giving_up.set()
                await gone.wait()

        running = asyncio.ensure_future(life.sidecar._unless_stopped(work()))
        life.sidecar.stop.set()
        await giving_up.wait()
        running.cancel()
        gone.set()
        with pytest.raises(asyncio.CancelledError):
            await running
