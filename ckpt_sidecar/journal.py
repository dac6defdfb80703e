"""What the spool writes down, as JSON, and reads back: its record of itself, pins and their entries."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from ckpt_sidecar.bucket import crc64
from ckpt_sidecar.checkpoint import Caught, Checkpoint, File, Id, Pinned, State, Uploading
from ckpt_sidecar.disk import Disk, file_of


@dataclass(frozen=True, slots=True)
class Record:
    """What the spool knows of itself. `generation` 0: never claimed. `counter`: ids reserved so far.

    `target` is the bucket and prefix, as a URI, that it is the queue of.
    """

    spool: str
    target: str = ""
    attempt: str = ""
    generation: int = 0
    counter: int = 0
    address: str = ""
    pid: int = 0


@dataclass(slots=True)
class Recovered:
    """What a restart finds: checkpoints on their way, files not yet judged, what is broken."""

    checkpoints: list[Checkpoint] = field(default_factory=list)
    caught: list[Caught] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)


def read_json(raw: bytes) -> Any:
    """Return what the JSON says; ValueError for whatever is none, also if it is nested without end."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deep") from None


def load_record(data: Mapping[str, Any]) -> Record:
    """Read what the spool noted of itself; TypeError when it is not that."""
    record = Record(**{name: data[name] for name in asdict(Record("")) if name in data})
    for name, value in asdict(record).items():
        if type(value) is not type(getattr(Record(""), name)):
            raise TypeError(f"{name} is {value!r}")
    return record


def pid_of(home: Path) -> str:
    """Return the pid that the sidecar of the spool at `home` has noted, or "unknown"."""
    try:
        return str(json.loads((home / "spool.json").read_bytes())["pid"] or "unknown")
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


# --- the journal entry: the same states as everywhere, as JSON ---------------------------------------


def dump_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the journal holds of a checkpoint on its way.

    What is stored but not committed is journalled as it was before: the bucket tells it better.
    """
    state: dict[str, Any] = {"state": "pinned"}
    if isinstance(checkpoint.state, Uploading):
        state = {"state": "uploading", "upload_ids": list(checkpoint.state.upload_ids)}
    return state | {
        "id": str(checkpoint.id),
        "name": checkpoint.name,
        "saved_at": checkpoint.saved_at,
        "files": [asdict(file) for file in checkpoint.files],
    }


def load_entry(data: Mapping[str, Any]) -> Checkpoint:
    """Read what `dump_entry` wrote; ValueError, LookupError or TypeError when it is not that."""
    state: State
    match data["state"]:
        case "pinned":
            state = Pinned()
        case "uploading":
            (upload_id,) = data["upload_ids"]
            state = Uploading((upload_id and str(upload_id),))
        case other:
            raise ValueError(f"unknown state {other!r}")
    files = tuple(File(str(each["name"]), int(each["size"]), int(each["mtime_ns"])) for each in data["files"])
    if [file.name for file in files] != [data["name"]]:
        raise ValueError(f"not just one file named {data['name']!r}")
    return Checkpoint(Id.parse(data["id"]), data["name"], files, int(data["saved_at"]), state)


def read_entry(path: Path, bare: Checkpoint) -> tuple[Checkpoint, str | None]:
    """Return the checkpoint as journalled, or `bare` (pinned) and what is wrong with its entry."""
    try:
        read = load_entry(read_json(path.read_bytes()))
    except FileNotFoundError:
        return bare, None
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        return bare, f"cannot be read ({error}); the pin itself is whole and is taken up from the start"
    if (read.id, read.name) != (bare.id, bare.name):
        return bare, "names another checkpoint than its pin; the pin is taken up from the start"
    return read, None


def pin_dirs(pins: Path) -> list[tuple[Id, Path]]:
    """Return each pin's directory and the id that is its name, the oldest first."""
    found = []
    for path in pins.iterdir():
        with suppress(ValueError):
            found.append((Id.parse(path.name), path))
    return sorted(found)


def catch_name(inode: tuple[int, int], name: str) -> str:
    """Return the name of the directory in which a file is held."""
    return f"{inode[0]:x}-{inode[1]:x}-{crc64(os.fsencode(name)):x}"


# --- what a predecessor left -------------------------------------------------------------------------


def read_back(pins: Path, caught: Path, disk: Disk) -> Recovered:
    """Read what is pinned and caught there, the oldest pin first; remove what has no bytes any more."""
    found = Recovered()
    for id_, path in pin_dirs(pins):
        _read_pin(id_, path, found, disk=disk)
    for path in pins.glob("*.json*"):
        if path.suffix == ".tmp":
            disk.unlink(path)
        elif not path.with_suffix("").is_dir():
            found.broken.append((str(path), "has no pin any more: its bytes were removed from this disk"))
            disk.unlink(path)
    found.caught += _read_catches(caught, disk)
    return found


def _read_pin(id_: Id, path: Path, found: Recovered, *, disk: Disk) -> None:
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    if not files:  # its bytes were removed; what is said of them is in the entry
        disk.remove_tree(path)
    elif len(files) > 1:
        found.broken.append((str(path), f"holds {len(files)} files, not one; it is left as it is"))
    else:
        now = file_of(str(files[0].relative_to(path)), files[0].stat())
        bare = Checkpoint(id_, now.name, (now,), now.mtime_ns)
        checkpoint, complaint = read_entry(path.with_name(f"{id_}.json"), bare)
        if complaint is not None:
            found.broken.append((f"{path}.json", complaint))
        found.checkpoints.append(checkpoint)


def _read_catches(home: Path, disk: Disk) -> list[Caught]:
    """Read what is held. A hold is named after its file, the number of whose disk may be another by now.

    All that are misnamed give their names up before the first of them takes its own: on a copied disk that
    may be the name of another's hold. Who still finds its name taken is a second link of the same file.
    """
    found, moved = {}, []
    for path in home.iterdir():
        files = [file for file in path.rglob("*") if file.is_file()]
        if path.name.startswith("new-") or len(files) != 1:  # a catch that was cut
            disk.remove_tree(path)
            continue
        status, name = files[0].stat(), str(files[0].relative_to(path))
        inode = (status.st_dev, status.st_ino)
        settled = home / catch_name(inode, name)
        found[settled] = Caught(name, inode, str(settled / name))
        if path != settled:
            aside = next(free for n in count() if not (free := home / f"moved-{n}").exists())
            disk.rename(path, aside)
            moved.append((aside, settled))
    for aside, settled in moved:
        if settled.exists():
            disk.remove_tree(aside)
        else:
            disk.rename(aside, settled)
    return [*found.values()]
