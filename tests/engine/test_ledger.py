"""latest.json only ever moves forward, whoever else writes it and whatever answer gets lost."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace

import pytest

from ckpt_sidecar.bucket import Absent, Conflict, Denied, Missing, ObjectRef, Span, Unreachable, Upload
from ckpt_sidecar.checkpoint import Id
from ckpt_sidecar.document import UnknownSchema, dump, parse
from ckpt_sidecar.events import Adopted, Claimed, Fenced, Rebuilt, RecoveryPoint, UploadAborted
from ckpt_sidecar.ledger import SWAP_TRIES, FencedOff, Ledger
from ckpt_sidecar.manifest import Announced, Entry, Manifest, self_description
from tests.engine.support import (
    BORN,
    LATEST,
    PREFIX,
    Steps,
    Told,
    holder,
    ledger_of,
    listed,
    manifest_in,
)
from tests.fakes import BytesSource, MemoryBucket


@pytest.fixture
def bucket() -> MemoryBucket:
    """An empty bucket that honours everything."""
    return MemoryBucket()


@pytest.fixture
def steps(bucket: MemoryBucket) -> Steps:
    """The way to it."""
    return Steps(bucket)


@pytest.fixture
def told() -> Told:
    """What was told."""
    return Told()


async def stored(
    bucket: MemoryBucket, generation: int, sequence: int, name: str = "", content: bytes = b"w"
) -> Entry:
    """Put a checkpoint's object into the bucket; return the entry that it is."""
    name = name or f"{sequence}.pt"
    id_, key = Id(generation, sequence), PREFIX + name
    bucket.objects.pop(key, None)
    ref = await bucket.put(key, content, when=Absent(), metadata=self_description(id_, BORN, len(content)))
    return Entry(id_, name, (ref,), BORN, BORN)


def entry(generation: int, sequence: int, name: str = "") -> Entry:
    """Return an entry whose object nobody looks at."""
    name = name or f"{sequence}.pt"
    ref = ObjectRef(PREFIX + name, 1, f"etag-{generation}-{sequence}")
    return Entry(Id(generation, sequence), name, (ref,), BORN, BORN)


async def claimed(bucket: MemoryBucket | Steps, told: Told | None = None, spool: str = "spool-a") -> Ledger:
    """Return a ledger that has claimed the prefix."""
    ledger = ledger_of(bucket, Told() if told is None else told)
    await ledger.claim(holder(spool))
    return ledger


async def write(bucket: MemoryBucket, manifest: Manifest | bytes) -> None:
    """Write latest.json past everybody."""
    bucket.objects.pop(LATEST, None)
    body = manifest if isinstance(manifest, bytes) else dump(manifest, bucket="memory")
    await bucket.put(LATEST, body, when=Absent(), metadata={})


# --- claiming ----------------------------------------------------------------------------------------


async def test_the_first_claim_of_an_empty_prefix_is_generation_1(bucket: MemoryBucket, told: Told) -> None:
    """An empty bucket is a fresh run, and nothing is said to be rebuilt."""
    assert await ledger_of(bucket, told).claim(holder()) == 1
    assert manifest_in(bucket).holder == holder()
    assert told == [Claimed(1, None)]


async def test_a_claim_keeps_what_it_finds(bucket: MemoryBucket, told: Told) -> None:
    """The next generation has the checkpoints of the one before, and says who held it."""
    await (await claimed(bucket)).commit(entry(1, 1))
    assert await ledger_of(bucket, told).claim(holder("spool-b", "attempt-2")) == 2
    assert listed(bucket) == ["1-1 1.pt"]
    assert told == [RecoveryPoint(Id(1, 1), "1.pt", 1, BORN / 1e9, BORN / 1e9), Claimed(2, "node-a")]


async def test_a_claim_is_above_all_that_the_spool_has_claimed(bucket: MemoryBucket) -> None:
    """Where latest.json was lost, the generations that the spool remembers are not used again."""
    assert await ledger_of(bucket, Told()).claim(holder(), at_least=41) == 42


