"""Trainers and their directories at their worst, as real processes against real servers.

What they completed becomes durable, byte for byte; nothing torn does; and the sidecar goes on.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

from ckpt_sidecar.bucket import MIB
from ckpt_sidecar.checkpoint import File, Id
from ckpt_sidecar.spool import Spool
from tests.conftest import ON_ONE
from tests.whole.running import HOME, SECONDS, Daemon, Target, archive, daemon, powerless, save, until

RSS_LIMIT = 160 * MIB  # of the daemon, whatever it has to do


# --- a trainer in a process of its own -------------------------------------------------------------------

# `checkpoint(n)` is the archive of the n-th save, several parts large; each tells its number.
MAKE = """
import io, os, sys, time, zipfile
def checkpoint(n, size=9 << 20):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(zipfile.ZipInfo(str(n)), n.to_bytes(8, "little") * (size // 8))
    return buffer.getvalue()
def place(path, data, temporary):
    with open(temporary, "wb") as file:
        file.write(data)
    os.rename(temporary, path)
"""
_MADE: dict[str, object] = {}
exec(MAKE, _MADE)  # noqa: S102 (the very function that the trainer has)


def checkpoint(n: int) -> bytes:
    """Return the n-th save of a trainer."""
    made = _MADE["checkpoint"](n)  # type: ignore[operator]
    assert isinstance(made, bytes)
    return made


def number_of(body: bytes) -> int:
    """Return which save of a trainer these bytes are; they are one, whole, and nothing else."""
    with zipfile.ZipFile(io.BytesIO(body)) as file:
        (name,) = file.namelist()
    assert body == checkpoint(int(name)), f"a mixture that begins as save {name}"
    return int(name)


class Trainer:
    """A trainer's process, which saves until it is told to stop; it then tells how often it has saved."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin: IO[str] = process.stdin

    def stop(self) -> int:
        """End it after the save it is at; return how often it has saved."""
        assert self._process.poll() is None, "it has ended by itself"
        said, _ = self._process.communicate("stop", timeout=SECONDS)
        assert self._process.returncode == 0
        return int(said)


@contextmanager
def trainer(body: str, *arguments: object) -> Iterator[Trainer]:
    """Run `body` again and again, `n` counting from 1 and the arguments in `sys.argv`, until told to stop."""
    loop = "import select\nn = 0\nwhile not select.select([sys.stdin], [], [], 0)[0]:\n    n += 1\n"
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    words = [sys.executable, "-c", f"{MAKE}\n{loop}{lines}\nprint(n)", *map(str, arguments)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Trainer(process)
    finally:
        process.kill()
        process.communicate()


def commits(it: Daemon, name: str) -> int:
    """How often a save of that name has become durable."""
    return len(it.events("checkpoint_committed", name=name))


def watched(it: Daemon, enough: Callable[[], bool], name: str, seen: list[int]) -> None:
    """Read the object until there is enough: it is always one whole save, none older than those seen."""

    def look() -> bool:
        body = it.target.read(name)
        if body is not None:
            seen.append(number_of(body))
            assert seen == sorted(seen)
        return enough()

    it.until(look, name)


# --- faster than we are ----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.fault("A5")
@ON_ONE
def test_a_trainer_that_rotates_faster_than_we_upload_loses_nothing(watch: Path, target: Target) -> None:
    """It keeps one file, and saves the next before the last is sent: the pins hold what it has deleted."""
    rotate = """
place(f"{sys.argv[1]}/{n}.pt", checkpoint(n), f"{sys.argv[1]}/trainers.tmp")
if n > 1: os.remove(f"{sys.argv[1]}/{n - 1}.pt")
time.sleep(0.02)  # a step of training
"""
    with daemon(watch, target, "--workers", "1") as it:
        it.wait_ready()
        with trainer(rotate, watch) as training:
            it.until(lambda: len(it.events("checkpoint_pinned")) >= 15)
            saved = training.stop()
        assert [path.name for path in watch.glob("*.pt")] == [f"{saved}.pt"]
        names = {f"{n}.pt" for n in range(1, saved + 1)}
        it.until(lambda: set(target.listed()) == names, "all are durable")
        assert it.stop() == 0
    assert [number_of(target.read(f"{n}.pt") or b"") for n in range(1, saved + 1)] == list(
        range(1, saved + 1)
    )
    assert list((watch / HOME / "pins").iterdir()) == []


@pytest.mark.long
@pytest.mark.fault("A6")
@ON_ONE
def test_a_name_that_is_replaced_faster_than_we_upload_starves_nobody(watch: Path, target: Target) -> None:
    """While it goes on: its uploads finish, one after the other, newer each time; others become durable."""
    replace = 'place(f"{sys.argv[1]}/last.pt", checkpoint(n), f"{sys.argv[1]}/trainers.tmp")'
    seen: list[int] = []
    with daemon(watch, target, "--workers", "2") as it:
        it.wait_ready()
        with trainer(replace, watch) as training:
            it.until(lambda: commits(it, "last.pt") >= 2)
            save(watch / "other.pt", archive())
            it.wait_durable("other.pt")
            enough = commits(it, "last.pt") + 3
            watched(it, lambda: commits(it, "last.pt") >= enough, "last.pt", seen)
            saved = training.stop()
        it.until(lambda: target.holds("last.pt", checkpoint(saved)), "the last save")
        it.until(lambda: not it.status()["queue"], "nothing is left")
        metrics = it.metrics()
        outcomes = [
            metrics[f'ckpt_sidecar_checkpoints_total{{outcome="{word}"}}']
            for word in ("committed", "superseded")
        ]
        assert sum(outcomes) == len(it.events("checkpoint_pinned"))
        assert outcomes[1] == len(it.events("checkpoint_superseded")) > 0
        assert it.stop() == 0
    assert len(set(seen)) > 1
    assert set(target.listed()) == {"last.pt", "other.pt"}


@pytest.mark.long
@pytest.mark.fault("A7")
@ON_ONE
def test_a_name_that_is_rewritten_in_place_in_a_loop_is_never_torn(watch: Path, target: Target) -> None:
    """Uploads are abandoned, again and again; what stands in the bucket is always one whole save."""
    rewrite = """
data = checkpoint(n)  # a step of training: meanwhile the last save is whole, and on its way
time.sleep(0.03)
with open(f"{sys.argv[1]}/last.pt", "wb") as file:
    for start in range(0, len(data), 1 << 20):
        file.write(data[start:start + (1 << 20)])
        file.flush()
        time.sleep(0.01)
"""
    seen: list[int] = []
    with daemon(watch, target, "--workers", "1") as it:
        it.wait_ready()
        save(watch / "last.pt", checkpoint(0))
        it.wait_durable("last.pt")
        with trainer(rewrite, watch) as training:
            watched(it, lambda: len(it.events("checkpoint_changed")) >= 3, "last.pt", seen)
            saved = training.stop()
        it.until(lambda: target.holds("last.pt", checkpoint(saved)), "the last save")
        assert it.stop() == 0
    assert seen
    assert list((watch / HOME / "pins").iterdir()) == []


def whole(body: bytes | None) -> bool:
    """Is it a whole archive, to the last bit of its records?"""
    try:
        with zipfile.ZipFile(io.BytesIO(body or b"")) as file:
            return file.testzip() is None
    except zipfile.BadZipFile:
        return False


@pytest.mark.long
@pytest.mark.fault("A15")
@ON_ONE
@pytest.mark.parametrize("how", ["renamed into place", "in place"])
def test_of_two_trainers_that_save_one_name_the_last_whole_save_wins(
    watch: Path, target: Target, how: str
) -> None:
    """Two processes at once, each with its own temporary name, or both into the very file."""
    body = """
data = checkpoint(2 * n + int(sys.argv[2]), (8 << 20) + 4096 * int(sys.argv[2]))
if sys.argv[3] == "in place":
    with open(f"{sys.argv[1]}/last.pt", "wb") as file:
        file.write(data)
else:
    place(f"{sys.argv[1]}/last.pt", data, f"{sys.argv[1]}/{sys.argv[2]}.tmp")
time.sleep(0.1)
"""
    with daemon(watch, target) as it:
        it.wait_ready()
        with trainer(body, watch, 0, how) as one, trainer(body, watch, 1, how) as other:
            it.until(lambda: commits(it, "last.pt") >= 3)
            stood = target.read("last.pt")
            other.stop()
            one.stop()
        assert whole(stood)
        left = (watch / "last.pt").read_bytes()
        if how == "renamed into place" or whole(left):
            it.until(lambda: target.holds("last.pt", left), "the last whole save")
        last = save(watch / "last.pt", checkpoint(9))
        it.until(lambda: target.holds("last.pt", last), "the last whole save")
        assert it.stop() == 0


@pytest.mark.long
@pytest.mark.fault("A3")
@ON_ONE
def test_a_trainer_that_dies_while_it_writes_leaves_nothing_that_is_restored(
    tmp_path: Path, watch: Path, target: Target
) -> None:
    """Reported, never sent, and not what the next node gets; the next whole save of that name is taken."""
    die = """
with open(f"{sys.argv[1]}/two.pt", "wb") as file:
    file.write(checkpoint(2)[:5000000])
    file.flush()
    os.kill(os.getpid(), 9)
"""
    with daemon(watch, target, "--attempt", "a") as it:
        it.wait_ready()
        one = save(watch / "one.pt", checkpoint(1))
        it.wait_durable("one.pt")
        with trainer(die, watch):
            torn = it.wait_said("torn", name="two.pt")
        assert torn["reason"].startswith("the end record of the zip archive is missing")
        assert it.metrics()['ckpt_sidecar_checkpoints_total{outcome="rejected"}'] == 1
        assert target.names() == {"one.pt"}
        assert it.stop() == 0
    with daemon(tmp_path / "next", target, "--attempt", "b") as it:
        it.wait_ready()
        assert (tmp_path / "next/one.pt").read_bytes() == one
        assert not (tmp_path / "next/two.pt").exists()
        assert it.stop() == 0
    with daemon(watch, target, "--attempt", "c") as it:
        it.wait_ready()
        (watch / "two.pt").write_bytes(checkpoint(2))
        it.wait_durable("two.pt")
        assert it.stop() == 0


# --- another user's files --------------------------------------------------------------------------------


@pytest.mark.fault("A18")
@pytest.mark.skipif(
    os.geteuid() != 0 or powerless() is None, reason="needs root to give files away, and to lose its power"
)
@pytest.mark.skipif(
    Path("/proc/sys/fs/protected_hardlinks").read_text().strip() == "0",
    reason="this kernel lets anybody link to anybody's files (fs.protected_hardlinks is 0)",
)
@ON_ONE
def test_another_users_readable_files_are_served_through_a_descriptor(watch: Path, target: Target) -> None:
    """That no link holds them is said before ready; they arrive although they are deleted at once."""
    bodies: dict[str, bytes] = {}
    for name in ("before.pt", "after.pt"):
        bodies[name] = save(watch.parent / name, checkpoint(len(bodies)), age=60)
        (watch.parent / name).chmod(0o644)
        os.chown(watch.parent / name, 65534, 65534)
    (watch.parent / "before.pt").rename(watch / "before.pt")
    with daemon(watch, target, "--workers", "1", before=powerless() or ()) as it:
        said = it.wait_said("pinned_by_descriptor", name="before.pt")
        assert said["reason"] == "no hard link could be made"
        (watch / "before.pt").unlink()
        it.wait_said("ready")
        assert [each["event"] for each in it.events()].index("pinned_by_descriptor") < [
            each["event"] for each in it.events()
        ].index("ready")
        (watch.parent / "after.pt").rename(watch / "after.pt")
        it.wait_said("pinned_by_descriptor", name="after.pt")
        (watch / "after.pt").unlink()
        for name, body in bodies.items():
            it.wait_durable(name, body)
        assert it.stop() == 0


# --- events that do not come -----------------------------------------------------------------------------


@pytest.mark.fault("B1")
@ON_ONE
def test_a_queue_that_overflows_for_real_costs_nothing(watch: Path, target: Target) -> None:
    """The reader is held up while more happens than the kernel keeps: listed at once, nothing is missed."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 200_000:
        pytest.skip(f"this kernel keeps {limit} events: a burst would have to be larger than that")
    with daemon(watch, target, "--rescan-every", "3600") as it:
        it.wait_ready()
        it.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, it.process.pid, os.WSTOPPED)
        (watch / "a.tmp").touch()
        for _ in range(limit):
            (watch / "a.tmp").rename(watch / "b.tmp")
            (watch / "b.tmp").rename(watch / "a.tmp")
        bodies = {f"{n}.pt": save(watch / f"{n}.pt", archive(f"{n}")) for n in range(30)}
        (watch / "deep").mkdir()
        bodies["deep/x.pt"] = save(watch / "deep/x.pt", archive("deep"))
        it.process.send_signal(signal.SIGCONT)
        for name, body in bodies.items():
            it.wait_durable(name, body)
        assert it.metrics()['ckpt_sidecar_rescans_total{reason="overflow"}'] >= 1
        assert it.metrics()['ckpt_sidecar_rescans_total{reason="interval"}'] == 0
        save(watch / "deep/y.pt", archive("events come again"))
        it.wait_durable("deep/y.pt")
        assert it.stop() == 0
    assert sorted(each["name"] for each in it.events("checkpoint_committed")) == sorted(
        [*bodies, "deep/y.pt"]
    )


def limited(limit: str, value: int) -> Sequence[str]:
    """Return what runs a command in a user namespace that has this limit; skipped where none is to be had."""
    script = f'echo {value} > /proc/sys/user/{limit} && exec "$@"'
    words = ("unshare", "--user", "--map-root-user", "sh", "-c", script, "sh")
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], check=False).returncode:
        pytest.skip("no user namespace with limits of its own is to be had here")
    return words


WATCHES = "raise the sysctl fs.inotify.max_user_watches"


@pytest.mark.fault("B2", "B4")
@pytest.mark.parametrize(
    ("limit", "value", "mend"),
    [
        ("max_inotify_instances", 0, "raise the sysctl fs.inotify.max_user_instances"),
        pytest.param("max_inotify_watches", 0, WATCHES, marks=pytest.mark.long),
        pytest.param("max_inotify_watches", 1, WATCHES, marks=pytest.mark.long),
    ],
)
@ON_ONE
def test_without_inotify_the_listing_serves_and_the_mend_is_said(
    watch: Path, target: Target, limit: str, value: int, mend: str
) -> None:
    """No instance, no watch, or one for the root and none for what is below."""
    (watch / "deep").mkdir()
    with daemon(watch, target, before=limited(limit, value)) as it:
        it.wait_ready()
        it.wait_said("watch_lost", reason=mend)
        for name in ("x.pt", "deep/y.pt", "made/later/z.pt"):
            save(watch / name, archive(name))
            it.wait_durable(name)
        with (watch / "deep/slow.pt").open("wb") as file:
            file.write(archive("slow")[:-10])
            file.flush()
            it.wait_rescans(2)
            assert target.read("deep/slow.pt") is None
            file.write(archive("slow")[-10:])
        it.wait_durable("deep/slow.pt")
        it.wait_rescans(3)
        assert len(it.events("watch_lost")) == 1
        assert it.stop() == 0


@pytest.mark.long
@pytest.mark.fault("B8")
@pytest.mark.skipif(powerless() is None, reason="root's power cannot be dropped here")
@ON_ONE
def test_a_directory_that_is_closed_to_us_while_we_watch_is_said_once(watch: Path, target: Target) -> None:
    """The rest is served; what was saved in it meanwhile comes once it is open again."""
    save(watch / "closed/one.pt", archive("one"))
    with daemon(watch, target, before=powerless() or ()) as it:
        it.wait_durable("closed/one.pt", archive("one"))
        (watch / "closed").chmod(0)
        try:
            save(watch / "closed/two.pt", archive("two"))
            save(watch / "other.pt", archive("other"))
            it.wait_durable("other.pt")
            it.wait_said("ignored", name="closed", reason="cannot be listed: Permission denied")
            it.wait_rescans(3)
            assert len(it.events("ignored")) == 1
        finally:
            (watch / "closed").chmod(0o700)
        it.wait_durable("closed/two.pt")
        assert it.stop() == 0
    assert commits(it, "closed/one.pt") == 1


# --- the directory goes, and comes back ------------------------------------------------------------------


def under_way(it: Daemon, name: str) -> None:
    """Wait until some of it has been sent, and not yet all."""
    it.until(
        lambda: any(each["name"] == name and each["sent"] for each in it.status()["queue"]), f"{name}: sent"
    )


@pytest.mark.fault("B3")
@ON_ONE
def test_a_watch_dir_that_is_removed_and_made_again_goes_on_under_the_next_ids(
    watch: Path, target: Target
) -> None:
    """Spool and all, in the middle of an upload: that is finished. A kill later nothing goes backwards."""
    with daemon(watch, target, "--workers", "1") as it:
        it.wait_ready()
        save(watch / "one.pt", archive("one"))
        it.wait_durable("one.pt")
        big = save(watch / "big.pt", os.urandom(48 * MIB))
        under_way(it, "big.pt")
        shutil.rmtree(watch)
        it.wait_said("watch_lost", reason="the watch directory ")
        watch.mkdir()
        save(watch / "two.pt", archive("two"))
        it.wait_durable("two.pt")
        it.wait_durable("big.pt", big)
        it.until(lambda: target.listed() == ["two.pt", "big.pt", "one.pt"], "the order of the saves")
        it.wait_ready()  # its record is there again, or nobody would find it
        save(watch / "three.pt", archive("three"))
        it.wait_durable("three.pt")
        it.process.kill()
        it.process.wait()
    save(watch / "four.pt", archive("four"))
    with daemon(watch, target) as it:
        it.wait_ready()
        it.wait_durable("four.pt")
        assert it.stop() == 0
    assert target.listed() == ["four.pt", "three.pt", "two.pt", "big.pt", "one.pt"]


class Mounts:
    """A mount namespace of its own; paths in it are seen from here through /proc."""

    def __init__(self, holder: int) -> None:
        self._holder = holder
        self.enter = ("nsenter", f"--mount=/proc/{holder}/ns/mnt")

    def path(self, path: Path) -> Path:
        """Where that path leads inside; it leads there from inside as well."""
        return Path(f"/proc/{self._holder}/root") / path.relative_to("/")

    def tmpfs(self, path: Path, options: str) -> None:
        """Mount a tmpfs there."""
        self._run("mount", "-t", "tmpfs", "-o", options, "none", str(path))

    def unmount(self, path: Path) -> None:
        """Take it away, whoever still uses it."""
        self._run("umount", "--lazy", str(path))

    def _run(self, *words: str) -> None:
        subprocess.run([*self.enter, *words], check=True, timeout=SECONDS)


@pytest.fixture
def mounts() -> Iterator[Mounts]:
    """A mount namespace that goes with the test, and all that is mounted in it; skipped where none can be."""
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo here && exec sleep infinity"]
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("needs root, unshare and nsenter, for mounts that nobody else sees")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            pytest.skip("this machine gives no mount namespace")
        yield Mounts(process.pid)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.long
@pytest.mark.fault("B3")
@ON_ONE
def test_a_watch_dir_that_is_mounted_over_is_served_where_it_leads_to(
    tmp_path: Path, watch: Path, target: Target, mounts: Mounts
) -> None:
    """By a mount that comes, and one that goes again: what is being sent is finished, the order holds."""
    inside = mounts.path(watch)
    with daemon(inside, target, "--workers", "1", before=mounts.enter, log=tmp_path / "log") as it:
        it.wait_ready()
        save(inside / "one.pt", archive("one"))
        it.wait_durable("one.pt")
        big = save(inside / "big.pt", os.urandom(48 * MIB))
        under_way(it, "big.pt")
        mounts.tmpfs(watch, "size=16m")
        save(inside / "two.pt", archive("two"))
        it.wait_durable("two.pt")
        it.wait_durable("big.pt", big)
        it.wait_ready()
        mounts.unmount(watch)
        assert sorted(path.name for path in inside.glob("*.pt")) == ["big.pt", "one.pt"]
        save(inside / "three.pt", archive("three"))
        it.wait_durable("three.pt")
        assert len(it.events("watch_lost")) >= 1
        assert it.stop() == 0
    assert target.listed() == ["three.pt", "two.pt", "big.pt", "one.pt"]
    assert sorted(each["name"] for each in it.events("checkpoint_committed")) == [
        "big.pt",
        "one.pt",
        "three.pt",
        "two.pt",
    ]


# --- a full disk -----------------------------------------------------------------------------------------


@pytest.fixture
def inside(watch: Path, mounts: Mounts) -> Path:
    """The watch dir, on a small disk of its own."""
    mounts.tmpfs(watch, "size=32m,nr_inodes=100")
    return mounts.path(watch)


@pytest.mark.long
@pytest.mark.fault("E4")
@ON_ONE
def test_on_a_disk_without_a_byte_left_what_is_whole_is_pinned_and_sent(
    tmp_path: Path, inside: Path, target: Target, mounts: Mounts
) -> None:
    """No journal can be written, and that is said; the trainer's torn save is not sent, nothing is kept."""
    with daemon(inside, target, before=mounts.enter, log=tmp_path / "log") as it:
        it.wait_ready()
        big = save(tmp_path / "big.pt", os.urandom(20 * MIB))
        small = archive("small")
        (inside / "big.tmp").write_bytes(big)
        (inside / "small.tmp").write_bytes(small)
        fill(inside / "filled")
        for name in ("big", "small"):
            (inside / f"{name}.tmp").rename(inside / f"{name}.pt")
        with pytest.raises(OSError, match="No space left"), (inside / "torn.pt").open("wb") as file:
            file.write(checkpoint(1))
        it.wait_durable("big.pt", big)
        it.wait_durable("small.pt", small)
        failed = it.wait_said("failed", reason="disk", error="No space left on device")
        assert failed["hint"] == "make room on the spool's disk"
        assert it.wait_said("torn", name="torn.pt")
        assert it.metrics()["ckpt_sidecar_spool_held_bytes"] == 0
        assert free(inside) < MIB
        (inside / "filled").unlink()
        save(inside / "after.pt", archive("after"))
        it.wait_durable("after.pt")
        assert it.stop() == 0
    assert target.names() == {"big.pt", "small.pt", "after.pt"}


@pytest.mark.long
@pytest.mark.fault("E4")
@ON_ONE
def test_on_a_disk_without_a_byte_left_a_restart_sends_what_is_there(
    tmp_path: Path, inside: Path, target: Target, mounts: Mounts
) -> None:
    """The trainer has filled it, and somebody restarts the pod: what is whole is durable, and makes room."""
    with daemon(inside, target, before=mounts.enter, log=tmp_path / "log") as it:
        it.wait_ready()
        it.process.kill()
        it.process.wait()
    big = save(inside / "big.pt", os.urandom(20 * MIB))
    small = save(inside / "small.pt", archive("small"))
    fill(inside / "filled")
    with daemon(inside, target, "--keep-local", "1", before=mounts.enter, log=tmp_path / "again") as it:
        it.wait_durable("big.pt", big)
        it.wait_durable("small.pt", small)
        it.wait_ready()
        it.wait_said("deleted", name="big.pt")
        assert it.stop() == 0
    assert free(inside) >= 20 * MIB
    assert target.listed() == ["small.pt", "big.pt"]


@pytest.mark.fault("E4")
@ON_ONE
def test_on_a_disk_without_an_inode_left_a_descriptor_holds_what_is_sent(
    tmp_path: Path, inside: Path, target: Target, mounts: Mounts
) -> None:
    """No link can be made, and that is said; although the trainer deletes the file at once, it arrives."""
    with daemon(inside, target, before=mounts.enter, log=tmp_path / "log") as it:
        it.wait_ready()
        (inside / "x.tmp").write_bytes(checkpoint(1))
        with suppress(OSError):
            for n in range(200):
                (inside / f"{n}.filling").touch()
        assert os.statvfs(inside).f_favail == 0
        (inside / "x.tmp").rename(inside / "x.pt")
        it.wait_said("pinned_by_descriptor", name="x.pt")
        (inside / "x.pt").unlink()
        it.wait_durable("x.pt", checkpoint(1))
        for path in inside.glob("*.filling"):
            path.unlink()
        save(inside / "after.pt", archive("after"))
        it.wait_durable("after.pt")
        assert len(it.events("pinned_by_descriptor")) == 1
        assert it.stop() == 0


def fill(path: Path) -> None:
    """Write until the disk is full, to its last byte."""
    with path.open("wb", buffering=0) as file:
        for size in (MIB, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def free(path: Path) -> int:
    """Bytes that are free there."""
    return shutil.disk_usage(path).free


# --- an old directory ------------------------------------------------------------------------------------

OLD = 50_000


def old_files(watch: Path) -> list[File]:
    """Make many old checkpoints."""
    found = []
    for n in range(OLD):
        path = watch / f"{n // 1000}/{n}.pt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"weights %d" % n)
        os.utime(path, (1_600_000_000 + n, 1_600_000_000 + n))
        status = path.stat()
        found.append(File(str(path.relative_to(watch)), status.st_size, status.st_mtime_ns))
    return found


def peak_rss(it: Daemon) -> int:
    """Return the most memory that the process has had so far, in bytes."""
    status = Path(f"/proc/{it.process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.fault("B6")
@ON_ONE
def test_fifty_thousand_durable_files_are_not_sent_again(watch: Path, target: Target) -> None:
    """A restart is ready soon, in little memory, and serves what is saved then."""
    with daemon(watch, target) as it:
        it.wait_durable("first.pt", save(watch / "first.pt", archive()))
        assert it.stop() == 0
    files = old_files(watch)
    spool = Spool(watch)
    spool.open(new_id="another's")
    for n, file in enumerate(files, 1):
        spool.known.settled(file, Id(0, n))  # older than the one that the manifest lists
    spool.close()
    with daemon(watch, target) as it:
        until(it.ready, seconds=200)
        save(watch / "new.pt", archive())
        it.wait_durable("new.pt")
        assert it.metrics()["ckpt_sidecar_uploaded_bytes_total"] == len(archive())
        assert peak_rss(it) < RSS_LIMIT
        assert it.stop() == 0  # with one more listing
    assert target.names() == {"first.pt", "new.pt"}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.fault("B6")
@ON_ONE
def test_a_first_start_on_fifty_thousand_files_is_ready_soon(watch: Path, target: Target) -> None:
    """All of them are queued, durably; the newest goes first, and a new save before all of them."""
    old_files(watch)
    with daemon(watch, target) as it:
        until(it.ready, seconds=400)
        body = save(watch / "new.pt", archive())
        until(lambda: target.holds("new.pt", body), "the newest first", seconds=120)
        assert target.listed()[0] == "new.pt"
        assert it.status()["lag_seconds"] > 0
        assert peak_rss(it) < 2 * RSS_LIMIT
        it.process.kill()
    assert len(json.loads((watch / HOME / "spool.json").read_bytes())["spool"]) == 32
