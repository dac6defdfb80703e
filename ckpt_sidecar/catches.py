"""Catch a file at the first hint, in whichever thread the hint comes, so that the trainer may delete it.

A file is held before it is known to be whole, or even to be finished; the watcher judges it later.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from ckpt_sidecar.checkpoint import Caught, File
from ckpt_sidecar.completion import Candidate, Evidence, Seen, completed_at, noticed
from ckpt_sidecar.disk import inode_of
from ckpt_sidecar.events import Event, Failed, Ignored, WatchLost
from ckpt_sidecar.formats import Look, Rules, look_at
from ckpt_sidecar.names import flaw_of_name

REMEMBERED = 10_000  # names
Key = tuple[str, tuple[int, int]]  # name and inode


class Catcher(Protocol):
    """Who holds files, so that the trainer may do with the names what it likes. From any thread."""

    def catch(self, name: str) -> Caught | None:
        """Hold the regular file that stands at `name`; None when there is none; OSError when it cannot be.

        Once more for the same name and inode is the same hold; under another name it is one of its own.
        """

    def let_go(self, caught: Caught) -> None:
        """Hold it no longer; what was handed over in a `Found` is not let go of here."""

    def open_caught(self, caught: Caught) -> BinaryIO:
        """The held bytes, to look at; FileNotFoundError when the hold is gone."""

    def held_bytes(self) -> int:
        """Bytes that nothing but our holds keeps on the disk any more."""


class Hint(NamedTuple):
    """A file that is held from now on, and what is known of it. `whole`: it looked so."""

    caught: Caught
    candidate: Candidate
    whole: bool = False

    @property
    def key(self) -> Key:
        """What tells it from other files."""
        return self.caught.name, self.caught.inode


class Sight(NamedTuple):
    """What a look at the held bytes has shown. `standing`: the inode to which the name leads now."""

    file: File
    look: Look
    standing: tuple[int, int] | None


class Once:
    """What was said already; what a whole listing does not meet again is forgotten."""

    def __init__(self) -> None:
        self._met: dict[Hashable, int] = {}
        self._listing = 0

    def __contains__(self, thing: Hashable) -> bool:
        self.meet(thing)
        return thing in self._met

    def meet(self, thing: Hashable) -> None:
        """Remember it, if it is known, until the next listing."""
        if thing in self._met:
            self._met[thing] = self._listing

    def first(self, thing: Hashable) -> bool:
        """Note the thing; is it the first time?"""
        known = thing in self
        self._met[thing] = self._listing
        return not known

    def listed(self) -> None:
        """A listing has ended, the next one begins."""
        self._met = {thing: n for thing, n in self._met.items() if n == self._listing}
        self._listing += 1


class Taken:
    """The save of each name that was taken last; for the last names only."""

    def __init__(self) -> None:
        self._last: dict[str, Hint] = {}

    def note(self, hint: Hint) -> None:
        """It is taken."""
        self._last.pop(hint.caught.name, None)
        self._last[hint.caught.name] = hint
        if len(self._last) > REMEMBERED:
            del self._last[next(iter(self._last))]

    def later(self, hint: Hint, standing: tuple[int, int] | None, *, now: float, wall: float) -> bool:
        """Was a later save of its name taken: what is `standing` there, or was completed after it?"""
        last = self._last.get(hint.caught.name, hint)
        ours, theirs = (completed_at(each.candidate, now=now, wall=wall) for each in (hint, last))
        return last.key != hint.key and (last.caught.inode == standing or theirs > ours)


class Inbox:
    """Catches what is hinted at or listed, in whichever thread that happens, and wakes the event loop."""

    def __init__(
        self,
        root: Path,
        rules: Rules,
        *,
        catcher: Catcher,
        known: Callable[[File], bool],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._root, self._rules = root, rules
        self._catcher, self._known = catcher, known
        self._clock, self._wall = clock, wall
        self._mail: deque[Hint | Event] = deque()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.wake = asyncio.Event()
        self.held: dict[Key, Caught] = {}  # what has no verdict yet
        self.asked = ""  # why a listing is wanted

    def listen(self) -> None:
        """From now on wake the running event loop."""
        self._loop = asyncio.get_running_loop()

    def empty(self) -> Iterator[Hint | Event]:
        """Take out what has come in."""
        self.wake.clear()
        while self._mail:
            yield self._mail.popleft()

    def _post(self, *mail: Hint | Event) -> None:
        self._mail.extend(mail)
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody wants to know any more
                self._loop.call_soon_threadsafe(self.wake.set)

    def look(self, hint: Hint) -> Sight | OSError:
        """Look at the held bytes, in a thread."""
        name = hint.caught.name
        try:
            with self._catcher.open_caught(hint.caught) as file:
                before = os.fstat(file.fileno())
                look = look_at(file, name)
                after = os.fstat(file.fileno())
        except FileNotFoundError as gone:  # it was handed over, or let go of, just when a new hint came
            self.heard(name, hint.candidate.evidence)
            return gone
        except OSError as error:
            return error
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            look = Look("is being written")
        return Sight(File(name, after.st_size, after.st_mtime_ns), look, inode_of(self._root / name))

    # hints.Listener

    def heard(self, name: str, evidence: Evidence) -> None:
        """Catch the file at `name` if it can be a checkpoint."""
        if not self._rules.wants(name):
            return
        try:
            found = (self._root / name).lstat()
        except FileNotFoundError:
            self._heard_gone(name, evidence)
            return
        except OSError:
            return
        if stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
            inode = (found.st_dev, found.st_ino)
            link = stat.S_ISLNK(found.st_mode)
            self.take_in(Seen(name, found.st_size, found.st_mtime_ns, inode, link), evidence)

    def _heard_gone(self, name: str, evidence: Evidence) -> None:
        """Its name is gone, but perhaps we hold it, and have just heard that the writer is done with it."""
        if evidence is not Evidence.CLOSED:
            return
        with self._lock:
            for caught in [each for key, each in self.held.items() if key[0] == name]:
                with suppress(OSError), self._catcher.open_caught(caught) as file:
                    self._post(self._hint(caught, evidence, os.fstat(file.fileno())))

    def overflowed(self) -> None:
        """Have the directory listed."""
        self._ask("overflow")

    def limited(self, reason: str) -> None:
        """Say that a part of the tree gives no events."""
        self._post(WatchLost(reason))

    def lost(self, reason: str) -> None:
        """Say it, and have everything watched anew and listed."""
        self._post(WatchLost(reason))
        self._ask("rewatch")

    def _ask(self, reason: str) -> None:
        if self.asked not in ("start", "stop"):
            self.asked = reason
        self._post()

    # both

    def refuse(self, name: str, reason: str) -> None:
        """Say that a thing in the tree is not taken up."""
        self._post(Ignored(printable(name), reason))

    def take_in(self, seen: Seen, evidence: Evidence) -> bool:
        """Catch what was seen, if it is new; was it?"""
        flaw = "is a symlink" if seen.link else flaw_of_name(seen.name)
        if flaw is not None:
            self.refuse(seen.name, flaw)
            return False
        if self._known(File(seen.name, seen.size, seen.mtime_ns)):
            return False
        try:
            with self._lock:
                hint, new = self._catch(seen.name, evidence)
                if hint is not None:
                    self._post(hint)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._post(unreadable(seen.name, error))
            return False
        return new

    def take_over(self, holds: Sequence[Caught]) -> None:
        """Take in what a predecessor held; a hold that cannot be read is let go."""
        for caught in holds:
            try:
                with self._catcher.open_caught(caught) as file:
                    self._post(self._hint(caught, Evidence.FOUND, os.fstat(file.fileno())))
            except OSError:
                self._catcher.let_go(caught)

    def judged(self, key: Key) -> None:
        """There is a verdict."""
        with self._lock:
            self.held.pop(key, None)

    def let_go(self, holds: Sequence[Caught]) -> None:
        """Let go of what has not been caught again meanwhile."""
        with self._lock:
            again = {mail.key for mail in self._mail if isinstance(mail, Hint)}
            for caught in holds:
                if (caught.name, caught.inode) not in again:
                    try:
                        self._catcher.let_go(caught)
                    except OSError as error:  # it stays held, and the next start looks at it again
                        self._post(unreadable(caught.name, error))

    def _catch(self, name: str, evidence: Evidence) -> tuple[Hint | None, bool]:
        """Under the lock, because our own catch is a link, too, and must not look like the trainer's."""
        found = (self._root / name).lstat()
        caught = self._catcher.catch(name)
        if caught is None:
            return None, False
        new = (name, caught.inode) not in self.held
        self.held[name, caught.inode] = caught
        if evidence is Evidence.CREATED and new and found.st_nlink > 1:
            evidence = Evidence.PLACED  # a hard link into place gives no other event
        return self._hint(caught, evidence, found), new

    def _hint(self, caught: Caught, evidence: Evidence, found: os.stat_result) -> Hint:
        now, wall = self._clock(), self._wall()
        size, mtime_ns = found.st_size, found.st_mtime_ns
        return Hint(caught, noticed(evidence, size, mtime_ns, now=now, wall=wall, rules=self._rules))


def unreadable(name: str, error: OSError) -> Failed:
    """Say that a file cannot be held or read, and the mend where we know it."""
    ours = "run the sidecar as the trainer's user, or make the file readable for it"
    mend = ours if error.errno in (errno.EACCES, errno.EPERM) else ""
    return Failed("watch", "disk", printable(name), error.strerror or str(error), mend)


def printable(name: str) -> str:
    """Return the name with whatever cannot be shown escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
