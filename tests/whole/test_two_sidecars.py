"""Several sidecars as real processes: stalled and woken, started at once, restarted again, side by side."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from ckpt_sidecar.bucket import MIB
from tests.conftest import SERVERS, admin
from tests.whole.running import Daemon, Target, daemon, save

LARGE = os.urandom(24 * MIB)  # three parts
PARTS = 3


@pytest.fixture
def target(s3_endpoint: str) -> Target:
    """A fresh bucket on a real server that can fence."""
    if s3_endpoint == SERVERS.get("rclone"):
        pytest.skip("a store without conditions cannot fence")
    return Target.new(s3_endpoint)


def manifest(target: Target) -> dict[str, object]:
    """Return latest.json as it stands."""
    raw = target.read("latest.json")
    return {} if raw is None else dict(json.loads(raw))


def under_way(target: Target) -> dict[str, str]:
    """Return the multipart uploads that the bucket has under way, their keys by their ids."""
    found = admin(target.endpoint).list_multipart_uploads(Bucket=target.bucket).get("Uploads", [])
    return {each["UploadId"]: each["Key"] for each in found}


def parts(target: Target) -> int:
    """How many parts have arrived, of the one upload under way."""
    for upload_id, key in under_way(target).items():
        listed = admin(target.endpoint).list_parts(Bucket=target.bucket, Key=key, UploadId=upload_id)
        return len(listed.get("Parts", []))
    return 0


# --- the zombie ---------------------------------------------------------------------------------------


def stall_when(sidecar: Daemon, body: bytes, so: Callable[[str], bool]) -> str:
    """Save under one name after the other, until the process is caught, stopped, where it is so; the name.

    It is left stopped. It runs a millisecond at a time, so few tries are needed.
    """
    for n in range(40):
        name = f"save_{n}.pt"
        save(sidecar.watch / name, body)
        while name not in sidecar.target.listed():
            sidecar.process.send_signal(signal.SIGSTOP)
            if so(name):
                time.sleep(0.2)
                if so(name):
                    return name
            sidecar.process.send_signal(signal.SIGCONT)
            time.sleep(0.001)
    raise AssertionError("it was never caught there")


MOMENTS: dict[str, tuple[bytes, Callable[[Target, str], bool]]] = {
    "in the middle of its parts": (LARGE, lambda target, _: 0 < parts(target) < PARTS),
    "before its complete": (LARGE, lambda target, _: parts(target) == PARTS),
    "between object and commit": (
        b"small",
        lambda target, name: target.read(name) is not None and name not in target.listed(),
    ),
}


@pytest.mark.long
@pytest.mark.fault("D1")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_zombie_that_wakes_destroys_nothing_and_holds(tmp_path: Path, target: Target, moment: str) -> None:
    """Another has claimed and saved under its very name: fenced, alive, not ready; it ends with 4."""
    body, there = MOMENTS[moment]
    with daemon(tmp_path / "old", target, "--workers", "1", env={"POD_UID": "old"}) as old:
        old.wait_ready()
        save(tmp_path / "old/first.pt", b"first")
        old.wait_durable("first.pt")
        name = stall_when(old, body, lambda name: there(target, name))
        with daemon(tmp_path / "new", target, env={"POD_UID": "new"}) as new:
            new.wait_ready()
            assert under_way(target) == {}
            save(tmp_path / "new" / name, b"of the new holder")
            new.wait_durable(name)
            before = manifest(target)
            old.process.send_signal(signal.SIGCONT)
            old.wait_said("fenced", generation=2)
            old.wait_not_ready("generation 2")
            assert old.ask("/healthz")[0] == 200
            assert old.metrics()["ckpt_sidecar_fenced"] == 1
            assert target.holds(name, b"of the new holder")
            assert manifest(target) == before
            save(tmp_path / "new/next.pt", LARGE)
            new.wait_durable("next.pt")
            assert old.stop() == 4
            assert new.stop() == 0
    assert under_way(target) == {}
    assert target.listed()[:2] == ["next.pt", name]
    assert target.holds(name, b"of the new holder")
    assert [*(tmp_path / "old/.ckpt-sidecar/pins").rglob(name)]  # for a job that is scheduled there again


@pytest.mark.long
@pytest.mark.fault("D3")
def test_a_fenced_container_that_is_restarted_for_ever_never_takes_the_prefix_back(
    tmp_path: Path, target: Target
) -> None:
    """Its supervisor starts it again after each end, whether it was killed or told to stop."""
    old_pod, new_pod = {"POD_UID": "old"}, {"POD_UID": "new"}
    with daemon(tmp_path / "old", target, env=old_pod) as old:
        old.wait_ready()
        save(tmp_path / "old/first.pt", b"first")
        old.wait_durable("first.pt")
    with daemon(tmp_path / "new", target, env=new_pod) as new:
        new.wait_ready()
        for n in range(4):
            save(tmp_path / f"old/zombie_{n}.pt", b"of the zombie")
            before = manifest(target)
            with daemon(tmp_path / "old", target, env=old_pod) as old:
                old.wait_not_ready("generation 2")
                assert manifest(target) == before
                if n % 2:
                    assert old.stop() == 4
            save(tmp_path / f"new/step_{n}.pt", b"of the holder")
            new.wait_durable(f"step_{n}.pt")
        assert manifest(target)["generation"] == 2
        assert new.stop() == 0
    assert target.listed() == [*(f"step_{n}.pt" for n in reversed(range(4))), "first.pt"]
    assert target.names() == {*target.listed()}
    assert not [*(tmp_path / "old").glob("step_*.pt")]  # nothing was restored for a trainer that has no right


# --- many at once -------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.fault("D2")
def test_of_ten_that_start_at_once_one_holds_and_nobody_spins(tmp_path: Path, target: Target) -> None:
    """Each claims once, in one order; who finds that it was overtaken writes no more."""
    with ExitStack() as ends:
        all_ten = [ends.enter_context(daemon(tmp_path / f"node-{n}", target)) for n in range(10)]
        for each in all_ten:
            each.wait_ready()
        assert manifest(target)["generation"] == 10
        generations = {each.status()["generation"]: each for each in all_ten}
        assert sorted(generations) == [*range(1, 11)]
        last = generations.pop(10)
        for each in all_ten:
            save(each.watch / f"{each.watch.name}.pt", b"from " + each.watch.name.encode())
        last.wait_durable(f"{last.watch.name}.pt")
        for each in generations.values():
            each.wait_said("fenced", generation=10)
            each.wait_not_ready("generation 10")
        before, asked = manifest(target), [requests(each) for each in all_ten]
        last.wait_rescans(3)
        assert [requests(each) for each in all_ten] == asked
        assert [each.ask("/healthz")[0] for each in all_ten] == [200] * 10
        assert manifest(target) == before
        assert target.listed() == [f"{last.watch.name}.pt"]
        codes = {each.watch.name: each.stop() for each in all_ten}
        assert codes == {each.watch.name: 0 if each is last else 4 for each in all_ten}


def requests(sidecar: Daemon) -> float:
    """How many requests it has sent to the store."""
    found = sidecar.metrics().items()
    return sum(value for name, value in found if name.startswith("ckpt_sidecar_s3_requests_total"))


# --- side by side -------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.fault("D9")
def test_jobs_in_one_bucket_and_on_one_node_do_not_meet(tmp_path: Path, target: Target) -> None:
    """Two prefixes, one of them inside a third; the same names and the same attempt: each has its own."""
    prefixes = {"outer": "team/", "inner": "team/run/", "beside": "team-2/"}
    jobs = {name: Target(target.endpoint, target.bucket, prefix) for name, prefix in prefixes.items()}
    for life in (1, 2):
        with ExitStack() as ends:
            running = {
                name: ends.enter_context(daemon(tmp_path / name, job, "--keep-remote", "3"))
                for name, job in jobs.items()
            }
            for each in running.values():
                each.wait_ready()
            for n in range(3):
                for name, each in running.items():
                    save(each.watch / f"step_{life}{n}.pt", f"{life} {n} {name}".encode())
            for each in running.values():
                for n in range(3):
                    each.wait_durable(f"step_{life}{n}.pt")
            assert [each.stop() for each in running.values()] == [0, 0, 0]
        for job in jobs.values():
            assert job.listed() == [f"step_{life}{n}.pt" for n in (2, 1, 0)]
        admin(target.endpoint).delete_object(Bucket=target.bucket, Key="team/latest.json")
        (tmp_path / "outer").rename(tmp_path / f"outer, life {life}")  # the next one knows the bucket alone
    with daemon(tmp_path / "outer", jobs["outer"]) as outer:
        outer.wait_ready()
        assert (tmp_path / "outer/step_22.pt").read_bytes() == b"2 2 outer"
        assert outer.stop() == 0
    assert jobs["outer"].listed() == ["step_22.pt", "step_21.pt", "step_20.pt"]
    assert jobs["inner"].read("step_22.pt") == b"2 2 inner"


# --- latest.json, and what is left over ---------------------------------------------------------------


@pytest.mark.long
@pytest.mark.fault("D6")
def test_whatever_is_done_to_the_manifest_it_never_goes_back(tmp_path: Path, target: Target) -> None:
    """Deleted, emptied, mangled, another's, an older copy: under a running sidecar, and before a start."""
    watch = tmp_path / "ckpt"
    other = Target(target.endpoint, target.bucket, "elsewhere/")
    with daemon(tmp_path / "other", other) as elsewhere:
        elsewhere.wait_ready()
        save(tmp_path / "other/theirs.pt", b"theirs")
        elsewhere.wait_durable("theirs.pt")
        assert elsewhere.stop() == 0
    saved: list[str] = []

    def save_next(sidecar: Daemon) -> None:
        saved.insert(0, f"step_{len(saved)}.pt")
        save(watch / saved[0], saved[0].encode())
        sidecar.wait_said("checkpoint_committed", name=saved[0])

    with daemon(watch, target) as sidecar:
        sidecar.wait_ready()
        save_next(sidecar)
        older = target.read("latest.json") or b""
        save_next(sidecar)
        damages = [b"", older[:99], other.read("latest.json") or b"", older]
        for body in damages:
            target.write("latest.json", body)
            save_next(sidecar)
            assert target.listed() == saved
        admin(target.endpoint).delete_object(Bucket=target.bucket, Key=f"{target.prefix}latest.json")
        save_next(sidecar)
        assert target.listed() == saved
        assert len(sidecar.events("rebuilt")) == len(damages) + 1
        assert sidecar.stop() == 0
    for body in damages:
        target.write("latest.json", body)
        with daemon(watch, target) as sidecar:
            sidecar.wait_ready()
            sidecar.wait_said("rebuilt")
            assert sidecar.status()["newest"]["name"] == saved[0]
            save_next(sidecar)
            assert sidecar.stop() == 0
        assert target.listed() == saved
    newer = b'{"schema": 2, "written_by": "a ckpt-sidecar of next year"}'
    target.write("latest.json", newer)
    with daemon(watch, target) as sidecar:
        sidecar.wait_not_ready("schema 2 is newer")
        assert sidecar.stop() == 0
    assert target.read("latest.json") == newer


@pytest.mark.fault("E1")
def test_what_was_killed_leaves_no_upload_and_touches_no_strangers(tmp_path: Path, target: Target) -> None:
    """After the next life's drain the bucket has under way what others have begun, and nothing else."""
    client = admin(target.endpoint)
    watch, key = tmp_path / "ckpt", f"{target.prefix}big.pt"
    theirs = {}
    for at in (key, f"{target.prefix}theirs.pt", "elsewhere/big.pt"):
        begun = client.create_multipart_upload(Bucket=target.bucket, Key=at)["UploadId"]
        client.upload_part(Bucket=target.bucket, Key=at, UploadId=begun, PartNumber=1, Body=b"theirs")
        theirs[begun] = at
    with daemon(watch, target, "--workers", "1") as sidecar:
        sidecar.wait_ready()
        save(watch / "big.pt", LARGE)
        sidecar.until(lambda: under_way(target).keys() - theirs.keys())
        sidecar.process.kill()
        sidecar.process.wait()
    save(watch / "big.pt", b"small by now")
    with daemon(watch, target) as sidecar:
        sidecar.wait_durable("big.pt")
        assert sidecar.stop() == 0
    assert under_way(target) == theirs
    assert manifest(target)["uploads"] == []
