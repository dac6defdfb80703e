"""What is stored is the pinned bytes, whole; what is not goes on where it was, or leaves nothing behind."""

import asyncio
import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_sidecar.bucket import (
    MIB,
    Absent,
    BucketError,
    Conflict,
    Corrupt,
    Denied,
    Missing,
    ObjectRef,
    Refused,
    Unreachable,
    Upload,
    crc64,
    encode_crc64,
)
from ckpt_sidecar.checkpoint import Changed, Checkpoint, Id, Pinned, Stored, Superseded, Uploading, state_name
from ckpt_sidecar.events import Failed, Progress, Replacing, UploadAborted
from ckpt_sidecar.manifest import Announced, self_description
from ckpt_sidecar.uploader import Uploader
from tests.engine.support import (
    BORN,
    PREFIX,
    Hurt,
    Steps,
    Told,
    holder,
    ledger_of,
    listed,
    manifest_in,
    opened_spool,
    pin,
    save,
)
from tests.fakes import CARELESS, MemoryBucket

PART = 5 * MIB
LARGE = random.Random(7).randbytes(12 * MIB)  # three parts, the last one shorter
PARTS = [PART, PART, 2 * MIB]


class Rig:
    """An uploader between a spool and a bucket, and what came of it."""

    def __init__(self, root: Path, *, workers: int = 2) -> None:
        self.memory = MemoryBucket()
        self.bucket = Steps(self.memory)
        self.disk = Hurt()
        self.spool = opened_spool(root, generation=1, disk=self.disk)
        self.told = Told()
        self.states: list[str] = []
        self.last: Checkpoint | None = None
        self.workers = workers
        self.ledger = ledger_of(self.bucket, self.told)
        self.uploader = self.anew()

    def anew(self) -> Uploader:
        """Return an uploader as after a restart."""
        return Uploader(
            self.bucket,
            self.spool,
            self.ledger,
            prefix=PREFIX,
            part_bytes=PART,
            workers=self.workers,
            moved=self.moved,
            tell=self.told,
        )

    def moved(self, checkpoint: Checkpoint) -> None:
        """Note a new state."""
        self.last = checkpoint
        self.states.append(state_name(checkpoint.state))

    def pin(self, name: str = "x.pt", content: bytes = LARGE, at: int = 0) -> Checkpoint:
        """Save a file and pin it."""
        return pin(self.spool, save(self.spool.root, name, content, at=at))

    async def upload(self, checkpoint: Checkpoint, seen: ObjectRef | None = None) -> Checkpoint:
        """Send it."""
        async with asyncio.timeout(60):
            return await self.uploader.upload(checkpoint, seen)

    async def cut(self, checkpoint: Checkpoint, error: type[Exception] = Unreachable) -> Checkpoint:
        """Send it until that error comes out; return it as it was told last."""
        with pytest.raises(error):
            await self.upload(checkpoint)
        return self.last or checkpoint

    @property
    def sent(self) -> list[int]:
        """The sizes of the parts that went up, from the last one to be sent."""
        return sorted((each.bytes for each in self.told.of(Progress)), reverse=True)

    async def stands(self, id_: Id | None, content: bytes, name: str = "x.pt") -> ObjectRef:
        """Put an object at the key; of that id, or somebody else's."""
        self.memory.objects.pop(PREFIX + name, None)
        metadata = {} if id_ is None else self_description(id_, BORN, len(content))
        return await self.memory.put(PREFIX + name, content, when=Absent(), metadata=metadata)

    def body(self, name: str = "x.pt") -> bytes:
        """Return what the bucket has."""
        return self.memory.body(PREFIX + name)


@pytest.fixture
def rig(tmp_path: Path, runner: asyncio.Runner) -> Iterator[Rig]:
    """One that has claimed the prefix."""
    rig = Rig(tmp_path)
    runner.run(rig.ledger.claim(holder()))
    yield rig
    rig.spool.close()


def nothing_under_way(rig: Rig) -> bool:
    """Is no multipart upload left, in the bucket or announced?"""
    return not rig.memory.uploads and not manifest_in(rig.memory).uploads


def ref_of(checkpoint: Checkpoint) -> ObjectRef:
    """Return the object that it is stored as."""
    assert isinstance(checkpoint.state, Stored)
    return checkpoint.state.objects[0]


