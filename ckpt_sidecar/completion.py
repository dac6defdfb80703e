"""When is a file finished: what is known of its writer, what its bytes say, and how long it has rested.

Nothing here looks at a file or a clock. The watcher brings what it saw, and does what is decided.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import NamedTuple

from ckpt_sidecar.formats import Look, Rules


class Evidence(enum.IntEnum):
    """What is known about the writer, the weakest first."""

    FOUND = 1  # listed; nobody told us of it
    CREATED = 2  # a writer has opened it, and was not seen to close it
    CLOSED = 3  # a writer has closed it
    PLACED = 4  # renamed or linked into place: it had another name while it was written


class Seen(NamedTuple):
    """A name in the tree, and what a listing showed of it. `link`: it is a symlink."""

    name: str
    size: int
    mtime_ns: int
    inode: tuple[int, int]
    link: bool


class Verdict(enum.Enum):
    """What to do with a candidate: take it up, look again when it is due, or give it up."""

    TAKE = enum.auto()
    WAIT = enum.auto()
    TORN = enum.auto()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may become a checkpoint. `since`: unchanged since then; `due`: look then (monotonic s)."""

    evidence: Evidence
    size: int
    mtime_ns: int
    since: float
    due: float


def noticed(
    evidence: Evidence, size: int, mtime_ns: int, *, now: float, wall: float, rules: Rules
) -> Candidate:
    """Return the candidate for a file just hinted at or listed; `wall` is the wall clock in seconds.

    A listed file has rested since its mtime, unless that lies in the future. One just created is not looked
    at at once: it is empty yet.
    """
    rested = max(0.0, wall - mtime_ns / 1e9) if evidence is Evidence.FOUND else 0.0
    due = now + rules.settle if evidence is Evidence.CREATED else now
    return Candidate(evidence, size, mtime_ns, now - rested, due)


def completed_at(candidate: Candidate, *, now: float, wall: float) -> tuple[float, int]:
    """Return by what candidates are ordered in time: what is only listed goes by its mtime, not after now."""
    listed = candidate.mtime_ns / 1e9 + now - wall
    found = candidate.evidence is Evidence.FOUND
    return min(listed, now) if found else candidate.since, candidate.mtime_ns


def merge(old: Candidate | None, new: Candidate) -> Candidate:
    """Join what was known about a file with what is noticed now; the stronger evidence wins."""
    if old is None:
        return new
    if new.evidence is Evidence.FOUND:  # it is known better already; have it looked at
        return replace(old, due=min(old.due, new.due))
    if (old.size, old.mtime_ns) != (new.size, new.mtime_ns):
        return new
    since, due = min(old.since, new.since), min(old.due, new.due)  # a late event is no new change
    return replace(new, evidence=max(old.evidence, new.evidence), since=since, due=due)


def rest_needed(evidence: Evidence, look: Look, rules: Rules) -> float:
    """Return how long (in seconds) a file must have been unchanged for a verdict on it.

                whole, sealed   whole   not whole
    PLACED            0           0      patience
    CLOSED            0         settle   patience
    CREATED         settle     patience  patience
    FOUND           settle      settle   patience

    A sealed file whose writer has closed it need not rest: its end was written last. Should a second writer
    be at work on the same inode, its bytes change under the upload, which is then abandoned.
    """
    if look.flaw is not None:
        return rules.patience
    if evidence is Evidence.PLACED or (evidence is Evidence.CLOSED and look.sealed):
        return 0.0
    if evidence is Evidence.CREATED and not look.sealed:
        return rules.patience
    return rules.settle


def judge(
    candidate: Candidate, look: Look, *, size: int, mtime_ns: int, now: float, rules: Rules
) -> tuple[Verdict, Candidate]:
    """Decide about a candidate by a look at its bytes, when it had that size and mtime."""
    if (size, mtime_ns) != (candidate.size, candidate.mtime_ns):
        # somebody writes: only a new event or rest can say that it is done
        evidence = min(candidate.evidence, Evidence.CREATED)
        changed = Candidate(evidence, size, mtime_ns, since=now, due=now + rules.settle)
        return Verdict.WAIT, changed
    due = candidate.since + rest_needed(candidate.evidence, look, rules)
    if now < due:
        return Verdict.WAIT, replace(candidate, due=due)
    return (Verdict.TAKE if look.flaw is None else Verdict.TORN), candidate
