"""The Kubernetes manifest: what in it must agree, and its pods played as processes on this machine."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckpt_sidecar.answers import PERMISSIONS
from ckpt_sidecar.settings import Settings
from tests.conftest import ON_ONE, SERVERS, admin, create_bucket

yaml: Any = pytest.importorskip("yaml")
pytest.importorskip("torch")

REPO = Path(__file__).parents[2]
ACCOUNT, JOB = yaml.safe_load_all((REPO / "deploy/kubernetes/job.yaml").read_text(encoding="utf-8"))
POD = JOB["spec"]["template"]["spec"]
(SIDECAR,) = POD["initContainers"]
(TRAINER,) = POD["containers"]

SECONDS = 40.0  # for whatever is waited for; nothing here takes nearly so long
MOUNT = "/checkpoints"
SAVES = 10
# What an image brings along: its entry point, and where a command is looked for.
ENTRYPOINTS = {"ckpt-sidecar": [sys.executable, "-m", "ckpt_sidecar"], "trainer": []}
PROGRAMS = {"python": sys.executable}


def flags() -> dict[str, str]:
    """Return the sidecar's arguments by name."""
    pairs = [each.removeprefix("--").partition("=") for each in SIDECAR["args"]]
    return {name: value for name, _, value in pairs}


def variables(container: dict[str, Any]) -> dict[str, Any]:
    """Return a container's environment variables by name."""
    return {each["name"]: each for each in container.get("env", [])}


def mounts(container: dict[str, Any]) -> dict[str, str]:
    """Return the names of the volumes by the paths at which a container sees them."""
    return {each["mountPath"]: each["name"] for each in container["volumeMounts"]}


# --- what must agree ---------------------------------------------------------------------------------


def test_the_sidecar_outlives_the_trainer_and_no_two_pods_overlap() -> None:
    """A native sidecar, a pod that is not retried in place, and a successor that waits for the drain."""
    assert SIDECAR["restartPolicy"] == "Always"
    assert POD["restartPolicy"] == "Never"
    assert JOB["spec"]["podReplacementPolicy"] == "Failed"
    assert POD["terminationGracePeriodSeconds"] >= float(flags()["drain-timeout"]) + 30


def test_both_containers_see_the_same_checkpoints_as_the_same_user() -> None:
    """One volume on the node's disk at one path, and no user but the pod's."""
    assert SIDECAR["volumeMounts"] == [{"name": "checkpoints", "mountPath": MOUNT}]
    assert mounts(TRAINER)[MOUNT] == "checkpoints"
    assert flags()["watch"] == MOUNT
    volumes = {each["name"]: each for each in POD["volumes"]}
    assert volumes["checkpoints"]["emptyDir"] == {}
    assert {*mounts(SIDECAR).values(), *mounts(TRAINER).values()} == {*volumes}
    user = POD["securityContext"]
    assert user["runAsUser"] == user["runAsGroup"] == user["fsGroup"] != 0
    assert SIDECAR["securityContext"] == TRAINER["securityContext"]
    assert not {"runAsUser", "runAsGroup", "privileged"} & {*SIDECAR["securityContext"]}
    assert SIDECAR["securityContext"]["allowPrivilegeEscalation"] is False