# --- the straight way --------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"weights", LARGE[:PART], b""])
async def test_a_small_file_is_sent_in_one_put(rig: Rig, content: bytes) -> None:
    """Its object has the bytes, describes itself, and needed no multipart upload."""
    stored = await rig.upload(rig.pin(content=content))
    assert rig.body() == content
    assert rig.memory.objects["job/x.pt"].ref.metadata == self_description(Id(1, 1), BORN, len(content))
    assert ref_of(stored).crc64nvme == encode_crc64(crc64(content))
    assert rig.states == ["stored"]
    assert rig.told.of(Progress) == [Progress("x.pt", "up", len(content), len(content), len(content))]


async def test_a_large_file_is_sent_in_parts(rig: Rig) -> None:
    """Its object has the bytes and describes itself; every byte is told once."""
    stored = await rig.upload(rig.pin())
    assert rig.body() == LARGE
    assert rig.memory.objects["job/x.pt"].ref.metadata == self_description(Id(1, 1), BORN, len(LARGE))
    assert ref_of(stored).crc64nvme == encode_crc64(crc64(LARGE))
    assert rig.states == ["uploading", "stored"]
    assert rig.sent == PARTS
    assert [each.done for each in rig.told.of(Progress)][-1] == len(LARGE)


async def test_an_older_object_of_ours_is_replaced(rig: Rig) -> None:
    """What the manifest has at the key gives way, in one put and in parts, in silence."""
    for n, content in enumerate((b"weights", LARGE)):
        seen = await rig.stands(Id(0, 1), b"older")
        await rig.upload(rig.pin(content=content, at=n), seen)
        assert rig.body() == content
    assert rig.told.of(Replacing) == []


# --- going on after an end ---------------------------------------------------------------------------


@pytest.mark.fault("C17")
@pytest.mark.parametrize("careless", [False, True])
async def test_a_resumed_upload_sends_only_what_is_missing(rig: Rig, *, careless: bool) -> None:
    """Parts that the bucket has are not sent again, whether it keeps their checksums or not."""
    if careless:
        rig.memory.abilities = CARELESS
    rig.workers = 1
    rig.uploader = rig.anew()
    rig.bucket.fail("part", Unreachable("reset"), passing=2)
    begun = await rig.cut(rig.pin())
    assert isinstance(begun.state, Uploading)
    assert rig.sent == [PART, PART]
    rig.spool.close()
    rig.spool = opened_spool(rig.spool.root)
    (found,) = rig.spool.recover().checkpoints
    assert found == begun
    rig.told.clear()
    rig.uploader = rig.anew()
    await rig.upload(found)
    assert rig.body() == LARGE
    assert rig.told.of(Progress) == [Progress("x.pt", "up", 2 * MIB, len(LARGE), len(LARGE))]
    assert rig.memory.uploads == {}


@pytest.mark.fault("C17")
async def test_parts_that_disagree_are_sent_again(rig: Rig) -> None:
    """A part with other bytes or of another size is not believed; nor is one that is too many."""
    rig.bucket.fail("complete", Unreachable("reset"))
    begun = await rig.cut(rig.pin())
    (under_way,) = rig.memory.uploads.values()
    part, _ = under_way.parts[1]
    under_way.parts[1] = (part.__class__(1, PART, "other", encode_crc64(1)), b"?" * PART)
    part, _ = under_way.parts[2]
    under_way.parts[2] = (part.__class__(2, 3, part.etag, part.crc64nvme), b"abc")
    under_way.parts[9] = (part.__class__(9, 3, "more", encode_crc64(2)), b"abc")
    rig.told.clear()
    await rig.upload(begun)
    assert rig.body() == LARGE
    assert rig.sent == [PART, PART]


@pytest.mark.fault("C5")
async def test_an_upload_that_was_completed_is_not_sent_again(rig: Rig) -> None:
    """The answer to complete was lost, and then the look: the next time it is found stored."""
    rig.bucket.lose("complete")
    rig.bucket.fail("head", Unreachable("no route"))
    begun = await rig.cut(rig.pin())
    rig.told.clear()
    rig.bucket.fail("part", Unreachable("500", reason="server"), times=10**9)  # as moto answers, for ever
    stored = await rig.upload(begun)
    assert ref_of(stored) == rig.memory.objects["job/x.pt"].ref
    assert rig.told.of(Progress) == []


# --- lost answers ------------------------------------------------------------------------------------


