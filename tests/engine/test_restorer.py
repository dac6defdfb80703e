"""A trainer that starts after a restore finds the newest good checkpoint, and nothing of its own is lost."""

import asyncio
import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt_sidecar.bucket import Absent, Denied, Missing, Refused, Unchanged, Unreachable
from ckpt_sidecar.checkpoint import Checkpoint, File, Id
from ckpt_sidecar.events import Event, FellBack, Progress, Restored
from ckpt_sidecar.formats import flaw_of
from ckpt_sidecar.landing import Landing, NoRoom
from ckpt_sidecar.ledger import Ledger
from ckpt_sidecar.manifest import Entry, self_description
from ckpt_sidecar.restorer import NothingRestored, Outcome, Restorer
from tests.engine.support import BORN, PREFIX, SECOND, Hurt, Steps, Told, holder, ledger_of, save
from tests.fakes import MemoryBucket

PART = 4  # bytes: so that small contents come in several parts


class Remembered(dict[File, Id]):
    """Which files of the watch dir are durable."""

    def restored(self, file: File, id_: Id) -> None:
        """Know it."""
        self[file] = id_

    def forget(self, file: File) -> None:
        """Know it no more."""
        del self[file]


class Rig:
    """A bucket with checkpoints in it, a watch dir, and what came of a restore."""

    def __init__(self, root: Path, *, versioned: bool = False) -> None:
        root.mkdir()
        self.root = root
        self.memory = MemoryBucket(versioned=versioned)
        self.bucket = Steps(self.memory)
        self.disk = Hurt()
        self.told = Told()
        self.known = Remembered()
        self.ledger: Ledger = ledger_of(self.memory, Told())
        self.landing = Landing(root, self.disk)

    async def object(self, sequence: int, name: str, content: bytes) -> Entry:
        """Put the object of a checkpoint at its key, whatever stands there."""
        id_, key, saved_at = Id(1, sequence), PREFIX + name, BORN + sequence * SECOND
        there = await self.memory.head(key)
        when = Absent() if there is None else Unchanged(there.etag)
        metadata = self_description(id_, saved_at, len(content))
        ref = await self.memory.put(key, content, when=when, metadata=metadata)
        return Entry(id_, name, (ref,), saved_at, BORN)

    async def commit(self, sequence: int, name: str = "", content: bytes = b"") -> Entry:
        """Put a checkpoint into the bucket and the manifest."""
        if not self.ledger.generation:
            await self.ledger.claim(holder())
        entry = await self.object(sequence, name or f"{sequence}.pt", content or b"weights of %d" % sequence)
        await self.ledger.commit(entry)
        return entry

    async def restore(
        self, *waiting: Checkpoint, tell: Callable[[Event], None] | None = None, workers: int = 2
    ) -> Outcome:
        """Restore."""
        async with asyncio.timeout(60):
            return await self.restorer(tell, workers=workers).restore(self.ledger.manifest, waiting)

    def restorer(self, tell: Callable[[Event], None] | None = None, *, workers: int = 2) -> Restorer:
        """Who restores from this bucket into this watch dir."""
        return Restorer(
            self.bucket,
            self.landing,
            known=self.known,
            workers=workers,
            part_bytes=PART,
            flaw_of=flaw_of,
            seconds=lambda: 0.0,
            tell=tell or self.told,
        )

    def files(self) -> dict[str, bytes]:
        """What stands in the watch dir, for everybody to see."""
        paths = [path for path in self.root.rglob("*") if path.is_file() or path.is_symlink()]
        names = {path.relative_to(self.root).as_posix(): path for path in paths}
        return {
            name: path.read_bytes() for name, path in names.items() if not name.startswith(".ckpt-sidecar")
        }

    def hidden(self, folder: str) -> list[bytes]:
        """What lies in one of the spool's directories."""
        paths = (self.root / ".ckpt-sidecar" / folder).rglob("*")
        return sorted(path.read_bytes() for path in paths if path.is_file())

    @property
    def outcome(self) -> tuple[str, str | None, int]:
        """The word, the name and the bytes that were told at the end."""
        (restored,) = self.told.of(Restored)
        return restored.outcome, restored.name, restored.bytes

    @property
    def fell_back(self) -> list[str]:
        """What was passed over, and why."""
        return [f"{each.id} {each.error}" for each in self.told.of(FellBack)]

    def damage(self, name: str) -> None:
        """Turn bits in the object without the store's noticing."""
        key = PREFIX + name
        kept = self.memory.objects[key]
        self.memory.objects[key] = type(kept)(kept.ref, kept.body[:-1] + b"?")


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """An empty bucket and an empty watch dir."""
    return Rig(tmp_path / "watch")


