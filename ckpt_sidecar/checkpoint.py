"""What a checkpoint is, and what may become of it.

    Pinned     -> Uploading | Stored | Skipped | Superseded | Changed
    Uploading  -> Stored | Pinned | Changed | Superseded
    Stored     -> Committed | Pinned | Superseded
    Committed, Skipped, Superseded and Changed are ends; new bytes are a new checkpoint with a new id.

A file that is not whole is no checkpoint; it is told as `Torn`.

The effect comes first, then the move: a state says what is true on the disk or in the bucket, never a wish.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import total_ordering

from ckpt_sidecar.bucket import Abilities, ObjectRef


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
    """A multipart upload for each file is under way; `upload_ids` has None for a file sent in one put."""

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


# --- names -------------------------------------------------------------------------------------------

HOME = ".ckpt-sidecar"  # the spool's directory in the watch dir, and our own keys in the bucket
MANIFEST_NAME = "latest.json"
MAX_NAME_BYTES = 900  # of the name in UTF-8; S3's 1,024 for a key, less 124 for the prefix
MAX_PART_OF_NAME_BYTES = 255  # a file system's limit for what stands between two slashes

_STEP = re.compile(r"(?:global_step|step|iteration|iter)[-_=]?0*(\d{1,15})", re.IGNORECASE)
_COUNT = re.compile(r"(?:checkpoint|ckpt|epoch)[-_=]?0*(\d{1,15})", re.IGNORECASE)


def step_of(name: str) -> int | None:
    """Return the training step that a name tells (`step_100.pt`, `epoch=3-step=1200.ckpt`), else None."""
    matches = list(_STEP.finditer(name)) or list(_COUNT.finditer(name))
    return int(matches[-1][1]) if matches else None


def flaw_of_name(name: str) -> str | None:
    """Say why `name` cannot be a checkpoint's name in the bucket and on the disk, or None if it can.

    A name is relative, normalised, `/`-separated, printable as UTF-8, and shadows none of our own keys.
    """
    flaw = None
    parts = name.split("/")
    try:
        raw = name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if not name or name.startswith("/"):
        flaw = "is empty or absolute"
    elif any(part in ("", ".", "..") for part in parts):
        flaw = "is not normalised"
    elif len(raw) > MAX_NAME_BYTES or any(len(p.encode()) > MAX_PART_OF_NAME_BYTES for p in parts):
        flaw = "is too long"
    elif any(unicodedata.category(char) == "Cc" for char in name):
        flaw = "has a control character"
    elif parts[0] == HOME or name == MANIFEST_NAME:
        flaw = "is one of ckpt-sidecar's own names"
    return flaw


# --- the book of what is on its way ------------------------------------------------------------------


@dataclass(slots=True)
class Book:
    """The checkpoints that are not yet durable, by id. One owner: the sidecar's event loop."""

    checkpoints: dict[Id, Checkpoint] = field(default_factory=dict)

    def put(self, checkpoint: Checkpoint) -> None:
        """Enter the checkpoint as it now is; one that is no longer on its way leaves."""
        if checkpoint.waiting:
            self.checkpoints[checkpoint.id] = checkpoint
        else:
            self.checkpoints.pop(checkpoint.id, None)

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(sorted(self.checkpoints.values(), key=lambda each: each.id))

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


# --- events: what engines tell -----------------------------------------------------------------------
# The name in snake case is the log's event name. All times are seconds, all sizes bytes.


@dataclass(frozen=True, slots=True)
class Moved:
    """A checkpoint is in a new state. `at` is the wall clock in seconds since the epoch."""

    checkpoint: Checkpoint
    at: float
    seconds: float = 0.0  # how long the step took, where that means something (uploading -> stored)


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of a checkpoint have gone up (`direction` "up") or come down ("down")."""

    name: str
    direction: str
    bytes: int  # by this step
    done: int  # so far
    total: int


@dataclass(frozen=True, slots=True)
class Requested:
    """The store answered a request, or did not. `outcome`: ok, retried or failed."""

    operation: str
    outcome: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Retrying:
    """A request is said again after `after` seconds. `reason` as in `bucket.BucketError.reason`."""

    operation: str
    reason: str
    after: float
    error: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Something did not work and was not mended by a retry.

    `stage`: start, watch, pin, upload, commit, restore, retention. `reason` as in BucketError.reason, or
    "disk". `what` names the thing.
    """

    stage: str
    reason: str
    what: str
    error: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Torn:
    """A file that was left without being whole: never uploaded; a later whole version is."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """A thing in the watch dir that is not taken up, and why (a symlink, a name that S3 cannot have)."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Probed:
    """What the store was seen to honour."""

    abilities: Abilities


@dataclass(frozen=True, slots=True)
class Claimed:
    """The prefix is ours."""

    generation: int
    previous_holder: str | None


@dataclass(frozen=True, slots=True)
class Fenced:
    """Another sidecar has claimed the prefix: this one writes to the bucket no more."""

    generation: int  # the other's
    holder: str


@dataclass(frozen=True, slots=True)
class Adopted:
    """An object that was completed but not committed was found and entered in the manifest."""

    id: Id
    name: str


@dataclass(frozen=True, slots=True)
class Replacing:
    """At a checkpoint's key stands an object that is not ours: it is replaced."""

    name: str
    key: str


@dataclass(frozen=True, slots=True)
class UploadAborted:
    """A multipart upload that nobody will resume was thrown away."""

    name: str
    upload_id: str


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """`latest.json` could not be read and was made anew from the objects."""

    found: int
    error: str


@dataclass(frozen=True, slots=True)
class Restored:
    """The restore ended. `outcome`: restored, kept, empty, failed."""

    outcome: str
    id: Id | None
    name: str | None
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class FellBack:
    """A checkpoint that the manifest names could not be restored; the next one is tried."""

    id: Id
    name: str
    error: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A trainer that starts now finds the newest good checkpoint."""

    seconds: float


@dataclass(frozen=True, slots=True)
class NotReady:
    """Why a trainer must not start (any more)."""

    reason: str


@dataclass(frozen=True, slots=True)
class Rescanned:
    """The watch dir was listed. `reason`: start, interval, overflow, rewatch. `missed`: found by no event."""

    reason: str
    seconds: float
    files: int
    missed: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class WatchLost:
    """Events do not come (any more); the rescan serves alone, or the watch was made anew."""

    reason: str


@dataclass(frozen=True, slots=True)
class PinnedByDescriptor:
    """A hard link was not possible: the file is held by an open descriptor, which a crash would lose."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Deleted:
    """Retention deleted a durable checkpoint; `where`: bucket or watch dir."""

    name: str
    where: str


@dataclass(frozen=True, slots=True)
class Draining:
    """A stop was asked for; what can be made durable within `deadline` seconds will be."""

    deadline: float
    left: int


@dataclass(frozen=True, slots=True)
class Drained:
    """The drain ended; `left` names what is not durable."""

    left: tuple[str, ...]


Event = (
    Moved
    | Progress
    | Requested
    | Retrying
    | Failed
    | Torn
    | Ignored
    | Probed
    | Claimed
    | Fenced
    | Adopted
    | Replacing
    | UploadAborted
    | Rebuilt
    | Restored
    | FellBack
    | Ready
    | NotReady
    | Rescanned
    | WatchLost
    | PinnedByDescriptor
    | Deleted
    | Draining
    | Drained
)


def event_name(event: Event) -> str:
    """Return the event's stable name in the log: its class in snake case; a move is named by its state."""
    if isinstance(event, Moved):
        return f"checkpoint_{state_name(event.checkpoint.state)}"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
