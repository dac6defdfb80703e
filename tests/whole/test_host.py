"""The process and its host: bugs, limits, a stopped or jumping clock, a log that nobody reads."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import ckpt_sidecar
from ckpt_sidecar.bucket import MIB
from tests.conftest import ON_ONE
from tests.whole.running import SECONDS, Daemon, Target, daemon, save, until

CRASHED = 70


@pytest.fixture
def watch(tmp_path: Path) -> Path:
    """Where a watch dir will be."""
    return tmp_path / "ckpt"


# --- a bug ---------------------------------------------------------------------------------------------

# The program with a fault put in: a named task, or a function of ours, raises once the file `NOW` is there.
WITH_A_BUG = """
import asyncio, importlib, os, sys
from ckpt_sidecar.cli import main

where, now = os.environ["BUG"], os.environ["NOW"]

def bug():
    raise eval(os.environ["RAISES"])("a bug in " + where)

async def broken(real):
    running = asyncio.ensure_future(real)
    try:
        while not os.path.exists(now):
            await asyncio.wait([running], timeout=0.01)
            if running.done():
                return running.result()
    finally:
        running.cancel()
        await asyncio.wait([running])
    bug()

if ":" in where:
    module, path = where.split(":")
    owner = importlib.import_module("ckpt_sidecar." + module)
    *owners, name = path.split(".")
    for each in owners:
        owner = getattr(owner, each)
    real = getattr(owner, name)
    setattr(owner, name, lambda *given, **named: bug() if os.path.exists(now) else real(*given, **named))
else:
    create_task = asyncio.TaskGroup.create_task

    def create(group, work, *, name=None, **more):
        return create_task(group, broken(work) if name == where else work, name=name, **more)

    asyncio.TaskGroup.create_task = create