def test_probes_and_prometheus_ask_where_the_sidecar_listens() -> None:
    """The trainer waits for the restore; a sidecar that works is left alone."""
    (port,) = SIDECAR["ports"]
    listens = Settings(watch=Path(MOUNT), bucket="some-bucket").address()[1]
    assert port["containerPort"] == listens
    assert SIDECAR["startupProbe"]["httpGet"] == {"path": "/readyz", "port": port["name"]}
    assert SIDECAR["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": port["name"]}
    assert "readinessProbe" not in SIDECAR
    annotations = JOB["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"prometheus.io/scrape": "true", "prometheus.io/port": str(listens)}


def test_the_settings_are_the_sidecars_own_and_can_be_used() -> None:
    """No flag or variable that does not exist, no value that would be refused; the pod is the attempt."""
    prefix = "CKPT_SIDECAR_"
    given: dict[str, Any] = {name.replace("-", "_"): value for name, value in flags().items()}
    for name, each in variables(SIDECAR).items():
        if name.startswith(prefix):
            given[name.removeprefix(prefix).lower()] = each["value"]
    for name, kind in (("keep_local", int), ("drain_timeout", float)):
        given[name] = kind(given[name])
    Settings(**given | {"watch": Path(given["watch"])})
    assert variables(SIDECAR)["POD_UID"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.uid"}}
    assert ACCOUNT["kind"] == "ServiceAccount"
    assert ACCOUNT["metadata"]["name"] == POD["serviceAccountName"]


def test_the_policy_in_the_readme_allows_all_that_the_sidecar_asks_for() -> None:
    """Every permission that a refusal may name is in it, for the bucket and the prefix of the manifest."""
    text = (REPO / "deploy/kubernetes/README.md").read_text(encoding="utf-8")
    policy = json.loads(text.partition("```json\n")[2].partition("```")[0])
    of_bucket, of_objects = policy["Statement"]
    allowed = {*of_bucket["Action"], *of_objects["Action"]}
    assert allowed >= {*re.findall(r"s3:\w+", " ".join(PERMISSIONS.values()))}
    assert all("Bucket" in each for each in of_bucket["Action"])
    bucket = variables(SIDECAR)["CKPT_SIDECAR_BUCKET"]["value"]
    team = variables(SIDECAR)["CKPT_SIDECAR_PREFIX"]["value"].partition("/")[0]
    assert of_bucket["Resource"] == f"arn:aws:s3:::{bucket}"
    assert of_objects["Resource"] == f"arn:aws:s3:::{bucket}/{team}/*"


# --- a pod, played -----------------------------------------------------------------------------------


class Pod:
    """One pod: a fresh disk, a uid, and the manifest's command lines as processes.

    Only what a cluster would put there is put in their place: the mount's path, the downward API, the
    Secret; and bucket, prefix, endpoint and port, which are the user's.
    """

    def __init__(self, home: Path, uid: str, given: dict[str, str]) -> None:
        self.disk = home / uid
        self.disk.mkdir()
        self.port = free_port()
        self._home = home
        self._uid = uid
        self._given = given | {"CKPT_SIDECAR_LISTEN": f"127.0.0.1:{self.port}"}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, container: dict[str, Any], *more: str, cwd: Path) -> None:
        """Start a container's process as the manifest has it; `more` are further arguments."""
        words = [*container.get("command", ENTRYPOINTS[container["name"]]), *container["args"], *more]
        words[0] = PROGRAMS.get(words[0], words[0])
        with self._log(container).open("wb") as log:
            self._running[container["name"]] = subprocess.Popen(
                [self._seen_from_here(each) for each in words],
                cwd=cwd,
                env=self._environment(container),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _seen_from_here(self, word: str) -> str:
        return word.replace(MOUNT, str(self.disk))

    def _environment(self, container: dict[str, Any]) -> dict[str, str]:
        downward = {"metadata.uid": self._uid}
        found = {"PATH": os.environ["PATH"], "HOME": str(self._home), "NO_PROXY": "127.0.0.1"}
        if "envFrom" in container:
            assert [each["secretRef"]["optional"] for each in container["envFrom"]] == [True]
            found |= {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        for name, each in variables(container).items():
            found[name] = each.get("value") or downward[each["valueFrom"]["fieldRef"]["fieldPath"]]
        return found | self._given if container is SIDECAR else found

    def _log(self, container: dict[str, Any]) -> Path:
        return self._home / f"{self._uid}-{container['name']}.log"

    def said(self, container: dict[str, Any]) -> list[str]:
        """Return the whole lines that a container's process has said so far."""
        return self._log(container).read_text(encoding="utf-8").split("\n")[:-1]

    def until(self, container: dict[str, Any], look: Callable[[], bool]) -> None:
        """Look again and again; fails when the process has ended, or in time."""
        process = self._running[container["name"]]
        deadline = time.monotonic() + SECONDS
        while not look():
            assert process.poll() is None, self.said(container)[-20:]
            assert time.monotonic() < deadline, self.said(container)[-20:]
            time.sleep(0.05)

    def probe(self, kind: str) -> bool:
        """Ask as the kubelet does."""
        asked = SIDECAR[kind]
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=asked["timeoutSeconds"])
        try:
            client.request("GET", asked["httpGet"]["path"])
            return 200 <= client.getresponse().status < 400
        except OSError:
            return False
        finally:
            client.close()

    def begin(self, *more: str) -> None:
        """Start the sidecar, and once its startup probe succeeds the trainer."""
        self.start(SIDECAR, cwd=self._home)
        self.until(SIDECAR, lambda: self.probe("startupProbe"))
        assert self.probe("livenessProbe")
        self.start(TRAINER, *more, cwd=REPO / "examples")

    def wait(self, container: dict[str, Any]) -> int:
        """Wait for the end; return the exit code, negative for a signal."""
        return self._running[container["name"]].wait(SECONDS)

    def terminate(self, container: dict[str, Any]) -> int:
        """Send SIGTERM and wait for the end."""
        self._running[container["name"]].send_signal(signal.SIGTERM)
        return self.wait(container)

    def saves(self) -> list[str]:
        """Return the names of the checkpoints that the trainer has told of, oldest first."""
        return [line.rpartition(" saved ")[2] for line in self.said(TRAINER) if " saved " in line]

    def kill(self) -> None:
        """End whatever still runs."""
        for process in self._running.values():
            process.kill()
            process.wait()


@contextmanager
def pod(home: Path, uid: str, given: dict[str, str]) -> Iterator[Pod]:
    """Make a pod, and see to its end."""
    made = Pod(home, uid, given)
    try:
        yield made
    finally:
        made.kill()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def given(s3_endpoint: str) -> dict[str, str]:
    """What the user of the manifest decides, for a fresh bucket."""
    unfenced = s3_endpoint == SERVERS.get("rclone")  # a store without conditional writes
    return {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "CKPT_SIDECAR_BUCKET": create_bucket(s3_endpoint),
        "CKPT_SIDECAR_PREFIX": "team/run",
        "CKPT_SIDECAR_ALLOW_UNFENCED": str(unfenced),
    }


def durable(given: dict[str, str]) -> list[str]:
    """Return the names in latest.json, newest first."""
    found = admin(given["AWS_ENDPOINT_URL"]).get_object(
        Bucket=given["CKPT_SIDECAR_BUCKET"], Key=f"{given['CKPT_SIDECAR_PREFIX']}/latest.json"
    )
    return [each["name"] for each in json.load(found["Body"])["checkpoints"]]


@ON_ONE
def test_a_job_that_runs_through_leaves_all_its_checkpoints_durable(
    tmp_path: Path, given: dict[str, str]
) -> None:
    """The trainer ends, the sidecar is told to, and drains; a pod that comes later has nothing left to do."""
    with pod(tmp_path, "first", given) as first:
        first.begin()
        assert first.wait(TRAINER) == 0
        assert first.said(TRAINER)[0] == "starting from scratch"
        assert first.terminate(SIDECAR) == 0
        assert len(first.saves()) == SAVES
        assert durable(given) == first.saves()[::-1]
        keep = int(flags()["keep-local"])
        assert sorted(path.name for path in first.disk.glob("*.pt")) == first.saves()[-keep:]
        weights = first.said(TRAINER)[-1]
    with pod(tmp_path, "second", given) as second:
        second.begin()
        assert second.wait(TRAINER) == 0
        assert second.said(TRAINER) == [f"resumed from {durable(given)[0]}", weights]
        assert second.terminate(SIDECAR) == 0
        assert len(durable(given)) == SAVES


@ON_ONE
def test_a_pod_that_is_evicted_loses_no_save_and_the_next_one_goes_on_from_the_last(
    tmp_path: Path, given: dict[str, str]
) -> None:
    """SIGTERM ends the trainer, then the sidecar; the next pod restores before its trainer starts."""
    with pod(tmp_path, "first", given) as first:
        first.begin("--step-seconds", "0.01")
        first.until(TRAINER, lambda: len(first.saves()) >= 3)
        assert first.terminate(TRAINER) == -signal.SIGTERM
        assert first.terminate(SIDECAR) == 0
        left = durable(given)
        assert left[-len(first.saves()) :] == first.saves()[::-1]  # one more may have been saved and not told
    with pod(tmp_path, "second", given) as second:
        second.begin()
        assert second.wait(TRAINER) == 0
        assert second.said(TRAINER)[0] == f"resumed from {left[0]}"
        assert second.terminate(SIDECAR) == 0
        assert durable(given) == [*second.saves()[::-1], *left]
        assert len(durable(given)) == SAVES
