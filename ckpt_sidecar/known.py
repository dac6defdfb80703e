"""Which files of the watch dir are on their way or durable, so that none is taken up twice.

A line of `known.jsonl` for each file that is settled: name, size, mtime in ns, and the id under which it is
durable, or null when it was superseded or skipped. A line that is lost or torn costs one look into the
bucket, so none is synced. Names of files that are gone are forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ckpt_sidecar.checkpoint import File, Id
from ckpt_sidecar.disk import Disk

SLACK = 1000  # so many names of files that are gone may pile up before they are looked for


class Known:
    """The table, by name. `is_known` may be asked from any thread."""

    def __init__(self, root: Path, path: Path, disk: Disk) -> None:
        self._root = root
        self._path = path
        self._disk = disk
        self._files: dict[str, File] = {}
        self._durable: dict[str, Id] = {}
        self._limit = SLACK

    def read(self) -> None:
        """Read the table back, and write it anew without what is gone."""
        text = ""
        with suppress(FileNotFoundError):
            text = self._path.read_text("utf-8", "replace")
        for file, id_ in _lines(text):
            self.taken(file)
            self._note(file, id_)
        self._forget_gone()
        lines = [_line(file, self._durable.get(name)) for name, file in self._files.items()]
        self._disk.write_file(self._path, "".join(lines).encode(), sync=False)

    def is_known(self, file: File) -> bool:
        """Is this very file on its way or durable?"""
        return self._files.get(file.name) == file

    def taken(self, file: File) -> None:
        """The file is on its way."""
        self._files[file.name] = file
        self._durable.pop(file.name, None)
        if len(self._files) > self._limit:
            self._forget_gone()

    def settled(self, file: File, id_: Id | None) -> None:
        """The file is in the bucket, under that id; or (None) it will not be sent."""
        self._disk.append(self._path, _line(file, id_).encode())
        self._note(file, id_)

    def _note(self, file: File, id_: Id | None) -> None:
        if self._files.setdefault(file.name, file) == file and id_ is not None:
            self._durable[file.name] = id_  # else a newer save of the name is on its way

    def forget(self, name: str) -> None:
        """Whatever stands at `name` is to be taken up again."""
        self._files.pop(name, None)
        self._durable.pop(name, None)

    def durable_files(self) -> dict[Id, File]:
        """The files in the watch dir that are durable, as far as we know them."""
        return {id_: self._files[name] for name, id_ in self._durable.items()}

    def _forget_gone(self) -> None:
        for name in [name for name in self._files if not (self._root / name).exists()]:
            self.forget(name)
        self._limit = 2 * len(self._files) + SLACK


def _line(file: File, id_: Id | None) -> str:
    return json.dumps([file.name, file.size, file.mtime_ns, id_ and str(id_)]) + "\n"


def _lines(text: str) -> Iterator[tuple[File, Id | None]]:
    for line in text.splitlines():
        with suppress(ValueError, TypeError):
            name, size, mtime_ns, id_ = json.loads(line)
            yield File(str(name), int(size), int(mtime_ns)), None if id_ is None else Id.parse(id_)
