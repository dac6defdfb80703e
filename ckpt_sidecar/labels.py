"""The closed sets of label values, so that every series exists from the start and their number is known."""

from __future__ import annotations

from collections.abc import Mapping

LABELS: Mapping[str, tuple[str, ...]] = {
    "checkpoint_outcome": ("committed", "superseded", "skipped", "changed", "rejected"),
    "state": ("pinned", "uploading", "stored"),
    "request_outcome": ("ok", "failed"),
    "retry_reason": (
        "throttled",
        "server",
        "timeout",
        "connection",
        "conflict",
        "checksum",
        "credentials",
        "clock",
        "other",
    ),
    "stage": ("start", "watch", "pin", "upload", "commit", "restore", "retention", "notices", "other"),
    "failure_reason": (
        "missing",
        "conflict",
        "denied",
        "credentials",
        "unreachable",
        "checksum",
        "refused",
        "disk",
        "other",
    ),
    "restore_outcome": ("restored", "kept", "empty", "fell_back", "failed"),
    "rescan_reason": ("start", "overflow", "rewatch", "stop", "interval"),
    "ability": ("conditional_put", "conditional_complete", "conditional_delete", "checksum"),
    "operation": (
        "put_object",
        "get_object",
        "head_object",
        "delete_object",
        "list_objects_v2",
        "create_multipart_upload",
        "upload_part",
        "complete_multipart_upload",
        "abort_multipart_upload",
        "list_parts",
        "list_multipart_uploads",
        "other",
    ),
}
# BucketError.reason, coarsened: why a store was unreachable is what retries_total tells.
COARSE: Mapping[str, str] = {
    "key": "missing",
    "bucket": "missing",
    "upload": "missing",
    "throttled": "unreachable",
    "server": "unreachable",
    "timeout": "unreachable",
    "connection": "unreachable",
    "clock": "unreachable",
}


def within(label: str, value: str) -> str:
    """Return the value if it is in the label's closed set, else the last of the set."""
    return value if value in LABELS[label] else LABELS[label][-1]


def failure_reason(reason: str) -> str:
    """Return a `BucketError.reason` as failures_total has it."""
    return within("failure_reason", COARSE.get(reason, reason))
