"""The completed files of a tree, as they are completed. Events are hints, the directory is the truth.

    hint, in watchdog's thread  ->  caught at once, so that the trainer may delete it
    listing, every so often     ->  caught, what no hint told of
    caught  ->  candidate  ->  looked at when it is due  ->  found whole | torn, and let go | due again later

A lost event costs the time until the next listing, never a checkpoint.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ckpt_sidecar.catches import Catcher, Hint, Inbox, Key, Once, Sight, Taken, printable, unreadable
from ckpt_sidecar.checkpoint import Caught, File
from ckpt_sidecar.completion import Candidate, Evidence, Seen, Verdict, completed_at, judge, merge
from ckpt_sidecar.disk import inode_of
from ckpt_sidecar.events import Event, Failed, Ignored, Rescanned, Torn, WatchLost
from ckpt_sidecar.formats import Rules
from ckpt_sidecar.hints import Tree, explain, walk

_PAUSE = 0.1  # seconds, the least between two listings that there is a reason for
_SHARE = 0.01  # of a core, the most that listings may take in the long run, however many files there are
_CHUNK = 500  # files that are listed, or looked at, between two looks at what else has happened

Tell = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Found:
    """A whole, completed file; `file` has its size and mtime as they were. Its hold is the receiver's now."""

    caught: Caught
    file: File


@dataclass(slots=True)
class _Listing:
    """A listing under way."""

    reason: str
    seen: Iterator[Seen]
    began: float
    files: int = 0
    missed: int = 0
    free: int = 0
    held: int = 0
    cpu: float = 0.0  # seconds


