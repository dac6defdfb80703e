"""Whatever a trainer completes arrives once, whole, from events or from the listing; nothing else does."""

import asyncio
import gc
import io
import itertools
import os
import shutil
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pytest
import torch

from ckpt_sidecar import watcher
from ckpt_sidecar.checkpoint import Caught, File
from ckpt_sidecar.completion import Candidate, completed_at
from ckpt_sidecar.disk import inode_of
from ckpt_sidecar.events import Event, Failed, Ignored, Rescanned, Torn, WatchLost
from ckpt_sidecar.formats import Rules
from ckpt_sidecar.hints import Listener, Tree
from ckpt_sidecar.watcher import Found, Watcher

QUICK = Rules(settle=0.1, patience=0.4)
SLOW = Rules(settle=20.0, patience=60.0)  # a test under these would time out if it had to wait
E = TypeVar("E", bound=Event)


class Holds:
    """A catcher: hard links in a directory that is not watched."""

    def __init__(self, root: Path) -> None:
        self.root, self.home, self.numbers = root, root / ".ckpt-sidecar", itertools.count()
        self.refuse: OSError | None = None

    def catch(self, name: str) -> Caught | None:
        """Hold the file by a link named after its inode and name."""
        if self.refuse is not None:
            raise self.refuse
        self.home.mkdir(exist_ok=True)
        fresh = self.home / f"{next(self.numbers)}.tmp"
        try:
            os.link(self.root / name, fresh, follow_symlinks=False)
        except FileNotFoundError:
            return None
        found = fresh.stat()
        settled = self.home / f"{found.st_ino}-{name.replace('/', '|')}"
        fresh.rename(settled)
        fresh.unlink(missing_ok=True)
        return Caught(name, (found.st_dev, found.st_ino), str(settled))

    def let_go(self, caught: Caught) -> None:
        """Remove the link."""
        Path(str(caught.path)).unlink(missing_ok=True)

    def held_bytes(self) -> int:
        """Nobody asks how many."""
        return 0

    def open_caught(self, caught: Caught) -> BinaryIO:
        """Open the link."""
        return Path(str(caught.path)).open("rb")

    def names(self) -> list[str]:
        """What is held."""
        return sorted(each.name.split("-", 1)[1] for each in self.home.glob("*-*"))


class Rig:
    """A watcher over a directory, and what came of it."""

    def __init__(
        self, root: Path, *, rules: Rules, rescan_every: float, events: bool, already: Sequence[Caught]
    ) -> None:
        self.root, self.holds, self.known = root, Holds(root), set[File]()
        self.told: list[Event] = []
        self.news = asyncio.Event()
        self.stop = asyncio.Event()
        self.watcher = Watcher(
            root,
            rules,
            catcher=self.holds,
            known=lambda file: file in self.known,
            tell=self.tell,
            rescan_every=rescan_every,
            clock=time.monotonic,
            wall=time.time,
            events=events,
            already=already,
        )
        self.batches = self.watcher.batches(self.stop)
        self._coming: asyncio.Future[list[Found]] | None = None

    def tell(self, event: Event) -> None:
        """Keep what was told."""
        self.told.append(event)
        self.news.set()

    def all(self, kind: type[E]) -> list[E]:
        """What was told of that kind."""
        return [each for each in self.told if isinstance(each, kind)]

    def take(self, batch: list[Found]) -> list[str]:
        """Do as the sidecar does with a batch; return the names."""
        self.known.update(each.file for each in batch)
        return [each.file.name for each in batch]

    async def until(self, *names: str) -> list[str]:
        """Take what comes until all these names have come; return all that came."""
        got: list[str] = []
        while not set(names) <= set(got):
            got += await self.next()
        return got

    async def next(self) -> list[str]:
        """Take the next batch; return its names."""
        found = await self.coming()
        self._coming = None
        return self.take(found)

    def coming(self) -> asyncio.Future[list[Found]]:
        """The next batch, which nobody asks for twice."""
        if self._coming is None:
            self._coming = asyncio.ensure_future(anext(self.batches))
        return self._coming

    async def until_told(self, kind: type[E], n: int = 1) -> E:
        """Go on until the n-th event of that kind; nothing may be completed meanwhile."""
        while len(self.all(kind)) < n:
            self.news.clear()
            coming, news = self.coming(), asyncio.ensure_future(self.news.wait())
            first: set[asyncio.Future[Any]] = {coming, news}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            news.cancel()
            assert not coming.done(), f"{coming}"
        return self.all(kind)[n - 1]

    async def ended(self) -> None:
        """Leave nothing behind that waits."""
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.wait([self._coming])

    async def rest(self) -> list[str]:
        """Stop, and return what the last look brings."""
        self.stop.set()
        try:
            first = [] if self._coming is None else await self.next()
        except StopAsyncIteration:
            return []
        return first + [name async for batch in self.batches for name in self.take(batch)]


