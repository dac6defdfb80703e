"""A small training job in PyTorch that saves checkpoints and resumes from the newest one.

It sorts points into the arms of a spiral that is hidden in 64 noisy dimensions. It knows nothing of S3 or
ckpt-sidecar: it writes files into a directory, and on the next start takes the newest that it finds there.
Interrupted anywhere and resumed, it ends with the very same weights, to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

ARMS = 6
DIMENSIONS = 64
POINTS = 4096
WIDTH = 1024  # 1.1 million weights: with Adam's two moments each, a checkpoint has 13 MB
BATCH = 32


def spirals(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the data: points on the arms of a spiral, turned into many dimensions, and noise on top."""
    arms = torch.arange(POINTS) % ARMS
    radius = torch.rand(POINTS, generator=generator)
    angle = 2 * math.pi * (arms / ARMS + radius)
    plane = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    turned = plane @ torch.randn(2, DIMENSIONS, generator=generator)
    return turned + 0.02 * torch.randn(POINTS, DIMENSIONS, generator=generator), arms


class Batches:
    """Endless batches of the data, each epoch in a new order; where it stands is part of a checkpoint."""

    def __init__(self, data: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator) -> None:
        self._data = data
        self._generator = generator
        self._order = torch.empty(0, dtype=torch.int64)
        self._taken = 0

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next batch."""
        if self._taken >= len(self._order):
            self._order, self._taken = torch.randperm(POINTS, generator=self._generator), 0
        chosen = self._order[self._taken : self._taken + BATCH]
        self._taken += BATCH
        points, arms = self._data
        return points[chosen], arms[chosen]

    def state_dict(self) -> dict[str, Any]:
        """Return where the order of the data stands."""
        return {"order": self._order, "taken": self._taken, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` stood."""
        self._order, self._taken = state["order"], state["taken"]
        self._generator.set_state(state["generator"])


@dataclass(slots=True)
class Training:
    """All that changes while training goes on; a checkpoint is all of it."""

    model: Any
    optimizer: Any
    scheduler: Any
    batches: Batches
    step: int = 0

    def advance(self) -> float:
        """Train on one batch; return the loss."""
        points, arms = self.batches.take()
        loss = nn.functional.cross_entropy(self.model(points), arms)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return float(loss.item())

    def save(self, path: Path) -> None:
        """Write the checkpoint beside its place, then rename it: it is there whole, or not at all."""
        unfinished = path.with_suffix(".tmp")
        torch.save(self.state_dict(), unfinished)
        unfinished.replace(path)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to do what this one would have done."""
        parts = {
            name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler", "batches")
        }
        return {"step": self.step, "rng": torch.get_rng_state(), **parts}

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        for name in ("model", "optimizer", "scheduler", "batches"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]

    def digest(self) -> str:
        """Return a fingerprint of the weights."""
        digest = hashlib.sha256()
        for name, weights in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(weights.numpy().tobytes())
        return digest.hexdigest()


def prepare(seed: int, steps: int) -> Training:
    """Make the training as it stands before the first step, the same for the same seed."""
    torch.use_deterministic_algorithms(True)  # noqa: FBT003
    torch.set_num_threads(1)  # sums in another order are other sums
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data = spirals(generator)
    model = nn.Sequential(
        nn.Linear(DIMENSIONS, WIDTH),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, ARMS),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    return Training(model, optimizer, scheduler, Batches(data, generator))


def saved(directory: Path) -> list[Path]:
    """Return the checkpoints in the directory, the newest first, by the step in their names."""
    steps = {
        int(match[1]): path
        for path in directory.glob("step_*.pt")
        if (match := re.fullmatch(r"step_(\d+)\.pt", path.name))
    }
    return [steps[step] for step in sorted(steps, reverse=True)]


def rotate(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; 0 keeps all."""
    for old in saved(directory)[keep:] if keep else []:
        old.unlink()


def train(training: Training, asked: argparse.Namespace) -> None:
    """Train to the last step, saving on the way."""
    while training.step < asked.steps:
        loss = training.advance()
        if training.step % asked.save_every == 0 or training.step == asked.steps:
            path = asked.checkpoints / f"step_{training.step:06d}.pt"
            training.save(path)
            print(f"step {training.step:>6}  loss {loss:.4f}  saved {path.name}", flush=True)
            rotate(asked.checkpoints, asked.keep)
        time.sleep(asked.step_seconds)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoints", type=Path, required=True, metavar="DIR", help="save here, resume from here"
    )
    parser.add_argument("--steps", type=int, default=400, help="steps in all (default %(default)s)")
    parser.add_argument(
        "--save-every", type=int, default=40, metavar="N", help="steps between two checkpoints"
    )
    parser.add_argument(
        "--keep", type=int, default=0, metavar="N", help="delete all but the newest N; 0 keeps all"
    )
    parser.add_argument("--step-seconds", type=float, default=0.0, metavar="S", help="rest after each step")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Resume from the newest checkpoint, or begin; train; tell the weights' fingerprint."""
    asked = arguments()
    asked.checkpoints.mkdir(parents=True, exist_ok=True)
    training = prepare(asked.seed, asked.steps)
    if found := saved(asked.checkpoints):
        training.load(found[0])
        print(f"resumed from {found[0].name}", flush=True)
    else:
        print("starting from scratch", flush=True)
    train(training, asked)
    print(f"final weights sha256={training.digest()}", flush=True)


if __name__ == "__main__":
    main()
