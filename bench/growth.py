"""How the cost grows: with the files in the watch dir, the objects in the bucket, the history, a long life.

growth.py [--most 50000] [--sent 10000] [--history 10000] [--life 20000] [--only others,known,…]

Each part has a table, whose last line is the growth exponent between its last two rows: 0 is constant, 1 is
in proportion, 2 would be quadratic.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lab import BUCKET, CACHE, MIB, Server, checkpoint, counts, cpu_of, end_on_sigterm, rss_of, serving
from ours import Sidecar, new_watch, sidecar

from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.document import dump, parse

KIB = 1 << 10
TINY = KIB  # bytes of a checkpoint here
INTERVAL = 30.0  # seconds, the default between two rescans
SETTLED = 1.5  # seconds: a listed file has to have rested for one
OFTEN = 0.5  # seconds, where rescans are measured
RESCANS = 12
PATIENCE = 150.0  # seconds in which two of them have to come
SAVES = 20  # of which the median is the latency of a commit
Row = dict[str, float]


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--most", type=int, default=50_000, help="files in the watch dir")
    parser.add_argument("--sent", type=int, default=10_000, help="checkpoints that are sent, and objects")
    parser.add_argument("--life", type=int, default=20_000, help="saves in one life")
    parser.add_argument("--block", type=int, default=2_000, help="saves of a life between two looks")
    parser.add_argument("--history", type=int, default=10_000, help="entries of latest.json")
    parser.add_argument("--only", default=",".join(PARTS))
    given = parser.parse_args()
    end_on_sigterm()
    file = checkpoint(TINY)
    results: dict[str, list[Row]] = {}
    with serving(file, tls=False) as server:
        for part in given.only.split(","):
            results[part] = []
            title, measure = PARTS[part]
            print(f"\n## {title}\n", flush=True)
            for row in measure(server, file, given):
                tell(row, first=not results[part])
                results[part].append(row)
            tell_exponents(results[part])
    (CACHE / "growth.json").write_text(json.dumps(results, indent=1))


# --- tables ---------------------------------------------------------------------------------------------


def tell(row: Row, *, first: bool) -> None:
    """Print a line of a table, under its head where it is the first."""
    if first:
        print(f"| {' | '.join(row)} |\n| {' | '.join('---' for _ in row)} |")
    values = (f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for value in row.values())
    print(f"| {' | '.join(values)} |", flush=True)


def tell_exponents(rows: Sequence[Row]) -> None:
    """Print by which power of the first column each of the others grows at the end."""
    if len(rows) < 2:
        return
    before, last = (list(row.values()) for row in rows[-2:])
    sizes = before[0], last[0]
    powers = (f"{exponent(pair, sizes):.2f}" for pair in zip(before[1:], last[1:], strict=True))
    print(f"| exponent | {' | '.join(powers)} |", flush=True)


def exponent(values: tuple[float, float], sizes: tuple[float, float]) -> float:
    """The power by which the values grow with the sizes; NaN where one of them is nothing."""
    if min(values) <= 0:
        return float("nan")
    return math.log(values[1] / values[0]) / math.log(sizes[1] / sizes[0])


def tens(most: int) -> list[int]:
    """10, 100, … and the most."""
    below = [10**n for n in range(1, 9) if 10**n < most]
    return [*below, most]


# --- what is measured again and again -------------------------------------------------------------------


def fill(folder: Path, numbers: range, *, suffix: str, source: Path) -> None:
    """Put so many tiny files there, each with an inode of its own."""
    data = source.read_bytes()
    for n in numbers:
        (folder / f"step_{n}{suffix}").write_bytes(data)


def rescans(it: Sidecar) -> Row:
    """What one listing costs a daemon that does nothing else."""
    time.sleep(OFTEN)
    began, spent, took, done = metrics_of(it, "rescans_total"), 0.0, [0.0], 0.0
    deadline = time.monotonic() + PATIENCE
    # After a long one comes a long pause.
    while (len(took) <= RESCANS or done < 2) and time.monotonic() < deadline:
        before = busy(it.process.pid)
        time.sleep(OFTEN + took[-1])
        spent += busy(it.process.pid) - before  # without the scrape
        took.append(metrics_of(it, "rescan_duration_seconds"))
        done = metrics_of(it, "rescans_total") - began
    if not done:
        raise RuntimeError(f"no rescan in {PATIENCE:.0f} s: is the machine busy?")
    each = spent / done
    return {
        "rescan ms": 1000 * statistics.median(took[1:]),
        "CPU ms": 1000 * each,
        "% of a core": 100 * each / max(INTERVAL, 100 * each),  # longer pauses keep it to one
        "RSS MiB": rss_of(it.process.pid, "VmRSS") / MIB,
    }


def metrics_of(it: Sidecar, name: str) -> float:
    """The sum of a metric's values, over its labels."""
    address = json.loads((it.watch / ".ckpt-sidecar" / "spool.json").read_text())["address"]
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    wanted = re.compile(rf"ckpt_sidecar_{name}(\{{.*\}})? (.*)")
    return sum(float(match[2]) for match in map(wanted.fullmatch, lines) if match)