@asynccontextmanager
async def rig(
    root: Path,
    *,
    rules: Rules = QUICK,
    rescan_every: float = 3600.0,
    events: bool = True,
    already: Sequence[Caught] = (),
) -> AsyncIterator[Rig]:
    """A watcher that has started and found nothing there yet, unless there is something."""
    this = Rig(root, rules=rules, rescan_every=rescan_every, events=events, already=already)
    this.watcher.start()
    this.take(await this.watcher.first())
    try:
        yield this
    finally:
        await this.ended()
        this.watcher.close()


def archive(n: int = 1, size: int = 100) -> bytes:
    """A checkpoint's bytes."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.full((size,), float(n))}, buffer)
    return buffer.getvalue()


def place(path: Path, data: bytes) -> None:
    """Write beside it, and rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.rename(path)


def save(path: Path, n: int = 1, size: int = 100) -> None:
    """Save as most trainers do."""
    torch.save({"weight": torch.full((size,), float(n))}, path)


# --- completed by events -----------------------------------------------------------------------------


@pytest.mark.fault("A1")
async def test_a_rename_completes_at_once(tmp_path: Path) -> None:
    """And the temporary name never arrives."""
    async with rig(tmp_path, rules=SLOW) as this:
        place(tmp_path / "x.pt", archive())
        assert await this.until("x.pt") == ["x.pt"]
        assert await this.rest() == []
        assert this.holds.names() == ["x.pt"]


async def test_a_plain_save_completes_when_it_is_closed(tmp_path: Path) -> None:
    async with rig(tmp_path, rules=SLOW) as this:
        save(tmp_path / "x.pt")
        assert await this.until("x.pt") == ["x.pt"]


async def test_a_file_without_a_seal_completes_when_it_has_settled(tmp_path: Path) -> None:
    async with rig(tmp_path) as this:
        began = time.monotonic()
        (tmp_path / "x.pt").write_bytes(b"weights")
        assert await this.until("x.pt") == ["x.pt"]
        assert time.monotonic() - began >= QUICK.settle


@pytest.mark.fault("A2")
async def test_a_file_that_is_being_written_is_never_taken_early(tmp_path: Path) -> None:
    """Not even when it pauses longer than files must settle, and its bytes so far would do."""
    async with rig(tmp_path, rules=Rules(settle=0.05, patience=30.0)) as this:
        with (tmp_path / "x.pt").open("wb") as file:
            file.write(b"weights")
            file.flush()
            while this.watcher._held == {} or not all(h.candidate.size for h in this.watcher._held.values()):
                place(tmp_path / "marker.pt", archive())
                await this.until("marker.pt")
                await asyncio.sleep(QUICK.settle)
            place(tmp_path / "last.pt", archive())
            assert "x.pt" not in await this.until("last.pt")
            file.write(b" and more weights")
        await this.until("x.pt")
        assert File("x.pt", 24, (tmp_path / "x.pt").stat().st_mtime_ns) in this.known


@pytest.mark.fault("A5")
async def test_what_is_rotated_away_at_once_arrives(tmp_path: Path) -> None:
    """A trainer, in a process of its own, that keeps only the newest; nobody has judged what it deletes."""
    train = """
import sys, time, torch
from pathlib import Path
for n in range(10):
    torch.save({"weight": torch.full((1 << 20,), float(n))}, Path(sys.argv[1]) / f"{n}.pt")
    (Path(sys.argv[1]) / f"{n - 1}.pt").unlink(missing_ok=True)
    time.sleep(0.05)  # a step of training
"""
    async with rig(tmp_path, rules=SLOW) as this:
        trainer = await asyncio.create_subprocess_exec(sys.executable, "-c", train, str(tmp_path))
        await this.until(*(f"{n}.pt" for n in range(10)))
        assert await trainer.wait() == 0
        assert this.holds.names() == sorted(f"{n}.pt" for n in range(10))


