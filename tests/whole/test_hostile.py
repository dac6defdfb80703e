"""The real sidecar among those who wish it ill: at its port, in its bucket, in its directory, in its log."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from ckpt_sidecar.bodies import Held
from ckpt_sidecar.bucket import Absent, BucketError, Denied, ObjectRef, Span, Unchanged, Upload
from ckpt_sidecar.s3 import S3Bucket
from tests.conftest import ON_ONE
from tests.fakes import BytesSink
from tests.whole.meddling import Answer, Meddle, Request, meddling, refusal
from tests.whole.running import HOME, SECONDS, Daemon, Target, archive, daemon, save, until
from tests.whole.test_bad_input import NOWHERE, goes_on, seeded

MIB = 1 << 20
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


def peak(it: Daemon) -> int:
    """The most memory that it has had, in bytes."""
    status = Path(f"/proc/{it.process.pid}/status").read_text(encoding="ascii")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


# --- at its port ---------------------------------------------------------------------------------------


@pytest.fixture
def serving(watch: Path) -> Iterator[Daemon]:
    """A sidecar that answers, whatever its bucket does."""
    with daemon(watch, Target(NOWHERE, "bucket"), "--drain-timeout", "0") as it:
        it.until(lambda: it.ask("/healthz")[0] == 200)
        yield it


def address(it: Daemon) -> tuple[str, int]:
    """Where it answers."""
    host, _, port = json.loads((it.watch / HOME / "spool.json").read_bytes())["address"].partition(":")
    return host, int(port)


def send(it: Daemon, raw: bytes) -> bytes:
    """Send these bytes and return the answer, up to its end."""
    with socket.create_connection(address(it), timeout=SECONDS) as client:
        answer = b""
        with suppress(ConnectionError):
            client.sendall(raw)
            while data := client.recv(MIB):
                answer += data
        return answer


def request(line: str, *headers: str) -> bytes:
    """Return a request of that line."""
    return "\r\n".join([line, "Host: x", "Connection: close", *headers, "", ""]).encode("latin-1")


REFUSED = {
    **{
        f"method {method!r}": request(f"{method} /metrics HTTP/1.1")
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND")
    },
    **{
        f"no method {method!r}": request(f"{method} /metrics HTTP/1.1")
        for method in ("get", "FOO", "\x00\x01", "GET GET", "G" * 9000)
    },
    **{
        f"path {path[:40]!r}": request(f"GET {path} HTTP/1.1")
        for path in (
            "/../../etc/passwd",
            "//etc/passwd",
            "/%2e%2e/%2e%2e/etc/passwd",
            "/metrics/../../etc/passwd",
            "/static/..%5c..%5c",
            "http://elsewhere/etc/passwd",
            "file:///etc/passwd",
            "/metrics%00",
            "/metrics;x",
            "/.ckpt-sidecar/spool.json",
            "/x.pt",
            "/" + "a" * 9000,
            "*",
        )
    },
    "a header too long": request("GET /metrics HTTP/1.1", "X: " + "a" * 9000),
    "a header with a zero": request("GET /metrics HTTP/1.1", "X: a\x00b"),
    "a header of two lines": request("GET /metrics HTTP/1.1", "X : a"),
    "a thousand headers": request("GET /metrics HTTP/1.1", *(f"X{n}: y" for n in range(1000))),
    "two hosts": request("GET /metrics HTTP/1.1", "Host: y"),
    "two lengths": request("GET /metrics HTTP/1.1", "Content-Length: 1", "Content-Length: 2"),
    "a length and chunks": request("GET /x HTTP/1.1", "Content-Length: 1", "Transfer-Encoding: chunked"),
    "no HTTP at all": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n",
}


@pytest.mark.fault("G4")
def test_what_is_no_question_of_ours_is_refused_in_few_words(serving: Daemon) -> None:
    """Each with a 4xx; none changes, tells or costs anything, not even a line of the log."""
    before = serving.status()
    for name, raw in REFUSED.items():
        answer = send(serving, raw)
        assert re.match(rb"HTTP/1\.[01] 4\d\d ", answer), (name, answer[:100])
        assert len(answer) < 20_000, name  # it may hold the line that was sent
        assert b"root:" not in answer, name
    after = serving.status()
    told = {"queue", "newest", "committed", "generation", "spool", "watch"}
    assert {each: after[each] for each in told} == {each: before[each] for each in told}
    assert serving.ask("/healthz") == (200, "ok\n")
    assert peak(serving) < 200 * MIB
    assert "Error handling request" not in serving.said
    serving.stop()  # and no traceback anywhere


@pytest.mark.fault("G4")
def test_a_foreign_host_gets_what_all_get_and_nothing_that_a_browser_would_share(serving: Daemon) -> None:
    """Probes and Prometheus come by any name or address, so none can be refused; nothing is echoed."""
    answer = send(serving, b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\nOrigin: http://evil.example\r\n\r\n"[:-2]
                  + b"Connection: close\r\n\r\n")  # fmt: skip
    assert answer.startswith(b"HTTP/1.1 200 ")
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert b"access-control" not in head
    assert b"set-cookie" not in head
    assert b"evil" not in answer


@pytest.mark.fault("G4")
@pytest.mark.parametrize("kind", ["headers", "one header", "a body", "chunks"])
def test_a_question_without_an_end_costs_bounded_memory(serving: Daemon, kind: str) -> None:
    """It is cut off, or read past; others are answered meanwhile."""
    before = peak(serving)
    heads = {
        "headers": b"GET /metrics HTTP/1.1\r\nHost: x\r\n",
        "one header": b"GET /metrics HTTP/1.1\r\nX: ",
        "a body": b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n",
        "chunks": b"POST /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    }
    pieces = {"headers": b"X: yyyyyyyyyyyyyy\r\n" * 4096, "chunks": b"10000\r\n" + b"x" * 65_536 + b"\r\n"}
    piece, sent = pieces.get(kind, b"x" * 65_536), 0
    with socket.create_connection(address(serving), timeout=5) as client, suppress(OSError):
        client.sendall(heads[kind])
        while sent < 96 * MIB:
            client.sendall(piece)
            sent += len(piece)
            if sent % (16 * MIB) < len(piece):
                assert serving.ask("/healthz")[0] == 200
    assert serving.ask("/healthz")[0] == 200
    assert peak(serving) - before < 32 * MIB


@pytest.mark.long
@pytest.mark.fault("G4")
def test_many_who_ask_a_byte_at_a_time_are_dropped_and_hold_nobody_up(serving: Daemon) -> None:
    """However busily they drip: a question has ten seconds in all."""
    clients = [socket.create_connection(address(serving), timeout=SECONDS) for _ in range(200)]
    for client in clients:
        client.sendall(b"GET /metrics HTTP/1.1\r\n")
        client.settimeout(0)
    left = list(clients)

    def drip() -> bool:
        assert serving.ask("/healthz")[0] == 200
        for client in list(left):
            try:
                client.send(b"X: y\r\n")
                if client.recv(100) == b"":
                    left.remove(client)
            except BlockingIOError:
                pass
            except OSError:
                left.remove(client)
        time.sleep(0.2)  # the drip itself
        return not left

    until(drip, "all are dropped")
    for client in clients:
        client.close()


# --- in its bucket -------------------------------------------------------------------------------------


def manifest_of(raw: Iterator[bytes], **headers: str) -> Answer:
    """Return an answer that claims to be `latest.json`."""
    return Answer(200, raw, {"etag": '"hostile"', "content-type": "application/json", **headers})


@pytest.mark.long
@ON_ONE
@pytest.mark.fault("G1")
@pytest.mark.parametrize("kind", ["a gibibyte", "no end", "a bomb"])
def test_a_manifest_without_measure_is_not_read(
    tmp_path: Path, watch: Path, target: Target, kind: str
) -> None:
    """Not ready, with the object's name and without the memory; all is well once it is put right."""
    bodies = seeded(tmp_path / "earlier", target, "new.pt")
    given: list[int] = []
    hostile = threading.Event()
    hostile.set()

    def pour() -> Iterator[bytes]:
        for _ in range(1024):
            given.append(MIB)
            yield b"[" * MIB

    def bomb() -> bytes:
        return gzip.compress(b'{"schema":1,"x":"' + b"x" * (64 * MIB) + b'"}')

    packed = bomb() if kind == "a bomb" else b""

    def meddle(asked: Request) -> Answer | None:
        if asked.method != "GET" or "/latest.json" not in asked.path or not hostile.is_set():
            return None
        if kind == "a gibibyte":
            return manifest_of(pour(), **{"content-length": str(1 << 30)})
        if kind == "no end":
            return manifest_of(pour(), connection="close")
        return manifest_of(iter([packed]), **{"content-length": str(len(packed)), "content-encoding": "gzip"})

    with (
        meddling(target.endpoint, meddle) as endpoint,
        daemon(watch, Target(endpoint, target.bucket)) as it,
    ):
        if kind == "a bomb":  # it is mangled as it is: nobody unpacks it
            it.wait_said("rebuilt", error="not JSON")
        else:
            it.wait_not_ready("latest.json" if kind == "a gibibyte" else "does not tell its length")
        assert sum(given) < 64 * MIB
        assert peak(it) < 300 * MIB
        hostile.clear()
        it.wait_ready()
        assert (watch / "new.pt").read_bytes() == bodies["new.pt"]
        goes_on(it)
        assert it.stop() == 0