main(sys.argv[4:])
"""


def number_in(path: Path) -> int | None:
    """Return the number that stands in the file, once a whole line does."""
    text = path.read_text() if path.exists() else ""
    return int(text) if text.endswith("\n") else None


@contextmanager
def with_a_bug(
    watch: Path, target: Target, where: str, *more: str, raises: str = "ZeroDivisionError"
) -> Iterator[tuple[Daemon, Path]]:
    """Run a sidecar that has a bug; yield it, and the file that brings the bug out."""
    script, now = watch.parent / "with_a_bug.py", watch.parent / "now"
    script.write_text(WITH_A_BUG)
    env = {"BUG": where, "NOW": str(now), "RAISES": raises}
    with daemon(watch, target, *more, env=env, before=(sys.executable, str(script))) as it:
        yield it, now


def named_tasks() -> set[str]:
    """Return the names that the program gives to its tasks."""
    names = set()
    for path in Path(ckpt_sidecar.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".create_task"):
                given = [each.value for each in node.keywords if each.arg == "name"]
                names |= {ast.unparse(each).lstrip("f").strip("'\"") for each in given}
    return names


TASKS = ("web", "take-in", "drain", "retention", "upload-0", "overdue")


def ends_of_a_bug(it: Daemon) -> None:
    """Wait for the end: the bug is told in one line, and nothing after it."""
    assert it.process.wait(SECONDS) == CRASHED, it.said
    lines = [json.loads(line) for line in it.said.splitlines()]
    (crashed,) = [line for line in lines if line["event"] == "crashed"]
    assert "Traceback" in crashed["exception"]
    assert "ZeroDivisionError: a bug in" in crashed["exception"]
    assert "a bug in" in crashed["error"] or "unhandled errors in a TaskGroup" in crashed["error"]
    assert lines[-1] == crashed


def test_the_tasks_that_get_a_bug_here_are_all_that_there_are() -> None:
    """A new task needs a bug of its own."""
    others = {"child", "bugs", "orphans", "each.__name__"}  # the trainer's, and what stands beside the life
    named = {"upload-{n}" if each == "upload-0" else each for each in TASKS if each != "web"}
    assert named_tasks() == named | others


@pytest.mark.long
@pytest.mark.fault("E12")
@pytest.mark.parametrize("task", TASKS)
@ON_ONE
def test_a_bug_in_a_task_ends_the_process_and_a_restart_goes_on(
    watch: Path, target: Target, task: str
) -> None:
    """Exit code 70 and the traceback in one line; what was pinned is durable after the restart."""
    with with_a_bug(watch, target, task) as (it, now):
        it.wait_ready()
        save(watch / "a.pt", b"before")
        it.wait_durable("a.pt")
        now.touch()
        save(watch / "b.pt", b"just when it breaks")
        ends_of_a_bug(it)
    with daemon(watch, target) as again:
        again.wait_ready()  # some bugs come when it is durable already
        again.wait_durable("b.pt")
        assert again.stop() == 0
    assert target.read("b.pt") == b"just when it breaks"


PLACES = (
    "spool:Spool.pin",  # a thread of the loop's
    "bodies:Body.read_through",  # a thread that moves bytes
    "ledger:Ledger.commit",
    "log:Log.tell",
)


@pytest.mark.parametrize(
    "place", [PLACES[0], *(pytest.param(each, marks=pytest.mark.long) for each in PLACES[1:])]
)
@pytest.mark.fault("E12")
@ON_ONE
def test_a_bug_in_a_thread_or_deep_inside_ends_the_process_and_keeps_the_pin(
    watch: Path, target: Target, place: str
) -> None:
    """Nothing is taken for trouble that a rest may mend but what is known to be."""
    with with_a_bug(watch, target, place) as (it, now):
        it.wait_ready()
        now.touch()
        save(watch / "a.pt", b"weights")
        ends_of_a_bug(it)
    (watch / "a.pt").unlink()
    with daemon(watch, target) as again:
        again.wait_durable("a.pt", b"weights")
        assert again.stop() == 0


@pytest.mark.long
@pytest.mark.fault("E12")
@ON_ONE
def test_a_bug_that_ends_a_thread_of_a_librarys_is_one_line_and_its_work_goes_on(
    watch: Path, target: Target
) -> None:
    """Inotify's reader: its owner notices, and the rescan serves meanwhile."""
    with with_a_bug(watch, target, "hints:Tree.on_event") as (it, now):
        it.wait_ready()
        now.touch()
        save(watch / "a.pt", b"weights")
        it.wait_durable("a.pt")
        it.wait_said("thread_crashed")
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(SECONDS) == 0
        crashed = [line for line in map(json.loads, it.said.splitlines()) if "exception" in line]
        assert {line["event"] for line in crashed} == {"thread_crashed"}
        assert all("ZeroDivisionError: a bug in" in line["exception"] for line in crashed)


@pytest.mark.fault("E12")
@ON_ONE
def test_a_bug_in_a_callback_ends_the_process(watch: Path, target: Target) -> None:
    """No task would raise it: a signal that asks for the drain must not be lost in it."""
    with with_a_bug(watch, target, "child:Child.send", "--", "sleep", "1000") as (it, now):
        it.wait_ready()
        now.touch()
        it.process.send_signal(signal.SIGTERM)
        ends_of_a_bug(it)


@pytest.mark.fault("E12")
@ON_ONE
def test_a_bug_beside_a_trainer_leaves_no_trainer_behind(watch: Path, target: Target) -> None:
    """It is asked to stop, and what it saves then is there for the restart."""
    script = f"""
import os, signal, sys, time
def stop(*_):
    open({str(watch / "last.tmp")!r}, "wb").write(b"the last words")
    os.rename({str(watch / "last.tmp")!r}, {str(watch / "last.pt")!r})
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
open({str(watch.parent / "pid")!r}, "w").write(str(os.getpid()) + "\\n")
for _ in range(6000):  # a minute: no longer, should nobody stop it
    time.sleep(0.01)
"""
    with with_a_bug(watch, target, "retention", "--", sys.executable, "-c", script) as (it, now):
        trainer = it.until(lambda: number_in(watch.parent / "pid"))
        it.wait_ready()
        now.touch()
        ends_of_a_bug(it)
        assert not Path(f"/proc/{trainer}").exists()
    with daemon(watch, target) as again:
        again.wait_durable("last.pt", b"the last words")
        assert again.stop() == 0


