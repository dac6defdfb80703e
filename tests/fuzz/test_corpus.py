"""What the fuzzer starts from keeps all promises, and so do its neighbours: the same ones in every run."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from typing import Any

import pytest

TARGETS = {"manifest": "G1", "formats": "G2"}
ROUNDS = 40  # changed copies of each seed


def changed(seed: bytes, chance: random.Random) -> Iterator[bytes]:
    """Yield copies in which a few bytes are others, are gone, or come twice."""
    for _ in range(ROUNDS):
        data = bytearray(seed)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data) + 1)
            match chance.randrange(4):
                case 0:
                    data[at : at + 1] = chance.randbytes(1)
                case 1:
                    del data[at : at + chance.randint(1, 20)]
                case 2:
                    data[at:at] = data[at : at + chance.randint(1, 20)]
                case _:
                    data[at : at + 4] = chance.choice([b"\xff" * 4, bytes(4), b"1e99", b"PK\x05\x06"])
        yield bytes(data)


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=pytest.mark.fault(row)) for name, row in TARGETS.items()]
)
def test_the_seeds_and_their_neighbours_keep_all_promises(target: str) -> None:
    """A deterministic replay; `make fuzz` goes further."""
    module: Any = importlib.import_module(f"tests.fuzz.fuzz_{target}")
    chance = random.Random(target)
    seeds = list(module.seeds())
    assert len(set(seeds)) == len(seeds) > 5
    for seed in seeds:
        module.check(seed)
        for data in changed(seed, chance):
            module.check(data)


def test_the_seeds_are_what_they_should_be() -> None:
    """Good ones among them pass, so that the fuzzer gets deep."""
    manifest: Any = importlib.import_module("tests.fuzz.fuzz_manifest")
    formats: Any = importlib.import_module("tests.fuzz.fuzz_formats")
    assert manifest.parse(next(manifest.seeds()), prefix=manifest.PREFIX).checkpoints
    sealed = [formats.look_at(formats.Counted(seed), "x.pt").sealed for seed in formats.seeds()]
    assert sealed.count(True) == 5
    assert formats.look_at(formats.Counted(list(formats.seeds())[5]), "x.safetensors").flaw is None
