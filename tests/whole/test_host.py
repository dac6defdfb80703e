"""The process and its host: bugs, limits, a stopped or jumping clock, a log that nobody reads."""

from __future__ import annotations

import ast
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ckpt_sidecar
from tests.conftest import ON_ONE
from tests.whole.running import SECONDS, Daemon, Target, daemon, save

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

# The program with a bug put in: a named task, or a function of ours, raises once the file `NOW` is there.
WITH_A_BUG = """
import asyncio, importlib, os, sys
from ckpt_sidecar.cli import main

where, now = os.environ["BUG"], os.environ["NOW"]

def bug():
    raise ZeroDivisionError("a bug in " + where)

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
def with_a_bug(watch: Path, target: Target, where: str, *more: str) -> Iterator[tuple[Daemon, Path]]:
    """Run a sidecar that has a bug; yield it, and the file that brings the bug out."""
    script, now = watch.parent / "with_a_bug.py", watch.parent / "now"
    script.write_text(WITH_A_BUG)
    env = {"BUG": where, "NOW": str(now)}
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
