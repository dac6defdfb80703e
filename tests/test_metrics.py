"""The metrics: every event is counted where it belongs."""

from __future__ import annotations

import math
import typing

import pytest

from ckpt_sidecar import checkpoint, events
from ckpt_sidecar.bucket import Abilities, ObjectRef
from ckpt_sidecar.checkpoint import (
    Book,
    Changed,
    Checkpoint,
    Committed,
    File,
    Id,
    Pinned,
    Skipped,
    State,
    Stored,
    Superseded,
    Uploading,
)
from ckpt_sidecar.events import (
    Adopted,
    Claimed,
    Deleted,
    Drained,
    Draining,
    Event,
    Failed,
    FellBack,
    Fenced,
    Ignored,
    Interruption,
    Moved,
    NotReady,
    PinnedByDescriptor,
    Probed,
    Progress,
    Ready,
    Rebuilt,
    RecoveryPoint,
    Replacing,
    Requested,
    Rescanned,
    Restored,
    Retrying,
    Torn,
    UploadAborted,
    WatchLost,
)
from ckpt_sidecar.metrics import PREFIX, Metrics

SAVED = 1_700_000_000  # seconds since the epoch
OBJECTS = (ObjectRef("run/step_40.pt", 3, "etag"),)

FIRST = Id(1, 1)
STATES: tuple[State, ...] = (
    Pinned(),
    Uploading(("upload",)),
    Stored(OBJECTS),
    Committed(OBJECTS),
    Changed(),
    Skipped("behind"),
    Superseded(Id(1, 2)),
)


def saved(name: str, state: State, *, id_: Id = FIRST, at: float = SAVED) -> Checkpoint:
    """Make a checkpoint of 1,000 bytes."""
    saved_at = int(at * 1e9)
    return Checkpoint(id_, name, (File(name, 1000, saved_at),), saved_at, state)


def moved(state: State, *, after: float = 2.0, seconds: float = 0.0) -> Moved:
    """Make the event of a checkpoint that was saved `after` seconds ago."""
    return Moved(saved("step_40.pt", state), SAVED + after, seconds)


EVENTS: tuple[Event, ...] = (
    *(moved(state) for state in STATES),
    Progress("step_40.pt", "up", 10, 10, 1000),
    Progress("step_40.pt", "down", 30, 30, 1000),
    Requested("put_object", "ok", 0.1),
    Retrying("upload", "throttled", 1.0, "slow down"),
    Failed("upload", "denied", "step_40.pt", "no"),
    Torn("step_40.pt", "is empty"),
    Ignored("link.pt", "is a symlink"),
    Probed(
        Abilities(conditional_put=True, conditional_complete=False, conditional_delete=True, checksum=True)
    ),
    Claimed(7, None),
    Fenced(8, "other"),
    RecoveryPoint(FIRST, "step_40.pt", 1000, SAVED, SAVED + 2),
    Adopted(FIRST, "step_40.pt"),
    Replacing("step_40.pt", "run/step_40.pt"),
    UploadAborted("step_40.pt", "upload"),
    Rebuilt(3, "mangled"),
    Restored("restored", FIRST, "step_40.pt", 1000, 1.5),
    FellBack(FIRST, "step_40.pt", "gone"),
    Ready(0.5),
    NotReady("fenced"),
    Rescanned("interval", 0.01, 5, 2, 10**9, 77),
    WatchLost("no inotify"),
    PinnedByDescriptor("step_40.pt", "another file system"),
    Deleted("step_20.pt", "bucket"),
    Interruption("spot", "terminate", "2026-11-24T08:22:00Z", SAVED + 9),
    Draining(25.0, 1),
    Drained(()),
)


