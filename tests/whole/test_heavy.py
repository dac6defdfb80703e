"""A checkpoint that is larger than the memory which its sidecar may use, with many workers on few cores."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from ckpt_sidecar.bucket import MIB
from tests.conftest import ON_ONE
from tests.whole.running import Target, daemon, until
from tests.whole.test_main_job import peak_rss

SIZE = 512 * MIB
WORKERS = 16
RSS_LIMIT = (160 + (WORKERS - 4) * 8) * MIB  # of 4 workers, and one buffer of 8 MiB for each one more
SECONDS = 300.0  # the store here is a toy


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.fault("H5")
@pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset is needed, to give it two cores")
@ON_ONE
def test_sixteen_workers_on_two_cores_need_a_buffer_each_and_no_more(
    tmp_path: Path, s3_endpoint: str
) -> None:
    """Twice the size of what it may have in memory goes up, and comes back byte for byte."""
    target = Target.new(s3_endpoint)
    cores = ("taskset", "--cpu-list", "0,1")
    block = random.Random(5).randbytes(MIB)
    with daemon(tmp_path / "a", target, "--workers", str(WORKERS), "--attempt", "a", before=cores) as it:
        it.wait_ready()
        with (tmp_path / "a/big.tmp").open("wb") as file:
            for n in range(SIZE // MIB):
                file.write(n.to_bytes(8, "little") + block[8:])
        (tmp_path / "a/big.tmp").rename(tmp_path / "a/big.pt")
        until(lambda: target.listed() == ["big.pt"], seconds=SECONDS)
        assert WORKERS * 8 * MIB < peak_rss(it) < RSS_LIMIT < SIZE
        assert it.stop() == 0
    with daemon(tmp_path / "b", target, "--workers", str(WORKERS), "--attempt", "b", before=cores) as it:
        until(it.ready, seconds=SECONDS)
        assert peak_rss(it) < RSS_LIMIT
        assert it.stop() == 0
    same = subprocess.run(["cmp", tmp_path / "a/big.pt", tmp_path / "b/big.pt"], check=False, timeout=SECONDS)
    assert same.returncode == 0
