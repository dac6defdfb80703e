"""Whatever stands in the bucket as `latest.json`: a manifest that leads nowhere else, or a refusal."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_sidecar.bucket import MAX_OBJECT_BYTES, ObjectRef, encode_crc64
from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.document import (
    MAX_DEPTH,
    MAX_MANIFEST_BYTES,
    MAX_VALUES,
    Mangled,
    UnknownSchema,
    dump,
    parse,
)
from ckpt_sidecar.manifest import Announced, Entry, Expiring, Holder, Manifest, parse_rfc3339, rfc3339
from ckpt_sidecar.names import flaw_of_name
from tests.fuzz.fuzz_manifest import PREFIX, check, document, leads_inside

MIB = 1 << 20
SAID = 100_000  # characters of a refusal, at most: it is logged


def edited(path: tuple[str | int, ...], value: Any) -> bytes:
    """Return a manifest in which one thing is another."""
    data = document()
    node: Any = data
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    return json.dumps(data).encode()


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the paths of all values in it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for step, child in inner for each in places(child, (*path, step)))]


PLACES = [path for path in places(document()) if path]

# --- what is written reads back ----------------------------------------------------------------------------

PARTS = st.sampled_from(["a", "x.pt", "ü", "e\u0301", "\U0001f600", "-", " ", "%2e", "..x", "\\", "\u202e"])
NAMES = (
    st.lists(PARTS | st.text(min_size=1, max_size=9), min_size=1, max_size=4)
    .map("/".join)
    .filter(lambda name: flaw_of_name(name) is None)
)
TOKENS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
TEXTS = st.text(max_size=40) | st.just("\ud800")
TIMES = st.integers(parse_rfc3339("0001-01-01T00:00:00Z"), parse_rfc3339("9999-12-31T23:59:59Z"))
IDS = st.builds(Id, st.integers(0, 10**18 - 1), st.integers(0, 10**18 - 1))
SIZES = st.integers(0, MAX_OBJECT_BYTES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
EXTRA = st.dictionaries(st.text(max_size=9).map("x-".__add__), JSON, max_size=3)
CRCS = st.none() | st.integers(0, 2**64 - 1).map(encode_crc64)
HOLDERS = st.builds(Holder, TEXTS, TEXTS, TEXTS, pid=st.integers(0, 2**32), since=TIMES)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    """Any checkpoint that could be."""
    name = draw(NAMES)
    ref = ObjectRef(PREFIX + name, draw(SIZES), draw(TOKENS), draw(CRCS), draw(st.none() | TOKENS))
    return Entry(draw(IDS), name, (ref,), draw(TIMES), draw(TIMES), draw(EXTRA))


@st.composite
def uploads(draw: st.DrawFn) -> Announced:
    """Any upload that could be."""
    name = draw(NAMES)
    key = PREFIX + name
    return Announced(draw(IDS), name, key, draw(TOKENS), draw(SIZES), draw(TIMES), draw(TEXTS), draw(EXTRA))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest that could be."""
    listed = draw(st.lists(entries(), max_size=4, unique_by=lambda each: each.id))
    keys = {ref.key for each in listed for ref in each.objects}
    going = draw(
        st.lists(
            st.builds(
                Expiring, IDS, NAMES.map(PREFIX.__add__), TOKENS, st.none() | TOKENS, extra=EXTRA
            ).filter(lambda each: each.key not in keys),
            max_size=2,
        )
    )
    return Manifest(
        generation=draw(st.integers(0, 10**15)),
        holder=draw(st.none() | HOLDERS),
        write=draw(TEXTS),
        updated_at=draw(TIMES),
        checkpoints=tuple(sorted(listed, key=lambda each: each.id, reverse=True)),
        uploads=tuple(draw(st.lists(uploads(), max_size=2))),
        expiring=tuple(going),
        extra=draw(EXTRA),
    )


@settings(deadline=None, max_examples=50)
@given(manifests())
def test_any_manifest_reads_back_as_it_was_written(manifest: Manifest) -> None:
    """Every field, every unknown field of every kind, and all of it a second time."""
    raw = dump(manifest, bucket="b")
    assert parse(raw, prefix=PREFIX) == manifest
    assert dump(parse(raw, prefix=PREFIX), bucket="b") == raw
    assert raw.isascii()
    check(raw)


