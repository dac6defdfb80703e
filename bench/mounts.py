"""A bucket that is mounted as a directory: to save is to copy the file there, until the bucket has it all.

What a mount keeps on the local disk while it writes or reads is kept in memory here, as all that comes down.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lab import BUCKET, CACHE, DOWN, Cost, Server, cost_of, cpu_of, rss_of, size_of

MOUNTS = ("rclone mount", "s3fs-fuse mount")
RCLONE = str(CACHE / "venv" / "bin" / "rclone")
LOG = CACHE / "mount.log"
START = 20.0  # seconds
DURABLE = 600.0  # seconds
POLL = 0.02  # seconds


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount that is there."""

    at: Path
    pid: int


def rclone_remote(server: Server) -> Sequence[str]:
    """How rclone is told of the server."""
    provider = ["--s3-provider", "Other", "--s3-env-auth", "--s3-no-check-bucket"]
    return [*provider, "--s3-endpoint", server.url]


def words(name: str, server: Server, *, at: Path, scratch: Path) -> Sequence[str]:
    """The command that mounts, and stays until it is unmounted."""
    if name == "rclone mount":
        cached = ["--vfs-cache-mode", "writes", "--vfs-write-back", "0s", "--cache-dir", str(scratch)]
        return [RCLONE, "mount", f":s3:{BUCKET}", str(at), *cached, *rclone_remote(server)]
    options = f"url={server.url},use_path_request_style,tmpdir={scratch}"
    return ["s3fs", BUCKET, str(at), "-f", "-o", options]


@contextmanager
def mounted(name: str, server: Server) -> Iterator[Mount]:
    """Mount; at the end it is unmounted, and the process has ended."""
    DOWN.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=DOWN) as place, LOG.open("wb") as log:
        at, scratch = Path(place, "mount"), Path(place, "scratch")
        at.mkdir()
        scratch.mkdir()
        environment = os.environ | server.environment()
        if "AWS_CA_BUNDLE" in environment:
            environment["CURL_CA_BUNDLE"] = environment["AWS_CA_BUNDLE"]
        command = words(name, server, at=at, scratch=scratch)
        with_us = ["setpriv", "--pdeathsig", "TERM"]  # it unmounts and ends, however the benchmark ends
        process = subprocess.Popen([*with_us, *command], env=environment, stdout=log, stderr=log)
        try:
            wait_for(process, at)
            yield Mount(at, process.pid)
        finally:
            end(process, at)


def wait_for(process: subprocess.Popen[bytes], at: Path) -> None:
    """Wait until it is mounted."""
    deadline = time.monotonic() + START
    while not at.is_mount():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"nothing is mounted:\n{LOG.read_text()[-2000:]}")
        time.sleep(POLL)


def end(process: subprocess.Popen[bytes], at: Path) -> None:
    """Unmount, and wait for the process, which ends by that; one that does not is killed."""
    unmount = ["fusermount3", "-uz", str(at)]
    subprocess.run(unmount, capture_output=True, check=False)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        subprocess.run(unmount, capture_output=True, check=False)


def usable(server: Server) -> list[str]:
    """The mounts that work on this machine; of each other one line says why it does not."""
    found = []
    for name in MOUNTS:
        flaw = flaw_of(name, server)
        if flaw:
            print(f"{name}: skipped, {flaw}", file=sys.stderr, flush=True)
        else:
            found.append(name)
    return found


def flaw_of(name: str, server: Server) -> str:
    """Why it cannot be mounted here; nothing if it can."""
    program = words(name, server, at=CACHE, scratch=CACHE)[0]
    for each in (program, "fusermount3", "setpriv"):
        if shutil.which(each) is None:
            return f"{each} is not here"
    try:
        with mounted(name, server):
            return ""
    except RuntimeError as error:
        return " ".join(str(error).split())


def copied_to(name: str, server: Server, file: Path) -> Cost:
    """What it costs from the copy's begin until the bucket has it all."""
    with mounted(name, server) as mount:
        target = mount.at / "mounted.pt"
        before, began = cpu_of(mount.pid), time.monotonic()
        copy = cost_of(["cp", str(file), str(target)], {})
        while size_of(server, target.name) != file.stat().st_size:
            if time.monotonic() - began > DURABLE:
                raise RuntimeError(f"{name} has not put it there:\n{LOG.read_text()[-2000:]}")
            time.sleep(POLL)
        wall = time.monotonic() - began
        cost = Cost(wall, cpu_of(mount.pid) - before + copy.cpu, rss_of(mount.pid) + copy.rss)
        target.unlink()
    return cost


def copied_from(name: str, server: Server, key: str, *, target: Path) -> Cost:
    """What it costs to copy an object from a mount that has not read it before."""
    with mounted(name, server) as mount:
        before = cpu_of(mount.pid)
        copy = cost_of(["cp", str(mount.at / key), str(target)], {})
        cost = Cost(copy.wall, cpu_of(mount.pid) - before + copy.cpu, rss_of(mount.pid) + copy.rss)
    if target.stat().st_size != size_of(server, key):
        raise RuntimeError(f"{name} has got something else")
    target.unlink()
    return cost
