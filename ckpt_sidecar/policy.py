"""What next: the order of uploads, what is not sent, what may go, and how long to wait. Plain functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckpt_sidecar.checkpoint import Book, Checkpoint, Id, Pinned, Stored


@dataclass(frozen=True, slots=True)
class Upload:
    """Make this checkpoint durable now."""

    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class Supersede:
    """Do not send this one: `by` is a newer save of the same name. An upload that had begun is aborted."""

    checkpoint: Checkpoint
    by: Id


@dataclass(frozen=True, slots=True)
class Skip:
    """Do not send this one, by policy."""

    checkpoint: Checkpoint
    because: str


Step = Upload | Supersede | Skip


class Resting(Protocol):
    """Until when (seconds, monotonic) those that failed are left alone, by id."""

    def get(self, id_: Id, default: float, /) -> float:
        """Return it, or the default for one that does not rest."""


def next_step(
    book: Book,
    *,
    busy: Collection[str],
    resting: Resting,
    now: float,
    keep_remote: int = 0,
    durable: Sequence[Id] = (),
    asked: Collection[Id] = (),
) -> Step | None:
    """Say what a free worker should do next, or None when there is nothing to do now.

    What is stored goes first (one swap, and it is durable), then the newest; older ones backfill. One upload
    at a time for each name: names in `busy` are being worked on, and a name whose older upload could not be
    ended waits for that. One that failed is left alone while it is `resting`. With `keep_remote` a checkpoint
    that retention would delete as soon as it is committed is not sent at all: `durable` are the ids that the
    manifest lists. But for those that the bucket was `asked` to take, and may have taken: only what has been
    committed is ever deleted.
    """
    for each in book.in_turn():
        if each.name in busy:
            continue
        *older, newest = book.named(each.name)
        ended_first = older[::-1] if each is newest else [each]
        for other in ended_first:
            if not _rests(other, resting, now):
                return Supersede(other, newest.id)
        if ended_first or _rests(each, resting, now):
            continue
        unsent = isinstance(each.state, Pinned) and each.id not in asked
        if keep_remote and unsent and _beyond(each.id, keep_remote, durable):
            return Skip(each, f"{keep_remote} newer ones are durable, and no more are kept")
        return Upload(each)
    return None


def _rests(each: Checkpoint, resting: Resting, now: float) -> bool:
    return resting.get(each.id, now) > now


def _beyond(id_: Id, keep: int, durable: Sequence[Id]) -> bool:
    return sum(other > id_ for other in durable) >= keep


def drain_order(waiting: Iterable[Checkpoint]) -> list[Checkpoint]:
    """What is on its way, in the order in which a drain sends it: what is stored first, then newest first.

    A stored one costs one swap and is then safe.
    """
    return sorted(waiting, key=lambda each: (isinstance(each.state, Stored), each.id), reverse=True)


def expired_local(names_by_id: Mapping[Id, str], *, keep: int, newest: Id | None) -> list[Id]:
    """Return the ids of durable local files beyond the newest `keep`, oldest first; never `newest`.

    `keep` 0 keeps all.
    """
    if keep == 0:
        return []
    ordered = sorted(names_by_id, reverse=True)
    return [each for each in reversed(ordered[keep:]) if each != newest]


def retry_delay(
    tries: int, *, chance: float, asked: float = 0.0, base: float = 0.2, cap: float = 30.0
) -> float:
    """Return how many seconds to wait before the next try: exponential with full jitter.

    `tries` counts those that failed (from 1), `chance` is uniform in [0, 1), `asked` is the store's
    Retry-After, the least that is waited (at most ten times the cap).
    """
    ceiling = min(cap, base * 2.0 ** min(tries, 30))
    return max(min(asked, 10 * cap), ceiling * chance)
