"""The process and its host: bugs, limits, a stopped or jumping clock, a log that nobody reads."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import ckpt_sidecar
from ckpt_sidecar.bucket import MIB
from tests.conftest import ON_ONE
from tests.whole.running import SECONDS, Daemon, Target, daemon, save, until

CRASHED = 70


@pytest.fixture
def target(s3_endpoint: str) -> Target:
    """A fresh bucket on a real server."""
    return Target.new(s3_endpoint)


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
    others = {"child", "bugs", "orphans"}  # the trainer's, and what stands beside the life
    assert named_tasks() == {"upload-{n}" if each == "upload-0" else each for each in TASKS} | others


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
while True:
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


@pytest.mark.fault("E7")
@pytest.mark.parametrize(
    ("threads", "enough"),
    [(13, True), *(pytest.param(n, False, marks=pytest.mark.long) for n in (1, 2, 6, 11))],
)
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
