"""Every setting: its default, its unit, its reason, and its help, in one place; validated when made.

A flag is the field's name with dashes, its environment variable `CKPT_SIDECAR_` and the name in capitals.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ckpt_sidecar.bucket import MAX_KEY_BYTES
from ckpt_sidecar.formats import Rules
from ckpt_sidecar.manifest import HISTORY
from ckpt_sidecar.names import MAX_NAME_BYTES, flaw_of_name

ENV_PREFIX = "CKPT_SIDECAR_"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]", re.ASCII)
_OWNER = re.compile(r"\d{12}", re.ASCII)
_PASSWORD = re.compile(r"(?<=//).*@", re.DOTALL)  # of an endpoint, with its user
_ADDRESS = re.compile(r"(?:\[([^\s\[\]]+)\]|([^\s:\[\]]+)):(\d{1,5})", re.ASCII)


class BadSetting(ValueError):
    """A setting cannot be used; the message names it, what is wrong, and the mend."""


def _setting(default: Any, text: str, *, metavar: str | None = None) -> Any:
    """A field with what the command line says of it."""
    return field(default=default, metadata={"help": text, "metavar": metavar})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one run of the sidecar was asked to do."""

    watch: Path = field(
        metadata={"help": "The directory into which the trainer saves checkpoints.", "metavar": "DIR"}
    )
    bucket: str = field(
        metadata={"help": "The S3 bucket; s3://BUCKET/PREFIX is understood.", "metavar": "BUCKET"}
    )
    prefix: str = _setting("", "Where in the bucket this job's checkpoints live: one prefix for each job.")
    endpoint_url: str = _setting("", "Endpoint of an S3-compatible store.", metavar="URL")
    expected_bucket_owner: str = _setting(
        "", "The AWS account that must own the bucket: another's is refused.", metavar="ACCOUNT"
    )
    pattern: tuple[str, ...] = _setting(
        Rules().patterns,
        "Which files are checkpoints, at any depth; may be given several times (the variable: with blanks).",
    )
    listen: str = _setting(
        "0.0.0.0:22578",
        "Where /metrics, /healthz, /readyz and /status.json answer; nothing else.",
        metavar="HOST:PORT",
    )
    workers: int = _setting(4, "Parts sent or fetched at a time; memory grows by 8 MiB for each.")
    max_bandwidth: float = _setting(
        0.0,
        "MiB per second for all uploads together, until a drain or a notice; 0 is no limit.",
        metavar="MIB",
    )
    nice: int = _setting(10, "How much nicer (0 to 19) the threads are that move the bytes.")
    settle: float = _setting(1.0, "Seconds for which a file written in place must lie still.")
    rescan_every: float = _setting(
        30.0, "Seconds between two listings of the watch dir, besides events; more if over 1 % of a core."
    )
    drain_timeout: float = _setting(
        25.0,
        "Seconds after SIGTERM in which what is not yet durable is sent; keep it under the pod's "
        "terminationGracePeriodSeconds.",
    )
    keep_local: int = _setting(0, "Durable checkpoint files to keep in the watch dir; 0 keeps all.")
    keep_remote: int = _setting(0, "Checkpoints to keep in the bucket; 0 keeps all.")
    history: int = _setting(HISTORY, "Entries kept in latest.json, for restore to fall back on.")
    spool: str = _setting(
        "", "The durable queue, when not WATCH/.ckpt-sidecar; on the same file system.", metavar="DIR"
    )
    attempt: str = _setting(
        "",
        "Which run of the job this is [default: the pod's UID, Slurm's job and restart, or host and boot].",
    )
    take_over: bool = _setting(False, "Claim the prefix although another sidecar has displaced this one.")  # noqa: FBT003
    allow_unfenced: bool = _setting(
        False,  # noqa: FBT003
        "Go on with a store without conditional writes: two sidecars would not notice each other.",
    )
    ec2_notices: bool = _setting(
        False,  # noqa: FBT003
        "Ask EC2's metadata service for spot and rebalance notices; at one, send the newest first and alone, "
        "and leave WATCH/.interruption-notice.json for the trainer.",
    )
    log_format: str = _setting("auto", "auto (readable on a terminal, else json), json or console.")

    def __post_init__(self) -> None:
        self._take_uri_apart()
        for name, check in _CHECKS.items():
            flaw = check(getattr(self, name))
            if flaw is not None:
                shown = _PASSWORD.sub("", repr(getattr(self, name)))
                raise BadSetting(f"--{name.replace('_', '-')}: {shown} {flaw}")
        self.address()
        self._check_spool()

    def _take_uri_apart(self) -> None:
        bucket, prefix = self.bucket, self.prefix
        if bucket.startswith("s3://"):
            bucket, _, inside = bucket.removeprefix("s3://").partition("/")
            prefix = "/".join(filter(None, [inside.strip("/"), prefix]))
        prefix = prefix.strip("/")
        object.__setattr__(self, "bucket", bucket)
        object.__setattr__(self, "prefix", f"{prefix}/" if prefix else "")

    @property
    def target(self) -> str:
        """Bucket and prefix as a URI."""
        return f"s3://{self.bucket}/{self.prefix}"

    def address(self) -> tuple[str, int]:
        """Host and port of `listen`; BadSetting when it is not HOST:PORT."""
        match = _ADDRESS.fullmatch(self.listen)
        if match is None or int(match[3]) > 65_535:
            raise BadSetting(
                f"--listen: {self.listen!r} is not HOST:PORT (for example 0.0.0.0:22578 or [::]:22578)"
            )
        return match[1] or match[2], int(match[3])

    def _check_spool(self) -> None:
        """A pin in sight of the watcher would be taken for a checkpoint, and pinned, and so on."""
        if not self.spool:
            return
        home, root = (Path(os.path.abspath(each)) for each in (self.spool, self.watch))  # noqa: PTH100
        if home.is_relative_to(root) and not any(
            part.startswith(".") for part in home.relative_to(root).parts
        ):
            raise BadSetting(
                f"--spool: {self.spool!r} is in the watch dir, where its files would be taken for "
                "checkpoints (put it beside, or give it a name that begins with a dot)"
            )


