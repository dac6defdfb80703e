"""A node that is about to be taken away: the notice, and what becomes of the newest checkpoint. Row E14."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import ON_ONE
from tests.metadata import SPOT, metadata_service
from tests.whole.running import Target, daemon, save

NOTE = ".interruption-notice.json"
MIB = 1024 * 1024


@ON_ONE
@pytest.mark.fault("E14")
def test_a_notice_is_told_to_everybody_who_may_act_on_it(s3_endpoint: str, tmp_path: Path) -> None:
    """The trainer, the log, Prometheus and the status; and it saves once more, which becomes durable."""
    watch = tmp_path / "checkpoints"
    watch.mkdir()
    (watch / NOTE).write_text("of an earlier life\n")
    with metadata_service() as service:
        env = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": service.url}
        with daemon(watch, Target.new(s3_endpoint), "--ec2-notices", env=env) as it:
            it.wait_ready()
            it.until(lambda: not (watch / NOTE).exists(), "the old note is taken away")
            assert it.metrics()["ckpt_sidecar_interruption_notice_timestamp_seconds"] == 0
            assert it.status()["interruption"] is None
            service.notices[SPOT] = b'{"action": "terminate", "time": "2026-11-24T08:22:00Z"}'
            it.wait_said("interruption", kind="spot", action="terminate", level="warning")
            it.until((watch / NOTE).exists, "the note")
            note = {"kind": "spot", "action": "terminate", "due": "2026-11-24T08:22:00Z"}
            assert json.loads((watch / NOTE).read_bytes()) == note
            assert it.status()["interruption"] == note
            assert it.metrics()["ckpt_sidecar_interruption_notice_timestamp_seconds"] > 1.7e9
            last = save(watch / "last.pt", b"saved once more")
            it.wait_durable("last.pt", last)
            assert it.stop() == 0


@ON_ONE
@pytest.mark.fault("E14")
def test_without_the_flag_nobody_is_asked(s3_endpoint: str, tmp_path: Path) -> None:
    """It is off by default."""
    watch = tmp_path / "checkpoints"
    watch.mkdir()
    with metadata_service() as service:
        env = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": service.url}
        with daemon(watch, Target.new(s3_endpoint), env=env) as it:
            it.wait_ready()
            it.wait_durable("a.pt", save(watch / "a.pt", os.urandom(100)))
            assert it.stop() == 0
        assert service.given == 0
