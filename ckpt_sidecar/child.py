"""The trainer as our child, for `-- COMMAND`: where no pod starts the two side by side."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence

# What a supervisor or a person sends to the job.
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOPS = frozenset({signal.SIGTERM, signal.SIGINT})


class CannotRun(Exception):
    """The command cannot be run; the message says which and why."""


class Child:
    """One process that shares our streams.

    Asked to stop it has `grace` seconds; then, or when asked once more, it is killed.
    """

    def __init__(self, command: Sequence[str], *, grace: float) -> None:
        self._command = command
        self._grace = grace
        self._process: asyncio.subprocess.Process | None = None
        self._asked = False

    async def run(self) -> int:
        """Start it and wait for its end; its exit code as a shell gives it (128 + n for signal n).

        Raises CannotRun when there is no such command.
        """
        try:
            self._process = await asyncio.create_subprocess_exec(*self._command)
        except OSError as error:
            raise CannotRun(f"cannot run {self._command[0]!r}: {error.strerror}") from error
        code = await self._process.wait()
        return 128 - code if code < 0 else code

    def send(self, number: signal.Signals) -> bool:
        """Pass a signal on; False when there is no child (yet, or any more)."""
        if self._process is None or self._process.returncode is not None:
            return False
        if number in STOPS and self._asked:
            self._process.kill()
            return True
        if number in STOPS:
            self._asked = True
            asyncio.get_running_loop().call_later(self._grace, self._kill)
        self._process.send_signal(number)
        return True

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
