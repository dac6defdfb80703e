"""One prefix, one holder: what others do to `latest.json`, what is left over, and who may delete."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt_sidecar.bucket import MIB, Span, Upload
from ckpt_sidecar.checkpoint import Committed, Pinned, Skipped, Superseded, Uploading
from ckpt_sidecar.document import dump, parse
from ckpt_sidecar.events import Fenced, NotReady, Progress, Ready, Rebuilt, UploadAborted
from ckpt_sidecar.sidecar import Exit
from tests.engine.support import LATEST, listed, manifest_in, save
from tests.engine.test_drain import Life, living
from tests.engine.test_uploader import Rig
from tests.engine.test_uploader import rig as rig  # noqa: PLC0414 (a fixture)
from tests.fakes import ABLE, CARELESS, BytesSource, MemoryBucket

LARGE = random.Random(12).randbytes(9 * MIB)  # two parts
OTHER = LARGE[::-1]
STORES = pytest.mark.parametrize(
    "abilities", [pytest.param(ABLE, id="able"), pytest.param(CARELESS, id="careless")]
)


async def lived(root: Path, memory: MemoryBucket, *names: str, **more: object) -> None:
    """Have one life save these, and end well."""
    async with living(root, memory, allow_unfenced=True, **more) as life:
        await life.ready()
        for n, name in enumerate(names):
            await life.save(name, at=n)
            await life.told.until(life.committed(name))
        assert (await life.stop()).code == Exit.DURABLE


def history(memory: MemoryBucket) -> list[str]:
    """Return the checkpoints that latest.json lists, as `generation name`, newest first."""
    return [f"{each.id.generation} {each.name}" for each in manifest_in(memory).checkpoints]


async def kill(life: Life) -> None:
    """End it as SIGKILL does: nothing more is sent, and nothing more is written down."""
    assert life.running is not None
    life.running.cancel()
    await asyncio.wait([life.running])
    life.spool.close()


def put_there(memory: MemoryBucket, body: bytes | None) -> None:
    """Replace latest.json past everybody; None deletes it."""
    standing = memory.objects.pop(LATEST)
    if body is not None:
        etag = f"theirs-{random.Random(body).random()}"
        memory.objects[LATEST] = replace(
            standing, body=body, ref=replace(standing.ref, etag=etag, size=len(body))
        )


# --- latest.json, behind our back ---------------------------------------------------------------------

Damage = Callable[[bytes], bytes | None]


def without_entries(body: bytes) -> bytes:
    """Return the manifest as if nothing had ever been committed."""
    return dump(replace(parse(body, prefix="job/"), write="theirs", checkpoints=()), bucket="memory")


DAMAGES: dict[str, Damage] = {
    "deleted": lambda _: None,
    "emptied": lambda _: b"",
    "cut": lambda body: body[: len(body) // 2],
    "not ours": lambda _: b'{"schema": 1, "latest": "step_3.pt"}',
    "of another prefix": lambda body: body.replace(b"job/", b"run/"),
    "without its entries": without_entries,
}
damaged = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())


@pytest.mark.fault("D6")
@STORES
@damaged
async def test_a_manifest_that_is_damaged_under_us_is_put_back(
    tmp_path: Path, abilities: object, damage: Damage
) -> None:
    """The next commit writes all that we had seen again, and it is said."""
    memory = MemoryBucket(abilities=abilities)  # type: ignore[arg-type]
    async with living(tmp_path / "a", memory, allow_unfenced=True) as life:
        await life.ready()
        for n, name in enumerate(("1.pt", "2.pt")):
            await life.save(name, at=n)
            await life.told.until(life.committed(name))
        put_there(memory, damage(memory.body(LATEST)))
        await life.save("3.pt", at=3)
        assert (await life.stop()).code == Exit.DURABLE
        assert listed(memory) == ["1-3 3.pt", "1-2 2.pt", "1-1 1.pt"]
        assert life.told.of(Rebuilt)
        assert not life.told.of(Fenced)


@pytest.mark.fault("D6")
@damaged
async def test_a_manifest_that_was_damaged_is_rebuilt_at_the_start(tmp_path: Path, damage: Damage) -> None:
    """By the node that wrote it: all checkpoints are listed again, and the ids go on above them."""
    memory = MemoryBucket()
    await lived(tmp_path / "a", memory, "1.pt", "2.pt")
    put_there(memory, damage(memory.body(LATEST)))
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        assert life.restored == ("kept", "2.pt")
        assert [each.found for each in life.told.of(Rebuilt)] == [2]
        await life.save("3.pt", at=3)
        await life.stop()
        assert history(memory) == ["2 3.pt", "1 2.pt", "1 1.pt"]


@pytest.mark.fault("D6")
@pytest.mark.parametrize("rotated", [False, True])
async def test_an_older_copy_does_not_take_the_start_back(tmp_path: Path, *, rotated: bool) -> None:
    """The spool knows what it has committed, also where the trainer has deleted the file since."""
    memory = MemoryBucket()
    await lived(tmp_path / "a", memory, "1.pt")
    older = memory.body(LATEST)
    await lived(tmp_path / "a", memory, "2.pt", "3.pt")
    await lived(tmp_path / "a", memory)
    if rotated:
        for path in (tmp_path / "a").glob("*.pt"):
            path.unlink()
        await lived(tmp_path / "a", memory)
        (tmp_path / "a/3.pt").unlink()
    put_there(memory, older)
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        assert life.restored == ("restored" if rotated else "kept", "3.pt")
        (rebuilt,) = life.told.of(Rebuilt)
        assert "an older copy" in rebuilt.error
        await life.save("4.pt", at=4)
        await life.stop()
        generation = manifest_in(memory).generation
        assert generation > 3
        assert history(memory) == [f"{generation} 4.pt", "2 3.pt", "2 2.pt", "1 1.pt"]


@pytest.mark.fault("D6")
async def test_an_older_copy_that_no_object_contradicts_is_taken(tmp_path: Path) -> None:
    """Where the newer objects are gone as well there is nothing to go back to: said, and gone on with."""
    memory = MemoryBucket()
    await lived(tmp_path / "a", memory, "1.pt")
    older = memory.body(LATEST)
    await lived(tmp_path / "a", memory, "2.pt")
    put_there(memory, older)
    del memory.objects["job/2.pt"]
    (tmp_path / "a/2.pt").unlink()
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        assert life.restored == ("kept", "1.pt")
        assert len(life.told.of(Rebuilt)) == 1
        await life.save("3.pt", at=3)
        await life.stop()
        assert history(memory) == ["3 3.pt", "1 1.pt"]


@pytest.mark.fault("D6")
async def test_a_newer_schema_is_left_alone_until_a_person_has_looked(tmp_path: Path) -> None:
    """At the start: not ready, with the reason. In the middle: fenced, and visibly so."""
    memory = MemoryBucket()
    await lived(tmp_path / "a", memory, "1.pt")
    ours, newer = memory.body(LATEST), b'{"schema": 2, "everything": "is different"}'
    put_there(memory, newer)
    async with living(tmp_path / "a", memory) as life:
        life.start()
        await life.told.until(life.not_ready)
        assert "schema 2 is newer" in life.told.of(NotReady)[0].reason
        assert memory.body(LATEST) == newer
        put_there(memory, ours)
        await life.told.until(lambda: life.told.of(Ready))
        put_there(memory, newer)
        await life.save("2.pt", at=2)
        await life.told.until(lambda: life.told.of(Fenced))
        assert (await life.stop()).code == Exit.FENCED
        assert memory.body(LATEST) == newer
        assert life.pins == ["2.pt"]


@pytest.mark.fault("D5")
async def test_after_a_wiped_spool_only_what_the_bucket_does_not_know_is_sent(tmp_path: Path) -> None:
    """The rest is history; what the bucket knows by other bytes is superseded, said, and kept on the disk."""
    memory = MemoryBucket()
    await lived(tmp_path / "a", memory, "a.pt", "b.pt", "c.pt")
    async with living(tmp_path / "a", memory) as life:
        life.spool.disk.remove_tree(life.spool.home)
    save(tmp_path / "a", "b.pt", b"other bytes", at=9)
    save(tmp_path / "a", "d.pt", b"unknown", at=10)
    async with living(tmp_path / "a", memory, attempt="attempt-2") as life:
        await life.ready()
        assert life.restored == ("kept", "c.pt")
        await life.stop()
        assert history(memory) == ["1 c.pt", "1 b.pt", "1 a.pt", "0 d.pt"]
        assert [each.name for each in life.told.of(Progress) if each.direction == "up"] == ["d.pt"]
        assert {*life.fates(Superseded)} == {"a.pt", "b.pt", "c.pt"}
        assert life.files()["b.pt"] == b"other bytes"


# --- one prefix inside another ------------------------------------------------------------------------


@pytest.mark.fault("D9")
async def test_a_rebuild_takes_nothing_from_a_prefix_inside(tmp_path: Path) -> None:
    """The inner job's checkpoints are neither listed by the outer one, nor restored, nor deleted."""
    memory = MemoryBucket()
    await lived(tmp_path / "inner", memory, *(f"{n}.pt" for n in range(9)), prefix="job/inner")
    await lived(tmp_path / "outer", memory, "a.pt", "z.pt")
    inner = {key: each for key, each in memory.objects.items() if key.startswith("job/inner/")}
    assert len(inner) == 10
    del memory.objects[LATEST]
    async with living(tmp_path / "later", memory, keep_remote=1) as life:
        await life.ready()
        assert life.files() == {"z.pt": b"z.pt"}
        await life.save("new.pt", at=9)
        await life.stop()
    assert listed(memory) == ["2-1 new.pt"]
    assert {key: each for key, each in memory.objects.items() if key.startswith("job/inner/")} == inner