@pytest.mark.fault("A5")
async def test_what_is_renamed_and_deleted_a_moment_later_arrives(tmp_path: Path) -> None:
    async with rig(tmp_path, rules=SLOW) as this:

        def train() -> None:
            for n in range(10):
                place(tmp_path / f"{n}.pt", archive(n))
                time.sleep(0.02)  # how long the trainer keeps it
                (tmp_path / f"{n}.pt").unlink()

        await asyncio.gather(asyncio.to_thread(train), this.until(*(f"{n}.pt" for n in range(10))))


async def test_a_hard_link_completes_at_once(tmp_path: Path) -> None:
    """It gives no other event than a file that begins to be written."""
    (tmp_path / "x.part").write_bytes(b"weights")
    async with rig(tmp_path, rules=SLOW) as this:
        (tmp_path / "x.pt").hardlink_to(tmp_path / "x.part")
        assert await this.until("x.pt") == ["x.pt"]


async def test_a_file_that_was_nameless_completes_when_it_has_settled(tmp_path: Path) -> None:
    """`O_TMPFILE` and a link: created, with one link, and never closed."""
    async with rig(tmp_path) as this:
        descriptor = os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY)
        os.write(descriptor, archive())
        # with a directory's descriptor, else Python does not follow the link in /proc
        proc = os.open("/proc/self/fd", os.O_RDONLY)
        os.link(str(descriptor), tmp_path / "x.pt", src_dir_fd=proc, follow_symlinks=True)
        os.close(proc)
        os.close(descriptor)
        assert await this.until("x.pt") == ["x.pt"]


@pytest.mark.fault("A9")
async def test_a_second_name_of_a_checkpoint_is_a_checkpoint(tmp_path: Path) -> None:
    async with rig(tmp_path, rules=SLOW) as this:
        save(tmp_path / "epoch_3.pt")
        await this.until("epoch_3.pt")
        (tmp_path / "best.pt").hardlink_to(tmp_path / "epoch_3.pt")
        assert await this.until("best.pt") == ["best.pt"]
        (tmp_path / "epoch_3.pt").rename(tmp_path / "kept.pt")
        assert await this.until("kept.pt") == ["kept.pt"]


async def test_each_new_version_of_a_name_arrives(tmp_path: Path) -> None:
    """Replaced by a rename, or rewritten in place."""
    async with rig(tmp_path, rules=SLOW) as this:
        for n, write in enumerate([place, place, Path.write_bytes, Path.write_bytes, place]):
            write(tmp_path / "last.pt", archive(n, size=100 + n))
            assert await this.until("last.pt") == ["last.pt"]
        assert len(this.known) == 5


@pytest.mark.parametrize("newer", ["judged before", "found with it"])
async def test_a_save_that_was_replaced_does_not_come_after_the_one_in_its_place(
    tmp_path: Path, newer: str
) -> None:
    """The older one is held, and has yet to settle: numbered then it would pass for the newest."""
    (tmp_path / "last.pt").write_bytes(archive(1, size=10))
    to_come = time.time() + 3600  # by this clock it is the newer one
    os.utime(tmp_path / "last.pt", (to_come, to_come))
    async with rig(tmp_path, rules=Rules(settle=0.5, patience=60.0)) as this:
        place(tmp_path / "last.pt", archive(2, size=20))
        if newer == "found with it":
            time.sleep(0.6)
        assert await this.until("last.pt") == ["last.pt"]
        assert await this.rest() == []
        assert {each.size for each in this.known} == {(tmp_path / "last.pt").stat().st_size}
        assert this.holds.names() == ["last.pt"]


async def test_a_save_that_was_replaced_does_not_come_after_one_that_is_gone(tmp_path: Path) -> None:
    """Its writer has yet to close it when a whole one takes its name, is taken up, and is deleted at once."""
    async with rig(tmp_path, rules=Rules(settle=0.3, patience=0.5)) as this:
        with (tmp_path / "last.pt").open("wb") as file:
            file.write(archive(1, size=10))
            file.flush()
            while not this.holds.names():
                await asyncio.sleep(0.01)
            place(tmp_path / "last.pt", archive(2, size=20))
            assert await this.until("last.pt") == ["last.pt"]
            (tmp_path / "last.pt").unlink()
            assert await this.rest() == []
        assert this.holds.names() == ["last.pt"]


async def test_what_comes_together_keeps_its_order(tmp_path: Path) -> None:
    async with rig(tmp_path, rules=SLOW) as this:
        names = [f"{n}.pt" for n in (3, 1, 2, 9, 4)]
        for name in names:
            place(tmp_path / name, archive())
        assert await this.until(*names) == names


