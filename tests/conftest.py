"""What all tests share: tests that are coroutines, and the buckets that they run on."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from ckpt_sidecar.bucket import Bucket
from ckpt_sidecar.s3 import S3Bucket
from tests.fakes import CARELESS, MemoryBucket

SERVERS = {
    kind: os.environ[name]
    for kind in ("moto", "localstack", "ceph", "rclone")
    if (name := f"S3_ENDPOINT_{kind.upper()}") in os.environ
}
PROOFS = ("tests/crash", "tests/model", "tests/whole/test_soak.py")
ON_S3 = [pytest.param(kind, marks=pytest.mark.s3) for kind in SERVERS]
# What no store has a part in is played on one, the quickest; without that (beside Ceph alone) it is not.
ON_ONE = pytest.mark.parametrize(
    "s3_endpoint", [each for each in ON_S3[:1] if each.values[0] in ("moto", "localstack")], indirect=True
)


def pytest_configure() -> None:
    """Under nohup a hang-up goes on being ignored here, but not in the sidecars that are started."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)  # exec resets a handler, but not that it is ignored


@pytest.fixture(autouse=True)
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for each test and its fixtures; nothing stays on it, and no thread that reads events."""
    with asyncio.Runner() as runner:
        yield runner
    assert not [each for each in threading.enumerate() if "Inotify" in type(each).__name__]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run tests that are coroutines."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    runner: Any = pyfuncitem.funcargs["runner"]
    runner.run(pyfuncitem.obj(**arguments))
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what the proofs have counted: states, kills, seeds."""
    for report in terminalreporter.stats.get("passed", []):
        if report.nodeid.startswith(PROOFS) and report.capstdout.strip():
            terminalreporter.write_line(f"{report.nodeid}: {report.capstdout.strip()}")


@pytest.fixture(params=ON_S3)
def s3_endpoint(request: pytest.FixtureRequest) -> str:
    """The URL of a real S3 server, of every kind that tools/with-s3 has started."""
    return SERVERS[request.param]


@pytest.fixture(params=["memory", "careless", *ON_S3])
def bucket(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[Bucket]:
    """An empty bucket of every kind, open and probed; the careless one has no abilities."""
    if request.param in SERVERS:
        yield from opened(SERVERS[request.param], runner)
    else:
        yield MemoryBucket() if request.param == "memory" else MemoryBucket(abilities=CARELESS)


@pytest.fixture(params=["memory", *ON_S3])
def versioned(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[Bucket]:
    """An empty bucket that keeps versions, where the store can."""
    if request.param in SERVERS:
        yield from opened(SERVERS[request.param], runner, versioned=True)
    else:
        yield MemoryBucket(versioned=True)


def opened(endpoint: str, runner: asyncio.Runner, *, versioned: bool = False) -> Iterator[S3Bucket]:
    """Make a fresh bucket on a server, open and probe it."""
    name = create_bucket(endpoint, versioned=versioned)
    opening = S3Bucket.open(name, endpoint_url=endpoint, tell=lambda _: None)
    bucket = runner.run(opening.__aenter__())
    runner.run(bucket.probe(".probe"))
    yield bucket
    runner.run(opening.__aexit__(None, None, None))


def create_bucket(endpoint: str, *, versioned: bool = False) -> str:
    """Make a bucket with a name that nobody has used, and return it."""
    client = admin(endpoint)
    name = f"test-{uuid.uuid4()}"
    client.create_bucket(Bucket=name)
    if versioned:
        try:
            client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        except client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] != "NotImplemented":
                raise
    return name


_ADMINS: dict[str, Any] = {}


def admin(endpoint: str) -> Any:
    """Return a plain client for what the sidecar itself never does."""
    import boto3  # noqa: PLC0415 (only where there is a server)

    if endpoint not in _ADMINS:
        _ADMINS[endpoint] = boto3.Session().client("s3", endpoint_url=endpoint)
    return _ADMINS[endpoint]
