"""Any bytes as `latest.json`: a manifest that keeps all promises, or a refusal. `make fuzz` runs it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from ckpt_sidecar.bucket import ObjectRef, encode_crc64
from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.document import MAX_MANIFEST_BYTES, Mangled, UnknownSchema, dump, parse
from ckpt_sidecar.manifest import Announced, Entry, Expiring, Holder, Manifest

PREFIX = "team/run/"
ROOT = PurePosixPath("/watch")


def document() -> dict[str, Any]:
    """Return a manifest with something of everything, as plain values."""
    listed = [
        Entry(Id(2, n), name, (ObjectRef(PREFIX + name, n, f"etag-{n}", encode_crc64(n), f"v{n}"),), n, n)
        for n, name in ((9, "deep/step_9.pt"), (8, "ü.pt"))
    ]
    manifest = Manifest(
        generation=3,
        holder=Holder("spool", "attempt", "host", 7, 5),
        write="token",
        updated_at=17,
        checkpoints=tuple(listed),
        uploads=(Announced(Id(2, 10), "10.pt", PREFIX + "10.pt", "upload-id", 9, 8, "spool"),),
        expiring=(Expiring(Id(1, 1), PREFIX + "1.pt", "etag-1", "v"),),
        extra={"x-unknown": {"list": [1, 0.5, None, True]}},
    )
    made: dict[str, Any] = json.loads(dump(manifest, bucket="b"))
    return made


def leads_inside(name: str) -> bool:
    """Does the name stay in its directory, and off our own names? Told by paths, not by the product."""
    path = ROOT / name
    parts = [part.casefold() for part in name.split("/")]
    return (
        os.path.normpath(path) == f"{ROOT}/{name}"
        and path.parts[: len(ROOT.parts)] == ROOT.parts
        and path != ROOT
        and ".ckpt-sidecar" not in parts
        and name.rsplit("/", 1)[-1] != "latest.json"
        and "\0" not in name
        and len(name.encode()) <= 900
    )


def _names(manifest: Manifest) -> Iterator[str]:
    """Every name in it; a key is its name under the prefix."""
    for entry in manifest.checkpoints:
        assert [ref.key for ref in entry.objects] == [PREFIX + entry.name]
        yield entry.name
    for upload in manifest.uploads:
        assert upload.key == PREFIX + upload.name
        yield upload.name
    for expiring in manifest.expiring:
        assert expiring.key.startswith(PREFIX)
        yield expiring.key.removeprefix(PREFIX)


def check(raw: bytes) -> None:
    """Hold `parse` to its promises about these bytes."""
    if len(raw) > MAX_MANIFEST_BYTES:
        return  # never read
    try:
        manifest = parse(raw, prefix=PREFIX)
    except (Mangled, UnknownSchema) as refused:
        if len(str(refused)) > 100_000:
            raise AssertionError("that is too much to be logged") from refused
        return
    assert all(leads_inside(name) for name in _names(manifest))
    ids = [each.id for each in manifest.checkpoints]
    assert ids == sorted(set(ids), reverse=True)
    again = dump(manifest, bucket="b")
    assert parse(again, prefix=PREFIX) == manifest
    assert dump(parse(again, prefix=PREFIX), bucket="b") == again


def seeds() -> Iterator[bytes]:
    """Return what the fuzzer starts from."""
    data = document()
    yield json.dumps(data).encode()
    yield dump(Manifest(), bucket="b")
    for field in data:
        yield json.dumps({name: value for name, value in data.items() if name != field}).encode()
    for kind in ("checkpoints", "uploads", "expiring"):
        yield json.dumps({"schema": 1, kind: data[kind]}).encode()
    for text in (
        "1e999",
        "-0",
        "NaN",
        "9" * 5000,
        '"\\ud800"',
        "[" * 900 + "]" * 900,
        '{"a":1,"a":2}',
        "\ufeff",
    ):
        yield json.dumps(data | {"x-unknown": "HERE"}).replace('"HERE"', text).encode()
    for name in ("..", "/etc/passwd", "a/../b", ".ckpt-sidecar/x", "latest.json", "a\x00b", "n" * 300):
        changed = document()
        changed["checkpoints"][0] |= {"name": name, "key": PREFIX + name}
        yield json.dumps(changed).encode()
