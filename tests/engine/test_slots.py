"""So many parts at a time, the newest checkpoint's first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.slots import Slots


class Yard:
    """Some who want a slot, in the order in which they got one."""

    def __init__(self, free: int) -> None:
        self.slots = Slots(free)
        self.order: list[int] = []
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.leave = asyncio.Event()

    async def want(self, *sequences: int) -> None:
        """Have these want a slot."""
        for n in sequences:
            self.tasks[n] = asyncio.create_task(self._hold(n))
            await asyncio.sleep(0)

    async def _hold(self, n: int) -> None:
        with self.slots.using(Id(1, n)):
            async with self.slots.taken(Id(1, n)):
                self.order.append(n)
                await self.leave.wait()

    async def end(self) -> None:
        """Let all of them leave, one after the other."""
        self.leave.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


@asynccontextmanager
async def yard(free: int) -> AsyncIterator[Yard]:
    """Slots, and nobody left at the end: all of them are free again."""
    made = Yard(free)
    yield made
    await made.end()
    async with asyncio.timeout(5):
        for _ in range(free):
            await made.slots.taken(Id(9, 9)).__aenter__()


async def test_a_free_slot_goes_to_the_newest() -> None:
    """Of those that wait the newest checkpoint's part goes first, whoever came first."""
    async with yard(1) as slots:
        await slots.want(1, 2, 5, 3, 4)
    assert slots.order == [1, 5, 4, 3, 2]


async def test_so_many_have_a_slot_and_no_more() -> None:
    """The number of parts in flight is bounded."""
    async with yard(2) as slots:
        await slots.want(1, 2, 3, 4)
        assert slots.order == [1, 2]


async def test_a_slot_survives_whoever_gives_up() -> None:
    """To be cancelled while waiting, or just as the slot was handed over, costs no slot."""
    async with yard(1) as slots:
        await slots.want(1, 2, 3)
        slots.tasks[3].cancel()
        await asyncio.sleep(0)
        slots.tasks[1].cancel()
        await asyncio.sleep(0)
        slots.tasks[2].cancel()  # the slot is on its way to it
        await asyncio.wait([slots.tasks[2]])
        await slots.want(4)
        assert slots.order[-1] == 4


async def test_a_slot_survives_whoever_fails() -> None:
    """An error inside gives the slot back."""
    slots = Slots(1)
    for _ in range(3):
        with pytest.raises(ValueError, match="inside"):
            async with slots.taken(Id(1, 1)):
                raise ValueError("inside")


async def test_one_at_a_time_an_older_one_waits_although_slots_are_free() -> None:
    """Two are free and only the newest has one; the next follows when that one uses them no more."""
    async with yard(3) as slots:
        slots.slots.one_at_a_time()
        await slots.want(2, 1, 5, 3)
        assert slots.order == [2, 5]  # the first was alone when it came
        slots.tasks[5].cancel()
        await asyncio.wait([slots.tasks[5]])
        assert slots.order == [2, 5, 3]
    assert slots.order == [2, 5, 3, 1]


async def test_one_at_a_time_a_user_between_two_parts_keeps_its_place() -> None:
    """An older one does not slip in while the newest has no part under way."""
    async with yard(2) as slots:
        slots.slots.one_at_a_time()
        with slots.slots.using(Id(1, 9)):
            await slots.want(1)
            assert slots.order == []
        await asyncio.sleep(0)
        assert slots.order == [1]
