"""The main job on real servers: a trainer saves, the sidecar uploads, the node is lost, the next goes on."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from ckpt_sidecar.bucket import GIB, MIB
from tests.conftest import SERVERS, admin
from tests.whole.running import Daemon, Target, daemon, save, until

TRAIN = Path(__file__).parents[2] / "examples" / "train.py"
SHORT = ("--steps", "120", "--save-every", "20")
RSS_LIMIT = 160 * MIB  # of the daemon, whatever the checkpoint's size


@contextmanager
def trainer(checkpoints: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Run the example training job."""
    words = [sys.executable, str(TRAIN), "--checkpoints", str(checkpoints), *SHORT, *more]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finished(process: subprocess.Popen[str]) -> list[str]:
    """Wait until the trainer is done; return what it has said."""
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return said.splitlines()


def command(word: str, watch: Path | None, target: Target | None = None) -> list[str]:
    """Return the words of a one-shot command."""
    words = [sys.executable, "-m", "ckpt_sidecar", word]
    if watch is not None:
        words += ["--watch", str(watch)]
    if target is not None:
        words += ["--bucket", target.bucket, "--prefix", target.prefix, "--endpoint-url", target.endpoint]
    return words


def ran(words: Sequence[str]) -> tuple[int, str]:
    """Run a one-shot command; return its exit code and what it printed."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def unfenced(target: Target) -> list[str]:
    """Return what rclone's server needs to be let through."""
    return ["--allow-unfenced"] if target.endpoint == SERVERS.get("rclone") else []


