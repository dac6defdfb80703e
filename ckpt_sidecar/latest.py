"""Which file a trainer should resume from: what `ckpt-sidecar latest` prints."""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path

from ckpt_sidecar.checkpoint import flaw_of_name
from ckpt_sidecar.formats import Rules, flaw_of


def newest_whole(root: Path, rules: Rules) -> Path | None:
    """Return the newest whole checkpoint under `root`, by the time at which it was saved; None without one.

    A restored file has the time at which its trainer saved it.
    """
    found = []
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if rules.wants(name) and flaw_of_name(name) is None:
            with suppress(OSError):  # a trainer deletes old ones meanwhile
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    found.append((status.st_mtime_ns, path))
    for _, path in sorted(found, reverse=True):
        with suppress(OSError), path.open("rb") as file:
            if flaw_of(file, path.name) is None:
                return path
    return None