@pytest.mark.long
@pytest.mark.fault("E5")
@ON_ONE
def test_a_disk_that_does_not_take_the_address_ends_nothing(watch: Path, target: Target) -> None:
    """`status` will not find it, and the log says why; checkpoints become durable."""
    (watch.parent / "now").touch()
    with with_a_bug(watch, target, "spool:Spool.serving", raises="OSError") as (it, _):
        failed = it.wait_said("failed", stage="start", reason="disk")
        assert failed["what"] == str(watch / ".ckpt-sidecar")
        it.wait_said("ready")
        save(watch / "a.pt", b"weights")
        it.wait_durable("a.pt")
        assert it.stop() == 0


# --- a disk that fails --------------------------------------------------------------------------------------


def failing(fault: str, path: Path, log: Path) -> Sequence[str]:
    """Return what runs a command whose calls on that file fail; skip where it cannot be traced."""
    call = fault.partition(":")[0]
    if shutil.which("strace") is None:
        pytest.skip("strace is needed")
    words = ("strace", "--follow-forks", "--quiet=all", f"--output={log}")
    before = (*words, f"--trace-path={path}", f"--trace={call}", f"--inject={fault}")
    tried = subprocess.run([*before, "true"], capture_output=True, timeout=SECONDS, check=False)
    if tried.returncode:
        pytest.skip(f"nothing can be traced here: {tried.stderr.decode()}")
    return before


@pytest.mark.long
@pytest.mark.fault("E5")
@ON_ONE
def test_an_fsync_that_the_kernel_fails_is_said_once_and_the_checkpoint_sent(
    watch: Path, target: Target
) -> None:
    """EIO from fsync of the pins: no second one is asked to take it back, and what is pinned is sent."""
    pins, traced = watch / ".ckpt-sidecar/pins", watch.parent / "traced"
    with daemon(watch, target, before=failing("fsync:error=EIO", pins, traced)) as it:
        until(lambda: it.events("ready"))
        before = traced.read_text().count("fsync(")
        save(watch / "a.pt", b"weights")
        until(lambda: target.holds("a.pt", b"weights"))
        (failed,) = it.events("failed")
        assert (failed["stage"], failed["reason"], failed["what"]) == ("pin", "disk", "a.pt")
        assert "Input/output error" in failed["error"]
        assert traced.read_text().count("fsync(") == before + 1
        os.kill(target_of(watch), signal.SIGTERM)
        assert it.ended() == 0


@pytest.mark.long
@pytest.mark.fault("E5")
@ON_ONE
def test_a_sector_that_cannot_be_read_costs_its_checkpoint_and_no_other(watch: Path, target: Target) -> None:
    """EIO from read: said with the file's name, and its pin kept; once it can be read it is durable."""
    bad, traced = watch / ".ckpt-sidecar/pins/1-1/bad.pt", watch.parent / "traced"
    with daemon(watch, target, before=failing("preadv,preadv2:error=EIO", bad, traced)) as it:
        until(lambda: it.events("ready"))
        body = save(watch / "bad.pt", b"weights" * 2_000_000)
        failed = it.wait_said("failed", what="bad.pt")
        assert (failed["stage"], failed["reason"]) == ("pin", "disk")
        assert "Input/output error" in failed["error"]
        save(watch / "good.pt", b"others")
        it.wait_durable("good.pt")
        assert target.listed() == ["good.pt"]
        os.kill(target_of(watch), signal.SIGTERM)
        it.wait_said("draining")
        os.kill(target_of(watch), signal.SIGTERM)
        assert it.ended() == 3
        assert it.events("drained")[-1]["left"] == ["bad.pt"]
    with daemon(watch, target) as again:
        again.wait_durable("bad.pt", body)
        assert again.stop() == 0


