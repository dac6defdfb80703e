"""What was caught or pinned stays readable, survives any end, and is held only as long as needed."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt_sidecar.checkpoint import Checkpoint, File, Id, Pinned, Uploading, advance
from ckpt_sidecar.disk import BytesChanged
from ckpt_sidecar.identity import SpoolError
from ckpt_sidecar.spool import Spool
from tests.engine.support import BORN, SECOND, Hurt, descriptors, opened_spool, pin, save

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A watch dir."""
    path = tmp_path / "watch"
    path.mkdir()
    return path


@pytest.fixture
def disk() -> Hurt:
    """A disk that can be told to fail."""
    return Hurt()


@pytest.fixture
def spool(root: Path, disk: Hurt) -> Iterator[Spool]:
    """An open spool that has claimed generation 3."""
    spool = opened_spool(root, generation=3, disk=disk)
    yield spool
    spool.close()


@pytest.fixture
def reopen(spool: Spool, root: Path) -> Iterator[Callable[[], tuple[Spool, list[str]]]]:
    """The spool after the process has ended and another one has begun, and what that one complains of."""
    opened: list[Spool] = [spool]

    def again() -> tuple[Spool, list[str]]:
        opened[-1].close()
        opened.append(Spool(root))
        return opened[-1], opened[-1].open(new_id="spool-b")

    yield again
    opened[-1].close()


def held(spool: Spool) -> list[str]:
    """Return the names of the files in the spool's holds."""
    found = [*(spool.home / "caught").rglob("*"), *(spool.home / "pins").rglob("*")]
    return sorted(each.name for each in found if each.is_file())


def content(spool: Spool, checkpoint: Checkpoint) -> bytes:
    """Read the pinned bytes."""
    with spool.reading(checkpoint, checkpoint.files[0]) as source:
        view = memoryview(bytearray(checkpoint.size + 1))
        return bytes(view[: source.read_into(0, view)])


# --- catching ----------------------------------------------------------------------------------------


def test_what_is_caught_stays_readable_when_the_trainer_deletes_it(spool: Spool, root: Path) -> None:
    """A caught file may be deleted: its bytes stay until it is let go, and then nothing is left."""
    save(root, "a/deep/x.pt", b"weights")
    caught = spool.catch("a/deep/x.pt")
    assert caught is not None
    (root / "a/deep/x.pt").unlink()
    with spool.open_caught(caught) as file:
        assert file.read() == b"weights"
    spool.let_go(caught)
    assert held(spool) == []
    assert list((spool.home / "caught").iterdir()) == []


def test_the_same_file_is_caught_once(spool: Spool, root: Path) -> None:
    """To catch again what is held already gives the same hold, and leaves nothing behind."""
    save(root, "x.pt", b"weights")
    assert spool.catch("x.pt") == spool.catch("x.pt")
    assert held(spool) == ["x.pt"]
    assert len(list((spool.home / "caught").iterdir())) == 1


def test_two_names_of_one_file_are_two_holds(spool: Spool, root: Path) -> None:
    """A hard link is a checkpoint of its own: to let the one name go does not touch the other."""
    save(root, "last.pt", b"weights")
    (root / "best.pt").hardlink_to(root / "last.pt")
    last, best = spool.catch("last.pt"), spool.catch("best.pt")
    assert last is not None
    assert best is not None
    assert last.inode == best.inode
    spool.let_go(last)
    with spool.open_caught(best) as file:
        assert file.read() == b"weights"


def test_what_replaces_a_caught_file_is_another_hold(spool: Spool, root: Path) -> None:
    """A file renamed over a caught one is another file: both are held."""
    save(root, "last.pt", b"first")
    first = spool.catch("last.pt")
    save(root, "last.pt", b"second")
    second = spool.catch("last.pt")
    assert first is not None
    assert second is not None
    with spool.open_caught(first) as one, spool.open_caught(second) as other:
        assert (one.read(), other.read()) == (b"first", b"second")


def test_only_regular_files_are_caught(spool: Spool, root: Path, tmp_path: Path) -> None:
    """A symlink, a directory, a pipe and a name at which nothing stands are not caught."""
    (tmp_path / "outside.pt").write_bytes(b"secret")
    (root / "link.pt").symlink_to(tmp_path / "outside.pt")
    (root / "dir.pt").mkdir()
    os.mkfifo(root / "pipe.pt")
    assert [spool.catch(name) for name in ("link.pt", "dir.pt", "pipe.pt", "gone.pt")] == [None] * 4
    assert held(spool) == []


@pytest.mark.fault("A18")
@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSPC])
def test_where_no_link_can_be_a_descriptor_holds(spool: Spool, root: Path, disk: Hurt, code: int) -> None:
    """What cannot be held by a link is held by an open descriptor, which is given back."""
    disk.refuse["link"] = OSError(code, os.strerror(code))
    file = save(root, "x.pt", b"weights")
    before = descriptors()
    caught, again = spool.catch("x.pt"), spool.catch("x.pt")
    assert caught is not None
    assert caught == again
    assert caught.path is None
    (root / "x.pt").unlink()
    with spool.open_caught(caught) as look:
        assert look.read() == b"weights"
    (pinned,), _ = spool.pin([(caught, file)])
    spool.write(pinned)
    assert content(spool, pinned) == b"weights"
    spool.release(pinned, durable_as=pinned.id)
    assert descriptors() == before
    assert list((spool.home / "caught").iterdir()) == []


