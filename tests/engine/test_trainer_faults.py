"""Whatever a trainer does to its files, what it completed becomes durable as it was completed, and only that.

The real watcher with the kernel's events, the real spool, the real pipeline; mostly a bucket in memory.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ckpt_sidecar.bucket import GIB, MAX_PARTS, MIB, Bucket, Condition, ObjectRef, Part, Source, Span, Upload
from ckpt_sidecar.checkpoint import Changed, Committed, Id, Pinned
from ckpt_sidecar.completion import Evidence
from ckpt_sidecar.disk import files_below
from ckpt_sidecar.events import Ignored, Moved, Progress, Rescanned, Torn, WatchLost
from ckpt_sidecar.formats import Rules, flaw_of
from ckpt_sidecar.landing import Landing
from ckpt_sidecar.log import fields_of
from ckpt_sidecar.metrics import Metrics
from ckpt_sidecar.patience import PatientBucket
from ckpt_sidecar.restorer import Restorer
from tests.engine.support import PREFIX, holder, listed
from tests.engine.test_pipeline import LARGE, Line
from tests.fakes import MemoryBucket
from tests.whole.running import archive
from tests.whole.test_bad_input import NAMES, REFUSED

QUICK = Rules(settle=0.1, patience=0.4)
PATIENT = Rules(settle=0.1, patience=60.0)  # a file that pauses is not called torn
DAY = 86_400


async def started(root: Path, **more: Any) -> Line:
    """Return a sidecar that has claimed, and catches from now on."""
    root.mkdir(exist_ok=True)
    options: dict[str, Any] = {"rules": QUICK, "rescan_every": 0.1} | more
    it = Line(root, events=True, **options)
    it.spool.claimed(generation=await it.ledger.claim(holder()), attempt="attempt-1")
    it.watcher.start()
    await it.pipeline.pin(await it.watcher.first())
    return it


@asynccontextmanager
async def serving(root: Path, **more: Any) -> AsyncIterator[Line]:
    """A sidecar at work on the directory; at the end it drains."""
    it = await started(root, **more)
    try:
        async with it.working():
            yield it
    finally:
        it.watcher.close()
        it.spool.close()


async def committed(it: Line, *names: str) -> None:
    """Wait until all these are durable, and everything else is as well."""
    await it.told.until(lambda: it.committed(*names)() and not len(it.pipeline.book))


async def rescans(it: Line, more: int = 3) -> None:
    """Wait until the directory has been listed so many times more."""
    enough = len(it.told.of(Rescanned)) + more
    await it.told.until(lambda: len(it.told.of(Rescanned)) >= enough)


def place(path: Path, data: bytes, *, at: float | None = None) -> None:
    """Write under another name, and rename; by a clock that says `at`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("being-written.tmp")
    temporary.write_bytes(data)
    if at is not None:
        os.utime(temporary, (at, at))
    temporary.rename(path)


def sent(it: Line) -> list[str]:
    """The names of what was sent, once for each time."""
    return [each.name for each in it.told.of(Progress) if each.done == each.total]


def pinned(it: Line) -> list[str]:
    """The names of what became a checkpoint, in the order of their ids."""
    return [
        each.checkpoint.name for each in sorted(moves_to(it, Pinned), key=lambda each: each.checkpoint.id)
    ]


def moves_to(it: Line, state: type) -> list[Moved]:
    """What came to that state."""
    return [each for each in it.told.of(Moved) if isinstance(each.checkpoint.state, state)]


# --- what is written under the upload, or after it -----------------------------------------------------


@pytest.mark.fault("A7")
async def test_the_old_object_stays_until_the_rewritten_file_is_whole_in_the_bucket(tmp_path: Path) -> None:
    """Truncated and written in place between two parts: the upload goes, and no mixture ever stands there."""
    second, third = (random.Random(n).randbytes(len(LARGE)) for n in (2, 3))
    async with serving(tmp_path, memory=MemoryBucket(versioned=True), workers=1) as it:
        place(tmp_path / "last.pt", LARGE)
        await committed(it, "last.pt")
        gate = it.steps.hold("part", "last.pt", passing=1)
        (tmp_path / "last.pt").write_bytes(second)
        await gate.reached.wait()
        (tmp_path / "last.pt").write_bytes(third)
        assert it.body("last.pt") == LARGE
        gate.opened.set()
        await it.told.until(lambda: len(it.fates(Committed)) == 2)
        assert it.fates(Changed) == ["last.pt"]
        stood = [each.body for (key, _), each in it.memory.versions.items() if each and key.endswith(".pt")]
        assert stood == [LARGE, third]
        assert it.memory.uploads == {}