# --- directories -------------------------------------------------------------------------------------


@pytest.mark.fault("A12")
async def test_directories_that_are_made_and_filled_at_once_are_seen_into(tmp_path: Path) -> None:
    async with rig(tmp_path) as this:
        names = [f"a{n}/b/c/x.pt" for n in range(20)]
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True)
            save(tmp_path / name)
        assert sorted(await this.until(*names)) == sorted(names)
        place(tmp_path / "a7/b/c/y.pt", archive())
        assert await this.until("a7/b/c/y.pt") == ["a7/b/c/y.pt"]


@pytest.mark.fault("A12")
async def test_a_directory_that_is_moved_in_is_completed_at_once(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "deep").mkdir(parents=True)
    root.mkdir()
    save(outside / "x.pt")
    (outside / "deep/y.pt").write_bytes(b"weights")
    async with rig(root, rules=SLOW) as this:
        outside.rename(root / "run")
        assert sorted(await this.until("run/x.pt", "run/deep/y.pt")) == ["run/deep/y.pt", "run/x.pt"]
        place(root / "run/deep/z.pt", archive())
        assert await this.until("run/deep/z.pt") == ["run/deep/z.pt"]


@pytest.mark.fault("A12")
async def test_a_directory_that_is_renamed_goes_by_its_new_name(tmp_path: Path) -> None:
    """The staging directory of transformers' Trainer."""
    async with rig(tmp_path, rules=SLOW) as this:
        (tmp_path / "tmp-checkpoint-10/deep").mkdir(parents=True)
        save(tmp_path / "tmp-checkpoint-10/optimizer.pt")
        save(tmp_path / "tmp-checkpoint-10/deep/x.pt")
        (tmp_path / "tmp-checkpoint-10").rename(tmp_path / "checkpoint-10")
        names = ["checkpoint-10/deep/x.pt", "checkpoint-10/optimizer.pt"]
        assert sorted(await this.until(*names)) == names
        save(tmp_path / "checkpoint-10/deep/y.pt")
        assert await this.until("checkpoint-10/deep/y.pt") == ["checkpoint-10/deep/y.pt"]


@pytest.mark.fault("A12")
async def test_a_directory_that_is_moved_away_is_heard_of_no_more(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "run/deep").mkdir(parents=True)
    async with rig(root, rules=SLOW) as this:
        (root / "run").rename(outside)
        (root / "run/deep").mkdir(parents=True)
        place(root / "marker.pt", archive())
        await this.until("marker.pt")
        save(outside / "deep/x.pt")
        save(root / "run/deep/y.pt")
        assert await this.until("run/deep/y.pt") == ["run/deep/y.pt"]
        assert await this.rest() == []
        assert repr(this.watcher).endswith("<3 directories watched>>")


async def test_hidden_directories_and_the_spool_are_not_watched(tmp_path: Path) -> None:
    async with rig(tmp_path, rules=SLOW) as this:
        for name in (".git", ".ckpt-sidecar/pins/1-1", "seen"):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            save(tmp_path / name / "x.pt")
        assert await this.until("seen/x.pt") == ["seen/x.pt"]
        assert await this.rest() == []
        assert repr(this.watcher).endswith("<2 directories watched>>")


# --- what is not taken up ----------------------------------------------------------------------------


@pytest.mark.fault("A3")
async def test_a_torn_file_is_reported_once_and_its_later_whole_version_taken(tmp_path: Path) -> None:
    async with rig(tmp_path, rescan_every=0.2) as this:
        (tmp_path / "x.pt").write_bytes(archive()[:-100])
        torn = await this.until_told(Torn)
        assert torn == Torn("x.pt", "the end record of the zip archive is missing: cut short?")
        await this.until_told(Rescanned, n=len(this.all(Rescanned)) + 2)
        assert len(this.all(Torn)) == 1
        assert this.holds.names() == []
        save(tmp_path / "x.pt")
        assert await this.until("x.pt") == ["x.pt"]


@pytest.mark.fault("A4")
async def test_an_empty_file_is_reported_when_it_stays_so(tmp_path: Path) -> None:
    async with rig(tmp_path) as this:
        (tmp_path / "x.pt").touch()
        assert await this.until_told(Torn) == Torn("x.pt", "is empty")


