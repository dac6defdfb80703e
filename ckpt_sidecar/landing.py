"""What is put into, or taken out of, the trainer's own directory: restored files, and what retention deletes.

Nothing here replaces or removes a file that it was not told of by name, size and time.
"""

from __future__ import annotations

import errno
import os
import stat
from itertools import count
from pathlib import Path
from typing import BinaryIO, Self

from ckpt_sidecar.checkpoint import File
from ckpt_sidecar.disk import Disk, file_of
from ckpt_sidecar.names import HOME, NOTICE_NAME, flaw_of_name


class NoRoom(Exception):
    """The disk is too small for the checkpoint; the message has both numbers."""


class Incoming:
    """A restore under way: a preallocated file out of the trainer's sight; a `bucket.Sink`."""

    def __init__(self, root: Path, path: Path, *, size: int, disk: Disk) -> None:
        self._root = root
        self._path = path
        self._disk = disk
        self._descriptor = disk.create(path, size)

    def write_at(self, offset: int, view: memoryview) -> None:
        """Write all of `view` at `offset`."""
        self._disk.write_at(self._descriptor, offset, view)

    def open(self) -> BinaryIO:
        """What has arrived, for a look at its format."""
        return self._path.open("rb")

    def seal(self, name: str, mtime_ns: int) -> File:
        """Make the bytes durable and set their time; return the file as it will be under that name."""
        self._disk.finish(self._descriptor, mtime_ns)
        return file_of(name, os.fstat(self._descriptor))

    def place(self, name: str) -> None:
        """Put the sealed file under its final name; FileExistsError when one stands there."""
        target = self._root / name
        try:
            self._disk.make_dir(target.parent, mode=0o755)
        except FileExistsError as error:  # not to be mistaken for a file at the very name
            raise NotADirectoryError(errno.ENOTDIR, "a file is in the way of its directory", name) from error
        try:
            self._disk.link(self._path, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if os.path.lexists(target):
                raise FileExistsError(target) from None
            self._disk.rename(self._path, target)
        self._disk.sync_dir(target.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the descriptor back, and the room where nothing was placed."""
        os.close(self._descriptor)
        self._disk.unlink(self._path)


class Landing:
    """The watch dir, as the sidecar may write into it. Blocking calls."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self.root = root
        self._disk = disk or Disk()
        self._incoming = root / HOME / "incoming"  # on the watch dir's file system, wherever the spool is
        self._numbers = count()

    def clear(self) -> None:
        """Remove what restores that were killed have left."""
        self._disk.make_dir(self._incoming)
        for path in self._incoming.iterdir():
            self._disk.unlink(path)

    def incoming(self, size: int) -> Incoming:
        """Make room for a restore of `size` bytes; NoRoom, before the first byte, when the disk has less."""
        self._disk.make_dir(self._incoming)
        free = self._disk.free_bytes(self._incoming)
        if free < size:
            raise NoRoom(f"the checkpoint has {size} bytes, {self.root} room for {free} (make room there)")
        path = self._incoming / f"{os.getpid()}-{next(self._numbers)}"
        return Incoming(self.root, path, size=size, disk=self._disk)

    def aside(self, name: str) -> Path:
        """Move what stands at `name` out of the way, kept for a person to look at; return where it is."""
        shelf = self.root / HOME / "aside"
        # In a container the pid may be the same every time: what an earlier one has put there stays.
        numbers = (shelf / f"{os.getpid()}-{n}" for n in self._numbers)
        folder = next(each for each in numbers if not os.path.lexists(each))
        self._disk.make_dir(folder)
        target = folder / Path(name).name
        self._disk.rename(self.root / name, target)
        return target

    def delete(self, file: File) -> bool:
        """Delete a file of the trainer's if it is still this very one; say whether it was deleted."""
        if not self.inside(file.name) or self.look(file.name) != file:
            return False
        self._disk.unlink(self.root / file.name)
        return True

    def notice(self, text: str | None) -> None:
        """Leave the trainer a note of an interruption that is near, or take away an old one (None)."""
        path = self.root / NOTICE_NAME
        if text is None:
            self._disk.unlink(path)
        else:
            self._disk.write_file(path, text.encode(), sync=False)

    def look(self, name: str) -> File | None:
        """What stands at `name` now; None when nothing does."""
        try:
            return file_of(name, (self.root / name).lstat())
        except OSError:
            return None

    def inside(self, name: str) -> bool:
        """Is `name` a good name that leads through no symlink, so that it lies inside the watch dir?"""
        if flaw_of_name(name) is not None:
            return False
        path = self.root / name
        between = [each for each in path.parents if self.root in each.parents]
        return not any(each.is_symlink() for each in [path, *between])

    def takes(self, name: str) -> bool:
        """Is there nothing at `name`, or a regular file? Directories, devices and pipes are left alone."""
        try:
            return stat.S_ISREG((self.root / name).lstat().st_mode)
        except OSError:
            return True
