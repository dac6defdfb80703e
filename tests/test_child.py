"""The trainer as our child: its signals reach it, its exit code reaches us, and it always ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckpt_sidecar import child as child_module
from ckpt_sidecar.child import FORWARDED, STOPS, CannotRun, Child, reap_orphans

LONG = 60.0  # seconds of grace that no test waits for

# It says what it gets, and ends at SIGUSR2 with the number of signals that it got.
SAYS_SIGNALS = """
import os, signal, sys
got = []
def say(number, _frame):
    got.append(number)
    os.write(1, b"%d\\n" % number)
    if number == signal.SIGUSR2:
        os._exit(len(got))
for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(each, say)
print("up", flush=True)
while True:
    signal.pause()
"""


class Trainer:
    """A child that runs a script, and what it prints."""

    def __init__(self, path: Path, script: str, *, grace: float = LONG) -> None:
        os.mkfifo(path)
        words = f"import os; os.dup2(os.open({str(path)!r}, os.O_WRONLY), 1)\n{script}"
        self.child = Child([sys.executable, "-c", words], grace=grace)
        self.running = asyncio.ensure_future(self.child.run())
        self._reader = asyncio.StreamReader()
        self._path = path

    async def line(self) -> str:
        """Return the next line that it prints."""
        if self._path.exists():
            await self._listen()
        return (await asyncio.wait_for(self._reader.readline(), 30)).decode().strip()

    async def _listen(self) -> None:
        pipe = await asyncio.to_thread(self._path.open, "rb", buffering=0)
        self._path.unlink()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(self._reader), pipe)

    async def end(self) -> int:
        """Return its exit code, once it has ended."""
        return await asyncio.wait_for(self.running, 30)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """Where a trainer's lines come through."""
    return tmp_path / "pipe"


def python(script: str) -> Child:
    """Make a child that runs a script."""
    return Child([sys.executable, "-c", script], grace=LONG)


# --- how it ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("", 0),
        ("raise SystemExit(3)", 3),
        ("raise SystemExit(255)", 255),
        ("import os; os.kill(os.getpid(), 9)", 128 + 9),
        ("import os; os.kill(os.getpid(), 11)", 128 + 11),
        ("import os; os.kill(os.getpid(), 15)", 128 + 15),
        ("import os; os.abort()", 128 + 6),
    ],
)
@pytest.mark.fault("E13")
async def test_its_exit_code_is_as_a_shell_gives_it(script: str, code: int) -> None:
    """128 and the signal's number, where a signal ended it."""
    assert await python(script).run() == code


async def test_it_gets_its_words_as_they_are() -> None:
    """No shell reads them."""
    script = "import sys; raise SystemExit(sys.argv[1:] != ['a b', '$HOME', '*', '--', ''])"
    assert await Child([sys.executable, "-c", script, "a b", "$HOME", "*", "--", ""], grace=LONG).run() == 0


async def test_a_command_that_is_not_there_is_named() -> None:
    """With the reason that the system gives."""
    with pytest.raises(CannotRun, match=r"cannot run 'no-such-program': No such file or directory"):
        await Child(["no-such-program", "--flag"], grace=LONG).run()


async def test_a_command_that_cannot_be_executed_is_named(tmp_path: Path) -> None:
    """A script without its x bit, or a directory; or what is no program at all."""
    script = tmp_path / "train.sh"
    script.write_text("#!/bin/sh\n")
    for path in (script, tmp_path):
        with pytest.raises(CannotRun, match=rf"cannot run '{path}': Permission denied"):
            await Child([str(path)], grace=LONG).run()
    script.write_bytes(b"\x7fELF, or not")
    script.chmod(0o755)
    with pytest.raises(CannotRun, match="Exec format error"):
        await Child([str(script)], grace=LONG).run()


# --- signals --------------------------------------------------------------------------------------------


async def test_signals_are_passed_on(pipe: Path) -> None:
    """All that a supervisor sends to a job; those that ask for no stop as often as they come."""
    trainer = Trainer(pipe, SAYS_SIGNALS)
    assert await trainer.line() == "up"
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        assert trainer.child.send(number)
        assert await trainer.line() == str(int(number))
    assert trainer.child.send(signal.SIGUSR2)
    assert await trainer.end() == 6
    assert set(FORWARDED) > STOPS == {signal.SIGTERM, signal.SIGINT}


async def test_a_trainer_that_stops_when_asked_has_the_last_word(pipe: Path) -> None:
    """It saves, and its own code counts."""
    script = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(7)))
