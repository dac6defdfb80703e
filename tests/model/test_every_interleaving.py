"""Two sidecars on one prefix, in every interleaving within bounds: nothing is lost, nothing goes backwards.

The real code of the whole sidecar runs (life, pipeline, uploader, ledger, restorer, decisions, the spool
on a real disk) over a bucket that is a value, and `promises.py` is looked at in every state.

What is exhausted are the bounds below, each on a store that honours conditions on complete and on one that
does not: a crash, a lost answer and a late request, any two of them together with one save, and each alone
with two of one kind; all three of them with one sidecar; two names; three saves. `CKPT_SIDECAR_MODEL=wide`
goes through wider ones. Never exhausted was the last of them, the product of all: three saves, two names,
a crash, a lost answer and a late request at once.

A crash comes between two requests: one between two calls to the disk is no part of this. No part of an upload
is lost or late, reads are not lost, each sidecar has one worker, and no time passes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest
from _pytest.mark import ParameterSet

from tests.model.explore import Bounds, Explorer
from tests.model.life import small_world

X, XY = ("x.pt",), ("x.pt", "y.pt")
LARGE, SMALL = ("large",), ("small",)

QUICK = {
    "one_sidecar_lost_answer": Bounds(saves=2, sides=1, lost=1),
    "one_sidecar_late_request": Bounds(saves=2, sides=1, settled=True, late=1, kinds=LARGE),
    "a_crash": Bounds(saves=1, settled=True, crashes=1),
    "small_saves": Bounds(saves=2, settled=True, kinds=SMALL),
    "two_saves": Bounds(saves=2, settled=True, kinds=LARGE),
    "nothing_but_a_crash": Bounds(saves=0, settled=True, crashes=1),
}
LONG = {
    "both_start": Bounds(saves=1),
    "both_start_a_crash": Bounds(saves=0, crashes=1, lost=1),
    "a_lost_answer": Bounds(saves=1, lost=1),
    "a_late_request": Bounds(saves=1, settled=True, late=1),
    "a_crash_a_lost_answer": Bounds(saves=1, settled=True, crashes=1, lost=1),
    "a_crash_a_late_request": Bounds(saves=1, settled=True, crashes=1, late=1, kinds=SMALL),
    "a_lost_answer_a_late_request": Bounds(saves=1, settled=True, lost=1, late=1),
    "one_sidecar_all_that_may_happen": Bounds(saves=1, sides=1, crashes=1, lost=1, late=1),
    "two_saves": Bounds(saves=2, settled=True),
    "two_saves_a_lost_answer": Bounds(saves=2, settled=True, lost=1, kinds=LARGE),
    "two_saves_a_late_request": Bounds(saves=2, settled=True, late=1, kinds=SMALL),
    "two_saves_a_crash": Bounds(saves=2, settled=True, crashes=1, kinds=SMALL),
    "two_names": Bounds(saves=2, settled=True, names=XY),
    "three_saves": Bounds(saves=3, settled=True, kinds=SMALL, names=XY),
    "three_saves_a_lost_answer": Bounds(saves=3, settled=True, kinds=SMALL, lost=1),
}
WIDE = {
    "both_start_a_crash": Bounds(saves=1, crashes=1),
    "a_crash_a_late_request": Bounds(saves=1, settled=True, crashes=1, late=1),
    "two_saves_a_crash": Bounds(saves=2, settled=True, crashes=1),
    "all_that_may_happen": Bounds(saves=3, crashes=1, lost=1, late=1, names=XY),
}


Explore: TypeAlias = Callable[[Bounds], None]


def on_both(all_bounds: Mapping[str, Bounds]) -> list[ParameterSet]:
    """Each on a store that honours conditions on complete, and on one that does not."""
    return [
        pytest.param(replace(bounds, bound=bound), id=f"{name}{'' if bound else '_unconditional'}")
        for name, bounds in all_bounds.items()
        for bound in (True, False)
    ]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A place for a thousand small disks, in memory where there is one."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def explored(scratch: Path) -> Explore:
    """Go through all of it, and say how much that was."""

    def explore(bounds: Bounds) -> None:
        with small_world():
            explorer = Explorer(bounds, scratch)
            explorer.explore()
        print(f"{bounds}\n    {explorer}")  # noqa: T201  (shown at the end)

    return explore


@pytest.mark.fault("C5", "D1", "E1")
@pytest.mark.parametrize("bounds", on_both(QUICK))
def test_every_interleaving_within_narrow_bounds(bounds: Bounds, explored: Explore) -> None:
    """All promises hold in every state."""
    explored(bounds)


@pytest.mark.long
@pytest.mark.fault("C5", "D1", "E1")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bounds", on_both(LONG))
def test_every_interleaving(bounds: Bounds, explored: Explore) -> None:
    """All promises hold in every state."""
    explored(bounds)


@pytest.mark.long
@pytest.mark.skipif(os.environ.get("CKPT_SIDECAR_MODEL") != "wide", reason="takes minutes to days")
@pytest.mark.timeout(0)
@pytest.mark.parametrize("bounds", on_both(WIDE))
def test_every_interleaving_within_wide_bounds(bounds: Bounds, explored: Explore) -> None:
    """All promises hold in every state."""
    explored(bounds)
