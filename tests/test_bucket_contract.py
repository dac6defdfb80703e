"""What every bucket promises, in the words of `Bucket`: the ones in memory, the wrappers, and S3 itself.

A new quirk of a store becomes a line here first, and then one in `tests/fakes.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest

from ckpt_sidecar.bucket import (
    MIN_PART_BYTES,
    Absent,
    Bucket,
    BucketError,
    Condition,
    Conflict,
    Corrupt,
    Missing,
    ObjectRef,
    Part,
    Refused,
    Span,
    Unchanged,
    Unreachable,
    Upload,
    crc64,
    encode_crc64,
    spans,
)
from ckpt_sidecar.patience import PatientBucket
from tests.conftest import ON_S3, SERVERS, opened
from tests.engine.support import Steps
from tests.fakes import CARELESS, BytesSink, BytesSource, MemoryBucket

LARGE = random.Random(64).randbytes(2 * MIN_PART_BYTES + 4321)  # three parts, the last one short
SPANS = spans(len(LARGE), MIN_PART_BYTES)
STALE = Unchanged("0" * 32)
# What a store does in another way than it should: there the test must fail, and the day it passes we hear.
SHORTCOMINGS = {
    "test_a_part_of_the_same_number_replaces[rclone]": "the first one has gone to the disk already",
    "test_parts_that_the_store_does_not_have_make_no_object[moto-order]": "it sorts them",
    "test_parts_that_the_store_does_not_have_make_no_object[ceph-order]": "it sorts them",
    "test_parts_that_the_store_does_not_have_make_no_object[rclone-small]": "it takes parts of any size",
    "test_an_upload_that_was_thrown_away_takes_no_part[moto]": "it answers 500",
    "test_deleting_a_version_that_is_gone_is_silent[localstack]": "it answers 400",
}
ODD_KEYS = [
    "-rf",
    "a b",
    "a+b",
    "100%",
    "%41",
    "#1",
    "what?versionId=1&x=y",
    'it\'s "quoted" <here>',
    "(1) [2] {3} ~ ! $ , ; : @ = * | ^ `",
    "back\\slash",
    "grüße/雪/😀.pt",
    "e\u0301 is not \u00e9",
    "under/a/folder/.hidden",
]


def careless() -> Bucket:
    """Return one that honours nothing."""
    return MemoryBucket(abilities=CARELESS)


def patient() -> Bucket:
    """Return one that says everything again that may be said again."""
    return PatientBucket(MemoryBucket(), sleep=asyncio.sleep, chance=lambda: 0.0, tell=lambda _: None)


def steps() -> Bucket:
    """Return the one that the engines' tests hurt, unhurt."""
    return Steps(MemoryBucket())


IN_MEMORY = {"memory": MemoryBucket, "careless": careless, "patient": patient, "steps": steps}


@pytest.fixture(params=[*IN_MEMORY, *ON_S3])
def bucket(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[Bucket]:
    """An empty bucket of every kind, and the wrappers around one."""
    if request.param in SERVERS:
        yield from opened(SERVERS[request.param], runner)
    else:
        yield IN_MEMORY[request.param]()


@pytest.fixture(autouse=True)
def shortcoming(request: pytest.FixtureRequest) -> None:
    """Expect it to fail where the store is known for it."""
    if reason := SHORTCOMINGS.get(request.node.name):
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))


async def put(bucket: Bucket, key: str, body: bytes, when: Condition | None = None) -> ObjectRef:
    """Write bytes at hand, without metadata; where nothing stands, if not said otherwise."""
    return await bucket.put(key, body, when=when or Absent(), metadata={})


async def begun(bucket: Bucket, key: str) -> Upload:
    """Begin a multipart upload, without metadata."""
    return Upload(key, await bucket.create_multipart(key, metadata={}))


async def sent(bucket: Bucket, upload: Upload, content: bytes = LARGE) -> list[Part]:
    """Send the content in parts, all at once."""
    source = BytesSource(content)
    parts = [bucket.put_part(upload, span, source) for span in spans(len(content), MIN_PART_BYTES)]
    return list(await asyncio.gather(*parts))


async def completed(bucket: Bucket, upload: Upload, parts: list[Part], when: Condition) -> ObjectRef:
    """Make the object, without metadata."""
    return await bucket.complete_multipart(upload, parts, when=when, metadata={})


async def read(bucket: Bucket, ref: ObjectRef) -> bytes:
    """Return the bytes of this very object."""
    sink = BytesSink(ref.size)
    assert await bucket.get_range(ref, Span(1, 0, ref.size), sink) == crc64(sink.content)
    return bytes(sink.content)


