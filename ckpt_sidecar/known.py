"""Which files of the watch dir are on their way or durable, so that none is taken up twice.

A line of `known.jsonl` for each file that is settled: name, size, mtime in ns, and the id under which it is
durable, or null when it was superseded or skipped. A line that is lost or torn costs one look into the
bucket, so none is synced, and a full disk holds nobody up. Names of files that are gone are forgotten, but
for the newest that is durable: by its id an older copy of `latest.json` is told from the true one.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ckpt_sidecar.checkpoint import File, Id
from ckpt_sidecar.disk import Disk, file_of

NAME = "known.jsonl"
SLACK = 1000  # so many names of files that are gone, or lines that say nothing new, may pile up


class Known:
    """The table, by name. Everything here may be asked from any thread."""

    def __init__(self, root: Path, home: Path, disk: Disk) -> None:
        self._root = root
        self._path = home / NAME
        self._disk = disk
        self._mutex = threading.RLock()
        self._files: dict[str, File] = {}
        self._durable: dict[str, Id] = {}
        self._settled: dict[str, tuple[File, Id | None]] = {}  # what the file on the disk says
        self._newest: tuple[File, Id] | None = None
        self._limit = SLACK
        self._lines = 0

    @property
    def newest(self) -> Id | None:
        """The newest checkpoint that we know to have been committed, whatever became of its file."""
        return self._newest[1] if self._newest else None

    @property
    def newest_mtime_ns(self) -> int:
        """When that one was saved, in ns since the epoch; 0 where none is known."""
        return self._newest[0].mtime_ns if self._newest else 0

    def read(self) -> list[Id]:
        """Read the table back, and write it anew without what is gone; return all the ids that it had."""
        text = ""
        with suppress(FileNotFoundError):
            text = self._path.read_text("utf-8", "replace")
        ids = []
        with self._mutex:
            for file, id_ in _lines(text):
                self.taken(file)
                self._note(file, id_)
                ids += [id_] if id_ is not None else []
            self._tidy()
        return ids

    def clear(self) -> None:
        """Know nothing any more, nor at the next start."""
        self._disk.unlink(self._path)

    def is_known(self, file: File) -> bool:
        """Is this very file on its way or durable?"""
        return self._files.get(file.name) == file

    def taken(self, file: File) -> None:
        """The file is on its way; where another that is known stands at its name, that one stays known."""
        with self._mutex:
            known = self._files.get(file.name, file)
            if known != file and self._stands(known):
                return
            self._files[file.name] = file
            self._durable.pop(file.name, None)
            self._settled.pop(file.name, None)
            if len(self._files) > self._limit:
                self._forget_gone()

    def settled(self, file: File, id_: Id | None) -> None:
        """The file is in the bucket, under that id; or (None) it will not be sent."""
        with self._mutex:
            self._note(file, id_)
            with suppress(OSError):
                self._disk.append(self._path, _line(file, id_).encode())
            self._lines += 1
            if self._lines > 2 * len(self._settled) + SLACK:
                self._tidy()

    def _note(self, file: File, id_: Id | None) -> None:
        if id_ is not None and (self.newest is None or id_ > self.newest):
            self._newest = file, id_
        if self._files.setdefault(file.name, file) != file:
            return  # a newer save of the name is on its way
        self._settled[file.name] = file, id_
        if id_ is not None:
            self._durable[file.name] = id_

    def restored(self, file: File, id_: Id) -> None:
        """The file is in the bucket under that id, and is what stands, or is about to, under its name."""
        with self._mutex:
            self.taken(file)
            self.settled(file, id_)

    def forget(self, file: File) -> None:
        """Should the file still stand there, it is to be taken up again."""
        with self._mutex:
            if self.is_known(file):
                self._drop(file.name)

    def durable_files(self) -> dict[Id, File]:
        """The files in the watch dir that are durable, as far as we know them."""
        with self._mutex:
            return {id_: self._files[name] for name, id_ in self._durable.items()}

    def _stands(self, file: File) -> bool:
        try:
            return file_of(file.name, (self._root / file.name).lstat()) == file
        except OSError:
            return False

    def _drop(self, name: str) -> None:
        for table in (self._files, self._durable, self._settled):
            table.pop(name, None)

    def _forget_gone(self) -> None:
        for name in [name for name in self._files if not os.path.lexists(self._root / name)]:
            self._drop(name)
        self._limit = 2 * len(self._files) + SLACK

    def _tidy(self) -> None:
        self._forget_gone()
        settled = list(self._settled.values())
        if self._newest is not None and self._newest not in settled:
            settled.insert(0, self._newest)  # before what is said of the file that stands there now
        lines = [_line(file, id_) for file, id_ in settled]
        self._lines = len(lines)
        with suppress(OSError):
            self._disk.write_file(self._path, "".join(lines).encode(), sync=False)


def read_settled(home: Path) -> dict[str, File]:
    """Return the files that the spool at `home` has settled, by name, as they were; for other processes."""
    try:
        text = (home / NAME).read_text("utf-8", "replace")
    except FileNotFoundError:
        return {}
    return {file.name: file for file, _ in _lines(text)}


def _line(file: File, id_: Id | None) -> str:
    return json.dumps([file.name, file.size, file.mtime_ns, id_ and str(id_)]) + "\n"


def _lines(text: str) -> Iterator[tuple[File, Id | None]]:
    for line in text.splitlines():
        with suppress(ValueError, TypeError, OverflowError, RecursionError):
            name, size, mtime_ns, id_ = json.loads(line)
            yield File(str(name), int(size), int(mtime_ns)), None if id_ is None else Id.parse(id_)
