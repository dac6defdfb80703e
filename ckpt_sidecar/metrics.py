"""Every metric, with its help text; a reader of events, on a registry of its own.

Names, types and labels are an interface: alerts stand on them. Every label combination exists from the
start at 0, so that `rate()` never misses the first failure; no label ever holds a name or an id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics import MetricWrapperBase

from ckpt_sidecar.checkpoint import (
    Book,
    Changed,
    Committed,
    Pinned,
    Skipped,
    Stored,
    Superseded,
    Uploading,
    state_name,
)
from ckpt_sidecar.events import (
    Claimed,
    Drained,
    Draining,
    Event,
    Failed,
    FellBack,
    Fenced,
    Interruption,
    Moved,
    NotReady,
    Probed,
    Progress,
    Ready,
    RecoveryPoint,
    Requested,
    Rescanned,
    Restored,
    Retrying,
    Torn,
)
from ckpt_sidecar.labels import LABELS, failure_reason, within
from ckpt_sidecar.names import step_of

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "ckpt_sidecar_"
LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)  # seconds
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds


class Metrics:
    """The metrics of one sidecar. `clock` gives seconds since the epoch; lag is computed at the scrape."""

    def __init__(self, *, version: str, python: str, clock: Callable[[], float], book: Book) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # 300 more series that nobody reads
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._last_saved = 0
        self._durable_at = 0.0
        self._queue(book, clock)
        self._durability()
        self._traffic()
        self._life()
        build = self._gauge("build_info", "Which ckpt-sidecar this is; always 1.", ["version", "python"])
        build.labels(version, python).set(1)

    # --- what there is ---

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(PREFIX + name, text, tuple(labels), registry=self.registry)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(PREFIX + name, text, tuple(labels), registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *, labels: Iterable[str] = ()
    ) -> Histogram:
        return Histogram(PREFIX + name, text, tuple(labels), buckets=buckets, registry=self.registry)

    def _queue(self, book: Book, clock: Callable[[], float]) -> None:
        self._gauge(
            "upload_lag_seconds",
            "Age of the oldest checkpoint that is not yet durable; 0 when everything is safe.",
        ).set_function(lambda: book.lag(clock()))
        queue = self._gauge(
            "queue_checkpoints", "Checkpoints that are not yet durable, by how far they have come.", ["state"]
        )
        for kind in (Pinned, Uploading, Stored):
            queue.labels(kind.__name__.lower()).set_function(partial(book.count, kind))
        self._gauge("queue_bytes", "Bytes that are not yet durable.").set_function(lambda: book.bytes)

    def _durability(self) -> None:
        self.last_saved = self._gauge(
            "last_saved_timestamp_seconds",
            "When the trainer last completed a checkpoint; 0 before the first.",
        )
        self.last_durable = self._gauge(
            "last_durable_timestamp_seconds", "When a checkpoint last became durable; 0 before the first."
        )
        self.recovery_point = self._gauge(
            "recovery_point_timestamp_seconds",
            "When the newest durable checkpoint was saved: what losing the node now would go back to; "
            "0 where there is none.",
        )
        self.recovery_step = self._gauge(
            "recovery_point_step", "The newest durable checkpoint's training step, where its name tells it."
        )
        self.recovery_size = self._gauge("recovery_point_size_bytes", "The newest durable checkpoint's size.")
        self.checkpoints = self._counter("checkpoints", "What became of the checkpoints.", ["outcome"])
        _all(self.checkpoints, "checkpoint_outcome")
        self.durable = self._histogram(
            "durable_duration_seconds", "From a checkpoint's completion to its commit.", LONG
        )
        self.upload = self._histogram(
            "upload_duration_seconds", "From a checkpoint's first byte sent until it was stored.", LONG
        )
        self.detect = self._histogram(
            "detect_duration_seconds", "From a checkpoint's completion until it was pinned.", SHORT
        )

    def _traffic(self) -> None:
        self.uploaded = self._counter(
            "uploaded_bytes", "Bytes of checkpoints sent, retries not counted twice."
        )
        self.restored = self._counter("restored_bytes", "Bytes of checkpoints fetched.")
        self.requests = self._counter(
            "s3_requests", "Requests to the store, and how they ended.", ["operation", "outcome"]
        )
        for operation in LABELS["operation"]:
            for outcome in LABELS["request_outcome"]:
                self.requests.labels(operation, outcome)
        self.request_seconds = self._histogram(
            "s3_request_duration_seconds",
            "How long the store took to answer.",
            SHORT + LONG[8:],
            labels=["operation"],
        )
        _all(self.request_seconds, "operation")
        self.retries = self._counter(
            "retries", "How often something had to be said again, and why.", ["reason"]
        )
        _all(self.retries, "retry_reason")
        self.failures = self._counter(
            "failures", "What did not work and was not mended by a retry.", ["stage", "reason"]
        )
        for stage in LABELS["stage"]:
            for reason in LABELS["failure_reason"]:
                self.failures.labels(stage, reason)

    def _life(self) -> None:
        self.generation = self._gauge("generation", "The generation that this sidecar has claimed; 0 before.")
        self.fenced = self._gauge("fenced", "1 when another sidecar holds the prefix: nothing is uploaded.")
        self.ready = self._gauge("ready", "1 when a trainer that starts now finds the newest checkpoint.")
        self.draining = self._gauge("draining", "1 while the sidecar makes the last checkpoints durable.")
        self.interruption = self._gauge(
            "interruption_notice_timestamp_seconds",
            "When a spot or rebalance notice was last seen; 0 when none was.",
        )
        self.restores = self._counter("restores", "How restores ended.", ["outcome"])
        _all(self.restores, "restore_outcome")
        self.restore_seconds = self._gauge("restore_duration_seconds", "How long the last restore took.")
        self.rescans = self._counter("rescans", "Listings of the watch dir, and why.", ["reason"])
        _all(self.rescans, "rescan_reason")
        self.rescan_seconds = self._gauge("rescan_duration_seconds", "How long the last listing took.")
        self.missed = self._counter(
            "missed_events", "Files found by a listing and no event: a sign of NFS, or of overflow."
        )
        self.free = self._gauge(
            "spool_free_bytes", "Free space on the watch dir's file system at the last listing."
        )
        self.held = self._gauge(
            "spool_held_bytes", "Bytes that only our pins keep on the disk, at the last listing."
        )
        self.ability = self._gauge(
            "store_ability", "1 when the store was seen to honour it at the start.", ["ability"]
        )
        _all(self.ability, "ability")

    # --- what happens ---

    def tell(self, event: Event) -> None:
        """Count the event."""
        match event:
            case Moved():
                self._moved(event)
            case Progress():
                (self.uploaded if event.direction == "up" else self.restored).inc(event.bytes)
            case Requested():
                operation = within("operation", event.operation)
                self.requests.labels(operation, within("request_outcome", event.outcome)).inc()
                self.request_seconds.labels(operation).observe(event.seconds)
            case Retrying():
                self.retries.labels(within("retry_reason", event.reason)).inc()
            case Failed():
                self.failures.labels(within("stage", event.stage), failure_reason(event.reason)).inc()
            case RecoveryPoint():
                self._recovery_point(event)
            case Torn():
                self.checkpoints.labels("rejected").inc()
            case Probed():
                for name in LABELS["ability"]:
                    self.ability.labels(name).set(getattr(event.abilities, name))
            case _:
                self._lived(event)

    def _lived(self, event: Event) -> None:
        match event:
            case Claimed():
                self.generation.set(event.generation)
            case Fenced():
                self.fenced.set(1)
                self.ready.set(0)
            case Restored():
                self.restores.labels(within("restore_outcome", event.outcome)).inc()
                self.restore_seconds.set(event.seconds)
            case FellBack():
                self.restores.labels("fell_back").inc()
            case Ready():
                self.ready.set(1)
            case NotReady():
                self.ready.set(0)
            case Rescanned():
                self.rescans.labels(within("rescan_reason", event.reason)).inc()
                self.rescan_seconds.set(event.seconds)
                self.missed.inc(event.missed)
                self.free.set(event.free_bytes)
                self.held.set(event.held_bytes)
            case Interruption():
                self.interruption.set(event.seen)
            case Draining() | Drained():
                self.draining.set(isinstance(event, Draining))
            case _:
                pass  # said in the log; nothing to count

    def _moved(self, event: Moved) -> None:
        it, state = event.checkpoint, event.checkpoint.state
        since = max(0.0, event.at - it.saved_at / 1e9)
        match state:
            case Pinned():
                self.detect.observe(since)
                self._last_saved = max(self._last_saved, it.saved_at)  # a scan finds old ones, in any order
                self.last_saved.set(self._last_saved / 1e9)
            case Stored():
                self.upload.observe(event.seconds)
            case Committed():
                self.durable.observe(since)
                self._last_durable(event.at)
            case _:
                pass
        if isinstance(state, Committed | Superseded | Skipped | Changed):
            self.checkpoints.labels(state_name(state)).inc()

    def _last_durable(self, at: float) -> None:
        self._durable_at = max(self._durable_at, at)
        self.last_durable.set(self._durable_at)

    def _recovery_point(self, event: RecoveryPoint) -> None:
        step = step_of(event.name)
        self.recovery_point.set(event.saved_at)
        self.recovery_size.set(event.size)
        self.recovery_step.set(float("nan") if step is None else step)
        self._last_durable(event.stored_at)

    def render(self) -> bytes:
        """Return the metrics as Prometheus reads them."""
        return generate_latest(self.registry)


def _all(metric: MetricWrapperBase, label: str) -> None:
    """Let every combination exist from the start."""
    for value in LABELS[label]:
        metric.labels(value)
