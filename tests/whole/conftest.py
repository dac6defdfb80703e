"""What the tests of whole processes start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.whole.running import Target


@pytest.fixture
def target(s3_endpoint: str) -> Target:
    """A fresh bucket on a real server."""
    return Target.new(s3_endpoint)


@pytest.fixture
def watch(tmp_path: Path) -> Path:
    """An empty directory to watch."""
    path = tmp_path / "ckpt"
    path.mkdir()
    return path
