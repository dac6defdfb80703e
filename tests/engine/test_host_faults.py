"""A host that fails under the engines: its disk, its power, its clocks, and a loop that stands still."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from watchdog.observers.inotify_c import InotifyFD

from ckpt_sidecar import sidecar as sidecar_module
from ckpt_sidecar.bodies import started
from ckpt_sidecar.checkpoint import Checkpoint, Committed, File
from ckpt_sidecar.disk import PinnedFile
from ckpt_sidecar.events import Drained, Failed, Fenced, Ready, Rescanned, WatchLost
from ckpt_sidecar.sidecar import End, Exit, Sidecar
from ckpt_sidecar.spool import Spool
from tests.engine.support import SECOND, Hurt, descriptors, listed, manifest_in, opened_spool, pin, save
from tests.engine.test_drain import LARGE, Life, living
from tests.fakes import MemoryBucket


class Broken(Hurt):
    """It counts the calls that make a directory's entries durable."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []

    def sync_dir(self, path: Path) -> None:
        """As on any disk."""
        self.syncs.append(path.name)
        super().sync_dir(path)


@pytest.fixture
def memory() -> MemoryBucket:
    """An empty bucket."""
    return MemoryBucket()


@asynccontextmanager
async def on_a_broken_disk(
    root: Path, memory: MemoryBucket, **more: Any
) -> AsyncIterator[tuple[Life, Broken]]:
    """Give a life that is ready, on a disk that still works."""
    disk = Broken()
    async with living(root, memory, disk=disk, **more) as life:
        await life.ready()
        yield life, disk


# --- the disk does not take what it is given, or not give it back ------------------------------------------