@pytest.mark.fault("D6")
async def test_a_mangled_manifest_is_rebuilt_from_the_objects(bucket: MemoryBucket, told: Told) -> None:
    """What describes itself as a checkpoint of ours is listed again, loudly; a stranger's object is not."""
    for n in (1, 2, 3):
        await stored(bucket, 7, n)
    await stored(bucket, 6, 9, "deep/old.pt")
    await bucket.put(PREFIX + "stranger.pt", b"x", when=Absent(), metadata={})
    await write(bucket, b'{"schema": 1, "generation": ')
    assert await ledger_of(bucket, told).claim(holder()) == 8
    assert listed(bucket) == ["7-3 3.pt", "7-2 2.pt", "7-1 1.pt", "6-9 deep/old.pt"]
    (rebuilt,) = told.of(Rebuilt)
    assert rebuilt.found == 4
    assert "not JSON" in rebuilt.error


async def test_a_manifest_that_is_damaged_on_its_way_is_read_again(
    bucket: MemoryBucket, steps: Steps, told: Told
) -> None:
    """To rebuild it would forget what was announced in it."""
    ledger = await claimed(bucket)
    await ledger.commit(await stored(bucket, 1, 1))
    good = bucket.objects[LATEST]

    async def damaged() -> None:
        bucket.objects[LATEST] = replace(good, body=b"?" + good.body[1:])

    async def mended() -> None:
        bucket.objects[LATEST] = good

    steps.on("get", LATEST, before=damaged, after=mended)
    loaded = await ledger_of(steps, told).load()
    assert [each.id for each in loaded.checkpoints] == [Id(1, 1)]
    assert told.of(Rebuilt) == []


@pytest.mark.fault("D6")
async def test_a_lost_manifest_is_rebuilt_from_the_objects(bucket: MemoryBucket, told: Told) -> None:
    """A bucket whose latest.json was deleted is not taken for a fresh run."""
    await stored(bucket, 7, 1)
    await ledger_of(bucket, told).claim(holder())
    assert listed(bucket) == ["7-1 1.pt"]
    assert told.of(Rebuilt) == [Rebuilt(1, "it is not there")]


async def test_a_rebuild_gives_the_very_entries(bucket: MemoryBucket) -> None:
    """The objects tell all that the manifest had said of them, but when they were stored."""
    ledger = await claimed(bucket)
    first = await stored(bucket, 1, 1, content=b"weights")
    await ledger.commit(first)
    del bucket.objects[LATEST]
    (again,) = (await ledger_of(bucket, Told()).load()).checkpoints
    assert replace(again, stored_at=first.stored_at) == first


async def test_a_manifest_of_a_newer_sidecar_is_left_alone(bucket: MemoryBucket) -> None:
    """What we cannot read we do not replace."""
    await write(bucket, b'{"schema": 2}')
    with pytest.raises(UnknownSchema, match="schema 2 is newer"):
        await ledger_of(bucket, Told()).claim(holder())
    assert bucket.body(LATEST) == b'{"schema": 2}'


@pytest.mark.fault("F7")
async def test_a_bucket_that_cannot_be_reached_is_not_empty(bucket: MemoryBucket, steps: Steps) -> None:
    """No answer is no manifest: nothing is claimed, nothing written."""
    steps.fail("get", Unreachable("no route"), times=9)
    with pytest.raises(Unreachable):
        await claimed(steps)
    assert bucket.objects == {}


@pytest.mark.fault("C14")
async def test_a_bucket_that_is_not_there_is_not_empty(steps: Steps) -> None:
    """A bucket that was deleted is no fresh run."""
    steps.fail("get", Missing("no such bucket", reason="bucket"))
    with pytest.raises(Missing):
        await claimed(steps)


async def test_a_claim_whose_answer_is_lost_has_won(bucket: MemoryBucket, steps: Steps, told: Told) -> None:
    """The token tells that what stands in the bucket is our own write."""
    steps.lose("put")
    assert (await claimed(steps, told)).generation == 1
    assert manifest_in(bucket).generation == 1
    assert told == [Claimed(1, None)]


@pytest.mark.fault("D2")
async def test_two_that_claim_at_once_get_an_order(bucket: MemoryBucket, told: Told) -> None:
    """Of ten that start together each gets a generation of its own; only the last one holds the prefix."""
    ledgers = [ledger_of(bucket, told) for _ in range(10)]
    async with asyncio.TaskGroup() as group:
        for n, ledger in enumerate(ledgers):
            group.create_task(ledger.claim(holder(f"spool-{n}")))
    assert sorted(ledger.generation for ledger in ledgers) == list(range(1, 11))
    last = max(ledgers, key=lambda each: each.generation)
    await last.commit(entry(10, 1))
    for ledger in ledgers:
        if ledger is not last:
            with pytest.raises(FencedOff):
                await ledger.commit(entry(ledger.generation, 99))
    assert listed(bucket) == ["10-1 1.pt"]


