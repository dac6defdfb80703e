"""Ours and the peers side by side: the same file, the same server, in alternation. `make bench` runs it.

    run.py [--mib 4096] [--rounds 5] [--only WORD …]

Every figure is the median of the rounds. CPU is what a client spent itself, its start taken off: the same
command with a small file. The server's CPU is not in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import BUCKET, CACHE, DOWN, HERE, MIB, Cost, Server, checkpoint, cost_of, serving, size_of
from ours import restore_words, upload

VENV = CACHE / "venv" / "bin"
SMALL = 256 << 10  # bytes of the checkpoint by which the start is measured; the server keeps it
LIBRARIES = ("boto3", "awscrt", "s3torchconnector", "obstore", "s3fs")


@dataclass(frozen=True, slots=True)
class Row:
    """One client's figures: medians, and the spread of the wall time."""

    client: str
    wall: float
    cpu: float
    rss: int
    least: float
    most: float


def peer(name: str, server: Server, way: str, file: Path, key: str) -> Sequence[str]:
    """The command by which a peer moves the file."""
    uri = f"s3://{BUCKET}/{key}"
    there = (str(file), uri) if way == "put" else (uri, str(file))
    match name:
        case "aws s3 cp":
            return [str(VENV / "aws"), "s3", "cp", *there, "--only-show-errors"]
        case "s5cmd":
            return [str(VENV / "s5cmd"), "--endpoint-url", server.url, "cp", *there]
        case "rclone":
            remote = f":s3:{BUCKET}/{key}"
            there = (str(file), remote) if way == "put" else (remote, str(file))
            ours = ["--s3-provider", "Other", "--s3-env-auth", "--s3-endpoint", server.url]
            return [str(VENV / "rclone"), "copyto", *there, *ours, "--s3-no-check-bucket", "--ignore-times"]
        case _ if name.startswith("floor: "):
            return [
                sys.executable,
                str(HERE / "floor.py"),
                name.removeprefix("floor: "),
                server.url,
                str(file),
            ]
        case _:
            return [str(VENV / "python"), str(HERE / "client.py"), name, way, str(file), key]


PEERS = ("aws s3 cp", "s5cmd", "rclone", *LIBRARIES)


def uploads(server: Server, file: Path, small: Path, *, tls: bool) -> dict[str, Callable[[int], Cost]]:
    """By client: what one upload costs, its start taken off."""

    def other(name: str) -> Callable[[int], Cost]:
        def measure(_round: int) -> Cost:
            start = cost_of(peer(name, server, "put", small, "small"), server.environment())
            whole = cost_of(peer(name, server, "put", file, "large"), server.environment())
            if size_of(server, "floor" if name.startswith("floor") else "large") != file.stat().st_size:
                raise RuntimeError(f"{name} has put something else there")
            return net(whole, start)

        return measure

    floors = ("floor: sendall",) if tls else ("floor: sendall", "floor: sendfile")
    return {
        "ckpt-sidecar": lambda n: upload(server, file, f"run-{n}"),
        **{name: other(name) for name in (*floors, *PEERS)},
    }


def restores(server: Server, file: Path, small: Path) -> dict[str, Callable[[int], Cost]]:
    """By client: what one download costs, its start taken off; what is restored is put there first."""
    environment = server.environment()
    for each, name in ((small, "small"), (file, "large")):
        upload(server, each, f"restore-{name}")
        cost_of(peer("floor: sendall", server, "put", each, ""), environment)
        cost_of(peer("aws s3 cp", server, "put", each, name), environment)
    DOWN.mkdir(exist_ok=True)
    target = DOWN / "down.pt"

    def ours(_round: int) -> Cost:
        costs = []
        for name in ("small", "large"):
            costs.append(cost_of(restore_words(f"restore-{name}", DOWN / "watch"), environment))
            if not (DOWN / "watch" / "step_1.pt").exists():
                raise RuntimeError("it was not restored")
            shutil.rmtree(DOWN / "watch")
        return net(costs[1], costs[0])

    def other(name: str, *keys: str) -> Callable[[int], Cost]:
        def measure(_round: int) -> Cost:
            costs = [Cost(0, 0, 0)]  # a floor's start is none
            for key in keys:
                target.unlink(missing_ok=True)
                costs.append(cost_of(peer(name, server, "get", target, key), environment))
            if target.stat().st_size != file.stat().st_size and name != "floor: recv":
                raise RuntimeError(f"{name} has got something else")
            target.unlink()
            return net(costs[-1], costs[-2])

        return measure

    floors = {name: other(name, "floor") for name in ("floor: recv", "floor: recvfile")}
    return {"ckpt-sidecar": ours, **floors, **{name: other(name, "small", "large") for name in PEERS}}