async def standing(bucket: Bucket, key: str) -> bytes | None:
    """Return the bytes that stand at the key; None where nothing does."""
    seen = await bucket.head(key)
    return None if seen is None else await read(bucket, seen)


async def keys(bucket: Bucket, prefix: str = "") -> list[str]:
    """Return the keys that are listed, in that order."""
    return [each.key async for each in bucket.list(prefix)]


# --- writing at once, under a condition ---------------------------------------------------------------


async def test_what_is_put_where_nothing_stands_is_put_once(bucket: Bucket) -> None:
    """`Absent` holds once; the second write is a conflict and changes nothing."""
    await put(bucket, "x", b"first")
    with pytest.raises(Conflict):
        await put(bucket, "x", b"second")
    assert await standing(bucket, "x") == b"first"


async def test_what_is_unchanged_is_replaced(bucket: Bucket) -> None:
    """`Unchanged` holds with the etag that the write or a look gave, and with no other."""
    first = await put(bucket, "x", b"first")
    second = await put(bucket, "x", b"second", Unchanged(first.etag))
    with pytest.raises(Conflict):
        await put(bucket, "x", b"third", Unchanged(first.etag))
    assert await standing(bucket, "x") == b"second"
    seen = await bucket.head("x")
    assert seen is not None
    assert seen.etag == second.etag != first.etag
    await put(bucket, "x", b"fourth", Unchanged(seen.etag))
    assert await standing(bucket, "x") == b"fourth"


async def test_what_is_not_there_is_not_unchanged(bucket: Bucket) -> None:
    """Under `Unchanged` a missing key is a conflict, and stays missing."""
    with pytest.raises(Conflict):
        await put(bucket, "x", b"new", STALE)
    assert await standing(bucket, "x") is None


@pytest.mark.parametrize("replacing", [False, True])
async def test_of_two_writes_at_once_one_holds(bucket: Bucket, *, replacing: bool) -> None:
    """Where the store honours conditions exactly one is told that it did, else at least one; that stands."""
    when: Condition = Unchanged((await put(bucket, "x", b"old")).etag) if replacing else Absent()
    bodies = [b"body %d" % n for n in range(4)]
    outcomes = await asyncio.gather(
        *(put(bucket, "x", body, when) for body in bodies), return_exceptions=True
    )
    told = [body for body, outcome in zip(bodies, outcomes, strict=True) if isinstance(outcome, ObjectRef)]
    assert await standing(bucket, "x") in told
    assert all(
        isinstance(outcome, ObjectRef | Conflict | Unreachable) for outcome in outcomes
    )  # Ceph says 500
    if bucket.abilities.conditional_put:
        assert len(told) == 1


async def test_a_write_says_what_stands_there_then(bucket: Bucket) -> None:
    """Key, size, etag, metadata and version; the checksum always, while a look shows it only where kept."""
    metadata = {"written-by": "a test", "empty": ""}
    written = await bucket.put("x", b"content", when=Absent(), metadata=metadata)
    checksum = encode_crc64(crc64(b"content"))
    assert written == ObjectRef("x", 7, written.etag, checksum, None, metadata)
    assert written.etag.strip('"') == written.etag != ""
    seen = ObjectRef("x", 7, written.etag, checksum if bucket.abilities.checksum else None, None, metadata)
    assert await bucket.head("x") == seen
    assert await bucket.get("x", limit=7) == (b"content", seen)


async def test_metadata_are_the_last_writes_own_in_lower_case(bucket: Bucket) -> None:
    """A write replaces all of them, and tells them as they will be read."""
    first = await bucket.put("x", b"1", when=Absent(), metadata={"Loss": "0.25", "step": "3 of 7; ~50%"})
    assert first.metadata == {"loss": "0.25", "step": "3 of 7; ~50%"}
    seen = await bucket.head("x")
    assert seen is not None
    assert seen.metadata == first.metadata
    await bucket.put("x", b"2", when=Unchanged(first.etag), metadata={"other": "1"})
    seen = await bucket.head("x")
    assert seen is not None
    assert seen.metadata == {"other": "1"}