def test_unknown_fields_outlive_a_rewrite_wherever_they_stand() -> None:
    """A later version's additions are not lost to an earlier one's swap."""
    data = document()
    news = {"colour": ["blue", {"deep": -0.0}], "count": 2**70}
    for node in (data, data["checkpoints"][0], data["uploads"][0], data["expiring"][0]):
        node.update(news)
    again = json.loads(dump(parse(json.dumps(data).encode(), prefix=PREFIX), bucket="b"))
    for node in (again, again["checkpoints"][0], again["uploads"][0], again["expiring"][0]):
        assert {name: node.get(name) for name in news} == news


# --- whatever it says --------------------------------------------------------------------------------------

HOSTILE_NAMES = [
    *("", ".", "..", "../x.pt", "a/../../x.pt", "a/..", "./x.pt", "a/./x.pt", "a//x.pt", "a/"),
    *("/x.pt", "//x.pt", "/etc/passwd"),
    *("a\x00.pt", "a\n.pt", "a\x7f.pt", "a\x85.pt", "\ud800.pt", "n" * 256, "a/" * 449 + "toolong"),
    *("latest.json", "deeper/latest.json"),
    *(".ckpt-sidecar", ".ckpt-sidecar/pins/1-1/x.pt", "a/.ckpt-sidecar/x.pt"),
    *(".CKPT-SIDECAR/x.pt", ".Ckpt-Sidecar/spool.json"),
    *(".c\u212apt-sidecar/x.pt", "\uff0eckpt-sidecar/x.pt", ".c\uff4bpt-sidecar/x.pt"),  # look the same
    *(".ckpt\u200d-sidecar/x.pt", ".ckpt-sidecar\u200e/x.pt"),  # with something that nobody sees
]
GOOD_NAMES = [
    "..x.pt",
    "x..pt",
    "%2e%2e/x.pt",
    "..\\x.pt",
    "C:\\x.pt",
    "~/x.pt",
    "$HOME/x.pt",
    "-rf",
    "\u2024./x.pt",
]


@pytest.mark.fault("F8")
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_name_leads_out_or_at_our_own(name: str) -> None:
    """Nor does it by case, by what looks the same or by what nobody sees: refused, with the place."""
    for kind in ("checkpoints", "uploads"):
        data = document()
        data[kind][0] |= {"name": name, "key": PREFIX + name}
        with pytest.raises(Mangled, match=rf"{kind}\[0\]\.name"):
            parse(json.dumps(data).encode(), prefix=PREFIX)
    with pytest.raises(Mangled, match=r"expiring\[0\]\.key"):
        parse(edited(("expiring", 0, "key"), PREFIX + name), prefix=PREFIX)


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_names_that_only_look_hostile_are_names(name: str) -> None:
    """Nothing in them is taken apart by anybody but a slash."""
    data = document()
    data["checkpoints"][0] |= {"name": name, "key": PREFIX + name}
    assert parse(json.dumps(data).encode(), prefix=PREFIX).checkpoints[0].name == name
    assert leads_inside(name)


@pytest.mark.fault("F8")
@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        PARTS | st.sampled_from(["..", ".", "", "latest.json", ".ckpt-sidecar", "\x00"]), max_size=5
    ).map("/".join)
    | st.text(max_size=30)
)
def test_a_name_that_passes_leads_inside(name: str) -> None:
    """By another way of telling than the product's own."""
    if flaw_of_name(name) is None:
        assert leads_inside(name)


@pytest.mark.parametrize(
    "key", ["x.pt", "team/run", "team/run/", "team/runx.pt", "/team/run/x.pt", "team/run//x.pt"]
)
def test_a_key_outside_of_the_prefix_is_refused(key: str) -> None:
    """What stands there is another job's."""
    for kind in ("checkpoints", "uploads", "expiring"):
        with pytest.raises(Mangled, match=rf"{kind}\[0\]\.key"):
            parse(edited((kind, 0, "key"), key), prefix=PREFIX)