@pytest.mark.fault("D3")
async def test_who_was_displaced_in_this_attempt_does_not_claim_again(
    bucket: MemoryBucket, told: Told
) -> None:
    """A container that is restarted after it was displaced never takes the prefix back by itself."""
    await claimed(bucket)
    await claimed(bucket, spool="spool-b")
    before = bucket.body(LATEST)
    with pytest.raises(FencedOff, match=r"generation 2 is held by node-a pid 42 .*--take-over"):
        await ledger_of(bucket, told).claim(holder(), claimed_in="attempt-1", at_least=1)
    assert bucket.body(LATEST) == before
    assert told == [Fenced(2, "node-a pid 42 (attempt attempt-1)")]


async def test_a_person_may_take_the_prefix_over(bucket: MemoryBucket) -> None:
    """--take-over is the way out for who was displaced."""
    await claimed(bucket)
    other = await claimed(bucket, spool="spool-b")
    assert (
        await ledger_of(bucket, Told()).claim(holder(), claimed_in="attempt-1", at_least=1, take_over=True)
        == 3
    )
    with pytest.raises(FencedOff):
        await other.commit(entry(2, 1))


async def test_a_restart_in_the_same_attempt_claims_its_own_prefix_again(bucket: MemoryBucket) -> None:
    """Nobody has displaced it: the restarted container goes on."""
    await claimed(bucket)
    assert await ledger_of(bucket, Told()).claim(holder(), claimed_in="attempt-1", at_least=1) == 2


async def test_a_new_attempt_claims_from_whoever_held(bucket: MemoryBucket) -> None:
    """A job that was rescheduled takes the prefix, although its old spool once had it."""
    await claimed(bucket)
    await claimed(bucket, spool="spool-b")
    new = holder("spool-a", "attempt-2")
    assert await ledger_of(bucket, Told()).claim(new, claimed_in="attempt-1", at_least=1) == 3


@pytest.mark.fault("D2", "D3")
async def test_a_claim_that_is_overtaken_looks_at_who_holds_now(bucket: MemoryBucket, steps: Steps) -> None:
    """Between its read and its swap another has claimed: who was displaced by that does not go on."""
    await claimed(bucket)

    async def overtake() -> None:
        await claimed(bucket, spool="spool-b")

    steps.on("put", before=overtake)
    with pytest.raises(FencedOff):
        await ledger_of(steps, Told()).claim(holder(), claimed_in="attempt-1")
    assert manifest_in(bucket).holder == holder("spool-b")


# --- swaps -------------------------------------------------------------------------------------------


@pytest.mark.fault("D8")
async def test_a_commit_is_in_the_bucket_when_it_returns(bucket: MemoryBucket) -> None:
    """Durable means that it stands in latest.json, newest first whatever the order of the commits."""
    ledger = await claimed(bucket)
    for n in (2, 3, 1):
        await ledger.commit(entry(1, n))
        assert f"1-{n} {n}.pt" in listed(bucket)
    assert listed(bucket) == ["1-3 3.pt", "1-2 2.pt", "1-1 1.pt"]


@pytest.mark.fault("C5")
async def test_a_commit_whose_answer_is_lost_is_found_to_have_won(
    bucket: MemoryBucket, steps: Steps, told: Told
) -> None:
    """It is looked at, and neither written twice nor taken for somebody else's write."""
    ledger = await claimed(steps, told)
    steps.lose("put")
    await ledger.commit(entry(1, 1))
    assert listed(bucket) == ["1-1 1.pt"]
    assert ledger.manifest == manifest_in(bucket)
    await ledger.commit(entry(1, 2))
    assert not told.of(Fenced)
    assert not told.of(Rebuilt)
    assert [str(each.id) for each in told.of(RecoveryPoint)] == ["1-1", "1-2"]


async def test_a_commit_that_never_arrived_is_said_again(bucket: MemoryBucket, steps: Steps) -> None:
    """Silence, and the look shows the old manifest: the same change goes once more."""
    ledger = await claimed(steps)
    steps.fail("put", Unreachable("reset"))
    await ledger.commit(entry(1, 1))
    assert listed(bucket) == ["1-1 1.pt"]