@pytest.mark.fault("C5")
async def test_a_put_whose_answer_is_lost_is_found_stored(rig: Rig) -> None:
    """It is looked at, and not sent twice."""
    rig.bucket.lose("put", "x.pt")
    stored = await rig.upload(rig.pin(content=b"weights"))
    assert ref_of(stored) == rig.memory.objects["job/x.pt"].ref


async def test_a_put_that_never_arrived_comes_out(rig: Rig) -> None:
    """The caller rests, and the checkpoint is as it was."""
    rig.bucket.fail("put", Unreachable("reset"), "x.pt")
    checkpoint = rig.pin(content=b"weights")
    assert await rig.cut(checkpoint) == checkpoint
    assert rig.states == []
    await rig.upload(checkpoint)
    assert rig.body() == b"weights"


@pytest.mark.fault("C5")
async def test_a_complete_whose_answer_is_lost_is_found_stored(rig: Rig) -> None:
    """The object at the key has our id and our bytes."""
    rig.bucket.lose("complete")
    stored = await rig.upload(rig.pin())
    assert ref_of(stored).crc64nvme == encode_crc64(crc64(LARGE))
    assert rig.states == ["uploading", "stored"]


@pytest.mark.fault("C18")
async def test_what_is_found_stored_has_our_bytes(rig: Rig) -> None:
    """An object with our id and other bytes is no success: it is replaced."""
    checkpoint = rig.pin(content=b"weights")
    await rig.stands(checkpoint.id, b"WEIGHTS")
    await rig.upload(checkpoint)
    assert rig.body() == b"weights"


@pytest.mark.fault("C19")
async def test_a_store_without_checksums_is_believed_what_it_has(rig: Rig) -> None:
    """Where the store keeps no checksum the id and the size must do; the checksum is that of the pin."""
    rig.memory.abilities = CARELESS
    rig.bucket.lose("put", "x.pt")
    stored = await rig.upload(rig.pin(content=b"weights"))
    assert ref_of(stored).crc64nvme == encode_crc64(crc64(b"weights"))


@pytest.mark.fault("C5")
async def test_a_create_whose_answer_is_lost_leaves_no_upload(rig: Rig) -> None:
    """The next try looks for what it may have left at this very key, and aborts it; others' stay."""
    neighbour = await rig.memory.create_multipart("job/x.pt.other", metadata={})
    rig.bucket.lose("create")
    checkpoint = rig.pin()
    assert await rig.cut(checkpoint) == checkpoint
    assert len(rig.memory.uploads) == 2
    await rig.upload(checkpoint)
    assert list(rig.memory.uploads) == [neighbour]
    assert [each.name for each in rig.told.of(UploadAborted)] == ["x.pt"]


async def test_an_upload_that_nobody_wrote_down_is_aborted_after_a_restart(rig: Rig) -> None:
    """Killed between create and journal: the recovery doubts the key, and its orphan goes."""
    orphan = await rig.memory.create_multipart("job/x.pt", metadata={})
    await rig.ledger.announce(Announced(Id(1, 1), "x.pt", "job/x.pt", orphan, 1, BORN, "spool-a"))
    rig.uploader.doubt("x.pt")
    await rig.upload(rig.pin())
    assert rig.memory.uploads == {}
    assert [each.upload_id for each in rig.told.of(UploadAborted)] == [orphan]
    assert orphan not in [each.upload_id for each in manifest_in(rig.memory).uploads]


@pytest.mark.fault("C12")
async def test_who_may_not_list_uploads_still_uploads(rig: Rig) -> None:
    """A missing permission is named; the orphan, if there is one, is left to the bucket's lifecycle rule."""
    rig.uploader.doubt("x.pt")
    rig.bucket.fail("list_uploads", Denied("not allowed", hint="allow s3:ListBucketMultipartUploads"))
    await rig.upload(rig.pin())
    assert rig.body() == LARGE
    assert rig.told.of(Failed) == [
        Failed("upload", "denied", "x.pt", "not allowed", "allow s3:ListBucketMultipartUploads")
    ]


@pytest.mark.fault("C11", "C14")
@pytest.mark.parametrize(
    "error",
    [Denied("expired", reason="credentials"), Refused("moved", reason="region")],
    ids=["keys", "region"],
)
async def test_what_is_wrong_with_every_request_is_no_reason_to_leave_an_orphan(
    rig: Rig, error: BucketError
) -> None:
    """No request would be answered: the doubt stays until one is."""
    orphan = await rig.memory.create_multipart("job/x.pt", metadata={})
    checkpoint = rig.pin()
    rig.uploader.doubt("x.pt")
    rig.bucket.fail("list_uploads", error)
    with pytest.raises(type(error)):
        await rig.upload(checkpoint)
    await rig.upload(checkpoint)
    assert rig.memory.uploads == {}
    assert [each.upload_id for each in rig.told.of(UploadAborted)] == [orphan]


