"""A training job loses its node in the middle, and ends with the very weights it would have had.

Everything is on this machine: moto's S3 server stands in for the bucket, two directories for the local disks
of two nodes, train.py beside this file for the training. Run it with `make demo`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3
from stage import Child, Failed, Stage, fetch, free_port, headline, painted, say, stage, until

STEPS, SAVE_EVERY, KILL_AFTER = 400, 40, 200
BUCKET, PREFIX = "demo", "run"
TRAIN = Path(__file__).with_name("train.py")
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "demo",
    "AWS_SECRET_ACCESS_KEY": "demo",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(slots=True)
class Row:
    """One line of the summary: what was promised, what was seen, did it hold?"""

    promise: str
    seen: str
    held: bool


@dataclass(slots=True)
class Store:
    """The S3 server, and a plain client that knows nothing of ckpt-sidecar."""

    url: str
    server: Child
    client: Any

    def bytes_of(self, name: str) -> bytes:
        """Return an object of the run."""
        body: bytes = self.client.get_object(Bucket=BUCKET, Key=f"{PREFIX}/{name}")["Body"].read()
        return body

    def manifest(self) -> dict[str, Any]:
        """Return latest.json."""
        return dict(json.loads(self.bytes_of("latest.json")))

    def newest(self) -> str:
        """Return the name of the newest durable checkpoint."""
        return str(self.manifest()["checkpoints"][0]["name"])

    def announced(self) -> set[str]:
        """Return the multipart uploads that latest.json knows to be under way."""
        return {each["upload_id"] for each in self.manifest()["uploads"]}

    def unfinished(self) -> set[str]:
        """Return the multipart uploads that were begun and neither completed nor aborted."""
        found = self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        return {each["UploadId"] for each in found}


def open_store(on: Stage) -> Store:
    """Start an S3 server and make the bucket."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = on.start("s3-server", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))
    until("the S3 server answers", lambda: fetch(f"{url}/moto-api/"), needs=(server,))
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket=BUCKET)
    return Store(url, server, client)


@dataclass(slots=True)
class Node:
    """A machine: its local disk, and the sidecar on it."""

    name: str
    disk: Path
    sidecar: Child
    url: str

    def status(self) -> dict[str, Any] | None:
        """Ask the sidecar how things stand."""
        answer = fetch(f"{self.url}/status.json")
        return None if answer is None else dict(json.loads(answer))

    def until_ready(self) -> None:
        """Wait for what a trainer has to wait for."""
        until(f"{self.name} is ready", lambda: fetch(f"{self.url}/readyz"), needs=(self.sidecar,))

    def logged(self, event: str) -> dict[str, Any] | None:
        """Return what the sidecar's log has told of an event."""
        told = [json.loads(line) for line in self.sidecar.lines() if line.startswith("{")]
        return next((each for each in told if each["event"] == event), None)


def open_node(on: Stage, store: Store, name: str) -> Node:
    """Start a sidecar on an empty disk."""
    disk, listen = on.home / name, f"127.0.0.1:{free_port()}"
    disk.mkdir()
    bucket = ("--bucket", BUCKET, "--prefix", PREFIX, "--endpoint-url", store.url)
    words = ("-m", "ckpt_sidecar", "--watch", disk, *bucket, "--listen", listen, "--attempt", name)
    say(f"ckpt-sidecar --watch {disk} --bucket {BUCKET} --prefix {PREFIX} …")
    return Node(name, disk, on.start(f"sidecar-{name}", *words), f"http://{listen}")


def train(on: Stage, name: str, disk: Path, *more: str) -> Child:
    """Start the trainer."""
    return on.start(f"trainer-{name}", TRAIN, "--checkpoints", disk, "--steps", str(STEPS), *more)


def train_slowly(on: Stage, node: Node) -> Child:
    """Start the trainer on a node, at a pace that one can follow."""
    pace = ("--save-every", str(SAVE_EVERY), "--keep", "2", "--step-seconds", "0.01")
    say(f"python train.py --checkpoints {node.disk} {' '.join(pace)}")
    return train(on, node.name, node.disk, *pace)


def step_in(text: str) -> int:
    """Return the step that a checkpoint's name tells."""
    match = re.search(r"step_(\d+)", text)
    return int(match[1]) if match else 0


def saved_by(trainer: Child) -> int:
    """Return the step of the trainer's last save."""
    return max((step_in(line) for line in trainer.lines() if " saved " in line), default=0)


def digest_of(trainer: Child) -> str:
    """Return the fingerprint of the weights that the trainer ended with."""
    if trainer.wait(60) != 0:
        raise Failed(f"{trainer.name} failed")
    return trainer.lines()[-1].removeprefix("final weights sha256=")


def sha256(content: bytes) -> str:
    """Return the content's fingerprint."""
    return hashlib.sha256(content).hexdigest()


# --- the acts ------------------------------------------------------------------------------------------


def reference(on: Stage) -> str:
    """Train without any trouble."""
    headline(f"0  For reference: {STEPS} steps that nobody interrupts")
    trainer = train(on, "reference", on.home / "reference", "--save-every", str(STEPS))
    digest = digest_of(trainer)
    say(f"the weights end as sha256 {digest[:16]}…")
    return digest


