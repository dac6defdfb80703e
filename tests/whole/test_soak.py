"""Minutes of saves under random faults and restarts: nothing grows, and nothing is lost.

    make soak SOAK_MINUTES=60     (`make prove` plays one minute)

What is printed begins with the seed of its dice: SOAK_SEED=… throws them again, as far as time allows.
"""

from __future__ import annotations

import io
import os
import random
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckpt_sidecar.bucket import KIB, MIB
from ckpt_sidecar.disk import files_below
from tests.conftest import ON_ONE, admin
from tests.proxy import EVERY, FOR_LONG, Answer, Broken, Exchange, Fault, Proxy, Slow
from tests.whole.running import HOME, Daemon, Target, daemon, save

MINUTES = float(os.environ.get("SOAK_MINUTES", "1"))
SEED = int(os.environ.get("SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
ROUND = 3.0  # seconds of faults; then all is healed, and it comes to rest
REST = 90.0  # seconds; it comes to rest in some
SHARE = 0.08  # of the requests, which are hurt
KEEP = 8  # checkpoints in the bucket

# What it may have at any time, and what may come and go between two rests of one life.
RSS, DESCRIPTORS, THREADS = 160 * MIB, 64, 13
RSS_SLACK, DESCRIPTORS_SLACK = 12 * MIB, 4
SPOOL_AT_REST = 256 * KIB  # its own record, and the names that it knows

FAULTS = {
    "500": Answer(500, "InternalError"),
    "500, and done": Answer(500, "InternalError", done=True),
    "503": Answer(503, "SlowDown"),
    "reset": Broken("start"),
    "reset in the body": Broken("body"),
    "answer lost": Broken("done"),
    "answer cut": Broken("answer"),
    "late": Slow(latency=1.0),
}


class Dice(Fault):
    """Hurts a share of the requests, each in a way of its own."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self.share = 0.0
        self.played: Counter[str] = Counter()

    async def play(self, exchange: Exchange) -> None:
        """Do it, or pass the request on."""
        if self._dice.random() >= self.share:
            await super().play(exchange)
            return
        name = self._dice.choice([*FAULTS])
        self.played[name] += 1
        await FAULTS[name].play(exchange)


@dataclass(frozen=True)
class Weight:
    """What a process has of its machine."""

    rss: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Weight:
        """Ask the kernel."""
        lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        told = {name: value.split() for name, _, value in lines}
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 (a directory of a living process)
        return cls(int(told["VmRSS"][0]) * KIB, descriptors, int(told["Threads"][0]))


class Trainer:
    """Saves in every way that there is, and remembers the last of each name, in the order of the saves."""

    def __init__(self, root: Path, dice: random.Random, is_durable: Callable[[str], bool]) -> None:
        self._root = root
        self._dice = dice
        self._is_durable = is_durable
        self.steps = self.saves = 0
        self.last: dict[str, bytes] = {}

    def save(self) -> None:
        """Save something: mostly small and under a new name, rarely of several parts."""
        ways = (self.step, self.replace, self.rewrite, self.big)
        self._dice.choices(ways, weights=(50, 30, 15, 3))[0]()
        time.sleep(self._dice.uniform(0.02, 0.08))  # a step of training

    def step(self) -> None:
        """Save the next, and delete the one before the last; who has not seen it by then can not send it."""
        self.steps += 1
        self._place(f"step_{self.steps}.pt", self._body(self._dice.randrange(100, 200_000)))
        old = f"step_{self.steps - 2}.pt"
        held = any(path.name == old for path in files_below(self._root / HOME))
        if not held and not self._is_durable(old):
            self.last.pop(old, None)
        (self._root / old).unlink(missing_ok=True)  # retention may have been there first

    def replace(self) -> None:
        """Replace one name for ever."""
        self._place("last.pt", self._body(self._dice.randrange(100, 200_000)))

    def big(self, size: int = 0) -> None:
        """Save something of several parts."""
        self._place("big.pt", self._body(size or self._dice.randrange(9 * MIB, 20 * MIB)))

    def rewrite(self) -> None:
        """Write over the very file, bit by bit."""
        body = self._body(self._dice.randrange(100, 200_000))
        with (self._root / "rewritten.pt").open("wb") as file:
            for start in range(0, len(body), 50_000):
                file.write(body[start : start + 50_000])
                file.flush()
                time.sleep(0.005)
        self._note("rewritten.pt", body)

    def _body(self, size: int) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(zipfile.ZipInfo("archive/data"), self._dice.randbytes(size))
        return buffer.getvalue()

    def _place(self, name: str, body: bytes) -> None:
        self._note(name, save(self._root / name, body))

    def _note(self, name: str, body: bytes) -> None:
        self.saves += 1
        self.last.pop(name, None)
        self.last[name] = body


class Soak:
    """A trainer, its sidecar in one life after the other, and what happens to them."""

    def __init__(self, root: Path, direct: Target, proxy: Proxy, seed: int) -> None:
        self.target = direct
        self.trainer = Trainer(root, random.Random(seed), lambda name: name in direct.listed())
        self.faults = Dice(seed)
        self.happened: Counter[str] = Counter()
        self.rests: list[Weight] = []  # of this life
        self.peak = Weight(0, 0, 0)
        self._root = root
        self._dice = random.Random(seed + 1)
        self._proxy = proxy
        self._life = ExitStack()
        proxy.on(EVERY, self.faults, times=FOR_LONG)
        self.start()

    def start(self) -> None:
        """Begin a life."""
        through = Target(self._proxy.url, self.target.bucket)
        keep = ("--keep-remote", str(KEEP), "--keep-local", "4")
        self.it: Daemon = self._life.enter_context(daemon(self._root, through, *keep))
        self.rests = []

    def end(self) -> None:
        """End it with SIGKILL."""
        self._life.close()
        assert "Traceback" not in self.it.said, self.it.said[-3000:]

    def account(self) -> str:
        """What has happened, for whoever looks on."""
        return "\n".join(
            (
                f"{self.trainer.saves} saves",
                f"the sidecar: {dict(self.happened)}",
                f"the requests: {dict(self.faults.played)}",
                f"at most: {self.peak}",
                *(f"at rest: {each}" for each in self.rests),
            )
        )

    # --- the faults ---

    def kill(self) -> None:
        """SIGKILL, and after a while another life."""
        self.end()
        for _ in range(self._dice.randrange(5)):
            self.trainer.save()
        self.start()

    def stall(self) -> None:
        """SIGSTOP, and SIGCONT a second later."""
        self.it.process.send_signal(signal.SIGSTOP)
        self._saves(1.0)
        self.it.process.send_signal(signal.SIGCONT)

    def cut(self) -> None:
        """The store is down for some seconds."""
        self._proxy.down()
        self._saves(self._dice.uniform(1.0, 3.0))
        self._proxy.up()

    def kill_while_cut(self) -> None:
        """It starts while the store is down."""
        self._proxy.down()
        self.kill()
        self._saves(1.0)
        self._proxy.up()

    def round(self, *, kills: bool) -> None:
        """Save under faults, for a while, and then come to rest."""
        self.faults.share = SHARE
        happens = [self.stall, self.cut, *([self.kill, self.kill, self.kill_while_cut] if kills else [])]
        self._saves(self._dice.uniform(0.0, ROUND))
        self._happen(self._dice.choice(happens))
        self._saves(self._dice.uniform(0.0, ROUND))
        self.rest()

    def _happen(self, what: Callable[[], None]) -> None:
        self.happened[what.__name__] += 1
        what()

    def _saves(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.trainer.save()
            self.weigh()

    # --- what must hold ---

    def weigh(self) -> Weight:
        """It lives, and is within its bounds."""
        assert self.it.process.poll() is None, f"it has ended: {self.it.said[-3000:]}"
        now, peak = Weight.of(self.it.process.pid), self.peak
        assert now.rss < RSS and now.descriptors <= DESCRIPTORS and now.threads <= THREADS, now
        self.peak = Weight(
            max(now.rss, peak.rss),
            max(now.descriptors, peak.descriptors),
            max(now.threads, peak.threads),
        )
        return now

    def rest(self) -> None:
        """Heal all, and wait until nothing is on its way: what it has then, it keeps."""
        self.faults.share = 0.0
        deadline = time.monotonic() + REST
        while unrest := self._unrest():
            self.weigh()
            assert time.monotonic() < deadline, f"{unrest}; {self.it.said[-3000:]}"
            time.sleep(0.05)
        self.rests.append(self.weigh())
        size = sum(path.stat().st_size for path in files_below(self._root / HOME))
        assert size < SPOOL_AT_REST

    def _unrest(self) -> str:
        """What is still to be done; "" when all is durable that the bucket is to keep, and the spool empty.

        What is written in place gets its id a moment late: of the last saves it may come before one more.
        """
        if not self.it.ready():
            return "it is not ready"
        if queue := self.it.status()["queue"]:
            return f"on their way: {queue}"
        own = ("lock", "spool.json", "known.jsonl")
        if held := [path for path in files_below(self._root / HOME) if path.name not in own]:
            return f"still held: {held}"
        recent = [*self.trainer.last.items()][-(KEEP - 1) :]
        lost = [name for name, body in recent if not self.target.holds(name, body)]
        return f"not durable: {lost}" if lost else ""


def flat(rests: Sequence[Weight]) -> bool:
    """Has one life in its last third no more than in its first, but for what comes and goes?"""
    third = len(rests) // 3
    first, last = rests[:third], rests[-third:]
    return (
        third > 0
        and max(each.rss for each in last) <= max(each.rss for each in first) + RSS_SLACK
        and max(each.descriptors for each in last)
        <= max(each.descriptors for each in first) + DESCRIPTORS_SLACK
        and {each.threads for each in last} == {each.threads for each in first}
    )


@contextmanager
def soaking(root: Path, target: Target, seed: int) -> Iterator[Soak]:
    """One that ends with the test."""
    with Proxy(target.endpoint) as proxy:
        soak = Soak(root, target, proxy, seed)
        try:
            yield soak
        finally:
            soak.it.process.kill()
            soak.it.process.wait()


@pytest.mark.long
@pytest.mark.timeout(60 * MINUTES + 900)
@pytest.mark.fault("H3")
@ON_ONE
def test_minutes_of_faults_and_restarts_leave_nothing_behind(tmp_path: Path, target: Target) -> None:
    """At every rest all is durable and the spool empty; while one life bears half of it, it does not grow.

    In the other half it is killed again and again. At the end the newest comes back on another node.
    """
    print(f"SOAK_SEED={SEED}")  # noqa: T201
    root = tmp_path / "ckpt"
    root.mkdir()
    began = time.monotonic()
    with soaking(root, target, SEED) as soak:
        while time.monotonic() < began + 30 * MINUTES:
            soak.round(kills=True)
        soak.kill()
        soak.trainer.big(48 * MIB)  # every worker has had its buffer full
        soak.rest()
        while time.monotonic() < began + 60 * MINUTES or len(soak.rests) < 6:
            soak.round(kills=False)
        print(soak.account())  # noqa: T201
        assert flat(soak.rests), soak.rests
        for last_save in (soak.trainer.rewrite, soak.trainer.big, soak.trainer.step, soak.trainer.replace):
            last_save()
            soak.rest()
        assert soak.it.stop() == 0
    newest = soak.trainer.last["last.pt"]
    assert target.listed()[:3] == ["last.pt", f"step_{soak.trainer.steps}.pt", "big.pt"]
    assert target.names() == set(target.listed())
    assert len(target.names()) <= KEEP
    assert not admin(target.endpoint).list_multipart_uploads(Bucket=target.bucket).get("Uploads")
    with daemon(tmp_path / "next", target, env={"POD_UID": "another node"}) as it:
        it.wait_ready()
        assert (tmp_path / "next/last.pt").read_bytes() == newest
        assert it.stop() == 0