async def test_a_commit_that_cannot_be_looked_at_may_be_asked_for_again(
    bucket: MemoryBucket, steps: Steps
) -> None:
    """Neither the swap nor the look was answered: that comes out, and the second asking changes nothing."""
    ledger = await claimed(steps)
    steps.lose("put")
    steps.fail("get", Unreachable("no route"))
    with pytest.raises(Unreachable):
        await ledger.commit(entry(1, 1))
    await ledger.commit(entry(1, 1))
    assert listed(bucket) == ["1-1 1.pt"]
    assert ledger.manifest == manifest_in(bucket)


@pytest.mark.fault("C5")
async def test_a_write_that_arrives_late_costs_nothing(bucket: MemoryBucket, steps: Steps) -> None:
    """A swap that lands only after the look has not found it is met at the next try, and nobody is fenced."""
    ledger = await claimed(steps)
    late: list[Awaitable[ObjectRef]] = []
    before = bucket.objects[LATEST].ref

    async def on_its_way() -> None:
        body = dump(
            replace(manifest_in(bucket), write="our own, late", checkpoints=(entry(1, 1),)), bucket="b"
        )
        late.append(bucket.put(LATEST, body, when=Absent(), metadata={}))
        raise Unreachable("no answer")

    async def arrive() -> None:
        assert bucket.objects[LATEST].ref == before
        del bucket.objects[LATEST]
        await late.pop()

    steps.on("put", before=on_its_way)
    steps.on("put", before=arrive)
    await ledger.commit(entry(1, 1))
    assert listed(bucket) == ["1-1 1.pt"]


@pytest.mark.fault("C8")
async def test_a_foreign_writer_is_not_overwritten(bucket: MemoryBucket, steps: Steps) -> None:
    """Somebody added a field in between: the commit joins it."""
    ledger = await claimed(steps)

    async def somebody() -> None:
        await write(bucket, replace(manifest_in(bucket), write="theirs", extra={"note": "kept"}))

    steps.on("put", before=somebody)
    await ledger.commit(entry(1, 1))
    assert manifest_in(bucket).extra == {"note": "kept"}
    assert listed(bucket) == ["1-1 1.pt"]


@pytest.mark.fault("D7")
async def test_a_foreign_writer_that_always_wins_is_said(bucket: MemoryBucket, steps: Steps) -> None:
    """It is fought so many times, then named as what it is."""
    ledger = await claimed(steps)
    rounds = []

    async def somebody() -> None:
        rounds.append(1)
        await write(bucket, replace(manifest_in(bucket), write=f"theirs {len(rounds)}"))

    steps.on("put", before=somebody, times=1000)
    with pytest.raises(Conflict, match="was changed by somebody else 20 times in a row"):
        await ledger.commit(entry(1, 1))
    assert len(rounds) == SWAP_TRIES
    with pytest.raises(Conflict):
        await claimed(steps, spool="spool-b")
    steps.relent()
    await ledger.commit(entry(1, 1))
    assert listed(bucket) == ["1-1 1.pt"]


@pytest.mark.fault("D8")
async def test_commits_at_once_travel_together(bucket: MemoryBucket, steps: Steps) -> None:
    """A burst of a hundred commits costs two swaps: the first one's, and one for all that waited."""
    ledger = await claimed(steps)
    swaps = []

    async def count() -> None:
        swaps.append(manifest_in(bucket).write)

    steps.on("put", after=count, times=1000)
    async with asyncio.TaskGroup() as group:
        for n in range(100):
            group.create_task(ledger.commit(entry(1, n)))
    assert len(listed(bucket)) == 100
    assert len(swaps) == len(set(swaps)) == 2


async def test_a_swap_that_fails_for_one_is_tried_for_the_others(bucket: MemoryBucket, steps: Steps) -> None:
    """Who leads a swap that fails hears of it; what travelled along is tried by the next."""
    ledger = await claimed(steps)
    gate = steps.hold("put")
    async with asyncio.TaskGroup() as group:
        first = group.create_task(ledger.commit(entry(1, 1)))
        await gate.reached.wait()
        failing = asyncio.ensure_future(ledger.commit(entry(1, 2)))
        others = [group.create_task(ledger.commit(entry(1, n))) for n in (3, 4)]
        steps.fail("put", Denied("not now"))
        gate.opened.set()
        with pytest.raises(Denied):
            await failing
    assert first.done()
    assert all(each.done() for each in others)
    assert listed(bucket) == ["1-4 4.pt", "1-3 3.pt", "1-1 1.pt"]


