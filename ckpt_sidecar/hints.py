"""What may have happened in a directory tree: inotify's raw hints, and the listing that is the truth.

Of watchdog we take the inotify reader (`InotifyFD`), not its Observer: that one holds a rename back for up to
0.5 s to pair it with its other half, and its mask makes the kernel queue an event for every write() of a
10 GB save. The mask here asks only for what can complete a file, so a save costs one or two events.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from watchdog.observers.inotify_c import CallbackId, InotifyEvent, InotifyFD, Mask, WatchDescriptor

from ckpt_sidecar.completion import Evidence, Seen
from ckpt_sidecar.disk import inode_of

IN_CLOSE_WRITE = 0x8
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_MOVE_SELF = 0x800
IN_ONLYDIR = 0x01000000
IN_DONT_FOLLOW = 0x02000000
IN_ISDIR = 0x40000000
_MASK = IN_CLOSE_WRITE | IN_MOVED_TO | IN_CREATE | IN_MOVE_SELF | IN_ONLYDIR  # its end is always told

_MENDS = {
    errno.ENOSPC: "raise the sysctl fs.inotify.max_user_watches",
    errno.EMFILE: "raise the sysctl fs.inotify.max_user_instances, or the limit of open files",
    errno.EAGAIN: "raise `ulimit -u`, or the container's limit of pids",
}


# --- the listing -------------------------------------------------------------------------------------


def walk(
    root: Path,
    wants: Callable[[str], bool],
    *,
    below: str = "",
    enter: Callable[[str], None],
    refused: Callable[[str, str], None],
) -> Iterator[Seen]:
    """Yield every wanted file and symlink under `root`/`below`; no symlink and no dot-directory is entered.

    `enter` gets the name of each directory before it is listed; `refused` that of what is passed over though
    checkpoints may be meant, and why. Names are relative to `root`, "" is the root. OSError when the root
    itself cannot be listed.
    """
    directories = [below]
    while directories:
        directory = directories.pop()
        enter(directory)
        try:
            with os.scandir(root / directory) as entries:
                for entry in entries:
                    name = f"{directory}/{entry.name}" if directory else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        if not entry.name.startswith("."):
                            directories.append(name)
                    elif (seen := _seen(name, entry, wanted=wants(name), refused=refused)) is not None:
                        yield seen
        except FileNotFoundError:
            if directory == "":
                raise
        except OSError as error:
            if directory == "":
                raise
            refused(directory, f"cannot be listed: {error.strerror}")


def _seen(
    name: str, entry: os.DirEntry[str], *, wanted: bool, refused: Callable[[str, str], None]
) -> Seen | None:
    if not wanted:
        _pass_over(name, entry, refused)
        return None
    try:
        found = entry.stat(follow_symlinks=False)
    except OSError:  # gone since
        return None
    if stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
        inode = (found.st_dev, found.st_ino)
        return Seen(name, found.st_size, found.st_mtime_ns, inode, stat.S_ISLNK(found.st_mode))
    refused(name, "is no regular file")
    return None


def _pass_over(name: str, entry: os.DirEntry[str], refused: Callable[[str, str], None]) -> None:
    """Say so where it is a symlink to a directory: checkpoints may be meant."""
    with suppress(OSError):
        if entry.is_symlink() and entry.is_dir() and not entry.name.startswith("."):
            refused(name, "is a symlink to a directory, and is not followed")


# --- the hints ---------------------------------------------------------------------------------------


class Listener(Protocol):
    """Who is told, in watchdog's thread (or in the one that lists)."""

    def heard(self, name: str, evidence: Evidence) -> None:
        """Something happened to `name`; it may be gone already."""

    def overflowed(self) -> None:
        """The kernel has dropped events."""

    def limited(self, reason: str) -> None:
        """A part of the tree cannot be watched."""

    def lost(self, reason: str) -> None:
        """Events do not come any more; a new `Tree` may mend it."""


@dataclass(frozen=True, slots=True)
class _Watch:
    """A watched directory: its name, its inode, and the number its callback goes by."""

    name: str
    inode: tuple[int, int]
    number: int


