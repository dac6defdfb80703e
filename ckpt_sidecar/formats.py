"""Is a file whole: which names are wanted, as a value, and readers over an open binary file.

Whatever is read here is hostile input: it is never unpickled or executed, and time and memory are bounded
whatever the file says about itself. What proves a file whole depends on its format:

    zip (torch.save, by its magic)   its end record, its directory and its records lie where they say; written
                                     last, they seal the file
    safetensors (by its suffix)      header and length agree; preallocated, it has its length before its bytes
    anything else                    there is something in it; only time tells whether it is all
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from typing import BinaryIO, NamedTuple

from ckpt_sidecar.bucket import MAX_OBJECT_BYTES

# --- rules -------------------------------------------------------------------------------------------

# `x.pt.tmp`, `x.pt.tmp123`, `x.tmp.pt`, `x.part`, `x~`, and the staging directory of transformers' Trainer
_TEMPORARY = re.compile(r"\..*|.*(\.tmp[\w-]*|\.part|\.partial|~)|.*\.tmp\..*|tmp-checkpoint-.*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Rules:
    """Which names are checkpoints, and how long (in seconds) a file must rest.

    A pattern is held against the last part of the name, or against the whole name if it has a slash; `*`
    crosses slashes. `settle`: this long unchanged, where nothing else says that the writer is done.
    `patience`: this long unchanged without being whole, and the file is reported as torn.
    """

    patterns: tuple[str, ...] = ("*.pt", "*.pth", "*.ckpt")
    settle: float = 1.0
    patience: float = 10.0

    def wants(self, name: str) -> bool:
        """Can the file `name` (relative, `/`-separated) be a checkpoint? Temporary names never are."""
        of_last, of_whole = _compiled(self.patterns)
        parts = name.split("/")
        matches = of_last.match(parts[-1]) or of_whole.match(name)
        return bool(matches) and not any(map(_TEMPORARY.fullmatch, parts))


@lru_cache(maxsize=16)
def _compiled(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Those that are held against the last part of a name, and those against all of it, as one each."""
    last = [translate(each) for each in patterns if "/" not in each]
    whole = [translate(each) for each in patterns if "/" in each]
    nothing = "(?!)"
    return re.compile("|".join(last) or nothing), re.compile("|".join(whole) or nothing)


# --- is it whole -------------------------------------------------------------------------------------

_BLOCK = 4096
_ZIP_MAGIC = b"PK\x03\x04"
_ZIP_END = b"PK\x05\x06"
_ZIP_BEHIND = b"PK\x07\x08"  # begins what a writer that could not go back puts behind the bytes


@dataclass(frozen=True, slots=True)
class Look:
    """What the bytes say: why they are not whole (None if they are), and whether they end with a seal."""

    flaw: str | None
    sealed: bool = False


class _NotWhole(Exception):
    """Why a file is not whole, as its text."""


def flaw_of(file: BinaryIO, name: str) -> str | None:
    """Say why the file's bytes are not a whole checkpoint, or None if they are. `name` tells the format."""
    return look_at(file, name).flaw


def look_at(file: BinaryIO, name: str) -> Look:
    """Look whether the file is whole, by its format; OSError when it cannot be read."""
    size = file.seek(0, 2)
    if size == 0:
        return Look("is empty")
    if size > MAX_OBJECT_BYTES:
        return Look(
            f"has {size} bytes, more than the {MAX_OBJECT_BYTES} of an object in S3: save it in shards"
        )
    try:
        head = _read(file, 0, min(size, 4))
        if _ZIP_MAGIC.startswith(head) or head == _ZIP_END:
            _check_zip(file, size)
            return Look(None, sealed=True)
        if name.endswith(".safetensors"):
            _check_safetensors(file, size)
        else:
            _check_other(file, size)
    except _NotWhole as flaw:
        return Look(str(flaw))
    return Look(None)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise _NotWhole("was cut while it was looked at")
    return data


