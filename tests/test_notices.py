"""EC2's notices, asked of a stand-in for its metadata service: the real client, real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest

from ckpt_sidecar.events import Failed, Interruption
from ckpt_sidecar.notices import IPV4, IPV6, endpoint_of, watch_notices
from tests.engine.support import Told
from tests.metadata import REBALANCE, SPOT, MetadataService, metadata_service

pytestmark = pytest.mark.fault("E14")
TERMINATE = b'{"action": "terminate", "time": "2026-11-24T08:22:00Z"}'


@pytest.fixture
def service() -> Iterator[MetadataService]:
    """A metadata service that has nothing to tell yet."""
    with metadata_service() as made:
        yield made


class Watch:
    """What was noticed, while somebody asks without a pause."""

    def __init__(self) -> None:
        self.noticed: list[Interruption | None] = []
        self.told = Told()
        self.rounds = 0
        self._more = asyncio.Event()

    async def sleep(self, _seconds: float) -> None:
        """Pass on at once; a round has ended."""
        self.rounds += 1
        self._more.set()
        await asyncio.sleep(0)

    async def notice(self, found: Interruption | None) -> None:
        """Keep it."""
        self.noticed.append(found)

    async def asked(self, times: int = 3) -> None:
        """Wait until it was asked that often more."""
        enough = self.rounds + times
        async with asyncio.timeout(30):
            while self.rounds < enough:
                self._more.clear()
                await self._more.wait()


@asynccontextmanager
async def watching(endpoint: str) -> AsyncIterator[Watch]:
    """Ask there until the end of the block."""
    watch = Watch()
    task = asyncio.create_task(
        watch_notices(endpoint, sleep=watch.sleep, wall=lambda: 5.0, noticed=watch.notice, tell=watch.told)
    )
    try:
        yield watch
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_without_a_notice_it_is_told_once_that_there_is_none(service: MetadataService) -> None:
    """So that a note of an earlier life can be taken away; and one token serves all questions."""
    async with watching(service.url) as watch:
        await watch.asked(5)
    assert watch.noticed == [None]
    assert watch.told == []
    assert service.given == 1
    assert service.answers >= 10


async def test_each_notice_is_handed_over_once_and_the_gravest_counts(service: MetadataService) -> None:
    """First it is likely, then it is sure; what is asked again and again is told once."""
    async with watching(service.url) as watch:
        await watch.asked()
        service.notices[REBALANCE] = b'{"noticeTime": "2026-11-24T08:00:00Z"}'
        await watch.asked()
        service.notices[SPOT] = TERMINATE
        await watch.asked()
    assert watch.noticed == [
        None,
        Interruption("rebalance", "", "2026-11-24T08:00:00Z", 5.0),
        Interruption("spot", "terminate", "2026-11-24T08:22:00Z", 5.0),
    ]


async def test_a_token_that_has_run_out_is_renewed(service: MetadataService) -> None:
    """No notice is missed for it, and nothing is said."""
    async with watching(service.url) as watch:
        await watch.asked()
        service.forget_tokens()
        service.notices[SPOT] = TERMINATE
        await watch.asked()
    assert [each and each.kind for each in watch.noticed] == [None, "spot"]
    assert watch.told == []
    assert service.given == 2


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'"x"', b'{"action": 7}', b"\xff" * 99_999])
async def test_an_answer_that_cannot_be_read_is_a_notice_all_the_same(
    service: MetadataService, body: bytes
) -> None:
    """That there is an answer is the notice; what it says is only shown."""
    service.notices[SPOT] = body
    async with watching(service.url) as watch:
        await watch.asked()
    assert watch.noticed == [Interruption("spot", "", "", 5.0)]


async def test_a_service_that_fails_is_told_of_once_and_asked_again(service: MetadataService) -> None:
    """Trouble says nothing about the instance: no notice, and no end of one."""
    service.sound = False
    async with watching(service.url) as watch:
        await watch.asked()
        assert watch.noticed == []
        (failed,) = watch.told.of(Failed)
        assert (failed.stage, failed.reason, failed.what) == ("notices", "unreachable", service.url)
        assert "hop limit" in failed.hint
        service.sound = True
        service.notices[SPOT] = TERMINATE
        await watch.asked()
        assert [each and each.kind for each in watch.noticed] == ["spot"]
        service.sound = False
        await watch.asked()
        assert len(watch.told.of(Failed)) == 2
    assert len(watch.noticed) == 1


async def test_where_nobody_listens_it_goes_on_asking() -> None:
    """Outside EC2 a wrong flag costs a line in the log."""
    async with watching("http://127.0.0.1:9") as watch:
        await watch.asked()
    assert watch.noticed == []
    assert len(watch.told.of(Failed)) == 1


def test_the_service_is_found_as_the_aws_tools_find_it() -> None:
    """By the same variables."""
    assert endpoint_of({}) == IPV4
    assert endpoint_of({"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IPv6"}) == IPV6
    mine = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1338/"}
    assert endpoint_of(mine) == "http://127.0.0.1:1338"
