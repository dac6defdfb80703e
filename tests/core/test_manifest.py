"""`latest.json`: what is written reads back, what is hostile is refused by its place."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_sidecar import document
from ckpt_sidecar.bucket import ObjectRef, encode_crc64
from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.document import Mangled, UnknownSchema, Writer, dump, dump_entry, parse
from ckpt_sidecar.manifest import (
    Announced,
    Entry,
    Expiring,
    Holder,
    Manifest,
    announced,
    claimed,
    committed,
    deleted,
    described,
    expired,
    forgotten,
    parse_rfc3339,
    rfc3339,
    self_description,
)

PREFIX = "team/run/"
HOLDER = Holder("s1", "pod-1", "node-a", 7, 5)


def entry(sequence: int, name: str = "", generation: int = 1) -> Entry:
    name = name or f"{sequence}.pt"
    ref = ObjectRef(PREFIX + name, 10 + sequence, f"etag{sequence}", encode_crc64(sequence))
    return Entry(Id(generation, sequence), name, (ref,), sequence * 10**9 + 123, sequence * 10**9 + 456)


def upload(sequence: int, upload_id: str = "u") -> Announced:
    return Announced(Id(1, sequence), f"{sequence}.pt", f"{PREFIX}{sequence}.pt", upload_id, 9, 8, "s1")


FULL = Manifest(
    generation=3,
    holder=HOLDER,
    write="w",
    updated_at=17,
    checkpoints=(entry(2), entry(1)),
    uploads=(upload(3),),
    expiring=(Expiring(Id(1, 1), f"{PREFIX}old.pt", "e", "v"),),
    extra={"note": {"kept": True}},
)


def data_of(manifest: Manifest = FULL) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(dump(manifest, bucket="b"))
    return data


def test_what_is_written_reads_back() -> None:
    """Every field survives, unknown ones too, and times to the nanosecond."""
    assert parse(dump(FULL, bucket="b"), prefix=PREFIX) == FULL
    assert parse(dump(Manifest(), bucket="b"), prefix="") == Manifest()


def test_an_entry_is_made_into_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit costs what is new, however long the history: also where an id has another entry now."""
    made: list[Id] = []

    def count(each: Entry, *, bucket: str) -> dict[str, Any]:
        made.append(each.id)
        return dump_entry(each, bucket=bucket)

    monkeypatch.setattr(document, "dump_entry", count)
    writer, manifest = Writer("b"), FULL
    for n in range(3, 200):
        manifest = committed(manifest, entry(n))
        assert writer.dump(manifest) == writer.dump(replace(manifest))
    assert sorted(made) == [Id(1, n) for n in range(1, 200)]
    other = replace(entry(199), stored_at=1)
    manifest = replace(manifest, checkpoints=(other, *manifest.checkpoints[1:]))
    assert parse(writer.dump(manifest), prefix=PREFIX) == manifest
    assert writer.dump(manifest) == dump(manifest, bucket="b")


def test_the_file_is_what_the_design_says() -> None:
    """Names and forms are an interface: other tools read them."""
    first = data_of()["checkpoints"][0]
    assert first == {
        "id": "1-2",
        "name": "2.pt",
        "key": "team/run/2.pt",
        "uri": "s3://b/team/run/2.pt",
        "version_id": None,
        "size": 12,
        "crc64nvme": encode_crc64(2),
        "etag": "etag2",
        "saved_at": "1970-01-01T00:00:02.000000123Z",
        "stored_at": "1970-01-01T00:00:02.000000456Z",
        "step": None,
    }
    assert data_of()["schema"] == 1


def test_the_newest_is_the_first_and_an_entry_is_found_by_its_name() -> None:
    """An empty manifest has neither."""
    assert FULL.newest == FULL.entry_of("2.pt") == entry(2)
    assert FULL.entry_of("1.pt") == entry(1)
    assert FULL.entry_of("3.pt") is None  # announced, not durable
    assert (Manifest().newest, Manifest().entry_of("1.pt")) == (None, None)


def test_an_entry_has_the_size_of_all_its_objects() -> None:
    """A checkpoint may be several files."""
    shards = (ObjectRef("a", 3, "e"), ObjectRef("b", 4, "f"))
    assert Entry(Id(1, 1), "a", shards, 0, 0).size == 7
    assert entry(2).size == 12


def test_unknown_fields_of_an_entry_are_kept() -> None:
    """A later version's additions survive our rewrite."""
    data = data_of()
    data["checkpoints"][0]["colour"] = "blue"
    again = parse(json.dumps(data).encode(), prefix=PREFIX)
    assert data_of(again)["checkpoints"][0]["colour"] == "blue"


@given(st.integers(-(10**18), 4 * 10**18))
def test_times_read_back_to_the_nanosecond(ns: int) -> None:
    """An mtime that went through the manifest is the same mtime."""
    assert parse_rfc3339(rfc3339(ns)) == ns


def test_a_newer_schema_is_left_alone() -> None:
    """It is refused as such, not rebuilt."""
    with pytest.raises(UnknownSchema, match="schema 2 is newer"):
        parse(json.dumps(data_of() | {"schema": 2}).encode(), prefix=PREFIX)


