"""Many checkpoints: bursts, backlogs, a bucket that is full of them. Requests are counted, not seconds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from ckpt_sidecar.bucket import MIB, Bucket, Condition, ObjectRef, Source
from ckpt_sidecar.checkpoint import Committed, Id
from ckpt_sidecar.document import dump
from ckpt_sidecar.manifest import HISTORY, Entry, Holder, Manifest, committed, self_description
from ckpt_sidecar.sidecar import Exit
from tests.conftest import ON_ONE, admin
from tests.engine.support import BORN, LATEST, PREFIX, Steps, save
from tests.engine.test_drain import living
from tests.fakes import MemoryBucket
from tests.whole.running import Daemon, Target, daemon, until
from tests.whole.running import save as save_file
from tests.whole.test_main_job import peak_rss

T = TypeVar("T")
RSS_LIMIT = 160 * MIB  # of a daemon, whatever waits
STORM = 10_000
REAL_STORM = 1_000  # what moto takes in reasonable time


def committed_by(sidecar: Daemon) -> list[str]:
    """The names that it has committed, in order."""
    return [each["name"] for each in sidecar.events("checkpoint_committed")]


def asked(sidecar: Daemon) -> dict[str, float]:
    """How often each operation was asked of the store so far."""
    head = "ckpt_sidecar_s3_requests_total{"
    found: dict[str, float] = {}
    for name, value in sidecar.metrics().items():
        if name.startswith(head) and value:
            operation = name.split('"')[1]
            found[operation] = found.get(operation, 0) + value
    return found


# --- a burst ------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.fault("H1")
async def test_ten_thousand_checkpoints_in_a_burst_all_arrive(tmp_path: Path) -> None:
    """And what is saved while they wait is durable before them, but for those that were being sent."""
    memory = MemoryBucket()
    async with asyncio.timeout(800), living(tmp_path / "a", memory, workers=4, drain_timeout=800.0) as life:
        await life.ready()
        gate = life.steps.hold("put", ".pt", times=4)
        for n in range(STORM):
            save(life.root, f"{n}.pt", b"%d" % n)
        while len(life.book) < STORM:
            await asyncio.sleep(0.1)
        await life.save("late.pt", b"late")
        gate.opened.set()
        await life.told.until(life.committed("late.pt"))
        assert len(life.fates(Committed)) < STORM / 100
        life.sidecar.stop.set()
        assert life.running is not None
        assert (await life.running).code == Exit.DURABLE
        assert life.pins == []
        assert len(life.fates(Committed)) == STORM + 1
    assert memory.objects.keys() == {LATEST, "job/late.pt", *(f"job/{n}.pt" for n in range(STORM))}
    assert all(memory.body(f"job/{n}.pt") == b"%d" % n for n in range(STORM))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.fault("H1")
@ON_ONE
def test_in_a_burst_the_newest_do_not_wait_and_memory_is_bounded(tmp_path: Path, target: Target) -> None:
    """What is saved while hundreds wait overtakes them; memory stays bounded, and the spool ends empty."""
    watch = tmp_path / "ckpt"
    late = [f"late_{n}.pt" for n in range(5)]
    peak = 0
    with daemon(watch, target, "--drain-timeout", "600", "--rescan-every", "30") as sidecar:
        sidecar.wait_ready()
        for n in range(REAL_STORM):
            save_file(watch / f"step_{n:05}.pt", b"%d" % n)
        for name in late:
            save_file(watch / name, name.encode())
            until(lambda name=name: name in target.listed(), name, seconds=300)  # type: ignore[misc]
            assert sidecar.metrics()['ckpt_sidecar_queue_checkpoints{state="pinned"}'] > REAL_STORM / 10
            assert sidecar.ask("/healthz")[0] == 200
        sidecar.process.send_signal(signal.SIGTERM)
        while sidecar.process.poll() is None:
            with suppress(OSError, StopIteration):
                peak = max(peak, peak_rss(sidecar))
            with suppress(subprocess.TimeoutExpired):
                sidecar.process.wait(0.5)
        assert sidecar.ended() == 0
        assert len(set(committed_by(sidecar))) == REAL_STORM + len(late)
    assert MIB < peak < RSS_LIMIT
    assert target.names() == {*late, *(f"step_{n:05}.pt" for n in range(REAL_STORM))}
    for n in range(0, REAL_STORM, 501):
        assert target.read(f"step_{n:05}.pt") == b"%d" % n
    assert [*(watch / ".ckpt-sidecar/pins").iterdir()] == []


# --- a backlog ----------------------------------------------------------------------------------------


@pytest.mark.fault("H2")
@ON_ONE
def test_a_backlog_of_a_hundred_drains_while_saves_go_on(tmp_path: Path, target: Target) -> None:
    """Each new save goes next, and between them the backlog goes up from its newest to its oldest."""
    watch = tmp_path / "ckpt"
    old = [f"old_{n:03}.pt" for n in range(100)]
    for age, name in enumerate(reversed(old), 1):
        save_file(watch / name, os.urandom(2000), age=age)
    with daemon(watch, target, "--workers", "1") as sidecar:
        new: list[str] = []
        while set(old) - {*committed_by(sidecar)}:
            new.append(f"new_{len(new):03}.pt")
            save_file(watch / new[-1], new[-1].encode())
            sidecar.wait_said("checkpoint_committed", name=new[-1])
            assert sidecar.process.poll() is None
        assert sidecar.stop() == 0
        order = committed_by(sidecar)
    backlog = [name for name in order if name.startswith("old")]
    assert backlog == old[::-1]
    assert [name for name in order if name.startswith("new")] == new
    assert len(new) > 3
    assert order.index(new[2]) < order.index(old[0])
    assert target.listed()[0] == new[-1]


# --- a bucket full of them ----------------------------------------------------------------------------


def manifest_of(entries: list[Entry]) -> bytes:
    """Return latest.json as a predecessor left it."""
    manifest = Manifest(generation=1, holder=Holder("spool-z", "attempt-z", "node-z", 7, BORN), write="w")
    for each in entries:
        manifest = committed(manifest, each)
    return dump(manifest, bucket="memory")


def full(objects: int) -> MemoryBucket:
    """Return a bucket with so many checkpoints, of which latest.json lists as many as it may."""
    memory = MemoryBucket()
    entries = []
    for n in range(1, objects + 1):
        name, id_ = f"old_{n}.pt", Id(1, n)
        ref = memory._keep(PREFIX + name, b"old", "etag", self_description(id_, BORN, 3))
        entries.append(Entry(id_, name, (ref,), BORN, BORN))
    memory._keep(LATEST, manifest_of(entries[-HISTORY:]), "first", {})
    return memory


class Counted(Steps):
    """The way to a bucket, on which is counted what is asked, and how much is written as latest.json."""

    def __init__(self, inner: Bucket) -> None:
        super().__init__(inner)
        self.asked: Counter[str] = Counter()
        self.manifests: list[int] = []

    async def _step(self, verb: str, key: str, call: Callable[[], Awaitable[T]]) -> T:
        self.asked[verb] += 1
        return await super()._step(verb, key, call)

    async def put(
        self, key: str, body: bytes | tuple[Source, int], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """As the other's."""
        if isinstance(body, bytes):
            self.manifests.append(len(body))
        return await super().put(key, body, when=when, metadata=metadata)

    def list(self, prefix: str) -> AsyncIterator[ObjectRef]:
        """As the other's."""
        self.asked["list"] += 1
        return super().list(prefix)


