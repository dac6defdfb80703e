"""What the benchmarks stand on: a checkpoint, a certificate, the server; and what it costs to run something.

Times are wall-clock seconds, CPU seconds are user and system of a process and its children, memory is the
peak of the resident set of the process and of its threads, in bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

import boto3

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CACHE = ROOT / ".cache" / "bench"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
# Where what comes down is put: no disk is measured here, and no fsync, which only ours does.
# Two checkouts do not meet there.
_NAME = f"ckpt-sidecar-bench-{zlib.crc32(str(ROOT).encode()):08x}"
DOWN = (SHARED_MEMORY if SHARED_MEMORY.is_dir() else CACHE) / _NAME
MIB = 1 << 20
BUCKET = "bench"
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run took."""

    wall: float
    cpu: float
    rss: int


# --- things ---------------------------------------------------------------------------------------------


def checkpoint(size: int) -> Path:
    """Return a whole checkpoint of about so many bytes: an archive as torch writes it, of random bytes."""
    path = CACHE / f"checkpoint-{size}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        block = os.urandom(min(size, 16 * MIB))
        record = "archive/data/0"
        with zipfile.ZipFile(temporary, "w") as archive, archive.open(record, "w", force_zip64=True) as data:
            for n in range(size // len(block)):
                data.write(n.to_bytes(8, "big") + block[8:])
        temporary.rename(path)
    with path.open("rb", buffering=0) as file:  # into the page cache: no disk is measured here
        while file.read(16 * MIB):
            pass
    return path


def certificates() -> tuple[Path, Path, Path]:
    """Return a certificate for 127.0.0.1, its key, and the authority that has signed it."""
    made, key, authority = (CACHE / name for name in ("server.pem", "server.key", "authority.pem"))
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        new = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650"]
        theirs = str(CACHE / "authority.key")
        run("openssl", *new, "-subj", "/CN=bench", "-keyout", theirs, "-out", str(authority))
        by = ["-CA", str(authority), "-CAkey", theirs, "-addext", "basicConstraints=CA:FALSE"]
        of = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
        run("openssl", *new, *by, *of, "-keyout", str(key), "-out", str(made))
    return made, key, authority


def built(name: str, *libraries: str) -> Path:
    """Return a program of ours in C, built if it is not."""
    source, made = HERE / f"{name}.c", CACHE / name
    if not made.exists() or made.stat().st_mtime < source.stat().st_mtime:
        CACHE.mkdir(parents=True, exist_ok=True)
        run("cc", "-O2", "-Wall", "-Wextra", "-pthread", str(source), "-o", str(made), *libraries)
    return made


def end_on_sigterm() -> None:
    """Let SIGTERM end a benchmark as an error does: what it has started ends too, what it made is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))


def run(*words: str) -> None:
    """Run a command that has to succeed."""
    if shutil.which(words[0]) is None:
        raise SystemExit(f"{words[0]} is needed (Debian: build-essential, libssl-dev, openssl)")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")


# --- the server -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs."""

    url: str
    pid: int

    def environment(self) -> dict[str, str]:
        """What any client finds it by."""
        return {
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "benchbench",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CA_BUNDLE": str(certificates()[2]),
            "SSL_CERT_FILE": str(certificates()[2]),
        }

    def cpu(self) -> float:
        """CPU seconds that it has used."""
        return cpu_of(self.pid)


@contextmanager
def serving(content: Path, *, tls: bool, link: float = 0) -> Iterator[Server]:
    """Run the server; large objects have the bytes of `content`, a connection carries `link` MiB/s."""
    binary = built("server", "-lssl", "-lcrypto")
    far = ["-l", str(link)] if link else []
    words = [str(binary), *far, "0", str(content), *(map(str, certificates()[:2]) if tls else ())]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield Server(f"http{'s' if tls else ''}://127.0.0.1:{port}", process.pid)
    finally:
        process.kill()
        process.wait()


@cache
def s3(server: Server) -> Any:
    """Return a client of the server, for what is not measured."""
    at = server.environment()
    return boto3.client("s3", endpoint_url=server.url, verify=at.get("AWS_CA_BUNDLE"), **credentials(at))


def credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """What the environment names of them, as boto3 is told; it finds the others itself."""
    named = {
        "aws_access_key_id": "AWS_ACCESS_KEY_ID",
        "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
        "region_name": "AWS_REGION",
    }
    return {name: environment[variable] for name, variable in named.items() if variable in environment}


def size_of(server: Server, key: str) -> int:
    """The size of the object in bytes, -1 where there is none: a client's word is not enough."""
    try:
        return int(s3(server).head_object(Bucket=BUCKET, Key=key)["ContentLength"])
    except s3(server).exceptions.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != HTTPStatus.NOT_FOUND:
            raise
        return -1


def erase(server: Server, prefix: str) -> None:
    """Delete all objects with that prefix."""
    pages = s3(server).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    for each in [each for page in pages for each in page.get("Contents", [])]:
        s3(server).delete_object(Bucket=BUCKET, Key=each["Key"])


def counts(server: Server) -> dict[str, int]:
    """How often each operation was asked so far, and how many bytes came and went."""
    with urllib.request.urlopen(f"{server.url}/-/counts") as answer:
        return dict(json.load(answer))


# --- what it costs --------------------------------------------------------------------------------------


def warm(size: int) -> None:
    """Take so much memory and free it again.

    A virtual machine may give free memory back to its host within seconds; whoever is the next to write to it
    pays for that, three times the time of the writing itself where this was seen.
    """
    path, block = DOWN / "warm", bytes(MIB)
    with path.open("wb", buffering=0) as file:
        for _ in range(0, size, MIB):
            file.write(block)
    path.unlink()


def cost_of(words: Sequence[str], environment: Mapping[str, str]) -> Cost:
    """Run a command to its end, which has to be a success."""
    log, figures = CACHE / "last.log", CACHE / "last.cost"
    measured = [str(built("cost")), str(figures), *words]
    with log.open("wb") as out:
        environment = os.environ | dict(environment)
        done = subprocess.run(measured, env=environment, stdout=out, stderr=out, cwd=CACHE, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{log.read_text()[-2000:]}")
    wall, user, system, kib = figures.read_text().split()
    return Cost(float(wall), float(user) + float(system), int(kib) * 1024)


def cpu_of(pid: int) -> float:
    """CPU seconds that a living process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def rss_of(pid: int, what: str = "VmHWM") -> int:
    """The peak (or VmRSS: the present) resident set of a living process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(what)
