"""Archives that were cut, written over, flipped or made to hurt: never whole, never costly, never executed.

What is not seen, and the documents say so: a hole or other bytes inside a record's data.
"""

import io
import pickle
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_sidecar.formats import Look, flaw_of, look_at
from tests.fuzz.fuzz_formats import Counted

MIB = 1 << 20


def saved(value: object, *, zipped: bool = True) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


class Stream(io.RawIOBase):
    """Where a writer can only go on: what it could not know before stands behind the bytes."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: object) -> int:
        """Add it."""
        self.content += memoryview(data)  # type: ignore[arg-type]
        return len(memoryview(data))  # type: ignore[arg-type]


def zipped(*records: bytes, comment: bytes = b"", stream: bool = False, method: int = 0) -> bytes:
    """What Python's zipfile writes; `stream`: where it cannot go back."""
    buffer, streamed = io.BytesIO(), Stream()
    with zipfile.ZipFile(streamed if stream else buffer, "w", method) as archive:
        for n, content in enumerate(records):
            archive.writestr(zipfile.ZipInfo(f"archive/{n}"), content, method)
        archive.comment = comment
    return bytes(streamed.content) if stream else buffer.getvalue()


def wide() -> bytes:
    """An archive whose local headers are zip64's."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, archive.open("a", "w", force_zip64=True) as record:
        record.write(b"weights")
    return buffer.getvalue()


MODEL = {"weight": torch.arange(6.0), "none": torch.zeros(0), "step": 7}
TORCH = saved(MODEL)  # with a zip64 end record
ARCHIVES = {
    "torch": TORCH,
    "python": zipped(b"", b"one", b"another"),
    "commented": zipped(b"one", comment=b"PK\x05\x06 made by hand"),
    "streamed": zipped(b"", b"one", stream=True),
    "compressed": zipped(b"one" * 100, stream=True, method=zipfile.ZIP_DEFLATED),
    "wide": wide(),
    "nested": zipped(zipped(b"one"), zipped(b"another", stream=True)),
    "torch in torch": saved({"inner": TORCH}),
}
WHOLE = [name for name in ARCHIVES if name != "commented"]


def flaw(data: bytes) -> str | None:
    return flaw_of(io.BytesIO(data), "x.pt")


def readable(data: bytes) -> bool:
    """Can Python read every record, or torch all of it? They pass over different fields."""
    try:
        return zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    except Exception:  # noqa: BLE001 (whatever it says, it cannot)
        return loadable(data)


def loadable(data: bytes) -> bool:
    """Does torch load it as it was saved?"""
    try:
        loaded = torch.load(io.BytesIO(data))
    except Exception:  # noqa: BLE001
        return False
    return bool(loaded.keys() == MODEL.keys() and torch.equal(loaded["weight"], torch.arange(6.0)))


def data_of(archive: bytes) -> Iterator[range]:
    """Where the bytes of its records lie."""
    for info in zipfile.ZipFile(io.BytesIO(archive)).infolist():
        name_size, extra_size = struct.unpack_from("<2H", archive, info.header_offset + 26)
        start = info.header_offset + 30 + name_size + extra_size
        yield range(start, start + info.compress_size)


# --- torn ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_what_writers_write_is_whole(name: str) -> None:
    """However they write it: nothing good may be taken for torn."""
    assert look_at(io.BytesIO(ARCHIVES[name]), "x.pt") == Look(None, sealed=True)


def test_what_torch_writes_without_checksums_or_bytes_is_whole() -> None:
    """Its settings for those who are in a hurry; what it writes then, it loads."""
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        assert flaw(saved(MODEL)) is None
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    with torch.serialization.skip_data():
        assert flaw(saved(MODEL)) is None


@pytest.mark.fault("G2")
@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_cut_at_any_byte_is_not_whole(name: str) -> None:
    """In a header, a name, the data, the directory, an end record; also where a whole archive lies inside."""
    archive = ARCHIVES[name]
    assert [size for size in range(len(archive)) if flaw(archive[:size]) is None] == []


@pytest.mark.fault("G2")
@pytest.mark.parametrize("name", ["torch", "python", "streamed"])
def test_a_flipped_bit_outside_of_the_data_is_seen_or_does_no_harm(name: str) -> None:
    """Each single one: what is called whole can be read, by zipfile or by torch itself.

    All but the version that a reader should have, which zipfile minds, and torch's reader does not.
    """
    archive = ARCHIVES[name]
    spared = {at for run in data_of(archive) for at in run}
    spared |= {match.end() + 2 for match in re.finditer(b"PK\x01\x02", archive)}
    for at in sorted(set(range(len(archive))) - spared):
        for bit in range(8):
            flipped = bytearray(archive)
            flipped[at] ^= 1 << bit
            assert flaw(bytes(flipped)) or readable(bytes(flipped)), (at, bit)


@pytest.mark.fault("G2")
def test_a_save_that_covers_only_a_part_of_an_older_one_is_not_whole() -> None:
    """Same shapes, same layout: only the checksums of the records tell which save they are of."""
    old, new = (saved({"a": torch.full((9,), x), "b": torch.full((9,), x + 1)}) for x in (1.0, 3.0))
    assert len(old) == len(new)
    differ = [n for n in range(len(old)) if old[n] != new[n]]
    record = next(run for run in data_of(old) if differ[0] in run)
    for at in range(record.stop + 8, differ[-1] + 1):  # 8: the first checksum that differs is complete
        assert flaw(new[:at] + old[at:]), at
        assert flaw(old[:at] + new[at:]), at
    within = new[: record.start + 8] + old[record.start + 8 :]
    assert flaw(within) is None  # as the documents say: bytes of the data itself are not looked at


# --- made to hurt --------------------------------------------------------------------------------------


def cost(data: bytes) -> tuple[str | None, int, int, int]:
    """What is said of it; the reads, the bytes read, and the most memory that it took."""
    file = Counted(data)
    tracemalloc.start()
    try:
        said = flaw_of(file, "x.pt")
        memory = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return said, file.reads, file.read_bytes, memory


def entry(
    offset: int, *, size: int = 0, full_size: int | None = None, method: int = 0, extra: bytes = b""
) -> bytes:
    sizes = (size, size if full_size is None else full_size, 1, len(extra), 0, 0, 0, 0)
    return struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 0, 0, 0, method, 0, 0, 0, *sizes, offset) + b"a" + extra


def local(method: int = 0) -> bytes:
    return struct.pack("<4s5H3L2H", b"PK\x03\x04", 0, 0, method, 0, 0, 0, 0, 0, 1, 0) + b"a"


LOCAL = local()


def end_of(entries: int, size: int, offset: int, comment: bytes = b"") -> bytes:
    counts = (min(entries, 0xFFFF), min(entries, 0xFFFF), size, offset, len(comment))
    return struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *counts) + comment


def by_hand(entries: bytes, count: int, *, body: bytes = LOCAL, end: bytes | None = None) -> bytes:
    """Return an archive of those entries, with a zip64 end record where that takes one."""
    last = end if end is not None else end_of(count, len(entries), len(body))
    if count >= 0xFFFF and end is None:
        at = len(body) + len(entries)
        end64 = struct.pack(
            "<4sQ2H2L4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, count, count, len(entries), len(body)
        )
        last = end64 + struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1) + last
    return body + entries + last


@pytest.mark.fault("G2")
def test_records_that_overlap_are_never_unpacked() -> None:
    """A bomb of 60,000 records that share one body of a few bytes, 4 GiB each by its own word."""
    bomb, body = entry(0, size=20, full_size=0xFFFFFFFE, method=8), local(8) + bytes(20)
    said, reads, read_bytes, memory = cost(by_hand(bomb * 60_000, 60_000, body=body))
    assert said is None  # as an archive it is whole: what its bytes unpack to is nobody's business here
    assert reads < 3_000
    assert read_bytes < 8 * MIB
    assert memory < 16 * MIB
    inside = entry(0, size=20) + entry(10) + entry(31)
    assert "lies in the one before it" in str(flaw(by_hand(inside, 3, body=local() + bytes(50))))


LIES = {
    "a size that lies": by_hand(entry(0, size=0xFFFFFFF0), 1),
    "two sizes of what is not compressed": by_hand(entry(0, full_size=9), 1),
    "an offset that lies": by_hand(entry(0xFFFFFFF0), 1),
    "a 64-bit size that lies": by_hand(
        entry(0, size=0xFFFFFFFF, extra=struct.pack("<HHQQ", 1, 16, 2**64 - 1, 2**64 - 1)), 1
    ),
    "a 64-bit offset that lies": by_hand(entry(0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 8, 2**64 - 1)), 1),
    "64-bit values that are not there": by_hand(entry(0xFFFFFFFF, size=0xFFFFFFFF), 1),
    "a zip64 end record that names itself": LOCAL
    + struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, 1, 1, 47, 31)
    + struct.pack("<4sLQL", b"PK\x06\x07", 0, 31, 1)
    + end_of(1, 47, 31),
    "a zip64 end record of other numbers": by_hand(
        entry(0),
        1,
        end=struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, 2**60, 2**60, 2**63, 2**63)
        + struct.pack("<4sLQL", b"PK\x06\x07", 0, 78, 1)
        + end_of(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
    ),
    "a zip64 locator on another disk": by_hand(
        entry(0),
        1,
        end=struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, 1, 1, 47, 31)
        + struct.pack("<4sLQL", b"PK\x06\x07", 1, 78, 1)
        + end_of(1, 47, 31),
    ),
    "a comment that holds another end record": by_hand(
        entry(0), 1, end=end_of(1, 47, 31, comment=b"behind" + end_of(1, 47, 31) + b"more")
    ),
    "a comment that holds an end record of its own": by_hand(
        entry(0), 1, end=end_of(1, 47, 31, comment=end_of(1, 40, 38))
    ),
    "a gap between the directory and its end": by_hand(entry(0), 1, end=b"gap" + end_of(1, 47, 31)),
    "bytes of another archive before it": b"PK\x03\x04" + bytes(50) + by_hand(entry(0), 1),
}


@pytest.mark.fault("G2")
@pytest.mark.parametrize("lie", LIES)
def test_archives_that_lie_are_not_whole_and_cost_next_to_nothing(lie: str) -> None:
    """Whatever number stands there, no room is made for it."""
    said, reads, read_bytes, memory = cost(LIES[lie])
    assert said
    assert reads < 20
    assert read_bytes < MIB
    assert memory < MIB


def test_the_archive_made_by_hand_is_whole() -> None:
    """So the lies above are what makes the others not whole."""
    assert flaw(by_hand(entry(0), 1)) is None
    assert flaw(by_hand(entry(0), 1, end=end_of(1, 47, 31, comment=b"a comment"))) is None
    assert flaw(by_hand(entry(0) * 70_000, 70_000)) is None


@pytest.mark.fault("G2")
@settings(deadline=None, max_examples=300)
@given(
    pieces=st.lists(
        st.sampled_from([*ARCHIVES.values(), LOCAL, entry(0), end_of(1, 47, 31), TORCH[-98:], bytes(40)])
        | st.binary(max_size=60),
        max_size=5,
    ),
    cut=st.integers(0, 200),
)
def test_whatever_is_put_together_is_judged_at_a_bounded_cost(pieces: list[bytes], cut: int) -> None:
    """Pieces of archives in any order: a verdict, and nothing else; the same at every look."""
    data = b"".join(pieces)[cut:]
    said, reads, read_bytes, memory = cost(data)
    assert said == flaw(data)
    assert reads < 200
    assert read_bytes < 4 * MIB
    assert memory < 4 * MIB
    if data.startswith(b"PK\x03\x04") and said is None:  # sealed: one byte less is torn
        assert flaw(data[:-1])


# --- never executed ------------------------------------------------------------------------------------

FIRED: list[int] = []


def _fire(n: int) -> int:
    FIRED.append(n)
    return n


class Bomb:
    """Runs what it likes when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[int], int], tuple[int]]:
        return _fire, (1,)


@pytest.mark.fault("G2")
def test_nothing_is_ever_unpickled() -> None:
    """A pickle that runs code is read as bytes in every format; that it would run is shown first."""
    bombs = [saved(Bomb()), saved(Bomb(), zipped=False), pickle.dumps(Bomb())]
    for bomb in bombs[:2]:
        FIRED.clear()
        torch.load(io.BytesIO(bomb), weights_only=False)
        assert FIRED
    FIRED.clear()
    for bomb in bombs:
        for name in ("x.pt", "x.pth", "x.ckpt", "x.pkl", "x.safetensors", "x.zip"):
            look_at(io.BytesIO(bomb), name)
            look_at(io.BytesIO(bomb[:-1]), name)
    assert not FIRED