def waiting(sequence: int, file: File) -> Checkpoint:
    """Return a checkpoint that this spool holds and has not yet made durable."""
    return Checkpoint(Id(1, sequence), file.name, (file,), file.mtime_ns)


# --- the straight way --------------------------------------------------------------------------------


async def test_the_newest_is_restored_byte_for_byte(rig: Rig) -> None:
    """It has the bytes and the time of the trainer's file, and is known from now on."""
    await rig.commit(1)
    newest = await rig.commit(2, "deep/er/x.pt", b"0123456789")
    outcome = await rig.restore()
    assert outcome == Outcome("restored", newest, None, rig.root / "deep/er/x.pt")
    assert rig.files() == {"deep/er/x.pt": b"0123456789"}
    status = (rig.root / "deep/er/x.pt").stat()
    assert (status.st_mtime_ns, status.st_nlink) == (newest.saved_at, 1)
    assert rig.known == {File("deep/er/x.pt", 10, newest.saved_at): Id(1, 2)}
    assert rig.outcome == ("restored", "deep/er/x.pt", 10)
    assert sorted(each.bytes for each in rig.told.of(Progress)) == [2, 4, 4]
    assert rig.hidden("incoming") == []


async def test_an_empty_bucket_is_a_fresh_run(rig: Rig) -> None:
    """Nothing to restore is no failure."""
    assert await rig.restore() == Outcome("empty")
    assert rig.outcome == ("empty", None, 0)


# --- what is not good is passed over -----------------------------------------------------------------


@pytest.mark.fault("F1")
async def test_a_corrupt_object_is_passed_over(rig: Rig) -> None:
    """Bytes that do not agree with the checksum never get a name; the next checkpoint is taken."""
    await rig.commit(1)
    await rig.commit(2)
    rig.damage("2.pt")
    assert (await rig.restore()).word == "restored"
    assert rig.files() == {"1.pt": b"weights of 1"}
    assert "1-2 the bytes of job/2.pt do not agree with their checksum" in rig.fell_back[0]


@pytest.mark.fault("F1")
async def test_bytes_that_are_damaged_on_their_way_are_fetched_again(rig: Rig) -> None:
    """The object is good: nobody goes back to an older one for a bit that fell over in a switch."""
    await rig.commit(1)
    await rig.commit(2)
    good = rig.memory.objects["job/2.pt"]

    async def mended() -> None:
        rig.memory.objects["job/2.pt"] = good

    rig.damage("2.pt")
    rig.bucket.on("get_range", "2.pt", after=mended, passing=2)  # the last of three parts
    assert (await rig.restore()).word == "restored"
    assert rig.files() == {"2.pt": b"weights of 2"}
    assert rig.fell_back == []


@pytest.mark.parametrize(("parts", "requests"), [(3, 3), (8, 8), (16, 8), (64, 16)])
async def test_a_large_object_takes_few_requests_and_every_worker_several(
    rig: Rig, parts: int, requests: int
) -> None:
    """Each asks for up to four parts, as long as four are left for each of the two workers."""
    content = (b"weights " * parts)[: parts * PART]
    await rig.commit(1, content=content)
    await rig.restore()
    assert rig.files() == {"1.pt": content}
    assert len(rig.told.of(Progress)) == requests


