"""Events as log lines: one line each, by stable names, whatever a file is called."""

from __future__ import annotations

import io
import json
import logging
import os
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, TextIO, cast

import pytest
import structlog

from ckpt_sidecar import checkpoint, events
from ckpt_sidecar import log as log_module
from ckpt_sidecar.checkpoint import Changed, Committed, Pinned, Skipped, Stored, Superseded, Uploading
from ckpt_sidecar.events import (
    Event,
    Failed,
    Ignored,
    Moved,
    Progress,
    Requested,
    Rescanned,
    Restored,
    Torn,
    event_name,
)
from ckpt_sidecar.log import PROGRESS_SECONDS, Log, Outlet, configure, default_stream, on_terminal
from tests.test_metrics import EVENTS, FIRST, OBJECTS, SAVED, moved, saved

Lines = Callable[[], list[str]]
HOSTILE = 'a\nb\r\n{"event": "ready"}\x1b[31m\x1b]0;title\x07\x9b2J\u2028\u202e\x85"\'\\\x00.pt'
ESCAPE_ALONE = "\x1b[2Jx.pt"  # nothing in it that would have it quoted for another reason


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """What `configure` changes belongs to the process, and is put back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


class Written:
    """A log that writes into memory, by a clock that stands still unless it is moved."""

    def __init__(self, *, readable: bool = False, colors: bool = False) -> None:
        self.now = 100.0
        self.stream = io.StringIO()
        configure(self.stream, readable=readable, colors=colors)
        self.log = Log(seconds=lambda: self.now)

    def tell(self, *events: Event) -> list[str]:
        """Tell the events; return the lines of these."""
        begin = len(self.stream.getvalue())
        for event in events:
            self.log.tell(event)
        return self.lines(begin)

    def lines(self, begin: int = 0) -> list[str]:
        """Return what was written, by the newlines that a reader of logs goes by."""
        text = self.stream.getvalue()[begin:]
        assert not text or text.endswith("\n")
        return text.split("\n")[:-1]

    def one(self, *events: Event) -> dict[str, Any]:
        """Tell the events; return the one line that they make."""
        (line,) = self.tell(*events)
        told: dict[str, Any] = json.loads(line)
        return told


# --- every event ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS, ids=event_name)
def test_an_event_makes_at_most_one_line_by_its_stable_name(event: Event) -> None:
    """With a level, and the time in UTC; these are an interface, for alerts look for them."""
    for line in Written().tell(event):
        told = json.loads(line)
        assert told["event"] == event_name(event)
        assert told["level"] in ("info", "warning", "error")
        assert datetime.fromisoformat(told["at"]).utcoffset() == timedelta(0)
        assert line.isascii()


def test_all_events_are_told_but_those_that_come_by_the_thousand() -> None:
    """Requests, parts, and the steps between pinned and durable are what metrics are for."""
    silent = {event_name(event) for event in EVENTS if not Written().tell(event)}
    assert silent == {
        "requested",
        "progress",
        "checkpoint_uploading",
        "checkpoint_stored",
        "recovery_point",  # a line of its own for each commit would say it twice
    }
    assert {type(event) for event in EVENTS} == set(typing.get_args(events.Event))


def test_what_a_person_should_see_is_a_warning_or_an_error() -> None:
    """An error is what went wrong and stays so; a warning what is strange, or is tried again."""
    levels: dict[str, set[str]] = {}
    for event in EVENTS:
        for line in Written().tell(event):
            levels.setdefault(json.loads(line)["level"], set()).add(event_name(event))
    assert levels["error"] == {"failed", "fenced", "fell_back"}
    assert levels["warning"] == {
        "retrying",
        "torn",
        "ignored",
        "watch_lost",
        "interruption",
        "pinned_by_descriptor",
        "replacing",
        "rebuilt",
        "not_ready",
        "rescanned",  # one that found what no event had told
    }


def test_a_restore_that_failed_is_an_error() -> None:
    """The other ends are what one hopes for."""
    levels = {
        outcome: Written().one(Restored(outcome, None, None, 0, 1.0))["level"]
        for outcome in ("restored", "kept", "empty", "failed")
    }
    assert levels == {"restored": "info", "kept": "info", "empty": "info", "failed": "error"}


def test_a_listing_that_found_nothing_new_is_not_told() -> None:
    """It comes every half minute, and for nothing else."""
    assert Written().tell(Rescanned("interval", 0.01, 5, 0, 10**9, 0)) == []


# --- their fields ---------------------------------------------------------------------------------------


def test_an_event_has_its_own_fields() -> None:
    """By their names; seconds to the millisecond."""
    told = Written().one(Failed("upload", "denied", "step_40.pt", "AccessDenied", "allow s3:PutObject"))
    assert {name: told[name] for name in ("stage", "reason", "what", "error", "hint")} == {
        "stage": "upload",
        "reason": "denied",
        "what": "step_40.pt",
        "error": "AccessDenied",
        "hint": "allow s3:PutObject",
    }
    told = Written().one(Restored("restored", FIRST, "step_40.pt", 1000, 1.23456))
    assert (told["id"], told["seconds"], told["bytes"]) == ("1-1", 1.235, 1000)


def test_a_durable_checkpoint_tells_how_long_it_took() -> None:
    """From the save to now, and the last step alone; but not its objects, which the manifest has."""
    told = Written().one(moved(Committed(OBJECTS), after=2.5, seconds=0.25))
    assert set(told) == {"event", "level", "at", "id", "name", "bytes", "seconds", "lag_seconds"}
    assert (told["event"], told["id"], told["name"]) == ("checkpoint_committed", "1-1", "step_40.pt")
    assert (told["bytes"], told["seconds"], told["lag_seconds"]) == (1000, 0.25, 2.5)


def test_a_pinned_checkpoint_has_no_lag_yet() -> None:
    """It may be a file that lay there for days."""
    assert set(Written().one(moved(Pinned()))) == {"event", "level", "at", "id", "name", "bytes"}


def test_what_will_not_be_sent_says_why() -> None:
    """By which policy, or by which newer one."""
    assert Written().one(moved(Skipped("2 newer ones are durable")))["reason"] == "2 newer ones are durable"
    assert Written().one(moved(Superseded(replace(FIRST, sequence=2))))["by"] == "1-2"
    assert Written().one(moved(Changed()))["event"] == "checkpoint_changed"


# --- progress -------------------------------------------------------------------------------------------


def up(done: int, *, name: str = "x.pt", direction: str = "up") -> Progress:
    """Make the event of a part."""
    return Progress(name, direction, 1, done, 1000)


def test_progress_is_told_every_ten_seconds_by_the_clock() -> None:
    """However many parts there are; what is done before that has no line."""
    written = Written()
    told = {}
    for second in range(31):
        written.now = 100.0 + second
        told[second] = [json.loads(line)["done"] for line in written.tell(up(second), up(second))]
    assert PROGRESS_SECONDS == 10
    assert {second: done for second, done in told.items() if done} == {10: [10], 20: [20], 30: [30]}


def test_the_last_part_has_no_line() -> None:
    """What follows it has."""
    written = Written()
    written.tell(up(1))
    written.now += 60
    assert written.tell(up(1000)) == []


def test_each_name_and_each_direction_has_its_own_ten_seconds() -> None:
    """One that just began is not told because another is slow."""
    written = Written()
    written.tell(up(1), up(1, direction="down"))
    written.now += 5
    written.tell(up(1, name="y.pt"))
    written.now += 5
    lines = written.tell(up(2), up(2, direction="down"), up(2, name="y.pt"))
    assert [(json.loads(line)["name"], json.loads(line)["direction"]) for line in lines] == [
        ("x.pt", "up"),
        ("x.pt", "down"),
    ]


@pytest.mark.parametrize(
    "state", [Committed(OBJECTS), Changed(), Superseded(FIRST)], ids=checkpoint.state_name
)
def test_a_later_upload_of_a_name_has_ten_seconds_of_its_own(state: checkpoint.State) -> None:
    """However the earlier one ended; nothing is remembered of it."""
    written = Written()
    written.tell(up(1, name="step_40.pt"), moved(Uploading(("u",))))
    written.now += 60
    written.tell(moved(state))
    assert written.tell(up(1, name="step_40.pt")) == []
    written.tell(moved(Stored(OBJECTS)))
    written.now += 10
    assert len(written.tell(up(2, name="step_40.pt"))) == 1


# --- names that are meant to deceive --------------------------------------------------------------------


@pytest.mark.fault("G8")
@pytest.mark.parametrize(
    "event",
    [
        Torn(HOSTILE, HOSTILE),
        Ignored("caf\udce9.pt", "is not valid UTF-8"),
        Failed("pin", "disk", HOSTILE, HOSTILE, HOSTILE),
        Moved(saved(HOSTILE, Skipped(HOSTILE)), SAVED),
        events.Drained((HOSTILE, "b.pt")),
        events.Fenced(8, HOSTILE),
    ],
    ids=event_name,
)
def test_a_name_cannot_forge_a_line(event: Event) -> None:
    """It is one line of JSON, in ASCII, and the name reads back as it is."""
    (line,) = Written().tell(event)
    told = json.loads(line)
    assert line.isascii() and line.isprintable()
    assert told["event"] == event_name(event)
    assert told.get("name", HOSTILE) in (HOSTILE, "caf\udce9.pt")


@pytest.mark.fault("G8")
@pytest.mark.parametrize("colors", [False, True])
@pytest.mark.parametrize(
    "name", [HOSTILE, ESCAPE_ALONE, "\x9b2J.pt", "\u202egnp.pt", "x\x08\x08.pt", "caf\udce9"]
)
def test_a_name_cannot_move_a_terminal(name: str, *, colors: bool) -> None:
    """Readable lines show what it would obey; only colours that are ours get through."""
    written = Written(readable=True, colors=colors)
    ours = written.tell(Torn("plain.pt", "plain"))[0].count("\x1b")
    for event in (Torn(name, "is empty"), Torn("x.pt", name), Failed("pin", "disk", name, name)):
        (line,) = written.tell(event)
        assert event_name(event) in line
        assert line.replace("\x1b", "").isprintable()
    (line,) = written.tell(Torn(name, "plain"))
    assert line.count("\x1b") == ours
    assert colors == (ours > 0)


def test_readable_lines_have_what_the_others_have() -> None:
    """The name of the event, its level, its fields."""
    (line,) = Written(readable=True).tell(Failed("upload", "denied", "step 40.pt", "no", "ask"))
    for word in ("failed", "[error", "stage='upload'", "what='step 40.pt'", "hint='ask'"):
        assert word in line


# --- what others write ----------------------------------------------------------------------------------


def fail() -> None:
    """Raise something with a name in it."""
    raise ValueError(HOSTILE)


def test_what_libraries_warn_of_is_a_line_like_ours() -> None:
    """Whatever they put into it; what they merely tell is left out."""
    written = Written()
    logging.getLogger("botocore.credentials").info("Found credentials")
    logging.getLogger("watchdog").debug("queue")
    logging.getLogger("botocore").warning("cannot read %s", HOSTILE)
    (line,) = written.lines()
    told = json.loads(line)
    assert line.isascii()
    assert (told["event"], told["level"]) == (f"cannot read {HOSTILE}", "warning")
    assert datetime.fromisoformat(told["at"]).utcoffset() == timedelta(0)


def test_an_exception_is_one_line() -> None:
    """Of a library, or of ours: the traceback is a field."""
    written = Written()
    try:
        fail()
    except ValueError:
        logging.getLogger("asyncio").exception("a task failed")
        structlog.get_logger().exception("ours_failed")
    lines = written.lines()
    assert [json.loads(line)["event"] for line in lines] == ["a task failed", "ours_failed"]
    for line in lines:
        told = json.loads(line)
        assert told["level"] == "error"
        assert told["exception"].startswith("Traceback")
        assert HOSTILE in told["exception"]


def test_a_warning_of_python_is_a_line_too() -> None:
    """It would go to standard error as it is, in two lines."""
    written = Written()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(
            capture=False
        )  # `catch_warnings` puts back what it found: the hook goes inside
        configure(written.stream, readable=False, colors=False)
        warnings.warn("a coroutine\nwas never awaited", RuntimeWarning, stacklevel=1)
        logging.captureWarnings(capture=False)
    (line,) = written.lines()
    assert "RuntimeWarning: a coroutine\nwas never awaited" in json.loads(line)["event"]


def test_what_libraries_write_cannot_move_a_terminal_either() -> None:
    """Their message is one line; a traceback has its own, which a person wants to read."""
    written = Written(readable=True)
    logging.getLogger("botocore").warning("cannot read %s", HOSTILE)
    (line,) = written.lines()
    assert line.isprintable()
    try:
        fail()
    except ValueError:
        logging.getLogger("asyncio").exception("a task failed")
    assert all(line.isprintable() for line in written.lines())
    assert any(line.startswith("ValueError: a") for line in written.lines())


# --- where it goes --------------------------------------------------------------------------------------


def test_it_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """What a command prints stays clean."""
    configure(default_stream(), readable=False, colors=False)
    Log(seconds=lambda: 0.0).tell(Torn("x.pt", "is empty"))
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["event"] == "torn"
    assert not on_terminal(default_stream())


def test_a_request_costs_no_line() -> None:
    """Thousands may come in a second."""
    assert Written().tell(*[Requested("put_part", "ok", 0.1)] * 1000) == []


# --- where nobody reads ---------------------------------------------------------------------------------


def fill(pipe: int) -> None:
    """Fill the pipe up: the next write waits."""
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        while True:
            os.write(pipe, bytes(4096))
    os.set_blocking(pipe, True)


@pytest.mark.fault("E11")
def test_a_pipe_that_nobody_reads_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many lines wait, what comes then is dropped; once somebody reads, they come, and the gap is told."""
    monkeypatch.setattr(log_module, "LINES_WAITING", 10)
    reading, writing = os.pipe()
    fill(writing)
    outlet = Outlet(writing)
    configure(cast("TextIO", outlet), readable=False, colors=False)
    for n in range(15):
        structlog.get_logger().info("line", n=n)
    outlet.settle(0.01)
    with os.fdopen(reading, "rb") as reader:
        lines = iter(lambda: json.loads(reader.readline().lstrip(b"\0")), None)
        told = [next(lines) for _ in range(11)]
    assert [line.get("n") for line in told] == [*range(10), None]
    assert (told[-1]["event"], told[-1]["lines"]) == ("log_lines_dropped", 5)
    assert outlet.settle(10)
    os.close(writing)


@pytest.mark.fault("E11")
def test_a_pipe_whose_reader_is_gone_fails_nobody() -> None:
    """Nor does a disk that is full; the lines are lost."""
    reading, writing = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor in (writing, full):
        outlet = Outlet(descriptor)
        for _ in range(3):
            outlet.write("a line\n")
        assert outlet.settle(10)
        os.close(descriptor)


@pytest.mark.fault("E11")
def test_a_pipe_that_a_neighbour_has_made_non_blocking_gets_whole_lines() -> None:
    """Whoever shares it may do so (a shell, a trainer): every line arrives, and none is cut."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    outlet = Outlet(writing)
    text = "x" * 300_000 + "\n"
    outlet.write(text)
    outlet.write("the next\n")
    with os.fdopen(reading) as reader:
        assert reader.readline() == text
        assert reader.readline() == "the next\n"
    assert outlet.settle(10)
    os.close(writing)
