"""What must hold however a sidecar was killed, stalled or raced: one judge for every history.

`flaws_in_history` looks at all that was ever written to the bucket, `flaws_at_rest` at what a life that ended
in order may leave behind, and `ending` is what one compares with an undisturbed run. `fingerprint` tells
states apart: two kills that leave the same one need only one recovery.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_sidecar.bucket import crc64
from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.document import parse
from ckpt_sidecar.manifest import Entry, Manifest, described
from ckpt_sidecar.names import HOME
from tests.crash.lives import Saved, Store, Written
from tests.engine.support import LATEST, PREFIX

_IDS = re.compile(r"(?<![\w-])(\d{1,18})-(\d{1,18})(?![\w-])")
_STAYS = ("caught", "aside")
NOW = time.time_ns()  # what the trainers save was saved long before
_UPLOADS = re.compile(r"upload-\d+")


# --- the history of the bucket -----------------------------------------------------------------------


def flaws_in_history(store: Store, saved: Iterable[Saved]) -> list[str]:
    """What went wrong at any time: something torn, something lost, a step backwards."""
    completed = {(each.name, each.saved_at): each.content for each in saved}
    return [*_flaws_in_objects(store.written, completed), *_flaws_in_manifests(store.written)]


def _flaws_in_objects(
    written: Iterable[Written], completed: Mapping[tuple[str, int], bytes]
) -> Iterator[str]:
    """Every object is under the prefix, is just what the trainer completed, and the id at its key grows."""
    greatest: dict[str, Id] = {}
    for each in written:
        if not each.key.startswith(PREFIX):
            yield f"{each.key} was written, outside the prefix"
        if each.key == LATEST or each.ref is None:
            continue
        entry = described(each.ref, each.key.removeprefix(PREFIX), 0)
        if entry is None:
            yield f"{each.key} does not say what it is: {each.ref.metadata}"
            continue
        if completed.get((entry.name, entry.saved_at)) != each.body:
            yield f"{each.key} holds what the trainer never completed"
        if entry.id < greatest.get(each.key, entry.id):
            yield f"{entry.id} was written to {each.key} over {greatest[each.key]}"
        greatest[each.key] = max(entry.id, greatest.get(each.key, entry.id))


def _flaws_in_manifests(written: Iterable[Written]) -> Iterator[str]:
    """The newest and the generation never go back; what is named stands there, or a newer save of it does."""
    standing: dict[str, Written] = {}
    before = Manifest()
    ids: dict[tuple[str, int], Id] = {}
    for each in written:
        standing[each.key] = each
        if each.key != LATEST:
            yield from _lost(before, standing) if each.ref is None else ()
            continue
        now = parse(each.body, prefix=PREFIX)
        if now.generation < before.generation:
            yield f"generation {now.generation} was written over {before.generation}"
        if before.newest and (not now.newest or now.newest.id < before.newest.id):
            yield f"the newest was {before.newest.id}, and then {now.newest and now.newest.id}"
        yield from _lost(now, standing)
        for entry in now.checkpoints:
            id_ = ids.setdefault((entry.name, entry.saved_at), entry.id)
            if id_ != entry.id:
                yield f"{entry.name} was committed as {id_} and as {entry.id}"
        before = now


def _lost(manifest: Manifest, standing: Mapping[str, Written]) -> Iterator[str]:
    for entry in manifest.checkpoints:
        there = standing.get(entry.objects[0].key)
        if there is None or there.ref is None:
            yield f"{entry.id} {entry.name} is named, and there is no such object"
        elif there.ref.etag != entry.objects[0].etag and not _newer(there, entry):
            yield f"{entry.id} {entry.name} is named, and another object stands there"


def _newer(there: Written, entry: Entry) -> bool:
    found = described(there.ref, entry.name, 0) if there.ref else None
    return found is not None and found.id > entry.id


# --- the end -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ending:
    """Where a history has come to: checkpoints by the number that the trainer gave them.

    `listed` by latest.json, the newest first; `objects` by key; `files` in the watch dir, by name.
    """

    listed: tuple[int, ...]
    objects: Mapping[str, int]
    files: Mapping[str, int]


def ending(store: Store, root: Path, saved: Iterable[Saved]) -> Ending:
    """Where it has come to; what is no checkpoint of the trainer's, byte for byte, is numbered -1."""
    numbers = {(each.name, each.content, each.saved_at): each.number for each in saved}
    manifest = parse(store.body(LATEST), prefix=PREFIX)
    objects, files, listed = {}, {}, []
    for key, each in store.objects.items():
        if key != LATEST:
            name = key.removeprefix(PREFIX)
            entry = described(each.ref, name, 0)
            objects[key] = numbers.get((name, each.body, entry.saved_at if entry else 0), -1)
    for entry in manifest.checkpoints:
        at = store.objects.get(entry.objects[0].key)
        same = at is not None and at.ref.etag == entry.objects[0].etag
        listed.append(numbers.get((entry.name, at.body, entry.saved_at), -1) if at and same else -1)
    for path in _files(root):
        if HOME not in path.parts:
            name = str(path.relative_to(root))
            files[name] = numbers.get((name, path.read_bytes(), path.stat().st_mtime_ns), -1)
    return Ending(tuple(listed), objects, files)