@pytest.mark.fault("A8")
async def test_an_append_under_the_upload_is_a_change(tmp_path: Path) -> None:
    """The bytes that were pinned are sent no more; what the file holds now is judged, and sent."""
    async with serving(tmp_path) as it:
        gate = it.steps.hold("put", "x.pt")
        place(tmp_path / "x.pt", b"weights")
        await gate.reached.wait()
        with (tmp_path / "x.pt").open("ab") as file:
            file.write(b" and more")
        gate.opened.set()
        await committed(it, "x.pt")
        assert it.fates(Changed) == ["x.pt"]
        assert it.body("x.pt") == b"weights and more"


@pytest.mark.fault("A8")
async def test_an_append_that_breaks_an_archive_never_reaches_the_bucket(tmp_path: Path) -> None:
    """What was durable before stays the newest; the broken file is reported."""
    async with serving(tmp_path) as it:
        place(tmp_path / "x.pt", archive())
        await committed(it, "x.pt")
        with (tmp_path / "x.pt").open("ab") as file:
            file.write(b"garbage")
        await it.told.until(lambda: it.told.of(Torn))
        assert (
            it.told.of(Torn)[0].reason == "7 bytes follow the end record of the zip archive, it announces 0"
        )
        await rescans(it)
        assert it.body("x.pt") == archive()
        assert listed(it.memory) == ["1-1 x.pt"]


def _open_and_close(path: Path) -> None:
    path.open("ab").close()


METADATA: Mapping[str, Callable[[Path], object]] = {
    "touched": os.utime,
    "set to 1970": lambda path: os.utime(path, (0, 0)),
    "another mode": lambda path: path.chmod(0o640),
    "opened and closed": _open_and_close,
    "linked elsewhere": lambda path: (path.parent / "link.other").hardlink_to(path),
    "renamed and back": lambda path: path.rename(path.with_suffix(".bak")).rename(path),
}


