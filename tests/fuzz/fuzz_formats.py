"""Any bytes as a checkpoint file: a verdict, at a bounded cost. `make fuzz` runs it."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator

from ckpt_sidecar.formats import Look, look_at

NAMES = ("x.pt", "x.safetensors")
READS = 5_000  # about five for each of the local headers that are looked at, and some
READ_BYTES = 200 << 20


class Counted(io.BytesIO):
    """A file that counts what is read of it."""

    reads = 0
    read_bytes = 0

    def read(self, size: int | None = -1) -> bytes:
        """Count it."""
        data = super().read(size)
        self.reads += 1
        self.read_bytes += len(data)
        return data


def check(data: bytes) -> None:
    """Hold `look_at` to its promises about a file of these bytes, whatever its name."""
    for name in NAMES:
        look = _look(data, name)
        assert look == _look(data, name)
        if look.sealed:
            assert look.flaw is None
            assert _look(data[:-1], name).flaw is not None  # cut by its last byte
        if look.flaw is not None and len(look.flaw) > 1000:
            raise AssertionError("that is too much to be logged")


def _look(data: bytes, name: str) -> Look:
    file = Counted(data)
    look = look_at(file, name)
    assert file.reads <= READS
    assert file.read_bytes <= READ_BYTES
    return look


def seeds() -> Iterator[bytes]:
    """Return what the fuzzer starts from."""
    for records in (1, 3):
        for force in (False, True):
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                for n in range(records):
                    with archive.open(zipfile.ZipInfo(f"archive/{n}"), "w", force_zip64=force) as record:
                        record.write(b"weights" * n)
                archive.comment = b"PK" if force else b""
            yield buffer.getvalue()
    yield _as_torch_writes()
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    yield struct.pack("<Q", len(header)) + header + bytes(8)
    yield pickle.dumps({"a": [1.0] * 9})
    yield bytes(64)


def _as_torch_writes() -> bytes:
    """Return an archive with its checksums behind the bytes, and a zip64 end record; without torch."""
    body, entries = b"", b""
    for n in range(2):
        name, data = b"archive/data/%d" % n, b"weights%d" % n
        sizes = struct.pack("<3L", zlib.crc32(data), len(data), len(data))
        entries += struct.pack("<4s6H", b"PK\x01\x02", 0, 0, 2056, 0, 0, 0) + sizes
        entries += struct.pack("<5H2L", len(name), 0, 0, 0, 0, 0, len(body)) + name
        extra = struct.pack("<2sH", b"FB", 12) + b"Z" * 12
        body += struct.pack("<4s5H3L2H", b"PK\x03\x04", 0, 2056, 0, 0, 0, 0, 0, 0, len(name), len(extra))
        body += name + extra + data + b"PK\x07\x08" + sizes
    counts = (2, 2, len(entries), len(body))
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, *counts)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(body) + len(entries), 1)
    return body + entries + end64 + locator + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *counts, 0)