async def test_a_torn_file_that_was_removed_or_replaced_is_nobodys_business(tmp_path: Path) -> None:
    async with rig(tmp_path, rules=Rules(settle=0.05, patience=0.2)) as this:
        (tmp_path / "x.pt").touch()
        place(tmp_path / "x.pt", archive())
        assert await this.until("x.pt") == ["x.pt"]
        (tmp_path / "y.pt").touch()
        assert await this.until_told(Torn) == Torn("y.pt", "is empty")
        assert len(this.all(Torn)) == 1


@pytest.mark.fault("A10", "A11")
async def test_links_and_strange_names_are_told_once_and_never_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    save(outside / "x.pt")
    (root / "link.pt").symlink_to(outside / "x.pt")
    (root / "loop.pt").symlink_to("loop.pt")
    (root / "directory").symlink_to(outside)
    (root / "directory.pt").mkdir()
    (root / "other.txt").symlink_to("nowhere")
    async with rig(root, rescan_every=0.1) as this:
        (root / "dangling.pt").symlink_to("nowhere")
        (root / "a\nb.pt").write_bytes(archive())
        Path(os.fsdecode(bytes(root) + b"/\xff.pt")).write_bytes(archive())
        os.mkfifo(root / "fifo.pt")
        await this.until_told(Rescanned, n=4)
        assert sorted(this.all(Ignored), key=str) == [
            Ignored("\\udcff.pt", "is not valid UTF-8"),
            Ignored("a\\nb.pt", "has a control character"),
            Ignored("dangling.pt", "is a symlink"),
            Ignored("directory", "is a symlink to a directory, and is not followed"),
            Ignored("fifo.pt", "is no regular file"),
            Ignored("link.pt", "is a symlink"),
            Ignored("loop.pt", "is a symlink"),
        ]


@pytest.mark.fault("B8")
async def test_a_directory_that_cannot_be_listed_is_told_once_and_the_rest_is_served(tmp_path: Path) -> None:
    """Here its path is too long for the kernel; to lack the permission looks the same."""
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("d" * 200, dir_fd=here)
        deeper = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    save(tmp_path / "x.pt")
    os.utime(tmp_path / "x.pt", (0, 0))  # long settled: it is taken at the first scan
    async with rig(tmp_path, rescan_every=0.1) as this:
        await this.until_told(Rescanned, n=3)
        assert [each.reason for each in this.all(Ignored)] == ["cannot be listed: File name too long"]
        place(tmp_path / "y.pt", archive())
        assert await this.until("y.pt") == ["y.pt"]
    shutil.rmtree(tmp_path / ("d" * 200))


async def test_what_is_known_is_not_taken_again(tmp_path: Path) -> None:
    """Not by an event (a restored file), nor by a listing; and it is not held again."""
    save(tmp_path / "old.pt")
    os.utime(tmp_path / "old.pt", (0, 0))  # taken at the first scan, and known from then on
    async with rig(tmp_path, rules=SLOW) as this:
        place(tmp_path / "restored.pt", archive())
        found = await anext(this.batches)
        this.take(found)
        this.holds.let_go(found[0].caught)
        (tmp_path / "restored.pt").rename(tmp_path / "restored.pt.tmp")
        (tmp_path / "restored.pt.tmp").rename(tmp_path / "restored.pt")
        place(tmp_path / "new.pt", archive())
        assert await this.until("new.pt") == ["new.pt"]
        assert await this.rest() == []
        assert this.holds.names() == ["new.pt", "old.pt"]


# --- the listing -------------------------------------------------------------------------------------