async def test_what_does_not_come_through_at_once_is_fetched_part_by_part(rig: Rig) -> None:
    """A proxy that ends each answer after a while lets nothing through that is larger."""
    content = (b"weights " * 64)[: 64 * PART]
    await rig.commit(1, content=content)
    rig.bucket.fail("get_range", Unreachable("cut off"), passing=3)
    await rig.restore()
    assert rig.files() == {"1.pt": content}


@pytest.mark.fault("F1")
async def test_a_missing_object_is_passed_over(rig: Rig) -> None:
    """Somebody deleted it: the next checkpoint is taken."""
    await rig.commit(1)
    await rig.commit(2)
    del rig.memory.objects["job/2.pt"]
    await rig.restore()
    assert rig.files() == {"1.pt": b"weights of 1"}
    assert rig.fell_back == ["1-2 the object job/2.pt is gone"]


@pytest.mark.fault("F1")
async def test_a_strangers_object_is_passed_over(rig: Rig) -> None:
    """Somebody put something else at the key: it is not taken for the checkpoint."""
    await rig.commit(1)
    await rig.commit(2)
    del rig.memory.objects["job/2.pt"]
    await rig.memory.put("job/2.pt", b"weights of 2?", when=Absent(), metadata={})
    await rig.restore()
    assert rig.files() == {"1.pt": b"weights of 1"}
    assert rig.fell_back == ["1-2 the object job/2.pt was replaced by one that is not ours"]


async def test_an_older_object_at_the_key_is_passed_over(rig: Rig) -> None:
    """Somebody put an older save of ours back: it is not what the manifest names."""
    await rig.commit(1)
    await rig.commit(3, "last.pt", b"newest")
    await rig.object(2, "last.pt", b"older")
    await rig.restore()
    assert rig.files() == {"1.pt": b"weights of 1"}


async def test_what_is_no_whole_checkpoint_is_passed_over(rig: Rig) -> None:
    """The checksum agrees, but the file never was whole: a trainer could not load it."""
    await rig.commit(1)
    await rig.commit(2, content=b"PK\x03\x04 and then nothing")
    await rig.restore()
    assert rig.files() == {"1.pt": b"weights of 1"}
    assert "no whole checkpoint" in rig.fell_back[0]


@pytest.mark.fault("F1")
async def test_an_archived_object_is_passed_over(rig: Rig) -> None:
    """What the store will not hand out, however often it is asked, is said and passed over."""
    await rig.commit(1)
    await rig.commit(2)
    rig.bucket.fail("get_range", Refused("it is archived"), "2.pt", times=9)
    await rig.restore()
    assert rig.files() == {"1.pt": b"weights of 1"}


@pytest.mark.fault("F1")
async def test_when_none_is_good_it_is_said(rig: Rig) -> None:
    """A bucket that has checkpoints and gives none is no fresh run."""
    await rig.commit(1)
    await rig.commit(2)
    rig.damage("1.pt")
    rig.damage("2.pt")
    with pytest.raises(NothingRestored, match="none of the 2 checkpoints"):
        await rig.restore()
    assert rig.files() == {}
    assert rig.outcome == ("failed", "2.pt", 0)
    assert len(rig.fell_back) == 2
    assert rig.hidden("incoming") == []


