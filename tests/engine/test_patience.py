"""Work that is done together, and how it ends."""

import asyncio

import pytest

from ckpt_sidecar.bucket import Denied
from ckpt_sidecar.patience import together


async def test_a_failure_comes_out_as_itself() -> None:
    """The others are cancelled, and nobody has to look into a group."""
    ended = asyncio.Event()

    async def fail() -> None:
        raise Denied("not allowed")

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(Denied, match="not allowed"):
        await together(wait(), fail())
    assert ended.is_set()


@pytest.mark.fault("E3")
async def test_a_cancel_comes_out_whatever_fails_at_that_moment() -> None:
    """A drain that is over ends its workers, although one of them fails just then."""
    begun = asyncio.Event()

    async def fail() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            raise Denied("not allowed")

    task = asyncio.ensure_future(together(fail(), asyncio.sleep(0)))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