@pytest.mark.fault("E4")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOENT])
async def test_a_disk_that_takes_no_journal_holds_up_no_upload(rig: Rig, code: int) -> None:
    """The disk is full, or the spool gone: what is open is sent, and a restart would abort and begin anew."""
    checkpoint = rig.pin()
    rig.disk.refuse["write_file 1-1.json"] = OSError(code, "no")
    rig.bucket.fail("part", Unreachable("reset"))
    begun = await rig.cut(checkpoint)
    assert isinstance(begun.state, Uploading)
    (found,) = rig.spool.recover().checkpoints
    assert isinstance(found.state, Pinned)
    rig.uploader.doubt(found.name)
    await rig.upload(found)
    assert rig.body() == LARGE
    assert rig.memory.uploads == {}
    assert {each.reason for each in rig.told.of(Failed)} == {"disk"}


# --- what stands at the key --------------------------------------------------------------------------


@pytest.mark.fault("C18")
@pytest.mark.parametrize("content", [b"weights", LARGE])
async def test_a_smaller_id_at_the_key_is_replaced(rig: Rig, content: bytes) -> None:
    """An older save that was completed but not committed gives way."""
    await rig.stands(Id(0, 9), b"older")
    await rig.upload(rig.pin(content=content))
    assert rig.body() == content
    assert rig.told.of(Replacing) == []


@pytest.mark.fault("C18")
@pytest.mark.parametrize("content", [b"weights", LARGE])
async def test_a_greater_id_at_the_key_is_never_replaced(rig: Rig, content: bytes) -> None:
    """A newer save of the name stands there: this one is superseded, and its upload aborted."""
    await rig.stands(Id(1, 9), b"newer")
    ended = await rig.upload(rig.pin(content=content))
    assert ended.state == Superseded(Id(1, 9))
    assert rig.body() == b"newer"
    assert nothing_under_way(rig)
    assert listed(rig.memory) == ["1-9 x.pt"]  # it is not left to one who was fenced before the commit


@pytest.mark.fault("C18")
@pytest.mark.parametrize("content", [b"weights", LARGE])
async def test_a_strangers_object_is_replaced_and_said(rig: Rig, content: bytes) -> None:
    """The prefix is this job's: what somebody put there gives way, with a warning."""
    await rig.stands(None, b"stranger's")
    await rig.upload(rig.pin(content=content))
    assert rig.body() == content
    assert rig.told.of(Replacing) == [Replacing("x.pt", "job/x.pt")]


@pytest.mark.parametrize("content", [b"weights", LARGE])
async def test_what_the_manifest_has_may_be_gone(rig: Rig, content: bytes) -> None:
    """Somebody deleted the object that we saw last: the key is looked at, and written."""
    seen = await rig.stands(Id(0, 9), b"older")
    del rig.memory.objects["job/x.pt"]
    await rig.upload(rig.pin(content=content), seen)
    assert rig.body() == content


@pytest.mark.fault("C8")
@pytest.mark.parametrize("verb", ["put", "complete"])
async def test_a_key_that_changes_again_and_again_is_left(rig: Rig, verb: str) -> None:
    """Who is beaten five times in a row lets others go first: the conflict comes out."""
    rig.bucket.fail(verb, Conflict("beaten"), "x.pt", times=99)
    checkpoint = rig.pin(content=b"weights" if verb == "put" else LARGE)
    with pytest.raises(Conflict):
        await rig.upload(checkpoint)
    assert "job/x.pt" not in rig.memory.objects


# --- uploads that are gone, parts that are not as they should be --------------------------------------


@pytest.mark.fault("C7")
@pytest.mark.parametrize("passing", [0, 1, 2])
async def test_an_upload_that_vanishes_is_begun_anew(rig: Rig, passing: int) -> None:
    """Somebody aborted it in the middle: another one is begun, and nothing of the first stays."""

    async def abort() -> None:
        (upload_id,) = rig.memory.uploads
        await rig.memory.abort_multipart(Upload("job/x.pt", upload_id))

    rig.bucket.on("part", before=abort, passing=passing)
    await rig.upload(rig.pin())
    assert rig.body() == LARGE
    assert rig.states == ["uploading", "pinned", "uploading", "stored"]
    assert rig.memory.uploads == {}
    (upload,) = manifest_in(rig.memory).uploads
    assert upload.id == Id(1, 1)  # the commit takes it out


