"""A file is whole when its format says so, and no file, however made, costs much or is ever executed."""

import io
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from ckpt_sidecar import formats
from ckpt_sidecar.formats import Rules, flaw_of, look_at

MODEL = {"weight": torch.arange(1000.0), "bias": torch.zeros(3), "step": 7, "name": "a" * 100}


def saved(*, zipped: bool = True) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(MODEL, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


ZIPPED, LEGACY = saved(), saved(zipped=False)
SAFE = save_safetensors({"weight": torch.arange(1000.0), "bias": torch.zeros(3)}, {"data_offsets": "[0,1]"})


def flaw(data: bytes, name: str = "x.pt") -> str | None:
    return flaw_of(io.BytesIO(data), name)


def small_zip(records: int = 3, comment: bytes = b"") -> bytes:
    """An archive without zip64, as Python writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for n in range(records):
            archive.writestr(f"archive/{n}", b"x" * n)
        archive.comment = comment
    return buffer.getvalue()


def end_record(entries: int, size: int, offset: int, *, here: int | None = None, disk: int = 0) -> bytes:
    return struct.pack(
        "<4s4H2LH", b"PK\x05\x06", disk, 0, entries if here is None else here, entries, size, offset, 0
    )


def entry(offset: int, *, size: int = 0, name: bytes = b"a", extra: bytes = b"") -> bytes:
    sizes = (min(size, 0xFFFFFFFF), min(size, 0xFFFFFFFF), len(name), len(extra), 0, 0, 0, 0)
    header = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 0, 0, 0, 0, 0, 0, 0, *sizes, min(offset, 0xFFFFFFFF))
    return header + name + extra


def local(*, name: bytes = b"a", extra: bytes = b"") -> bytes:
    return (
        struct.pack("<4s5H3L2H", b"PK\x03\x04", 0, 0, 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra
    )


# --- rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["x.pt", "a/b/x.pth", "epoch=3-step=10.ckpt", "a b/ü.pt", "-x.pt", "part.pt"]
)
def test_checkpoints_are_wanted_at_any_depth(name: str) -> None:
    assert Rules().wants(name)


@pytest.mark.parametrize("name", ["x.txt", "pt", "x.pt/y", "x.PT", "x.ptx"])
def test_other_files_are_not_wanted(name: str) -> None:
    assert not Rules().wants(name)


@pytest.mark.parametrize(
    "name",
    [
        ".x.pt",
        "x.pt.tmp",
        "x.pt.tmp123",
        "x.pt.tmp_9f-a",
        "x.tmp.pt",
        "x.pt.part",
        "x.pt.partial",
        "x.pt~",
        ".ckpt-sidecar/pins/1-1/x.pt",
        "a/.hidden/x.pt",
        "a.tmp/x.pt",
        "tmp-checkpoint-10/optimizer.pt",
        "x\n.tmp",
    ],
)
def test_temporary_names_are_never_wanted(name: str) -> None:
    assert not Rules(patterns=("*",)).wants(name)


@pytest.mark.parametrize(
    "name", ["model.part1.pt", "x.template.pt", "tmp_run/x.pt", "x.partition.pt", "tmp/x.pt"]
)
def test_names_that_only_look_temporary_are_wanted(name: str) -> None:
    assert Rules().wants(name)


def test_a_pattern_with_a_slash_is_held_against_the_whole_name() -> None:
    rules = Rules(patterns=("best/*.bin", "last.pt"))
    assert rules.wants("best/x.bin")
    assert rules.wants("best/deep/x.bin")
    assert rules.wants("anywhere/last.pt")
    assert not rules.wants("x.bin")
    assert not rules.wants("worse/x.bin")


# --- what trainers write -----------------------------------------------------------------------------


def test_what_torch_saves_is_whole_and_sealed() -> None:
    assert look_at(io.BytesIO(ZIPPED), "x.pt") == formats.Look(None, sealed=True)


@pytest.mark.parametrize("lost", [4, 512, 4096])
def test_an_archive_that_lost_its_first_page_is_not_taken_for_a_legacy_pickle(lost: int) -> None:
    """Its magic is gone with it; but it ends as an archive does."""
    assert flaw(bytes(lost) + ZIPPED[lost:]) == (
        "ends as a zip archive, and does not begin as one: its first page is lost"
    )


def test_the_legacy_format_is_whole_as_far_as_one_can_tell() -> None:
    assert look_at(io.BytesIO(LEGACY), "x.pt") == formats.Look(None, sealed=False)


def test_safetensors_are_whole() -> None:
    assert look_at(io.BytesIO(SAFE), "x.safetensors") == formats.Look(None, sealed=False)
    assert flaw(save_safetensors({}), "x.safetensors") is None


def test_an_archive_is_known_by_its_bytes_whatever_its_name() -> None:
    assert flaw(ZIPPED, "x.safetensors") is None
    assert flaw(ZIPPED[:-1], "x.anything") is not None


def test_nothing_is_ever_executed() -> None:
    """A pickle that would run a command is read as bytes, in every format."""

    class Bomb:
        def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
            return _explode, (1,)

    buffer = io.BytesIO()
    torch.save({"bomb": Bomb()}, buffer)
    assert flaw(buffer.getvalue()) is None


def _explode(_n: int) -> None:
    raise AssertionError("it was unpickled")


@pytest.mark.fault("A4")
def test_an_archive_that_is_cut_anywhere_is_not_whole() -> None:
    for size in range(len(ZIPPED)):
        assert flaw(ZIPPED[:size]), size


@pytest.mark.fault("A4")
def test_safetensors_that_are_cut_anywhere_are_not_whole() -> None:
    for size in range(len(SAFE)):
        assert flaw(SAFE[:size], "x.safetensors"), size


@pytest.mark.fault("A4")
def test_a_cut_is_said_as_such() -> None:
    assert flaw(b"") == "is empty"
    assert flaw(ZIPPED[:-1]) == "the end record of the zip archive is missing: cut short?"
    assert flaw(ZIPPED[:2]) == "the end record of the zip archive is missing: cut short?"
    assert flaw(SAFE[:9], "x.safetensors") == "the safetensors header is missing: cut short?"
    assert "asks for" in str(flaw(SAFE[:-1], "x.safetensors"))
    assert "is cut short" in str(flaw(SAFE[:40], "x.safetensors"))


@settings(deadline=None)
@given(garbage=st.binary(min_size=1, max_size=200))
def test_what_has_something_appended_is_not_whole(garbage: bytes) -> None:
    assert flaw(ZIPPED + garbage)
    assert flaw(SAFE + garbage, "x.safetensors")


def test_appended_bytes_are_counted() -> None:
    assert flaw(ZIPPED + b"12345") == "5 bytes follow the end record of the zip archive, it announces 0"


@pytest.mark.fault("A4")
@pytest.mark.parametrize("size", [1, 4096, 100_000, 1 << 20])
def test_a_file_of_zeros_is_not_whole(size: int) -> None:
    assert flaw(bytes(size)) == "is nothing but zeros"


@pytest.mark.parametrize("at", [0, 99_999])
def test_something_among_zeros_is_whole(at: int) -> None:
    data = bytearray(100_000)
    data[at] = 1
    assert flaw(bytes(data)) is None


@settings(deadline=None)
@given(at=st.integers(0, len(ZIPPED) - 1), size=st.integers(1, 2000))
def test_a_hole_over_a_record_header_is_seen(at: int, size: int) -> None:
    """A second writer, or a crash, may leave a hole; what it hides is found by the headers."""
    holed = ZIPPED[:at] + bytes(min(size, len(ZIPPED) - at)) + ZIPPED[at + size :]
    headers = [info.header_offset for info in zipfile.ZipFile(io.BytesIO(ZIPPED)).infolist()]
    if any(at <= header and header + 4 <= at + size for header in headers):
        assert flaw(holed)


# --- archives that torch did not make ----------------------------------------------------------------


def test_small_and_commented_archives_are_whole() -> None:
    assert flaw(small_zip()) is None
    assert flaw(small_zip(comment=b"made by hand")) is None


def test_an_archive_that_needs_zip64_is_read() -> None:
    """More records than 16 bits can count."""
    assert flaw(small_zip(records=66_000)) is None


def test_offsets_and_sizes_that_need_64_bits_are_read() -> None:
    """The wide values stand in the extra field, behind whatever else is there."""
    body = local()
    other = struct.pack("<HH", 7, 2) + b"ab"
    wide = other + struct.pack("<HHQQ", 1, 16, 0, 0)
    listed = entry(0, size=1 << 32, extra=wide)
    assert flaw(body + listed + end_record(1, len(listed), len(body))) is None
    far = entry(0, size=1 << 32, extra=struct.pack("<HHQQ", 1, 16, 1 << 40, 1 << 40))
    assert "lies outside" in str(flaw(body + far + end_record(1, len(far), len(body))))


@pytest.mark.parametrize("extra", [b"", b"abc", struct.pack("<HH", 1, 0), struct.pack("<HH", 7, 0) * 20])
def test_wide_values_that_are_missing_make_a_lie(extra: bytes) -> None:
    listed = entry(0, size=1 << 32, extra=extra)
    assert "lies outside" in str(flaw(local() + listed + end_record(1, len(listed), 31)))


def broken(**changes: bytes) -> bytes:
    """An archive of one record, put together by hand."""
    body = changes.get("body", local())
    listed = changes.get("listed", entry(0))
    end = changes.get("end", end_record(1, len(listed), len(body)))
    return body + listed + end


def test_the_archive_made_by_hand_is_whole() -> None:
    assert flaw(broken()) is None


LISTED = len(entry(0))

LIES: dict[str, tuple[bytes, str]] = {
    "no record": (broken(listed=b"", end=end_record(0, 0, 31)), "holds no record"),
    "only an end record": (end_record(0, 0, 0), "holds no record"),
    "several volumes": (broken(end=end_record(1, LISTED, 31, disk=1)), "one of several"),
    "volumes that disagree": (broken(end=end_record(1, LISTED, 31, here=0)), "one of several"),
    "a directory behind the end": (broken(end=end_record(1, LISTED, 5000)), "not where the end record says"),
    "a directory too large": (broken(end=end_record(1, 5000, 31)), "not where the end record says"),
    "more entries than fit": (broken(end=end_record(9, LISTED, 31)), "not where the end record says"),
    "a directory elsewhere": (broken(end=end_record(1, LISTED - 1, 32)), "is missing in the directory"),
    "fewer entries than there": (
        broken(listed=entry(0) * 2, end=end_record(1, 2 * LISTED, 31)),
        "has more in it",
    ),
    "an entry that is cut": (
        broken(listed=entry(0, name=b"a" * 50)[:60], end=end_record(1, 60, 31)),
        "entry 0 is cut",
    ),
    "a record in the directory": (broken(listed=entry(20)), "lies outside"),
    "a record too large": (broken(listed=entry(0, size=1)), "lies outside"),
    "a record somewhere": (broken(body=local() + local()[:4] + bytes(60), listed=entry(40)), "a hole?"),
    "a record with a long name": (broken(body=local(extra=b"abc")[:-3]), "runs into its directory"),
}


@pytest.mark.parametrize("lie", LIES)
def test_archives_that_lie_are_found_out(lie: str) -> None:
    data, said = LIES[lie]
    assert said in str(flaw(data))


def zip64(**changes: int) -> bytes:
    """An archive of one record with a zip64 end record, as torch writes it."""
    body, listed = local(), entry(0)
    at = changes.get("at", len(body) + len(listed))
    entries, magic = changes.get("entries", 1), changes.get("magic", 0x06064B50)
    end64 = struct.pack("<LQ2H2L4Q", magic, 44, 0, 0, 0, 0, entries, entries, len(listed), len(body))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
    return body + listed + end64 + locator + end_record(changes.get("small", 1), len(listed), len(body))


def test_a_zip64_end_record_is_read() -> None:
    assert flaw(zip64()) is None
    assert flaw(zip64(small=0xFFFF)) is None


def test_a_zip64_end_record_that_lies_is_found_out() -> None:
    assert "not where its locator says" in str(flaw(zip64(at=1 << 60)))
    assert "not where its locator says" in str(flaw(zip64(at=0)))
    assert "not where its locator says" in str(flaw(zip64(magic=1)))
    assert "disagree" in str(flaw(zip64(entries=2)))
    assert "not where the end record says" in str(flaw(zip64(entries=1 << 60, small=0xFFFF)))


# --- safetensors that lie ----------------------------------------------------------------------------


def safe(header: bytes, body: int = 0, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(body)


def test_a_header_that_lies_is_found_out() -> None:
    assert "impossible length" in str(flaw(safe(b"{}", length=1 << 60), "x.safetensors"))
    assert "impossible length" in str(flaw(safe(b"{}", length=1), "x.safetensors"))
    assert "not JSON" in str(flaw(safe(b"abcdef"), "x.safetensors"))
    assert flaw(safe(b'{"a":{"data_offsets":[0,99]}}', 98), "x.safetensors")
    assert flaw(safe(b'{"a":{"data_offsets" : [ 0 , 99 ] }}', 99), "x.safetensors") is None


def test_a_header_of_many_pieces_is_read_whole() -> None:
    """Wherever the pieces meet, an entry that lies across is seen."""
    one = b'"%07d":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]},'
    header = b"{" + b"".join(one % (n, 4 * n, 4 * n + 4) for n in range(40_000)) + b"}"
    assert len(header) > 2 << 20
    assert flaw(safe(header, 160_000), "x.safetensors") is None
    assert flaw(safe(header, 159_999), "x.safetensors")


# --- bounds ------------------------------------------------------------------------------------------


class Huge(io.RawIOBase):
    """A file of `size` bytes of which only some are there; the rest are made when they are read."""

    def __init__(self, size: int, pieces: dict[int, bytes], filler: Callable[[int, int], bytes]) -> None:
        self.size, self.pieces, self.filler, self.at, self.read_bytes = size, pieces, filler, 0, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to `offset`, or back from the end."""
        self.at = offset + (self.size if whence == 2 else 0)
        return self.at

    def read(self, size: int = -1) -> bytes:
        """Return what is there, or the filler."""
        self.read_bytes += size
        for start, piece in self.pieces.items():
            if start <= self.at and self.at + size <= start + len(piece):
                return piece[self.at - start : self.at - start + size]
        return self.filler(self.at, size)


def bounded(file: Huge, name: str, *, seconds: float, mebibytes: float) -> str | None:
    tracemalloc.start()
    began = time.monotonic()
    try:
        said = flaw_of(file, name)  # type: ignore[arg-type]
        assert time.monotonic() - began < seconds
        assert tracemalloc.get_traced_memory()[1] < mebibytes * (1 << 20)
    finally:
        tracemalloc.stop()
    return said


@pytest.mark.fault("G2")
def test_an_archive_with_millions_of_entries_is_read_in_bounded_time() -> None:
    """It says that it has 20 million records; the first ones are checked, the rest is believed."""
    one = entry(0)
    many = 20_000_000
    tail = (
        struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, many, many, many * len(one), 1 << 20)
        + struct.pack("<4sLQL", b"PK\x06\x07", 0, (1 << 20) + many * len(one), 1)
        + end_record(0xFFFF, 0xFFFFFFFF, 1 << 20)
    )
    end = (1 << 20) + many * len(one)

    def filler(at: int, size: int) -> bytes:
        if at < 1 << 20:
            return local()[:30]
        skip = (at - (1 << 20)) % len(one)
        return (one * (size // len(one) + 2))[skip : skip + size]

    last = end + len(tail) - 22 - 0xFFFF
    file = Huge(end + len(tail), {0: local(), last: filler(last, end - last) + tail}, filler)
    assert bounded(file, "x.pt", seconds=20, mebibytes=16) is None


@pytest.mark.fault("G2")
def test_a_directory_of_huge_entries_is_read_in_bounded_memory() -> None:
    """Each entry has the longest name, extra field and comment that there can be."""
    one = entry(0, name=b"n" * 60_000, extra=struct.pack("<HH", 7, 0) * 16_000)
    many, body = 2_000, local(name=b"n" * 60_000)
    size = many * len(one)
    end = end_record(many, size, len(body))

    def filler(at: int, length: int) -> bytes:
        skip = (at - len(body)) % len(one)
        return (one * (length // len(one) + 2))[skip : skip + length]

    total = len(body) + size + len(end)
    last = total - 22 - 0xFFFF
    file = Huge(total, {0: body, last: filler(last, 0xFFFF) + end}, filler)
    assert bounded(file, "x.pt", seconds=20, mebibytes=16) is None
    assert file.read_bytes < 200 << 20


@pytest.mark.fault("G2")
def test_a_safetensors_header_of_100_mb_is_read_in_bounded_memory() -> None:
    nested = Huge(200_000_000, {0: struct.pack("<Q", 100_000_000) + b"{"}, lambda _at, size: b"[" * size)
    assert "asks for" in str(bounded(nested, "x.safetensors", seconds=20, mebibytes=16))


@settings(deadline=None)
@given(data=st.binary(max_size=300), head=st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", ZIPPED[:300]]))
def test_no_bytes_make_it_fail(data: bytes, head: bytes) -> None:
    for name in ("x.pt", "x.safetensors"):
        look_at(io.BytesIO(head + data), name)


@settings(deadline=None)
@given(at=st.integers(0, len(ZIPPED) - 1), value=st.integers(0, 255), tail=st.booleans())
def test_no_changed_byte_makes_it_fail(at: int, value: int, tail: bool) -> None:  # noqa: FBT001
    """One byte anywhere, or among the last, where the numbers are."""
    at = len(ZIPPED) - 1 - at % 700 if tail else at
    flaw(ZIPPED[:at] + bytes([value]) + ZIPPED[at + 1 :])


class Shrinking(io.BytesIO):
    """A file that is truncated while it is looked at."""

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go there; once its size is known the file shrinks."""
        at = super().seek(offset, whence)
        if whence == 2:
            self.truncate(100)
        return at


@pytest.mark.parametrize("data", [ZIPPED, LEGACY, SAFE])
def test_a_file_that_shrinks_meanwhile_is_not_whole(data: bytes) -> None:
    assert flaw_of(Shrinking(data), "x.safetensors")