async def test_bytes_at_hand_and_a_source_are_stored_alike(bucket: Bucket) -> None:
    """Of any size, also none."""
    for size in (0, 1, len(LARGE)):
        content = LARGE[:size]
        held = await put(bucket, f"held {size}", content)
        drawn = await bucket.put(f"drawn {size}", (BytesSource(LARGE), size), when=Absent(), metadata={})
        assert held.size == drawn.size == size
        assert held.crc64nvme == drawn.crc64nvme == encode_crc64(crc64(content))
        assert await standing(bucket, held.key) == await standing(bucket, drawn.key) == content


async def test_what_a_short_source_was_to_replace_still_stands(bucket: Bucket) -> None:
    """A source that comes short is corrupt, and nothing is written."""
    with pytest.raises(Corrupt, match="short"):
        await bucket.put("new", (BytesSource(b"abc"), 4), when=Absent(), metadata={})
    assert await standing(bucket, "new") is None
    old = await put(bucket, "old", b"old")
    with pytest.raises(Corrupt, match="short"):
        await bucket.put("old", (BytesSource(b""), 1), when=Unchanged(old.etag), metadata={})
    assert await standing(bucket, "old") == b"old"


# --- reading ------------------------------------------------------------------------------------------


async def test_what_is_not_there_is_missing(bucket: Bucket) -> None:
    """A key, that is; a look returns None, a list is empty."""
    await put(bucket, "x/y", b"")
    assert await bucket.head("x") is None
    assert await keys(bucket, "y") == []
    for reading in (
        bucket.get("x", limit=1),
        bucket.get_range(ObjectRef("x", 1, "e"), SPANS[0], BytesSink(1)),
    ):
        with pytest.raises(Missing) as caught:
            await reading
        assert caught.value.reason == "key"


async def test_a_larger_object_than_expected_is_refused(bucket: Bucket) -> None:
    """One that just fits is returned."""
    await put(bucket, "x", b"12345")
    with pytest.raises(Refused, match="5 bytes"):
        await bucket.get("x", limit=4)
    assert (await bucket.get("x", limit=5))[0] == b"12345"


async def test_any_key_is_taken_as_it_is(bucket: Bucket) -> None:
    """Spaces, signs and letters of all kinds come back as they were, by every verb."""
    for key in ODD_KEYS:
        ref = await put(bucket, key, key.encode())
        seen = await bucket.head(key)
        assert seen is not None
        assert (seen.key, seen.etag) == (key, ref.etag)
        assert (await bucket.get(key, limit=99))[0] == await read(bucket, ref) == key.encode()
        assert await keys(bucket, key) == [key]
        upload = await begun(bucket, key)
        assert await bucket.list_uploads(key) == [upload]
        await bucket.abort_multipart(upload)
    assert await keys(bucket) == sorted(ODD_KEYS, key=str.encode)
    for key in ODD_KEYS:
        found = await bucket.head(key)
        assert found is not None
        await bucket.delete(key, when=Unchanged(found.etag))
    assert await keys(bucket) == []


async def test_a_list_is_in_key_order_and_knows_prefixes_only(bucket: Bucket) -> None:
    """By the bytes of the keys; a slash is a letter like any other; metadata and checksum are not told."""
    refs = {}
    for key in ("b", "a/z", "a/b/c", "a-1", "a/b.c", "aé", "a/B", "az"):
        refs[key] = await bucket.put(key, key.encode(), when=Absent(), metadata={"some": "1"})
    assert await keys(bucket) == ["a-1", "a/B", "a/b.c", "a/b/c", "a/z", "az", "aé", "b"]
    assert await keys(bucket, "a/") == ["a/B", "a/b.c", "a/b/c", "a/z"]
    assert await keys(bucket, "a/b") == ["a/b.c", "a/b/c"]
    assert [each async for each in bucket.list("az")] == [ObjectRef("az", 2, refs["az"].etag)]


async def test_a_run_of_bytes_is_read_into_its_place(bucket: Bucket) -> None:
    """And only that; its checksum is returned."""
    ref = await put(bucket, "x", LARGE[:1000])
    sink = BytesSink(1000)
    assert await bucket.get_range(ref, Span(2, 300, 400), sink) == crc64(LARGE[300:700])
    assert sink.content == bytes(300) + LARGE[300:700] + bytes(300)
    assert await bucket.get_range(ref, Span(1, 0, 300), sink) == crc64(LARGE[:300])
    assert await bucket.get_range(ref, Span(3, 700, 300), sink) == crc64(LARGE[700:1000])
    assert sink.content == LARGE[:1000]
    assert await bucket.get_range(ref, Span(1, 5, 0), BytesSink(0)) == 0


