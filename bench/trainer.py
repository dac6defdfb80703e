"""What a trainer feels: a PyTorch loop (loop.py) that saves now and then, and whoever uploads what it saves.

    trainer.py [--mib 512] [--rounds 3] [--saves 4] [--every 100] [--threads 2 …] [--only WORD …]
               [--sidecar=OPTIONS …] [--link MIB]

`--sidecar=OPTIONS` is given once for each way to run the sidecar: --sidecar= --sidecar='--workers 1'.

Trainer, sidecar and server share the machine's cores. Where the trainer computes on all of them (two threads
on two), nobody can upload without taking something from it; `--threads 1` leaves one free. The store is as
fast as memory; with `--link` each connection carries so many MiB a second, as to a store that is far away.
Local files lie in memory (/dev/shm), so that no disk is measured; the trainer keeps two of them and deletes
older ones, which is part of its save. All ways are run in alternation; every figure is the median of the
rounds, and ratios are to the run of the same round without any upload.

save blocks     seconds for which a save keeps the loop from its next step (median of the saves)
durable after   seconds from the beginning of a save until the bucket has it (median of the saves)
step            milliseconds (median) while no upload is under way, and while one is: for the sidecar from
                `checkpoint_pinned` to `checkpoint_committed` in its log; slower is against `no upload`
a save costs    seconds that the loop loses by a save: blocked, or in steps that an upload makes slower
loop            seconds from the first step to the end of the last
all durable     seconds from the first step until the bucket has the last checkpoint
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import count
from typing import Any

from lab import BUCKET, CACHE, DOWN, HERE, Server, checkpoint, end_on_sigterm, serving, size_of
from ours import Sidecar, sidecar
from run import SMALL, VENV, prepare

SIDECARS = ("", "--nice 0", "--workers 2", "--max-bandwidth 100")  # options, for each way to run it
SECONDS = 600.0  # for a loop to end
PLACE = DOWN / f"trainer-{os.getpid()}"
_numbers = count()


@dataclass(frozen=True, slots=True)
class Way:
    """How what the loop saves gets into the bucket: `loop` by itself, or a sidecar with these options."""

    name: str
    loop: str
    sidecar: str | None = None


NONE = Way("no upload", "local")
PEERS = (
    Way("s3torchconnector", "s3torchconnector"),
    Way("Lightning to s3:// (s3fs)", "lightning"),
    Way("aws s3 sync, waited for", "aws_sync"),
    Way("aws s3 sync, in the background", "aws_sync_behind"),
)


@dataclass(frozen=True, slots=True)
class Span:
    """From when to when, in seconds since the epoch."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began

    def shared(self, others: Iterable[Span]) -> float:
        """The greatest share of it that one of the others covers."""
        return max((self._with(each) / self.seconds for each in others), default=0.0)

    def _with(self, other: Span) -> float:
        return max(0.0, min(self.ended, other.ended) - max(self.began, other.began))


@dataclass(frozen=True, slots=True)
class Told:
    """What a run told: its steps, its saves by name, and the uploads beside it by the same names."""

    steps: Sequence[Span]
    saves: dict[str, Span]
    uploads: dict[str, Span]

    @property
    def durable(self) -> dict[str, float]:
        """When each upload had ended, or else the save, where that is the upload."""
        return {name: self.uploads.get(name, save).ended for name, save in self.saves.items()}


@dataclass(frozen=True, slots=True)
class Figures:
    """What the trainer felt, in seconds; None where there is no such thing."""

    blocks: float
    quiet: float
    costs: float
    loop: float
    under: float | None = None
    durable: float | None = None
    all_durable: float | None = None
    slower: float | None = None  # times a step without any upload
    longer: float | None = None  # times a loop without any upload


# --- one run ---------------------------------------------------------------------------------------------


def play(way: Way, server: Server, asked: Sequence[str]) -> Told:
    """Run the loop once, and wait until all that it saved is durable."""
    number = next(_numbers)
    directory = PLACE / str(number)
    directory.mkdir(parents=True)
    prefix = f"trainer-{number}"
    words = ["--way", way.loop, "--directory", str(directory), "--uri", f"s3://{BUCKET}/{prefix}", *asked]
    try:
        if way.sidecar is None:
            told = looped(server, words)
        else:
            with sidecar(server, prefix, *shlex.split(way.sidecar), watch=directory) as it:
                it.until("ready")
                told = looped(server, words)
                it.until("checkpoint_committed", len(told.saves))
                told.uploads.update(uploads_of(it))
    finally:
        shutil.rmtree(directory)
    if way != NONE:
        verify(server, prefix, told)
    return told


def looped(server: Server, words: Sequence[str]) -> Told:
    """Run the loop to its end, which has to be a success."""
    command = [str(VENV / "python"), "-W", "ignore", str(HERE / "loop.py"), *words]
    environment = os.environ | server.environment()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]

    def of(what: str) -> list[tuple[str, Span]]:
        chosen = (line for line in lines if line["what"] == what)
        return [(line["name"], Span(line["began"], line["ended"])) for line in chosen]

    return Told([span for _, span in of("step")], dict(of("save")), dict(of("upload")))


