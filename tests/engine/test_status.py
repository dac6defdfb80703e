"""What `/status.json` tells: the words that `ckpt-sidecar status` and `wait` stand on."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt_sidecar.bucket import Abilities, ObjectRef
from ckpt_sidecar.checkpoint import Checkpoint, Committed, File, Id, Pinned, Uploading
from ckpt_sidecar.events import (
    Claimed,
    Drained,
    Draining,
    Event,
    Fenced,
    Moved,
    Probed,
    Progress,
    Ready,
    RecoveryPoint,
)
from tests.engine.test_web import NOW as SAVED
from tests.engine.test_web import Sidecar, served


def checkpoint(sequence: int, state: Any = None) -> Checkpoint:
    """Make a checkpoint of 1,000 bytes."""
    name, saved_at = f"step_{sequence}.pt", SAVED * 10**9
    return Checkpoint(Id(1, sequence), name, (File(name, 1000, saved_at),), saved_at, state or Pinned())


def committed(sequence: int) -> Moved:
    """Make the event of a checkpoint that has become durable two seconds after it was saved."""
    ref = ObjectRef(f"run/step_{sequence}.pt", 1000, "etag")
    return Moved(checkpoint(sequence, Committed((ref,))), SAVED + 2)


async def test_status_before_anything_has_happened() -> None:
    """Every field is there from the start."""
    async with served(Sidecar()) as client:
        assert (await client.ask("/status.json")).json == {
            "schema": 1,
            "version": "0",
            "watch": "/ckpt",
            "spool": "s",
            "state": "starting",
            "ready": False,
            "reason": "has not claimed the prefix yet",
            "bucket": "b",
            "prefix": "run/",
            "generation": 0,
            "store": {},
            "newest": None,
            "interruption": None,
            "committed": 0,
            "lag_seconds": 0.0,
            "queue": [],
        }


async def test_status_shows_what_is_on_its_way_and_how_far_it_is() -> None:
    """The oldest first, with what was sent; the lag is the oldest one's age."""
    sidecar = Sidecar()
    sidecar.now = SAVED + 30
    sidecar.tell(Moved(checkpoint(1, Uploading(("u",))), SAVED), Moved(checkpoint(2), SAVED))
    sidecar.tell(Progress("step_1.pt", "up", 400, 400, 1000), Progress("step_2.pt", "down", 9, 9, 9))
    async with served(sidecar) as client:
        told = (await client.ask("/status.json")).json
        assert told["lag_seconds"] == 30
        assert told["queue"] == [
            {"id": "1-1", "name": "step_1.pt", "size": 1000, "sent": 400, "state": "uploading"},
            {"id": "1-2", "name": "step_2.pt", "size": 1000, "sent": 0, "state": "pinned"},
        ]


async def test_status_shows_the_newest_durable_one() -> None:
    """As the manifest has it: restored, kept, uploaded by this process or by another one before."""
    sidecar = Sidecar()
    sidecar.tell(committed(2), committed(1), RecoveryPoint(Id(1, 2), "step_2.pt", 1000, SAVED, SAVED + 2))
    async with served(sidecar) as client:
        told = (await client.ask("/status.json")).json
        assert told["committed"] == 2
        assert told["newest"] == {
            "id": "1-2",
            "name": "step_2.pt",
            "size": 1000,
            "step": 2,
            "saved_at": "2023-11-14T22:13:20Z",
            "stored_at": "2023-11-14T22:13:22Z",
            "uri": "s3://b/run/step_2.pt",
        }


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ((Claimed(3, None), Ready(0.1)), "ready"),
        ((Claimed(3, None), Ready(0.1), Draining(25, 1)), "draining"),
        ((Claimed(3, None), Ready(0.1), Draining(25, 1), Drained(())), "stopped"),
        ((Claimed(3, None), Ready(0.1), Fenced(4, "other")), "fenced"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_status_has_a_word_for_how_it_stands(events: tuple[Event, ...], state: str) -> None:
    """And tells what the store was seen to honour."""
    abilities = Abilities(
        conditional_put=True, conditional_complete=False, conditional_delete=True, checksum=False
    )
    sidecar = Sidecar()
    sidecar.tell(Probed(abilities), *events)
    async with served(sidecar) as client:
        told = (await client.ask("/status.json")).json
        assert (told["state"], told["generation"]) == (state, 3)
        assert told["store"] == {
            "conditional_put": True,
            "conditional_complete": False,
            "conditional_delete": True,
            "checksum": False,
        }
