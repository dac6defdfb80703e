"""Ours and the peers side by side: the same file, the same server, in alternation. `make bench` runs it.

    run.py [--mib 4096] [--rounds 3] [--only WORD …]
    run.py --endpoint URL …    against a real store, with the credentials of the environment

Every figure is the median of the rounds. CPU is what a client spent itself, its start taken off: the same
command with a small file. The server's CPU is not in it.
"""

from __future__ import annotations

import argparse
import atexit
import json
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import (
    BUCKET,
    CACHE,
    DOWN,
    HERE,
    MIB,
    Cost,
    Server,
    checkpoint,
    cost_of,
    end_on_sigterm,
    erase,
    serving,
    size_of,
    warm,
)
from mounts import copied_from, copied_to, rclone_remote, usable
from ours import restore_words, upload
from store import Store, borrowed

VENV = CACHE / "venv" / "bin"
SMALL = 256 << 10  # bytes of the checkpoint by which the start is measured; the server keeps it
NAME = "step_1.pt"
OURS = "ckpt-sidecar"
FEWER = ("--workers", "2")  # a second way to run it: as many as this machine may have cores
LIBRARIES = ("boto3", "awscrt", "s3torchconnector", "obstore", "s3fs")
PEERS = ("aws s3 cp", "aws s3 sync", "s5cmd", "rclone", *LIBRARIES)
FEW = (OURS, "aws s3", "s5cmd", "rclone", "obstore", "mount")  # where a real store is the slow part


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
        case "aws s3 sync":
            folders = [each.rpartition("/")[0] for each in there]
            return [str(VENV / "aws"), "s3", "sync", *folders, "--only-show-errors"]
        case "s5cmd":
            return [str(VENV / "s5cmd"), "--endpoint-url", server.url, "cp", *there]
        case "rclone":
            remote = f":s3:{BUCKET}/{key}"
            there = (str(file), remote) if way == "put" else (remote, str(file))
            return [str(VENV / "rclone"), "copyto", *there, *rclone_remote(server), "--ignore-times"]
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


def floors(server: Server, way: str) -> Sequence[str]:
    """The floors that this server lets be measured: they sign nothing."""
    if isinstance(server, Store):
        return ()
    if way == "get":
        return ("floor: recv", "floor: recvfile", "floor: recvfile4")
    kernels = () if server.url.startswith("https:") else ("floor: sendfile",)
    return ("floor: sendall", "floor: readsend", *kernels)


def allowed(server: Server) -> Sequence[str]:
    """What the sidecar has to be told where the store may have no conditional writes."""
    return ("--allow-unfenced",) if isinstance(server, Store) else ()


def uploads(server: Server, file: Path, small: Path) -> dict[str, Callable[[int], Cost]]:
    """By client: what one upload costs, its start taken off; what was put there is deleted."""

    def ours(*options: str) -> Callable[[int], Cost]:
        def measure(_round: int) -> Cost:
            cost = upload(server, file, "run", *options, *allowed(server))
            erase(server, "run/")
            return cost

        return measure

    def other(name: str) -> Callable[[int], Cost]:
        def measure(_round: int) -> Cost:
            keys = (f"small/{NAME}", f"large/{NAME}")
            words = [
                peer(name, server, "put", each, key) for each, key in zip((small, file), keys, strict=True)
            ]
            start, whole = (cost_of(each, server.environment()) for each in words)
            if size_of(server, "floor" if name.startswith("floor") else keys[1]) != file.stat().st_size:
                raise RuntimeError(f"{name} has put something else there")
            for key in keys:
                erase(server, key)
            return net(whole, start)

        return measure

    def mount(name: str) -> Callable[[int], Cost]:
        return lambda _round: copied_to(name, server, file)

    return {
        OURS: ours(),
        f"{OURS} {' '.join(FEWER)}": ours(*FEWER),
        **{name: other(name) for name in (*floors(server, "put"), *PEERS)},
        **{name: mount(name) for name in usable(server)},
    }


