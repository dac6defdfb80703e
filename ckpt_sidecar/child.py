"""The trainer as our child, for `-- COMMAND`: where no pod starts the two side by side."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

ORPHAN_SECONDS = 1.0
# What a supervisor or a person sends to the job.
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOPS = frozenset({signal.SIGTERM, signal.SIGINT})
# A hang-up ends who has no trainer to pass it on to. It is no second stop: systemd may send both at once.
ENDS = STOPS | {signal.SIGHUP}


class CannotRun(Exception):
    """The command cannot be run; the message says which and why."""


class Child:
    """One process that shares our streams.

    Asked to stop it has `grace` seconds; then, or when asked once more, it is killed. A stop that comes
    before the start keeps it from being started.
    """

    def __init__(self, command: Sequence[str], *, grace: float) -> None:
        self._command = command
        self._grace = grace
        self._process: asyncio.subprocess.Process | None = None
        self._stop: signal.Signals | None = None
        self._starting = False
        self._early: list[signal.Signals] = []

    @property
    def stopped(self) -> int:
        """The exit code that stands for the stop that it was asked for, as a shell gives it; else 0."""
        return 0 if self._stop is None else 128 + self._stop

    async def run(self) -> int:
        """Start it and wait for its end; its exit code as a shell gives it (128 + n for signal n).

        Raises CannotRun when there is no such command.
        """
        if self.stopped:
            return self.stopped
        self._starting = True
        try:
            self._process = await asyncio.create_subprocess_exec(*self._command)
        except OSError as error:
            raise CannotRun(f"cannot run {self._command[0]!r}: {error.strerror}") from error
        finally:
            self._starting = False
        for number in self._early:
            self.send(number)
        try:
            code = await self._process.wait()
        except asyncio.CancelledError:  # we are about to end without it: nobody trains on unobserved
            await self._end(self._process)
            raise
        return 128 - code if code < 0 else code

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Ask it to stop; kill it when its grace is over."""
        self._signal(signal.SIGTERM)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._grace):
                    await process.wait()
        finally:
            self._signal(signal.SIGKILL)
        await process.wait()

    def send(self, number: signal.Signals, *, has_it: bool = False) -> bool:
        """Pass a signal on; False when there is no child (yet, or any more).

        One that comes while the child is being started is passed on as soon as it has been. `has_it`: the
        child has got it already, from the terminal; it is asked to stop all the same.
        """
        if self._starting:
            self._early.append(number)
            return True
        if number in STOPS and self._stop is not None:
            number = signal.SIGKILL
        elif number in STOPS or (number in ENDS and self._process is None):
            self._stop = number
            if self._process is not None:
                asyncio.get_running_loop().call_later(self._grace, self._signal, signal.SIGKILL)
        if has_it and number is not signal.SIGKILL and self._process is not None:
            return self._process.returncode is None
        return self._signal(number)

    def _signal(self, number: signal.Signals) -> bool:
        """Not by the process's own methods: they may reap it, and then its exit code is lost."""
        if self._process is None or self._process.returncode is not None:
            return False
        with suppress(ProcessLookupError):  # it has just ended, and that is not yet told
            os.kill(self._process.pid, number)
        return True


async def reap_orphans() -> None:
    """As PID 1: bury the processes that ended as ours because their parents were gone; for ever.

    One that is still to be buried after a second is such a one: who starts a process waits for its end.
    """
    dead: set[int] = set()
    while True:
        dead = _reap(dead)
        await asyncio.sleep(ORPHAN_SECONDS)


def _reap(dead: set[int]) -> set[int]:
    """Bury those that were dead already; return those that have died since."""
    unburied = {pid for pid in _children() if os.waitid(os.P_PID, pid, _JUST_LOOK) is not None}
    for pid in unburied & dead:
        os.waitpid(pid, os.WNOHANG)
    return unburied - dead


_JUST_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT


def _children() -> Iterator[int]:
    for thread in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # that thread has just ended
            yield from map(int, thread.read_text().split())
