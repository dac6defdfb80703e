"""What a name may be, what it tells, and which names are our own."""

from __future__ import annotations

import re
import unicodedata

HOME = ".ckpt-sidecar"  # the spool's directory in the watch dir, and our own keys in the bucket
MANIFEST_NAME = "latest.json"
NOTICE_NAME = ".interruption-notice.json"  # in the watch dir, for the trainer; a dotfile: no checkpoint
_OURS = (MANIFEST_NAME, NOTICE_NAME)
MAX_NAME_BYTES = 900  # of the name in UTF-8; S3's 1,024 for a key, less 124 for the prefix
MAX_PART_OF_NAME_BYTES = 255  # a file system's limit for what stands between two slashes

_STEP = re.compile(r"(?:global_step|step|iteration|iter)[-_=]?0*(\d{1,15})", re.IGNORECASE)
_COUNT = re.compile(r"(?:checkpoint|ckpt|epoch)[-_=]?0*(\d{1,15})", re.IGNORECASE)


def step_of(name: str) -> int | None:
    """Return the training step that a name tells (`step_100.pt`, `epoch=3-step=1200.ckpt`), else None."""
    matches = list(_STEP.finditer(name)) or list(_COUNT.finditer(name))
    return int(matches[-1][1]) if matches else None


def flaw_of_name(name: str) -> str | None:
    """Say why `name` cannot be a checkpoint's name in the bucket and on the disk, or None if it can.

    A name is relative, normalised, `/`-separated, printable as UTF-8, and shadows none of our own keys.
    """
    flaw = None
    parts = name.split("/")
    try:
        raw = name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if not name or name.startswith("/"):
        flaw = "is empty or absolute"
    elif any(part in ("", ".", "..") for part in parts):
        flaw = "is not normalised"
    elif len(raw) > MAX_NAME_BYTES or any(len(p.encode()) > MAX_PART_OF_NAME_BYTES for p in parts):
        flaw = "is too long"
    elif any(unicodedata.category(char) == "Cc" for char in name):
        flaw = "has a control character"
    elif any(map(_is_home, parts)) or parts[-1] in _OURS:  # at any depth: other jobs' lie there
        flaw = "is one of ckpt-sidecar's own names"
    return flaw


def _is_home(part: str) -> bool:
    """Is it the spool's directory, also on a file system that folds case and passes over what is unseen?"""
    seen = "".join(char for char in part if unicodedata.category(char) != "Cf")
    return unicodedata.normalize("NFKC", seen).casefold() == HOME