async def test_a_change_that_nobody_waits_for_any_more_is_not_made(
    bucket: MemoryBucket, steps: Steps
) -> None:
    """An announcement that was given up while it waited does not travel with the next swap."""
    ledger = await claimed(steps)
    gate = steps.hold("put")
    first = asyncio.ensure_future(ledger.commit(entry(1, 1)))
    await gate.reached.wait()
    given_up = asyncio.ensure_future(ledger.announce(announced("u-1", 2)))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.wait([given_up])
    gate.opened.set()
    await first
    await ledger.commit(entry(1, 3))
    assert manifest_in(bucket).uploads == ()


async def test_who_gives_up_in_the_middle_of_a_swap_leaves_the_others(
    bucket: MemoryBucket, steps: Steps
) -> None:
    """The leader is cancelled while it writes: what waited is written by the next."""
    ledger = await claimed(steps)
    gate = steps.hold("put")
    leader = asyncio.ensure_future(ledger.commit(entry(1, 1)))
    await gate.reached.wait()
    other = asyncio.ensure_future(ledger.commit(entry(1, 2)))
    await asyncio.sleep(0)
    leader.cancel()
    await other
    assert listed(bucket) == ["1-2 2.pt"]


# --- fencing -----------------------------------------------------------------------------------------


async def test_who_meets_a_greater_generation_is_fenced(bucket: MemoryBucket, told: Told) -> None:
    """Another has claimed since: nothing is written any more, and it is said once, however many ask."""
    ledger = await claimed(bucket, told)
    await claimed(bucket, spool="spool-b")
    before = bucket.body(LATEST)
    for n in range(3):
        with pytest.raises(FencedOff, match="generation 2 is held by node-a"):
            await ledger.commit(entry(1, n))
    assert bucket.body(LATEST) == before
    assert told.of(Fenced) == [Fenced(2, "node-a pid 42 (attempt attempt-1)")]


async def test_a_save_of_a_later_generation_is_a_reason_to_look(bucket: MemoryBucket, told: Told) -> None:
    """Whoever meets one asks who holds the prefix; one of its own generation or an earlier one is none."""
    ledger = await claimed(bucket, told)
    await ledger.commit(entry(1, 99))
    await claimed(bucket, spool="spool-b")
    await ledger.met(entry(1, 99))
    assert told.of(Fenced) == []
    with pytest.raises(FencedOff):
        await ledger.met(entry(2, 1))
    assert len(told.of(Fenced)) == 1


async def test_a_save_that_was_stored_too_late_to_be_committed_is_adopted(
    bucket: MemoryBucket, told: Told
) -> None:
    """Its sidecar was fenced before: what it supersedes would be lost with it, were it not listed."""
    ledger = await claimed(bucket, told)
    await ledger.met(entry(1, 9))
    await ledger.met(entry(1, 9))
    assert told.of(Adopted) == [Adopted(Id(1, 9), "9.pt")]
    assert [each.id for each in manifest_in(bucket).checkpoints] == [Id(1, 9)]


@pytest.mark.fault("D6")
async def test_an_equal_generation_of_another_holder_fences(bucket: MemoryBucket) -> None:
    """Two that claimed the same number, because the manifest was lost in between, do not share it."""
    ledger = await claimed(bucket)
    del bucket.objects[LATEST]
    await claimed(bucket, spool="spool-b")
    with pytest.raises(FencedOff):
        await ledger.commit(entry(1, 1))
    assert listed(bucket) == []


async def test_a_newer_schema_in_the_middle_of_the_work_fences(bucket: MemoryBucket) -> None:
    """A newer sidecar has taken the prefix: its manifest is left alone."""
    ledger = await claimed(bucket)
    await write(bucket, b'{"schema": 2}')
    with pytest.raises(FencedOff, match="a newer ckpt-sidecar"):
        await ledger.commit(entry(1, 1))
    assert bucket.body(LATEST) == b'{"schema": 2}'


# --- what is done to latest.json behind our back ------------------------------------------------------


async def test_a_manifest_that_somebody_deletes_is_put_back(bucket: MemoryBucket, told: Told) -> None:
    """What we saw last is written again with the next commit, loudly."""
    ledger = await claimed(bucket, told)
    await ledger.commit(entry(1, 1))
    del bucket.objects[LATEST]
    await ledger.commit(entry(1, 2))
    assert listed(bucket) == ["1-2 2.pt", "1-1 1.pt"]
    assert told.of(Rebuilt) == [Rebuilt(1, "it is not there")]