def flaws_at_rest(store: Store, root: Path) -> list[str]:
    """What a life that ended in order, with all durable, may not leave behind.

    A catch may be left: a hint that came too late to be judged is for the next life.
    """
    manifest = parse(store.body(LATEST), prefix=PREFIX)
    home = root / HOME
    left = [str(path.relative_to(root)) for path in _files(home)]
    allowed = {f"{HOME}/{name}" for name in ("lock", "spool.json", "known.jsonl")}
    flaws = [f"{each} is left" for each in left if each not in allowed and Path(each).parts[1] not in _STAYS]
    flaws += [f"pins/{each.name} is left" for each in (home / "pins").iterdir()]
    flaws += [f"upload {id_} at {each.key} is left" for id_, each in store.uploads.items()]
    flaws += [f"{each.name} stays announced" for each in manifest.uploads]
    return flaws + [f"{each.key} stays about to be deleted" for each in manifest.expiring]


def manifests(store: Store) -> list[Manifest]:
    """All versions of latest.json that ever were."""
    return [parse(each.body, prefix=PREFIX) for each in store.written if each.key == LATEST and each.ref]


def caught(root: Path, saved: Iterable[Saved]) -> list[str]:
    """Which whole checkpoints are held without a verdict; what is torn may be, for as long as it takes."""
    whole = {each.content for each in saved}
    return [path.name for path in _files(root / HOME / "caught") if path.read_bytes() in whole]


def _files(root: Path) -> list[Path]:
    return sorted(Path(at, name) for at, _, names in os.walk(root) for name in names)


# --- states ------------------------------------------------------------------------------------------


def fingerprint(store: Store, root: Path, *more: object) -> str:
    """What a kill here and now would leave, without what tells no two recoveries apart.

    That is chance and time (tokens, ids of spools, pids, inodes), and of ids and generations all but their
    order.
    """
    disk = None
    while disk is None:
        with suppress(FileNotFoundError):  # another thread of the life is at work: look anew
            disk = _of_disk(root)
    text = json.dumps([_of_bucket(store), disk, *more], default=repr, sort_keys=True)
    spools = list(dict.fromkeys(re.findall(r'\\?"spool\\?": \\?"(\w+)', text)))
    for n, spool in enumerate(spools):
        text = text.replace(spool, f"spool {n}")
    uploads = list(dict.fromkeys(_UPLOADS.findall(text)))
    text = _UPLOADS.sub(lambda found: f"upload {uploads.index(found[0])}", text)
    return _ranked(text)


def _ranked(text: str) -> str:
    """Ids and generations as their places in their own order."""
    claims = [int(each) for each in re.findall(r"generation\W+(\d+)", text)]
    ids = sorted({(int(a), int(b)) for a, b in _IDS.findall(text)})
    places = {each: n for n, each in enumerate(sorted({*claims, *(a for a, _ in ids)}))}
    text = re.sub(r"(generation\W+)(\d+)", lambda found: f"{found[1]}{places[int(found[2])]}", text)
    return _IDS.sub(
        lambda found: f"id {ids.index((int(found[1]), int(found[2])))} of {places[int(found[1])]}", text
    )


def _of_bucket(store: Store) -> Any:
    objects = {
        key: _of_manifest(each.body) if key == LATEST else [each.ref.etag, dict(each.ref.metadata)]
        for key, each in store.objects.items()
    }
    uploads = {
        id_: [each.key, dict(each.metadata), {n: part.etag for n, (part, _) in each.parts.items()}]
        for id_, each in store.uploads.items()
    }
    return [objects, uploads]


def _of_manifest(body: bytes) -> Any:
    data = json.loads(body)
    holder = data.get("holder") or {}
    for each in (data, holder, *data["checkpoints"]):
        for name in ("write", "updated_at", "stored_at", "pid", "since"):
            each.pop(name, None)
    return data


def _of_disk(root: Path) -> Any:
    inodes: dict[int, int] = {}
    found = []
    for at, folders, names in os.walk(root):
        folders.sort()
        where = re.sub(r"(?<=caught/)[\w-]+|(?<=aside/)[\w-]+", "#", os.path.relpath(at, root))
        found.append([where, ""])
        for name in sorted(names):
            path = Path(at, name)
            status = path.lstat()
            if path.suffix in (".json", ".jsonl", ".tmp"):
                what: Any = re.sub(r'"(pid|counter)": \d+|"address": "[^"]*"', "", path.read_text())
            else:
                inode, saved_at = inodes.setdefault(status.st_ino, len(inodes)), status.st_mtime_ns
                what = [inode, crc64(path.read_bytes()), saved_at if saved_at < NOW else "now"]
            found.append([where, name if HOME + "/incoming" not in at else "#", what])
    return found