@pytest.mark.fault("F3", "F7")
@pytest.mark.parametrize("verb", ["head", "get_range"])
@pytest.mark.parametrize(
    "error",
    [
        Unreachable("no route"),
        Denied("expired", reason="credentials"),
        Missing("there is no bucket", reason="bucket"),
        Refused("it is elsewhere", reason="region"),
    ],
)
async def test_trouble_that_says_nothing_about_the_object_comes_out(
    rig: Rig, verb: str, error: Exception
) -> None:
    """A bucket that does not answer is never taken for one whose newest checkpoint is lost."""
    await rig.commit(1)
    await rig.commit(2)
    rig.bucket.fail(verb, error, times=99)
    with pytest.raises(type(error)):
        await rig.restore()
    assert (rig.files(), rig.fell_back, rig.told.of(Restored)) == ({}, [], [])
    assert rig.hidden("incoming") == []
    rig.bucket.relent()
    await rig.restore()
    assert rig.files() == {"2.pt": b"weights of 2"}


# --- the object is another one -----------------------------------------------------------------------


async def test_a_newer_object_at_the_key_is_adopted(rig: Rig) -> None:
    """It was completed and not committed: it is restored, and handed over to be committed."""
    await rig.commit(1, "last.pt", b"committed")
    newer = await rig.object(2, "last.pt", b"newer")
    outcome = await rig.restore()
    assert outcome.adopted == outcome.entry == newer
    assert rig.files() == {"last.pt": b"newer"}
    assert (rig.root / "last.pt").stat().st_mtime_ns == newer.saved_at
    assert rig.outcome == ("restored", "last.pt", 5)


async def test_a_newer_object_that_is_corrupt_is_not_adopted(rig: Rig) -> None:
    """An object that does not verify is passed over, whoever it says that it is."""
    await rig.commit(1)
    await rig.commit(2, "last.pt", b"committed")
    await rig.object(3, "last.pt", b"newer")
    rig.damage("last.pt")
    assert (await rig.restore()).adopted is None
    assert rig.files() == {"1.pt": b"weights of 1"}


async def test_a_copied_object_is_the_same_checkpoint(rig: Rig) -> None:
    """Copied into this bucket with its metadata it has another etag; its checksum tells that it is it."""
    entry = await rig.commit(1, "x.pt", b"weights")
    ref = rig.memory.objects["job/x.pt"]
    rig.memory.objects["job/x.pt"] = type(ref)(replace(ref.ref, etag="copied-1"), ref.body)
    outcome = await rig.restore()
    assert rig.files() == {"x.pt": b"weights"}
    assert outcome.adopted is None
    assert outcome.entry is not None
    assert outcome.entry.id == entry.id


@pytest.mark.fault("F2")
async def test_an_object_that_is_replaced_under_the_download_is_looked_at_anew(rig: Rig) -> None:
    """Two versions never mix: the download ends, and begins with what is there now."""
    await rig.commit(1, "last.pt", b"committed bytes")

    async def overwrite() -> None:
        await rig.object(2, "last.pt", b"newer bytes here")

    rig.bucket.on("get_range", before=overwrite, passing=1)
    outcome = await rig.restore()
    assert rig.files() == {"last.pt": b"newer bytes here"}
    assert outcome.adopted is not None
    assert outcome.adopted.id == Id(1, 2)
    assert rig.hidden("incoming") == []


@pytest.mark.fault("F2")
async def test_an_object_that_never_stands_still_is_passed_over(rig: Rig) -> None:
    """Replaced under three downloads in a row: the next one is taken."""
    await rig.commit(1)
    await rig.commit(2, "last.pt", b"committed bytes")
    rounds = []

    async def overwrite() -> None:
        rounds.append(1)
        await rig.object(2 + len(rounds), "last.pt", b"newer bytes %d" % len(rounds))

    rig.bucket.on("get_range", "last.pt", before=overwrite, times=99)
    await rig.restore(workers=1)
    assert rig.files() == {"1.pt": b"weights of 1"}
    assert len(rounds) == 3


@pytest.mark.fault("F2")
async def test_an_object_that_is_deleted_under_the_download_is_passed_over(rig: Rig) -> None:
    """Half a checkpoint is none."""
    await rig.commit(1)
    await rig.commit(2)
    rig.bucket.fail("get_range", Missing("gone"), "2.pt", passing=1)
    await rig.restore()
    assert rig.files() == {"1.pt": b"weights of 1"}
    assert rig.hidden("incoming") == []