def test_a_hold_by_descriptor_is_let_go(spool: Spool, root: Path, disk: Hurt) -> None:
    """A file held by a descriptor that is no checkpoint costs no descriptor."""
    disk.refuse["link"] = OSError(errno.EPERM, "no")
    save(root, "x.pt", b"weights")
    before = descriptors()
    caught = spool.catch("x.pt")
    assert caught is not None
    spool.let_go(caught)
    spool.let_go(caught)
    assert descriptors() == before


@pytest.mark.fault("E6")
def test_what_a_killed_catch_left_does_not_stand_in_the_way(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """A link that was made but not yet put in its place is cleared away by the recovery."""
    save(root, "x.pt", b"weights")
    half = spool.home / "caught" / "new-0"
    half.mkdir()
    (half / "x.pt").hardlink_to(root / "x.pt")
    again, _ = reopen()
    assert again.recover().caught == []
    caught = again.catch("x.pt")
    assert caught is not None
    assert caught.path is not None


# --- pins --------------------------------------------------------------------------------------------


def test_pins_are_numbered_in_order_and_outlive_their_names(spool: Spool, root: Path) -> None:
    """Checkpoints get growing ids in the order in which they are pinned; their names may go."""
    files = [save(root, f"{n}.pt", b"%d" % n, at=n) for n in range(3)]
    batch = [(caught, file) for file in files if (caught := spool.catch(file.name)) is not None]
    pinned, failed = spool.pin(batch)
    for file in files:
        (root / file.name).unlink()
    assert failed == []
    assert [repr(each) for each in pinned] == [f"<3-{n + 1} {n}.pt 1 B pinned>" for n in range(3)]
    assert [content(spool, each) for each in pinned] == [b"0", b"1", b"2"]
    assert [each.saved_at for each in pinned] == [BORN + n * SECOND for n in range(3)]


def test_a_pinned_file_is_known_and_another_of_that_name_is_not(spool: Spool, root: Path) -> None:
    """What is pinned is not taken up again; a newer save of the same name is."""
    file = save(root, "last.pt", b"one")
    pin(spool, file)
    assert spool.known.is_known(file)
    assert not spool.known.is_known(save(root, "last.pt", b"two", at=1))


def test_a_release_leaves_nothing_but_the_knowledge(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """A durable checkpoint takes no room in the spool, and is known after a restart, too."""
    file = save(root, "deep/x.pt", b"weights")
    checkpoint = pin(spool, file)
    spool.release(checkpoint, durable_as=checkpoint.id)
    assert list((spool.home / "pins").iterdir()) == []
    again, _ = reopen()
    assert again.recover().checkpoints == []
    assert again.known.is_known(file)
    assert again.known.durable_files() == {checkpoint.id: file}


@pytest.mark.fault("E4")
def test_a_pin_survives_a_disk_too_full_for_its_entry(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path, disk: Hurt
) -> None:
    """When there is no room for the journal the pin alone tells all that a restart needs."""
    disk.refuse["write_file"] = disk.refuse["append"] = OSError(errno.ENOSPC, "full")
    file = save(root, "x.pt", b"weights")
    pinned = pin(spool, file)
    assert held(spool) == ["x.pt"]
    again, complaints = reopen()
    assert complaints == []
    assert again.recover().checkpoints == [pinned]


def test_a_full_disk_keeps_nothing_pinned(spool: Spool, root: Path, disk: Hurt) -> None:
    """To let a pin go needs no room: else a full disk would never get empty again."""
    checkpoint = pin(spool, save(root, "x.pt", b"weights"))
    disk.refuse["write_file"] = disk.refuse["append"] = OSError(errno.ENOSPC, "full")
    spool.release(checkpoint, durable_as=checkpoint.id)
    assert list((spool.home / "pins").iterdir()) == []
    assert spool.known.is_known(checkpoint.files[0])


@pytest.mark.fault("E4", "E5")
def test_what_cannot_be_pinned_stays_caught(spool: Spool, root: Path, disk: Hurt) -> None:
    """A pin that fails is said with its reason, and the file is held as before; others are pinned."""
    file = save(root, "x.pt", b"weights")
    caught = spool.catch("x.pt")
    assert caught is not None
    disk.refuse["rename"] = OSError(errno.EIO, "broken")
    pinned, failed = spool.pin([(caught, file)])
    assert (pinned, [(each, error.errno) for each, error in failed]) == ([], [(caught, errno.EIO)])
    del disk.refuse["rename"]
    (pinned_now,), _ = spool.pin([(caught, file)])
    assert content(spool, pinned_now) == b"weights"


def test_changed_bytes_are_never_handed_out(spool: Spool, root: Path) -> None:
    """A file rewritten in place gives no byte any more, however large the rest of it is."""
    checkpoint = pin(spool, save(root, "x.pt", b"weights"))
    with spool.reading(checkpoint, checkpoint.files[0]) as source:
        (root / "x.pt").write_bytes(b"WEIGHTS and more")
        with pytest.raises(BytesChanged, match=r"x.pt: pinned with 7 bytes, now 16"):
            source.read_into(0, memoryview(bytearray(4)))


def test_changed_bytes_of_the_same_size_are_noticed_by_their_time(spool: Spool, root: Path) -> None:
    """A rewrite in place that keeps the size is a change as well."""
    checkpoint = pin(spool, save(root, "x.pt", b"weights"))
    (root / "x.pt").write_bytes(b"WEIGHTS")
    with spool.reading(checkpoint, checkpoint.files[0]) as source, pytest.raises(BytesChanged):
        source.check()


@pytest.mark.fault("A8")
def test_metadata_alone_is_no_change(spool: Spool, root: Path) -> None:
    """A file that is given another mode, or another link, is the same checkpoint."""
    checkpoint = pin(spool, save(root, "x.pt", b"weights"))
    (root / "x.pt").chmod(0o600)
    (root / "y.pt").hardlink_to(root / "x.pt")
    assert content(spool, checkpoint) == b"weights"


@pytest.mark.fault("B3")
def test_a_reader_goes_on_when_the_pin_is_removed(spool: Spool, root: Path) -> None:
    """What is being sent is finished although somebody removes the spool."""
    checkpoint = pin(spool, save(root, "x.pt", b"weights"))
    with spool.reading(checkpoint, checkpoint.files[0]) as source:
        spool.release(checkpoint, durable_as=None)
        (root / "x.pt").unlink()
        view = memoryview(bytearray(7))
        assert source.read_into(0, view) == 7
        assert bytes(view) == b"weights"


def test_a_changed_pin_is_turned_back_into_a_catch(spool: Spool, root: Path) -> None:
    """A pin whose bytes changed is judged anew: held as before, and not known any more."""
    file = save(root, "x.pt", b"weights")
    checkpoint = pin(spool, file)
    (root / "x.pt").write_bytes(b"other weights")
    caught = spool.reconsider(checkpoint)
    assert caught is not None
    assert caught.path is not None
    (root / "x.pt").unlink()
    with spool.open_caught(caught) as look:
        assert look.read() == b"other weights"
    assert not spool.known.is_known(file)
    assert list((spool.home / "pins").iterdir()) == []


def test_a_changed_pin_that_was_caught_again_is_one_hold(spool: Spool, root: Path) -> None:
    """When the rewrite has been caught already there is one hold afterwards, not two."""
    checkpoint = pin(spool, save(root, "x.pt", b"weights"))
    (root / "x.pt").write_bytes(b"other weights")
    hint = spool.catch("x.pt")
    assert spool.reconsider(checkpoint) == hint
    assert held(spool) == ["x.pt"]


def test_a_changed_pin_leaves_a_newer_save_known(spool: Spool, root: Path) -> None:
    """To take an old pin up anew does not make its successor under the same name unknown."""
    old = pin(spool, save(root, "last.pt", b"one"))
    newer = save(root, "last.pt", b"two", at=1)
    pin(spool, newer)
    spool.reconsider(old)
    assert spool.known.is_known(newer)


def test_when_the_pin_is_gone_what_stands_at_the_name_is_taken_up(spool: Spool, root: Path) -> None:
    """Whoever removes the spool costs no checkpoint whose file is still there."""
    file = save(root, "x.pt", b"weights")
    checkpoint = pin(spool, file)
    spool.disk.remove_tree(spool.home)
    caught = spool.reconsider(checkpoint)
    assert caught is not None
    (again,), failed = spool.pin([(caught, file)])
    assert failed == []
    assert content(spool, again) == b"weights"
    assert again.id > checkpoint.id


def test_when_the_pin_and_the_file_are_gone_there_is_nothing_to_take_up(spool: Spool, root: Path) -> None:
    """A pin that somebody removed together with the file is lost, and its entry goes too."""
    checkpoint = pin(spool, save(root, "x.pt", b"weights"))
    (root / "x.pt").unlink()
    spool.disk.remove_tree(spool.home / "pins" / "3-1")
    assert spool.reconsider(checkpoint) is None
    assert list((spool.home / "pins").iterdir()) == []


def test_a_changed_pin_held_by_a_descriptor_is_caught_anew(spool: Spool, root: Path, disk: Hurt) -> None:
    """Also where no link can be, changed bytes are taken up from what stands at the name."""
    disk.refuse["link"] = OSError(errno.EPERM, "no")
    before = descriptors()
    checkpoint = pin(spool, save(root, "x.pt", b"weights"))
    save(root, "x.pt", b"other weights")
    caught = spool.reconsider(checkpoint)
    assert caught is not None
    with spool.open_caught(caught) as look:
        assert look.read() == b"other weights"
    spool.let_go(caught)
    assert descriptors() == before


# --- ids ---------------------------------------------------------------------------------------------


def test_ids_grow_over_restarts_and_claims(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """Whatever has ended in between, the next id is greater than all before."""
    ids = []
    for n in range(3):
        again, _ = reopen()
        ids.append(pin(again, save(root, f"{n}.pt", b"x")).id)
        again.claimed(generation=10 + n, attempt="attempt-1")
        ids.append(pin(again, save(root, f"{n}-later.pt", b"x")).id)
    assert ids == sorted(set(ids))
    assert [each.generation for each in ids] == [3, 10, 10, 11, 11, 12]


def test_no_id_is_given_twice_although_the_counter_could_not_be_noted(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path, disk: Hurt
) -> None:
    """Ids that are not reserved on the disk are not given out: the file stays caught meanwhile."""
    spool._identity.record = replace(spool.record, counter=0)
    spool._identity._sequence = 0
    disk.refuse["write_file spool.json"] = OSError(errno.ENOSPC, "full")
    file = save(root, "x.pt", b"weights")
    for _ in range(2):
        caught = spool.catch("x.pt")
        assert caught is not None
        pinned, failed = spool.pin([(caught, file)])
        assert pinned == []
        assert [error.errno for _, error in failed] == [errno.ENOSPC]
    del disk.refuse["write_file spool.json"]
    first = pin(spool, file)
    again, _ = reopen()
    assert pin(again, save(root, "y.pt", b"weights")).id > first.id


@pytest.mark.parametrize(
    "mangled", [b"", b"[]", b"null", b"{", b'{"spool": 7}', b'{"spool": "a", "counter": "9"}', b"\xff", b"7"]
)
@pytest.mark.fault("E6")
def test_ids_grow_over_a_mangled_record(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path, mangled: bytes
) -> None:
    """A spool that forgot who it is says so, and numbers above what it still holds or knows as durable."""
    held_still = pin(spool, save(root, "held.pt", b"x"))
    durable = pin(spool, save(root, "durable.pt", b"x"))
    spool.release(durable, durable_as=durable.id)
    (spool.home / "spool.json").write_bytes(mangled)
    again, complaints = reopen()
    assert len(complaints) == 1
    assert complaints[0].startswith("spool.json cannot be read, a new one is made: ")
    assert again.record.spool == "spool-b"
    assert again.recover().checkpoints == [held_still]
    assert pin(again, save(root, "new.pt", b"x")).id > durable.id > held_still.id


def test_new_spools_number_apart_before_their_first_claim(tmp_path: Path) -> None:
    """Two spools that have never claimed give no id twice, or one manifest would have to list it twice."""
    ids = []
    for name in ("spool-a", "spool-b"):
        root = tmp_path / name
        root.mkdir()
        spool = opened_spool(root, name=name)
        ids += [pin(spool, save(root, f"{n}.pt", b"x")).id for n in range(2)]
        spool.claimed(generation=1, attempt="a")
        assert pin(spool, save(root, "after.pt", b"x")).id == Id(1, 3)
        spool.close()
    assert len(set(ids)) == 4
    assert {each.generation for each in ids} == {0}
    assert [Id.parse(str(each)) for each in ids] == ids


def test_ids_before_the_first_claim_do_not_swell_those_after(tmp_path: Path) -> None:
    """A restart with a pin that was numbered before any claim goes on with small numbers."""
    spool = opened_spool(tmp_path)
    early = pin(spool, save(tmp_path, "early.pt", b"x"))
    spool.close()
    again = opened_spool(tmp_path)
    assert again.recover().checkpoints == [early]
    assert pin(again, save(tmp_path, "later.pt", b"x")).id > early.id
    again.claimed(generation=1, attempt="a")
    assert pin(again, save(tmp_path, "after.pt", b"x")).id == Id(1, 1002)
    again.close()


# --- recovery ----------------------------------------------------------------------------------------


def test_a_restart_finds_pins_with_their_journal_and_catches(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """All that is on its way is found again, as far as it had come."""
    waiting = pin(spool, save(root, "a.pt", b"a"))
    begun = advance(pin(spool, save(root, "deep/b.pt", b"b")), Uploading(("upload-7",)))
    spool.write(begun)
    save(root, "c.pt", b"c")
    caught = spool.catch("c.pt")
    again, _ = reopen()
    found = again.recover()
    assert (found.checkpoints, found.caught, found.broken) == ([waiting, begun], [caught], [])
    assert again.known.is_known(begun.files[0])


@pytest.mark.fault("B3")
@pytest.mark.parametrize("twice", [False, True])
def test_what_was_caught_is_pinned_although_the_disk_has_another_number_now(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path, *, twice: bool
) -> None:
    """A volume that is mounted anew: the hold was named after the old number."""
    file = save(root, "deep/a.pt", b"a")
    caught = spool.catch("deep/a.pt")
    assert caught is not None and caught.path is not None
    (root / "deep" / "a.pt").unlink()
    folder = Path(caught.path).parents[1]
    folder.rename(folder.with_name(f"f{folder.name}"))
    if twice:
        shutil.copytree(folder.with_name(f"f{folder.name}"), folder, copy_function=os.link)
    again, _ = reopen()
    (found,) = again.recover().caught
    (pinned,), failed = again.pin([(found, file)])
    assert (content(again, pinned), failed) == (b"a", [])


@pytest.mark.fault("B3")
def test_holds_whose_names_are_one_anothers_on_a_copied_disk_are_told_apart(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """A copy gives the numbers out anew, perhaps the same ones to other files."""
    files = {name: save(root, name, name.encode()) for name in ("a.pt", "b.pt")}
    a, b = (Path(str(caught.path)).parent for name in files if (caught := spool.catch(name)))
    for source, target in ((a, root / "aside"), (b, a), (root / "aside", b)):
        source.rename(target)
    again, _ = reopen()
    found = again.recover().caught
    pinned, failed = again.pin([(caught, files[caught.name]) for caught in found])
    assert failed == []
    assert {each.name: content(again, each) for each in pinned} == {"a.pt": b"a.pt", "b.pt": b"b.pt"}


@pytest.mark.fault("A16")
@pytest.mark.parametrize("first", [True, False])
def test_a_catch_that_is_left_keeps_its_place_although_the_clock_was_set_back(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path, *, first: bool
) -> None:
    """By its time it is older than the pin; it is so only if it was caught before that one was numbered."""
    left = save(root, "b.pt", b"left", at=-3600)
    caught = spool.catch("b.pt") if first else None
    pinned = pin(spool, save(root, "a.pt", b"pinned"))
    caught = caught or spool.catch("b.pt")
    save(root, "b.pt", b"the next", at=-1800)
    again, _ = reopen()
    assert caught is not None
    assert again.recover().caught == [caught]
    (late,), _ = again.pin([(caught, left)])
    assert (late.id < pinned.id) == first


@pytest.mark.fault("E6")
def test_a_pin_without_entry_is_taken_up(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """The pin alone tells id, name, size and time."""
    pinned = pin(spool, save(root, "deep/x.pt", b"weights", at=5))
    (spool.home / "pins" / "3-1.json").unlink()
    again, _ = reopen()
    found = again.recover()
    assert (found.checkpoints, found.broken) == ([pinned], [])


@pytest.mark.parametrize(
    "entry",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"state": "pinned"}',
        b'{"state": "stored", "id": "3-1", "name": "x.pt", "saved_at": 1, "files": []}',
        b'{"state": "pinned", "id": "3-1", "name": "x.pt", "saved_at": 1, "files": []}',
        b'{"state": "pinned", "id": "3-1", "name": "x.pt", "saved_at": 1, "files": [{"name": "x.pt"}]}',
        b'{"state": "uploading", "upload_ids": [], "id": "3-1", "name": "x.pt", "saved_at": 1}',
    ],
)
@pytest.mark.fault("E6")
def test_a_mangled_entry_costs_no_checkpoint(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path, entry: bytes
) -> None:
    """A torn journal is said, and its pin is taken up from the start."""
    pinned = pin(spool, save(root, "x.pt", b"weights"))
    (spool.home / "pins" / "3-1.json").write_bytes(entry)
    again, _ = reopen()
    found = again.recover()
    assert found.checkpoints == [pinned]
    ((where, what),) = found.broken
    assert where.endswith("pins/3-1.json")
    assert "cannot be read" in what
    assert "taken up from the start" in what


def test_an_entry_of_another_checkpoint_is_not_believed(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """An entry that names another id or name than its pin is said, and the pin is taken up from the start."""
    first = pin(spool, save(root, "a.pt", b"a"))
    second = pin(spool, save(root, "b.pt", b"b"))
    pins = spool.home / "pins"
    (pins / "3-1.json").write_bytes((pins / "3-2.json").read_bytes())
    again, _ = reopen()
    found = again.recover()
    assert found.checkpoints == [first, second]
    assert [what for _, what in found.broken] == [
        "names another checkpoint than its pin; the pin is taken up from the start"
    ]


@pytest.mark.fault("E6")
def test_an_entry_without_pin_is_said_once(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """Bytes that somebody removed are reported, and not again at every start."""
    pin(spool, save(root, "x.pt", b"weights"))
    spool.disk.remove_tree(spool.home / "pins" / "3-1")
    again, _ = reopen()
    found = again.recover()
    assert [what for _, what in found.broken] == [
        "has no pin any more: its bytes were removed from this disk"
    ]
    assert again.recover().broken == []


@pytest.mark.fault("E6")
def test_a_release_that_was_cut_is_finished_in_silence(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """Killed between the entry, the file and its directory: the next start clears the rest."""
    pin(spool, save(root, "x.pt", b"weights"))
    (spool.home / "pins" / "3-1.json").unlink()
    (spool.home / "pins" / "3-1" / "x.pt").unlink()
    again, _ = reopen()
    found = again.recover()
    assert (found.checkpoints, found.broken) == ([], [])
    assert list((spool.home / "pins").iterdir()) == []


def test_a_pin_that_holds_two_files_is_left_as_it_is(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """What nobody of ours can have made is said and not touched."""
    pin(spool, save(root, "x.pt", b"weights"))
    (spool.home / "pins" / "3-1" / "y.pt").write_bytes(b"who are you")
    again, _ = reopen()
    found = again.recover()
    assert found.checkpoints == []
    assert "holds 2 files, not one; it is left as it is" in found.broken[0][1]
    assert held(again) == ["3-1.json", "x.pt", "y.pt"]


@pytest.mark.fault("E6")
def test_half_written_files_are_cleared_away(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """What a write that was cut has left is no entry, and goes."""
    pinned = pin(spool, save(root, "x.pt", b"weights"))
    (spool.home / "pins" / "3-1.json.tmp").write_bytes(b"{")
    (spool.home / "spool.json.tmp").write_bytes(b"{")
    again, _ = reopen()
    found = again.recover()
    assert (found.checkpoints, found.broken) == ([pinned], [])
    assert held(again) == ["3-1.json", "x.pt"]


# --- who may use it ----------------------------------------------------------------------------------


def test_a_watch_dir_is_served_once(spool: Spool, root: Path) -> None:
    """A second sidecar on the same directory is refused with the first one's pid, and changes nothing."""
    spool.serving(address="http://127.0.0.1:1", pid=4711)
    with pytest.raises(SpoolError, match=r"another ckpt-sidecar serves .* \(pid 4711\)"):
        Spool(root).open(new_id="spool-b")
    assert json.loads((spool.home / "spool.json").read_bytes())["spool"] == "spool-a"


def test_the_directory_can_be_served_again_after_a_close(spool: Spool, root: Path) -> None:
    """The lock goes with its owner, and the spool knows who it was."""
    spool.serving(address="http://127.0.0.1:1", pid=4711)
    spool.close()
    again = opened_spool(root)
    record = again.record
    assert (record.spool, record.attempt, record.generation) == ("spool-a", "attempt-1", 3)
    assert (record.address, record.pid) == ("http://127.0.0.1:1", 4711)
    again.close()


# --- it goes with its directory ------------------------------------------------------------------------


@pytest.mark.fault("B3")
@pytest.mark.parametrize("how", ["removed", "moved away"])
def test_a_spool_that_went_with_the_watch_dir_is_made_anew_and_its_ids_go_on(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path, how: str
) -> None:
    """The same spool, ours alone, locked, with its record: a restart gives no id that was ever given."""
    spool.serving(address="http://127.0.0.1:1", pid=4711)
    before = [pin(spool, save(root, f"{n}.pt", b"x")).id for n in range(3)]
    shutil.rmtree(root) if how == "removed" else root.rename(root.with_name("before"))
    root.mkdir()
    after = pin(spool, save(root, "x.pt", b"y"))
    assert after.id > max(before)
    assert content(spool, after) == b"y"
    assert spool.home.stat().st_mode & 0o777 == 0o700
    with pytest.raises(SpoolError, match=r"another ckpt-sidecar serves .* \(pid 4711\)"):
        Spool(root).open(new_id="spool-b")
    spool.release(after, durable_as=after.id)
    (spool.home / "known.jsonl").unlink()
    again, complaints = reopen()
    assert (again.record.spool, again.record.attempt, again.record.generation) == ("spool-a", "attempt-1", 3)
    assert complaints == []
    assert pin(again, save(root, "z.pt", b"z")).id > after.id


@pytest.mark.fault("B3")
def test_a_watch_dir_that_is_gone_is_not_made_by_us(spool: Spool, root: Path) -> None:
    """The trainer may be about to make it, and would fail; what was caught there is said to be lost."""
    file = save(root, "x.pt", b"x")
    caught = spool.catch("x.pt")
    assert caught is not None
    shutil.rmtree(root)
    assert spool.catch("x.pt") is None
    pinned, failed = spool.pin([(caught, file)])
    assert (pinned, [each for each, _ in failed]) == ([], [caught])
    assert not root.exists()


@pytest.mark.fault("B3")
def test_a_watch_dir_that_goes_while_a_pin_is_made_ends_nothing(spool: Spool, root: Path, disk: Hurt) -> None:
    """The pin is made, and then misses when it is sent."""
    file = save(root, "x.pt", b"x")
    caught = spool.catch("x.pt")
    assert caught is not None
    disk.write_file = lambda *_args, **_more: shutil.rmtree(root)  # type: ignore[method-assign]
    (pinned,), failed = spool.pin([(caught, file)])
    assert failed == []
    with pytest.raises(FileNotFoundError), spool.reading(pinned, file):
        pass


@as_root
@pytest.mark.fault("B3")
def test_a_spool_that_another_user_puts_in_its_place_is_not_used(spool: Spool, root: Path) -> None:
    """A descriptor holds the bytes then; nothing is written into it."""
    shutil.rmtree(spool.home)
    spool.home.mkdir()
    os.chown(spool.home, 12345, 12345)
    pinned = pin(spool, save(root, "x.pt", b"x"))
    assert content(spool, pinned) == b"x"
    assert list(spool.home.iterdir()) == []


@pytest.mark.fault("G6")
@as_root
def test_a_spool_of_another_user_is_refused(root: Path) -> None:
    """What another user could have forged is not used, and nothing is written into it."""
    home = root / ".ckpt-sidecar"
    home.mkdir()
    os.chown(home, 12345, 12345)
    with pytest.raises(SpoolError, match="belongs to another user"):
        Spool(root).open(new_id="spool-a")
    assert list(home.iterdir()) == []


@pytest.mark.fault("G6")
def test_a_symlink_in_place_of_the_spool_is_refused(root: Path, tmp_path: Path) -> None:
    """A link that leads out of the watch dir is not followed."""
    (tmp_path / "outside").mkdir()
    (root / ".ckpt-sidecar").symlink_to(tmp_path / "outside")
    with pytest.raises(SpoolError, match="belongs to another user"):
        Spool(root).open(new_id="spool-a")
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.fault("G6")
@pytest.mark.parametrize("place", ["pins", "caught", "pins/1-1", "caught/1-2-3", "spool.json"])
def test_a_symlink_in_the_spool_is_refused(root: Path, tmp_path: Path, place: str) -> None:
    """Somebody has put it there while the spool stood open: what it leads to is neither sent nor removed."""
    (tmp_path / "outside").mkdir()
    link = root / ".ckpt-sidecar" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "outside")
    with pytest.raises(SpoolError, match=f"{place} belongs to another user"):
        Spool(root).open(new_id="spool-a")
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.fault("G6")
def test_the_spool_is_for_us_alone(spool: Spool) -> None:
    """Nobody else can put an entry there, or read a checkpoint that its owner keeps to himself."""
    assert spool.home.stat().st_mode & 0o777 == 0o700


def test_a_missing_watch_dir_is_made_but_not_its_parent(tmp_path: Path) -> None:
    """The trainer may make its directory later; a path that leads nowhere is a mistake and said."""
    spool = opened_spool(tmp_path / "new")
    spool.close()
    assert (tmp_path / "new" / ".ckpt-sidecar").is_dir()
    with pytest.raises(SpoolError, match=r"no such directory: .*nowhere"):
        Spool(tmp_path / "nowhere" / "new").open(new_id="spool-a")
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match="not a directory"):
        Spool(tmp_path / "file").open(new_id="spool-a")


@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (errno.EACCES, "run the sidecar as the trainer's user"),
        (errno.ENOSPC, "make room"),
        pytest.param(errno.EROFS, "mount it writable", marks=pytest.mark.fault("E5")),
        pytest.param(errno.EIO, "look at the disk", marks=pytest.mark.fault("E5")),
    ],
)
def test_a_disk_that_takes_nothing_is_said_with_its_mend(
    root: Path, disk: Hurt, code: int, mend: str
) -> None:
    """A start that cannot write says why, and what to do."""
    disk.refuse["write_file spool.json"] = OSError(code, os.strerror(code))
    with pytest.raises(SpoolError, match=mend):
        Spool(root, disk=disk).open(new_id="spool-a")
    opened_spool(root).close()  # and nothing is left locked


def test_a_descriptor_that_was_handed_over_is_nobody_elses(spool: Spool, root: Path, disk: Hurt) -> None:
    """Its number may be another file's by then: it is neither read, nor closed, nor pinned twice."""
    disk.refuse["link"] = OSError(errno.EPERM, "not permitted")
    file = save(root, "x.pt", b"weights")
    caught = spool.catch("x.pt")
    assert caught is not None
    assert spool.catch("x.pt") == caught
    (pinned,), _ = spool.pin([(caught, file)])
    ((_, error),) = spool.pin([(caught, file)])[1]
    assert isinstance(error, FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        spool.open_caught(caught)
    spool.let_go(caught)
    again = spool.catch("x.pt")
    assert again is not None
    assert again.descriptor != caught.descriptor
    spool.let_go(caught)
    with (
        spool.reading(pinned, file) as held,
        held.open() as pin_bytes,
        spool.open_caught(again) as catch_bytes,
    ):
        assert pin_bytes.read() == catch_bytes.read() == b"weights"


# --- another bucket ----------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [True, False])
def test_a_spool_of_another_target_begins_anew(root: Path, *, claimed: bool) -> None:
    """Nothing is on its way: what is durable there is not known here, and the spool is another one."""
    for target in ("s3://old/", "s3://new/"):
        spool = Spool(root)
        complaints = spool.open(new_id=f"spool of {target}", target=target)
        assert spool.record.spool == f"spool of {target}"
        assert spool.known.newest is None
        if target == "s3://old/":
            if claimed:
                spool.claimed(generation=3, attempt="attempt-1")
            spool.known.restored(save(root, "x.pt", b"weights"), Id(3, 1))
        spool.close()
    assert complaints == [
        "it was the spool of s3://old/: it begins anew, and what stands in the watch dir goes to s3://new/"
    ]
    assert (spool.record.generation, spool.record.attempt, spool.record.target) == (0, "", "s3://new/")
    again = Spool(root)
    assert again.open(new_id="nobody", target="s3://new/") == []
    assert again.record.spool == "spool of s3://new/"
    again.close()


@pytest.mark.parametrize("claimed", [True, False])
def test_what_is_on_its_way_goes_to_another_target_only_if_it_never_went_to_the_first(
    root: Path, *, claimed: bool
) -> None:
    """A bucket that was misspelt costs nothing; one that has some of it gets the rest, or a clear refusal."""
    spool = Spool(root)
    spool.open(new_id="spool-a", target="s3://old/job/")
    if claimed:
        spool.claimed(generation=3, attempt="attempt-1")
    pinned = pin(spool, save(root, "x.pt", b"weights"))
    spool.close()
    again = Spool(root)
    if claimed:
        refused = "holds 1 checkpoints on their way to s3://old/job/, not to s3://new/"
        with pytest.raises(SpoolError, match=refused):
            again.open(new_id="spool-b", target="s3://new/")
        assert again.open(new_id="spool-b", target="s3://old/job/") == []
    else:
        assert len(again.open(new_id="spool-b", target="s3://new/")) == 1
        assert again.record.target == "s3://new/"
    assert again.record.spool == ("spool-a" if claimed else "spool-b")
    assert again.recover().checkpoints == [pinned]
    again.close()


# --- what is known -----------------------------------------------------------------------------------


def lines(spool: Spool) -> list[str]:
    """Return the lines of known.jsonl."""
    return (spool.home / "known.jsonl").read_text().splitlines()


@pytest.mark.fault("E6")
def test_a_torn_last_line_costs_only_itself(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """What a crash tore off the table is forgotten; the rest is read, and the table is whole again."""
    first, second = save(root, "a.pt", b"a"), save(root, "b.pt", b"b")
    spool.known.settled(first, Id(3, 1))
    spool.known.settled(second, Id(3, 2))
    path = spool.home / "known.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    again, _ = reopen()
    assert again.known.durable_files() == {Id(3, 1): first}
    assert not again.known.is_known(second)
    again.known.settled(second, Id(3, 2))
    assert lines(again) == [
        json.dumps(["a.pt", 1, first.mtime_ns, "3-1"]),
        json.dumps(["b.pt", 1, second.mtime_ns, "3-2"]),
    ]


@pytest.mark.fault("E6")
def test_nonsense_in_the_table_is_passed_over(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """Lines that nobody of ours wrote cost nothing."""
    file = save(root, "a.pt", b"a")
    (spool.home / "known.jsonl").write_text(
        '\n7\n[]\n{}\n["a.pt", 1]\n["a.pt", "x", 1, null]\n["a.pt", 1, 1, "nonsense"]\n["a.pt", 1, 1, 7]\n'
        f'["a.pt", 1e400, 1, null]\n["a.pt", 1, {file.mtime_ns}, null]\n\x00\x85'
    )
    again, _ = reopen()
    assert again.known.is_known(file)
    assert again.known.durable_files() == {}
    assert len(lines(again)) == 1


def test_names_that_are_gone_are_forgotten(
    reopen: Callable[[], tuple[Spool, list[str]]], spool: Spool, root: Path
) -> None:
    """The table has no more names than the watch dir."""
    for n in range(10):
        spool.known.settled(save(root, f"{n}.pt", b"x"), Id(3, n + 1))
    for n in range(9):
        (root / f"{n}.pt").unlink()
    again, _ = reopen()
    assert [file.name for file in again.known.durable_files().values()] == ["9.pt"]
    assert len(lines(again)) == 1


def test_the_table_stays_small_while_checkpoints_come_and_go(spool: Spool, root: Path) -> None:
    """A run of many thousand checkpoints leaves a table bounded in memory and on the disk."""
    last = save(root, "last.pt", b"x")
    for n in range(5000):
        last = File("last.pt", 1, n)
        spool.known.taken(last)
        spool.known.settled(last, Id(3, n + 1))
        gone = File(f"{n}.pt", 1, n)
        spool.known.taken(gone)
        spool.known.settled(gone, Id(4, n + 1))
    assert len(lines(spool)) < 4000
    assert len(spool.known.durable_files()) < 4000
    assert spool.known.is_known(last)


def test_a_newer_save_is_not_hidden_by_the_end_of_an_older_one(spool: Spool, root: Path) -> None:
    """What is superseded is settled after its successor was taken up; that one stays known, not durable."""
    old = pin(spool, save(root, "last.pt", b"one"))
    newer = pin(spool, save(root, "last.pt", b"two", at=1))
    spool.release(old, durable_as=None)
    assert spool.known.is_known(newer.files[0])
    assert spool.known.durable_files() == {}
    spool.release(newer, durable_as=newer.id)
    assert spool.known.durable_files() == {newer.id: newer.files[0]}


def test_the_entry_of_a_pin_says_what_state_it_is_in(spool: Spool, root: Path) -> None:
    """The journal has the same words as everything else."""
    checkpoint = pin(spool, save(root, "x.pt", b"weights"))
    entry = json.loads((spool.home / "pins" / "3-1.json").read_bytes())
    assert entry == {
        "state": "pinned",
        "id": "3-1",
        "name": "x.pt",
        "saved_at": BORN,
        "files": [{"name": "x.pt", "size": 7, "mtime_ns": BORN}],
    }
    assert isinstance(checkpoint.state, Pinned)


def test_the_bytes_that_only_the_spool_keeps_are_counted(tmp_path: Path) -> None:
    """What the trainer has deleted, by links and by descriptors; not what still stands there."""
    disk = Hurt()
    spool = opened_spool(tmp_path, disk=disk)
    for name, size in (("stands.pt", 1), ("deleted.pt", 10), ("caught.pt", 100)):
        save(tmp_path, name, bytes(size))
        assert spool.catch(name) is not None
    disk.refuse["link"] = OSError(errno.EPERM, "not yours")
    pinned = pin(spool, save(tmp_path, "descriptor.pt", bytes(1000)))
    assert spool.held_bytes() == 0
    for name in ("deleted.pt", "caught.pt", "descriptor.pt"):
        (tmp_path / name).unlink()
    assert spool.held_bytes() == 1110
    spool.release(pinned, durable_as=None)
    assert spool.held_bytes() == 110
    spool.close()


def test_a_restored_file_takes_the_place_of_what_was_known_by_its_name(tmp_path: Path) -> None:
    """An older save of the name was here before; the new one is not to be uploaded again."""
    spool = opened_spool(tmp_path)
    older, newer = File("last.pt", 3, 1), File("last.pt", 4, 2)
    spool.known.settled(older, Id(1, 1))
    spool.known.restored(newer, Id(1, 2))
    assert (spool.known.is_known(older), spool.known.is_known(newer)) == (False, True)
    assert spool.known.durable_files() == {Id(1, 2): newer}
    spool.close()
