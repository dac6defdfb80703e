"""Which file a trainer should resume from: what `ckpt-sidecar latest` prints."""

from __future__ import annotations

from pathlib import Path

from ckpt_sidecar.formats import Rules, flaw_of
from ckpt_sidecar.spool import HOME


def newest_whole(root: Path, rules: Rules) -> Path | None:
    """Return the newest whole checkpoint under `root`, by the time at which it was saved; None without one.

    A restored file has the time at which its trainer saved it.
    """
    found = []
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if rules.wants(name) and not name.startswith(f"{HOME}/") and path.is_file() and not path.is_symlink():
            found.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(found, reverse=True):
        with path.open("rb") as file:
            if flaw_of(file, path.name) is None:
                return path
    return None
