"""Fuzz one target with atheris for so many seconds: `make fuzz` runs this for each of them.

    python tests/fuzz/run.py TARGET SECONDS FOLDER [SEED]

The corpus is made by the target's own code, in FOLDER; an input that breaks a promise is kept there too, and
the exit code is then not 0. To play it again: `python tests/fuzz/run.py TARGET FILE`.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

MEMORY_MIB = 1024
INPUT_BYTES = 65_536
INPUT_SECONDS = 20  # one input may take so long at most


def corpus(target: str, folder: Path) -> Path:
    """Write the seeds, each under its own hash; what an earlier run has found stays."""
    made = folder / target
    made.mkdir(parents=True, exist_ok=True)
    for seed in importlib.import_module(f"tests.fuzz.fuzz_{target}").seeds():
        (made / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    return made


def main(target: str, seconds: str, folder: Path, seed: int) -> None:
    """Fuzz; ends the process."""
    import atheris  # noqa: PLC0415  (only where `make fuzz` has put it)

    with atheris.instrument_imports(include=["ckpt_sidecar"]):
        module = importlib.import_module(f"tests.fuzz.fuzz_{target}")
    options = [
        f"-max_total_time={seconds}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-max_len={INPUT_BYTES}",
        f"-timeout={INPUT_SECONDS}",
        f"-seed={seed}",
        f"-artifact_prefix={folder}/{target}-",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus(target, folder))], module.check)
    print(f"fuzz {target}: for {seconds} s with seed {seed}", flush=True)
    atheris.Fuzz()


if __name__ == "__main__":
    if os.path.isfile(sys.argv[2]):
        importlib.import_module(f"tests.fuzz.fuzz_{sys.argv[1]}").check(Path(sys.argv[2]).read_bytes())
    else:
        chosen = int(sys.argv[4]) if len(sys.argv) > 4 else random.randrange(1, 2**31)
        main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), chosen)