def work_on(node: Node, trainer: Child) -> int:
    """Watch until the trainer has saved step KILL_AFTER; return the last step that was called durable."""
    lag, told = 0.0, ""

    def look() -> bool | None:
        nonlocal lag, told
        status = node.status() or {"lag_seconds": 0.0, "newest": None}
        lag = max(lag, status["lag_seconds"])
        newest = status["newest"]
        if newest and newest["name"] != told:
            told = newest["name"]
            took = datetime.fromisoformat(newest["stored_at"]) - datetime.fromisoformat(newest["saved_at"])
            say(f"{told} durable {took.total_seconds():.2f} s after it was saved")
        return True if saved_by(trainer) >= KILL_AFTER and step_in(told) else None

    until(f"step {KILL_AFTER} is saved", look, needs=(trainer, node.sidecar), seconds=40)
    say(f"greatest lag seen: {lag:.2f} s")
    return step_in(told)


def lose(node: Node, trainer: Child, store: Store) -> tuple[int, set[str]]:
    """Take the node away; return the last durable step, and the uploads that nobody has announced."""
    headline("2  Node A is lost: SIGKILL for both, and its disk is gone")
    for child in (trainer, node.sidecar):
        child.end(signal.SIGKILL)
    shutil.rmtree(node.disk)
    time.sleep(1)  # what was on the wire arrives
    saved, durable = saved_by(trainer), step_in(store.newest())
    say(f"the trainer had saved step {saved}; durable, by latest.json in the bucket, is step {durable}")
    announced, unfinished = store.announced(), store.unfinished()
    say(f"unfinished uploads left in the bucket: {len(unfinished)}; latest.json knows {len(announced)}")
    return durable, unfinished - announced


def take_over(on: Stage, store: Store, durable: int) -> tuple[Node, list[Row]]:
    """Start anew on an empty disk; the restored file must be the object, byte by byte."""
    headline("3  Node B, with an empty disk: the sidecar restores, the trainer resumes")
    node = open_node(on, store, "node-b")
    node.until_ready()
    told = node.logged("restored")
    if told is None or told["outcome"] != "restored":
        raise Failed(f"node-b restored nothing: {told}")
    name, size, seconds = told["name"], told["bytes"], told["seconds"]
    say(f"restored {name}: {size / 1e6:.1f} MB in {seconds:.2f} s ({size / 1e6 / seconds:.0f} MB/s)")
    same = sha256((node.disk / name).read_bytes()) == sha256(store.bytes_of(name))
    return node, [
        Row("what was durable is restored", f"step {step_in(name)}", step_in(name) >= durable),
        Row("the file is the object, to the byte", f"{size:,} bytes", same),
    ]


def finish(on: Stage, node: Node, durable: int) -> tuple[str, list[Row]]:
    """Train to the end and drain; return the weights' fingerprint."""
    trainer = train_slowly(on, node)
    digest = digest_of(trainer)
    resumed = trainer.lines()[0]
    say(f"the trainer {resumed}, and finished step {saved_by(trainer)}")
    code = node.sidecar.end(signal.SIGTERM)
    say(f"SIGTERM: the sidecar made the rest durable and left with exit code {code}")
    return digest, [
        Row("the trainer goes on from there", resumed, step_in(resumed) >= durable),
        Row("SIGTERM drains", f"exit code {code}", code == 0),
    ]


def play(on: Stage) -> list[Row]:
    """Play it all; return what held and what did not."""
    expected = reference(on)
    headline("1  Node A: a trainer, a sidecar, and a bucket on moto's S3 server")
    store = open_store(on)
    node = open_node(on, store, "node-a")
    node.until_ready()
    trainer = train_slowly(on, node)
    called_durable = work_on(node, trainer)
    durable, nameless = lose(node, trainer, store)
    node, restored = take_over(on, store, durable)
    digest, finished = finish(on, node, durable)
    newest, left = store.newest(), store.unfinished() - nameless
    return [
        Row("what was called durable is durable", f"step {durable}", durable >= called_durable),
        *restored,
        *finished,
        Row("latest.json names the last step", newest, step_in(newest) == STEPS),
        Row("no announced upload is left behind", f"{len(left)} unfinished", not left),
        Row("the weights are those of the reference", f"sha256 {digest[:16]}…", digest == expected),
    ]


def summary(rows: list[Row]) -> bool:
    """Show the table; did everything hold?"""
    headline("4  What was promised, and what was seen")
    for row in rows:
        verdict = painted("held", 32) if row.held else painted("BROKEN", 31)
        say(f"{row.promise:<40}{row.seen:<32}{verdict}")
    return all(row.held for row in rows)


def main() -> int:
    """Play the demo; exit code 0 only when every promise held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the directories and logs")
    keep = parser.parse_args().keep
    for name in [each for each in os.environ if each.startswith(("AWS_", "CKPT_SIDECAR_"))]:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with stage(keep=keep) as on:
            if not summary(play(on)):
                raise Failed("not every promise held")  # noqa: TRY301
            return 0
    except Failed as error:
        print(painted(f"\nfailed: {error}", 31), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; everything is cleared away", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