print("up", flush=True)
signal.pause()
"""
    trainer = Trainer(pipe, script)
    assert await trainer.line() == "up"
    assert trainer.child.send(signal.SIGTERM)
    assert await trainer.line() == "saved"
    assert await trainer.end() == 7


@pytest.mark.parametrize("first", sorted(STOPS))
@pytest.mark.parametrize("second", sorted(STOPS))
@pytest.mark.fault("E13")
async def test_a_second_stop_kills(pipe: Path, first: signal.Signals, second: signal.Signals) -> None:
    """Whoever asks twice does not want to wait for the grace to end."""
    trainer = Trainer(pipe, SAYS_SIGNALS)
    assert await trainer.line() == "up"
    assert trainer.child.send(first)
    assert await trainer.line() == str(int(first))
    assert trainer.child.send(second)
    assert await trainer.end() == 128 + 9


@pytest.mark.fault("E13")
async def test_a_trainer_that_does_not_stop_is_killed_when_its_grace_is_over(pipe: Path) -> None:
    """And not before."""
    trainer = Trainer(pipe, SAYS_SIGNALS, grace=0.3)
    assert await trainer.line() == "up"
    began = time.monotonic()
    assert trainer.child.send(signal.SIGTERM)
    assert await trainer.line() == "15"
    assert await trainer.end() == 128 + 9
    assert time.monotonic() - began >= 0.3


async def test_other_signals_start_no_grace(pipe: Path) -> None:
    """A trainer that saves at SIGUSR1 goes on."""
    trainer = Trainer(pipe, SAYS_SIGNALS, grace=0.0)
    assert await trainer.line() == "up"
    for _ in range(3):
        assert trainer.child.send(signal.SIGUSR1)
        assert await trainer.line() == str(int(signal.SIGUSR1))
    assert trainer.child.send(signal.SIGUSR2)
    assert await trainer.end() == 4


# --- before and after -----------------------------------------------------------------------------------


async def test_a_signal_before_the_start_is_told_to_have_met_nobody() -> None:
    """Then it is the sidecar's own; one that asks for no stop changes nothing."""
    child = python("raise SystemExit(3)")
    assert not child.send(signal.SIGUSR1)
    assert await child.run() == 3


@pytest.mark.parametrize("number", sorted(STOPS))
async def test_a_trainer_is_not_started_after_a_stop(tmp_path: Path, number: signal.Signals) -> None:
    """It would run on with nobody to stop it; its code says what would have ended it."""
    child = Child([sys.executable, "-c", f"open({str(tmp_path / 'started')!r}, 'w')"], grace=LONG)
    assert not child.send(number)
    assert not child.send(number)
    assert await child.run() == 128 + number
    assert list(tmp_path.iterdir()) == []


async def test_a_stop_while_it_is_being_started_is_not_lost() -> None:
    """It is passed on as soon as there is somebody to get it."""
    child = python("import signal; signal.pause()")
    running = asyncio.ensure_future(child.run())
    await asyncio.sleep(0)  # it has begun, and waits for the process
    assert child.send(signal.SIGTERM)
    assert await asyncio.wait_for(running, 30) == 128 + 15


async def test_a_second_stop_while_it_is_being_started_kills() -> None:
    """As at any other time."""
    child = python("import signal; signal.signal(15, signal.SIG_IGN); signal.pause()")
    running = asyncio.ensure_future(child.run())
    await asyncio.sleep(0)
    assert child.send(signal.SIGTERM)
    assert child.send(signal.SIGINT)
    assert await asyncio.wait_for(running, 30) in (128 + 15, 128 + 9)  # the first may be enough


async def test_a_signal_after_its_end_is_told_to_have_met_nobody() -> None:
    """A stop of the sidecar itself, which drains; and no process that has its number by now is hit."""
    child = python("raise SystemExit(3)")
    assert await child.run() == 3
    assert not child.send(signal.SIGTERM)
    assert not child.send(signal.SIGTERM)
    assert not child.send(signal.SIGUSR1)


async def test_signals_while_it_ends_do_not_cost_its_exit_code(pipe: Path) -> None:
    """Whoever looks whether it lives must not take its code away from who waits for it."""
    script = """
import os, signal
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
print("up", flush=True)
while True:
    pass
"""
    trainer = Trainer(pipe, script)
    assert await trainer.line() == "up"
    assert trainer.child.send(signal.SIGTERM)
    while not trainer.running.done():
        trainer.child.send(signal.SIGUSR1)
        await asyncio.sleep(0)
    assert await trainer.end() == 7


# --- what others leave behind -----------------------------------------------------------------------------


async def gone(pid: int) -> None:
    """Wait until the process has been buried."""
    async with asyncio.timeout(10):
        while Path(f"/proc/{pid}").exists():
            await asyncio.sleep(0.01)


@pytest.mark.fault("E2", "E13")
async def test_who_is_dead_and_waited_for_by_nobody_is_buried_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As PID 1 one gets the orphans; our own child's exit code is ours."""
    monkeypatch.setattr(child_module, "ORPHAN_SECONDS", 0.1)
    burying = asyncio.ensure_future(reap_orphans())
    orphan = subprocess.Popen(["true"])
    trainer = asyncio.ensure_future(python("import time; time.sleep(0.5); raise SystemExit(7)").run())
    await gone(orphan.pid)
    assert await trainer == 7
    burying.cancel()
    assert orphan.wait() == 0  # nobody is there to tell its code any more