HOSTILE: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("schema",), 0, "schema"),
    (("schema",), "1", "schema"),
    (("generation",), -1, "generation"),
    (("generation",), True, "generation"),
    (("generation",), 10**30, "generation"),
    (("generation",), 1.5, "generation"),
    (("write",), None, "write"),
    (("write",), "x" * 5000, "write"),
    (("updated_at",), "yesterday", "updated_at"),
    (("holder",), [], "holder"),
    (("holder", "pid"), "7", "holder.pid"),
    (("checkpoints",), {}, "checkpoints"),
    (("checkpoints",), [1], "checkpoints"),
    (("checkpoints", 0, "name"), "../x.pt", r"checkpoints\[0\].name"),
    (("checkpoints", 0, "name"), "/etc/passwd", "name"),
    (("checkpoints", 0, "name"), ".ckpt-sidecar/spool.json", "name"),
    (("checkpoints", 0, "key"), "other/2.pt", "key"),
    (("checkpoints", 0, "key"), "team/run/1.pt", "key"),
    (("checkpoints", 0, "size"), -1, "size"),
    (("checkpoints", 0, "size"), 10**18, "size"),
    (("checkpoints", 0, "crc64nvme"), "AAAA", "crc64nvme"),
    (("checkpoints", 0, "crc64nvme"), "!", "crc64nvme"),
    (("checkpoints", 0, "id"), "1-1", "newest first"),
    (("checkpoints", 0, "id"), "0-1", "newest first"),
    (("checkpoints", 0, "saved_at"), "2026-13-01T00:00:00Z", "saved_at"),
    (("uploads", 0, "key"), "elsewhere/3.pt", "key"),
    (("uploads", 0, "upload_id"), 3, "upload_id"),
    (("expiring", 0, "key"), "another-teams/data", "key"),
    (("expiring", 0, "key"), "team/run/../../x", "key"),
    (("expiring", 0, "key"), "team/run/latest.json", "key"),
]


@pytest.mark.parametrize(("path", "value", "place"), HOSTILE)
def test_a_wrong_field_is_refused_by_its_place(path: tuple[str | int, ...], value: Any, place: str) -> None:
    """Whatever stands there that should not, the complaint names where."""
    data = data_of()
    node: Any = data
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    with pytest.raises(Mangled, match=place):
        parse(json.dumps(data).encode(), prefix=PREFIX)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"schema": 1, "schema": 1}',
        b'{"schema": NaN}',
        b"[" * 200_000,
        b'{"schema": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_mangled(raw: bytes) -> None:
    """Emptied, cut, doubled, too deep, no number: all one kind of trouble."""
    with pytest.raises(Mangled):
        parse(raw, prefix="")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
        max_leaves=20,
    )
)
def test_any_json_is_read_or_refused(value: Any) -> None:
    """Nothing else ever comes out of the parser."""
    with suppress(Mangled, UnknownSchema):
        parse(json.dumps(value).encode(), prefix="")


# --- changes ---


def test_commit_enters_newest_first_and_takes_the_announcement_out() -> None:
    """One swap does both, and doing it twice is doing it once."""
    once = committed(FULL, entry(3))
    assert [str(each.id) for each in once.checkpoints] == ["1-3", "1-2", "1-1"]
    assert once.uploads == ()
    assert committed(once, entry(3)) == once


def test_commit_keeps_one_entry_for_each_name_the_newer() -> None:
    """The older one's bytes are gone from its key; a late older one does not come back."""
    newer = committed(FULL, entry(5, "1.pt"))
    assert [str(each.id) for each in newer.checkpoints] == ["1-5", "1-2"]
    assert committed(newer, entry(4, "1.pt")).checkpoints == newer.checkpoints


def test_history_is_bounded_and_the_newest_never_falls_out() -> None:
    """A backfilled old one never pushes a newer one out."""
    manifest = Manifest()
    for n in range(10):
        manifest = committed(manifest, entry(n), history=3)
    assert [each.id.sequence for each in manifest.checkpoints] == [9, 8, 7]
    assert committed(manifest, entry(0), history=3).checkpoints == manifest.checkpoints


def test_claim_takes_the_next_generation_above_what_the_spool_knows() -> None:
    """A manifest that was lost and rebuilt cannot take a generation back."""
    assert claimed(FULL, HOLDER).generation == 4
    assert claimed(FULL, HOLDER, at_least=9).generation == 10


def test_announce_and_forget_are_done_once() -> None:
    """Both may be said again after a lost answer."""
    twice = announced(announced(Manifest(), upload(1)), upload(1))
    assert twice.uploads == (upload(1),)
    assert forgotten(forgotten(twice, {"u"}), {"u"}).uploads == ()


def test_retention_moves_the_oldest_to_expiring_and_keeps_the_newest() -> None:
    """First the entry leaves the list, then the object may go; at least one stays."""
    manifest = Manifest(checkpoints=(entry(3), entry(2), entry(1)))
    moved = expired(manifest, 1)
    assert [each.name for each in moved.checkpoints] == ["3.pt"]
    assert [each.key for each in moved.expiring] == [f"{PREFIX}2.pt", f"{PREFIX}1.pt"]
    assert expired(manifest, 0).checkpoints == (entry(3),)
    assert deleted(moved, moved.expiring).expiring == ()


def test_a_commit_at_an_expiring_key_saves_it() -> None:
    """A newer save of a name must not be deleted for the old one's sake."""
    moved = expired(Manifest(checkpoints=(entry(3), entry(1))), 1)
    assert committed(moved, entry(4, "1.pt")).expiring == ()


def test_an_object_tells_who_it_is() -> None:
    """Metadata make an entry; a stranger's, a short one, or a name that cannot be do not."""
    metadata = self_description(Id(4, 2), 77, 10)
    ref = ObjectRef(PREFIX + "a.pt", 10, "e", None, None, metadata)
    assert described(ref, "a.pt", 5) == Entry(Id(4, 2), "a.pt", (ref,), 77, 5)
    assert described(ObjectRef("k", 9, "e", None, None, metadata), "a.pt", 5) is None
    assert described(ObjectRef("k", 10, "e"), "a.pt", 5) is None
    assert described(ref, "../a.pt", 5) is None