async def test_an_upload_that_vanishes_on_a_store_that_does_not_say_so_is_begun_anew(rig: Rig) -> None:
    """Its parts are answered with 500: the next time they are asked for, and it is found to be gone."""

    async def abort() -> None:
        (upload_id,) = rig.memory.uploads
        await rig.memory.abort_multipart(Upload("job/x.pt", upload_id))
        raise Unreachable("500", reason="server")

    rig.bucket.on("part", before=abort, passing=1)
    begun = await rig.cut(rig.pin())
    await rig.upload(begun)
    assert rig.body() == LARGE
    assert rig.memory.uploads == {}


@pytest.mark.fault("C7")
async def test_an_upload_that_vanished_meanwhile_is_begun_anew(rig: Rig) -> None:
    """The lifecycle rule threw it away while we were gone."""
    rig.bucket.fail("part", Unreachable("reset"))
    begun = await rig.cut(rig.pin())
    rig.memory.uploads.clear()
    await rig.upload(begun)
    assert rig.body() == LARGE


@pytest.mark.fault("C10")
async def test_parts_that_the_store_refuses_are_sent_anew_once(rig: Rig) -> None:
    """What looks like a bug of ours is begun anew, and reported when it comes again, not fought."""
    rig.bucket.fail("complete", Refused("InvalidPart"))
    await rig.upload(rig.pin())
    assert rig.body() == LARGE
    rig.told.clear()
    rig.bucket.fail("complete", Refused("InvalidPart"), times=99)
    begun = await rig.cut(rig.pin("y.pt"), Refused)
    assert rig.sent == sorted(PARTS * 2, reverse=True)
    await rig.cut(begun, Refused)
    assert rig.sent == sorted(PARTS * 2, reverse=True)


@pytest.mark.fault("C9")
async def test_bytes_damaged_on_their_way_are_sent_anew(rig: Rig) -> None:
    """The store saw other bytes than we sent: not stored, and said again."""
    rig.bucket.fail("complete", Corrupt("another checksum"))
    await rig.upload(rig.pin())
    assert rig.body() == LARGE
    rig.bucket.fail("put", Corrupt("BadDigest"), "small.pt")
    small = rig.pin("small.pt", b"weights")
    await rig.cut(small, Corrupt)
    await rig.upload(small)
    assert rig.body("small.pt") == b"weights"


@pytest.mark.fault("C9")
async def test_a_part_that_is_always_damaged_is_an_error_that_names_it(rig: Rig) -> None:
    """It is no endless loop, completes nothing, and leaves no upload behind."""
    rig.bucket.fail("part", Corrupt("upload_part job/x.pt, part 2: BadDigest"), passing=1, times=10**9)
    with pytest.raises(Corrupt, match="part 2: BadDigest"):
        await rig.upload(rig.pin())
    assert "job/x.pt" not in rig.memory.objects
    assert rig.memory.uploads == {}


async def test_a_bucket_that_vanishes_comes_out(rig: Rig) -> None:
    """No such bucket is not taken for no such upload for ever."""
    rig.bucket.fail("create", Missing("no such bucket", reason="bucket"), times=99)
    with pytest.raises(Missing):
        await rig.upload(rig.pin())


# --- bytes that change -------------------------------------------------------------------------------


@pytest.mark.fault("A7")
@pytest.mark.parametrize("when", ["create", "part", "complete"])
async def test_bytes_that_change_under_the_upload_are_never_completed(rig: Rig, when: str) -> None:
    """A file rewritten in place is abandoned: no object, no upload, no announcement is left of it."""
    checkpoint = rig.pin()

    async def rewrite() -> None:
        with (rig.spool.root / "x.pt").open("r+b") as file:
            file.write(b"other")

    if when == "complete":  # it lands between the last part and the complete
        rig.bucket.on("part", after=rewrite, passing=2)
    else:
        rig.bucket.on(when, before=rewrite)
    ended = await rig.upload(checkpoint)
    assert isinstance(ended.state, Changed)
    assert "job/x.pt" not in rig.memory.objects
    assert nothing_under_way(rig)