def busy(pid: int) -> float:
    """CPU seconds of its living threads, finer than the kernel's ticks."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in tasks) / 1e9


def requests(server: Server, before: dict[str, int]) -> int:
    """How many were made since."""
    after = counts(server)
    return sum(after[name] - before[name] for name in after if name not in ("came", "went"))


def size_below(folder: Path) -> int:
    """Bytes of the files there, and below."""
    return sum(each.lstat().st_size for each in folder.rglob("*") if each.is_file())


# --- files that are no checkpoints ----------------------------------------------------------------------


def others(server: Server, file: Path, given: argparse.Namespace) -> Iterator[Row]:
    """With so many files in the watch dir that do not match the pattern."""
    watch = new_watch()
    there = 0
    for number in tens(given.most):
        fill(watch, range(there, number), suffix=".json", source=file)
        there = number
        with sidecar(server, f"others-{number}/", "--rescan-every", str(OFTEN), watch=watch) as it:
            ready = it.until("ready")
            yield {"files": number, "start to ready s": ready} | rescans(it)
        shutil.rmtree(watch / ".ckpt-sidecar")
    shutil.rmtree(watch)


def known(server: Server, file: Path, given: argparse.Namespace) -> Iterator[Row]:
    """With so many checkpoints there that are durable: all but one by a table that is made up here."""
    watch, prefix = new_watch(), "known/"
    with sidecar(server, prefix, watch=watch) as it:
        it.until("ready")
        it.place(file, "step_0.pt")
        it.until("checkpoint_committed")
    there = 1
    for number in tens(given.most):
        fill(watch, range(there, number), suffix=".pt", source=file)
        with (watch / ".ckpt-sidecar" / "known.jsonl").open("a") as table:
            for n in range(there, number):
                status = (watch / f"step_{n}.pt").lstat()
                line = [f"step_{n}.pt", status.st_size, status.st_mtime_ns, f"0-{n}"]
                print(json.dumps(line), file=table)
        there = number
        yield {"files": number} | second_start(server, prefix, watch)
    shutil.rmtree(watch)


# --- checkpoints that are sent ---------------------------------------------------------------------------


def durable(server: Server, file: Path, given: argparse.Namespace) -> Iterator[Row]:
    """So many checkpoints found at the first start, a second start, and a start on an empty node."""
    for number in tens(given.sent):
        watch, prefix = new_watch(), f"durable-{number}/"
        fill(watch, range(number), suffix=".pt", source=file)
        time.sleep(SETTLED)
        row = {"files": number} | first_start(server, prefix, watch, number=number)
        row |= second_start(server, prefix, watch)
        row["spool KiB"] = size_below(watch / ".ckpt-sidecar") / KIB
        yield row | start_elsewhere(server, prefix)
        shutil.rmtree(watch)


def first_start(server: Server, prefix: str, watch: Path, *, number: int) -> Row:
    """All are new: each is sent."""
    with sidecar(server, prefix, watch=watch) as it:
        ready = it.until("ready")
        it.until("checkpoint_committed", number)
        spent = cpu_of(it.process.pid)
        return {"new: ready s": ready, "new: CPU ms each": 1000 * spent / number}


def second_start(server: Server, prefix: str, watch: Path) -> Row:
    """All are durable, and nothing is sent."""
    before = counts(server)
    with sidecar(server, prefix, "--rescan-every", str(OFTEN), watch=watch) as it:
        ready = it.until("ready")
        row = {"ready s": ready, "requests": float(requests(server, before))}
        return row | rescans(it)


def start_elsewhere(server: Server, prefix: str) -> Row:
    """On an empty node: the newest is restored."""
    with sidecar(server, prefix, "--take-over") as it:
        before = counts(server)
        ready = it.until("ready")
        asked = requests(server, before)
    shutil.rmtree(it.watch)
    return {"empty node: ready s": ready, "requests there": float(asked)}


# --- the history ----------------------------------------------------------------------------------------


def history(server: Server, file: Path, given: argparse.Namespace) -> Iterator[Row]:
    """With so many entries in latest.json."""
    for number in tens(given.history):
        watch, prefix = new_watch(), f"history-{number}/"
        words = ("--history", str(number))
        with sidecar(server, prefix, *words, watch=watch) as it:
            it.until("ready")
            it.place(file, "step_0.pt")
            it.until("checkpoint_committed")
        lengthen(server, prefix, number)
        with sidecar(server, prefix, *words, watch=watch) as it:
            ready = it.until("ready")
            long = len(manifest_of(server, prefix)) / KIB
            row = {"entries": number, "latest.json KiB": long, "ready s": ready}
            yield row | one_by_one(it, file, SAVES) | {"RSS MiB": rss_of(it.process.pid) / MIB}
        shutil.rmtree(watch)


def manifest_of(server: Server, prefix: str, new: bytes | None = None) -> bytes:
    """Read latest.json; or put another one in its place."""
    url = f"{server.url}/{BUCKET}/{prefix}latest.json"
    request = urllib.request.Request(url, data=new, method="GET" if new is None else "PUT")
    with urllib.request.urlopen(request) as answer:
        return bytes(answer.read())


def lengthen(server: Server, prefix: str, number: int) -> None:
    """Enter as many older checkpoints as make it `number`; nobody ever asks for their objects."""
    there = parse(manifest_of(server, prefix), prefix=prefix)
    newest = there.checkpoints[0]
    older = tuple(
        replace(newest, id=Id(0, n), name=name, objects=(replace(newest.objects[0], key=prefix + name),))
        for n, name in ((n, f"old_step_{n}.pt") for n in range(number - 1, 0, -1))
    )
    manifest_of(server, prefix, dump(replace(there, checkpoints=(newest, *older)), bucket=BUCKET))


def one_by_one(it: Sidecar, file: Path, number: int) -> Row:
    """The latency and the CPU of a save, when nothing else is on its way."""
    done = sum(each["event"] == "checkpoint_committed" for each in it.events())
    before, took = cpu_of(it.process.pid), []
    for n in range(1, number + 1):
        began = time.monotonic()
        it.place(file, f"step_{n}.pt")
        it.until("checkpoint_committed", done + n)
        took.append(time.monotonic() - began)
    spent = cpu_of(it.process.pid) - before
    return {"save ms": 1000 * statistics.median(took), "CPU ms each": 1000 * spent / number}


# --- a long life ----------------------------------------------------------------------------------------


def life(server: Server, file: Path, given: argparse.Namespace) -> Iterator[Row]:
    """One daemon, save after save, of a trainer that deletes the old ones; a row for each tenth of it."""
    watch = new_watch()
    with sidecar(server, "life/", watch=watch) as it:
        it.until("ready")
        for end in range(given.block, given.life + 1, given.block):
            before, began = cpu_of(it.process.pid), time.monotonic()
            for n in range(end - given.block, end):
                it.place(file, f"step_{n}.pt")
                (watch / f"step_{n - KEPT}.pt").unlink(missing_ok=True)
                if n % KEPT == KEPT - 1:
                    it.until("checkpoint_committed", n + 1)
            it.until("checkpoint_committed", end)
            yield {
                "saves": end,
                "CPU ms each": 1000 * (cpu_of(it.process.pid) - before) / given.block,
                "wall ms each": 1000 * (time.monotonic() - began) / given.block,
                "RSS MiB": rss_of(it.process.pid, "VmRSS") / MIB,
                "spool KiB": size_below(watch / ".ckpt-sidecar") / KIB,
                "latest.json KiB": len(manifest_of(server, "life/")) / KIB,
            }
    shutil.rmtree(watch)


KEPT = 10  # saves that the trainer keeps, and that it is ahead of the uploads

PARTS: dict[str, tuple[str, Callable[[Server, Path, argparse.Namespace], Iterator[Row]]]] = {
    "others": ("Files in the watch dir that are no checkpoints", others),
    "known": ("Checkpoints in the watch dir that are durable", known),
    "durable": (
        "Checkpoints found at the first start, then durable in the watch dir and in the bucket",
        durable,
    ),
    "history": ("Entries of latest.json (--history)", history),
    "life": ("One life", life),
}


if __name__ == "__main__":
    main()