async def test_the_first_scan_returns_what_is_there_the_oldest_first(tmp_path: Path) -> None:
    for n, name in enumerate(["c.pt", "deep/a.pt", "b.pt"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name)
        os.utime(tmp_path / name, (1000 + n, 1000 + n))
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04")
    this = Rig(tmp_path, rules=SLOW, rescan_every=3600, events=True, already=())
    this.watcher.start()
    found = await this.watcher.first()
    assert this.take(found) == ["c.pt", "deep/a.pt", "b.pt"]
    assert [(each.reason, each.files, each.missed) for each in this.all(Rescanned)] == [("start", 4, 0)]
    assert await this.rest() == []
    this.watcher.close()


async def test_what_has_not_settled_at_the_first_scan_comes_later(tmp_path: Path) -> None:
    save(tmp_path / "x.pt")
    this = Rig(tmp_path, rules=QUICK, rescan_every=3600, events=True, already=())
    this.watcher.start()
    assert await this.watcher.first() == []
    assert await this.until("x.pt") == ["x.pt"]
    this.watcher.close()


@pytest.mark.fault("A16")
async def test_a_file_of_the_future_must_rest_before_our_eyes(tmp_path: Path) -> None:
    save(tmp_path / "x.pt")
    os.utime(tmp_path / "x.pt", (time.time() + 86_400,) * 2)
    async with rig(tmp_path) as this:
        assert await this.until("x.pt") == ["x.pt"]


async def test_what_a_predecessor_held_is_judged_first(tmp_path: Path) -> None:
    """Although its name is gone; what it held of a torn file is let go."""
    holds, caught = Holds(tmp_path), []
    for name, data in (("x.pt", archive()), ("torn.pt", archive()[:-1])):
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, (1000, 1000))
        caught.append(holds.catch(name))
        (tmp_path / name).unlink()
    (tmp_path / "gone.pt").touch()
    gone = holds.catch("gone.pt")
    (tmp_path / "gone.pt").unlink()
    assert gone is not None
    holds.let_go(gone)
    already = [each for each in caught if each is not None] + [gone]
    this = Rig(tmp_path, rules=QUICK, rescan_every=3600, events=True, already=already)
    this.watcher.start()
    assert this.take(await this.watcher.first()) == ["x.pt"]
    assert this.holds.names() == ["x.pt"]
    this.watcher.close()


async def test_hints_that_come_during_a_long_restore_are_not_lost(tmp_path: Path) -> None:
    """Nobody asks for batches then; the trainer saves, and deletes."""
    async with rig(tmp_path, rules=SLOW) as this:
        save(tmp_path / "x.pt", size=1 << 20)
        while "x.pt" not in this.holds.names():
            await asyncio.sleep(0.001)
        (tmp_path / "x.pt").unlink()
        assert await this.until("x.pt") == ["x.pt"]


@pytest.mark.fault("B4")
async def test_without_events_the_listing_serves(tmp_path: Path) -> None:
    """Renamed, saved in place, in a directory of its own, rewritten."""
    async with rig(tmp_path, rescan_every=0.1, events=False) as this:
        place(tmp_path / "x.pt", archive())
        save(tmp_path / "y.pt")
        (tmp_path / "deep").mkdir()
        save(tmp_path / "deep/z.pt")
        assert sorted(await this.until("x.pt", "y.pt", "deep/z.pt")) == ["deep/z.pt", "x.pt", "y.pt"]
        save(tmp_path / "y.pt", size=200)
        assert await this.until("y.pt") == ["y.pt"]
        (tmp_path / "torn.pt").write_bytes(archive()[:-1])
        await this.until_told(Torn)
        assert this.all(WatchLost) == []


async def test_what_the_listing_finds_comes_in_the_order_in_which_it_was_saved(tmp_path: Path) -> None:
    async with rig(tmp_path, rescan_every=0.1, events=False) as this:
        (tmp_path / "aside").mkdir()
        names = [f"{n * 7919 % 1200}.pt" for n in range(1200)]
        for n, name in enumerate(names):
            (tmp_path / "aside" / f"{name}.tmp").write_bytes(archive())
            os.utime(tmp_path / "aside" / f"{name}.tmp", (1000 + n, 1000 + n))
        for name in names:
            (tmp_path / "aside" / f"{name}.tmp").rename(tmp_path / "aside" / name)
        got: list[str] = []
        while len(got) < 1200:
            got += this.take(await anext(this.batches))
        assert got == [f"aside/{name}" for name in names]


async def test_a_listing_costs_one_question_for_each_file_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is caught, opened or checked of what is durable, and what is no checkpoint is not asked for."""
    asked: list[File] = []
    for n in range(1100):
        place(tmp_path / f"{n}.pt", archive())
        (tmp_path / f"{n}.json").write_text("{}")
    async with rig(tmp_path) as this:

        def known(file: File) -> bool:
            asked.append(file)
            return file in this.known

        monkeypatch.setattr(this.watcher, "_known", known)
        monkeypatch.setattr(this.watcher._inbox, "take_in", None)  # it would catch
        this.watcher.hurry(3600.0)
        await this.until_told(Rescanned, 2)
    assert len(asked) == len(set(asked)) == 1100


async def test_listings_take_a_hundredth_of_a_core_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that took 10 s of CPU is followed by 1,000 s without one, unless the node is about to go."""
    monkeypatch.setattr(time, "thread_time", itertools.count(step=10).__next__)
    async with rig(tmp_path, rescan_every=0.05, events=False) as this:
        await this.until_told(Rescanned, 1)
        assert this.watcher._next_listing - this.watcher._last_listing == pytest.approx(1000.0)
        this.watcher.hurry(0.05)
        await this.until_told(Rescanned, 3)


