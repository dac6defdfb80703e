"""Does an upload push the trainer's data out of memory? What is in the page cache, before and after.

pagecache.py [--mib 4096] [--data 512] [--spare 256] [--only WORD …]

In a control group that has memory for the data set and so much to spare, the data set is read (once, or twice
as by a second epoch), and then a checkpoint is uploaded that is larger than the group's memory. Without a
group there is room for all, and what is looked at is the checkpoint itself. Needs root for the group.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lab import CACHE, MIB, Server, checkpoint, cost_of, end_on_sigterm, serving
from ours import sidecar
from run import SMALL, peer, prepare

OURS = "ckpt-sidecar"
READERS = {  # they read the file, and do nothing else; the second lets its pages go
    "cat": ("cat", "{file}"),
    "dd nocache": ("dd", "if={file}", "of=/dev/null", "bs=8M", "iflag=nocache", "status=none"),
}
CLIENTS = (*READERS, OURS, "aws s3 cp", "s5cmd", "rclone")
SECONDS = 10.0  # for a group to be given back
Row = dict[str, str | float]


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=4096, help="size of the checkpoint")
    parser.add_argument("--data", type=int, default=512, help="size of the data set (MiB)")
    parser.add_argument("--spare", type=int, default=256, help="the group's memory besides (MiB)")
    parser.add_argument("--only", nargs="*", default=[], help="clients with one of these words")
    given = parser.parse_args()
    end_on_sigterm()
    prepare()
    clients = [name for name in CLIENTS if not given.only or any(word in name for word in given.only)]
    file, data = checkpoint(given.mib * MIB), checkpoint(given.data * MIB)
    parts = {
        "alone": alone(clients, file),
        "in a group": beside(clients, file, data, spare=given.spare * MIB),
    }
    results = {}
    for title, rows in parts.items():
        print(f"\n## {title}\n", flush=True)
        results[title] = list(told(rows))
    (CACHE / "pagecache.json").write_text(json.dumps(results, indent=1))


def told(rows: Iterator[Row]) -> Iterator[Row]:
    """Print each as a line of a table, as it comes."""
    for n, row in enumerate(rows):
        if n == 0:
            print(f"| {' | '.join(row)} |\n| {' | '.join('---' for _ in row)} |")
        values = (each if isinstance(each, str) else f"{each:.1f}" for each in row.values())
        print(f"| {' | '.join(values)} |", flush=True)
        yield row


# --- what is measured -----------------------------------------------------------------------------------


def alone(clients: Sequence[str], file: Path) -> Iterator[Row]:
    """The checkpoint's own pages: left by the trainer that has just written it, or not there before."""
    with serving(checkpoint(SMALL), tls=False) as server:
        for name in clients:
            row: Row = {"client": name}
            for when, there in (("in memory", True), ("not in memory", False)):
                (keep if there else evict)(file)
                row[f"{when}: before %"] = resident(file)
                send(server, name, file)
                row[f"{when}: after %"] = resident(file)
            yield row


def beside(clients: Sequence[str], file: Path, data: Path, *, spare: int) -> Iterator[Row]:
    """The data set, and the checkpoint that does not fit beside it."""
    with serving(checkpoint(SMALL), tls=False) as server:
        for name in clients:
            for times in (1, 2):
                for each in (file, data):
                    evict(each)
                with group(data.stat().st_size + spare) as home:
                    if home is None:
                        print("no control group for memory can be made here: this part is left out")
                        return
                    cost_of([*inside(home), "cat", *[str(data)] * times], {})
                    before, began = resident(data), time.monotonic()
                    send(server, name, file, home)
                    yield {
                        "client": name,
                        "data set read": f"{times} x",
                        "of it in memory before %": before,
                        "after %": resident(data),
                        "of the checkpoint after %": resident(file),
                        "upload s": time.monotonic() - began,
                    }


def send(server: Server, name: str, file: Path, home: Path | None = None) -> None:
    """Upload it, in the group if there is one."""
    if name == OURS:
        with sidecar(server, f"pagecache-{uuid.uuid4()}/") as it:
            if home is not None:
                (home / "cgroup.procs").write_text(str(it.process.pid))
            it.until("ready")
            it.place(file, "step_1.pt")
            it.until("checkpoint_committed")
        return
    if name in READERS:
        words: Sequence[str] = [word.format(file=file) for word in READERS[name]]
    else:
        words = peer(name, server, "put", file, "large")
    cost_of([*inside(home), *words], server.environment())


# --- the page cache -------------------------------------------------------------------------------------


def resident(file: Path) -> float:
    """How much of the file is in the page cache, in percent."""
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        pages = ctypes.create_string_buffer(-(-len(mapped) // mmap.PAGESIZE))
        start = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), pages)
        del start  # else the mapping could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    return 100 * sum(each & 1 for each in pages.raw) / len(pages.raw)


def evict(file: Path) -> None:
    """Have none of it in the page cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(file) > 1:
        raise RuntimeError(f"{file} stays in memory: on a disk, and not mapped by anybody, it would not")


def keep(file: Path) -> None:
    """Have all of it in the page cache, as after a save."""
    checkpoint(int(file.stem.rpartition("-")[2]))


# --- the control group ----------------------------------------------------------------------------------


@contextmanager
def group(limit: int) -> Iterator[Path | None]:
    """A control group of ours, version 1 or 2, with so much memory (bytes); None where none can be made."""
    home = made(limit)
    try:
        yield home
    finally:
        if home is not None:
            end = time.monotonic() + SECONDS
            while home.exists() and time.monotonic() < end:
                with suppress(OSError):  # its last process is not quite gone yet
                    home.rmdir()
                time.sleep(0.05)


def made(limit: int) -> Path | None:
    """Make it below the one that we are in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, ours = line.split(":")
        root = "/sys/fs/cgroup" if not kinds else "/sys/fs/cgroup/memory"
        home = Path(root + ours, f"bench-{uuid.uuid4()}")
        if kinds not in ("", "memory") or not (home.parent / "cgroup.procs").exists():
            continue
        with suppress(OSError):
            home.mkdir()
            for name in ("memory.max", "memory.limit_in_bytes"):
                if (home / name).exists():
                    (home / name).write_text(str(limit))
                    return home
            home.rmdir()
    return None


def inside(home: Path | None) -> Sequence[str]:
    """The words before a command that run it in the group."""
    if home is None:
        return ()
    return ("sh", "-c", f'echo $$ >{home}/cgroup.procs && exec "$@"', "sh")


if __name__ == "__main__":
    main()