def uploads_of(it: Sidecar) -> dict[str, Span]:
    """From the pin to the commit, by the times in the sidecar's log."""
    times: dict[str, dict[str, float]] = {"checkpoint_pinned": {}, "checkpoint_committed": {}}
    for each in it.events():
        if each["event"] in times:
            times[each["event"]][each["name"]] = datetime.fromisoformat(each["at"]).timestamp()
    pinned, committed = times.values()
    return {name: Span(pinned[name], committed[name]) for name in committed}


def verify(server: Server, prefix: str, told: Told) -> None:
    """See that the bucket has every checkpoint, all of one size."""
    sizes = {size_of(server, f"{prefix}/{name}") for name in told.saves}
    if len(sizes) != 1:
        raise RuntimeError(f"checkpoints of one size are objects of {sorted(sizes)} bytes")


# --- what it says ----------------------------------------------------------------------------------------


def figures_of(told: Told, durable: dict[str, float]) -> Figures:
    """Reckon what the trainer felt; `durable` says when the bucket had each checkpoint, if it ever had."""
    uploads = list(told.uploads.values())
    quiet = statistics.median(step.seconds for step in told.steps if not step.shared(uploads))
    under = [step.seconds for step in told.steps if step.shared(uploads) > 0.5]
    blocked = [save.seconds for save in told.saves.values()]
    began = told.steps[0].began
    waited = [at - told.saves[name].began for name, at in durable.items()]
    return Figures(
        blocks=statistics.median(blocked),
        quiet=quiet,
        costs=(sum(blocked) + sum(each - quiet for each in under)) / len(blocked),
        loop=told.steps[-1].ended - began,
        under=statistics.median(under) if under else None,
        durable=statistics.median(waited) if waited else None,
        all_durable=max(durable.values()) - began if durable else None,
    )


def against(each: Figures, none: Figures) -> Figures:
    """Add the ratios to the run without any upload."""
    slower = None if each.under is None else each.under / none.quiet
    return replace(each, slower=slower, longer=each.loop / none.loop)


def median_of(rounds: Sequence[Figures]) -> Figures:
    """The median of each figure, of those rounds that have it."""
    medians: dict[str, Any] = {}
    for name in Figures.__dataclass_fields__:
        found = [getattr(each, name) for each in rounds if getattr(each, name) is not None]
        medians[name] = statistics.median(found) if found else None
    return Figures(**medians)


def compare(server: Server, ways: Sequence[Way], asked: Sequence[str], *, rounds: int) -> dict[str, Figures]:
    """Measure all in alternation, by name."""
    found: dict[str, list[Figures]] = {way.name: [] for way in ways}
    for n in range(rounds):
        for way in ways:
            print(f"  round {n + 1}: {way.name}", file=sys.stderr, flush=True)
            told = play(way, server, asked)
            figures = figures_of(told, {} if way == NONE else told.durable)
            if way == NONE:
                none = figures
            found[way.name].append(against(figures, none))
    return {name: median_of(each) for name, each in found.items()}


def table(found: dict[str, Figures]) -> str:
    """The figures for a person."""
    heads = (
        "way",
        "save blocks s",
        "durable after s",
        "step ms",
        "during an upload",
        "times slower",
        "a save costs s",
        "loop s",
        "times none",
        "all durable s",
    )
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, each in found.items():
        cells = (
            name,
            said(each.blocks),
            said(each.durable),
            said(each.quiet, 1000, 1),
            said(each.under, 1000, 1),
            said(each.slower),
            said(each.costs),
            said(each.loop, 1, 1),
            said(each.longer),
            said(each.all_durable, 1, 1),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def said(value: float | None, times: float = 1, digits: int = 2) -> str:
    """A figure, or a dash."""
    return "-" if value is None else f"{value * times:.{digits}f}"


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=512, help="size of a checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--saves", type=int, default=4, help="in a run")
    parser.add_argument("--every", type=int, default=100, help="steps between two saves")
    parser.add_argument("--threads", type=int, nargs="*", default=[2], help="that torch computes with")
    parser.add_argument("--sidecar", action="append", help="its options; for each, one way to run it")
    parser.add_argument("--link", type=float, default=0, help="MiB a second of each connection; 0: no limit")
    parser.add_argument("--only", nargs="*", default=[], help="ways with one of these words in their names")
    given = parser.parse_args()
    end_on_sigterm()
    prepare()
    sidecars = [Way(f"ckpt-sidecar {each}".strip(), "local", each) for each in given.sidecar or SIDECARS]
    others = [way for way in (*sidecars, *PEERS) if any(word in way.name for word in given.only or [""])]
    results: dict[str, dict[str, Any]] = {}
    try:
        for threads in given.threads:
            what = f"{threads} threads, {given.mib} MiB every {given.every} steps, {given.rounds} rounds"
            what += f", {given.link:g} MiB/s for each connection" if given.link else ""
            print(what, file=sys.stderr)
            asked = [f"--mib={given.mib}", f"--saves={given.saves}", f"--every={given.every}"]
            with serving(checkpoint(SMALL), tls=False, link=given.link) as server:
                found = compare(
                    server, [NONE, *others], [*asked, f"--threads={threads}"], rounds=given.rounds
                )
            print(f"\n{what}\n\n{table(found)}", flush=True)
            results[what] = {name: asdict(each) for name, each in found.items()}
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)
    (CACHE / ("link.json" if given.link else "trainer.json")).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
