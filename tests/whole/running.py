"""The sidecar as a process of its own: started, asked over HTTP, read by its log, and always ended.

Nothing here waits for a fixed time: it looks again and again, until a deadline.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar

from botocore.exceptions import FlexibleChecksumError
from urllib3.exceptions import ProtocolError

from tests.conftest import SERVERS, admin, create_bucket

T = TypeVar("T")
SECONDS = 40.0  # for whatever is waited for; nothing here takes nearly so long
CHOICES = ("--settle", "0.2", "--rescan-every", "0.3", "--listen", "127.0.0.1:0", "--log-format", "json")
HOME = ".ckpt-sidecar"
_SAMPLE = re.compile(r"^(?P<name>[a-z_]+(?:\{.*\})?) (?P<value>\S+)$", re.MULTILINE)


def until(look: Callable[[], T | None], what: str = "", *, seconds: float = SECONDS) -> T:
    """Look again and again until there is something to see, and return it."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"in vain: {what or look}"
        time.sleep(0.02)
    return seen


@cache
def powerless() -> Sequence[str] | None:
    """Return what to put before a command so that permissions hold for it; None where that cannot be.

    Root keeps its uid, and so the files that are its own, but not its power over permissions.
    """
    if os.geteuid() != 0:
        return ()
    words = ("setpriv", "--inh-caps=-all", "--bounding-set=-all")
    if shutil.which(words[0]) is None:
        return None
    tried = subprocess.run([*words, "true"], capture_output=True, timeout=SECONDS, check=False)
    return words if tried.returncode == 0 else None


# --- where the checkpoints go -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """A bucket on a real server and a prefix in it, seen past the sidecar."""

    endpoint: str
    bucket: str
    prefix: str = "team/run/"

    @classmethod
    def new(cls, endpoint: str) -> Self:
        """Make a fresh bucket."""
        return cls(endpoint, create_bucket(endpoint))

    def read(self, name: str) -> bytes | None:
        """Return the bytes of the object of that name; None when there is none.

        rclone's server cuts an answer off while the object is replaced, or sends the new bytes with the old
        checksum: that is no answer, and asked again.
        """
        client = admin(self.endpoint)
        for _ in range(5):
            with suppress(ProtocolError, FlexibleChecksumError):
                try:
                    answer = client.get_object(Bucket=self.bucket, Key=self.prefix + name)
                except (client.exceptions.NoSuchKey, client.exceptions.NoSuchBucket):
                    return None
                body: bytes = answer["Body"].read()
                return body
        raise AssertionError(f"{name} is never whole")

    def write(self, name: str, body: bytes) -> None:
        """Write an object as a stranger would."""
        admin(self.endpoint).put_object(Bucket=self.bucket, Key=self.prefix + name, Body=body)

    def names(self) -> set[str]:
        """Return the names of all objects but `latest.json`; the bucket is read to its end."""
        pages = admin(self.endpoint).get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        keys = {each["Key"] for page in pages for each in page.get("Contents", ())}
        assert all(key.startswith(self.prefix) for key in keys), keys
        return {key.removeprefix(self.prefix) for key in keys} - {"latest.json"}

    def listed(self) -> list[str]:
        """Return the names in `latest.json`, newest first."""
        raw = self.read("latest.json")
        return [] if raw is None else [each["name"] for each in json.loads(raw)["checkpoints"]]

    def holds(self, name: str, body: bytes) -> bool:
        """Is the file durable, byte for byte?"""
        return name in self.listed() and self.read(name) == body


# --- the sidecar ---------------------------------------------------------------------------------------