def durable(it: Daemon, target: Target, name: str, body: bytes) -> None:
    """Save a file, and wait until it is durable, seen past what is in between."""
    save(it.watch / name, body)
    it.until(lambda: target.holds(name, body), f"durable: {name}")


OWNER = "123456789012"


@pytest.mark.fault("G7")
@pytest.mark.parametrize("owner", [OWNER, ""])
async def test_both_clients_name_the_owner_that_the_bucket_must_have(
    monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    """The control calls' and the bodies'; neither where none was given."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    named: dict[str, str] = {}

    def meddle(asked: Request) -> Answer:
        named[asked.method] = asked.headers.get("x-amz-expected-bucket-owner", "")
        return refusal(403, "AccessDenied", "Access Denied")

    with meddling(NOWHERE, meddle) as endpoint:
        async with S3Bucket.open("bucket", endpoint_url=endpoint, owner=owner, tell=lambda _: None) as bucket:
            for asked in (bucket.head("x"), bucket.put_part(Upload("x", "1"), Span(1, 0, 1), Held(b"x"))):
                with pytest.raises(Denied):
                    await asked
    assert named == {"HEAD": owner, "PUT": owner}


@pytest.mark.long
@ON_ONE
@pytest.mark.fault("G7")
def test_every_request_names_the_owner_that_the_bucket_must_have(
    tmp_path: Path, watch: Path, target: Target
) -> None:
    """Puts, parts, completes, lists, deletes, ranges: a store that asks for it on each serves all."""
    large = archive("x" * (20 * MIB))
    without: list[str] = []

    def meddle(asked: Request) -> Answer | None:
        if asked.headers.get("x-amz-expected-bucket-owner") == OWNER:
            return None
        without.append(f"{asked.method} {asked.path}")
        return refusal(403, "AccessDenied", "Access Denied")

    with meddling(target.endpoint, meddle) as endpoint:
        store = Target(endpoint, target.bucket)
        more = ("--expected-bucket-owner", OWNER, "--keep-remote", "2")
        with daemon(watch, store, *more) as it:
            it.wait_ready()
            for n in range(3):
                durable(it, target, f"{n}.pt", archive(f"{n}"))
            durable(it, target, "large.pt", large)
            it.until(lambda: target.names() == {"2.pt", "large.pt"}, "the others expire")
            assert it.stop() == 0
        with daemon(tmp_path / "again", store, *more) as it:
            it.wait_ready()
            assert (tmp_path / "again/large.pt").read_bytes() == large
            assert it.stop() == 0
    assert without == []


@ON_ONE
@pytest.mark.fault("G7")
def test_a_bucket_of_somebody_elses_is_refused(tmp_path: Path, watch: Path, target: Target) -> None:
    """Not ready, with the reason; nothing is read into the watch dir, and nothing leaves it."""
    seeded(tmp_path / "earlier", target, "theirs.pt")
    before = target.read("latest.json")

    def meddle(asked: Request) -> Answer | None:
        given = asked.headers.get("x-amz-expected-bucket-owner", OWNER)
        return None if given == OWNER else refusal(403, "AccessDenied", "Access Denied")

    more = ("--expected-bucket-owner", "999999999999", "--drain-timeout", "0")
    with (
        meddling(target.endpoint, meddle) as endpoint,
        daemon(watch, Target(endpoint, target.bucket), *more) as it,
    ):
        it.wait_not_ready("AccessDenied")
        it.wait_said("failed")
        assert "correct --expected-bucket-owner if it is not 999999999999's" in it.events("failed")[0]["hint"]
        save(watch / "ours.pt", archive("ours"))
        it.wait_said("checkpoint_pinned", name="ours.pt")
        assert it.stop() == 3
    assert target.names() == {"theirs.pt"}
    assert target.read("latest.json") == before
    assert not (watch / "theirs.pt").exists()


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.long
@ON_ONE
@pytest.mark.fault("G2")
def test_a_checkpoint_that_would_run_code_is_only_bytes(tmp_path: Path, watch: Path, target: Target) -> None:
    """It goes up and comes back as it is; who unpickles it sets it off, and that is nobody here."""
    bomb = pickle.dumps(Bomb(tmp_path / "went-off"))
    bodies = {"archive.pt": archive(bomb.decode("latin-1")), "bare.pt": bomb}
    with daemon(watch, target) as it:
        it.wait_ready()
        for name, body in bodies.items():
            save(watch / name, body)
            it.wait_durable(name)
        assert it.stop() == 0
    with daemon(tmp_path / "again", target) as it:
        it.wait_ready()
        assert (tmp_path / "again/bare.pt").read_bytes() == bomb
        assert it.stop() == 0
    assert not (tmp_path / "went-off").exists()
    pickle.loads(bomb)  # noqa: S301 (the proof that it is one)
    assert (tmp_path / "went-off").exists()


# --- what it must not tell -----------------------------------------------------------------------------

KEY, SECRET, TOKEN = "AKIAHIDDENHIDDEN", "hidden/secret+key", "hiddenToken//with=padding"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": TOKEN,
    "AWS_REGION": "us-east-1",
}


def telling_all() -> Meddle:
    """A store that says all that it was told, in every place where an error may say something."""
    turns = count()
    signed = (
        f"http://store.example/x?X-Amz-Credential={KEY}&X-Amz-Security-Token={TOKEN}&X-Amz-Signature=feed"
    )

    def meddle(asked: Request) -> Answer:
        said = f"see {signed} for x-amz-security-token: {asked.headers.get('x-amz-security-token')}"
        other = f"it was Authorization: {asked.headers.get('authorization')}"
        answers = [
            refusal(403, "SignatureDoesNotMatch", said),
            refusal(403, "SignatureDoesNotMatch", other),
            refusal(400, "ExpiredToken", said),
            refusal(500, "InternalError", other),
            refusal(503, "SlowDown", said),
            Answer(307, b"", {"location": signed}),
            Answer(502, f"<html>{said}</html>".encode()),
            Answer(200, other.encode(), {"content-type": "text/plain"}),
        ]
        return answers[next(turns) % len(answers)]

    return meddle


@pytest.mark.long
@pytest.mark.fault("G3")
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_secret_is_told_whatever_the_store_says(watch: Path, log_format: str) -> None:
    """Not in the log, in the metrics, on a page, in the spool, nor in what the commands print."""
    with meddling(NOWHERE, telling_all()) as endpoint:
        save(watch / "x.pt", archive())
        store = Target(endpoint, "bucket")
        more = ("--log-format", log_format, "--drain-timeout", "1")
        with daemon(watch, store, *more, env=CREDENTIALS) as it:
            told = [it.wait_not_ready()]
            it.until(lambda: "SignatureDoesNotMatch: see " in it.said, "it says so")
            told += [it.ask(path)[1] for path in ("/metrics", "/status.json", "/readyz", "/nothing")]
            told += [*commands(watch, store), *spooled(watch)]
            it.stop()
        told.append(it.said)
    for text in told:
        assert betrayed(text) == [], text


def betrayed(text: str) -> list[str]:
    """What of the secrets stands in the text."""
    secrets = ("HIDDEN", "hidden", "Token//", "secret+key", "feed", "X-Amz-Credential", "Signature=")
    return [secret for secret in secrets if secret in text]


@pytest.mark.fault("G3")
async def test_no_error_of_any_request_has_a_secret_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the control calls and of the bodies' threads, over all that a store may say."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    upload, span, source = Upload("x", "1"), Span(1, 0, 9), Held(b"weights..")
    told = []
    with meddling(NOWHERE, telling_all()) as endpoint:
        async with S3Bucket.open("bucket", endpoint_url=endpoint, tell=lambda _: None) as bucket:
            for _ in range(8):
                for asked in (
                    bucket.get("x", limit=9),
                    bucket.put("x", (source, 9), when=Absent(), metadata={}),
                    bucket.put_part(upload, span, source),
                    bucket.get_range(ObjectRef("x", 9, "etag"), span, BytesSink(9)),
                    bucket.list_parts(upload),
                    bucket.delete("x", when=Unchanged("etag"), version_id="1"),
                ):
                    try:
                        await asked
                    except (BucketError, KeyError) as error:  # KeyError: a 200 that says nothing
                        told.append(str(error))
    assert len(told) > 20
    assert any("SignatureDoesNotMatch" in each for each in told)
    assert [each for each in told if betrayed(each)] == []


def commands(watch: Path, store: Target) -> Iterator[str]:
    """What each command says, on both its streams."""
    where = ("--bucket", store.bucket, "--endpoint-url", store.endpoint)
    for words in (
        ("ls", *where),
        ("status", "--watch", str(watch)),
        ("restore", "--watch", f"{watch}-other", "--bucket", "b", "--endpoint-url", f"http://u:{SECRET}@h"),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "ckpt_sidecar", *words],
            env=os.environ | CREDENTIALS,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        yield ended.stdout + ended.stderr


def spooled(watch: Path) -> Iterator[str]:
    """What stands in the spool's own files."""
    for path in (watch / HOME).rglob("*.json*"):
        yield path.read_text(encoding="utf-8")


@ON_ONE
@pytest.mark.fault("G3")
def test_the_child_has_the_environment_that_it_was_given_and_no_more(watch: Path, target: Target) -> None:
    """Nothing of ours is added to what anybody may read under /proc."""
    code = (
        "import json, os, pathlib, sys; "
        "ours = pathlib.Path(f'/proc/{os.getppid()}/environ').read_text().split(chr(0))[:-1]; "
        "json.dump([dict(os.environ), dict(each.split('=', 1) for each in ours)], open(sys.argv[1], 'w'))"
    )
    told = watch.parent / "environment.json"
    with daemon(
        watch, target, "--", sys.executable, "-c", code, str(told), env={"OF_THE_TRAINER": "1"}
    ) as it:
        assert it.ended() == 0
    theirs, ours = json.loads(told.read_bytes())
    assert theirs.pop("LC_CTYPE", "") in ("", "C.UTF-8")  # the child's own Python may set it
    assert theirs == {name: value for name, value in ours.items() if name != "LC_CTYPE"}
    assert theirs["OF_THE_TRAINER"] == "1"


@pytest.mark.fault("G3")
def test_an_aws_configuration_that_cannot_be_used_is_one_line(watch: Path) -> None:
    """With the mend, and without a traceback: exit code 1."""
    with daemon(watch, Target(NOWHERE, "bucket"), env={"AWS_PROFILE": "no-such-profile"}) as it:
        assert it.ended() == 1
        assert "The config profile (no-such-profile) could not be found (check the AWS" in it.said


# --- in its directory ----------------------------------------------------------------------------------


def another_users(path: Path) -> None:
    """Give it away."""
    os.chown(path, 12345, 12345, follow_symlinks=False)


@AS_ROOT
@pytest.mark.fault("G6")
@pytest.mark.parametrize(
    "forged",
    [
        "pins/999999999999999999-1/evil.pt",
        "caught/1-2-3/evil.pt",
        "spool.json",
        "pins/1-1.json",
        "pins",
        "incoming",
    ],
)
def test_a_spool_in_which_another_user_has_put_something_is_refused(watch: Path, forged: str) -> None:
    """It stood open once, and what lies in it may be a lie: exit code 1, by name, and nothing is touched."""
    home = watch / HOME
    path = home / forged
    if path.suffix:
        path.parent.mkdir(parents=True)
        path.write_bytes(b'{"spool": "forged", "generation": 999999999999999999}')
        top = path if path.parent in (home, home / "pins") else path.parent
    else:
        path.mkdir(parents=True)
        top = path
    another_users(top)
    home.chmod(0o777)
    with daemon(watch, Target(NOWHERE, "bucket")) as it:
        assert it.ended() == 1
        assert f"{top} belongs to another user (run as its owner, or remove it)" in it.said
    assert path.exists()
    assert home.stat().st_mode & 0o777 == 0o700  # from now on nobody adds to it


@pytest.mark.fault("G6")
@pytest.mark.parametrize("place", ["pins", "caught", "pins/1-1", "caught/1-2-3"])
def test_a_symlink_in_the_spool_is_refused(watch: Path, place: str) -> None:
    """What it leads to is neither read, sent nor removed."""
    outside = watch.parent / "outside"
    save(outside / "secret.pt", archive("secret"))
    link = watch / HOME / place
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with daemon(watch, Target(NOWHERE, "bucket")) as it:
        assert it.ended() == 1
        assert f"{link} belongs to another user" in it.said
    assert (outside / "secret.pt").read_bytes() == archive("secret")
    assert [path.name for path in outside.iterdir()] == ["secret.pt"]


@ON_ONE
@pytest.mark.fault("G6")
def test_a_spool_that_stood_open_is_closed_and_used(watch: Path, target: Target) -> None:
    """A chmod over the whole directory is a slip and no attack: all in it is still ours."""
    with daemon(watch, Target(NOWHERE, "bucket"), "--drain-timeout", "0") as it:
        body = save(watch / "x.pt", archive())
        it.wait_said("checkpoint_pinned", name="x.pt")
        assert it.stop() == 3
    for path in [watch / HOME, *(watch / HOME).rglob("*")]:
        path.chmod(0o777)
    with daemon(watch, target) as it:
        it.wait_durable("x.pt", body)
        assert (watch / HOME).stat().st_mode & 0o777 == 0o700
        assert it.stop() == 0


# --- in its log ----------------------------------------------------------------------------------------

WILD = 'x\n{"event": "checkpoint_committed", "name": "forged.pt"}\n\x1b[2J\x1b]0;title\x07\r\u2028\u202e.pt'


@ON_ONE
@pytest.mark.fault("G8")
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_file_name_forges_no_line_and_moves_no_terminal(
    watch: Path, target: Target, log_format: str
) -> None:
    """Torn, refused or ignored: each line is ours, and says it in printable characters."""
    save(watch / WILD, archive())
    (watch / f"link{WILD}").symlink_to("nowhere")
    with daemon(watch, target, "--log-format", log_format) as it:
        it.wait_ready()
        goes_on(it)
        it.until(lambda: "has a control character" in it.said and "symlink" in it.said)
        assert it.stop() == 0
    lines = it.said.split("\n")
    assert all(line.replace("\t", "").isprintable() for line in lines)
    assert not any(line.startswith('{"event": "checkpoint_committed"') for line in lines)
    if log_format == "json":
        assert all(isinstance(json.loads(line), dict) for line in lines if line)
        assert "forged.pt" not in {each.get("name") for each in it.events("checkpoint_committed")}
    else:
        assert all(re.match(r"\d{4}-\d\d-\d\dT", line) for line in lines if line)
