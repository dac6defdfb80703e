"""The example training job: a run that was killed and resumed ends where an uninterrupted one ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

SCRIPT = Path(__file__).parents[1] / "examples" / "train.py"


def command(directory: Path, *more: str) -> list[str]:
    """Return the command line of a short run into `directory`."""
    short = ("--steps", "120", "--save-every", "20")
    return [sys.executable, str(SCRIPT), "--checkpoints", str(directory), *short, *more]


def finish(directory: Path, *more: str) -> list[str]:
    """Train to the end; return what was printed."""
    done = subprocess.run(command(directory, *more), check=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.splitlines()


def kill_after(directory: Path, save: str) -> None:
    """Train, and be killed right after the save of that name has been told."""
    with subprocess.Popen(
        command(directory, "--step-seconds", "0.01"), stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert any(save in line for line in run.stdout)
        run.kill()
    assert run.returncode == -signal.SIGKILL


def names(directory: Path) -> list[str]:
    """Return the checkpoints' names."""
    return sorted(path.name for path in directory.glob("*.pt"))


def test_killed_in_the_middle_and_resumed_it_ends_with_the_same_weights_to_the_bit(tmp_path: Path) -> None:
    """Model, Adam's moments, learning rate, the data's order and dropout's dice all come back."""
    straight = finish(tmp_path / "straight")
    kill_after(tmp_path / "killed", "step_000060.pt")
    assert "step_000120.pt" not in names(tmp_path / "killed")
    resumed = finish(tmp_path / "killed")
    assert resumed[0].startswith("resumed from step_0000")
    assert re.fullmatch(r"final weights sha256=[0-9a-f]{64}", straight[-1])
    assert resumed[-1] == straight[-1]
    saves = [line for line in straight if "saved" in line]
    assert [line for line in resumed if "saved" in line] == saves[-(len(resumed) - 2) :]


def test_it_learns_rotates_and_its_checkpoints_need_a_multipart_upload(tmp_path: Path) -> None:
    """With --keep only the newest stay, each of more than 8 MiB; the loss goes down."""
    told = finish(tmp_path, "--keep", "2")
    assert names(tmp_path) == ["step_000100.pt", "step_000120.pt"]
    assert all((tmp_path / name).stat().st_size > 8 << 20 for name in names(tmp_path))
    losses = [float(match[1]) for line in told if (match := re.search(r"loss ([0-9.]+)", line))]
    assert len(losses) == 6
    assert losses[-1] < losses[0] / 1.2