async def test_a_run_beyond_the_end_is_corrupt(bucket: Bucket) -> None:
    """The object is shorter than whoever asks was told."""
    ref = await put(bucket, "x", LARGE[:1000])
    for span in (Span(1, 900, 200), Span(1, 1000, 1), Span(1, 5000, 10)):
        with pytest.raises(Corrupt):
            await bucket.get_range(ref, span, BytesSink(6000))


@pytest.mark.fault("F2")
async def test_a_run_of_what_was_replaced_is_a_conflict(bucket: Bucket) -> None:
    """Never the bytes of another object."""
    old = await put(bucket, "x", b"old bytes")
    await put(bucket, "x", b"new bytes", Unchanged(old.etag))
    sink = BytesSink(9)
    with pytest.raises(Conflict):
        await bucket.get_range(old, Span(1, 0, 9), sink)
    assert sink.content == bytes(9)


# --- writing in parts ---------------------------------------------------------------------------------


async def test_an_object_is_made_of_its_parts_in_whatever_order_they_came(bucket: Bucket) -> None:
    """Its bytes, its size and its whole checksum are those of all parts; the metadata are the upload's."""
    metadata = {"made-of": "parts"}
    upload = Upload("x", await bucket.create_multipart("x", metadata=metadata))
    source = BytesSource(LARGE)
    parts = [await bucket.put_part(upload, span, source) for span in reversed(SPANS)]
    parts.reverse()
    assert [part.crc64nvme for part in parts] == [
        encode_crc64(crc64(LARGE[span.offset : span.end])) for span in SPANS
    ]
    made = await bucket.complete_multipart(upload, parts, when=Absent(), metadata=metadata)
    whole = encode_crc64(crc64(LARGE))
    assert made == ObjectRef("x", len(LARGE), made.etag, whole, None, metadata)
    assert await read(bucket, made) == LARGE
    kept = whole if bucket.abilities.checksum else None
    assert await bucket.head("x") == ObjectRef("x", len(LARGE), made.etag, kept, None, metadata)


async def test_an_object_of_one_small_part_is_like_any_other(bucket: Bucket) -> None:
    """The last part may be as small as it likes."""
    upload = await begun(bucket, "x")
    made = await completed(bucket, upload, await sent(bucket, upload, b"small"), Absent())
    assert (made.size, made.crc64nvme) == (5, encode_crc64(crc64(b"small")))
    assert await read(bucket, made) == b"small"


async def test_an_upload_under_way_is_no_object(bucket: Bucket) -> None:
    """It is listed as what it is, at exactly its key, until it ends."""
    first, second, longer = [await begun(bucket, key) for key in ("x", "x", "x2")]
    parts = await sent(bucket, first, b"of the first")
    assert await bucket.head("x") is None
    assert await keys(bucket) == []
    assert sorted(await bucket.list_uploads("x"), key=repr) == sorted([first, second], key=repr)
    assert await bucket.list_uploads("x2") == [longer]
    assert await bucket.list_uploads("x3") == []
    await completed(bucket, first, parts, Absent())
    assert await bucket.list_uploads("x") == [second]
    await bucket.abort_multipart(second)
    assert await bucket.list_uploads("x") == []
    assert await bucket.list_uploads("x2") == [longer]


async def test_parts_are_listed_as_they_were_sent(bucket: Bucket) -> None:
    """By number; with a checksum where the store keeps one."""
    upload = await begun(bucket, "x")
    assert await bucket.list_parts(upload) == []
    source = BytesSource(LARGE)
    third = await bucket.put_part(upload, SPANS[2], source)
    first = await bucket.put_part(upload, SPANS[0], source)
    assert [(part.number, part.size) for part in (first, third)] == [(1, MIN_PART_BYTES), (3, 4321)]
    kept = bucket.abilities.checksum
    shown = [
        Part(each.number, each.size, each.etag, each.crc64nvme if kept else None) for each in (first, third)
    ]
    assert await bucket.list_parts(upload) == shown


async def test_a_part_of_the_same_number_replaces(bucket: Bucket) -> None:
    """The object is made of what was sent last."""
    upload = await begun(bucket, "x")
    old = await bucket.put_part(upload, Span(1, 0, 5), BytesSource(b"older"))
    new = await bucket.put_part(upload, Span(1, 0, 3), BytesSource(b"new"))
    assert old.etag != new.etag
    assert [(part.number, part.size, part.etag) for part in await bucket.list_parts(upload)] == [
        (1, 3, new.etag)
    ]
    made = await completed(bucket, upload, [new], Absent())
    assert await read(bucket, made) == b"new"