async def test_a_manifest_that_somebody_mangles_is_put_back(bucket: MemoryBucket, told: Told) -> None:
    """Rubbish in its place costs nothing that we have seen."""
    ledger = await claimed(bucket, told)
    await ledger.commit(entry(1, 1))
    await write(bucket, b"rubbish")
    await ledger.commit(entry(1, 2))
    assert listed(bucket) == ["1-2 2.pt", "1-1 1.pt"]
    assert len(told.of(Rebuilt)) == 1


@pytest.mark.fault("D6")
async def test_an_older_copy_never_takes_a_checkpoint_away(bucket: MemoryBucket, told: Told) -> None:
    """Somebody puts a backup back, of this generation or of an earlier one: what we saw last wins."""
    older = [bucket.body(LATEST) for _ in [await claimed(bucket, spool="spool-z")]]
    ledger = await claimed(bucket, told)
    older += [bucket.body(LATEST)]
    await ledger.commit(entry(2, 1))
    for n, copy in enumerate(older, 2):
        await write(bucket, copy)
        await ledger.commit(entry(2, n))
    assert listed(bucket) == ["2-3 3.pt", "2-2 2.pt", "2-1 1.pt"]
    assert {each.error for each in told.of(Rebuilt)} == {"it was replaced by an older copy"}
    assert manifest_in(bucket).generation == 2


# --- uploads under way -------------------------------------------------------------------------------


def announced(upload_id: str, sequence: int, spool: str = "spool-z", name: str = "") -> Announced:
    """Return an announcement."""
    name = name or f"{sequence}.pt"
    return Announced(Id(1, sequence), name, PREFIX + name, upload_id, 1, BORN, spool)


async def begun(bucket: MemoryBucket, ledger: Ledger, sequence: int, spool: str = "spool-z") -> Upload:
    """Begin and announce an upload with one part."""
    key = f"{PREFIX}{sequence}.pt"
    metadata = self_description(Id(1, sequence), BORN, 1)
    upload = Upload(key, await bucket.create_multipart(key, metadata=metadata))
    await bucket.put_part(upload, Span(1, 0, 1), BytesSource(b"w"))
    await ledger.announce(announced(upload.upload_id, sequence, spool))
    return upload


async def test_a_claimant_settles_what_others_have_begun(bucket: MemoryBucket, told: Told) -> None:
    """Uploads are aborted, or adopted where they were completed; those that we resume are left alone."""
    old = await claimed(bucket, spool="spool-z")
    under_way, completed, own = [
        await begun(bucket, old, n, spool) for n, spool in ((1, "spool-z"), (2, "spool-z"), (3, "spool-a"))
    ]
    parts = await bucket.list_parts(completed)
    await bucket.complete_multipart(completed, parts, when=Absent(), metadata={})
    ledger = await claimed(bucket, told)
    await ledger.settle_predecessors({own.upload_id})
    assert listed(bucket) == ["1-2 2.pt"]
    assert [each.upload_id for each in manifest_in(bucket).uploads] == [own.upload_id]
    assert list(bucket.uploads) == [own.upload_id]
    assert told.of(UploadAborted) == [UploadAborted("1.pt", under_way.upload_id)]
    assert told.of(Adopted) == [Adopted(Id(1, 2), "2.pt")]
    assert [each.name for each in told.of(RecoveryPoint)] == ["2.pt"]


async def test_an_upload_that_vanished_is_forgotten(bucket: MemoryBucket) -> None:
    """Neither an upload nor its object: somebody has aborted it, and nothing is adopted."""
    old = await claimed(bucket, spool="spool-z")
    upload = await begun(bucket, old, 1)
    await bucket.abort_multipart(upload)
    await stored(bucket, 0, 1)  # an older save of that name
    ledger = await claimed(bucket)
    await ledger.settle_predecessors(())
    assert listed(bucket) == []
    assert manifest_in(bucket).uploads == ()


async def test_what_is_not_known_of_a_predecessor_is_not_settled(bucket: MemoryBucket, steps: Steps) -> None:
    """An abort without answer comes out, and the entry stays until it is settled."""
    await begun(bucket, await claimed(bucket, spool="spool-z"), 1)
    ledger = await claimed(steps)
    for error in (Unreachable("reset"), Missing("no bucket", reason="bucket")):
        steps.fail("abort", error)
        with pytest.raises(type(error)):
            await ledger.settle_predecessors(())
        assert len(manifest_in(bucket).uploads) == 1
    await ledger.settle_predecessors(())
    assert manifest_in(bucket).uploads == ()
    assert bucket.uploads == {}


