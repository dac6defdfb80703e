"""Whatever cuts a restore, or stands in its way: no half of a file, nothing lost, nothing outside touched."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ckpt_sidecar.disk import Disk
from ckpt_sidecar.landing import Landing, NoRoom
from ckpt_sidecar.restorer import NothingRestored
from tests.engine.support import save
from tests.engine.test_restorer import Rig

CALLS = [name for name, each in vars(Disk).items() if callable(each) and not name.startswith("_")]
WEIGHTS, TORN = b"the weights, in several parts", b"the wei"


class Killed(BaseException):
    """The process is gone: nothing after this happens."""


class Dying(Disk):
    """The real file system, with trouble at the `at`-th call: before it, in the middle of it or after it.

    A kill is the end: no later call happens either. An I/O error hits that call alone.
    """

    def __init__(
        self, at: int | None = None, when: str = "before", trouble: type[BaseException] = Killed
    ) -> None:
        self.calls: list[str] = []
        self.at = at
        self.when = when
        self.trouble = trouble
        self.dead = False

    def __getattribute__(self, name: str) -> Any:
        call = super().__getattribute__(name)
        return self._counted(name, call) if name in CALLS else call

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            if self.dead:
                raise Killed
            self.calls.append(name)
            if len(self.calls) - 1 != self.at:
                return call(*arguments, **more)
            self.dead = self.trouble is Killed
            if self.when == "in" and name == "write_at":
                descriptor, offset, view = arguments
                os.pwrite(descriptor, view[: len(view) // 2], offset)
            if self.when == "after":
                call(*arguments, **more)
            raise self.trouble(errno.EIO, "broken")

        return counted


SCENES = {"nothing there": None, "a torn file there": TORN}


async def rig_of(root: Path, scene: str) -> Rig:
    """A bucket with a checkpoint in a directory that does not exist yet, or that holds a torn file."""
    rig = Rig(root)
    await rig.commit(1, "deep/er/last.pt", WEIGHTS)
    torn = SCENES[scene]
    if torn is not None:
        save(root, "deep/er/last.pt", torn, at=9)
    return rig


async def undisturbed(root: Path, scene: str) -> list[str]:
    """The calls of a restore that nothing disturbs."""
    rig, disk = await rig_of(root, scene), Dying()
    rig.landing = Landing(root, disk)
    rig.landing.clear()
    await rig.restore()
    assert rig.files() == {"deep/er/last.pt": WEIGHTS}
    return disk.calls


@pytest.mark.fault("F4")
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("trouble", [Killed, OSError])
async def test_after_trouble_at_any_call_of_the_disk_the_next_start_completes_it(
    tmp_path: Path, scene: str, trouble: type[BaseException]
) -> None:
    """Under the name is all of it or what stood there; torn bytes are kept; no leftover outlives a start."""
    calls = await undisturbed(tmp_path / "undisturbed", scene)
    assert {"create", "write_at", "finish", "link", "sync_dir", "unlink"} <= set(calls)
    for at, name in enumerate(calls):
        for when in ("before", "in", "after"):
            root = tmp_path / f"{at}-{when}"
            rig = await rig_of(root, scene)
            await restore_through(rig, Dying(at, when, trouble))
            check_seen(rig, scene)

            rig.landing = Landing(root)
            await restore_through(rig, Disk())
            assert rig.files() == {"deep/er/last.pt": WEIGHTS}, (at, name, when)
            assert (root / "deep/er/last.pt").stat().st_nlink == 1
            check_seen(rig, scene)
            assert rig.hidden("incoming") == []


async def restore_through(rig: Rig, disk: Disk) -> None:
    """A start, up to the end of its restore or of itself."""
    rig.landing = Landing(rig.root, disk)
    with suppress(Killed, OSError, NothingRestored):
        rig.landing.clear()
        await rig.restore()


def check_seen(rig: Rig, scene: str) -> None:
    """Nothing but the whole checkpoint or what stood there is seen; that is kept once it is not seen."""
    torn, seen = SCENES[scene], rig.files().get("deep/er/last.pt")
    assert len(rig.files()) == (seen is not None)
    assert seen in (None, torn, WEIGHTS)
    assert rig.hidden("aside") == ([] if torn in (None, seen) else [torn])


# --- room ----------------------------------------------------------------------------------------------


@pytest.mark.fault("F6")
async def test_a_checkpoint_that_the_disk_cannot_hold_is_said_with_both_numbers(tmp_path: Path) -> None:
    """By the file system's own account, before a byte is asked for; an older one is not taken instead."""
    rig = Rig(tmp_path / "watch")
    await rig.commit(1)
    entry = await rig.commit(2)
    free = Disk().free_bytes(rig.root)
    kept = rig.memory.objects["job/2.pt"]
    huge = type(kept.ref)(kept.ref.key, free * 2, kept.ref.etag, kept.ref.crc64nvme, None, kept.ref.metadata)
    rig.memory.objects["job/2.pt"] = type(kept)(huge, kept.body)
    await rig.ledger.commit(type(entry)(entry.id, entry.name, (huge,), entry.saved_at, entry.stored_at))
    asked: list[None] = []

    async def ask() -> None:
        asked.append(None)

    rig.bucket.on("get_range", before=ask)
    with pytest.raises(NoRoom, match=rf"the checkpoint has {free * 2} bytes, .* room for \d+ "):
        await rig.restore()
    assert (asked, rig.files(), rig.hidden("incoming")) == ([], {}, [])