@pytest.mark.fault("A8")
@pytest.mark.parametrize("change", METADATA.values(), ids=METADATA)
async def test_a_durable_file_with_other_metadata_is_not_sent_again(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """Nor does it become the newest: a touched old checkpoint is as old as its bytes."""
    async with serving(tmp_path) as it:
        place(tmp_path / "old.pt", LARGE)
        await committed(it, "old.pt")
        place(tmp_path / "new.pt", archive())
        await committed(it, "new.pt")
        change(tmp_path / "old.pt")
        await rescans(it)
        place(tmp_path / "newest.pt", archive())
        await committed(it, "newest.pt")
        assert sent(it) == ["old.pt", "new.pt", "newest.pt"]
        assert [each.split()[1] for each in listed(it.memory)] == ["newest.pt", "new.pt", "old.pt"]
        status = (tmp_path / "old.pt").stat()
        assert it.spool.known.durable_files()[Id(1, 1)].mtime_ns == status.st_mtime_ns


@pytest.mark.fault("A8")
async def test_a_file_that_was_touched_while_nobody_watched_is_not_sent_again(tmp_path: Path) -> None:
    """The next life knows no inode; the object's checksum tells, and the newest stays the newest."""
    memory = MemoryBucket()
    async with serving(tmp_path, memory=memory) as it:
        for name in ("old.pt", "new.pt"):
            place(tmp_path / name, archive(name))
            await committed(it, name)
    os.utime(tmp_path / "old.pt")
    async with serving(tmp_path, memory=memory) as it:
        await it.told.until(lambda: it.fates(Pinned) == ["old.pt"] and not len(it.pipeline.book))
        assert sent(it) == []
        assert listed(memory) == ["1-2 new.pt", "1-1 old.pt"]


@pytest.mark.fault("A8")
async def test_a_rewrite_in_place_that_keeps_the_size_is_sent(tmp_path: Path) -> None:
    """It has the inode and the size of what is durable, as a touched file has; but not its bytes."""
    async with serving(tmp_path) as it:
        (tmp_path / "x.pt").write_bytes(b"weights")
        await committed(it, "x.pt")
        (tmp_path / "x.pt").write_bytes(b"WEIGHTS")
        await it.told.until(lambda: len(it.fates(Pinned)) == 2 and not len(it.pipeline.book))
        assert it.body("x.pt") == b"WEIGHTS"
        assert sent(it) == ["x.pt", "x.pt"]


@pytest.mark.fault("A8")
async def test_other_metadata_under_the_upload_is_no_change(tmp_path: Path) -> None:
    """A mode, a link, another name: the upload goes on."""
    async with serving(tmp_path) as it:
        gate = it.steps.hold("part", "x.pt", passing=1)
        place(tmp_path / "x.pt", LARGE)
        await gate.reached.wait()
        (tmp_path / "x.pt").chmod(0o640)
        (tmp_path / "link.other").hardlink_to(tmp_path / "x.pt")
        (tmp_path / "x.pt").rename(tmp_path / "gone.other")
        gate.opened.set()
        await committed(it, "x.pt")
        assert it.fates(Changed) == []
        assert it.body("x.pt") == LARGE


@pytest.mark.fault("A8")
async def test_a_touch_under_the_upload_begins_it_anew(tmp_path: Path) -> None:
    """Only the time tells of a rewrite, so it is believed; in the end the file is durable, once."""
    async with serving(tmp_path) as it:
        gate = it.steps.hold("part", "x.pt", passing=1)
        place(tmp_path / "x.pt", LARGE)
        await gate.reached.wait()
        os.utime(tmp_path / "x.pt")
        gate.opened.set()
        await committed(it, "x.pt")
        assert it.body("x.pt") == LARGE
        assert listed(it.memory) == ["1-2 x.pt"]
        assert it.memory.uploads == {}


@pytest.mark.fault("A9")
@pytest.mark.parametrize("name", ["rename", "hardlink_to"])
async def test_another_name_of_a_durable_checkpoint_is_sent_under_it(tmp_path: Path, name: str) -> None:
    """The bytes are sent again (there is no copy on the store's side); the first name keeps its object."""
    async with serving(tmp_path) as it:
        place(tmp_path / "epoch_3.pt", LARGE)
        await committed(it, "epoch_3.pt")
        if name == "rename":
            (tmp_path / "epoch_3.pt").rename(tmp_path / "best.pt")
        else:
            (tmp_path / "best.pt").hardlink_to(tmp_path / "epoch_3.pt")
        await committed(it, "best.pt")
        assert sent(it) == ["epoch_3.pt", "best.pt"]
        assert it.body("best.pt") == it.body("epoch_3.pt") == LARGE
        assert listed(it.memory) == ["1-2 best.pt", "1-1 epoch_3.pt"]
        await rescans(it)
        assert sent(it) == ["epoch_3.pt", "best.pt"]


# --- names ---------------------------------------------------------------------------------------------


async def restored(bucket: Bucket, it: Line, into: Path) -> None:
    """Restore the newest checkpoint as the next node does."""
    into.mkdir()
    after = Line(into)
    try:
        patient = PatientBucket(bucket, sleep=_no_sleep, chance=lambda: 0.0, tell=it.told)
        restorer = Restorer(
            patient,
            Landing(into),
            known=after.spool.known,
            workers=2,
            part_bytes=5 * MIB,
            flaw_of=flaw_of,
            seconds=time.monotonic,
            tell=it.told,
        )
        await restorer.restore(it.ledger.manifest)
    finally:
        after.spool.close()


async def _no_sleep(_seconds: float) -> None:
    pass


@pytest.mark.fault("A11")
@pytest.mark.parametrize("name", NAMES)
async def test_a_name_goes_to_the_store_and_back_byte_for_byte(
    tmp_path: Path, bucket: Bucket, name: str
) -> None:
    """Found by an event, sent under a key of that very name, listed, and restored under it."""
    async with serving(tmp_path / "here", bucket=bucket) as it:
        place(it.root / name, archive(name))
        await committed(it, name)
    keys = [each.key async for each in bucket.list(PREFIX)]
    assert sorted(keys) == sorted([PREFIX + name, PREFIX + "latest.json"])
    await restored(bucket, it, tmp_path / "there")
    found = [each for each in (tmp_path / "there").rglob("*.pt") if ".ckpt-sidecar" not in each.parts]
    assert [os.fsencode(each.relative_to(tmp_path / "there")) for each in found] == [name.encode()]
    assert found[0].read_bytes() == archive(name)


@pytest.mark.fault("A11")
@pytest.mark.parametrize("raw", [*REFUSED, b"latest.json", b"deeper/latest.json"])
async def test_a_name_that_cannot_be_a_key_is_refused_with_its_reason(tmp_path: Path, raw: bytes) -> None:
    """Said once, and nothing is sent; a good file beside it is."""
    rules = Rules(("*.pt", "*.json"), settle=0.1, patience=0.4)
    shown, reason = REFUSED.get(raw, (os.fsdecode(raw), "is one of ckpt-sidecar's own names"))
    async with serving(tmp_path, rules=rules) as it:
        place(tmp_path / os.fsdecode(raw), archive())
        place(tmp_path / "good.pt", archive())
        await committed(it, "good.pt")
        await it.told.until(lambda: it.told.of(Ignored))
        await rescans(it)
        (ignored,) = it.told.of(Ignored)
        assert shown in ignored.name
        assert ignored.reason == reason
        assert sorted(it.memory.objects) == ["job/good.pt", "job/latest.json"]
        assert listed(it.memory) == ["1-1 good.pt"]


# --- directories, and other file systems -----------------------------------------------------------------


@pytest.mark.fault("A12")
async def test_what_was_completed_in_directories_that_are_gone_arrives(tmp_path: Path) -> None:
    """Nested, moved in from outside, renamed; then all of them are removed while everything is queued."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    names = ["a/b/c/deep.pt", "in/x.pt", "in/deep/y.pt", "checkpoint-10/z.pt"]
    async with serving(root) as it:
        gate = it.steps.hold("put", ".pt", times=99)
        (root / "a/b/c").mkdir(parents=True)
        place(root / "a/b/c/deep.pt", archive("deep.pt"))
        (outside / "deep").mkdir(parents=True)
        place(outside / "x.pt", archive("x.pt"))
        place(outside / "deep/y.pt", archive("y.pt"))
        outside.rename(root / "in")
        (root / "tmp-checkpoint-10").mkdir()
        place(root / "tmp-checkpoint-10/z.pt", archive("z.pt"))
        (root / "tmp-checkpoint-10").rename(root / "checkpoint-10")
        await it.told.until(lambda: set(names) <= set(it.fates(Pinned)))
        for name in ("a", "in", "checkpoint-10"):
            shutil.rmtree(root / name)
        gate.opened.set()
        await committed(it, *names)
        for name in names:
            assert it.body(name) == archive(Path(name).name)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system than that of `tmp_path`."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        if Path(path).stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm is no other file system here")
        yield Path(path)


@pytest.mark.fault("A13")
async def test_a_file_that_is_moved_in_from_another_file_system_is_taken_when_it_is_whole(
    tmp_path: Path, elsewhere: Path
) -> None:
    """A copy under its final name: it pauses, gets its old time at the end, and then its source goes."""
    source, data = elsewhere / "x.pt", archive("w" * 100_000)
    source.write_bytes(data)
    os.utime(source, (1000, 1000))
    async with serving(tmp_path, rules=PATIENT) as it:
        with (tmp_path / "x.pt").open("wb") as file:
            for piece in (data[:4096], data[4096:-10]):
                file.write(piece)
                file.flush()
                await rescans(it)
                assert it.fates(Pinned) == []
            file.write(data[-10:])
        shutil.copystat(source, tmp_path / "x.pt")
        source.unlink()
        await committed(it, "x.pt")
        await rescans(it)
        assert it.body("x.pt") == data
        assert it.fates(Committed) == ["x.pt"]
        assert it.told.of(Torn) == []


@pytest.mark.fault("A13")
async def test_a_move_between_file_systems_is_one_checkpoint(tmp_path: Path, elsewhere: Path) -> None:
    """As Python does it: copied, closed, and then given its old time, under the upload or after it."""
    async with serving(tmp_path) as it:
        names = [f"{n}.pt" for n in range(10)]
        for n, name in enumerate(names):
            (elsewhere / name).write_bytes(archive(name))
            os.utime(elsewhere / name, (1000 + n, 1000 + n))
            shutil.move(elsewhere / name, tmp_path / name)
        await committed(it, *names)
        await rescans(it)
        assert sorted(it.fates(Committed)) == names
        assert all(it.body(name) == archive(name) for name in names)


# --- mmap ------------------------------------------------------------------------------------------------


def write_by_mmap(path: Path, offset: int, data: bytes) -> None:
    """Write through a mapping whose file is closed: no event tells of it."""
    descriptor = os.open(path, os.O_RDWR)
    mapped = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    mapped[offset : offset + len(data)] = data
    mapped.close()


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """A directory on a file system that shows a write through mmap in the file's time."""
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(4096))
    os.utime(probe, (1000, 1000))
    write_by_mmap(probe, 0, b"x")
    if probe.stat().st_mtime == 1000:
        pytest.skip("this file system does not show a write through mmap in the file's time")
    probe.unlink()
    return tmp_path