def _flaw_of_bucket(name: str) -> str | None:
    return None if _BUCKET.fullmatch(name) else "is no bucket name (letters, digits, dots and dashes)"


def _flaw_of_prefix(prefix: str) -> str | None:
    flaw = flaw_of_name(prefix.removesuffix("/")) if prefix else None
    if len(prefix.encode(errors="replace")) > MAX_KEY_BYTES - MAX_NAME_BYTES:
        flaw = f"is longer than {MAX_KEY_BYTES - MAX_NAME_BYTES} bytes"
    return flaw and f"{flaw} (give a path such as team/run-17)"


def _flaw_of_patterns(patterns: tuple[str, ...]) -> str | None:
    return None if patterns and all(patterns) else "is empty: nothing would ever be uploaded"


def _between(least: float, most: float) -> Callable[[float], str | None]:
    return lambda value: None if least <= value <= most else f"is not from {least:g} to {most:g}"


def _flaw_of_bandwidth(mib: float) -> str | None:
    return None if mib == 0 or 0.1 <= mib <= 10**6 else "is neither 0 nor from 0.1 to 1000000 MiB per second"


def _flaw_of_format(word: str) -> str | None:
    return None if word in ("auto", "json", "console") else "is none of auto, json, console"


def _flaw_of_endpoint(url: str) -> str | None:
    if "@" in url:
        return "has a user or a password in it (leave them out: the AWS chain finds the credentials)"
    try:
        good = bool(urlsplit(url).hostname) and urlsplit(url).port != 0
    except ValueError:
        good = False
    good = good and re.fullmatch(r"https?://[^/\s]+(/\S*)?", url) is not None
    return None if good or not url else "is no URL (for example https://s3.example.com)"


def _flaw_of_owner(account: str) -> str | None:
    return None if not account or _OWNER.fullmatch(account) else "is no AWS account (12 digits)"


_CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    "bucket": _flaw_of_bucket,
    "prefix": _flaw_of_prefix,
    "endpoint_url": _flaw_of_endpoint,
    "expected_bucket_owner": _flaw_of_owner,
    "pattern": _flaw_of_patterns,
    "workers": _between(1, 64),
    "max_bandwidth": _flaw_of_bandwidth,
    "nice": _between(0, 19),
    "settle": _between(0, 3600),
    "rescan_every": _between(0.1, 86_400),
    "drain_timeout": _between(0, 86_400),
    "keep_local": _between(0, 10**9),
    "keep_remote": _between(0, 10**9),
    "history": _between(1, 10_000),
    "log_format": _flaw_of_format,
}


def attempt_of(environment: Mapping[str, str], *, host: str, boot_id: str) -> str:
    """Return which run of the job this is, by what the scheduler tells; else the host's name and boot.

    A restarted container is the same attempt, a rescheduled job another.
    """
    if uid := environment.get("POD_UID"):
        return f"pod-{uid}"
    if job := environment.get("SLURM_JOB_ID"):
        return f"slurm-{job}-{environment.get('SLURM_RESTART_COUNT', '0')}"
    return f"{host}-{boot_id}"


def names_of_settings() -> list[str]:
    """Return the fields' names, in the order in which help shows them."""
    return [each.name for each in fields(Settings)]