class Daemon:
    """One sidecar's process; use `daemon` to make one, so that it ends."""

    def __init__(
        self,
        watch: Path,
        target: Target,
        *more: str,
        env: Mapping[str, str],
        before: Sequence[str],
        log: Path | None,
    ) -> None:
        self.watch = watch
        self.target = target
        self._log = log or watch.parent / f"{watch.name}-{time.monotonic_ns()}.log"
        store = ("--bucket", target.bucket, "--prefix", target.prefix, "--endpoint-url", target.endpoint)
        unfenced = ("--allow-unfenced",) if target.endpoint == SERVERS.get("rclone") else ()
        words = ("-m", "ckpt_sidecar", "--watch", str(watch), *store, *CHOICES, *unfenced, *more)
        with self._log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*before, sys.executable, *words],
                env=_environment(env),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )

    # --- what it says ---

    @property
    def said(self) -> str:
        """All that it has said so far."""
        return self._log.read_text(encoding="utf-8", errors="backslashreplace")

    def events(self, event: str = "", **having: Any) -> list[dict[str, Any]]:
        """Return the log's events of that name which have these fields; a text need only be in its field."""
        lines = [line for line in self.said.split("\n")[:-1] if line.startswith("{")]
        return [each for each in map(json.loads, lines) if _is(each, event, having)]

    def wait_said(self, event: str, **having: Any) -> dict[str, Any]:
        """Wait until it has said so; return the first such event."""
        return self.until(lambda: self.events(event, **having), f"{event} {having}")[0]

    def until(self, look: Callable[[], T | None], what: str = "") -> T:
        """Look again and again, as long as the process lives."""

        def alive() -> T | None:
            seen = look()
            assert seen or self.process.poll() is None, f"it has ended: {self.said[-3000:]}"
            return seen

        try:
            return until(alive, what)
        except AssertionError as error:
            error.add_note(self.said[-1500:])
            raise

    # --- what it answers ---

    def ask(self, path: str) -> tuple[int, str]:
        """Ask it over HTTP; return the status and the text, (0, "") while it does not answer."""
        client = None
        try:
            record = json.loads((self.watch / HOME / "spool.json").read_bytes())
            if record["pid"] != self.process.pid:
                return 0, ""
            client = http.client.HTTPConnection(record["address"], timeout=5)
            client.request("GET", path)
            answer = client.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, ValueError, LookupError, http.client.HTTPException):
            return 0, ""
        finally:
            if client is not None:
                client.close()

    def ready(self) -> bool:
        """Is it ready?"""
        return self.ask("/readyz")[0] == 200

    def wait_ready(self) -> None:
        """Wait until it is ready."""
        self.until(self.ready, "ready")

    def wait_not_ready(self, *words: str) -> str:
        """Wait until it says for a reason with these words that it is not ready; return the reason."""

        def look() -> str | None:
            status, text = self.ask("/readyz")
            assert status != 200, text
            return text if status == 503 and all(word in text for word in words) else None

        return self.until(look, f"not ready: {words}")

    def status(self) -> dict[str, Any]:
        """Return its own account."""
        told: dict[str, Any] = json.loads(self.until(lambda: self.ask("/status.json")[1]))
        return told

    def metrics(self) -> dict[str, float]:
        """Return its metrics by name and labels, as they are written."""
        text = self.until(lambda: self.ask("/metrics")[1])
        return {match["name"]: float(match["value"]) for match in _SAMPLE.finditer(text)}

    def wait_rescans(self, more: int) -> None:
        """Wait until it has listed the watch dir so many times more."""

        def rescans() -> float:
            found = self.metrics().items()
            return sum(value for name, value in found if name.startswith("ckpt_sidecar_rescans_total"))

        enough = rescans() + more
        self.until(lambda: rescans() >= enough, f"{more} rescans")

    def wait_durable(self, name: str, body: bytes | None = None) -> None:
        """Wait until the bucket has the file, by default as it stands in the watch dir, and lists it."""
        wanted = (self.watch / name).read_bytes() if body is None else body
        self.until(lambda: self.target.holds(name, wanted), f"durable: {name}")

    # --- its end ---

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal, wait for the end, and return the exit code; no traceback was written."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """Wait for the end by itself, and return the exit code; no traceback was written."""
        code = self.process.wait(SECONDS)
        assert "Traceback" not in self.said, self.said[-3000:]
        return code


@contextmanager
def daemon(
    watch: Path,
    target: Target,
    *more: str,
    env: Mapping[str, str] = {},
    before: Sequence[str] = (),
    log: Path | None = None,
) -> Iterator[Daemon]:
    """Start a sidecar, and see to its end.

    `more` are further arguments, `before` what runs the command; it logs to `log`, else beside the watch dir.
    """
    made = Daemon(watch, target, *more, env=env, before=before, log=log)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """This environment without settings of ours, and by no proxy."""
    foreign = ("CKPT_SIDECAR_", "SLURM_", "POD_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and not name.lower().endswith("_proxy")
    }
    return kept | {"AWS_EC2_METADATA_DISABLED": "true"} | dict(more)


def _is(event: Mapping[str, Any], name: str, having: Mapping[str, Any]) -> bool:
    return (not name or event["event"] == name) and all(
        wanted in event.get(field, "") if isinstance(wanted, str) else event.get(field) == wanted
        for field, wanted in having.items()
    )


# --- the trainer ---------------------------------------------------------------------------------------


def archive(content: str = "weights", records: int = 1) -> bytes:
    """Return a whole checkpoint; the same content makes the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for n in range(records):
            file.writestr(zipfile.ZipInfo(f"archive/data/{n}"), content)
    return buffer.getvalue()


def save(path: Path | bytes, body: bytes, *, age: float = 0.0) -> bytes:
    """Save as a trainer does, under another name first; `age` seconds ago. Return the bytes."""
    at = time.time() - age
    raw = os.fsencode(path)
    temporary = os.path.join(os.path.dirname(raw), b"being-written.tmp")  # noqa: PTH118, PTH120 (any bytes)
    with suppress(FileExistsError):
        os.makedirs(os.path.dirname(raw))  # noqa: PTH103, PTH120
    with open(temporary, "wb") as file:  # noqa: PTH123
        file.write(body)
    os.utime(temporary, (at, at))
    os.rename(temporary, raw)  # noqa: PTH104
    return body
