"""The store is away for an hour, on virtual time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckpt_sidecar.checkpoint import Committed
from ckpt_sidecar.events import Moved
from tests.model.test_random_life import RandomLife, _small_parts  # noqa: F401  (a fixture)
from tests.model.world import Fault

MINUTES = 60


@pytest.fixture
def scene() -> Iterator[RandomLife]:
    """A node, a sidecar that is ready, and a store; at the end all that was saved is durable."""
    scene = RandomLife()
    scene.begin(seed=1, store="able", keep_local=0, keep_remote=0)
    scene.world.pass_time(10)
    try:
        yield scene
    finally:
        scene.teardown()


@pytest.mark.fault("C15")
def test_an_hour_without_the_store_costs_nothing_and_the_newest_goes_first(scene: RandomLife) -> None:
    """A save each minute is pinned, the lag grows, few requests are made; then they go up from the newest."""
    (node,) = scene.nodes
    life = node.life
    assert life is not None
    assert life.ready
    scene.world.store.faults.append(Fault("unreachable", "", 10**9))
    for minute in range(MINUTES):
        node.save(f"step_{minute}.pt", 10)
        scene.world.pass_time(60)
    assert len(life.book) == MINUTES
    assert life.book.lag(scene.world.wall() / 1e9) >= (MINUTES - 1) * 60
    asked = 10**9 - scene.world.store.faults[0].left
    assert 60 * MINUTES / 2 < asked < 4 * 60 * MINUTES
    scene.heal()
    scene.world.pass_time(120)
    moves = [each.checkpoint for each in life.told if isinstance(each, Moved)]
    order = [each.name for each in moves if isinstance(each.state, Committed)]
    assert sorted(order) == sorted(f"step_{minute}.pt" for minute in range(MINUTES))
    # Up to the length of a rest, some are in the middle of their tries when the store comes back.
    assert f"step_{MINUTES - 1}.pt" in order[:10]
    assert "step_0.pt" in order[-10:]