@pytest.mark.parametrize("token", ["a\nX-Injected: 1", "a\r", "\ud800", "é", "a\x00", "\u2028"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("checkpoints", "etag"),
        ("checkpoints", "version_id"),
        ("uploads", "upload_id"),
        ("expiring", "etag"),
        ("expiring", "version_id"),
    ],
)
def test_what_goes_into_a_request_can_be_sent_in_one(kind: str, name: str, token: str) -> None:
    """A header of two lines, or in no encoding, would be an error that no retry and no fallback knows."""
    with pytest.raises(Mangled, match=rf"{kind}\[0\]\.{name}"):
        parse(edited((kind, 0, name), token), prefix=PREFIX)


def test_what_is_listed_as_a_checkpoint_is_never_deleted() -> None:
    """A manifest that lets go of what it lists is believed in neither."""
    data = document()
    data["expiring"][0]["key"] = data["checkpoints"][0]["key"]
    with pytest.raises(Mangled, match="expiring would delete"):
        parse(json.dumps(data).encode(), prefix=PREFIX)


@pytest.mark.fault("G1")
@settings(deadline=None, max_examples=250)
@given(
    path=st.sampled_from(PLACES),
    value=JSON | st.sampled_from([*HOSTILE_NAMES, -1, 1.0, True, 2**64, "1-1", []]),
)
def test_any_value_anywhere_is_read_or_refused_with_its_place(
    path: tuple[str | int, ...], value: Any
) -> None:
    """A manifest that keeps all promises, or Mangled, or UnknownSchema; never anything else."""
    check(edited(path, value))


@pytest.mark.fault("G1")
@settings(deadline=None, max_examples=100)
@given(JSON)
def test_any_json_is_read_or_refused(value: Any) -> None:
    """Also with no likeness to a manifest."""
    check(json.dumps(value).encode())


@pytest.mark.fault("G1")
@settings(deadline=None, max_examples=300)
@given(at=st.integers(0, 5000), drop=st.integers(0, 50), instead=st.binary(max_size=8))
def test_any_bytes_changed_are_read_or_refused(at: int, drop: int, instead: bytes) -> None:
    """Cut out of a good one, or put in."""
    raw = json.dumps(document()).encode()
    check(raw[:at] + instead + raw[at + drop :])


def number(text: str) -> bytes:
    """Return a manifest with this in place of a number, and in an unknown field."""
    raw = json.dumps(document() | {"x-unknown": "HERE"}).encode()
    return raw.replace(b'"HERE"', text.encode())


NUMBERS = [
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    "1" * 5000,
    "1" * 400 + ".0",
    "0x10",
    "01",
    "1_0",
]


@pytest.mark.fault("G1")
@pytest.mark.parametrize("text", NUMBERS, ids=[each[:9] for each in NUMBERS])
def test_numbers_that_could_not_be_written_again_are_refused(text: str) -> None:
    """Also in fields that nobody knows: what is read must be readable after our rewrite."""
    with pytest.raises(Mangled):
        parse(number(text), prefix=PREFIX)


@pytest.mark.fault("G1")
@pytest.mark.parametrize("text", ["-0", "-0.0", "1e-999", "1E5", "9" * 4000, "0.1"])
def test_other_numbers_outlive_a_rewrite(text: str) -> None:
    """However large or small."""
    again = json.loads(dump(parse(number(text), prefix=PREFIX), bucket="b"))
    assert again["x-unknown"] == json.loads(text)
    check(number(text))


@pytest.mark.fault("G1")
@pytest.mark.parametrize("field", ["generation", "size", "pid", "schema"])
@pytest.mark.parametrize("value", [True, False, 1.0, "1", None, -1, 2**63, [1], {"a": 1}])
def test_only_whole_numbers_in_their_bounds_are_numbers(field: str, value: object) -> None:
    """Python takes True for 1, and 1.0 too."""
    path = {"size": ("checkpoints", 0, "size"), "pid": ("holder", "pid")}.get(field, (field,))
    with pytest.raises((Mangled, UnknownSchema), match=field):
        parse(edited(path, value), prefix=PREFIX)


@pytest.mark.fault("G1")
@pytest.mark.parametrize("place", ["checkpoints", "holder", "x-unknown", "schema"])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 500, 960, 5_000, 1_000_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_what_is_nested_without_end_is_refused(place: str, depth: int, brackets: str) -> None:
    """Neither the reading nor the refusal runs out of stack, wherever it stands."""
    more = brackets[0] if brackets == "[]" else '{"a":'
    raw = edited((place,), "HERE").replace(b'"HERE"', (more * depth + "1" + brackets[1] * depth).encode())
    with pytest.raises(Mangled) as refused:
        parse(raw, prefix=PREFIX)
    assert len(str(refused.value)) < SAID