@pytest.mark.fault("F2")
async def test_the_version_that_was_committed_is_restored(tmp_path: Path) -> None:
    """In a versioned bucket a stranger's object on top, or a delete, does not hide our version."""
    rig = Rig(tmp_path / "watch", versioned=True)
    await rig.commit(1, "x.pt", b"weights")
    del rig.memory.objects["job/x.pt"]
    await rig.memory.put("job/x.pt", b"stranger's", when=Absent(), metadata={})
    await rig.restore()
    assert rig.files() == {"x.pt": b"weights"}
    (rig.root / "x.pt").unlink()
    del rig.memory.objects["job/x.pt"]
    await rig.restore()
    assert rig.files() == {"x.pt": b"weights"}


# --- what the watch dir has --------------------------------------------------------------------------


@pytest.mark.fault("F5")
async def test_what_is_there_already_is_kept(rig: Rig) -> None:
    """The very checkpoint, byte for byte: nothing is downloaded, and it is known."""
    entry = await rig.commit(1, "x.pt", b"weights")
    file = save(rig.root, "x.pt", b"weights", at=1)
    assert await rig.restore() == Outcome("kept", entry, path=rig.root / "x.pt")
    assert rig.told.of(Progress) == []
    assert rig.known == {file: Id(1, 1)}
    assert rig.outcome == ("kept", "x.pt", 0)


@pytest.mark.fault("F5")
async def test_size_and_time_alone_prove_nothing(rig: Rig) -> None:
    """A file that only looks like the checkpoint is set aside, and the real one restored."""
    await rig.commit(1, "x.pt", b"weights")
    save(rig.root, "x.pt", b"WEIGHTS", at=1)
    assert (await rig.restore()).word == "restored"
    assert rig.files() == {"x.pt": b"weights"}
    assert rig.hidden("aside") == [b"WEIGHTS"]


@pytest.mark.fault("F5")
async def test_a_torn_file_is_set_aside_and_not_deleted(rig: Rig) -> None:
    """What a crash left under the checkpoint's name is kept for a person to look at."""
    await rig.commit(1, "x.pt", b"weights")
    save(rig.root, "x.pt", b"wei", at=9)
    await rig.restore()
    assert rig.files() == {"x.pt": b"weights"}
    assert rig.hidden("aside") == [b"wei"]


@pytest.mark.fault("F5")
async def test_a_newer_checkpoint_that_is_not_yet_durable_is_kept(rig: Rig) -> None:
    """The watch dir holds a newer one, which is on its way: a trainer finds that."""
    await rig.commit(1)
    newer = waiting(2, save(rig.root, "2.pt", b"newer", at=2))
    older = waiting(1, save(rig.root, "0.pt", b"older", at=0))
    assert await rig.restore(older, newer) == Outcome("kept")
    assert rig.files() == {"0.pt": b"older", "2.pt": b"newer"}
    assert rig.outcome == ("kept", "2.pt", 0)


@pytest.mark.fault("F5")
async def test_a_newer_checkpoint_is_kept_although_the_bucket_is_empty(rig: Rig) -> None:
    """Nothing durable yet, but something on its way."""
    assert await rig.restore(waiting(1, save(rig.root, "1.pt", b"first"))) == Outcome("kept")
    assert rig.outcome == ("kept", "1.pt", 0)


async def test_a_newer_checkpoint_whose_file_is_gone_does_not_count(rig: Rig) -> None:
    """The spool still has it, the trainer cannot see it: the newest durable one is restored."""
    await rig.commit(1)
    await rig.restore(waiting(2, File("2.pt", 5, BORN)))
    assert rig.files() == {"1.pt": b"weights of 1"}