def seed(server: Server, file: Path, small: Path) -> Sequence[str]:
    """Put there what is to come down, for ours and for the others, whose keys are returned."""
    keys = (f"small/{NAME}", f"large/{NAME}")
    for each, key in zip((small, file), keys, strict=True):
        upload(server, each, f"restore-{key.partition('/')[0]}", *allowed(server))
        cost_of(peer("aws s3 cp", server, "put", each, key), server.environment())
    if floors(server, "get"):
        cost_of(peer("floor: sendall", server, "put", file, ""), server.environment())
    return keys


def restores(server: Server, file: Path, small: Path) -> dict[str, Callable[[int], Cost]]:
    """By client: what one download costs, its start taken off; what is restored is put there first."""
    environment = server.environment()
    keys = seed(server, file, small)
    target = DOWN / "down" / NAME
    target.parent.mkdir(parents=True, exist_ok=True)

    def ours(*options: str) -> Callable[[int], Cost]:
        def measure(_round: int) -> Cost:
            costs = []
            for name in ("small", "large"):
                words = restore_words(f"restore-{name}", DOWN / "watch")
                costs.append(cost_of([*words, *options], environment))
                if not (DOWN / "watch" / NAME).exists():
                    raise RuntimeError("it was not restored")
                shutil.rmtree(DOWN / "watch")
            return net(costs[1], costs[0])

        return measure

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

    def mount(name: str) -> Callable[[int], Cost]:
        return lambda _round: copied_from(name, server, keys[1], target=target)

    clients = {
        OURS: ours(),
        f"{OURS} {' '.join(FEWER)}": ours(*FEWER),
        **{name: other(name, "floor") for name in floors(server, "get")},
        **{name: other(name, *keys) for name in PEERS},
        **{name: mount(name) for name in usable(server)},
    }
    return {name: warmed(measure, file.stat().st_size) for name, measure in clients.items()}


def warmed(measure: Callable[[int], Cost], size: int) -> Callable[[int], Cost]:
    """The same, with so much memory at hand that was in use just before."""

    def both(number: int) -> Cost:
        warm(size)
        return measure(number)

    return both


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
    ours = next((row for row in rows if row.client == OURS), rows[0])
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


def alone(file: Path) -> Path:
    """The same file in a directory of its own, under the name that all its copies have."""
    path = CACHE / "alone" / file.stem / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.hardlink_to(file)
    return path


def measured(server: Server, given: argparse.Namespace, file: Path) -> list[dict[str, object]]:
    """Measure each way against this server, and print the tables."""
    small = alone(checkpoint(SMALL))
    results: list[dict[str, object]] = []
    for way in given.ways:
        about = {"way": way, "url": server.url, "mib": given.mib, "rounds": given.rounds}
        what = f"{way}, {server.url.partition(':')[0]}, {given.mib} MiB, {given.rounds} rounds"
        print(what, file=sys.stderr)
        clients = (uploads if way == "up" else restores)(server, file, small)
        rows = compare(clients, rounds=given.rounds, only=given.only)
        print(f"\n{what}\n\n{table(rows)}", flush=True)
        results.append({**about, "rows": [asdict(row) for row in rows]})
    return results


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=4096, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", default=["up", "down"])
    parser.add_argument("--schemes", nargs="*", default=["http", "https"])
    parser.add_argument("--endpoint", help=f"a store, where a bucket {BUCKET} is made and deleted")
    parser.add_argument("--only", nargs="*", help="clients with one of these words in their names")
    given = parser.parse_args()
    end_on_sigterm()
    if given.only is None:
        given.only = FEW if given.endpoint else ()
    prepare()
    shutil.rmtree(DOWN, ignore_errors=True)
    atexit.register(shutil.rmtree, DOWN, ignore_errors=True)
    file = alone(checkpoint(given.mib * MIB))
    results: list[dict[str, object]] = []
    if given.endpoint:
        with borrowed(given.endpoint) as store:
            results += measured(store, given, file)
    else:
        for scheme in given.schemes:
            with serving(file, tls=scheme == "https") as server:
                results += measured(server, given, file)
    about = {"python": platform.python_version(), "machine": platform.platform()}
    name = "store.json" if given.endpoint else "transfers.json"
    (CACHE / name).write_text(json.dumps({"about": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
