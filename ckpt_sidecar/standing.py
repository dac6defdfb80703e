"""What stands in the watch dir, seen from beside the daemon: for `ckpt-sidecar latest` and `wait`."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ckpt_sidecar.checkpoint import File
from ckpt_sidecar.disk import file_of, files_below
from ckpt_sidecar.formats import Rules, flaw_of
from ckpt_sidecar.known import read_settled
from ckpt_sidecar.names import flaw_of_name


def newest_whole(root: Path, rules: Rules) -> Path | None:
    """Return the newest whole checkpoint under `root`, by the time at which it was saved; None without one.

    A restored file has the time at which its trainer saved it.
    """
    found = sorted(_standing(root, rules), key=lambda each: (each.mtime_ns, each.name), reverse=True)
    return next((root / each.name for each in found if _is_whole(root, each)), None)


def not_settled(root: Path, home: Path, rules: Rules, *, name: str | None = None) -> list[str]:
    """Return the names, or just `name`, of which the spool at `home` does not yet know what became.

    Those are the whole files that stand under `root`, and what is held without a verdict. A name of which
    nothing is known is not settled either.
    """
    settled = read_settled(home)
    standing = {each.name: each for each in _standing(root, rules)}
    caught = home / "caught"
    held = {"/".join(path.relative_to(caught).parts[1:]) for path in files_below(caught)}
    if name is None:
        return sorted(held | {each.name for each in standing.values() if _is_open(root, each, settled)})
    done = settled.get(name) == standing[name] if name in standing else name in settled
    return [] if done and name not in held else [name]


def _is_open(root: Path, file: File, settled: dict[str, File]) -> bool:
    return settled.get(file.name) != file and _is_whole(root, file)


def _standing(root: Path, rules: Rules) -> Iterator[File]:
    for path in files_below(root):
        name = path.relative_to(root).as_posix()
        if rules.wants(name) and flaw_of_name(name) is None:
            with suppress(OSError):  # a trainer deletes old ones meanwhile
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    yield file_of(name, status)


def _is_whole(root: Path, file: File) -> bool:
    try:
        with (root / file.name).open("rb") as opened:
            return flaw_of(opened, file.name) is None
    except OSError:
        return False
