"""The stage that the demo is played on: a directory, processes with their logs, and what is said."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ


class Failed(Exception):
    """The demo could not go on; the message says what was waited for."""


# --- what is said --------------------------------------------------------------------------------------


def painted(text: str, code: int) -> str:
    """Return the text in a colour, on a terminal."""
    return f"\033[{code}m{text}\033[0m" if COLOUR else text


def headline(text: str) -> None:
    """Begin the next act."""
    print(f"\n{painted(text, 1)}", flush=True)


def say(text: str) -> None:
    """Tell one thing that happened."""
    print(f"   {text}", flush=True)


# --- processes -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Child:
    """A process of ours, and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def lines(self) -> list[str]:
        """Return what it has said so far, by whole lines."""
        return self.log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]

    def end(self, number: signal.Signals, *, seconds: float = 30) -> int:
        """Send the signal and wait; return the exit code."""
        self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float) -> int:
        """Wait for the end; return the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.name} has not ended after {seconds:.0f} s") from None


@dataclass(slots=True)
class Stage:
    """The directory in which all of it happens, and every process that was started."""

    home: Path
    children: list[Child] = field(default_factory=list)

    def start(self, name: str, *words: str | Path) -> Child:
        """Start `python WORDS…`, with its output in a file."""
        log = self.home / f"{name}.log"
        with log.open("wb") as output:
            command = [sys.executable, *map(str, words)]
            process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)  # noqa: S603
        child = Child(name, process, log)
        self.children.append(child)
        return child

    def close(self) -> None:
        """End whatever still runs."""
        for child in self.children:
            child.process.kill()
        for child in self.children:
            child.process.wait()

    def show_logs(self) -> None:
        """Show how every process' output ends."""
        for child in self.children:
            code = child.process.poll()
            headline(f"{child.name} ({'running' if code is None else f'exit code {code}'}), {child.log}:")
            for line in child.lines()[-15:]:
                say(line[:300])


@contextlib.contextmanager
def stage(*, keep: bool) -> Iterator[Stage]:
    """Make a stage, and clear it away afterwards, however the play ends."""
    made = Stage(Path(tempfile.mkdtemp(prefix="ckpt-sidecar-demo-")))
    try:
        yield made
    except Exception:
        made.show_logs()
        raise
    finally:
        made.close()
        if keep:
            say(f"kept: {made.home}")
        else:
            shutil.rmtree(made.home)


def until(what: str, look: Callable[[], T | None], *, needs: tuple[Child, ...], seconds: float = 30) -> T:
    """Look again and again until there is something; Failed in time, or when a process it needs has ended."""
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        dead = [child for child in needs if child.process.poll() is not None]
        if dead:
            raise Failed(f"{dead[0].name} ended (exit code {dead[0].process.returncode}) before {what}")
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.02)
    return found


def fetch(url: str) -> bytes | None:
    """Return what the URL answers, or None while it does not answer with success."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  (our own, on this machine)
            body: bytes = answer.read()
            return body
    except (OSError, urllib.error.HTTPError):
        return None


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
