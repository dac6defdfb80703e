"""The metrics as an interface: every series is there from the start, and docs/metrics.md tells of each."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_sidecar import bucket, events
from ckpt_sidecar.events import Event, Failed, Requested, Retrying
from ckpt_sidecar.labels import LABELS, failure_reason
from ckpt_sidecar.metrics import PREFIX
from tests.test_metrics import EVENTS, Read

ROOT = Path(__file__).parents[1]


def words(pattern: str, *modules: str) -> set[str]:
    """Return what the pattern captures in our source."""
    texts = [(ROOT / "ckpt_sidecar" / f"{name}.py").read_text() for name in modules]
    return {word for text in texts for word in re.findall(pattern, text)}


def combinations(*sets: str) -> Iterator[tuple[str, ...]]:
    """Return every combination of the labels' values."""
    return itertools.product(*(LABELS[each] for each in sets))


@pytest.mark.parametrize("event", EVENTS, ids=events.event_name)
def test_no_event_makes_a_series_that_was_not_there_from_the_start(event: Event) -> None:
    """So `rate()` never misses the first failure, and the number of series is known."""
    assert Read(event).lines().keys() == Read().lines().keys()


def test_words_that_nobody_foresaw_make_no_new_series() -> None:
    """A new S3 call, error or stage is counted with the others until it is given a name."""
    odd = (
        Requested("select_object", "what", 0.1),
        Retrying("upload", "what", 1.0, ""),
        Failed("what", "what", "", ""),
    )
    assert Read(*odd).lines().keys() == Read().lines().keys()
    read = Read(*odd)
    assert read['s3_requests_total{operation="other",outcome="failed"}'] == 1
    assert read['retries_total{reason="other"}'] == 1
    assert read['failures_total{reason="other",stage="other"}'] == 1


def test_the_closed_sets_hold_every_word_that_the_program_says() -> None:
    """The words are read from the source of the modules that say them."""
    verbs = "put|get|head|delete|list|create|upload|complete|abort"
    operations = words(rf'"((?:{verbs})_(?:object|part|multipart)[a-z0-9_]*)"', "s3", "bodies", "probe")
    assert operations == set(LABELS["operation"]) - {"other"}
    reasons = words(r'\breason = "([a-z]+)"', "bucket")
    assert reasons - {"other"} == {each.reason for each in bucket.BucketError.__subclasses__()}
    assert {failure_reason(each) for each in reasons} <= set(LABELS["failure_reason"])
    stages = words(r'\bFailed\(\s*"([a-z]+)"', *(path.stem for path in (ROOT / "ckpt_sidecar").glob("*.py")))
    assert stages < set(LABELS["stage"])


def test_every_combination_of_labels_is_there_at_zero() -> None:
    """An alert on a failure that has never happened has something to look at."""
    lines = Read().lines()
    expected = {
        f's3_requests_total{{operation="{o}",outcome="{e}"}}'
        for o, e in combinations("operation", "request_outcome")
    }
    expected |= {
        f'failures_total{{reason="{r}",stage="{s}"}}' for s, r in combinations("stage", "failure_reason")
    }
    expected |= {f'retries_total{{reason="{r}"}}' for r in LABELS["retry_reason"]}
    expected |= {f'checkpoints_total{{outcome="{o}"}}' for o in LABELS["checkpoint_outcome"]}
    expected |= {f'restores_total{{outcome="{o}"}}' for o in LABELS["restore_outcome"]}
    expected |= {f'rescans_total{{reason="{r}"}}' for r in LABELS["rescan_reason"]}
    expected |= {f'store_ability{{ability="{a}"}}' for a in LABELS["ability"]}
    expected |= {f'queue_checkpoints{{state="{s}"}}' for s in LABELS["state"]}
    expected |= {f's3_request_duration_seconds_count{{operation="{o}"}}' for o in LABELS["operation"]}
    assert {series: lines.get(PREFIX + series) for series in expected} == dict.fromkeys(expected, 0)
    assert not [series for series in lines if "_created" in series]


def test_no_label_holds_a_name_or_an_id() -> None:
    """However many checkpoints there are, the number of series stays."""
    text = Read(*EVENTS).metrics.render().decode()
    assert "step_40" not in text
    assert "1-1" not in text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_finds_nothing_to_complain_of() -> None:
    """Names, units, help texts and syntax, by Prometheus' own linter."""
    text = Read(*EVENTS).metrics.render()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def rows() -> list[str]:
    """Return the rows that docs/metrics.md has to have."""
    made = []
    for family in Read().metrics.registry.collect():
        if family.name.startswith(PREFIX):
            values: dict[str, dict[str, None]] = {}
            for sample in family.samples:
                for label, value in sample.labels.items():
                    values.setdefault(label, {})[value] = None
            values.pop("le", None)
            labels = "; ".join(f"`{label}`: {', '.join(each)}" for label, each in values.items())
            name = family.name + ("_total" if family.type == "counter" else "")
            made.append(f"| `{name}` | {family.type} | {labels or '-'} | {family.documentation} |")
    return made


def test_the_documentation_has_one_row_for_each_metric_and_no_other() -> None:
    """Name, type, labels with their values, and the help text."""
    told = (ROOT / "docs" / "metrics.md").read_text().splitlines()
    assert [line for line in told if line.startswith("| `")] == rows()