@pytest.mark.fault("A14")
async def test_what_is_filled_through_mmap_after_its_close_is_taken_when_it_is_whole(shown: Path) -> None:
    """Made, sized and closed while empty; filled without an event: the listing finds that it is whole."""
    data = archive("w" * 100_000)
    async with serving(shown, rules=PATIENT) as it:
        (shown / "x.pt").write_bytes(bytes(len(data)))
        await rescans(it)
        write_by_mmap(shown / "x.pt", 0, data[:-100])
        await rescans(it)
        assert it.fates(Pinned) == []
        write_by_mmap(shown / "x.pt", len(data) - 100, data[-100:])
        await committed(it, "x.pt")
        assert it.body("x.pt") == data


@pytest.mark.fault("A14")
@pytest.mark.parametrize("when", ["before it is read", "between two parts", "after the last part"])
async def test_a_write_through_mmap_under_the_upload_is_seen_before_the_complete(
    shown: Path, when: str
) -> None:
    """Also into a part that was sent already: nothing is completed of it, what the file holds now is sent."""
    async with serving(shown, workers=1) as it:
        place(shown / "first.pt", archive())
        await committed(it, "first.pt")
        if when == "after the last part":
            gate = it.steps.hold("put", "latest.json")  # the announcement, beside the parts
        else:
            gate = it.steps.hold("part", "x.pt", passing=when == "between two parts")
        place(shown / "x.pt", LARGE)
        await gate.reached.wait()
        if when == "after the last part":
            await it.told.until(lambda: "x.pt" in sent(it))
        write_by_mmap(shown / "x.pt", 1000, b"changed")
        gate.opened.set()
        await committed(it, "x.pt")
        assert it.body("x.pt") == LARGE[:1000] + b"changed" + LARGE[1007:]
        assert it.fates(Changed) == ["x.pt"]


