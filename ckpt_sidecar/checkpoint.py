"""What a checkpoint is, and what may become of it.

    Pinned     -> Uploading | Stored | Skipped | Superseded | Changed
    Uploading  -> Stored | Pinned | Changed | Superseded
    Stored     -> Committed | Pinned | Superseded
    Committed, Skipped, Superseded and Changed are ends; new bytes are a new checkpoint with a new id.

A file that is not whole is no checkpoint; it is told as `events.Torn`.

The effect comes first, then the move: a state says what is true on the disk or in the bucket, never a wish.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import total_ordering
from itertools import chain

from ckpt_sidecar.bucket import ObjectRef


@total_ordering
@dataclass(frozen=True, slots=True)
class Id:
    """`<generation>-<sequence>`: the total order of checkpoints, independent of clocks."""

    generation: int
    sequence: int

    def __lt__(self, other: Id) -> bool:
        return (self.generation, self.sequence) < (other.generation, other.sequence)

    def __str__(self) -> str:
        return f"{self.generation}-{self.sequence}"

    @classmethod
    def parse(cls, text: str) -> Id:
        """Read what `str` wrote; ValueError when it is not that."""
        match = re.fullmatch(r"(\d{1,18})-(\d{1,18})", text, re.ASCII)
        if match is None:
            raise ValueError(f"not an id of the form generation-sequence: {text!r}")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class File:
    """One file of a checkpoint: its name relative to the watch dir, and its inode's size and mtime."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Caught:
    """A file held from the first hint on: by a hard link at `path`, or where none can be, by `descriptor`.

    `name` is relative to the watch dir; `inode` is (device, inode number).
    """

    name: str
    inode: tuple[int, int]
    path: str | None
    descriptor: int | None = None


# --- states ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pinned:
    """Its bytes are held on the disk, whatever the trainer does to the name."""


@dataclass(frozen=True, slots=True)
class Uploading:
    """A multipart upload for each file is under way; in the journal None stands for an id yet to be told."""

    upload_ids: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """Every file is a whole object whose checksum agrees with the pinned bytes."""

    objects: tuple[ObjectRef, ...]


@dataclass(frozen=True, slots=True)
class Committed:
    """It stands in `latest.json`: durable."""

    objects: tuple[ObjectRef, ...]


@dataclass(frozen=True, slots=True)
class Changed:
    """Its bytes changed under us; it is taken up again when it is completed again."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Not sent, by policy; `reason` says by which."""

    reason: str


@dataclass(frozen=True, slots=True)
class Superseded:
    """A newer save of the same name was committed, or is next in line."""

    by: Id


State = Pinned | Uploading | Stored | Committed | Changed | Skipped | Superseded

NEXT: Mapping[type[State], frozenset[type[State]]] = {
    Pinned: frozenset({Uploading, Stored, Skipped, Superseded, Changed}),
    Uploading: frozenset({Stored, Pinned, Changed, Superseded}),
    Stored: frozenset({Committed, Pinned, Superseded}),
    Committed: frozenset(),
    Skipped: frozenset(),
    Superseded: frozenset(),
    Changed: frozenset(),
}


def state_name(state: State) -> str:
    """Return the state's word as logs, metrics and the journal write it."""
    return type(state).__name__.lower()


class IllegalMove(Exception):
    """A checkpoint was to go from one state to another that the life cycle does not allow."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One completed thing that the trainer saved. `saved_at` is its mtime in ns since the epoch."""

    id: Id
    name: str
    files: tuple[File, ...]
    saved_at: int
    state: State = field(default_factory=Pinned)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)

    @property
    def waiting(self) -> bool:
        """Is it on its way, not yet durable?"""
        return isinstance(self.state, Pinned | Uploading | Stored)

    def __repr__(self) -> str:
        return f"<{self.id} {self.name} {self.size} B {state_name(self.state)}>"


def advance(checkpoint: Checkpoint, to: State) -> Checkpoint:
    """Return the checkpoint in its next state; IllegalMove when the life cycle has no such arrow."""
    if type(to) not in NEXT[type(checkpoint.state)]:
        raise IllegalMove(f"{checkpoint!r} cannot become {state_name(to)}")
    return replace(checkpoint, state=to)


# --- the book of what is on its way ------------------------------------------------------------------


@dataclass(slots=True)
class Book:
    """The checkpoints that are not yet durable, by id. One owner: the sidecar's event loop.

    It is kept in order, so that what is next is found at once, however many wait.
    """

    checkpoints: dict[Id, Checkpoint] = field(default_factory=dict)
    _order: list[Id] = field(default_factory=list)
    _named: dict[str, list[Id]] = field(default_factory=dict)
    _stored: list[Id] = field(default_factory=list)

    def put(self, checkpoint: Checkpoint) -> None:
        """Enter the checkpoint as it now is; one that is no longer on its way leaves."""
        id_, named = checkpoint.id, self._named.setdefault(checkpoint.name, [])
        _keep(self._order, id_, checkpoint.waiting)
        _keep(named, id_, checkpoint.waiting)
        _keep(self._stored, id_, isinstance(checkpoint.state, Stored))
        if not named:
            del self._named[checkpoint.name]
        if checkpoint.waiting:
            self.checkpoints[id_] = checkpoint
        else:
            self.checkpoints.pop(id_, None)

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter([self.checkpoints[id_] for id_ in self._order])

    def named(self, name: str) -> list[Checkpoint]:
        """All saves of one name, the oldest first."""
        return [self.checkpoints[id_] for id_ in self._named.get(name, ())]

    def in_turn(self) -> Iterator[Checkpoint]:
        """What is stored, then all, each newest first; not to be changed meanwhile."""
        return (self.checkpoints[id_] for id_ in chain(reversed(self._stored), reversed(self._order)))

    def __len__(self) -> int:
        return len(self.checkpoints)

    @property
    def bytes(self) -> int:
        """Bytes not yet durable."""
        return sum(each.size for each in self.checkpoints.values())

    def lag(self, now: float) -> float:
        """Seconds since the oldest checkpoint that is not yet durable was completed; 0 when all are."""
        oldest = min((each.saved_at for each in self.checkpoints.values()), default=None)
        return 0.0 if oldest is None else max(0.0, now - oldest / 1e9)

    def count(self, state: type[State]) -> int:
        """How many are in that state."""
        return sum(isinstance(each.state, state) for each in self.checkpoints.values())

    def __repr__(self) -> str:
        counts = [(state_name(kind()), self.count(kind)) for kind in (Pinned,)]
        counts += [(kind.__name__.lower(), self.count(kind)) for kind in (Uploading, Stored)]
        told = ", ".join(f"{n} {word}" for word, n in counts if n) or "none on its way"
        return f"<{len(self)} checkpoints: {told}; {self.bytes} B>"


def _keep(ids: list[Id], id_: Id, there: bool) -> None:  # noqa: FBT001 (two words would not say it better)
    """Have the id in the sorted list, or not."""
    at = bisect_left(ids, id_)
    found = ids[at : at + 1] == [id_]
    if there and not found:
        ids.insert(at, id_)
    elif found and not there:
        del ids[at]