async def test_what_is_due_is_put_in_order_a_few_times_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much has come at once: not as often as there are chunks in it."""
    asked = 0

    def count(candidate: Candidate, *, now: float, wall: float) -> tuple[float, int]:
        nonlocal asked
        asked += 1
        return completed_at(candidate, now=now, wall=wall)

    monkeypatch.setattr(watcher, "_CHUNK", 4)
    monkeypatch.setattr(watcher, "completed_at", count)
    async with rig(tmp_path, rescan_every=0.1, events=False) as this:
        names = [f"{n}.pt" for n in range(1000)]
        (tmp_path / ".aside").mkdir()
        for name in names:
            save(tmp_path / ".aside" / name)
        (tmp_path / ".aside").rename(tmp_path / "aside")
        await this.until(*(f"aside/{name}" for name in names))
    assert asked < 15 * len(names)


@pytest.mark.fault("B1")
async def test_a_queue_that_overflows_is_a_reason_to_list(tmp_path: Path) -> None:
    async with rig(tmp_path, rules=QUICK) as this:
        tree = this.watcher._tree
        assert tree is not None
        tree.on_event = lambda _event: None  # type: ignore[assignment, method-assign]  # the kernel has dropped it
        place(tmp_path / "x.pt", archive())
        tree.on_queue_overflow()
        assert await this.until("x.pt") == ["x.pt"]
        assert [each.reason for each in this.all(Rescanned)] == ["start", "overflow"]


async def test_a_burst_of_thousands_arrives_whole_and_once(tmp_path: Path) -> None:
    data = archive()
    async with rig(tmp_path) as this:

        def train() -> None:
            for n in range(3000):
                place(tmp_path / f"{n}.pt", data)

        names = [f"{n}.pt" for n in range(3000)]
        got, _ = await asyncio.gather(this.until(*names), asyncio.to_thread(train))
        assert got == names


async def test_five_thousand_files_at_the_start_are_taken_once(tmp_path: Path) -> None:
    data = archive()
    for n in range(5000):
        path = tmp_path / f"{n % 50}/{n}.pt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (n, n))
    this = Rig(tmp_path, rules=SLOW, rescan_every=3600, events=True, already=())
    this.watcher.start()
    found = this.take(await this.watcher.first())
    assert found == [f"{n % 50}/{n}.pt" for n in range(5000)]
    assert await this.rest() == []
    this.watcher.close()


# --- the watch is lost, and found again --------------------------------------------------------------


@pytest.mark.fault("B3")
async def test_a_watch_directory_that_is_made_anew_is_watched_anew(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    async with rig(root) as this:
        for n in range(2):
            shutil.rmtree(root)
            await this.until_told(WatchLost, n=2 * n + 1)
            # the event says that it is gone, unless a listing has met that first
            assert this.all(WatchLost)[2 * n].reason.startswith("the watch directory ")
            root.mkdir()
            await this.until_told(Rescanned, n=n + 2)
            assert this.all(Rescanned)[-1].reason == "rewatch"
            place(root / f"{n}.pt", archive())
            assert await this.until(f"{n}.pt") == [f"{n}.pt"]


@pytest.mark.fault("B3")
async def test_a_watch_directory_that_is_gone_is_looked_for_without_haste(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the next listing is overdue: a dead mount must not cost a core."""
    looked: list[Path] = []

    def look(path: Path) -> tuple[int, int] | None:
        looked.append(path)
        return inode_of(path)

    monkeypatch.setattr(watcher, "inode_of", look)
    root = tmp_path / "root"
    root.mkdir()
    async with rig(root, rules=Rules(settle=0.0), rescan_every=0.1) as this:
        root.rmdir()
        await this.until_told(WatchLost)
        await asyncio.sleep(0.2)
        del looked[:]
        await asyncio.wait([this.coming()], timeout=1.0)
        assert 0 < len(looked) < 100


