"""The dozen calls through which the local file system is changed, in one replaceable class.

Tests put a `Disk` in its place that counts the calls, and fails or kills at the k-th.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO

from ckpt_sidecar.checkpoint import File

_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # 0 on a C library without preadv2


def file_of(name: str, status: os.stat_result) -> File:
    """The file of that name with this status."""
    return File(name, status.st_size, status.st_mtime_ns)


def inode_of(path: Path) -> tuple[int, int] | None:
    """Return the inode that the path leads to, None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def files_below(folder: Path) -> Iterator[Path]:
    """Yield whatever is no directory below the folder; what vanishes meanwhile is passed over."""
    for at, _, names in os.walk(folder):
        yield from (Path(at, name) for name in names)


def nameless_bytes(folders: Iterable[Path], descriptors: Iterable[int]) -> int:
    """Bytes that nothing but links in these folders, or these descriptors, keeps on the disk any more."""
    total = 0
    for path in (each for folder in folders for each in files_below(folder)):
        with suppress(OSError):  # gone meanwhile
            status = path.lstat()
            total += status.st_size if status.st_nlink == 1 else 0
    for descriptor in descriptors:
        with suppress(OSError):
            status = os.fstat(descriptor)
            total += status.st_size if status.st_nlink == 0 else 0
    return total


def locked(path: Path) -> BinaryIO | None:
    """Open the file and lock it for this process alone; None where another one has."""
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def leads_to(path: Path, file: BinaryIO) -> bool:
    """Is it this open file that the path leads to?"""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def is_full(error: OSError) -> bool:
    """Is it that the disk has no room, or no more of it for us?"""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def mend_of(error: OSError) -> str:
    """What to do about it."""
    if is_full(error):
        return "make room there"
    if error.errno == errno.EROFS:
        return "mount it writable"
    if error.errno == errno.EIO:
        return "look at the disk, and at the kernel's log"
    return "run the sidecar as the trainer's user, with the directory writable for it"


def foreign(paths: Iterable[Path]) -> Path | None:
    """The first of the paths that is a symlink or another user's; None when all are our own."""
    for path in paths:
        status = path.lstat()
        ours = status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode)
        if not ours and path.name != "lost+found":
            return path
    return None


def _fill(file: IO[bytes], data: bytes, *, sync: bool) -> None:
    file.write(data)
    file.truncate()
    file.flush()
    if sync:
        os.fsync(file.fileno())


class Disk:
    """The real file system. Every call may raise OSError; none leaves half of its work under a final name."""

    def make_dir(self, path: Path, *, mode: int = 0o700) -> None:
        """Make the directory and its parents, for us alone; one that is there is left as it is."""
        path.mkdir(mode=mode, parents=True, exist_ok=True)

    def link(self, source: Path, target: Path) -> None:
        """Make a hard link, never to what a symlink points to; FileExistsError when the target is there."""
        os.link(source, target, follow_symlinks=False)

    def rename(self, source: Path, target: Path) -> None:
        """Move within one file system, atomically, in place of a file that is there."""
        source.rename(target)

    def unlink(self, path: Path) -> None:
        """Remove a file; one that is gone is fine."""
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and all in it; one that is gone is fine."""
        shutil.rmtree(path, ignore_errors=not path.exists())

    def sync_dir(self, path: Path) -> None:
        """Make the directory's entries durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def write_file(self, path: Path, data: bytes, *, sync: bool, in_place: bool = False) -> None:
        """Put `data` at `path`, atomically: a reader or a crash finds the old bytes or the new ones.

        With `in_place` a disk on which there is no room for both has the new ones over the old: then a power
        loss may tear them.
        """
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                _fill(file, data, sync=sync)
            temporary.rename(path)
        except OSError as error:
            if not (in_place and is_full(error) and path.exists()):
                raise
            with path.open("r+b", buffering=0) as file:
                _fill(file, data, sync=sync)

    def append(self, path: Path, data: bytes) -> None:
        """Add `data` at the end of the file."""
        with path.open("ab") as file:
            file.write(data)

    def create(self, path: Path, size: int) -> int:
        """Make a new file with room for `size` bytes; return its descriptor. OSError(ENOSPC) when too big."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            if size:
                os.posix_fallocate(descriptor, 0, size)
        except OSError:
            os.close(descriptor)
            path.unlink()
            raise
        return descriptor

    def write_at(self, descriptor: int, offset: int, view: memoryview) -> None:
        """Write all of `view` at `offset`."""
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written

    def finish(self, descriptor: int, mtime_ns: int) -> None:
        """Make the file's bytes durable and set its time of modification."""
        os.utime(descriptor, ns=(mtime_ns, mtime_ns))
        os.fsync(descriptor)

    def free_bytes(self, path: Path) -> int:
        """Bytes that we may still write on the file system of `path`."""
        return shutil.disk_usage(path).free


class BytesChanged(Exception):
    """The pinned file is not as it was when it was pinned: somebody writes it in place."""


class PinnedFile:
    """The open bytes of a pin: a `bucket.Source` that never hands out bytes of a file that has changed.

    The page cache is the trainer's: what was in it stays as it was, and what we bring in can be given back.
    """

    def __init__(self, descriptor: int, file: File) -> None:
        self._descriptor = descriptor
        self._file = file
        self._brought: set[int] = set()  # offsets at which a read found less in the cache than it wanted
        with suppress(OSError):  # what we read is not needed again, and nothing ahead of it is needed yet
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NOREUSE)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill `view` from `offset`; return how many bytes there were. BytesChanged: they are not those."""
        cached = self._read_cached(offset, view)
        got = cached or 0
        while got < len(view):
            n = os.preadv(self._descriptor, [view[got:]], offset + got)
            if n == 0:
                break
            got += n
        if cached is not None and cached < got:
            self._brought.add(offset)
        self.check()
        return got

    def _read_cached(self, offset: int, view: memoryview) -> int | None:
        """Fill `view` with what the page cache holds of it; None where the file system does not tell."""
        try:
            return os.preadv(self._descriptor, [view], offset, _NOWAIT) if _NOWAIT else None
        except BlockingIOError:
            return 0
        except OSError:
            return None

    def uncache(self, offset: int, size: int) -> None:
        """Give the page cache back what reading this range has brought into it."""
        brought = {each for each in list(self._brought) if offset <= each < offset + size}
        if brought:
            self._brought -= brought
            with suppress(OSError):
                os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_DONTNEED)

    def open(self) -> BinaryIO:
        """The bytes as they are now, for a look at their format."""
        return os.fdopen(os.dup(self._descriptor), "rb")

    @property
    def inode(self) -> tuple[int, int]:
        """Which file it is."""
        status = os.fstat(self._descriptor)
        return status.st_dev, status.st_ino

    def check(self) -> None:
        """Raise BytesChanged unless the inode is as it was when it was pinned."""
        now = file_of(self._file.name, os.fstat(self._descriptor))
        if now != self._file:
            raise BytesChanged(
                f"{now.name}: pinned with {self._file.size} bytes, now {now.size}; or rewritten"
            )

    def close(self) -> None:
        """Give the descriptor back, and what is left to be given back of the page cache."""
        self.uncache(0, self._file.size)
        os.close(self._descriptor)