class Tree:
    """The watches on a directory tree. It is a `WatchCallback` of watchdog's.

    `OSError` when there is no inotify to be had, with the mend in its text. What is in the tree already is
    watched when the caller walks it with `enter=tree.watch`; directories that come later watch themselves.
    """

    def __init__(self, root: Path, listener: Listener) -> None:
        self.root = root
        self._listener = listener
        self._numbers = itertools.count()
        self._watches: dict[int, _Watch] = {}
        self._lock = threading.Lock()
        self._limited = False
        self._closing = False
        self._inotify = InotifyFD()
        try:
            self._inotify.start()
        except RuntimeError as error:
            self._inotify._is_reading = False  # noqa: SLF001  (else it leaves its descriptors to its thread)
            self._inotify.stop()
            raise OSError(errno.EAGAIN, "no more threads can be started") from error

    def __repr__(self) -> str:
        return f"<{len(self._watches)} directories watched{'' if self.alive else ', but not alive'}>"

    @property
    def alive(self) -> bool:
        """Does the thread that reads the events live, and is the root watched?"""
        return self._inotify.is_alive() and any(watch.name == "" for watch in list(self._watches.values()))

    def close(self) -> None:
        """Give back the watches and the thread."""
        self._closing = True
        self._inotify.stop()
        self._inotify.join(timeout=5.0)

    def watch(self, name: str) -> None:
        """Watch the directory `name`; again does no harm. What cannot be watched is told, once."""
        try:
            with self._lock:
                self._watch(name)
        except OSError as error:
            if error.errno in _MENDS and not self._limited:
                self._limited = True
                self._listener.limited(explain(error))
            # else it is gone, or no directory any more

    def _watch(self, name: str) -> None:
        path = self.root / name
        mask = _MASK | (IN_DONT_FOLLOW if name else 0)  # the root may be given as a symlink
        number = next(self._numbers)
        found = path.stat()
        descriptor = int(self._inotify.add_callback(os.fsencode(path), Mask(mask), self, CallbackId(number)))
        old = self._watches.get(descriptor)
        if descriptor != -1:  # watchdog does not raise for EACCES; the walk will say so
            self._watches[descriptor] = _Watch(name, (found.st_dev, found.st_ino), number)
        # Two callbacks for a moment are better than none; watchdog would warn of a second with that number.
        stale = number if descriptor == -1 else old.number if old else None
        if stale is not None:
            self._inotify.remove_callbacks([(WatchDescriptor(descriptor), CallbackId(stale))])

    # watchdog's thread calls these three, and has no one to catch what they raise

    def on_event(self, event: InotifyEvent) -> None:
        """Pass a hint on; a new directory is watched first and then listed, so that nothing falls between."""
        try:
            self._on_event(event)
        except Exception as error:  # noqa: BLE001  (the thread must live, and the owner must know)
            self._listener.lost(f"{type(error).__name__}: {error}")

    def on_watch_deleted(self, wd: int) -> None:
        """Forget a directory that is gone."""
        with self._lock:
            watch = self._watches.pop(wd, None)
        if watch is not None and watch.name == "" and not self._closing:
            self._listener.lost("the watch directory is gone")

    def on_queue_overflow(self) -> None:
        """Pass it on."""
        self._listener.overflowed()

    def _on_event(self, event: InotifyEvent) -> None:
        with self._lock:
            watch = self._watches.get(event.wd)
        if watch is None:
            return
        if event.mask & IN_MOVE_SELF:
            self._forget_moved(watch)
        elif event.name:
            child = os.fsdecode(event.name)
            name = f"{watch.name}/{child}" if watch.name else child
            placed = bool(event.mask & IN_MOVED_TO)
            if not event.mask & IN_ISDIR:
                created = Evidence.CREATED if event.mask & IN_CREATE else Evidence.CLOSED
                self._listener.heard(name, Evidence.PLACED if placed else created)
            elif not child.startswith("."):
                self._enter(name, Evidence.PLACED if placed else Evidence.CREATED)

    def _enter(self, name: str, evidence: Evidence) -> None:
        nothing = _ignore_refusal  # the next rescan tells of it
        try:
            for seen in walk(self.root, _everything, below=name, enter=self.watch, refused=nothing):
                self._listener.heard(seen.name, evidence)
        except FileNotFoundError:
            return

    def _forget_moved(self, moved: _Watch) -> None:
        """A directory has left its place: whatever is watched under names that lead elsewhere now is not."""
        inside = f"{moved.name}/" if moved.name else ""
        with self._lock:
            for descriptor, watch in list(self._watches.items()):
                below = watch is moved or watch.name.startswith(inside)
                if below and inode_of(self.root / watch.name) != watch.inode:
                    del self._watches[descriptor]
                    stale = (WatchDescriptor(descriptor), CallbackId(watch.number))
                    self._inotify.remove_callbacks([stale])
        if not moved.name:
            self._listener.lost("the watch directory was moved away")


def _everything(_name: str) -> bool:
    return True


def _ignore_refusal(_name: str, _why: str) -> None:
    """Nobody is told here."""


def explain(error: OSError) -> str:
    """Return what inotify lacks, and how to mend it."""
    mend = _MENDS.get(error.errno or 0)
    return f"{error.strerror or error}: {mend}" if mend else str(error)