class Read:
    """Metrics that are fed and then read as Prometheus reads them."""

    def __init__(self, *events: Event, now: float = SAVED, book: Book | None = None) -> None:
        self.metrics = Metrics(
            version="…", python="…", clock=lambda: now, book=Book() if book is None else book
        )
        for event in events:
            self.metrics.tell(event)

    def __getitem__(self, name: str) -> float:
        """Return the value of `name{labels}`, without the prefix."""
        return self.lines()[PREFIX + name]

    def lines(self) -> dict[str, float]:
        """Return every series of ours and its value."""
        told = self.metrics.render().decode().splitlines()
        return {
            series: float(value)
            for series, _, value in (line.rpartition(" ") for line in told)
            if series.startswith(PREFIX)
        }

    def changed(self) -> set[str]:
        """Return the series that are not as they were at the start."""
        before = Read().lines()
        return {series for series, value in self.lines().items() if before.get(series) != value}


# --- the union of events --------------------------------------------------------------------------------


def test_the_events_of_these_tests_are_all_that_there_are() -> None:
    """A new event must be fed here, and a new state."""
    assert {type(event) for event in EVENTS} == set(typing.get_args(events.Event))
    assert {type(state) for state in STATES} == set(typing.get_args(checkpoint.State))


# --- what is counted ------------------------------------------------------------------------------------


def test_a_pinned_checkpoint_is_detected_and_saved() -> None:
    """From its completion, which is its mtime, to the pin."""
    read = Read(moved(Pinned(), after=0.02))
    assert read["detect_duration_seconds_count"] == 1
    assert read['detect_duration_seconds_bucket{le="0.025"}'] == 1
    assert read['detect_duration_seconds_bucket{le="0.01"}'] == 0
    assert read["last_saved_timestamp_seconds"] == SAVED


def test_an_older_file_that_a_scan_finds_does_not_turn_last_saved_back() -> None:
    """The first scan finds files in any order."""
    older = Moved(saved("step_20.pt", Pinned(), at=SAVED - 100), SAVED)
    assert Read(moved(Pinned()), older)["last_saved_timestamp_seconds"] == SAVED


def test_a_stored_checkpoint_tells_how_long_its_upload_took() -> None:
    """Stored is not durable."""
    read = Read(moved(Stored(OBJECTS), seconds=7.0))
    assert read["upload_duration_seconds_sum"] == 7
    assert read['checkpoints_total{outcome="committed"}'] == 0


def test_a_committed_checkpoint_is_durable() -> None:
    """When, and how long it took; what the newest is then, the manifest says."""
    read = Read(moved(Committed(OBJECTS), after=2.0))
    assert read['checkpoints_total{outcome="committed"}'] == 1
    assert read["last_durable_timestamp_seconds"] == SAVED + 2
    assert read["durable_duration_seconds_sum"] == 2
    assert read["recovery_point_timestamp_seconds"] == 0


def test_the_newest_in_the_manifest_is_the_recovery_point() -> None:
    """When it was saved, its step and its size: from the claim on, also if this process never uploads."""
    read = Read(RecoveryPoint(FIRST, "step_40.pt", 1000, SAVED, SAVED + 2))
    assert read["recovery_point_timestamp_seconds"] == SAVED
    assert read["recovery_point_step"] == 40
    assert read["recovery_point_size_bytes"] == 1000
    assert read["last_durable_timestamp_seconds"] == SAVED + 2


def test_last_durable_is_not_turned_back() -> None:
    """An older one that backfills was made durable later than the newest."""
    newest = RecoveryPoint(FIRST, "step_40.pt", 1000, SAVED, SAVED + 2)
    assert Read(moved(Committed(OBJECTS), after=9), newest)["last_durable_timestamp_seconds"] == SAVED + 9


def test_a_name_without_a_step_has_none() -> None:
    """NaN, and not the step of the one before."""
    first = RecoveryPoint(FIRST, "step_40.pt", 1000, SAVED, SAVED)
    second = RecoveryPoint(Id(1, 2), "weights.pt", 1000, SAVED, SAVED)
    assert math.isnan(Read(first, second)["recovery_point_step"])


