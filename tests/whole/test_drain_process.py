"""The end of the process: who asks for it, what is still done, by when, and what it says of the rest."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Self

import pytest

from tests.conftest import ON_ONE
from tests.whole.running import SECONDS, Daemon, Target, daemon, save, until


@pytest.fixture
def watch(tmp_path: Path) -> Path:
    """Where a watch dir will be."""
    return tmp_path / "ckpt"


class Tap:
    """The way to a server, which can be shut: then nothing comes through, in either direction."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.removeprefix("http://").rstrip("/").split(":")
        self._to = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._server]
        self.allows = sys.maxsize  # bytes, after which it shuts by itself
        self.open = threading.Event()
        self.open.set()

    @property
    def endpoint(self) -> str:
        """Where the way begins."""
        return f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open.set()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._server.accept()
                there = socket.create_connection(self._to)
                self._sockets += [here, there]
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, here: socket.socket, there: socket.socket) -> None:
        with suppress(OSError):
            while data := here.recv(65536):
                self.allows -= len(data)
                if self.allows < 0:
                    self.open.clear()
                self.open.wait()
                there.sendall(data)
            there.shutdown(socket.SHUT_WR)


@pytest.fixture
def tap(s3_endpoint: str) -> Iterator[Tap]:
    """The way to the server."""
    with Tap(s3_endpoint) as tap:
        yield tap


def held_up(it: Daemon, tap: Tap, count: int) -> list[str]:
    """Shut the way, save so many files one after the other; return their names, the newest first."""
    tap.open.clear()
    names = [f"{n}.pt" for n in range(count)]
    for n, name in enumerate(names):
        save(it.watch / name, b"weights %d" % n, age=count - n)
        it.wait_said("checkpoint_pinned", name=name)
    return names[::-1]


def the_next_life_sends(watch: Path, target: Target, names: list[str]) -> None:
    """What was held up, newest first, becomes durable although the trainer has deleted it."""
    for name in names:
        (watch / name).unlink()
    with daemon(watch, target) as again:
        for n, name in enumerate(names[::-1]):
            again.wait_durable(name, b"weights %d" % n)
        assert again.stop() == 0


# --- which signals ----------------------------------------------------------------------------------------


@pytest.mark.fault("E2")
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGHUP,
        pytest.param(signal.SIGTERM, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
    ],
)
@ON_ONE
def test_whoever_asks_for_the_end_gets_a_drain(
    watch: Path, target: Target, tap: Tap, number: signal.Signals
) -> None:
    """Newest first, but for the one that was being sent; then all is durable, and the code is 0."""
    with daemon(watch, replace(target, endpoint=tap.endpoint), "--workers", "1") as it:
        it.wait_ready()
        names = held_up(it, tap, 4)
        it.process.send_signal(number)
        assert it.wait_said("draining")["left"] == 4
        tap.open.set()
        assert it.ended() == 0
        sent = [each["name"] for each in it.events("checkpoint_committed")]
        assert sent == [names[-1], *names[:-1]]
        assert it.events()[-1]["event"] == "drained"
        assert it.events()[-1]["left"] == []
    assert sorted(target.listed()) == sorted(names)


@pytest.mark.long
@pytest.mark.fault("E2")
@ON_ONE
def test_a_hang_up_beside_the_signal_cuts_no_drain(watch: Path, target: Target, tap: Tap) -> None:
    """Some (systemd) send both at once: that is no second signal."""
    with daemon(watch, replace(target, endpoint=tap.endpoint)) as it:
        it.wait_ready()
        names = held_up(it, tap, 2)
        it.process.send_signal(signal.SIGTERM)
        it.wait_said("draining")
        it.process.send_signal(signal.SIGHUP)
        assert it.ask("/healthz") == (200, "ok\n")  # the loop has come round since
        tap.open.set()
        assert it.ended() == 0
    assert sorted(target.listed()) == sorted(names)


@pytest.mark.fault("E2")
@ON_ONE
def test_a_second_signal_ends_it_now(watch: Path, target: Target, tap: Tap) -> None:
    """It exits 3, although the store says nothing; it keeps the pins, and lists them."""
    with daemon(watch, replace(target, endpoint=tap.endpoint), "--drain-timeout", "3600") as it:
        it.wait_ready()
        names = held_up(it, tap, 3)
        it.process.send_signal(signal.SIGTERM)
        it.wait_said("draining")
        assert it.stop() == 3
        assert it.events()[-1]["event"] == "drained"
        assert it.events()[-1]["left"] == names
    the_next_life_sends(watch, target, names)