# --- what nobody will resume --------------------------------------------------------------------------


async def strangers(memory: MemoryBucket, *, bare: bool) -> set[str]:
    """Begin uploads that are not ours, at our very key too; there `bare` begins one without any part."""
    begun = [await memory.create_multipart(key, metadata={}) for key in ("job/theirs.pt", "else/big.pt")]
    ours = Upload("job/big.pt", await memory.create_multipart("job/big.pt", metadata={}))
    await memory.put_part(ours, Span(1, 0, 6), BytesSource(b"theirs"))
    begun += [ours.upload_id]
    if bare:
        begun += [await memory.create_multipart("job/big.pt", metadata={})]
    return {*begun}


async def cut(life: Life, moment: str) -> None:
    """Have it killed while it sends a large file: at its create, before or after the announcement."""
    gate = asyncio.Event()

    async def stop_here() -> None:
        gate.set()
        await asyncio.Event().wait()

    if moment == "create":
        life.steps.on("create", after=stop_here)
    elif moment == "announce":
        life.steps.on("put", "latest.json", before=stop_here)
    else:
        life.steps.on("part", before=stop_here, passing=1)
    await life.save("big.pt", LARGE)
    await gate.wait()
    if moment == "parts":
        await life.told.until(lambda: life.fates(Uploading))
        while not manifest_in(life.memory).uploads:
            await asyncio.sleep(0)
    await kill(life)


