"""Killed by SIGKILL at any step, and again in the recovery: a restart comes to the same end."""

from __future__ import annotations

import inspect
import os
import random
import re

import pytest

from ckpt_sidecar.bucket import Bucket
from ckpt_sidecar.disk import Disk
from tests.crash.matrix import Cuts, Matrix, sample
from tests.crash.scenes import SCENES, SEED, STORES, Stage

A_FEW = 8  # kills for each scene where there is little time
SECOND_KILLS = int(os.environ.get("CRASH_SECOND_KILLS", "30"))  # for each scene and store; 10000 is all


async def _undisturbed(scene: str, store: str) -> tuple[Matrix, list[Cuts]]:
    matrix = Matrix(await Stage.of(SCENES[scene], STORES[store]))
    cuts = await matrix.undisturbed()
    assert matrix.failures == [], matrix.failures[0]
    assert matrix.steps >= 100 and len(cuts) >= 30, f"hardly anything can be killed: {matrix}"
    return matrix, cuts


def _good(matrix: Matrix, name: str) -> None:
    print(f"{name}: {matrix} (CRASH_SEED={SEED})")  # noqa: T201
    assert matrix.failures == [], matrix.failures[0]
    assert len(matrix.missed) <= 1 + 0.1 * matrix.kills, f"{matrix}: {matrix.missed}"


@pytest.mark.fault("E1", "F4")
@pytest.mark.parametrize("scene", SCENES)
async def test_a_kill_at_some_of_the_steps_comes_to_the_same_end(scene: str) -> None:
    """As the test of all steps, for some of each kind: quick enough to run always."""
    store = random.Random(SEED).choice(list(STORES))
    matrix, cuts = await _undisturbed(scene, store)
    await matrix.kill_at_all(sample(cuts, A_FEW, random.Random(SEED)))
    _good(matrix, f"{scene}, {store}")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.fault("E1", "F4")
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("scene", SCENES)
async def test_a_kill_at_any_step_and_one_more_in_the_recovery_come_to_the_same_end(
    scene: str, store: str
) -> None:
    """Every checkpoint is committed once or superseded, nothing goes backwards or is torn, nothing is left.

    The first kill is at each step that leaves another state than the one before, the second at such steps of
    the recovery, which are too many: a sample, with each kind of step in it.
    """
    matrix, cuts = await _undisturbed(scene, store)
    again = await matrix.kill_at_all(random.Random(SEED).sample(cuts, len(cuts)))
    _good(matrix, f"{scene}, {store}, one kill")
    assert len(again) >= 2 * len(cuts), f"the recoveries do hardly anything: {matrix}"
    await matrix.kill_at_all(sample(again, SECOND_KILLS, random.Random(SEED)))
    _good(matrix, f"{scene}, {store}, a second kill at some of {len(again)} places")


@pytest.mark.fault("E1")
async def test_every_call_of_the_disk_and_of_the_bucket_is_a_step_of_some_scene() -> None:
    """A call that is written tomorrow is met by the scenes, or this says that a scene is wanting."""
    met: set[str] = set()
    for scene, store in (
        ("retention", "weak"),
        ("claim", "able"),
        ("adoption", "able"),
        ("parts", "able"),
    ):
        matrix, cuts = await _undisturbed(scene, store)
        if scene == "parts":
            wanted = ("after bucket.create_multipart", "after bucket.put_part job/big.pt part 2")
            await matrix.kill_at_all([each for each in cuts if str(each[0]).startswith(wanted)])
        met |= matrix.met
    calls = {
        f"{kind}.{name}"
        for kind, what in (("bucket", Bucket), ("disk", Disk))
        for name, _ in inspect.getmembers(what, inspect.isfunction)
        if not name.startswith("_")
    }
    assert calls - set(re.findall(r"(?:bucket|disk)\.\w+", " ".join(met))) == set()