@pytest.mark.fault("E5")
async def test_a_pin_that_a_power_loss_may_undo_is_said_sent_and_not_synced_again(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """What fsync has failed for once it never vouches for; being durable in the bucket does instead."""
    async with on_a_broken_disk(tmp_path / "a", memory) as (life, disk):
        disk.refuse["sync_dir pins"] = OSError(errno.EIO, "Input/output error")
        before = disk.syncs.count("pins")
        await life.save("x.pt", b"weights")
        await life.told.until(life.committed("x.pt"))
        assert disk.syncs.count("pins") == before + 1
        (failed,) = life.told.of(Failed)
        assert (failed.stage, failed.reason, failed.what) == ("pin", "disk", "x.pt")
        assert "a power loss may undo that" in failed.error
        assert failed.hint == "look at the disk, and at the kernel's log"
        disk.refuse.clear()
        await life.save("y.pt", b"others", at=1)
        assert (await life.stop()).code == Exit.DURABLE
        assert len(life.told.of(Failed)) == 1
    assert listed(memory) == ["1-2 y.pt", "1-1 x.pt"]


class HasBadSectors(Spool):
    """A spool on a disk that cannot read the bytes of one file back."""

    bad = "bad.pt"

    @contextmanager
    def reading(self, checkpoint: Checkpoint, file: File) -> Iterator[PinnedFile]:
        """As of any spool."""
        with super().reading(checkpoint, file) as pinned:
            yield _Unreadable(os.dup(pinned._descriptor), file) if file.name == self.bad else pinned


class _Unreadable(PinnedFile):
    def read_into(self, offset: int, view: memoryview) -> int:
        """The first sectors are good."""
        if offset:
            raise OSError(errno.EIO, "Input/output error")
        return super().read_into(offset, view)


@pytest.mark.fault("E5")
async def test_a_file_that_cannot_be_read_back_is_said_and_holds_up_no_other(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """It rests, and is tried again; the others are durable, older ones too; nothing of it is published."""
    async with living(tmp_path / "a", memory, workers=2) as life:
        life.spool.__class__ = HasBadSectors
        await life.ready()
        for n, name in enumerate(("older.pt", "bad.pt", "newer.pt")):
            await life.save(name, LARGE if name == "bad.pt" else b"", at=n)
        await life.told.until(lambda: {"older.pt", "newer.pt"} <= set(life.fates(Committed)))
        await life.told.until(lambda: life.told.of(Failed))
        failed = life.told.of(Failed)[0]
        assert (failed.stage, failed.reason, failed.what) == ("pin", "disk", "bad.pt")
        assert "Input/output error" in failed.error
        assert sorted(each.split()[1] for each in listed(memory)) == ["newer.pt", "older.pt"]
        assert "job/bad.pt" not in memory.objects
        life.spool.__class__ = Spool  # the disk has been replaced
        assert (await life.stop()).code == Exit.DURABLE
    assert memory.body("job/bad.pt") == LARGE
    assert memory.uploads == {}


@pytest.mark.fault("E5")
async def test_on_a_disk_that_has_become_read_only_what_is_there_is_still_made_durable(
    tmp_path: Path, memory: MemoryBucket
) -> None:
    """No link, no journal, no unlink: files are held by descriptors, and sent; nothing ends the process."""
    async with on_a_broken_disk(tmp_path / "a", memory) as (life, disk):
        gate = life.steps.hold("part", "large.pt")
        await life.save("large.pt", LARGE)
        await gate.reached.wait()
        for call in ("link", "rename", "write_file", "append", "unlink", "remove_tree"):
            disk.refuse[call] = OSError(errno.EROFS, "Read-only file system")
        gate.opened.set()
        save(life.root, "torn.pt", b"PK\x03\x04")  # its hold cannot be given back
        await life.save("last.pt", b"weights", at=1)
        await life.told.until(lambda: {"large.pt", "last.pt"} <= set(life.fates(Committed)))
        assert (await life.stop()).code == Exit.DURABLE
    async with living(tmp_path / "a", memory) as life:  # mounted writable again
        await life.ready()
        assert (await life.stop()).code == Exit.DURABLE
        assert life.pins == []
    assert listed(memory) == ["1-2 last.pt", "1-1 large.pt"]


@pytest.mark.fault("E4", "E5")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
async def test_nobody_trains_before_the_disk_has_taken_the_claim(
    tmp_path: Path, memory: MemoryBucket, code: int
) -> None:
    """Else the next life would number what it finds before what this one has made durable."""
    disk = Broken()
    async with living(tmp_path / "a", memory, disk=disk) as life:
        disk.refuse["write_file spool.json"] = OSError(code, os.strerror(code))
        life.start()
        await life.told.until(life.not_ready)
        assert life.told.of(Failed)[0].hint in (
            "make room there",
            "look at the disk, and at the kernel's log",
        )
        await life.save("last.pt", b"weights")
        assert memory.objects.keys() == {"job/latest.json"}
        disk.refuse.clear()
        await life.told.until(life.committed("last.pt"))
        assert life.told.of(Ready)
        assert json.loads((life.spool.home / "spool.json").read_bytes())["generation"] == 1
    assert manifest_in(memory).generation == 1


# --- a thread that hears nothing ---------------------------------------------------------------------------


@pytest.mark.fault("E3")
async def test_who_does_not_hear_that_the_drain_is_over_is_left_behind(
    tmp_path: Path, memory: MemoryBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread in a dead socket or disk: the process is ended with 3 and the list all the same."""
    monkeypatch.setattr(sidecar_module, "OVERTIME", 0.05)
    left: asyncio.Future[End] = asyncio.get_running_loop().create_future()
    hears = asyncio.Event()

    async def deaf() -> None:
        while not hears.is_set():
            with suppress(asyncio.CancelledError):
                await hears.wait()

    async with living(tmp_path / "a", memory, drain_timeout=0.05) as life:
        world = replace(life.sidecar._world, leave=left.set_result)
        life.sidecar = Sidecar(life.sidecar._settings, world, spool=life.spool, book=life.book)
        await life.ready()
        life.steps.on("put", "x.pt", before=deaf)
        await life.save("x.pt")
        life.sidecar.stop.set()
        await asyncio.wait([left], timeout=10)
        hears.set()
        assert left.done()
        assert left.result() == End(Exit.NOT_DURABLE, "not durable at the drain deadline: x.pt")
        assert life.told.of(Drained)[0] == Drained(("x.pt",))


# --- the power fails ------------------------------------------------------------------------------------

TORN = [b"", b"{", bytes(100), b'{"schema": 1, "spool": "spool a", "att', b"\xff\xfe"]


def cut(path: Path, torn: bytes | None) -> None:
    """Leave of the file what a power loss may: nothing, other bytes, or zeros."""
    path.unlink()
    if torn is not None:
        path.write_bytes(torn)


@pytest.mark.fault("E6")
@pytest.mark.parametrize(
    "torn", [None, *TORN], ids=["missing", "empty", "one byte", "zeros", "half", "no text"]
)
async def test_a_power_loss_that_tears_all_that_was_written_last_costs_no_checkpoint(
    tmp_path: Path, memory: MemoryBucket, torn: bytes | None
) -> None:
    """Record, journal and table at once, in mid-upload: what was pinned becomes durable, once."""
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        await life.save("durable.pt")
        await life.told.until(life.committed("durable.pt"))
        gate = life.steps.hold("part", "large.pt", passing=1)
        await life.save("large.pt", LARGE, at=1)
        await gate.reached.wait()
        await life.save("waits.pt", at=2)
        home = life.spool.home
        assert life.running is not None
        life.running.cancel()
        await asyncio.wait([life.running])
    cut(home / "spool.json", torn)
    cut(home / "known.jsonl", torn)
    for entry in (home / "pins").glob("*.json"):
        cut(entry, torn)
    for name in ("large.pt", "waits.pt"):
        (tmp_path / "a" / name).unlink()
    spool = Spool(tmp_path / "a")
    complaints = spool.open(new_id="another one")
    assert complaints == [] if torn is None else "spool.json cannot be read" in complaints[0]
    spool.close()
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        assert (await life.stop()).code == Exit.DURABLE
        assert "durable.pt" not in life.fates(Committed)
        assert life.pins == []
    assert [each.split()[1] for each in listed(memory)] == ["waits.pt", "large.pt", "durable.pt"]
    assert memory.body("job/large.pt") == LARGE
    assert memory.uploads == {}


@pytest.mark.fault("E6")
def test_a_record_from_the_past_gives_no_id_twice(tmp_path: Path) -> None:
    """An older spool.json came back: what the pins and the table tell is above it, and counts."""
    spool = opened_spool(tmp_path, generation=2)
    old = (spool.home / "spool.json").read_bytes()
    early = pin(spool, save(tmp_path, "early.pt", b"x"))
    spool.claimed(generation=7, attempt="attempt-2")
    kept = pin(spool, save(tmp_path, "kept.pt", b"x"))
    durable = pin(spool, save(tmp_path, "durable.pt", b"x"))
    spool.release(durable, durable_as=durable.id)
    spool.close()
    (spool.home / "spool.json").write_bytes(old)
    again = opened_spool(tmp_path)
    assert again.recover().checkpoints == [early, kept]
    assert again.record.generation == 7
    assert pin(again, save(tmp_path, "new.pt", b"x")).id > durable.id > kept.id > early.id
    again.close()


@pytest.mark.fault("E6")
def test_of_link_and_entry_recovery_needs_the_link_alone(tmp_path: Path) -> None:
    """A link without its entry is taken up, an entry without its link is said; the others stand beside."""
    spool = opened_spool(tmp_path, generation=3)
    pins = [pin(spool, save(tmp_path, f"{n}.pt", b"%d" % n)) for n in range(4)]
    home = spool.home / "pins"
    (home / f"{pins[1].id}.json").unlink()
    spool.disk.remove_tree(home / str(pins[2].id))
    spool.close()
    again = opened_spool(tmp_path)
    found = again.recover()
    assert found.checkpoints == [pins[0], pins[1], pins[3]]
    assert [Path(where).name for where, _ in found.broken] == [f"{pins[2].id}.json"]
    again.close()


# --- the loop stands still, the clocks jump --------------------------------------------------------------


class Clocks:
    """The clocks of a life that has not begun yet, and its event loop's; they can be put forward or back."""

    def __init__(self, life: Life) -> None:
        self._wall = self._monotonic = 0.0
        before, loop = life.sidecar._world, asyncio.get_running_loop()
        wall, seconds = before.times.wall, before.seconds
        of_the_loop: Callable[[], float] = loop.time

        def now() -> float:
            return of_the_loop() + self._monotonic

        loop.time = now  # type: ignore[method-assign]
        times = replace(before.times, wall=lambda: wall() + int(self._wall * SECOND))
        world = replace(before, times=times, seconds=lambda: seconds() + self._monotonic)
        life.sidecar = Sidecar(life.sidecar._settings, world, spool=life.spool, book=life.book)

    def jump(self, *, wall: float, monotonic: float) -> None:
        """Put them forward by so many seconds."""
        self._wall += wall
        self._monotonic += monotonic


@pytest.mark.fault("E8")
@pytest.mark.parametrize("slept", [10.0, 3600.0], ids=["blocked", "suspended"])
async def test_who_stood_still_is_neither_fenced_nor_loses_what_it_was_doing(
    tmp_path: Path, memory: MemoryBucket, slept: float
) -> None:
    """All clocks go on by 10 s, or an hour, in the middle of an upload: it is finished, and nothing fails."""
    async with living(tmp_path / "a", memory) as life:
        clocks = Clocks(life)
        await life.ready()
        gate = life.steps.hold("part", "large.pt", passing=1)
        await life.save("large.pt", LARGE)
        await gate.reached.wait()
        clocks.jump(wall=slept, monotonic=slept)
        await life.save("next.pt", at=1)
        gate.opened.set()
        assert (await life.stop()).code == Exit.DURABLE
        assert life.told.of(Fenced) == []
        assert life.told.of(Failed) == []
        assert manifest_in(memory).generation == 1
    assert listed(memory) == ["1-2 next.pt", "1-1 large.pt"]


@pytest.mark.fault("E9")
@pytest.mark.parametrize("days", [-1, 1])
async def test_a_wall_clock_that_jumps_a_day_changes_neither_ids_nor_order(
    tmp_path: Path, memory: MemoryBucket, days: int
) -> None:
    """The trainer's files jump with it. The newest is what was saved last."""
    async with living(tmp_path / "a", memory) as life:
        clocks = Clocks(life)
        await life.ready()
        await life.save("before.pt", at=0)
        await life.told.until(life.committed("before.pt"))
        clocks.jump(wall=days * 86400.0, monotonic=0.0)
        await life.save("after.pt", at=days * 86400)
        await life.save("last.pt", at=days * 86400 + 1)
        await life.told.until(life.committed("last.pt"))
        assert life.told.of(Fenced) == []
        assert (await life.stop()).code == Exit.DURABLE
    assert listed(memory) == ["1-3 last.pt", "1-2 after.pt", "1-1 before.pt"]
    async with living(tmp_path / "b", memory) as life:
        await life.ready()
        assert life.restored == ("restored", "last.pt")
        await life.stop()


# --- limits ------------------------------------------------------------------------------------------------


@pytest.mark.fault("E7")
async def test_without_a_thread_for_events_the_rescan_alone_serves(
    tmp_path: Path, memory: MemoryBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again at every listing, which costs no descriptor; once there is one, events come again."""

    def cannot(_thread: InotifyFD) -> None:
        raise RuntimeError("can't start new thread")

    before = descriptors()
    async with living(tmp_path / "a", memory, rescan_every=0.1) as life:
        with monkeypatch.context() as limited:
            limited.setattr(InotifyFD, "start", cannot)
            await life.ready()
            await life.save("x.pt")
            await life.told.until(life.committed("x.pt"))
            started = len(life.told.of(Rescanned))
            held = descriptors()
            await life.told.until(lambda: len(life.told.of(Rescanned)) > started + 3)
            assert descriptors() == held
            (lost,) = life.told.of(WatchLost)
            assert "no more threads" in lost.reason
            assert "ulimit -u" in lost.reason
        await life.told.until(lambda: [each for each in life.told.of(Rescanned) if each.reason == "rewatch"])
        assert (await life.stop()).code == Exit.DURABLE
    assert descriptors() == before


@pytest.mark.fault("E7")
def test_a_pool_has_all_its_threads_from_the_start_or_says_that_it_has_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None is missing later, when others have used the limit up; a start that failed leaves none."""
    pool = started(5, "of-the-test")
    assert sum(each.name.startswith("of-the-test") for each in threading.enumerate()) == 5
    pool.shutdown()
    real, left = threading.Thread.start, [3]

    def start(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="new thread"):
        started(5, "of-the-test")
    assert not [each for each in threading.enumerate() if each.name.startswith("of-the-test")]