async def test_an_abort_whose_answer_is_lost_is_settled_the_next_time(
    bucket: MemoryBucket, steps: Steps
) -> None:
    """The second abort finds nothing, and neither does the look: it is forgotten."""
    await begun(bucket, await claimed(bucket, spool="spool-z"), 1)
    ledger = await claimed(steps)
    steps.lose("abort")
    with pytest.raises(Unreachable):
        await ledger.settle_predecessors(())
    await ledger.settle_predecessors(())
    assert manifest_in(bucket).uploads == ()


async def test_a_commit_takes_its_announcement_out(bucket: MemoryBucket) -> None:
    """One and the same swap enters the checkpoint and takes out its upload."""
    ledger = await claimed(bucket)
    await ledger.announce(announced("u-1", 1))
    await ledger.announce(announced("u-1", 1))
    await ledger.announce(announced("u-2", 2))
    assert [each.upload_id for each in manifest_in(bucket).uploads] == ["u-1", "u-2"]
    await ledger.commit(entry(1, 1))
    assert [each.upload_id for each in manifest_in(bucket).uploads] == ["u-2"]
    await ledger.forget("u-2")
    assert manifest_in(bucket).uploads == ()


async def test_an_announcement_that_landed_without_our_knowledge_is_forgotten(
    bucket: MemoryBucket, steps: Steps
) -> None:
    """Its answer and the look were lost: to forget it takes it out all the same."""
    ledger = await claimed(steps)
    steps.lose("put")
    steps.fail("get", Unreachable("no route"))
    with pytest.raises(Unreachable):
        await ledger.announce(announced("u-1", 1))
    assert len(manifest_in(bucket).uploads) == 1
    await ledger.forget("u-1")
    assert manifest_in(bucket).uploads == ()


# --- retention ---------------------------------------------------------------------------------------


async def four(bucket: MemoryBucket, ledger: Ledger) -> None:
    """Commit four checkpoints."""
    for n in range(1, 5):
        await ledger.commit(await stored(bucket, 1, n))


def never(key: str) -> bool:
    """Spare no key."""
    return False


async def test_retention_deletes_the_oldest(bucket: MemoryBucket) -> None:
    """The newest stay, entry and object; of the others nothing stays."""
    ledger = await claimed(bucket)
    await four(bucket, ledger)
    gone = await ledger.expire(2, spare=never)
    assert [each.key for each in gone] == ["job/2.pt", "job/1.pt"]
    assert listed(bucket) == ["1-4 4.pt", "1-3 3.pt"]
    assert sorted(bucket.objects) == ["job/3.pt", "job/4.pt", LATEST]
    assert manifest_in(bucket).expiring == ()
    before = bucket.body(LATEST)
    assert await ledger.expire(2, spare=never) == []
    assert bucket.body(LATEST) == before


async def test_retention_never_deletes_the_newest(bucket: MemoryBucket) -> None:
    """Even asked to keep none it keeps one."""
    ledger = await claimed(bucket)
    await four(bucket, ledger)
    await ledger.expire(0, spare=never)
    assert listed(bucket) == ["1-4 4.pt"]
    assert "job/4.pt" in bucket.objects


async def test_retention_spares_a_key_that_is_being_saved_anew(bucket: MemoryBucket) -> None:
    """What is busy is let go later; the bucket's object stays until then."""
    ledger = await claimed(bucket)
    await four(bucket, ledger)
    await ledger.expire(3, spare=lambda key: key == "job/1.pt")
    assert "job/1.pt" in bucket.objects
    assert [each.key for each in manifest_in(bucket).expiring] == ["job/1.pt"]
    await ledger.expire(3, spare=never)
    assert "job/1.pt" not in bucket.objects
    assert manifest_in(bucket).expiring == ()


@pytest.mark.fault("D10")
@pytest.mark.parametrize("able", [True, False])
async def test_retention_leaves_a_newer_object_alone(*, able: bool) -> None:
    """A save that has taken the key meanwhile is not what is to be deleted, whatever the store honours."""
    bucket = MemoryBucket()
    bucket.abilities = replace(bucket.abilities, conditional_delete=able)
    ledger = await claimed(bucket)
    await four(bucket, ledger)
    await stored(bucket, 1, 9, "1.pt", b"newer")
    await ledger.expire(3, spare=never)
    assert bucket.body("job/1.pt") == b"newer"
    assert manifest_in(bucket).expiring == ()