def net(whole: Cost, start: Cost) -> Cost:
    """What is left of a cost without that of the start; memory is the whole's."""
    return Cost(whole.wall - start.wall, whole.cpu - start.cpu, whole.rss)


def compare(clients: dict[str, Callable[[int], Cost]], *, rounds: int, only: Sequence[str]) -> list[Row]:
    """Measure all in alternation; the fastest first."""
    chosen = {name: each for name, each in clients.items() if not only or any(word in name for word in only)}
    costs: dict[str, list[Cost]] = {name: [] for name in chosen}
    for n in range(rounds):
        for name, measure in chosen.items():
            print(f"  round {n + 1}: {name}", file=sys.stderr, flush=True)
            costs[name].append(measure(n))
    rows = [
        Row(
            name,
            statistics.median(each.wall for each in found),
            statistics.median(each.cpu for each in found),
            max(each.rss for each in found),
            min(each.wall for each in found),
            max(each.wall for each in found),
        )
        for name, found in costs.items()
    ]
    return sorted(rows, key=lambda row: row.wall)


def table(rows: Sequence[Row]) -> str:
    """The rows for a person; ratios are to ours."""
    ours = next((row for row in rows if row.client == "ckpt-sidecar"), rows[0])
    lines = [
        "| client | wall s | times ours | CPU s | times ours | peak RSS MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.client} | {row.wall:.2f} ({row.least:.2f} to {row.most:.2f}) | {row.wall / ours.wall:.2f} "
        f"| {row.cpu:.2f} | {row.cpu / ours.cpu:.2f} | {row.rss / MIB:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def prepare() -> None:
    """Install the peers, where they are not."""
    wanted = (HERE / "requirements.txt").read_text()
    installed = CACHE / "venv" / "installed"
    if installed.exists() and installed.read_text() == wanted:
        return
    subprocess.run([sys.executable, "-m", "venv", str(CACHE / "venv")], check=True)
    pip = [str(VENV / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
    installed.write_text(wanted)


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=4096, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="*", default=["up", "down"])
    parser.add_argument("--schemes", nargs="*", default=["http", "https"])
    parser.add_argument(
        "--only", nargs="*", default=[], help="clients with one of these words in their names"
    )
    given = parser.parse_args()
    prepare()
    file, small = checkpoint(given.mib * MIB), checkpoint(SMALL)
    results: dict[str, list[dict[str, object]]] = {}
    for scheme in given.schemes:
        for way in given.ways:
            with serving(file, tls=scheme == "https") as server:
                what = f"{way}, {scheme}, {given.mib} MiB, {given.rounds} rounds"
                print(what, file=sys.stderr)
                clients = (
                    uploads(server, file, small, tls=scheme == "https")
                    if way == "up"
                    else restores(server, file, small)
                )
                rows = compare(clients, rounds=given.rounds, only=given.only)
            print(f"\n{what}\n\n{table(rows)}", flush=True)
            results[what] = [asdict(row) for row in rows]
    about = {"python": platform.python_version(), "machine": platform.platform()}
    (CACHE / "transfers.json").write_text(json.dumps({"about": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