@pytest.mark.fault("G1")
@pytest.mark.parametrize(
    "raw",
    [
        b'{"schema": 1, "schema": 1}',
        b'{"holder": {"pid": 1, "pid": 2}}',
        b'{"schema": 1, "sch\\u0065ma": 1}',
        b'\xef\xbb\xbf{"schema": 1}',
        json.dumps(document()).encode("utf-16"),
        b'{"schema": "\xff"}',
        b"\x00" * 100,
        b'{"schema": 1}{"schema": 1}',
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(raw: bytes) -> None:
    """Doubled fields, another encoding, more behind the end."""
    with pytest.raises(Mangled):
        parse(raw, prefix=PREFIX)


def test_a_lone_surrogate_goes_round_and_hurts_nobody() -> None:
    """JSON can say it, UTF-8 cannot."""
    raw = edited(("holder", "host"), "\ud800 host")
    manifest = parse(raw, prefix=PREFIX)
    assert manifest.holder is not None
    assert manifest.holder.host == "\ud800 host"
    check(raw)


# --- what it costs -----------------------------------------------------------------------------------------

SWOLLEN = {
    "empty objects": b'{"schema":1,"checkpoints":[' + b"{}," * (MAX_MANIFEST_BYTES // 3 - 20) + b"{}]}",
    "objects of one field": b'{"x":[' + b'{"a":1},' * (MAX_MANIFEST_BYTES // 8 - 20) + b"1]}",
    "numbers": b'{"x":[' + b"1.5," * (MAX_MANIFEST_BYTES // 4 - 20) + b"1]}",
    "fields": b"{" + b",".join(b'"%x":0' % n for n in range(MAX_MANIFEST_BYTES // 11)) + b"}",
    "one long text": b'{"schema":"' + b"x" * (MAX_MANIFEST_BYTES - 20) + b'"}',
    "one long text of four bytes each": b'{"schema":"'
    + "\U0001f600".encode() * (MAX_MANIFEST_BYTES // 4 - 9)
    + b'"}',
    "one long number": b'{"schema":' + b"9" * (MAX_MANIFEST_BYTES - 20) + b"}",
    "one long fraction": b'{"schema":0.' + b"9" * (MAX_MANIFEST_BYTES - 20) + b"}",
    "escapes": b'{"schema":"' + b"\\ud83d" * (MAX_MANIFEST_BYTES // 6 - 9) + b'"}',
    "blanks": b" " * (MAX_MANIFEST_BYTES - 20) + b"{}",
    "nothing but the start of lists": b"[" * MAX_MANIFEST_BYTES,
    "as many values as may be": b'{"schema":1,"checkpoints":[' + b"{}," * (MAX_VALUES // 2 - 9) + b"{}]}",
}


@pytest.mark.fault("G1")
@pytest.mark.parametrize(
    "kind", [*list(SWOLLEN)[:-1], pytest.param(list(SWOLLEN)[-1], marks=pytest.mark.long)]
)
def test_the_largest_that_is_read_costs_bounded_time_and_memory(kind: str) -> None:
    """Whatever fills the 16 MiB that are read at most; what is refused is said shortly."""
    raw = SWOLLEN[kind]
    assert len(raw) <= MAX_MANIFEST_BYTES
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(Mangled) as refused:
            parse(raw, prefix=PREFIX)
        memory = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 60
    assert memory < 256 * MIB
    assert len(str(refused.value)) < SAID


# --- times -------------------------------------------------------------------------------------------------


@given(st.integers(-(10**24), 10**24))
def test_any_time_of_a_file_can_be_written(ns: int) -> None:
    """Some file systems take an mtime far beyond the year 9999: it becomes the last that can be told."""
    again = parse_rfc3339(rfc3339(ns))
    first, last = parse_rfc3339("0001-01-01T00:00:00Z"), parse_rfc3339("9999-12-31T23:59:59Z")
    assert again == (ns if first <= ns <= last else first if ns < first else last)