@pytest.mark.fault("C8")
async def test_retention_of_a_key_that_the_store_is_busy_with_goes_on(
    bucket: MemoryBucket, steps: Steps
) -> None:
    """S3 answers 409 then, although nobody has changed the object: it is deleted the next time."""
    ledger = await claimed(steps)
    await four(bucket, ledger)
    steps.fail("delete", Conflict("busy"), "1.pt")
    with pytest.raises(Conflict, match="busy"):
        await ledger.expire(2, spare=never)
    assert sorted(bucket.objects) == ["job/1.pt", "job/3.pt", "job/4.pt", LATEST]
    await ledger.expire(2, spare=never)
    assert sorted(bucket.objects) == ["job/3.pt", "job/4.pt", LATEST]
    assert manifest_in(bucket).expiring == ()


@pytest.mark.fault("C5", "D10")
@pytest.mark.parametrize("lost", [True, False])
async def test_retention_that_was_cut_goes_on(bucket: MemoryBucket, steps: Steps, *, lost: bool) -> None:
    """Between the swap and the delete, or the delete and its answer, comes an end: the next one goes on."""
    ledger = await claimed(steps)
    await four(bucket, ledger)
    if lost:
        steps.lose("delete")
    else:
        steps.fail("delete", Unreachable("reset"))
    with pytest.raises(Unreachable):
        await ledger.expire(3, spare=never)
    assert listed(bucket) == ["1-4 4.pt", "1-3 3.pt", "1-2 2.pt"]
    after = await claimed(bucket, spool="spool-b")
    gone = await after.expire(3, spare=never)
    assert [each.key for each in gone] == ["job/1.pt"]
    assert "job/1.pt" not in bucket.objects
    assert manifest_in(bucket).expiring == ()


@pytest.mark.fault("D10")
async def test_a_save_of_an_expiring_name_is_never_deleted(bucket: MemoryBucket, steps: Steps) -> None:
    """Its commit takes the key out of what is to be deleted."""
    ledger = await claimed(steps)
    await four(bucket, ledger)
    steps.fail("delete", Unreachable("reset"))
    with pytest.raises(Unreachable):
        await ledger.expire(3, spare=never)
    await ledger.commit(await stored(bucket, 1, 5, "1.pt", b"newer"))
    await ledger.expire(4, spare=never)
    assert bucket.body("job/1.pt") == b"newer"
    assert manifest_in(bucket).expiring == ()


@pytest.mark.fault("D10")
async def test_a_fenced_sidecar_deletes_nothing(bucket: MemoryBucket) -> None:
    """The swap comes before the delete, and it is refused."""
    ledger = await claimed(bucket)
    await four(bucket, ledger)
    await claimed(bucket, spool="spool-b")
    with pytest.raises(FencedOff):
        await ledger.expire(1, spare=never)
    assert len(listed(bucket)) == 4
    assert len(bucket.objects) == 5


@pytest.mark.fault("C12")
async def test_an_object_that_may_not_be_deleted_does_not_keep_the_others(
    bucket: MemoryBucket, steps: Steps
) -> None:
    """What can be deleted is, and forgotten; what cannot comes out, and stays to be deleted."""
    ledger = await claimed(steps)
    await four(bucket, ledger)
    steps.fail("delete", Denied("not this one"), "3.pt")
    with pytest.raises(Denied):
        await ledger.expire(1, spare=never)
    assert sorted(bucket.objects) == ["job/3.pt", "job/4.pt", LATEST]
    assert [each.key for each in manifest_in(bucket).expiring] == ["job/3.pt"]


async def test_the_history_is_bounded(bucket: MemoryBucket) -> None:
    """latest.json lists so many and no more; the objects of the others stay."""
    ledger = ledger_of(bucket, Told(), history=2)
    await ledger.claim(holder())
    await four(bucket, ledger)
    assert listed(bucket) == ["1-4 4.pt", "1-3 3.pt"]
    assert len(bucket.objects) == 5


async def test_unknown_fields_outlive_every_swap(bucket: MemoryBucket) -> None:
    """What a newer sidecar, or a person, has added is kept."""
    ledger = await claimed(bucket)
    await write(bucket, replace(manifest_in(bucket), write="theirs", extra={"note": [1, 2]}))
    await ledger.commit(entry(1, 1))
    await ledger.expire(1, spare=never)
    assert parse(bucket.body(LATEST), prefix=PREFIX).extra == {"note": [1, 2]}