@pytest.mark.fault("B3")
async def test_a_watch_directory_that_was_swapped_is_noticed_by_its_inode(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    async with rig(root, rescan_every=0.2) as this:
        root.rename(tmp_path / "before")
        root.mkdir()
        place(root / "x.pt", archive())
        assert await this.until("x.pt") == ["x.pt"]
        place(root / "y.pt", archive())
        assert await this.until("y.pt") == ["y.pt"]
        assert this.all(WatchLost)[0].reason == "the watch directory was moved away"


@pytest.mark.fault("B7")
async def test_an_exception_in_the_thread_is_told_and_mended(tmp_path: Path) -> None:
    async with rig(tmp_path) as this:
        inbox = this.watcher._inbox
        heard = inbox.heard

        def fail(*_args: object) -> None:
            inbox.heard = heard  # type: ignore[method-assign]
            raise RuntimeError("a bug")

        inbox.heard = fail  # type: ignore[assignment, method-assign]
        place(tmp_path / "x.pt", archive())
        assert await this.until("x.pt") == ["x.pt"]
        assert [each.reason for each in this.all(WatchLost)] == ["RuntimeError: a bug"]
        await this.until_told(Rescanned, n=2)
        assert [each.reason for each in this.all(Rescanned)] == ["start", "rewatch"]


@pytest.mark.fault("B7")
async def test_a_thread_that_is_dead_is_noticed_at_the_next_listing(tmp_path: Path) -> None:
    async with rig(tmp_path, rescan_every=0.2) as this:
        tree = this.watcher._tree
        assert tree is not None
        tree._closing = True
        tree._inotify.stop()
        await asyncio.to_thread(tree._inotify.join)
        place(tmp_path / "x.pt", archive())
        assert await this.until("x.pt") == ["x.pt"]
        assert len(this.all(WatchLost)) == 1
        assert [each.reason for each in this.all(Rescanned)][:2] == ["start", "rewatch"]
        place(tmp_path / "y.pt", archive())
        assert await this.until("y.pt") == ["y.pt"]


@pytest.mark.fault("E4")
async def test_a_catch_that_fails_is_told_once_and_tried_again(tmp_path: Path) -> None:
    async with rig(tmp_path, rescan_every=0.1) as this:
        this.holds.refuse = OSError(28, "No space left on device")
        place(tmp_path / "x.pt", archive())
        failed = await this.until_told(Failed)
        assert (failed.stage, failed.reason, failed.what) == ("watch", "disk", "x.pt")
        await this.until_told(Rescanned, n=4)
        assert len(this.all(Failed)) == 1
        this.holds.refuse = None
        assert await this.until("x.pt") == ["x.pt"]


# --- the end -----------------------------------------------------------------------------------------


async def test_what_is_completed_just_before_the_stop_is_not_missed(tmp_path: Path) -> None:
    """The event may still be on its way, and a file without a seal may have to settle."""
    async with rig(tmp_path) as this:
        place(tmp_path / "x.pt", archive())
        (tmp_path / "y.pt").write_bytes(b"weights")
        (tmp_path / "torn.pt").write_bytes(archive()[:-1])
        assert sorted(await this.rest()) == ["x.pt", "y.pt"]
        assert this.all(Rescanned)[-1].reason == "stop"
        assert this.holds.names() == ["torn.pt", "x.pt", "y.pt"]


async def test_a_stop_wakes_a_watcher_that_rests(tmp_path: Path) -> None:
    async with rig(tmp_path, rules=SLOW) as this:
        asyncio.get_running_loop().call_later(0.05, this.stop.set)
        assert [each async for each in this.batches] == []


async def test_a_stop_without_a_watch_directory_ends_too(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    async with rig(root) as this:
        shutil.rmtree(root)
        assert await this.rest() == []


async def test_closing_gives_back_threads_and_descriptors(tmp_path: Path) -> None:
    gc.collect()  # what other tests have left may be given back meanwhile
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        this = Rig(tmp_path, rules=SLOW, rescan_every=3600, events=True, already=())
        this.watcher.start()
        this.watcher.close()
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before


async def test_a_thread_that_was_about_to_watch_anew_when_all_was_closed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its waiter was cancelled, which a thread does not hear."""
    reached, proceed = threading.Event(), threading.Event()

    class Slow(Tree):
        def __init__(self, root: Path, listener: Listener) -> None:
            if threading.current_thread() is not threading.main_thread():
                reached.set()
                proceed.wait(10)
            super().__init__(root, listener)

    monkeypatch.setattr(watcher, "Tree", Slow)
    async with rig(tmp_path) as this:
        this.watcher._inbox.lost("it is to be watched anew")
        coming = asyncio.create_task(this.next())
        assert await asyncio.to_thread(reached.wait, 10)
        coming.cancel()
        await asyncio.wait([coming])
        this.watcher.close()
        proceed.set()
