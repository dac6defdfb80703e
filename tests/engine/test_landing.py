"""Nothing in the trainer's own directory is replaced, removed or written but what was meant."""

import errno
from pathlib import Path

import pytest

from ckpt_sidecar.checkpoint import File
from ckpt_sidecar.landing import Landing, NoRoom
from tests.engine.support import BORN, Hurt, descriptors, save


@pytest.fixture
def disk() -> Hurt:
    """A disk that can be told to fail."""
    return Hurt()


@pytest.fixture
def landing(tmp_path: Path, disk: Hurt) -> Landing:
    """A watch dir to land in."""
    root = tmp_path / "watch"
    root.mkdir()
    return Landing(root, disk)


def leftovers(landing: Landing) -> list[str]:
    """Return what lies in the way of no trainer, and should not stay."""
    return [each.name for each in (landing.root / ".ckpt-sidecar" / "incoming").iterdir()]


def land(landing: Landing, name: str, content: bytes) -> File:
    """Restore some bytes."""
    with landing.incoming(len(content)) as incoming:
        incoming.write_at(0, memoryview(content))
        file = incoming.seal(name, BORN)
        incoming.place(name)
        return file


def test_a_file_lands_whole_with_its_time(landing: Landing) -> None:
    """What is placed has the bytes, the time at which it was saved, and one name only."""
    file = land(landing, "deep/er/x.pt", b"weights")
    path = landing.root / "deep/er/x.pt"
    assert file == File("deep/er/x.pt", 7, BORN) == landing.look("deep/er/x.pt")
    assert path.read_bytes() == b"weights"
    assert path.stat().st_nlink == 1
    assert leftovers(landing) == []


def test_an_empty_file_lands(landing: Landing) -> None:
    """No byte is no reason to fail."""
    assert land(landing, "x.pt", b"").size == 0


@pytest.mark.parametrize("links", [True, False])
def test_what_stands_at_the_name_is_never_replaced(landing: Landing, disk: Hurt, *, links: bool) -> None:
    """The trainer's file stays, on a file system with hard links and on one without."""
    if not links:
        disk.refuse["link"] = OSError(errno.EPERM, "no links here")
    save(landing.root, "x.pt", b"the trainer's")
    with pytest.raises(FileExistsError):
        land(landing, "x.pt", b"restored")
    assert (landing.root / "x.pt").read_bytes() == b"the trainer's"
    assert leftovers(landing) == []


def test_a_file_lands_where_no_link_can_be(landing: Landing, disk: Hurt) -> None:
    """On a file system without hard links the file is moved into place."""
    disk.refuse["link"] = OSError(errno.EPERM, "no links here")
    land(landing, "x.pt", b"weights")
    assert (landing.root / "x.pt").read_bytes() == b"weights"
    assert leftovers(landing) == []


@pytest.mark.parametrize("name", ["deep/x.pt", "deep/er/x.pt"])
def test_a_file_in_the_way_of_a_directory_is_said(landing: Landing, name: str) -> None:
    """It is not taken for a file that stands at the very name."""
    save(landing.root, "deep", b"a file")
    with pytest.raises(NotADirectoryError):
        land(landing, name, b"weights")
    assert (landing.root / "deep").read_bytes() == b"a file"
    assert leftovers(landing) == []


def test_too_little_room_is_said_before_the_first_byte(landing: Landing, disk: Hurt) -> None:
    """The message has both numbers, and nothing was begun."""
    disk.refuse["free"] = OSError()
    with pytest.raises(NoRoom, match=r"the checkpoint has 4 bytes, .* room for 3 "):
        landing.incoming(4)
    assert leftovers(landing) == []
    landing.incoming(3).__exit__()


def test_room_that_vanishes_leaves_nothing_behind(landing: Landing) -> None:
    """When the disk is too small after all, the half of a file that was made is taken away again."""
    before = descriptors()
    with pytest.raises(OSError, match=r"File too large|No space left"):
        landing._disk.create(landing.root / "huge", 2**62)
    assert list(landing.root.iterdir()) == []
    assert descriptors() == before


def test_a_restore_that_fails_leaves_nothing_behind(landing: Landing, disk: Hurt) -> None:
    """Whatever raises in the middle, the room is given back."""
    disk.refuse["write_at"] = OSError(errno.EIO, "broken")
    with pytest.raises(OSError, match="broken"):
        land(landing, "x.pt", b"weights")
    assert leftovers(landing) == []
    assert landing.look("x.pt") is None


@pytest.mark.fault("F4")
def test_what_a_killed_restore_left_is_cleared(landing: Landing) -> None:
    """Halves of files are out of sight, and the next start removes them."""
    landing.incoming(7)  # and the process is gone
    assert len(leftovers(landing)) == 1
    landing.clear()
    assert leftovers(landing) == []


@pytest.mark.fault("F5")
def test_what_is_set_aside_is_kept_for_ever(landing: Landing) -> None:
    """A torn file keeps its bytes, also when a process of the same pid sets another of that name aside."""
    kept = []
    for content in (b"torn", b"torn again", b"and again"):
        save(landing.root, "deep/x.pt", content)
        kept.append(Landing(landing.root).aside("deep/x.pt"))
        assert landing.look("deep/x.pt") is None
    assert [path.read_bytes() for path in kept] == [b"torn", b"torn again", b"and again"]
    assert all(path.name == "x.pt" for path in kept)


def test_only_the_very_file_is_deleted(landing: Landing) -> None:
    """Retention deletes a file by name, size and time; one that is another by now stays."""
    old = save(landing.root, "x.pt", b"old")
    newer = save(landing.root, "x.pt", b"new", at=1)
    assert not landing.delete(old)
    assert (landing.root / "x.pt").read_bytes() == b"new"
    assert landing.delete(newer)
    assert not landing.delete(newer)
    assert landing.look("x.pt") is None


def test_nothing_is_deleted_through_a_symlink(landing: Landing, tmp_path: Path) -> None:
    """A link in the way leads outside: what is there is not ours."""
    (tmp_path / "outside").mkdir()
    file = save(tmp_path / "outside", "x.pt", b"precious")
    (landing.root / "deep").symlink_to(tmp_path / "outside")
    assert not landing.delete(File("deep/x.pt", file.size, file.mtime_ns))
    assert (tmp_path / "outside" / "x.pt").exists()


@pytest.mark.fault("F8")
@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("x.pt", True),
        ("deep/er/x.pt", True),
        ("new/deep/x.pt", True),
        ("../x.pt", False),
        ("/etc/x.pt", False),
        ("link.pt", False),
        ("linked/x.pt", False),
        ("deep/linked/new/x.pt", False),
        (".ckpt-sidecar/x.pt", False),
        ("", False),
    ],
)
def test_inside_is_what_leads_through_no_symlink(
    landing: Landing, tmp_path: Path, name: str, *, inside: bool
) -> None:
    """A name that is not normal, or that leads through a link, is not inside the watch dir."""
    (landing.root / "deep").mkdir()
    for link in ("linked", "deep/linked"):
        (landing.root / link).symlink_to(tmp_path)
    (landing.root / "link.pt").symlink_to("x.pt")
    assert landing.inside(name) is inside


def test_a_watch_dir_behind_a_symlink_is_inside_itself(landing: Landing, tmp_path: Path) -> None:
    """Where the watch dir itself is reached through a link, that is the user's own doing."""
    (tmp_path / "link").symlink_to(landing.root)
    assert Landing(tmp_path / "link").inside("deep/x.pt")
