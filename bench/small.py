"""Many small checkpoints, and none at all: latency, requests, and what an idle sidecar costs.

small.py [--files 1000] [--kib 64] [--idle 30]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lab import CACHE, MIB, Server, checkpoint, counts, cpu_of, end_on_sigterm, rss_of, serving
from ours import Sidecar, sidecar

PACE = 0.05  # seconds between two saves, where they come one by one


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--kib", type=int, default=64)
    parser.add_argument("--idle", type=float, default=30.0, help="seconds")
    given = parser.parse_args()
    end_on_sigterm()
    file = checkpoint(given.kib << 10)
    results: dict[str, Any] = {}
    with serving(file, tls=False) as server:
        for how, pace in (("one by one", PACE), ("in a burst", 0.0)):
            results[how] = saves(server, file, given.files, pace=pace, prefix=how.replace(" ", "-"))
            print(f"{how}: {json.dumps(results[how])}", flush=True)
        results["idle"] = idle(server, given.idle)
        print(f"idle: {json.dumps(results['idle'])}", flush=True)
    (CACHE / "small.json").write_text(json.dumps(results, indent=1))


def saves(server: Server, file: Path, number: int, *, pace: float, prefix: str) -> dict[str, float]:
    """Save so many, and say how long each took to be durable (seconds) and what was asked for it."""
    with sidecar(server, prefix) as it:
        it.until("ready")
        time.sleep(0.5)
        before, cpu, began = counts(server), cpu_of(it.process.pid), time.monotonic()
        placed: dict[str, float] = {}
        for n in range(number):
            name = f"step_{n}.pt"
            placed[name] = time.time()
            it.place(file, name)
            if pace:
                time.sleep(pace)
        it.until("checkpoint_committed", number)
        took, spent = time.monotonic() - began, cpu_of(it.process.pid) - cpu
        after, peak = counts(server), rss_of(it.process.pid)
        latencies = sorted(latencies_of(it, placed))
    asked = {name: (after[name] - before[name]) / number for name in after if after[name] != before[name]}
    requests = sum(share for name, share in asked.items() if name not in ("came", "went"))
    return {
        "p50": round(statistics.median(latencies), 4),
        "p99": round(quantile(latencies, 0.99), 4),
        "per_second": round(number / took, 1),
        "requests_each": round(requests, 2),
        "cpu_ms_each": round(1000 * spent / number, 2),
        "rss_mib": round(peak / MIB, 1),
    }


def latencies_of(it: Sidecar, placed: dict[str, float]) -> list[float]:
    """From the rename to the commit, by the log's times."""
    committed = [each for each in it.events() if each["event"] == "checkpoint_committed"]
    return [datetime.fromisoformat(each["at"]).timestamp() - placed[each["name"]] for each in committed]


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which that share of them is."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def idle(server: Server, seconds: float) -> dict[str, float]:
    """An empty bucket, and nothing to do: the start, then the CPU and the memory."""
    with sidecar(server, "idle") as it:
        ready = it.until("ready")
        time.sleep(1.0)
        before, began = cpu_of(it.process.pid), time.monotonic()
        time.sleep(seconds)
        share = (cpu_of(it.process.pid) - before) / (time.monotonic() - began)
        return {
            "start_to_ready": round(ready, 3),
            "cpu_percent": round(100 * share, 3),
            "rss_mib": round(rss_of(it.process.pid, "VmRSS") / MIB, 1),
        }


if __name__ == "__main__":
    main()