async def test_bytes_that_changed_before_the_upload_are_not_sent(rig: Rig) -> None:
    """Nothing is begun for a file that was rewritten while it waited."""
    for name, content in (("small.pt", b"weights"), ("large.pt", LARGE)):
        checkpoint = rig.pin(name, content)
        (rig.spool.root / name).write_bytes(b"other")
        assert isinstance((await rig.upload(checkpoint)).state, Changed)
    assert list(rig.memory.objects) == ["job/latest.json"]
    assert rig.told.of(Progress) == []
    assert rig.memory.uploads == {}


async def test_a_conflict_does_not_hide_that_the_bytes_changed(rig: Rig) -> None:
    """After a conflict they are looked at again before the next complete."""
    checkpoint = rig.pin()

    async def rewrite() -> None:
        (rig.spool.root / "x.pt").write_bytes(b"other")
        raise Conflict("beaten")

    rig.bucket.on("complete", before=rewrite)
    assert isinstance((await rig.upload(checkpoint)).state, Changed)
    assert "job/x.pt" not in rig.memory.objects
    assert nothing_under_way(rig)


async def test_an_abort_that_is_not_answered_ends_nothing(rig: Rig) -> None:
    """The checkpoint stays as it was until the store has said that no complete can follow."""
    rig.bucket.fail("part", Unreachable("reset"))
    begun = await rig.cut(rig.pin())
    rig.bucket.fail("abort", Unreachable("no route"))
    with pytest.raises(Unreachable):
        await rig.uploader.abandon(begun, Superseded(Id(1, 2)))
    assert rig.states == ["uploading"]
    assert len(rig.memory.uploads) == 1
    ended = await rig.uploader.abandon(begun, Superseded(Id(1, 2)))
    assert isinstance(ended.state, Superseded)
    assert nothing_under_way(rig)


async def test_what_had_not_begun_is_abandoned_without_the_bucket(rig: Rig) -> None:
    """A pin that is superseded costs no request."""
    checkpoint = rig.pin()
    rig.bucket.fail("put", Unreachable("no route"), times=99)
    rig.bucket.fail("abort", Unreachable("no route"), times=99)
    assert (await rig.uploader.abandon(checkpoint, Superseded(Id(1, 2)))).state == Superseded(Id(1, 2))


# --- announce before complete ------------------------------------------------------------------------


async def test_nothing_is_completed_before_its_announcement_is_answered(rig: Rig) -> None:
    """All parts are there, and the object is not: latest.json must know the upload first."""
    gate = rig.bucket.hold("put", "latest.json")
    uploading = asyncio.ensure_future(rig.upload(rig.pin()))
    await gate.reached.wait()
    while sum(each.bytes for each in rig.told.of(Progress)) < len(LARGE):
        await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert "job/x.pt" not in rig.memory.objects
    gate.opened.set()
    await uploading
    assert rig.body() == LARGE
    (announced,) = manifest_in(rig.memory).uploads
    assert (announced.id, announced.key, announced.spool) == (Id(1, 1), "job/x.pt", "spool-a")


async def test_an_announcement_that_fails_completes_nothing(rig: Rig) -> None:
    """The error comes out, and the upload goes on from there the next time."""
    rig.bucket.fail("put", Denied("not allowed"), "latest.json")
    begun = await rig.cut(rig.pin(), Denied)
    assert "job/x.pt" not in rig.memory.objects
    await rig.upload(begun)
    assert rig.body() == LARGE


async def test_who_is_fenced_completes_nothing(rig: Rig) -> None:
    """Another has claimed: its announcement is refused, and so no object appears."""
    other = ledger_of(rig.memory, Told())
    await other.claim(holder("spool-b"))
    checkpoint = rig.pin()
    with pytest.raises(Exception, match="is held by node-a"):
        await rig.upload(checkpoint)
    assert "job/x.pt" not in rig.memory.objects


@pytest.mark.parametrize("content", [b"weights", LARGE])
async def test_who_meets_a_save_of_the_next_holder_is_fenced(rig: Rig, content: bytes) -> None:
    """The zombie saves a name that its successor has saved: it does not just pass that over."""
    other = ledger_of(rig.memory, Told())
    await other.claim(holder("spool-b"))
    await rig.stands(Id(2, 1), b"newer")
    checkpoint = rig.pin(content=content)
    with pytest.raises(Exception, match="is held by node-a"):
        await rig.upload(checkpoint)
    assert rig.body() == b"newer"
    assert rig.states in ([], ["uploading"])  # nothing has ended: its pin stays