@pytest.mark.fault("F5")
async def test_an_older_checkpoint_that_is_not_yet_durable_is_no_reason_to_keep(rig: Rig) -> None:
    """A later holder has committed a newer one: that is restored beside it."""
    await rig.commit(2)
    await rig.restore(waiting(1, save(rig.root, "1.pt", b"older")))
    assert rig.files() == {"1.pt": b"older", "2.pt": b"weights of 2"}


@pytest.mark.fault("F9")
async def test_what_the_trainer_writes_meanwhile_stays(rig: Rig) -> None:
    """A trainer that started too early has saved under the same name: its file is not replaced."""
    await rig.commit(1, "last.pt", b"restored")

    async def write() -> None:
        save(rig.root, "last.pt", b"the trainer's", at=50)

    rig.bucket.on("get_range", before=write)
    outcome = await rig.restore()
    assert outcome.word == "kept"
    assert rig.files() == {"last.pt": b"the trainer's"}
    assert rig.known == {}
    assert rig.hidden("incoming") == []


@pytest.mark.fault("F9")
async def test_what_was_saved_just_before_and_is_taken_up_meanwhile_stays(rig: Rig) -> None:
    """It stood there before anybody knew whether it is whole: once that is known it is not set aside."""
    await rig.commit(1, "last.pt", b"restored")
    newer = waiting(2, save(rig.root, "last.pt", b"the trainer's", at=50))
    book: list[Checkpoint] = []

    async def take_up() -> None:
        book.append(newer)

    rig.bucket.on("get_range", before=take_up)
    assert (await rig.restorer().restore(rig.ledger.manifest, book)).word == "kept"
    assert rig.files() == {"last.pt": b"the trainer's"}
    assert (rig.hidden("aside"), rig.hidden("incoming")) == ([], [])


@pytest.mark.fault("F9")
async def test_a_file_that_changes_meanwhile_is_not_set_aside(rig: Rig) -> None:
    """A torn file is replaced by the trainer while the download runs: the trainer's stays."""
    await rig.commit(1, "last.pt", b"restored")
    save(rig.root, "last.pt", b"torn")

    async def write() -> None:
        save(rig.root, "last.pt", b"the trainer's", at=50)

    rig.bucket.on("get_range", before=write)
    await rig.restore()
    assert rig.files() == {"last.pt": b"the trainer's"}
    assert rig.hidden("aside") == []


# --- hostile places ----------------------------------------------------------------------------------


@pytest.mark.fault("F8")
@pytest.mark.parametrize("link", ["deep", "deep/er"])
async def test_nothing_is_written_through_a_symlink(rig: Rig, tmp_path: Path, link: str) -> None:
    """A link in the way leads outside: refused, said, and the next checkpoint is taken."""
    await rig.commit(1)
    await rig.commit(2, "deep/er/x.pt", b"weights")
    (tmp_path / "outside").mkdir()
    (rig.root / link).parent.mkdir(exist_ok=True)
    (rig.root / link).symlink_to(tmp_path / "outside")
    await rig.restore()
    assert list((tmp_path / "outside").iterdir()) == []
    assert (rig.root / "1.pt").read_bytes() == b"weights of 1"
    assert rig.fell_back == ["1-2 a symlink is in the way inside the watch dir"]


@pytest.mark.fault("F8")
async def test_a_symlink_at_the_name_is_left_alone(rig: Rig, tmp_path: Path) -> None:
    """What it points to is neither replaced nor believed."""
    await rig.commit(1, "x.pt", b"weights")
    (tmp_path / "outside.pt").write_bytes(b"precious")
    (rig.root / "x.pt").symlink_to(tmp_path / "outside.pt")
    with pytest.raises(NothingRestored):
        await rig.restore()
    assert (tmp_path / "outside.pt").read_bytes() == b"precious"
    assert (rig.root / "x.pt").is_symlink()