async def test_a_part_of_a_short_source_is_not_there(bucket: Bucket) -> None:
    """It is corrupt; the one that was sent before it still is."""
    upload = await begun(bucket, "x")
    with pytest.raises(Corrupt, match="short"):
        await bucket.put_part(upload, Span(1, 0, 4), BytesSource(b"abc"))
    assert await bucket.list_parts(upload) == []
    good = await bucket.put_part(upload, Span(1, 0, 3), BytesSource(b"abc"))
    with pytest.raises(Corrupt, match="short"):
        await bucket.put_part(upload, Span(1, 1, 3), BytesSource(b"abc"))
    assert [part.etag for part in await bucket.list_parts(upload)] == [good.etag]


@pytest.mark.parametrize("wrong", ["none", "etag", "number", "order", "small"])
async def test_parts_that_the_store_does_not_have_make_no_object(bucket: Bucket, wrong: str) -> None:
    """No part, another etag, a number never sent, the wrong order, a small one before the last: refused."""
    upload = await begun(bucket, "x")
    first, second, third = await sent(bucket, upload)
    more = [await bucket.put_part(upload, Span(4, 0, 3), BytesSource(b"abc"))] if wrong == "small" else []
    parts = {
        "none": [],
        "etag": [Part(1, first.size, second.etag, first.crc64nvme), second, third],
        "number": [first, second, Part(5, third.size, third.etag, third.crc64nvme)],
        "order": [second, first, third],
        "small": [first, second, third, *more],
    }[wrong]
    with pytest.raises(Refused):
        await completed(bucket, upload, parts, Absent())
    assert await keys(bucket) == []


async def test_what_stands_where_an_upload_is_completed_stays_on_conflict(bucket: Bucket) -> None:
    """`Absent` and a stale etag; the right one replaces."""
    old = await put(bucket, "x", b"old")
    for when in (Absent(), STALE):
        upload = await begun(bucket, "x")
        with pytest.raises(Conflict):
            await completed(bucket, upload, await sent(bucket, upload, b"other"), when)
        assert await standing(bucket, "x") == b"old"
    upload = await begun(bucket, "x")
    made = await completed(bucket, upload, await sent(bucket, upload, b"new"), Unchanged(old.etag))
    assert await read(bucket, made) == b"new"
    upload = await begun(bucket, "y")
    with pytest.raises(Conflict):
        await completed(bucket, upload, await sent(bucket, upload, b"other"), STALE)
    assert await standing(bucket, "y") is None


async def test_an_upload_that_was_thrown_away_never_makes_an_object(bucket: Bucket) -> None:
    """It is missing from then on; to a complete a store may say so less clearly, and yet makes nothing."""
    upload = await begun(bucket, "x")
    parts = await sent(bucket, upload, b"content")
    await bucket.abort_multipart(upload)
    with pytest.raises((Missing, Unreachable)):
        await completed(bucket, upload, parts, Absent())
    for asking in (bucket.abort_multipart(upload), bucket.list_parts(upload)):
        with pytest.raises(Missing) as caught:
            await asking
        assert caught.value.reason == "upload"
    with pytest.raises((Missing, Unreachable)):
        await completed(bucket, upload, parts, Absent())
    assert await bucket.head("x") is None


async def test_an_upload_that_was_thrown_away_takes_no_part(bucket: Bucket) -> None:
    """For a part, too, it is missing."""
    upload = await begun(bucket, "x")
    await bucket.abort_multipart(upload)
    with pytest.raises(Missing) as caught:
        await sent(bucket, upload, b"content")
    assert caught.value.reason == "upload"


async def test_what_was_completed_stays_whatever_is_asked_of_its_upload(bucket: Bucket) -> None:
    """A second complete says the same, or that it does not know; an abort finds no upload."""
    upload = await begun(bucket, "x")
    parts = await sent(bucket, upload, b"content")
    made = await completed(bucket, upload, parts, Absent())
    try:
        again = await completed(bucket, upload, parts, Absent())
    except (Missing, Conflict, Unreachable):
        again = made
    assert again.etag == made.etag
    with pytest.raises(Missing) as caught:
        await bucket.abort_multipart(upload)
    assert caught.value.reason == "upload"
    assert await standing(bucket, "x") == b"content"


# --- deleting -----------------------------------------------------------------------------------------


