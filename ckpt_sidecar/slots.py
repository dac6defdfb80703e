"""So many parts at a time; of those that wait, the newest checkpoint's go first."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count

from ckpt_sidecar.checkpoint import Id


class Slots:
    """`free` slots. Once it is one at a time, an older checkpoint gets none while a newer uses them."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._alone = False
        self._users: list[Id] = []
        self._order = count()
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []

    def one_at_a_time(self) -> None:
        """Give slots to the newest user only, from the next one on; what is held stays held."""
        self._alone = True

    @contextmanager
    def using(self, id_: Id) -> Iterator[None]:
        """Be a user of slots, whether or not one is held or waited for just now."""
        self._users.append(id_)
        try:
            yield
        finally:
            self._users.remove(id_)
            self._hand_out()

    @asynccontextmanager
    async def taken(self, id_: Id) -> AsyncIterator[None]:
        """Hold one slot."""
        if self._free and self._may(id_):
            self._free -= 1
        else:
            await self._wait(id_)
        try:
            yield
        finally:
            self._free += 1
            self._hand_out()

    def _may(self, id_: Id) -> bool:
        return not self._alone or all(user <= id_ for user in self._users)

    async def _wait(self, id_: Id) -> None:
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-id_.generation, -id_.sequence, next(self._order), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the slot was handed to us as we left
                self._free += 1
                self._hand_out()
            raise

    def _hand_out(self) -> None:
        """Give what is free to those that wait, the newest first, as far as they may have it."""
        while self._waiting and self._free:
            generation, sequence, _, turn = self._waiting[0]
            if not turn.done():
                if not self._may(Id(-generation, -sequence)):
                    return
                self._free -= 1
                turn.set_result(None)
            heapq.heappop(self._waiting)