def noise(size: int, seed: int = 0) -> bytes:
    """Return bytes that repeat nowhere soon."""
    block = bytearray()
    while len(block) < min(size, MIB):
        seed = zlib.crc32(seed.to_bytes(4, "little"))
        block += seed.to_bytes(4, "little")
    return (bytes(block) * -(-size // len(block)))[:size] if size else b""


def peak_rss(process: Daemon) -> int:
    """Return the most memory that the process has had so far, in bytes."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


# --- the whole story ----------------------------------------------------------------------------------


def test_a_run_that_loses_its_node_ends_with_the_weights_it_would_have_had(
    tmp_path: Path, target: Target
) -> None:
    """Trainer and sidecar are killed and their disk is gone; the next node restores, resumes and finishes."""
    with trainer(tmp_path / "straight") as straight:
        expected = finished(straight)[-1]

    lost = tmp_path / "node-a"
    with daemon(lost, target, "--attempt", "a") as sidecar:
        sidecar.wait_ready()
        with trainer(lost, "--step-seconds", "0.01", "--keep", "2") as training:
            sidecar.until(lambda: "step_000060.pt" in target.listed())
            training.kill()
            sidecar.process.kill()
            sidecar.process.wait()
    shutil.rmtree(lost)
    durable = target.listed()[0]
    assert durable >= "step_000060.pt"

    found = tmp_path / "node-b"
    with daemon(found, target, "--attempt", "b") as sidecar:
        sidecar.wait_ready()
        restored = sidecar.wait_said("restored", outcome="restored")["name"]
        assert restored >= durable
        assert (found / restored).read_bytes() == target.read(restored)
        assert torch.load(found / restored, weights_only=True)["step"] == int(restored[5:11])
        with trainer(found) as training:
            said = finished(training)
        assert sidecar.stop() == 0
    assert said[0] == f"resumed from {restored}"
    assert said[-1] == expected
    assert target.listed()[0] == "step_000120.pt"
    uploads = admin(target.endpoint).list_multipart_uploads(Bucket=target.bucket).get("Uploads", [])
    assert len(uploads) <= 1  # one that died between create and announce is for the bucket's lifecycle rule


def test_a_trainer_run_as_a_child_finds_its_checkpoint_and_leaves_all_durable(
    tmp_path: Path, target: Target
) -> None:
    """`-- COMMAND`: restored before it starts, its exit code handed on, drained after it."""
    first = ("--", sys.executable, str(TRAIN), "--checkpoints")
    with daemon(tmp_path / "a", target, *first, str(tmp_path / "a"), *SHORT) as sidecar:
        assert sidecar.ended() == 0
    assert target.listed()[0] == "step_000120.pt"
    script = "import sys; print(*__import__('os').listdir(sys.argv[1])); sys.exit(7)"
    child = ("--attempt", "b", "--", sys.executable, "-c", script, str(tmp_path / "b"))
    with daemon(tmp_path / "b", target, *child) as sidecar:
        assert sidecar.ended() == 7
        assert "step_000120.pt" in sidecar.said


@pytest.mark.fault("E2")
def test_a_stop_reaches_the_trainer_first_and_what_it_still_saves_is_durable(
    tmp_path: Path, target: Target
) -> None:
    """SIGTERM goes to the child; only its end begins the drain."""
    script = """
import os, signal, sys
def save_and_leave(*_):
    with open(sys.argv[1] + "/last.tmp", "wb") as file:
        file.write(b"the last weights")
    os.rename(sys.argv[1] + "/last.tmp", sys.argv[1] + "/last.pt")
    sys.exit(0)
signal.signal(signal.SIGTERM, save_and_leave)
print("trains", flush=True)
signal.pause()
"""
    child = ("--", sys.executable, "-c", script, str(tmp_path / "a"))
    with daemon(tmp_path / "a", target, *child) as sidecar:
        sidecar.until(lambda: "trains" in sidecar.said)
        assert sidecar.stop() == 0
    assert target.holds("last.pt", b"the last weights")


# --- how trainers save --------------------------------------------------------------------------------


@pytest.mark.fault("A5")
def test_ten_checkpoints_that_are_rotated_away_at_once_all_arrive(tmp_path: Path, target: Target) -> None:
    """Each is deleted as soon as the next one stands; real ones, saved in place."""
    watch = tmp_path / "ckpt"
    rotate = """
import sys, time, torch
from pathlib import Path
for n in range(10):
    torch.save({"n": n, "weight": torch.full((100_000,), float(n))}, Path(sys.argv[1]) / f"step_{n}.pt")
    (Path(sys.argv[1]) / f"step_{n - 1}.pt").unlink(missing_ok=True)
    time.sleep(0.05)  # a step of training
(Path(sys.argv[1]) / "step_9.pt").unlink()
"""
    with daemon(watch, target) as sidecar:
        sidecar.wait_ready()
        subprocess.run([sys.executable, "-c", rotate, str(watch)], check=True, timeout=60)
        assert list(watch.glob("*.pt")) == []
        assert sidecar.stop() == 0
    assert target.listed() == [f"step_{n}.pt" for n in reversed(range(10))]
    for n in range(10):
        body = target.read(f"step_{n}.pt")
        assert body is not None
        assert torch.load(io.BytesIO(body), weights_only=True)["n"] == n


@pytest.mark.fault("A6")
def test_a_name_that_is_replaced_again_and_again_ends_as_the_last_save(
    tmp_path: Path, target: Target
) -> None:
    """`last.pt`: some saves are superseded, each is counted, and none is torn."""
    watch = tmp_path / "ckpt"
    with daemon(watch, target) as sidecar:
        sidecar.wait_ready()
        for n in range(12):
            last = save(watch / "last.pt", noise(9 * MIB, n))
        sidecar.wait_durable("last.pt", last)

        def counted() -> bool:
            metrics = sidecar.metrics()
            outcomes = ("committed", "superseded")
            counts = [metrics[f'ckpt_sidecar_checkpoints_total{{outcome="{each}"}}'] for each in outcomes]
            return sum(counts) == 12

        sidecar.until(counted)
        assert sidecar.stop() == 0
    assert target.listed() == ["last.pt"]


@pytest.mark.fault("A2")
def test_a_slow_save_into_its_final_name_is_taken_when_it_is_whole(tmp_path: Path, target: Target) -> None:
    """Written in place with pauses longer than --settle: never before its end, and then once."""
    watch = tmp_path / "ckpt"
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(200_000.0)}, buffer)
    whole = buffer.getvalue()
    with daemon(watch, target) as sidecar:
        sidecar.wait_ready()
        with (watch / "slow.pt").open("wb") as file:
            for piece in (whole[:1000], whole[1000:-1000]):
                file.write(piece)
                file.flush()
                sidecar.wait_rescans(2)
                assert target.names() == set()
            file.write(whole[-1000:])
        sidecar.wait_durable("slow.pt")
        assert sidecar.stop() == 0
    assert len(sidecar.events("checkpoint_committed")) == 1


# --- what is killed goes on ---------------------------------------------------------------------------


def test_an_upload_that_was_cut_by_a_kill_is_resumed(tmp_path: Path, target: Target) -> None:
    """The parts that the bucket has are not sent again."""
    watch, size = tmp_path / "ckpt", 96 * MIB
    body = noise(size)
    with daemon(watch, target, "--workers", "1") as sidecar:
        sidecar.wait_ready()
        save(watch / "big.pt", body)
        sent = sidecar.until(lambda: _sent(sidecar))
        sidecar.process.kill()
        sidecar.process.wait()
    assert target.names() == set()
    (watch / "big.pt").unlink()  # the pin holds its bytes
    with daemon(watch, target) as sidecar:
        sidecar.wait_durable("big.pt", body)
        assert sidecar.metrics()["ckpt_sidecar_uploaded_bytes_total"] <= size - sent
        assert sidecar.stop() == 0
    assert admin(target.endpoint).list_multipart_uploads(Bucket=target.bucket).get("Uploads", []) == []


def _sent(sidecar: Daemon) -> int:
    """How much of the one on its way has been sent, once two parts have, and the announcement has."""
    queue = sidecar.status()["queue"]
    announced = json.loads(sidecar.target.read("latest.json") or b"{}").get("uploads")
    return queue[0]["sent"] if queue and announced and queue[0]["sent"] >= 16 * MIB else 0


@pytest.mark.fault("D1", "D3")
def test_of_two_sidecars_on_one_prefix_the_older_one_holds_and_destroys_nothing(
    tmp_path: Path, target: Target
) -> None:
    """The zombie pod: it stays alive, says so, keeps what it has, and exits with 4."""
    if target.endpoint == SERVERS.get("rclone"):
        pytest.skip("a store without conditions cannot fence")
    with daemon(tmp_path / "old", target, "--attempt", "old") as old:
        old.wait_ready()
        save(tmp_path / "old/one.pt", b"first")
        old.wait_durable("one.pt")
        with daemon(tmp_path / "new", target, "--attempt", "new") as new:
            new.wait_ready()
            assert (tmp_path / "new/one.pt").read_bytes() == b"first"
            save(tmp_path / "new/two.pt", b"of the new holder")
            new.wait_durable("two.pt")
            save(tmp_path / "old/two.pt", b"of the zombie")
            old.wait_said("fenced", generation=2)
            old.wait_not_ready("generation 2")
            assert old.metrics()["ckpt_sidecar_fenced"] == 1
            assert old.ask("/healthz")[0] == 200
            assert target.holds("two.pt", b"of the new holder")
            assert old.stop() == 4
            assert new.stop() == 0
    with daemon(tmp_path / "old", target, "--attempt", "old") as old:
        old.wait_not_ready("generation 2")  # restarted by its supervisor: it does not take the prefix back
        assert old.stop() == 4


@pytest.mark.fault("E2")
def test_a_second_signal_ends_the_drain_and_the_next_life_finishes_it(tmp_path: Path, target: Target) -> None:
    """Exit code 3, and the log says what is not durable."""
    watch = tmp_path / "ckpt"
    bodies = {f"{n}.pt": noise(24 * MIB, n) for n in range(4)}
    with daemon(watch, target, "--workers", "1") as sidecar:
        sidecar.wait_ready()
        for name, body in bodies.items():
            save(watch / name, body)
        sidecar.until(lambda: len(sidecar.events("checkpoint_pinned")) == 4)
        sidecar.process.send_signal(signal.SIGTERM)
        sidecar.wait_said("draining")
        assert sidecar.stop() == 3
        left = sidecar.events("drained")[0]["left"]
    assert left
    with daemon(watch, target) as sidecar:
        for name, body in bodies.items():
            sidecar.wait_durable(name, body)
        assert sidecar.stop() == 0


# --- one-shot commands --------------------------------------------------------------------------------


def test_restore_once_and_what_it_prints(tmp_path: Path, target: Target) -> None:
    """Nothing there: 0 and no path. Restored: its path. Again: kept. All broken: 5, and nothing in place."""
    watch = tmp_path / "node-b"
    restore = command("restore", watch, target)
    assert ran(restore) == (0, "\n")
    with daemon(tmp_path / "node-a", target) as sidecar:
        sidecar.wait_ready()
        one = save(tmp_path / "node-a/run/step_1.pt", noise(20 * MIB))
        sidecar.wait_durable("run/step_1.pt")
        assert sidecar.stop() == 0
    assert ran(restore) == (0, f"{watch}/run/step_1.pt\n")
    assert (watch / "run/step_1.pt").read_bytes() == one
    code, told = ran([*restore, "--json"])
    assert (code, json.loads(told)["outcome"], json.loads(told)["checkpoint"]["size"]) == (
        0,
        "kept",
        len(one),
    )
    assert ran(command("latest", watch)) == (0, f"{watch}/run/step_1.pt\n")
    code, told = ran(command("ls", None, target))
    assert (code, told.split()[-1], len(told.splitlines())) == (0, "run/step_1.pt", 1)

    broken = bytearray(one)
    broken[-1] ^= 1
    target.write("run/step_1.pt", bytes(broken))
    (watch / "run/step_1.pt").unlink()
    code, told = ran([*restore, "--json"])
    assert (code, json.loads(told)["outcome"]) == (5, "failed")
    assert list(watch.rglob("*.pt")) == []


def test_a_person_at_a_terminal_sees_how_the_restore_goes_on(tmp_path: Path, target: Target) -> None:
    """A bar that fills, and log lines that one can read."""
    with daemon(tmp_path / "node-a", target) as sidecar:
        sidecar.wait_ready()
        save(tmp_path / "node-a/step_1.pt", noise(40 * MIB))
        sidecar.wait_durable("step_1.pt")
        assert sidecar.stop() == 0
    with terminal(command("restore", tmp_path / "node-b", target)) as shown:
        pass
    assert "step_1.pt" in shown.text
    assert "100%" in shown.text
    assert "restored" in shown.text
    assert '{"' not in shown.text


class Shown:
    """What a terminal of 80 columns has shown so far."""

    def __init__(self, ours: int) -> None:
        self.ours = ours
        self._seen = bytearray()

    @property
    def text(self) -> str:
        """All of it."""
        return self._seen.decode(errors="replace")

    def read(self) -> None:
        """Read until the other end is closed."""
        with suppress(OSError):
            while data := os.read(self.ours, 4096):
                self._seen += data


@contextmanager
def terminal(words: Sequence[str]) -> Iterator[Shown]:
    """Run the command in the foreground of a terminal of its own, to a good end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = Shown(ours)
    reader = threading.Thread(target=shown.read)
    reader.start()
    # setsid makes the terminal the command's own, so that Ctrl-C goes to its process group
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *words], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        yield shown
        assert process.wait(60) == 0, shown.text
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(ours)


def test_wait_is_done_when_what_was_just_saved_is_durable(tmp_path: Path, target: Target) -> None:
    """Saved in place a moment ago: `wait` returns only once `latest.json` has it."""
    watch = tmp_path / "ckpt"
    with daemon(watch, target) as sidecar:
        sidecar.wait_ready()
        torch.save({"weight": torch.zeros(1000)}, watch / "a.pt", _use_new_zipfile_serialization=False)
        assert ran(command("wait", watch)) == (0, "")
        assert target.listed() == ["a.pt"]
        torch.save({"weight": torch.ones(1000)}, watch / "b.pt")
        assert ran([*command("wait", watch), "b.pt"]) == (0, "")
        assert target.listed() == ["b.pt", "a.pt"]
        assert ran([*command("wait", watch), "--timeout", "0.5", "c.pt"]) == (3, "c.pt\n")
        assert ran(command("status", watch))[0] == 0
        assert sidecar.stop() == 0


@pytest.mark.fault("E2")
def test_ctrl_c_on_a_terminal_reaches_the_trainer_once(tmp_path: Path, target: Target) -> None:
    """The terminal sends it to both; it is not passed on a second time."""
    script = """
import signal, time
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
print("trains", flush=True)
while not seen:
    time.sleep(0.01)
time.sleep(0.5)
print("interrupts:", len(seen), flush=True)
"""
    words = [sys.executable, "-m", "ckpt_sidecar", "--watch", str(tmp_path / "a"), "--listen", "127.0.0.1:0"]
    words += ["--bucket", target.bucket, "--endpoint-url", target.endpoint]
    with terminal([*words, *unfenced(target), "--", sys.executable, "-c", script]) as shown:
        until(lambda: "trains" in shown.text)
        os.write(shown.ours, b"\x03")
        until(lambda: "interrupts:" in shown.text)
    assert "interrupts: 1" in shown.text


# --- retention ----------------------------------------------------------------------------------------


def test_disk_and_bucket_stay_bounded(tmp_path: Path, target: Target) -> None:
    """`--keep-local` and `--keep-remote`: the newest stay, the newest durable one in any case."""
    watch = tmp_path / "ckpt"
    with daemon(watch, target, "--keep-local", "2", "--keep-remote", "3") as sidecar:
        sidecar.wait_ready()
        for n in range(6):
            save(watch / f"step_{n}.pt", noise(1000, n))
            sidecar.until(lambda n=n: target.listed()[:1] == [f"step_{n}.pt"])  # type: ignore[misc]
        until(lambda: target.names() == {"step_3.pt", "step_4.pt", "step_5.pt"})
        until(lambda: {each.name for each in watch.glob("*.pt")} == {"step_4.pt", "step_5.pt"})
        assert sidecar.stop() == 0
    assert json.loads(target.read("latest.json") or b"")["expiring"] == []


# --- size ---------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.fault("E7")
def test_a_large_checkpoint_goes_up_and_comes_back_in_little_memory(tmp_path: Path, target: Target) -> None:
    """3 GiB where the store is quick (Ceph), less where it is a toy: byte for byte, under 160 MiB of RSS."""
    size = 3 * GIB if target.endpoint == SERVERS.get("ceph") else GIB // 8
    first, second = tmp_path / "node-a", tmp_path / "node-b"
    block = noise(MIB)
    with daemon(first, target, "--attempt", "a") as sidecar:
        sidecar.wait_ready()
        with (first / "big.tmp").open("wb") as file:
            for n in range(size // MIB):
                file.write(n.to_bytes(8, "little") + block[8:])
        (first / "big.tmp").rename(first / "big.pt")
        until(lambda: target.listed() == ["big.pt"], seconds=200)
        assert peak_rss(sidecar) < RSS_LIMIT
        assert sidecar.stop() == 0
    with daemon(second, target, "--attempt", "b") as sidecar:
        until(sidecar.ready, seconds=200)
        assert peak_rss(sidecar) < RSS_LIMIT
        assert sidecar.stop() == 0
    same = subprocess.run(["cmp", first / "big.pt", second / "big.pt"], check=False, timeout=120)
    assert same.returncode == 0