@pytest.mark.fault("E1")
@pytest.mark.parametrize(
    "then", ["restart", "saved anew, small", "saved anew, large", "rewritten", "deleted"]
)
@pytest.mark.parametrize("moment", ["create", "announce", "parts"])
async def test_of_an_upload_that_was_cut_nothing_is_left_and_no_strangers_is_touched(
    tmp_path: Path, moment: str, then: str
) -> None:
    """Whenever it was killed, and whatever became of the file: resumed, or aborted."""
    memory = MemoryBucket()
    theirs = await strangers(memory, bare=moment != "create")
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        await cut(life, moment)
    assert {*memory.uploads} > theirs
    if then == "saved anew, small":
        save(tmp_path / "a", "big.pt", b"small", at=5)
    elif then == "saved anew, large":
        save(tmp_path / "a", "big.pt", OTHER, at=5)
    elif then == "rewritten":
        (tmp_path / "a/big.pt").write_bytes(OTHER)
    elif then == "deleted":
        (tmp_path / "a/big.pt").unlink()
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        assert (await life.stop()).code == Exit.DURABLE
    assert {*memory.uploads} == theirs
    assert manifest_in(memory).uploads == ()
    wanted = {"saved anew, small": b"small", "saved anew, large": OTHER, "rewritten": OTHER}
    assert memory.body("job/big.pt") == wanted.get(then, LARGE)


@pytest.mark.fault("E1")
@pytest.mark.parametrize("lost", ["pins", ""])
async def test_an_upload_whose_pin_was_removed_is_aborted(tmp_path: Path, lost: str) -> None:
    """Nobody has its bytes any more, whether all of the spool is gone or only what it held."""
    memory = MemoryBucket()
    theirs = await strangers(memory, bare=True)
    async with living(tmp_path / "a", memory) as life:
        await life.ready()
        await cut(life, "parts")
        life.spool.disk.remove_tree(life.spool.home / lost)
        (tmp_path / "a/big.pt").unlink()
    async with living(tmp_path / "a", memory, attempt="another, if it is another spool") as life:
        await life.ready()
        assert (await life.stop()).code == Exit.DURABLE
    assert {*memory.uploads} == theirs
    assert manifest_in(memory).uploads == ()


@pytest.mark.fault("D1", "D3")
@pytest.mark.parametrize("moment", ["announce", "parts"])
async def test_who_was_displaced_leaves_no_upload(tmp_path: Path, moment: str) -> None:
    """Restarted, it holds as fenced, and what it had begun is gone: by the holder, or by itself."""
    memory = MemoryBucket()
    theirs = await strangers(memory, bare=True)
    async with living(tmp_path / "a", memory, attempt="one") as life:
        await life.ready()
        await cut(life, moment)
    await lived(tmp_path / "b", memory, "b.pt", attempt="one")
    async with living(tmp_path / "a", memory, attempt="one") as life:
        life.start()
        await life.told.until(life.not_ready)
        assert (await life.stop()).code == Exit.FENCED
        assert life.pins == ["big.pt"]
    assert {*memory.uploads} == theirs
    assert listed(memory) == ["2-1 b.pt"]
    async with living(tmp_path / "a", memory, attempt="two") as life:  # the job is scheduled anew
        await life.ready()
        assert (await life.stop()).code == Exit.DURABLE
    assert {*memory.uploads} == theirs
    assert listed(memory) == ["2-1 b.pt", "1-1 big.pt"]