async def test_a_file_in_the_way_of_a_directory_is_left_alone(rig: Rig) -> None:
    """The trainer has a file where the checkpoint needs a directory: said, and the next one is taken."""
    await rig.commit(1)
    await rig.commit(2, "deep/x.pt", b"weights")
    save(rig.root, "deep", b"a file")
    await rig.restore()
    assert rig.files() == {"1.pt": b"weights of 1", "deep": b"a file"}


# --- the disk ----------------------------------------------------------------------------------------


@pytest.mark.fault("E4", "F6")
async def test_a_disk_too_small_is_said_before_the_first_byte(rig: Rig) -> None:
    """Both numbers are in the message; no older, smaller checkpoint is taken for the newest."""
    await rig.commit(1, content=b"sm")
    await rig.commit(2)
    rig.disk.refuse["free"] = OSError()
    with pytest.raises(NoRoom, match=r"the checkpoint has 12 bytes, .* room for 3 "):
        await rig.restore()
    assert rig.told.of(Progress) == []
    assert rig.files() == {}


@pytest.mark.fault("F6")
@pytest.mark.parametrize("call", ["create", "write_at", "link"])
@pytest.mark.fault("E4")
async def test_a_disk_that_fills_up_is_no_flaw_of_the_checkpoint(rig: Rig, call: str) -> None:
    """When the room goes in the middle, an older, smaller checkpoint is not taken for the newest."""
    await rig.commit(1)
    await rig.commit(2)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    rig.disk.refuse[call] = rig.disk.refuse["rename"] = full
    with pytest.raises(NoRoom, match="No space left"):
        await rig.restore()
    assert (rig.files(), rig.fell_back) == ({}, [])
    assert rig.hidden("incoming") == []


@pytest.mark.fault("E4", "F6")
@pytest.mark.parametrize("call", ["create", "write_at", "link"])
async def test_a_disk_that_fails_is_no_flaw_of_the_checkpoint(rig: Rig, call: str) -> None:
    """An older one is not taken for it: once the disk has healed, the newest is restored."""
    await rig.commit(1)
    await rig.commit(2)
    rig.disk.refuse[call] = rig.disk.refuse["rename"] = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        await rig.restore()
    assert (rig.fell_back, rig.told.of(Restored)) == ([], [])
    assert rig.hidden("incoming") == []
    rig.disk.refuse.clear()
    await rig.restore()
    assert rig.files() == {"2.pt": b"weights of 2"}


async def test_a_restore_that_is_given_up_leaves_nothing_behind(rig: Rig) -> None:
    """Stopped in the middle of the download: no file under a final name, none out of sight."""
    await rig.commit(1)
    gate = rig.bucket.hold("get_range", passing=1)
    restoring = asyncio.ensure_future(rig.restore())
    await gate.reached.wait()
    restoring.cancel()
    await asyncio.wait([restoring])
    assert restoring.cancelled()
    assert rig.files() == {}
    assert rig.hidden("incoming") == []


async def test_a_file_is_known_before_it_can_be_seen(rig: Rig) -> None:
    """Else a watcher would take the restored file for a new checkpoint."""
    await rig.commit(1, "x.pt")
    seen: list[dict[File, Id]] = []

    class Looking(Hurt):
        def link(self, source: Path, target: Path) -> None:
            seen.append(dict(rig.known))
            super().link(source, target)

    rig.landing = Landing(rig.root, Looking())
    await rig.restore()
    assert [[file.name for file in each] for each in seen] == [["x.pt"]]


async def test_a_file_that_could_not_be_placed_is_not_known(rig: Rig) -> None:
    """The next one that is restored, or saved, under that name is another."""
    await rig.commit(1, "x.pt")
    rig.disk.refuse = {"link": OSError(5, "EIO"), "rename": OSError(5, "EIO")}
    with pytest.raises(OSError, match="EIO"):
        await rig.restore()
    assert rig.known == {}