# --- two trainers, and their clocks ----------------------------------------------------------------------


@pytest.mark.fault("A15")
async def test_of_two_writers_of_one_file_nothing_torn_is_sent(tmp_path: Path) -> None:
    """The first has written half when the second truncates the file and is done; then the first goes on."""
    first, second = archive("first", records=400), archive("the second", records=7)
    async with serving(tmp_path) as it:
        with (tmp_path / "x.pt").open("wb") as file:
            file.write(first[: len(first) // 2])
            file.flush()
            (tmp_path / "x.pt").write_bytes(second)
            await committed(it, "x.pt")
            assert it.body("x.pt") == second
            file.write(first[len(first) // 2 :])
        await it.told.until(lambda: it.told.of(Torn))
        await rescans(it)
        assert it.body("x.pt") == second
        (tmp_path / "x.pt").write_bytes(first)
        await it.told.until(lambda: len(it.fates(Committed)) == 2)
        assert it.body("x.pt") == first


@pytest.mark.fault("A16")
async def test_the_order_is_that_of_the_saves_whatever_the_trainers_clock_says(tmp_path: Path) -> None:
    """Set back by a day, far in the future, in 1970: what was saved last is the newest."""
    now = time.time()
    clock = {"a.pt": now, "b.pt": now - DAY, "c.pt": now + 30 * DAY, "d.pt": 0.0, "e.pt": now}
    it = await started(tmp_path)
    for name, at in clock.items():
        place(tmp_path / name, archive(name), at=at)
    caught = it.spool.home / "caught"
    while len([each for each in files_below(caught) if not each.parts[-2].startswith("new-")]) < len(clock):
        await asyncio.sleep(0.01)  # all of them are found in one look
    async with it.working():
        await committed(it, *clock)
    assert pinned(it) == list(clock)
    assert [each.split()[1] for each in listed(it.memory)] == list(clock)[::-1]
    it.watcher.close()
    it.spool.close()


@pytest.mark.fault("A16")
@pytest.mark.parametrize("at", [time.time() + 30 * DAY, 0.0], ids=["to come", "1970"])
async def test_the_lag_is_never_negative(tmp_path: Path, at: float) -> None:
    """Not as a metric, not in the log: a file of the future is not durable before it was saved."""
    async with serving(tmp_path) as it:
        metrics = Metrics(version="1", python="3", clock=time.time, book=it.pipeline.book)
        gate = it.steps.hold("put", "x.pt")
        place(tmp_path / "x.pt", archive(), at=at)
        await gate.reached.wait()
        lag = float(metrics.render().decode().split("\nckpt_sidecar_upload_lag_seconds ")[1].split()[0])
        assert lag == 0.0 if at else lag > 50 * 365 * DAY
        gate.opened.set()
        await committed(it, "x.pt")
        assert all(fields_of(each).get("lag_seconds", 0.0) >= 0 for each in it.told.of(Moved))
        for each in it.told:
            metrics.tell(each)
        sums = [line for line in metrics.render().decode().splitlines() if "_seconds_sum " in line]
        assert sums
        assert all(float(line.split()[-1]) >= 0 for line in sums)


# --- size ------------------------------------------------------------------------------------------------


class Layouts(MemoryBucket):
    """A bucket that takes parts without reading them, and keeps how they lay."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[Span] = []

    async def put_part(self, upload: Upload, span: Span, source: Source) -> Part:
        """Keep where it lay."""
        self.spans.append(span)
        return Part(span.number, span.size, f"etag-{span.number}", None)

    async def complete_multipart(
        self, upload: Upload, parts: Sequence[Part], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """Refuse what S3 would refuse."""
        assert [each.number for each in parts] == list(range(1, len(parts) + 1))
        assert len(parts) <= MAX_PARTS
        assert all(5 * MIB <= each.size <= 5 * GIB for each in parts[:-1])
        del self.uploads[upload.upload_id]
        return ObjectRef(upload.key, sum(each.size for each in parts), "etag", None, None, dict(metadata))


@pytest.mark.fault("A17")
@pytest.mark.parametrize("size", [5 * GIB + 1, MAX_PARTS * 5 * MIB, MAX_PARTS * 5 * MIB + 1])
async def test_a_huge_file_lies_in_parts_that_s3_takes(tmp_path: Path, size: int) -> None:
    """Beyond what one put can hold, at the last part there may be, one byte beyond: none is left out."""
    memory = Layouts()
    async with serving(tmp_path, memory=memory, rescan_every=3600.0) as it:
        (tmp_path / "x.tmp").write_bytes(b"weights")
        os.truncate(tmp_path / "x.tmp", size)
        (tmp_path / "x.tmp").rename(tmp_path / "x.pt")
        await committed(it, "x.pt")
        end = 0
        for span in sorted(memory.spans, key=lambda each: each.number):
            assert span.offset == end
            end = span.end
        assert end == size == it.ledger.manifest.checkpoints[0].size
        assert "job/x.pt" not in memory.objects  # no single put was tried


@pytest.mark.fault("A17")
async def test_a_sparse_file_arrives_byte_for_byte(tmp_path: Path) -> None:
    """Its holes are zeros in the bucket."""
    async with serving(tmp_path) as it:
        with (tmp_path / "x.tmp").open("wb") as file:
            file.write(b"first")
            file.seek(7 * MIB)
            file.write(b"middle")
            file.truncate(13 * MIB)
        (tmp_path / "x.tmp").rename(tmp_path / "x.pt")
        assert (tmp_path / "x.pt").stat().st_blocks * 512 < MIB
        await committed(it, "x.pt")
        assert it.body("x.pt") == b"first".ljust(7 * MIB, b"\0") + b"middle".ljust(6 * MIB, b"\0")


# --- the watcher -----------------------------------------------------------------------------------------


@pytest.mark.fault("B5")
async def test_events_that_come_twice_or_in_disorder_make_one_checkpoint_each(tmp_path: Path) -> None:
    """And those of files that are gone, or were never there, make none."""
    names = [f"{n}.pt" for n in range(20)]
    chance = random.Random(5)
    async with serving(tmp_path) as it:
        for name in names:
            place(tmp_path / name, archive(name))
        place(tmp_path / "gone.pt.other", archive())
        heard = [(name, evidence) for name in [*names, "gone.pt", "never/x.pt"] for evidence in Evidence] * 3
        chance.shuffle(heard)
        for name, evidence in heard:
            it.watcher._inbox.heard(name, evidence)
        await committed(it, *names)
        for name, evidence in heard:
            it.watcher._inbox.heard(name, evidence)
        await rescans(it)
        assert sorted(pinned(it)) == sorted(it.fates(Committed)) == sorted(names)
        assert list((it.spool.home / "caught").iterdir()) == []


@pytest.mark.fault("B7")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_thread_that_died_of_an_exception_is_followed_by_another(tmp_path: Path) -> None:
    """Noticed at the next listing, told, and started anew: what is saved then is found by its event again."""
    async with serving(tmp_path) as it:
        dead = it.watcher._tree
        assert dead is not None

        def fail(*_: object) -> None:
            raise RuntimeError("a bug in the library")

        dead._inotify.handle_event = fail  # type: ignore[assignment, method-assign]
        place(tmp_path / "x.pt", archive())
        await committed(it, "x.pt")
        assert not dead._inotify.is_alive()
        assert len(it.told.of(WatchLost)) == 1
        assert "rewatch" in [each.reason for each in it.told.of(Rescanned)]
        it.watcher._rescan_every = 3600.0
        await rescans(it, 1)
        place(tmp_path / "y.pt", archive())
        await committed(it, "y.pt")
        assert not [each for each in threading.enumerate() if each is dead._inotify]


@pytest.mark.fault("B3")
async def test_what_is_being_sent_is_finished_although_the_watch_directory_is_gone(tmp_path: Path) -> None:
    """Its descriptor is open; what is saved in the directory that is made anew gets the next ids."""
    root = tmp_path / "root"
    async with serving(root) as it:
        place(root / "a.pt", archive())
        await committed(it, "a.pt")
        gate = it.steps.hold("part", "b.pt", passing=1)
        place(root / "b.pt", LARGE)
        await gate.reached.wait()
        shutil.rmtree(root)
        await it.told.until(lambda: it.told.of(WatchLost))
        root.mkdir()
        place(root / "c.pt", archive("c.pt"))
        await it.told.until(it.committed("c.pt"))
        gate.opened.set()
        await committed(it, "b.pt", "c.pt")
        assert it.body("b.pt") == LARGE
        assert listed(it.memory) == ["1-3 c.pt", "1-2 b.pt", "1-1 a.pt"]
        assert it.spool.home.stat().st_mode & 0o777 == 0o700
        assert it.pins == []