@pytest.mark.long
@pytest.mark.fault("E2")
@ON_ONE
def test_who_was_started_by_nohup_outlives_the_hang_up_and_every_broken_pipe(
    watch: Path, target: Target
) -> None:
    """Neither is taken for the end."""
    with daemon(watch, target, before=("nohup",)) as it:
        it.wait_ready()
        it.process.send_signal(signal.SIGHUP)
        it.process.send_signal(signal.SIGPIPE)
        save(watch / "a.pt", b"weights")
        it.wait_durable("a.pt")
        assert it.events("draining") == []
        assert it.stop() == 0


@pytest.mark.fault("E2")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_anything_has_begun_ends_it_quietly(watch: Path, number: signal.Signals) -> None:
    """Sent at the first sign of life: no traceback, and a code that a shell knows."""
    nowhere = Target("http://127.0.0.1:9", "models")
    with daemon(watch, nowhere) as it:
        until((watch / ".ckpt-sidecar").exists)
        it.process.send_signal(number)
        assert it.ended() in (0, 128 + number)


@pytest.mark.long
@pytest.mark.fault("E2")
@ON_ONE
def test_a_hang_up_reaches_the_trainer_as_it_is(watch: Path, target: Target) -> None:
    """Many take it for `read your settings again`, and go on; the sidecar drains when the trainer ends."""
    script = f"""
import signal, sys
hung_up = []
def again(*_):
    hung_up.append(1)
    open({str(watch.parent)!r} + f"/hung-up-{{len(hung_up)}}", "w")
signal.signal(signal.SIGHUP, again)
open({str(watch.parent / "up")!r}, "w")
while len(hung_up) < 2:
    signal.pause()
open({str(watch / "last.pt")!r}, "wb").write(b"the last words")
sys.exit(7)
"""
    with daemon(watch, target, "--", sys.executable, "-c", script) as it:
        it.until((watch.parent / "up").exists)
        for n in (1, 2):
            it.process.send_signal(signal.SIGHUP)
            until((watch.parent / f"hung-up-{n}").exists)
        assert it.ended() == 7
    assert target.holds("last.pt", b"the last words")


@pytest.mark.long
def test_a_hang_up_before_the_trainer_is_there_keeps_it_from_being_started(watch: Path) -> None:
    """Its exit code is not that of a trainer that has done its work."""
    with daemon(watch, Target("http://127.0.0.1:9", "models"), "--", "touch", str(watch / "trained")) as it:
        it.wait_said("not_ready")
        it.process.send_signal(signal.SIGHUP)
        assert it.ended() == 128 + signal.SIGHUP
    assert not (watch / "trained").exists()


# --- by when, and what is left ----------------------------------------------------------------------------


@pytest.mark.fault("E3")
@ON_ONE
def test_when_the_time_is_over_it_ends_and_lists_what_is_left_newest_first(
    watch: Path, target: Target, tap: Tap
) -> None:
    """Also with a store that says nothing at all: it waits for no socket. The next life does the rest."""
    with daemon(watch, replace(target, endpoint=tap.endpoint), "--drain-timeout", "1") as it:
        it.wait_ready()
        names = held_up(it, tap, 5)
        it.process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        assert it.ended() == 3
        assert time.monotonic() - asked < 30  # a socket's own patience is 60
        assert it.events()[-1]["event"] == "drained"
        assert it.events()[-1]["left"] == names
    the_next_life_sends(watch, target, names)


@pytest.mark.long
@pytest.mark.fault("E3")
@ON_ONE
def test_what_can_be_sent_in_time_is_the_newest(watch: Path, target: Target, tap: Tap) -> None:
    """The store wakes up late: the newest is durable, the rest is listed, and nothing is in both."""
    with daemon(
        watch, replace(target, endpoint=tap.endpoint), "--workers", "1", "--drain-timeout", "6"
    ) as it:
        it.wait_ready()
        names = held_up(it, tap, 40)
        it.process.send_signal(signal.SIGTERM)
        it.wait_said("draining")
        tap.open.set()
        it.until(lambda: len(it.events("checkpoint_committed")) >= 3)
        tap.open.clear()
        assert it.ended() == 3
        tap.open.set()
        sent = [each["name"] for each in it.events("checkpoint_committed")]
        left = it.events("drained")[-1]["left"]
    assert sent[0] == names[-1]  # it was being sent
    assert sent[1:] == names[: len(sent) - 1]
    assert left == names[len(sent) - 1 : -1]
    assert set(sent) <= set(target.listed())


@pytest.mark.long
@pytest.mark.fault("E3")
@ON_ONE
def test_a_restore_that_hangs_does_not_hold_up_the_end(watch: Path, target: Target, tap: Tap) -> None:
    """Asked to stop before it is ready, while the rest of the checkpoint never comes."""
    with daemon(watch.parent / "other", target) as first:
        first.wait_ready()
        body = save(first.watch / "a.pt", b"weights" * 3_000_000)
        first.wait_durable("a.pt")
        assert first.stop() == 0
    tap.allows = len(body) // 2
    with daemon(watch, replace(target, endpoint=tap.endpoint), "--drain-timeout", "1") as it:
        it.until(lambda: not tap.open.is_set())
        it.process.send_signal(signal.SIGTERM)
        assert it.ended() == 0
    assert not (watch / "a.pt").exists()
    with daemon(watch, target) as again:
        again.wait_ready()
        assert (watch / "a.pt").read_bytes() == body
        assert again.stop() == 0


