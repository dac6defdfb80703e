"""Killed at each of its requests to a real S3 server: before it arrives, and before its answer does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ckpt_sidecar.bucket import MIN_PART_BYTES
from ckpt_sidecar.names import HOME
from tests.conftest import ON_ONE, admin
from tests.crash.lives import Life, Save, Store, Trainer
from tests.crash.scenes import scratch, settings_of
from tests.proxy import EVERY, Exchange, Fault, Proxy, Seen
from tests.whole.running import Target

LARGE = 2 * MIN_PART_BYTES + 1000  # three parts
SMALL = 1000
READS = ("Get", "Head", "List")


@dataclass(frozen=True)
class Killed(Fault):
    """Whoever asks is killed: before the store hears of it, or when it is `done`."""

    kill: Callable[[], None]
    done: bool

    async def play(self, exchange: Exchange) -> None:
        """Do it."""
        if self.done:
            (await exchange.forward()).close()
        self.kill()
        exchange.keep = False
        exchange.reset()


class History:
    """One watch dir and one bucket, and the lives on them."""

    def __init__(self, where: Path, target: Target) -> None:
        self.target = target
        self._where = where
        saves = (Save("Ready", "last.pt", SMALL), Save("last.pt committed", "last.pt", LARGE))
        self.trainer = Trainer(where / "watch", saves)
        self.trainer.root.mkdir()

    async def live(self, proxy: Proxy, cut: tuple[int, bool] | None = None) -> tuple[int | None, Life]:
        """Live by way of the proxy, and die at the request of that number, where there is a cut."""
        settings = replace(
            settings_of(self.trainer.root),
            bucket=self.target.bucket,
            prefix=self.target.prefix,
            endpoint_url=proxy.url,
        )
        log = self._where / "log"
        life = Life(settings, Store(), self.trainer, log=log, at=lambda life, step: None)
        if cut is not None:
            proxy.on(EVERY, Killed(life.kill, cut[1]), passing=cut[0])
        code = await life.end()
        if cut is not None:
            self.trainer.go_on()
        return code, life

    def flaws(self) -> list[str]:
        """What is not as it is after an undisturbed run."""
        newest = self.trainer.saved[-1]
        uploads = admin(self.target.endpoint).list_multipart_uploads(Bucket=self.target.bucket)
        home = self.trainer.root / HOME
        facts = {
            "only the newest is listed": self.target.listed() == ["last.pt"],
            "it is what was saved": self.target.read("last.pt") == newest.content,
            "nothing else is in the bucket": self.target.names() == {"last.pt"},
            "no upload is left": "Uploads" not in uploads,
            "no pin is left": list((home / "pins").iterdir()) == [],
            "no temporary file is left": [*home.glob("*.tmp"), *(home / "incoming").iterdir()] == [],
            "the file stands": (self.trainer.root / "last.pt").read_bytes() == newest.content,
        }
        return [f"not so: {fact}" for fact, so in facts.items() if not so]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.fault("E1")
@ON_ONE
async def test_a_kill_at_any_request_comes_to_the_same_end(s3_endpoint: str) -> None:
    """The real client and a real server: the probe, the claim, put, parts, complete, commits."""
    seats = asyncio.Semaphore(os.cpu_count() or 1)

    async def play(cut: tuple[int, bool] | None) -> list[Seen]:
        async with seats:
            return await played(cut)

    async def played(cut: tuple[int, bool] | None) -> list[Seen]:
        with scratch() as where, Proxy(s3_endpoint) as proxy:
            history = History(where, await asyncio.to_thread(Target.new, s3_endpoint))
            code, life = await history.live(proxy, cut)
            assert code in (None, 0), life
            asked = list(proxy.seen)
            if cut is not None:
                assert code is None, f"it was not killed at {cut}"
                code, life = await history.live(proxy)
            assert code == 0, f"{cut}: {life}"
            assert history.flaws() == [], f"killed at request {cut}: {life}"
            return asked

    asked = await play(None)
    writes = [(n, it) for n, it in enumerate(asked) if not it.operation.startswith(READS)]
    cuts = [(number, True) for number, _ in writes]
    cuts += [(number, False) for number, it in writes if HOME not in it.key]  # not each of the probe's, too
    assert len(cuts) >= 30, f"hardly a request: {asked}"
    await asyncio.gather(*(play(cut) for cut in cuts))
    print(f"{len(asked)} requests, {len(cuts)} kills")  # noqa: T201