@pytest.mark.long
@pytest.mark.fault("E4")
@ON_ONE
def test_a_disk_too_small_for_the_restore_is_said_before_it_is_filled_and_waited_for(
    watch: Path, target: Target
) -> None:
    """With both numbers; what is free stays free; once there is room it is restored, and it is ready."""
    body = bytes(range(256)) * (24 * MIB // 256)
    with daemon(watch.parent / "first", target, "--attempt", "a") as first:
        first.wait_ready()
        save(first.watch / "big.pt", body)
        first.wait_durable("big.pt")
        assert first.stop() == 0
    watch.mkdir()
    mount = f"mount -t tmpfs -o size=16m tmpfs {watch}"
    with daemon(
        watch,
        target,
        "--attempt",
        "b",
        before=("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"),
    ) as it:
        it.watch = Path(f"/proc/{it.process.pid}/root{watch}")
        it.wait_not_ready(f"the checkpoint has {len(body)} bytes", " room for ")
        assert shutil.disk_usage(it.watch).used < MIB
        inside = ["nsenter", f"--target={it.process.pid}", "--mount"]
        subprocess.run([*inside, "mount", "-o", "remount,size=64m", watch], check=True, timeout=SECONDS)
        it.wait_ready()
        assert (it.watch / "big.pt").read_bytes() == body
        assert it.stop() == 0


# --- a log that goes nowhere --------------------------------------------------------------------------------


def fill(pipe: int) -> None:
    """Fill the pipe up: the next write waits."""
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        while True:
            os.write(pipe, bytes(4096))


@pytest.fixture
def nowhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a shell is to send the output: nowhere, to a full disk, into a pipe that is full."""
    if request.param in (">&- 2>&- <&-", ">/dev/full 2>&1"):
        yield request.param
        return
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pipe = os.open(fifo, os.O_RDWR)
    fill(pipe)
    yield f">{fifo} 2>&1"
    os.close(pipe)


@pytest.mark.fault("E11")
@pytest.mark.parametrize(
    "nowhere",
    [
        "full",
        *(pytest.param(each, marks=pytest.mark.long) for each in (">&- 2>&- <&-", ">/dev/full 2>&1")),
    ],
    indirect=True,
)
@ON_ONE
def test_a_log_that_goes_nowhere_stops_neither_uploads_nor_the_end(
    watch: Path, target: Target, nowhere: str
) -> None:
    """Checkpoints become durable, it answers, and it ends as it should; so does its trainer."""
    script = f"""
import os, pathlib, time
os.fstat(1), os.fstat(2)  # there is something at each of them
for n in range(3):
    pathlib.Path({str(watch)!r}, f"{{n}}.tmp").write_bytes(b"weights %d" % n)
    pathlib.Path({str(watch)!r}, f"{{n}}.tmp").rename(pathlib.Path({str(watch)!r}, f"{{n}}.pt"))
while not os.path.exists({str(watch.parent / "enough")!r}):
    time.sleep(0.01)
"""
    shell = ("sh", "-c", f'exec "$@" {nowhere}', "sh")
    with daemon(watch, target, "--", sys.executable, "-c", script, before=shell) as it:
        it.until(lambda: len(target.listed()) == 3)
        assert it.ask("/healthz") == (200, "ok\n")
        assert it.metrics()['ckpt_sidecar_checkpoints_total{outcome="committed"}'] == 3
        (watch.parent / "enough").touch()
        assert it.ended() == 0
    assert {path.name for path in watch.iterdir()} == {".ckpt-sidecar", "0.pt", "1.pt", "2.pt"}


@pytest.mark.long
@pytest.mark.fault("E11")
@ON_ONE
def test_a_log_whose_reader_goes_away_stops_nothing(watch: Path, target: Target) -> None:
    """`ckpt-sidecar … 2>&1 | head -1`."""
    shell = ("sh", "-c", f'"$@" 2>&1 >/dev/null | head -1 >{watch.parent}/first', "sh")
    with daemon(watch, target, before=shell) as it:
        until(lambda: target_of(watch))
        until((watch.parent / "first").exists)
        save(watch / "a.pt", b"weights")
        until(lambda: target.holds("a.pt", b"weights"))
        os.kill(target_of(watch), signal.SIGTERM)
        it.process.wait(SECONDS)


def target_of(watch: Path) -> int:
    """Return the pid that the spool's record tells; 0 before."""
    record = watch / ".ckpt-sidecar/spool.json"
    return int(json.loads(record.read_bytes()).get("pid", 0)) if record.exists() else 0


# --- a trainer that behaves badly ---------------------------------------------------------------------------

SAVES = """
import os, pathlib, signal, subprocess, sys, time
watch = pathlib.Path(sys.argv[1])
(watch / "a.tmp").write_bytes(b"weights")
(watch / "a.tmp").rename(watch / "a.pt")
"""
BADLY = {
    "os.kill(os.getpid(), signal.SIGSEGV)": 128 + signal.SIGSEGV,
    # its grandchild has our standard output, and holds nobody up
    "(watch.parent / 'pid').write_text(f'{subprocess.Popen([\"sleep\", \"1000\"]).pid}\\n'); sys.exit(3)": 3,
    "for _ in range(5000): print('x' * 10_000); print('y' * 10_000, file=sys.stderr)\nsys.exit(0)": 0,
}


@pytest.mark.fault("E13")
@pytest.mark.parametrize(
    ("end", "code"),
    [pytest.param(*each, marks=pytest.mark.long) for each in BADLY.items()],
    ids=["segv", "grandchild", "flood"],
)
@ON_ONE
def test_a_trainer_that_ends_badly_has_its_exit_code_and_its_saves(
    watch: Path, target: Target, end: str, code: int
) -> None:
    """As a shell gives it; nobody waits for what it leaves behind; what it saved is durable."""
    try:
        with daemon(watch, target, "--", sys.executable, "-c", SAVES + end, str(watch)) as it:
            assert it.ended() == code
    finally:
        if grandchild := number_in(watch.parent / "pid"):
            os.kill(grandchild, signal.SIGKILL)
    assert target.holds("a.pt", b"weights")


@pytest.mark.long
@pytest.mark.fault("E13")
@ON_ONE
def test_a_trainer_that_does_not_want_to_stop_is_killed_after_a_bounded_wait(
    watch: Path, target: Target
) -> None:
    """137, as a shell has it; what it saved is durable."""
    script = SAVES.replace("import", "import signal; signal.signal(15, signal.SIG_IGN)\nimport", 1)
    command = ("--", sys.executable, "-c", script + "while True: time.sleep(1)", str(watch))
    with daemon(watch, target, "--drain-timeout", "2", *command) as it:
        it.wait_durable("a.pt", b"weights")
        assert it.stop() == 128 + signal.SIGKILL


# --- limits ---------------------------------------------------------------------------------------------

# A user that nobody else is, who may read what root may: the limit of processes holds for it alone.
NOBODY_ELSE = 54_321
CAPS = "-all,+dac_override,+dac_read_search"
AS_NOBODY_ELSE = (
    *("setpriv", f"--reuid={NOBODY_ELSE}", f"--regid={NOBODY_ELSE}", "--clear-groups"),
    *(f"--inh-caps={CAPS}", f"--ambient-caps={CAPS}"),
)


def limited(*words: str) -> Sequence[str]:
    """Return what runs a command within these limits; skip where that cannot be."""
    before = (*AS_NOBODY_ELSE, "prlimit", *words) if os.geteuid() == 0 else ("prlimit", *words)
    try:
        tried = subprocess.run([*before, "true"], capture_output=True, timeout=SECONDS, check=False)
    except OSError:
        pytest.skip("setpriv and prlimit are needed")
    if tried.returncode:
        pytest.skip(f"it cannot be limited here: {tried.stderr.decode()}")
    return before


def saves_and_ends(it: Daemon, target: Target, count: int) -> None:
    """Have it make checkpoints of several parts durable, scraped meanwhile, and end."""
    it.until(lambda: it.events("ready"))
    bodies = {f"{n}.pt": bytes([n + 1]) * (20 * MIB + n) for n in range(count)}
    for name, body in bodies.items():
        save(it.watch / name, body)
    it.until(lambda: (it.ask("/metrics"), len(target.listed()) == count)[1])
    for name, body in bodies.items():
        assert target.holds(name, body)
    assert it.stop() == 0
    assert it.events("failed") == []


@pytest.mark.long
@pytest.mark.fault("E7")
@ON_ONE
def test_it_works_with_64_descriptors(watch: Path, target: Target) -> None:
    """While parts are sent, files come in, and somebody scrapes."""
    with daemon(watch, target, before=("prlimit", "--nofile=64:64")) as it:
        saves_and_ends(it, target, 5)


@pytest.mark.long
@pytest.mark.fault("E7")
@pytest.mark.parametrize(("threads", "enough"), [(13, True), *((n, False) for n in (1, 2, 6, 11))])
@ON_ONE
def test_it_works_within_the_threads_that_it_says_at_the_start_that_it_needs(
    watch: Path, target: Target, threads: int, *, enough: bool
) -> None:
    """Later it needs no more. With fewer it ends at once, in one line, with the number and the mend."""
    watch.parent.chmod(0o777)
    before = limited(f"--nproc={threads}:{threads}")
    with daemon(watch, target, before=before) as it:
        if enough:
            saves_and_ends(it, target, 2)
        else:
            assert it.ended() == 1
            assert it.said.splitlines()[-1].startswith(
                "Error: it needs 13 threads, and cannot start them all (raise `ulimit -u`"
            )


@pytest.mark.long
@pytest.mark.fault("E7", "E10")
@ON_ONE
def test_clients_that_come_by_the_hundred_and_stay_leave_uploads_their_descriptors(
    watch: Path, target: Target
) -> None:
    """With 64 in all, and 200 silent clients: most are turned away, the others dropped, and nothing ends."""
    with daemon(watch, target, before=("prlimit", "--nofile=64:64")) as it, ExitStack() as clients:
        it.wait_ready()
        host, port = json.loads((watch / ".ckpt-sidecar/spool.json").read_bytes())["address"].split(":")
        silent = [clients.enter_context(socket.socket()) for _ in range(200)]
        for each in silent:
            each.settimeout(0)
            each.connect_ex((host, int(port)))
        body = save(watch / "a.pt", b"weights" * 3_000_000)
        it.wait_durable("a.pt", body)
        it.wait_ready()  # whoever asks is answered
        it.process.send_signal(signal.SIGTERM)
        assert (
            it.process.wait(SECONDS) == 0
        )  # asyncio may have told of a burst that it could not take at once
        assert it.events("crashed") == []


class MemoryLimit:
    """A control group of ours, below the one that we are in, with so much memory."""

    def __init__(self, limit: int) -> None:
        self._home = self._make()
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (self._home / name).exists():
                (self._home / name).write_text(str(limit))
                return
        self.close()
        pytest.skip("no control group for memory to be had here")

    @staticmethod
    def _make() -> Path:
        """Where version 1 or 2 has it; skip where we may not make one."""
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, ours = line.split(":")
            root = "/sys/fs/cgroup" if not kinds else "/sys/fs/cgroup/memory"
            if kinds in ("", "memory") and Path(root + ours, "cgroup.procs").exists():
                with suppress(OSError):
                    home = Path(root + ours, f"of-a-test-{uuid.uuid4()}")
                    home.mkdir()
                    if any(home.glob("memory.*")):
                        return home
                    home.rmdir()
        pytest.skip("no control group for memory to be made here")

    def words(self) -> Sequence[str]:
        """Return what runs a command in it."""
        return ("sh", "-c", f'echo $$ >{self._home}/cgroup.procs && exec "$@"', "sh")

    def refused(self) -> int:
        """How often somebody in it was killed for want of memory."""
        name = "memory.events" if (self._home / "memory.events").exists() else "memory.oom_control"
        told = dict(line.split() for line in (self._home / name).read_text().splitlines())
        return int(told["oom_kill"])

    def close(self) -> None:
        """Give it back; its processes are gone, or about to be."""

        def gone() -> bool:
            with suppress(OSError):
                self._home.rmdir()
            return not self._home.exists()

        until(gone)


@pytest.fixture
def memory_limit() -> Iterator[MemoryLimit]:
    """160 MiB for all together: heap, stacks, the kernel's buffers for sockets, the page cache."""
    limit = MemoryLimit(160 * MIB)
    yield limit
    limit.close()


@pytest.mark.long
@pytest.mark.timeout(500)
@pytest.mark.fault("E7", "H5")
@ON_ONE
def test_it_works_within_160_mib(tmp_path: Path, target: Target, memory_limit: MemoryLimit) -> None:
    """Of a control group, which counts the page cache: up and down again, checkpoints larger than that."""
    size = 170 * MIB
    with daemon(tmp_path / "a", target, "--attempt", "a", before=memory_limit.words()) as it:
        it.wait_ready()
        with (tmp_path / "a" / "big.tmp").open("wb") as file:
            for n in range(size // MIB):
                file.write(n.to_bytes(8, "little") * (MIB // 8))
        (tmp_path / "a" / "big.tmp").rename(tmp_path / "a" / "big.pt")
        until(lambda: target.listed() == ["big.pt"], seconds=200)
        assert it.stop() == 0
    with daemon(tmp_path / "b", target, "--attempt", "b", before=memory_limit.words()) as it:
        until(it.ready, seconds=200)
        assert it.stop() == 0
    assert memory_limit.refused() == 0
    same = subprocess.run(["cmp", tmp_path / "a/big.pt", tmp_path / "b/big.pt"], check=False, timeout=SECONDS)
    assert same.returncode == 0


# --- it stands still, and the clock jumps -------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.fault("E8")
@ON_ONE
def test_who_was_stopped_for_10_seconds_goes_on_unfenced(watch: Path, target: Target) -> None:
    """SIGSTOP in the middle of an upload, SIGCONT: it is finished, nothing failed, nobody is fenced."""
    body = bytes(range(256)) * (60 * MIB // 256)
    with daemon(watch, target, "--workers", "1") as it:
        it.wait_ready()
        save(watch / "big.pt", body)
        it.until(lambda: it.status()["queue"] and it.status()["queue"][0]["sent"])
        it.process.send_signal(signal.SIGSTOP)
        assert not target.listed()
        time.sleep(10)  # not to wait for something: this is the fault
        it.process.send_signal(signal.SIGCONT)
        it.wait_durable("big.pt", body)
        assert it.events("fenced") == it.events("failed") == []
        assert it.status()["generation"] == 1
        assert it.ready()
        assert it.stop() == 0


FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


@pytest.mark.long
@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
@pytest.mark.fault("E9")
@pytest.mark.parametrize("jump", ["-1d", "+1d"])
@ON_ONE
def test_a_wall_clock_that_jumps_a_day_under_the_process_changes_no_order(
    watch: Path, target: Target, jump: str
) -> None:
    """Trainer and sidecar share it: the newest is what was saved last, and a restore takes that."""
    clock = watch.parent / "clock"
    clock.write_text("+0")
    env = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    shift = 86_400 * (1 if jump == "-1d" else -1)
    with daemon(watch, target, "--attempt", "a", env=env) as it:
        it.wait_ready()
        save(watch / "before.pt", b"before")
        it.wait_durable("before.pt")
        clock.write_text(jump)
        for n in range(3):
            save(watch / f"after-{n}.pt", b"after", age=shift)
            it.wait_durable(f"after-{n}.pt")
        first, *_, last = (datetime.fromisoformat(each["at"]) for each in it.events("checkpoint_committed"))
        assert abs(last - first) > timedelta(hours=23)  # it has jumped
        assert it.metrics()["ckpt_sidecar_upload_lag_seconds"] == 0
        assert it.events("failed") == it.events("fenced") == []
        assert it.stop() == 0
    assert target.listed() == ["after-2.pt", "after-1.pt", "after-0.pt", "before.pt"]
    with daemon(watch.parent / "b", target, "--attempt", "b") as it:
        it.wait_ready()
        assert (watch.parent / "b" / "after-2.pt").read_bytes() == b"after"
        assert it.stop() == 0
