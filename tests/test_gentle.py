"""What bounds us beside a trainer: the pace of what leaves, how nice the threads are, the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_sidecar.bodies import Body, Checks, Stopped, started
from ckpt_sidecar.bucket import KIB, MIB, Span
from ckpt_sidecar.disk import PinnedFile, file_of
from ckpt_sidecar.events import Draining, Event, Interruption
from ckpt_sidecar.pace import PIECE_BYTES, Pace
from tests.fakes import BytesSource

SIZE = 4 * MIB


# --- the pace -------------------------------------------------------------------------------------------


class Clock:
    """Seconds, that only a wait lets pass."""

    now = 0.0

    def __call__(self) -> float:
        """What it shows."""
        return self.now


class Stop(threading.Event):
    """Nobody stops; a wait passes on the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        """Let so much time pass."""
        self._clock.now += timeout or 0.0
        return False


def sent(pace: Pace, stop: threading.Event, size: int = SIZE) -> list[int]:
    """Send so many bytes; return the sizes of the pieces."""
    content = os.urandom(size)
    body = Body(BytesSource(content), Span(1, 0, size), memoryview(bytearray(size)), pace=pace, stop=stop)
    body.read_through(Checks(crc64nvme=True, md5=False))
    pieces = [bytes(piece) for piece in body]
    assert b"".join(pieces) == content
    return [len(piece) for piece in pieces]


@pytest.mark.parametrize("rate", [MIB / 10, MIB, 100 * MIB, 3.7 * MIB])
def test_no_more_leaves_than_the_pace_allows(rate: float) -> None:
    """In pieces that come often enough for a store not to hang up, and not too many of them."""
    clock = Clock()
    pieces = sent(Pace(rate, clock=clock), Stop(clock))
    assert clock.now == pytest.approx((SIZE - pieces[0]) / rate, rel=0.2)
    assert max(pieces) <= min(PIECE_BYTES, rate / 8 + 1)
    assert len(pieces) < 500


def test_the_pace_is_one_for_all_threads_and_saves_nothing_up() -> None:
    """Whoever asks gets his turn behind those who did; after a long rest no burst is let through."""
    clock = Clock()
    pace = Pace(MIB, clock=clock)
    assert [pace.wait_for(MIB) for _ in range(3)] == [0.0, 1.0, 2.0]
    clock.now = 1000.0
    assert [pace.wait_for(MIB) for _ in range(3)] == [0.0, 1.0, 2.0]


def test_without_a_limit_nothing_waits() -> None:
    """In pieces as large as they get."""
    clock = Clock()
    assert sent(Pace(0.0, clock=clock), Stop(clock)) == [PIECE_BYTES] * (SIZE // PIECE_BYTES)
    assert clock.now == 0.0


@pytest.mark.parametrize("event", [Draining(25.0, 3), Interruption("spot", "terminate", "", 1.0)])
def test_who_is_about_to_go_goes_as_fast_as_can_be(event: Event) -> None:
    """A limit that costs a checkpoint is worth nothing."""
    clock = Clock()
    pace = Pace(64 * KIB, clock=clock)
    pace.wait_for(MIB)
    assert pace.wait_for(MIB) == 16.0
    pace.tell(event)
    assert pace.wait_for(MIB) == 0.0
    assert pace.piece_bytes == PIECE_BYTES


def test_a_stop_is_heard_while_a_piece_waits_for_its_turn() -> None:
    """However slow the pace."""
    stop = threading.Event()
    pace = Pace(1.0, clock=lambda: 0.0)
    pace.wait_for(3600)
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Stopped):
        sent(pace, stop)


# --- the threads ----------------------------------------------------------------------------------------


def test_the_threads_that_move_bytes_are_nicer_and_nobody_else_is() -> None:
    """So a trainer that we start, and the answers to Kubernetes, are not."""
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    pool = started(2, "nice", nice=3)
    try:
        theirs = pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result()
    finally:
        pool.shutdown()
    assert theirs == min(19, mine + 3)
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine


# --- the page cache -------------------------------------------------------------------------------------


def cached(path: Path) -> float:
    """Which share of the file's pages is in memory."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), vector) == 0
        return sum(each & 1 for each in vector) / pages


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A file that is on the disk and not in memory."""
    path = tmp_path / "x.pt"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path) > 0:
        pytest.skip("this file system keeps its files in memory")
    return path


def pinned(path: Path) -> PinnedFile:
    """As the spool opens it."""
    descriptor = os.open(path, os.O_RDONLY)
    return PinnedFile(descriptor, file_of(path.name, os.fstat(descriptor)))


def read(source: PinnedFile, offset: int, size: int) -> bytes:
    """Some of it."""
    view = memoryview(bytearray(size))
    return bytes(view[: source.read_into(offset, view)])


@pytest.mark.parametrize("give_back", [lambda it: it.uncache(0, SIZE), PinnedFile.close], ids=["part", "end"])
def test_what_a_read_brings_into_the_page_cache_is_given_back(
    on_disk: Path, give_back: Callable[[PinnedFile], None]
) -> None:
    """And no more than was asked for is read."""
    source = pinned(on_disk)
    assert len(read(source, 0, SIZE // 2)) == SIZE // 2
    assert cached(on_disk) == 0.5
    give_back(source)
    assert cached(on_disk) == 0.0


def test_what_the_trainer_has_in_the_page_cache_stays_there(on_disk: Path) -> None:
    """It may be about to read it again."""
    content = on_disk.read_bytes()
    source = pinned(on_disk)
    assert read(source, MIB, SIZE) == content[MIB:]
    source.uncache(MIB, SIZE)
    source.close()
    assert cached(on_disk) == 1.0