async def test_only_what_is_unchanged_is_deleted(bucket: Bucket) -> None:
    """With another etag it stays, whether store or sidecar look; what is gone already is missing."""
    old = await put(bucket, "x", b"old")
    new = await put(bucket, "x", b"new", Unchanged(old.etag))
    with pytest.raises(Conflict):
        await bucket.delete("x", when=Unchanged(old.etag))
    assert await standing(bucket, "x") == b"new"
    await bucket.delete("x", when=Unchanged(new.etag))
    assert await standing(bucket, "x") is None
    with pytest.raises(Missing) as caught:
        await bucket.delete("x", when=Unchanged(new.etag))
    assert caught.value.reason == "key"
    await put(bucket, "x", b"anew")


async def test_a_probe_says_what_the_bucket_has_as_its_abilities(bucket: Bucket) -> None:
    """And leaves nothing at its key."""
    assert await bucket.probe("a probe") == bucket.abilities
    assert await keys(bucket) == []
    assert await bucket.list_uploads("a probe") == []


# --- versions -----------------------------------------------------------------------------------------


async def test_a_version_is_read_whatever_stands_there_now(versioned: Bucket) -> None:
    """Replaced or deleted; where the bucket keeps none, that is a conflict, or missing."""
    old = await put(versioned, "x", b"old")
    new = await put(versioned, "x", b"new", Unchanged(old.etag))
    seen = await versioned.head("x")
    assert seen is not None
    assert seen.version_id == new.version_id
    if old.version_id is None:
        return
    assert old.version_id != new.version_id
    assert await read(versioned, old) == b"old"
    await versioned.delete("x", when=Unchanged(new.etag))
    assert await standing(versioned, "x") is None
    assert await keys(versioned) == []
    assert (await read(versioned, old), await read(versioned, new)) == (b"old", b"new")
    anew = await put(versioned, "x", b"anew")
    assert await standing(versioned, "x") == b"anew"
    assert await read(versioned, anew) == b"anew"


async def test_an_object_of_parts_has_a_version_too(versioned: Bucket) -> None:
    """The one that a look shows."""
    upload = await begun(versioned, "x")
    made = await completed(versioned, upload, await sent(versioned, upload, b"parts"), Absent())
    seen = await versioned.head("x")
    assert seen is not None
    assert seen.version_id == made.version_id
    assert await read(versioned, made) == b"parts"


async def test_deleting_a_version_leaves_the_others(versioned: Bucket) -> None:
    """What stood there before comes back when it was the newest."""
    refs = [await put(versioned, "x", b"1")]
    refs.append(await put(versioned, "x", b"2", Unchanged(refs[-1].etag)))
    refs.append(await put(versioned, "x", b"3", Unchanged(refs[-1].etag)))
    first, second, third = refs
    if first.version_id is None:
        return
    await versioned.delete("x", when=Unchanged(second.etag), version_id=second.version_id)
    assert await standing(versioned, "x") == b"3"
    with pytest.raises(Missing):
        await read(versioned, second)
    await versioned.delete("x", when=Unchanged(third.etag), version_id=third.version_id)
    assert await standing(versioned, "x") == b"1"
    await versioned.delete("x", when=Unchanged(first.etag), version_id=first.version_id)
    assert await standing(versioned, "x") is None
    assert await keys(versioned) == []


async def test_deleting_a_version_that_is_gone_is_silent(versioned: Bucket) -> None:
    """S3 does not say that it was gone."""
    old = await put(versioned, "x", b"old")
    new = await put(versioned, "x", b"new", Unchanged(old.etag))
    if old.version_id:
        for _ in range(2):
            await versioned.delete("x", when=Unchanged(old.etag), version_id=old.version_id)
    assert await standing(versioned, "x") == b"new"
    assert new.etag != old.etag


async def test_deleting_a_version_does_not_undo_a_delete(versioned: Bucket) -> None:
    """What was deleted does not stand up when the version above it goes."""
    old = await put(versioned, "x", b"old")
    await versioned.delete("x", when=Unchanged(old.etag))
    new = await put(versioned, "x", b"new")
    if new.version_id is None:
        return
    await versioned.delete("x", when=Unchanged(new.etag), version_id=new.version_id)
    assert await standing(versioned, "x") is None
    assert await read(versioned, old) == b"old"


def test_every_error_of_a_bucket_is_one_of_six() -> None:
    """Those that say what one can do."""
    kinds = {kind.__name__ for kind in BucketError.__subclasses__()}
    assert kinds == {"Missing", "Conflict", "Denied", "Unreachable", "Corrupt", "Refused"}