# --- the trainer is early ------------------------------------------------------------------------------


@pytest.mark.fault("F9")
@pytest.mark.parametrize("verb", ["head", "get_range"])
async def test_what_the_trainer_saves_at_any_moment_of_the_restore_stays(tmp_path: Path, verb: str) -> None:
    """Before the first answer or in the middle of the download, over nothing or over a torn file."""
    for scene in SCENES:
        rig = await rig_of(tmp_path / scene, scene)

        async def write(rig: Rig = rig) -> None:
            save(rig.root, "deep/er/last.pt", b"the trainer's", at=50)

        rig.bucket.on(verb, before=write)
        assert (await rig.restore()).word == "kept"
        assert rig.files() == {"deep/er/last.pt": b"the trainer's"}
        assert (rig.hidden("aside"), rig.hidden("incoming"), rig.known) == ([], [], {})


@pytest.mark.fault("F9")
async def test_what_the_trainer_saves_under_another_name_stands_beside_it(tmp_path: Path) -> None:
    """Both survive."""
    rig = await rig_of(tmp_path / "watch", "nothing there")

    async def write() -> None:
        save(rig.root, "deep/er/1.pt", b"the trainer's", at=50)

    rig.bucket.on("get_range", before=write)
    await rig.restore()
    assert rig.files() == {"deep/er/last.pt": WEIGHTS, "deep/er/1.pt": b"the trainer's"}


# --- what is in the way --------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    """Make a pipe; to open it would wait for ever."""
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    """Make a socket."""
    os.mknod(path, stat.S_IFSOCK | 0o600)


