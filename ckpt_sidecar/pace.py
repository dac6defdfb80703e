"""How fast bodies may leave: `--max-bandwidth`, for all threads together."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ckpt_sidecar.bucket import KIB, MIB
from ckpt_sidecar.events import Draining, Event, Interruption

PIECE_BYTES = MIB  # one read or write of the socket: timeouts count, and a stop is seen, between two
_SLICE = 0.125  # seconds' worth of a slow pace, at most, in one piece: stores hang up on a long silence


class Pace:
    """So many bytes a second, none saved up for later; 0 is no limit. `clock` is monotonic, in seconds.

    A reader of events: there is no limit any more once the node is about to go, or a drain has begun.
    """

    def __init__(self, bytes_per_second: float, *, clock: Callable[[], float]) -> None:
        self._rate = bytes_per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = clock()

    def tell(self, event: Event) -> None:
        """Go as fast as can be, once there is no time left."""
        if isinstance(event, Draining | Interruption):
            self._rate = 0.0

    @property
    def piece_bytes(self) -> int:
        """How many bytes to send at a time."""
        return int(min(PIECE_BYTES, max(4 * KIB, self._rate * _SLICE))) if self._rate else PIECE_BYTES

    def wait_for(self, count: int) -> float:
        """Take the right to send so many bytes, and return how long to wait before (seconds)."""
        rate = self._rate
        if not rate:
            return 0.0
        with self._lock:
            now = self._clock()
            start = max(now, self._free_at)
            self._free_at = start + count / rate
        return start - now