@pytest.mark.parametrize(
    "state", [Changed(), Skipped("behind"), Superseded(Id(1, 2))], ids=checkpoint.state_name
)
def test_what_is_not_sent_is_counted_by_why(state: State) -> None:
    """And nothing else changes."""
    word = checkpoint.state_name(state)
    assert Read(moved(state)).changed() == {f'{PREFIX}checkpoints_total{{outcome="{word}"}}'}


@pytest.mark.parametrize(
    ("event", "series", "value"),
    [
        (Torn("a.pt", "is empty"), 'checkpoints_total{outcome="rejected"}', 1),
        (Progress("a.pt", "up", 10, 10, 20), "uploaded_bytes_total", 10),
        (Progress("a.pt", "down", 30, 30, 40), "restored_bytes_total", 30),
        (Requested("list_parts", "ok", 0.1), 's3_requests_total{operation="list_parts",outcome="ok"}', 1),
        (Requested("put_object", "ok", 3), 's3_request_duration_seconds_sum{operation="put_object"}', 3),
        (Retrying("upload", "clock", 1.0, ""), 'retries_total{reason="clock"}', 1),
        (Failed("commit", "bucket", "", ""), 'failures_total{reason="missing",stage="commit"}', 1),
        (Failed("start", "throttled", "", ""), 'failures_total{reason="unreachable",stage="start"}', 1),
        (Failed("pin", "disk", "", ""), 'failures_total{reason="disk",stage="pin"}', 1),
        (Claimed(7, "other"), "generation", 7),
        (Fenced(8, "other"), "fenced", 1),
        (Ready(0.5), "ready", 1),
        (Interruption("rebalance", "", "", SAVED), "interruption_notice_timestamp_seconds", SAVED),
        (Draining(25.0, 1), "draining", 1),
        (Restored("kept", FIRST, "a.pt", 0, 1.5), 'restores_total{outcome="kept"}', 1),
        (Restored("restored", FIRST, "a.pt", 9, 1.5), "restore_duration_seconds", 1.5),
        (FellBack(FIRST, "a.pt", "gone"), 'restores_total{outcome="fell_back"}', 1),
        (Rescanned("overflow", 0.01, 5, 2, 10**9, 77), 'rescans_total{reason="overflow"}', 1),
        (Rescanned("interval", 0.01, 5, 2, 10**9, 77), "missed_events_total", 2),
        (Rescanned("interval", 0.01, 5, 2, 10**9, 77), "spool_free_bytes", 10**9),
        (Rescanned("interval", 0.01, 5, 2, 10**9, 77), "spool_held_bytes", 77),
        (Probed(Abilities(True, False, True, True)), 'store_ability{ability="conditional_put"}', 1),  # noqa: FBT003
    ],
    ids=str,
)  # fmt: skip
def test_an_event_is_counted_where_it_belongs(event: Event, series: str, value: float) -> None:
    """Each by the series that an alert or a dashboard looks at."""
    assert Read(event)[series] == value


def test_ready_draining_and_fenced_end() -> None:
    """They are gauges: 1 only while it is so."""
    assert Read(Ready(1.0), NotReady("displaced"))["ready"] == 0
    assert Read(Ready(1.0), Fenced(2, "other"))["ready"] == 0
    assert Read(Draining(25.0, 1), Drained(()))["draining"] == 0


def test_lag_and_queue_are_computed_at_the_scrape() -> None:
    """From the book, so that they can never disagree with it."""
    book = Book()
    read = Read(now=SAVED + 60, book=book)
    assert read["upload_lag_seconds"] == 0
    book.put(saved("a.pt", Pinned()))
    book.put(saved("b.pt", Stored(OBJECTS), id_=Id(1, 2), at=SAVED + 50))
    assert read["upload_lag_seconds"] == 60
    assert read['queue_checkpoints{state="pinned"}'] == 1
    assert read['queue_checkpoints{state="stored"}'] == 1
    assert read["queue_bytes"] == 2000