async def test_what_retention_skips_leaves_no_upload(rig: Rig) -> None:
    """Its create was not answered, and then nobody wants it any more."""
    rig.bucket.lose("create")
    checkpoint = await rig.cut(rig.pin())
    assert len(rig.memory.uploads) == 1
    await rig.uploader.abandon(checkpoint, Skipped("no more are kept"))
    assert rig.memory.uploads == {}
    assert len(rig.told.of(UploadAborted)) == 1


@pytest.mark.fault("D1")
async def test_who_wakes_fenced_aborts_no_upload_of_the_holder(tmp_path: Path) -> None:
    """It looks for what it may have begun itself, and what it finds at the key is its successor's by now."""
    memory = MemoryBucket()
    async with living(tmp_path / "a", memory) as zombie:
        await zombie.ready()
        zombie.steps.lose("create")
        stalled = zombie.steps.hold("list_uploads")
        await zombie.save("big.pt", OTHER)
        await stalled.reached.wait()
        async with living(tmp_path / "b", memory) as life:
            await life.ready()
            part = life.steps.hold("part")
            await life.save("big.pt", LARGE, at=1)
            await part.reached.wait()  # its upload has no part yet
            before = {*memory.uploads}
            stalled.opened.set()
            await zombie.told.until(lambda: zombie.told.of(Fenced))
            assert {*memory.uploads} == before
            part.opened.set()
            assert (await life.stop()).code == Exit.DURABLE
            assert life.fates(Pinned) == life.fates(Committed) == ["big.pt"]
            assert life.fates(Uploading) == ["big.pt"]
        assert memory.body("job/big.pt") == LARGE
        assert (await zombie.stop()).code == Exit.FENCED
        assert zombie.pins == ["big.pt"]


# --- retention ----------------------------------------------------------------------------------------


@pytest.mark.fault("D10", "D1")
@pytest.mark.parametrize("able", [True, False])
async def test_retention_that_wakes_fenced_deletes_no_save_of_the_holder(
    tmp_path: Path, *, able: bool
) -> None:
    """Stalled between its swap and its delete, while the next holder saves the very name."""
    memory = MemoryBucket(abilities=replace(ABLE, conditional_delete=able))
    async with living(tmp_path / "a", memory, keep_remote=1) as zombie:
        await zombie.ready()
        stalled = zombie.steps.hold("delete", "last.pt")
        for n, name in enumerate(("last.pt", "other.pt")):
            await zombie.save(name, at=n)
            await zombie.told.until(zombie.committed(name))
        await stalled.reached.wait()
        async with living(tmp_path / "b", memory) as life:
            await life.ready()
            await life.save("last.pt", b"of the holder", at=2)
            await life.told.until(life.committed("last.pt"))
            stalled.opened.set()
            await zombie.told.until(lambda: zombie.told.of(Fenced))
            assert memory.body("job/last.pt") == b"of the holder"
            assert (await life.stop()).code == Exit.DURABLE
        assert (await zombie.stop()).code == Exit.FENCED
    assert listed(memory) == ["2-1 last.pt", "1-2 other.pt"]
    assert memory.body("job/last.pt") == b"of the holder"


@pytest.mark.fault("D10")
@pytest.mark.parametrize("moment", ["swap", "delete", "after"])
async def test_retention_that_is_killed_is_finished_by_the_next_life(tmp_path: Path, moment: str) -> None:
    """Before the delete, after it, and before the swap that forgets it; the newest is never in danger."""
    memory = MemoryBucket()
    async with living(tmp_path / "a", memory, keep_remote=2) as life:
        await life.ready()
        for n in range(2):
            await life.save(f"{n}.pt", at=n)
            await life.told.until(life.committed(f"{n}.pt"))
        gate = life.steps.hold("delete", "0.pt")
        if moment != "delete":
            life.steps.relent()
            passing = (
                1 if moment == "swap" else 2
            )  # the commit, the swap of the entry, the swap that forgets it
            gate = life.steps.hold("put", "latest.json", passing=passing)
        await life.save("2.pt", at=2)
        await gate.reached.wait()
        await kill(life)
    assert ("job/0.pt" in memory.objects) == (moment != "after")
    async with living(tmp_path / "a", memory, keep_remote=2) as life:
        await life.ready()
        assert (await life.stop()).code == Exit.DURABLE
    assert listed(memory) == ["1-3 2.pt", "1-2 1.pt"]
    assert sorted(memory.objects) == ["job/1.pt", "job/2.pt", LATEST]
    assert manifest_in(memory).expiring == ()