def _check_other(file: BinaryIO, size: int) -> None:
    """A sample of 16 blocks must hold more than zeros (a preallocated file that was never written).

    Nor may it end as an archive of torch.save's does: then its first page was lost, in a crash perhaps.
    """
    if size >= _END.size and _read(file, size - _END.size, _END.size).startswith(_ZIP_END):
        raise _NotWhole("ends as a zip archive, and does not begin as one: its first page is lost")
    step = max(1, size // 16)
    for offset in (*range(0, size, step), max(0, size - _BLOCK)):
        if any(_read(file, offset, min(_BLOCK, size - offset))):
            return
    raise _NotWhole("is nothing but zeros")


# --- safetensors -------------------------------------------------------------------------------------

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_CHUNK = 1 << 20
# A raw quote cannot stand inside a JSON string, so no tensor's name can look like this. A real JSON parser
# would need memory in proportion to the header, and a stack in proportion to its nesting.
_OFFSETS = re.compile(rb'"data_offsets"\s{0,9}:\s{0,9}\[\s{0,9}\d{1,19}\s{0,9},\s{0,9}(\d{1,19})\s{0,9}\]')
_MAX_MATCH = 128  # bytes that _OFFSETS can match, at most


def _check_safetensors(file: BinaryIO, size: int) -> None:
    if size < 10:
        raise _NotWhole("the safetensors header is missing: cut short?")
    (header,) = struct.unpack("<Q", _read(file, 0, 8))
    if not 2 <= header <= _MAX_HEADER_BYTES:
        raise _NotWhole(f"the safetensors header has an impossible length ({header} bytes)")
    if 8 + header > size:
        raise _NotWhole(f"the safetensors header is cut short: {size - 8} of {header} bytes are there")
    if _read(file, 8, 1) != b"{":
        raise _NotWhole("the safetensors header is not JSON")
    expected = 8 + header + _last_tensor_end(file, 8 + header)
    if size != expected:
        raise _NotWhole(f"the safetensors header asks for {expected} bytes, the file has {size}")


def _last_tensor_end(file: BinaryIO, end: int) -> int:
    """Return the greatest end in the header, which ends at `end`; it is read a piece at a time."""
    last, carried = 0, b""
    for offset in range(8, end, _CHUNK):
        data = carried + _read(file, offset, min(_CHUNK, end - offset))
        last = max(last, *(int(each[1]) for each in _OFFSETS.finditer(data)), 0)
        carried = data[-_MAX_MATCH:]
    return last


# --- zip ---------------------------------------------------------------------------------------------

_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 0xFFFF
_MAX_ENTRY = _ENTRY.size + 3 * 0xFFFF
_MAX_ENTRIES = 100_000  # read one by one, in about 0.2 s ...
_MAX_DIRECTORY = 1 << 26  # ... in so many bytes; an archive of more is taken at its word for the rest
_CRC_BEHIND = 1 << 3  # of a record's flags: its checksum stands behind its bytes
_UNREADABLE = 0x61  # of its flags: encrypted, or a patch of another archive
_LOCAL_HEADERS = 1_000  # of which so many, evenly spread, are looked at where the record itself lies


class _Directory(NamedTuple):
    """Where the central directory of an archive says that it is."""

    entries: int
    size: int
    offset: int


class _Record(NamedTuple):
    """One entry of the directory: where its local header is, and what stands with the record once more."""

    offset: int
    size: int
    unreadable: int
    method: int
    crc: int
    name_size: int
    name: bytes


def _check_zip(file: BinaryIO, size: int) -> None:
    directory = _directory_of(file, size)
    step = 1 + directory.entries // _LOCAL_HEADERS
    start = end = 0  # of the record before, where that was looked at
    for n, record in enumerate(_records(file, directory)):
        if start < record.offset < end:
            raise _NotWhole(f"record {n} of the zip archive lies in the one before it")
        if record.offset + _LOCAL.size + record.name_size + record.size > directory.offset:
            raise _NotWhole(f"record {n} of the zip archive lies outside of it")
        if n % step == 0 or n == directory.entries - 1:
            start, end = record.offset, _checked_end(file, directory, record, n=n)


def _checked_end(file: BinaryIO, directory: _Directory, record: _Record, *, n: int) -> int:
    """Hold the record against its entry; return where its bytes end."""
    head = _read(file, record.offset, _LOCAL.size + record.name_size)
    magic, _, flags, method, *_, crc, _, _, name_size, extra_size = _LOCAL.unpack_from(head)
    if magic != _ZIP_MAGIC:
        raise _NotWhole(f"record {n} of the zip archive is not where the directory says: a hole?")
    end = record.offset + _LOCAL.size + int(name_size) + int(extra_size) + record.size
    if end > directory.offset:
        raise _NotWhole(f"record {n} of the zip archive runs into its directory")
    if flags & _CRC_BEHIND and record.size:
        behind, crc = struct.unpack("<4sL", _read(file, end, 8))
        if behind != _ZIP_BEHIND:
            raise _NotWhole(f"record {n} of the zip archive does not end where the directory says: a hole?")
    elif flags & _CRC_BEHIND:  # there are no bytes, and torch says nothing behind them
        crc = 0
    if (flags & _UNREADABLE, method, crc, name_size, head[_LOCAL.size :]) != record[2:]:
        raise _NotWhole(f"record {n} of the zip archive is another than its directory says: written over?")
    return end


def _directory_of(file: BinaryIO, size: int) -> _Directory:
    """Find the directory by the end record, and by the zip64 end record where there is one."""
    start = max(0, size - _END.size - _MAX_COMMENT)
    tail = _read(file, start, size - start)
    at = tail.rfind(_ZIP_END)
    if at < 0 or at + _END.size > len(tail):
        raise _NotWhole("the end record of the zip archive is missing: cut short?")
    end = _END.unpack_from(tail, at)
    behind = len(tail) - at - _END.size
    if behind != end[7]:
        raise _NotWhole(f"{behind} bytes follow the end record of the zip archive, it announces {end[7]}")
    if end[1] not in (0, 0xFFFF) or end[3] != end[4]:
        raise _NotWhole("the zip archive is one of several volumes")
    small = _Directory(*end[4:7])
    directory, limit = _directory64_of(file, start + at, small)
    if directory.entries == 0:
        raise _NotWhole("the zip archive holds no record")
    if directory.offset + directory.size != limit or directory.entries * _ENTRY.size > directory.size:
        raise _NotWhole("the directory of the zip archive is not where the end record says")
    return directory


def _directory64_of(file: BinaryIO, end: int, small: _Directory) -> tuple[_Directory, int]:
    """Return the directory as the zip64 end record has it (else `small`), and where it must end."""
    at = end - _LOCATOR64.size
    locator = _LOCATOR64.unpack(_read(file, at, _LOCATOR64.size)) if at >= 0 else (b"", 0, 0, 0)
    if locator[0] != b"PK\x06\x07":
        return small, end
    if locator[1] != 0 or locator[3] > 1:
        raise _NotWhole("the zip archive is one of several volumes")
    if locator[2] + _END64.size > at:
        raise _NotWhole("the zip64 end record is not where its locator says")
    large = _END64.unpack(_read(file, locator[2], _END64.size))
    if large[0] != b"PK\x06\x06":
        raise _NotWhole("the zip64 end record is not where its locator says")
    directory = _Directory(*large[7:10])
    limits = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    if any(a not in (b, limit) for a, b, limit in zip(small, directory, limits, strict=True)):
        raise _NotWhole("the two end records of the zip archive disagree")
    return directory, locator[2]


def _records(file: BinaryIO, directory: _Directory) -> Iterator[_Record]:
    """Read the directory entry by entry, a piece of it at a time."""
    end = directory.offset + directory.size
    base, at, data = directory.offset, 0, b""
    for n in range(min(directory.entries, _MAX_ENTRIES)):
        if len(data) - at < _MAX_ENTRY and base + len(data) < end:
            base, at = base + at, 0
            data = _read(file, base, min(_CHUNK, end - base))
        record, at = _entry(data, at, n)
        yield record
        if base + at - directory.offset > _MAX_DIRECTORY:
            return
    if directory.entries <= _MAX_ENTRIES and base + at != end:
        raise _NotWhole("the directory of the zip archive has more in it than the end record says")


def _entry(data: bytes, at: int, n: int) -> tuple[_Record, int]:
    """Read entry `n` at `at`; return it and where the next one begins."""
    if at + _ENTRY.size > len(data) or data[at : at + 4] != b"PK\x01\x02":
        raise _NotWhole(f"entry {n} is missing in the directory of the zip archive")
    fields = _ENTRY.unpack_from(data, at)
    flags, method, crc, offset = fields[3], fields[4], fields[7], fields[16]
    size, full_size, name_size, extra_size, comment_size = fields[8:13]
    extra_at = at + _ENTRY.size + name_size
    after = extra_at + extra_size + comment_size
    if after > len(data):
        raise _NotWhole(f"entry {n} is cut in the directory of the zip archive")
    if 0xFFFFFFFF in (size, full_size, offset):
        wide = _extra64(data[extra_at : extra_at + extra_size])
        narrow = (full_size, size, offset)
        full_size, size, offset = (next(wide, each) if each == 0xFFFFFFFF else each for each in narrow)
    if method == 0 and size != full_size:
        raise _NotWhole(f"entry {n} in the directory of the zip archive has two sizes")
    name = data[at + _ENTRY.size : extra_at]
    return _Record(offset, size, flags & _UNREADABLE, method, crc, name_size, name), after


def _extra64(extra: bytes) -> Iterator[int]:
    """Yield the 64-bit values of the zip64 extra field (id 1), in their order; of many fields see a few."""
    at = 0
    for _ in range(16):
        if at + 4 > len(extra):
            return
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            yield from (each for (each,) in struct.iter_unpack("<Q", extra[at + 4 :][: size // 8 * 8][:24]))
            return
        at += 4 + size