@pytest.mark.fault("H4")
async def test_start_and_commit_cost_the_same_however_full_the_prefix_is(tmp_path: Path) -> None:
    """A hundred thousand objects and a history at its bound: the requests, and the bytes, of a hundred."""
    costs, sizes = [], []
    for objects in (HISTORY, 100_000):
        counted = Counted(full(objects))
        async with living(tmp_path / f"{objects}", counted) as life:  # type: ignore[arg-type]
            await life.ready()
            started = counted.asked.copy()
            assert life.restored == ("restored", f"old_{objects}.pt")
            for n in range(20):
                await life.save(f"{n}.pt", at=n)
                await life.told.until(life.committed(f"{n}.pt"))
            assert (await life.stop()).code == Exit.DURABLE
        costs.append((started, counted.asked))
        sizes.append(max(counted.manifests))
    assert costs[0] == costs[1]
    assert costs[0][0].total() < 10
    assert sizes[1] < 1.1 * sizes[0]


def put_old(target: Target, n: int) -> Entry:
    """Write a checkpoint's object as a predecessor did; return its entry."""
    name, id_ = f"old_{n}.pt", Id(1, n)
    key, metadata = target.prefix + name, self_description(id_, BORN, 3)
    client = admin(target.endpoint)
    answer = client.put_object(Bucket=target.bucket, Key=key, Body=b"old", Metadata=metadata)
    return Entry(id_, name, (ObjectRef(key, 3, answer["ETag"].strip('"')),), BORN, BORN)


@pytest.mark.long
@pytest.mark.fault("H4")
@ON_ONE
def test_a_start_asks_the_store_no_more_where_the_prefix_is_full(tmp_path: Path, s3_endpoint: str) -> None:
    """More objects than one page of a listing has: none is asked for."""
    costs = []
    for objects in (HISTORY, 1_500):
        target = Target.new(s3_endpoint)
        with ThreadPoolExecutor(4) as pool:
            entries = list(pool.map(partial(put_old, target), range(1, objects + 1)))
        target.write("latest.json", manifest_of(entries[-HISTORY:]))
        with daemon(tmp_path / f"{objects}", target) as sidecar:
            sidecar.wait_ready()
            assert sidecar.wait_said("restored")["name"] == f"old_{objects}.pt"
            for n in range(3):
                save_file(tmp_path / f"{objects}/new_{n}.pt", b"new")
                sidecar.wait_said("checkpoint_committed", name=f"new_{n}.pt")
            costs.append(asked(sidecar))
            assert sidecar.stop() == 0
    assert costs[0] == costs[1]
    assert "list_objects_v2" not in costs[0]
