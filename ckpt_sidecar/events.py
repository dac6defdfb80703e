"""What engines tell: each event a fact, read by the log, the metrics and the status page.

The class in snake case is the log's event name. All times are seconds, all sizes bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckpt_sidecar.bucket import Abilities
from ckpt_sidecar.checkpoint import Checkpoint, Id, state_name


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

    `stage`: start, watch, pin, upload, commit, restore, retention, notices.
    `reason` as in BucketError.reason, or "disk". `what` names the thing.
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
class RecoveryPoint:
    """The newest durable checkpoint, where it is another one than before: what losing the node goes back to.

    Times in seconds since the epoch.
    """

    id: Id
    name: str
    size: int
    saved_at: float
    stored_at: float


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
    held_bytes: int  # that only our holds keep on the disk


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
class Interruption:
    """The cloud has told that it will take the node away ("spot"), or is likely to ("rebalance").

    `action`: terminate, stop or hibernate; `due`: when, as the cloud writes it; "" where it does not say.
    `seen`: when we were told, in seconds since the epoch.
    """

    kind: str
    action: str
    due: str
    seen: float

    @property
    def note(self) -> dict[str, str]:
        """What the trainer and the status page are told."""
        return {"kind": self.kind, "action": self.action, "due": self.due}


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
    | RecoveryPoint
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
    | Interruption
    | Draining
    | Drained
)


def event_name(event: Event) -> str:
    """Return the event's stable name in the log: its class in snake case; a move is named by its state."""
    if isinstance(event, Moved):
        return f"checkpoint_{state_name(event.checkpoint.state)}"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