def zeros(path: Path) -> None:
    """Make a device without an end."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root may make devices")


def full_directory(path: Path) -> None:
    """Make a directory in which the trainer has files."""
    save(path, "shard.pt", b"the trainer's")


def dangling(path: Path) -> None:
    """Make a link to nothing."""
    path.symlink_to("nowhere")


def looping(path: Path) -> None:
    """Make a link to itself."""
    path.symlink_to(path.name)


@pytest.mark.fault("F8")
@pytest.mark.parametrize("obstacle", [fifo, unix_socket, zeros, full_directory, dangling, looping])
@pytest.mark.parametrize("early", [True, False])
async def test_what_is_no_file_at_the_name_is_left_alone(
    tmp_path: Path, obstacle: Callable[[Path], None], *, early: bool
) -> None:
    """Never opened, moved or replaced, whether it was there or comes in the middle: the next one is taken."""
    rig = Rig(tmp_path / "watch")
    await rig.commit(1)
    await rig.commit(2, "x.pt", WEIGHTS)
    path = rig.root / "x.pt"

    async def put() -> None:
        obstacle(path)

    if early:
        await put()
        rig.bucket.fail("get_range", AssertionError("it is refused before a byte is asked for"), "x.pt")
    else:
        rig.bucket.on("get_range", "x.pt", before=put)
    await rig.restore()
    assert not stat.S_ISREG(path.lstat().st_mode)
    assert (rig.root / "1.pt").read_bytes() == b"weights of 1"
    assert (rig.hidden("aside"), rig.hidden("incoming")) == ([], [])
    assert "1-2 " in rig.fell_back[0]
    if obstacle is full_directory:
        assert (path / "shard.pt").read_bytes() == b"the trainer's"


@pytest.mark.fault("F8")
async def test_a_pipe_of_the_very_size_and_time_is_not_opened(tmp_path: Path) -> None:
    """A manifest may say of an empty checkpoint just what the pipe shows: a look at it would never end."""
    rig = Rig(tmp_path / "watch")
    await rig.commit(1)
    entry = await rig.commit(2, "x.pt", b"x")
    os.mkfifo(rig.root / "x.pt")
    empty = type(entry.objects[0])(entry.objects[0].key, 0, entry.objects[0].etag, "AAAAAAAAAAA=")
    at = (rig.root / "x.pt").lstat().st_mtime_ns
    await rig.ledger.commit(type(entry)(type(entry.id)(1, 3), "x.pt", (empty,), at, at))
    await rig.restore()
    assert (rig.root / "1.pt").read_bytes() == b"weights of 1"


def links(rig: Rig, outside: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield ways to put a symlink to the outside in the way of `deep/er/x.pt`."""
    yield "deep", lambda: (rig.root / "deep").symlink_to(outside)
    yield "deep/er", lambda: (rig.root / "deep/er").symlink_to(outside)
    yield "deep/er/x.pt", lambda: (rig.root / "deep/er/x.pt").symlink_to(outside / "x.pt")


@pytest.mark.fault("F8")
@pytest.mark.parametrize("n", range(3))
async def test_a_symlink_that_comes_in_the_middle_is_not_followed(tmp_path: Path, n: int) -> None:
    """Whoever puts it there while the bytes arrive: nothing outside is made, replaced or removed."""
    outside = tmp_path / "outside"
    save(outside, "x.pt", b"precious")
    save(outside, "er/x.pt", b"precious")
    rig = Rig(tmp_path / "watch")
    await rig.commit(1)
    await rig.commit(2, "deep/er/x.pt", WEIGHTS)
    name, make = list(links(rig, outside))[n]

    async def put() -> None:
        (rig.root / name).parent.mkdir(parents=True, exist_ok=True)
        make()

    rig.bucket.on("get_range", "x.pt", before=put)
    await rig.restore()
    assert [(each.relative_to(outside).as_posix(), each.read_bytes()) for each in below(outside)] == [
        ("er/x.pt", b"precious"),
        ("x.pt", b"precious"),
    ]
    assert (rig.root / "1.pt").read_bytes() == b"weights of 1"
    assert rig.fell_back == ["1-2 a symlink is in the way inside the watch dir"]
    assert rig.hidden("incoming") == []


def below(folder: Path) -> list[Path]:
    """All files in it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.fault("F8")
async def test_another_case_or_form_of_a_name_is_another_file(tmp_path: Path) -> None:
    """The trainer's own files that only look alike stay as they are, beside the restored one."""
    rig = Rig(tmp_path / "watch")
    await rig.commit(1, "Modell-\u00fc.pt", WEIGHTS)
    others = {"modell-\u00fc.pt": b"another case", "Modell-u\u0308.pt": b"another form"}
    for name, content in others.items():
        save(rig.root, name, content)
    if len(rig.files()) < len(others) or (rig.root / "Modell-\u00fc.pt").exists():
        pytest.skip("this file system folds names")
    await rig.restore()
    assert rig.files() == {"Modell-\u00fc.pt": WEIGHTS} | others


@pytest.mark.fault("F8")
def test_a_name_never_means_the_spool_by_another_case(tmp_path: Path) -> None:
    """Also where the file system would take it for that: the name is refused by itself."""
    landing = Landing(tmp_path)
    save(tmp_path, ".ckpt-sidecar/spool.json", b"{}")
    for name in (".CKPT-SIDECAR/spool.json", ".Ckpt-Sidecar/pins/1-1/x.pt", "a/.cKPT-sidecar/x.pt"):
        assert not landing.inside(name)