class Watcher:
    """The completed files of one tree.

    In this order: `start` (hints are caught from now on), `first` (what is there already), `batches`. All
    times are seconds; `clock` is monotonic, `wall` since the epoch. `known`, from any thread: is this very
    file on its way or durable? `already`: what a predecessor held without a verdict.
    """

    def __init__(
        self,
        root: Path,
        rules: Rules,
        *,
        catcher: Catcher,
        known: Callable[[File], bool],
        tell: Tell,
        rescan_every: float,
        clock: Callable[[], float],
        wall: Callable[[], float],
        events: bool = True,
        already: Sequence[Caught] = (),
    ) -> None:
        self._root, self._rules, self._catcher, self._known = root, rules, catcher, known
        self._tell, self._rescan_every, self._clock, self._events = tell, rescan_every, clock, events
        self._share = _SHARE
        self._inbox = Inbox(root, rules, catcher=catcher, known=known, clock=clock, wall=wall)
        self._held: dict[Key, Hint] = {}
        self._tree: Tree | None = None
        self._tree_inode: tuple[int, int] | None = None
        self._listing: _Listing | None = None
        self._next_listing = self._last_listing = clock()
        self._torn, self._told, self._unreadable, self._taken = Once(), Once(), Once(), Taken()
        self._lost, self._closed, self._wall, self._already = "", False, wall, already

    def __repr__(self) -> str:
        return f"<{self._root}: {len(self._held)} files not yet judged; {self._tree or 'no events'}>"

    def start(self) -> None:
        """Begin to catch what is hinted at; needs the running event loop."""
        self._inbox.listen()
        self._inbox.asked = "start"
        self._watch_anew()

    def close(self) -> None:
        """End the hints, for good. What is held without a verdict stays held, for the next start."""
        self._closed = True  # first: a thread whose waiter was cancelled may be about to watch anew
        self._unwatch()

    def hurry(self, rescan_every: float) -> None:
        """List the tree now, and from now on at least that often (seconds), whatever that takes."""
        self._rescan_every, self._share = min(self._rescan_every, rescan_every), float("inf")
        self._next_listing = self._clock()
        self._inbox.wake.set()

    def take_back(self, caught: Caught, *, after: float = 0.0) -> None:
        """Judge a held file anew, `after` so many seconds: its bytes changed, or it could not be taken."""
        now = self._clock()
        self._admit(Hint(caught, Candidate(Evidence.FOUND, -1, 0, since=now, due=now + after)))
        self._inbox.wake.set()

    def undecided(self) -> list[str]:
        """Return what looks whole, and has not rested long enough to be called completed."""
        return sorted(printable(hint.caught.name) for hint in self._held.values() if hint.whole)

    async def first(self, stop: asyncio.Event | None = None) -> list[Found]:
        """List the tree and return what is completed already, the oldest first.

        With a `stop`, what has yet to settle is waited for, until then.
        """
        await asyncio.to_thread(self._inbox.take_over, self._already)
        found = await self._round()
        while self._listing is not None or self._due() <= self._clock():
            found += await self._round()
        if stop:
            found += [each async for batch in self._settling(stop) for each in batch]
        last = await self._last_of_each_name(found)
        return sorted(last, key=lambda each: (each.file.mtime_ns, each.file.name))

    async def batches(self, stop: asyncio.Event) -> AsyncIterator[list[Found]]:
        """Yield what is completed, as it is; once `stop` is set, look a last time, and end."""
        while not stop.is_set():
            if found := await self._round():
                yield found
            elif self._listing is None:
                await self._rest(stop, self._due())
        self._inbox.asked = "stop"
        while self._inbox.asked == "stop" or self._listing is not None:
            if found := await self._round():
                yield found
        async for found in self._settling(asyncio.Event()):
            yield found

    async def _settling(self, stop: asyncio.Event) -> AsyncIterator[list[Found]]:
        """Yield what was completed before now, as it settles."""
        end = self._clock() + self._rules.settle
        while not stop.is_set() and self._due_candidate() <= end:
            await self._rest(stop, self._due_candidate())
            if found := await self._round():
                yield found

    # --- the loop ---

    def _due_candidate(self) -> float:
        return min((hint.candidate.due for hint in self._held.values()), default=float("inf"))

    def _due(self) -> float:
        """When there is something to do, if nothing comes in before."""
        return min(self._due_listing(), self._due_candidate())

    def _due_listing(self) -> float:
        if self._inbox.asked in ("start", "stop"):
            return self._clock()
        if self._inbox.asked:  # not without a pause, should there be a reason again and again
            return min(self._next_listing, self._last_listing + max(_PAUSE, self._rules.settle))
        return self._next_listing

    async def _rest(self, stop: asyncio.Event | None, until: float) -> None:
        """Wait for a hint, the stop, or the time."""

        async def pass_on(event: asyncio.Event) -> None:
            await event.wait()
            self._inbox.wake.set()

        async with asyncio.TaskGroup() as group:
            task = group.create_task(pass_on(stop)) if stop else None
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(until - self._clock(), 3600.0))):
                    await self._inbox.wake.wait()
            if task is not None:
                task.cancel()

    async def _round(self) -> list[Found]:
        """Take in the hints, list some of the tree if that is due, look at some candidates that are due."""
        self._receive_all()
        if self._listing is None and self._due_listing() <= self._clock():
            await self._begin_listing()
        if self._listing is not None:
            await self._list_some(self._listing)
        return await self._judge_some()

    def _receive_all(self) -> None:
        for mail in self._inbox.empty():
            self._receive(mail)

    def _receive(self, mail: Hint | Event) -> None:
        if isinstance(mail, Hint):
            self._admit(mail)
        elif isinstance(mail, WatchLost):
            self._tell_lost(mail.reason)
        elif not isinstance(mail, Ignored | Failed) or self._told.first(mail):
            self._tell(mail)

    def _admit(self, hint: Hint) -> None:
        old = self._held.get(hint.key)
        self._inbox.held[hint.key] = hint.caught
        self._held[hint.key] = hint._replace(candidate=merge(old and old.candidate, hint.candidate))

    def _tell_lost(self, reason: str) -> None:
        if reason != self._lost:
            self._lost = reason
            self._tell(WatchLost(reason))

    # --- listings ---

    async def _begin_listing(self) -> None:
        reason, self._inbox.asked = self._inbox.asked or "interval", ""
        began = self._clock()
        anew = await asyncio.to_thread(self._check_watch, reason)
        seen = walk(self._root, self._rules.wants, enter=self._enter, refused=self._inbox.refuse)
        self._listing = _Listing("rewatch" if anew else reason, seen, began)

    def _check_watch(self, reason: str) -> bool:
        """Watch anew where that is needed; was it? In a thread: a dead mount may block."""
        inode, tree = inode_of(self._root), self._tree
        alive = tree is not None and tree.alive and self._tree_inode == inode
        if inode is None or (alive and reason != "rewatch"):
            return False
        if tree is not None and not alive and not self._lost:
            self._inbox.limited("the watch had ended, or the directory is another one now")
        self._watch_anew()
        return self._tree is not None and reason != "start"

    def _unwatch(self) -> None:
        tree, self._tree = self._tree, None
        if tree is not None:
            tree.close()

    def _watch_anew(self) -> None:
        self._unwatch()
        if not self._events or self._closed:
            return
        try:
            self._tree_inode = inode_of(self._root)
            tree = Tree(self._root, self._inbox)
        except OSError as error:
            self._inbox.limited(explain(error))
            return
        tree.watch("")
        self._tree = tree
        if self._closed or not tree.alive:  # no watch to be had: the tree has said why
            self._unwatch()

    def _enter(self, name: str) -> None:
        if self._tree is not None:
            self._tree.watch(name)

    async def _list_some(self, listing: _Listing) -> None:
        try:
            more = await asyncio.to_thread(self._list, listing)
        except OSError as error:
            self._end_listing(listing)
            self._inbox.asked = "rewatch"
            self._tell_lost(f"the watch directory cannot be listed: {error.strerror}")
            return
        if not more:
            self._receive_all()
            self._end_listing(listing)
            self._torn.listed()
            self._told.listed()
            self._unreadable.listed()
            if listing.reason == "rewatch":
                self._lost = ""
            found = (listing.files, listing.missed, listing.free, listing.held)
            self._tell(Rescanned(listing.reason, self._last_listing - listing.began, *found))

    def _end_listing(self, listing: _Listing) -> None:
        now = self._clock()
        pause = max(self._rescan_every, listing.cpu / self._share)
        self._listing, self._last_listing, self._next_listing = None, now, now + pause

    def _list(self, listing: _Listing) -> bool:
        """List some more, in a thread; is there more?"""
        n, began = 0, time.thread_time()
        for n, seen in enumerate(islice(listing.seen, _CHUNK), 1):  # noqa: B007
            listing.files += not seen.link
            known = not seen.link and self._known(File(seen.name, seen.size, seen.mtime_ns))
            if known or (seen.name, seen.inode, seen.size, seen.mtime_ns) in self._torn:
                continue
            new = self._inbox.take_in(seen, Evidence.FOUND)
            rested = self._wall() - seen.mtime_ns / 1e9 > self._rules.settle  # its event may be on the way
            told = (seen.name, seen.inode) in self._unreadable  # it is caught anew at each listing
            listing.missed += new and rested and not told and listing.reason != "start"
        if n < _CHUNK:
            listing.free = shutil.disk_usage(self._root).free
            listing.held = self._catcher.held_bytes()
        listing.cpu += time.thread_time() - began
        return n == _CHUNK

    # --- verdicts ---

    async def _judge_some(self) -> list[Found]:
        due = self._due_hints()
        if not due:
            return []
        sights = await asyncio.to_thread(lambda: [(hint, self._inbox.look(hint)) for hint in due])
        found: list[Found] = []
        dropped: list[Caught] = []
        for hint, sight in sights:
            verdict = self._decide(hint, sight)
            if verdict is Verdict.TAKE and isinstance(sight, Sight):
                found.append(Found(hint.caught, sight.file))
                self._taken.note(hint)
            elif verdict is Verdict.TORN:
                dropped.append(hint.caught)
            if verdict is not Verdict.WAIT:
                del self._held[hint.key]
                self._inbox.judged(hint.key)
        if dropped:
            await asyncio.to_thread(self._inbox.let_go, dropped)
        return await self._last_of_each_name(found)

    async def _last_of_each_name(self, found: list[Found]) -> list[Found]:
        """Drop what was replaced by a later save of its name, whatever the clock says of the two."""
        last = {each.file.name: each for each in found}
        replaced = [each.caught for each in found if last[each.file.name] is not each]
        if replaced:
            await asyncio.to_thread(self._inbox.let_go, replaced)
        return [each for each in found if last[each.file.name] is each]

    def _due_hints(self) -> list[Hint]:
        """What is to be looked at next, in the order in which it was completed.

        A listing has its own order. So what it finds waits until it has ended; and if it is there because
        events were lost, what is hinted at meanwhile waits as well: it is newer.
        """
        now = self._clock()
        if self._listing is not None and self._listing.reason != "start":
            hints = [hint for hint in self._held.values() if hint.candidate.evidence is not Evidence.FOUND]
            hints = hints if self._listing.reason == "interval" else []
        else:
            hints = list(self._held.values())
        due = [hint for hint in hints if hint.candidate.due <= now]
        wall = self._wall()  # read once: a pause between two readings would swap files
        due.sort(key=lambda hint: completed_at(hint.candidate, now=now, wall=wall))
        return due[: max(_CHUNK, len(due) // 8)]  # a share of them: each round puts all that is due in order

    def _decide(self, hint: Hint, sight: Sight | OSError) -> Verdict:
        """Return the verdict; TORN is for everything that is let go, and tells why where nobody knows yet."""
        name = hint.caught.name
        if isinstance(sight, OSError):
            if not isinstance(sight, FileNotFoundError):
                self._unreadable.first(hint.key)
                self._receive(unreadable(name, sight))
            return Verdict.TORN
        file = sight.file
        stands = sight.standing == hint.caught.inode
        version = (name, hint.caught.inode, file.size, file.mtime_ns)
        overtaken = not stands and self._taken.later(
            hint, sight.standing, now=self._clock(), wall=self._wall()
        )
        if overtaken or self._known(file) or version in self._torn:
            return Verdict.TORN
        verdict, candidate = judge(
            hint.candidate,
            sight.look,
            size=file.size,
            mtime_ns=file.mtime_ns,
            now=self._clock(),
            rules=self._rules,
        )
        self._held[hint.key] = hint._replace(candidate=candidate, whole=sight.look.flaw is None)
        if verdict is Verdict.TORN and stands and self._torn.first(version):
            self._tell(Torn(printable(name), sight.look.flaw or ""))
        return verdict
