"""Who is left alone for a while, because it failed: so that others go first, and nothing is hammered."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable

from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.policy import retry_delay

BASE = 1.0  # seconds, the ceiling of the first rest is twice that


class Rests:
    """Until when each checkpoint rests, in seconds of the clock `seconds`; `chance` is uniform in [0, 1).

    Those that rest because nobody answers have their rests in common: the newest has the one that is over
    first. So it is the first to find out that the store is back.
    """

    def __init__(self, seconds: Callable[[], float], chance: Callable[[], float]) -> None:
        self.longest = float("inf")  # seconds
        self._seconds = seconds
        self._chance = chance
        self._tries: dict[Id, int] = {}
        self._own: dict[Id, float] = {}
        self._unanswered: list[Id] = []  # the oldest first
        self._in_common: list[float] = []  # as many, the soonest first

    def get(self, id_: Id, default: float) -> float:
        """Until when it rests."""
        at = self._place(id_)
        return self._own.get(id_, default) if at is None else self._in_common[-1 - at]

    def after(self, id_: Id, *, unanswered: bool, least: float = 0.0) -> float:
        """Have it rest once more, after one more failure; return for how long it would, if alone."""
        self.end(id_)
        tries = self._tries[id_] = self._tries.get(id_, 0) + 1
        delay = max(least, retry_delay(tries, chance=self._chance(), base=BASE))
        until = self._seconds() + min(delay, self.longest)
        if unanswered:
            insort(self._unanswered, id_)
            insort(self._in_common, until)
        else:
            self._own[id_] = until
        return delay

    def soonest(self) -> float | None:
        """In how many seconds the next rest is over; None when nobody rests."""
        now = self._seconds()
        later = self._in_common[bisect_right(self._in_common, now) :][:1]
        later += [until for until in self._own.values() if until > now]
        return min(later) - now if later else None

    def end(self, id_: Id) -> None:
        """It rests no more; what it has tried still counts."""
        at = self._place(id_)
        if at is not None:
            del self._in_common[-1 - at]
            del self._unanswered[at]
        self._own.pop(id_, None)

    def forget(self, id_: Id) -> None:
        """It has succeeded, or is gone."""
        self.end(id_)
        self._tries.pop(id_, None)

    def end_all(self) -> None:
        """Nobody rests, and what was tried is forgotten."""
        for each in (self._tries, self._own, self._unanswered, self._in_common):
            each.clear()

    def _place(self, id_: Id) -> int | None:
        at = bisect_left(self._unanswered, id_)
        return at if self._unanswered[at : at + 1] == [id_] else None
