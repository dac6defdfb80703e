"""The sidecar itself, as a process of its own: what a save costs from the rename to the commit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from lab import BUCKET, CACHE, Cost, Server, cpu_of, rss_of

SIDECAR = str(Path(sys.executable).with_name("ckpt-sidecar"))
POLL = 0.002  # seconds
SECONDS = 600.0
_numbers = count()


@dataclass
class Sidecar:
    """A daemon that runs."""

    watch: Path
    log: Path
    process: subprocess.Popen[bytes]
    began: float
    _read: int = 0
    _events: list[dict[str, Any]] = field(default_factory=list)
    _counts: Counter[str] = field(default_factory=Counter)

    def events(self) -> list[dict[str, Any]]:
        """All that it has logged so far."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        new = [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]
        self._events += new
        self._counts.update(each["event"] for each in new)
        return self._events

    def _count(self, event: str) -> int:
        self.events()
        return self._counts[event]

    def until(self, event: str, n: int = 1) -> float:
        """Wait for the n-th such event; return how long after the start it was seen."""
        while self._count(event) < n:
            if self.process.poll() is not None or time.monotonic() - self.began > SECONDS:
                raise RuntimeError(f"no {event}:\n{self.log.read_text()[-2000:]}")
            time.sleep(POLL)
        return time.monotonic() - self.began

    def place(self, file: Path, name: str) -> None:
        """Save, as a trainer that writes under another name and renames; no byte is copied."""
        temporary = self.watch / f"{name}.tmp"
        os.link(file, temporary)
        temporary.rename(self.watch / name)


def new_watch() -> Path:
    """Return an empty directory beside the checkpoints, so that they can be linked."""
    path = CACHE / "watch" / str(next(_numbers))
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


@contextmanager
def sidecar(server: Server, prefix: str, *more: str, watch: Path | None = None) -> Iterator[Sidecar]:
    """Run the daemon; at the end it drains."""
    watch = watch or new_watch()
    log = watch.with_suffix(".log")
    words = [
        SIDECAR,
        "--watch",
        str(watch),
        "--bucket",
        BUCKET,
        "--prefix",
        prefix,
        "--listen",
        "127.0.0.1:0",
    ]
    with log.open("wb") as out:
        began = time.monotonic()
        process = subprocess.Popen(
            [*words, "--log-format", "json", *more],
            env=os.environ | server.environment(),
            stdout=out,
            stderr=out,
        )
    try:
        yield Sidecar(watch, log, process, began)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def upload(server: Server, file: Path, prefix: str, *more: str) -> Cost:
    """What the daemon spends on one save, from the rename to the commit; its start is not in it."""
    with sidecar(server, prefix, *more) as it:
        it.until("ready")
        time.sleep(0.2)
        before, began = cpu_of(it.process.pid), time.monotonic()
        it.place(file, "step_1.pt")
        it.until("checkpoint_committed")
        wall = time.monotonic() - began
        cost = Cost(wall, cpu_of(it.process.pid) - before, rss_of(it.process.pid))
    shutil.rmtree(it.watch)
    return cost


def restore_words(prefix: str, watch: Path) -> Sequence[str]:
    """The command that restores once."""
    return [SIDECAR, "restore", "--watch", str(watch), "--bucket", BUCKET, "--prefix", prefix]
