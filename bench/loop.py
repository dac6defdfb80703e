"""A training loop in PyTorch, as a process of its own, that tells when each thing it did began and ended.

    loop.py --way local --directory DIR --uri s3://BUCKET/PREFIX

It fine-tunes: a small part of the model is trained, the rest is frozen and only makes the checkpoint as large
as it is asked to be, so a step takes some tens of milliseconds whatever that size is. After every `--every`
steps it saves, and once more so many steps come after the last save. At its end it writes a line of JSON to
standard output for each thing: `what` (step, save, upload), `name` of the checkpoint or "", `began` and
`ended` (seconds since the epoch). Steps to warm up are not told.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

WIDTH, LAYERS, BATCH = 1024, 3, 128
MIB = 1 << 20
FROZEN = 16 * MIB  # bytes of one frozen weight
WARM_UP = 10  # steps
KEEP = 2  # local files; the trainer deletes older ones, whoever uploads them

Save = Callable[[dict[str, Any], str], None]


@dataclass
class Diary:
    """What the loop did, and when."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def noting(self, what: str, name: str = "") -> Iterator[None]:
        """Note the beginning and the end."""
        began = time.time()
        yield
        self.lines.append({"what": what, "name": name, "began": began, "ended": time.time()})


@dataclass(frozen=True, slots=True)
class Place:
    """Where checkpoints go: a local directory, or `uri` in the bucket, or both."""

    directory: Path
    uri: str
    diary: Diary


# --- the ways to save ------------------------------------------------------------------------------------


def to_file(place: Place) -> Save:
    """A file under another name, then the rename; the oldest is deleted."""

    def save(state: dict[str, Any], name: str) -> None:
        unfinished = place.directory / f"{name}.tmp"
        torch.save(state, unfinished)
        unfinished.rename(place.directory / name)
        for old in sorted(place.directory.glob("*.pt"))[:-KEEP]:
            old.unlink()

    return save


def sync(place: Place) -> None:
    """The usual recipe for what lies in a directory."""
    words = [str(Path(sys.executable).with_name("aws")), "s3", "sync", str(place.directory), place.uri]
    subprocess.run([*words, "--exclude", "*.tmp", "--only-show-errors"], check=True)


@contextmanager
def local(place: Place) -> Iterator[Save]:
    """A local file; to upload it is not the trainer's business."""
    yield to_file(place)


@contextmanager
def aws_sync(place: Place) -> Iterator[Save]:
    """A local file, and training waits for `aws s3 sync`."""
    keep = to_file(place)

    def save(state: dict[str, Any], name: str) -> None:
        keep(state, name)
        sync(place)

    yield save


@contextmanager
def aws_sync_behind(place: Place) -> Iterator[Save]:
    """A local file, and `aws s3 sync` while training goes on, one at a time."""
    keep = to_file(place)

    def upload(name: str) -> None:
        with place.diary.noting("upload", name):
            sync(place)

    with ThreadPoolExecutor(1) as behind:
        begun = []

        def save(state: dict[str, Any], name: str) -> None:
            keep(state, name)
            begun.append(behind.submit(upload, name))

        yield save
        for each in begun:
            each.result()


@contextmanager
def s3torchconnector(place: Place) -> Iterator[Save]:
    """Its checkpoint's writer, as its documentation has it."""
    import os

    from s3torchconnector import S3Checkpoint, S3ClientConfig

    config = S3ClientConfig(force_path_style=True)
    store = S3Checkpoint(region="us-east-1", endpoint=os.environ["AWS_ENDPOINT_URL"], s3client_config=config)

    def save(state: dict[str, Any], name: str) -> None:
        with store.writer(f"{place.uri}/{name}") as writer:
            torch.save(state, writer)

    yield save


@contextmanager
def lightning(place: Place) -> Iterator[Save]:
    """What Lightning does where its root is an s3:// URI: into memory, and from there through s3fs."""
    from lightning_fabric.plugins.io import TorchCheckpointIO

    plugin = TorchCheckpointIO()

    def save(state: dict[str, Any], name: str) -> None:
        plugin.save_checkpoint(state, f"{place.uri}/{name}")

    yield save


WAYS: dict[str, Callable[[Place], AbstractContextManager[Save]]] = {
    each.__name__: each for each in (local, aws_sync, aws_sync_behind, s3torchconnector, lightning)
}


# --- training --------------------------------------------------------------------------------------------


class Training:
    """A model of which a small part is trained; `mib` is the size of its checkpoint."""

    def __init__(self, mib: int) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        self._model = nn.Sequential(*layers)
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=1e-4)
        trained = sum(
            3 * 4 * each.numel() for each in self._model.parameters()
        )  # Adam has two moments of each
        number = max(0, mib * MIB - trained) // FROZEN
        self._frozen = [torch.rand(FROZEN // 4) for _ in range(number)]
        self._points, self._targets = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)

    def step(self) -> None:
        """Train on one batch."""
        self._optimizer.zero_grad()
        nn.functional.mse_loss(self._model(self._points), self._targets).backward()
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has."""
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "frozen": self._frozen,
        }


def train(training: Training, diary: Diary, steps: int) -> None:
    """Train so many steps."""
    for _ in range(steps):
        with diary.noting("step"):
            training.step()


def main() -> None:
    """Train and save, then tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--way", choices=list(WAYS), default="local")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--mib", type=int, default=512, help="size of a checkpoint")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--every", type=int, default=100, help="steps between two saves")
    parser.add_argument("--threads", type=int, default=2, help="that torch computes with")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    training, diary = Training(given.mib), Diary()
    train(training, Diary(), WARM_UP)
    with WAYS[given.way](Place(given.directory, given.uri, diary)) as save:
        for n in range(1, given.saves + 1):
            train(training, diary, given.every)
            name = f"step_{n * given.every:06}.pt"
            with diary.noting("save", name):
                save(training.state_dict(), name)
        train(training, diary, given.every)
    sys.stdout.writelines(f"{json.dumps(line)}\n" for line in diary.lines)


if __name__ == "__main__":
    main()