# --- as PID 1 ---------------------------------------------------------------------------------------------

CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@cache
def has_pid_namespaces() -> bool:
    """Does the kernel let us make one?"""
    tried = subprocess.run([*CONTAINER, "true"], capture_output=True, timeout=SECONDS, check=False)
    return tried.returncode == 0


def children_of(pid: int) -> list[int]:
    """Return the processes that somebody outside of the namespace sees as its children."""
    found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(each) for text in found for each in text.split()]


def state_of(pid: int) -> str:
    """Return the letter of the process's state, Z for a zombie; "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class Container:
    """A sidecar that is PID 1 in a namespace of its own."""

    def __init__(self, it: Daemon) -> None:
        self.it = it
        (self.pid,) = it.until(lambda: children_of(it.process.pid))

    def zombies(self) -> list[int]:
        """Return its children that are dead and not buried."""
        return [pid for pid in children_of(self.pid) if state_of(pid) == "Z"]

    def stop(self, *numbers: signal.Signals) -> int:
        """Send it the signals, and return its exit code, which unshare passes on."""
        for number in numbers:
            os.kill(self.pid, number)
        return self.it.ended()


@contextmanager
def container(watch: Path, target: Target, *more: str) -> Iterator[Container]:
    """Run a sidecar as PID 1."""
    if not has_pid_namespaces():
        pytest.skip("no PID namespace to be had here")
    with daemon(watch, target, *more, before=CONTAINER) as it:
        yield Container(it)


# Leaves so many grandchildren behind: they are its own children's, whom it has waited for.
LEAVES_ORPHANS = """
import os, sys, time
def leave(seconds):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(seconds)
        os._exit(0)
    os.wait()
for n in range(5):
    leave(0.01)
"""


@pytest.mark.fault("E2", "E13")
@ON_ONE
def test_as_pid_1_with_a_trainer_no_zombie_stays(watch: Path, target: Target) -> None:
    """What its data loaders leave behind is buried; its own exit code is not taken from it."""
    script = f"""{LEAVES_ORPHANS}
import signal
signal.signal(signal.SIGTERM, lambda *_: (open({str(watch / "last.pt")!r}, "wb").write(b"last"), sys.exit(7)))
open({str(watch.parent / "left")!r}, "w")
while True:
    time.sleep(0.01)
"""
    with container(watch, target, "--", sys.executable, "-c", script) as its:
        its.it.until((watch.parent / "left").exists)
        its.it.until(lambda: len(children_of(its.pid)) == 1)  # the trainer alone
        assert its.zombies() == []
        assert its.stop(signal.SIGTERM) == 7
    assert target.holds("last.pt", b"last")


@pytest.mark.long
@pytest.mark.fault("E2")
@ON_ONE
def test_as_pid_1_without_a_trainer_it_drains_and_no_zombie_stays(
    watch: Path, target: Target, tap: Tap
) -> None:
    """Whoever is run in its container (`kubectl exec`) may leave orphans, too."""
    with container(watch, replace(target, endpoint=tap.endpoint), "--workers", "1") as its:
        its.it.until(lambda: its.it.events("ready"))
        inside = ["nsenter", f"--target={its.pid}", "--pid", sys.executable, "-c", LEAVES_ORPHANS]
        subprocess.run(inside, check=True, timeout=SECONDS)
        its.it.until(lambda: children_of(its.pid) == [])
        names = held_up(its.it, tap, 3)
        os.kill(its.pid, signal.SIGTERM)
        its.it.wait_said("draining")
        tap.open.set()
        assert its.it.ended() == 0
        sent = [each["name"] for each in its.it.events("checkpoint_committed")]
        assert sent == [names[-1], *names[:-1]]


@pytest.mark.long
@pytest.mark.fault("E2")
@ON_ONE
def test_as_pid_1_a_second_signal_ends_it_now(watch: Path, target: Target, tap: Tap) -> None:
    """With 3, and what is left is listed."""
    with container(watch, replace(target, endpoint=tap.endpoint)) as its:
        its.it.until(lambda: its.it.events("ready"))
        names = held_up(its.it, tap, 3)
        os.kill(its.pid, signal.SIGTERM)
        its.it.wait_said("draining")
        assert its.stop(signal.SIGINT) == 3
        assert its.it.events("drained")[-1]["left"] == names
