"""What can be wrong with the input: the directory, the bucket, the files, what an earlier run has left.

Each time the real sidecar meets it beside good files: it says what is wrong and how to mend it, goes on with
the others, and loses nothing.
"""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import shutil
import socket
import socketserver
import stat
import tempfile
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ckpt_sidecar.disk import files_below, inode_of
from tests.conftest import ON_ONE, SERVERS, admin
from tests.loopback import served
from tests.whole.running import HOME, Daemon, Target, archive, daemon, powerless, save, until

HOUR = 3600.0
NOWHERE = "http://127.0.0.1:9"  # the discard service: nobody listens
WITHOUT_POWER = pytest.mark.skipif(powerless() is None, reason="root's power cannot be dropped here")
MEND_RIGHTS = "run the sidecar as the trainer's user"


def goes_on(it: Daemon, name: str = "good.pt") -> None:
    """Save a good file beside what is wrong: it becomes durable."""
    save(it.watch / name, archive(name))
    it.wait_durable(name)


def wait_held(it: Daemon, name: str) -> None:
    """Wait until the file that was just saved is held by a link of ours, whatever becomes of its name."""
    inode = inode_of(it.watch / name)

    def held() -> bool:
        return any(inode_of(path) == inode for path in files_below(it.watch / HOME))

    it.until(held, f"held: {name}")


# --- the watch dir -------------------------------------------------------------------------------------


def test_a_watch_dir_that_is_missing_is_made(tmp_path: Path, target: Target) -> None:
    """The trainer may make it later than we start; its parent must be there."""
    with daemon(tmp_path / "ckpt", target) as it:
        it.wait_ready()
        goes_on(it)
        assert it.stop() == 0


def test_a_watch_dir_that_cannot_be_used_ends_it_with_the_mend(tmp_path: Path) -> None:
    """Its parent is missing, or it is no directory: exit code 1, and nothing is made."""
    (tmp_path / "file").write_bytes(b"")
    for watch, said in (
        (tmp_path / "missing/ckpt", f"no such directory: {tmp_path}/missing (make it, or mend --watch)"),
        (tmp_path / "file", f"not a directory: {tmp_path}/file (--watch takes the checkpoint directory)"),
        (tmp_path / "file/ckpt", f"no such directory: {tmp_path}/file (make it, or mend --watch)"),
    ):
        (tmp_path / "logs").mkdir(exist_ok=True)
        with daemon(watch, Target(NOWHERE, "bucket"), log=tmp_path / "logs/log") as it:
            assert it.ended() == 1
            assert said in it.said
            assert not (tmp_path / "missing").exists()


@WITHOUT_POWER
@pytest.mark.parametrize("name", ["ckpt", "ckpt/inside"])
def test_a_watch_dir_that_may_not_be_written_ends_it_with_the_mend(
    tmp_path: Path, watch: Path, name: str
) -> None:
    """Nothing could be held there, so nothing would be safe: exit code 1."""
    watch.chmod(0o555)
    with daemon(
        tmp_path / name, Target(NOWHERE, "bucket"), before=powerless() or (), log=tmp_path / "log"
    ) as it:
        assert it.ended() == 1
        assert "cannot write into the watch dir: Permission denied: " + str(watch) in it.said
        assert MEND_RIGHTS in it.said


@pytest.mark.parametrize("prefix", ["a/../b", "a//b", "a\nb", ".ckpt-sidecar/a", "\udcff"])
def test_a_prefix_that_cannot_be_is_refused(watch: Path, prefix: str) -> None:
    """Exit code 2, before anything is made."""
    with daemon(watch, Target(NOWHERE, "bucket", prefix)) as it:
        assert it.ended() == 2
        assert "Error: --prefix: " in it.said
        assert "(give a path such as team/run-17)" in it.said
    assert list(watch.iterdir()) == []


# --- the bucket ----------------------------------------------------------------------------------------


@pytest.mark.fault("C14")
def test_a_bucket_that_is_missing_may_come_later(watch: Path, target: Target) -> None:
    """Not ready until then, which is said with the bucket's name; what was saved meanwhile is kept."""
    missing = Target(target.endpoint, f"{target.bucket}-late")
    with daemon(watch, missing) as it:
        why = it.wait_not_ready("NoSuchBucket")
        assert f"there is no bucket '{missing.bucket}'" in why
        assert "check the name, the region and the endpoint" in why
        failed = it.wait_said("failed", stage="start", reason="bucket")
        assert failed["what"] == f"s3://{missing.bucket}/{missing.prefix}"
        assert missing.bucket in failed["hint"]
        assert it.ask("/healthz")[0] == 200
        save(watch / "good.pt", archive())
        wait_held(it, "good.pt")
        admin(target.endpoint).create_bucket(Bucket=missing.bucket)
        it.wait_ready()
        it.wait_durable("good.pt")
        assert it.stop() == 0


class Refusal(NamedTuple):
    """How a store refuses us, and how we tell of it."""

    status: int
    code: str
    message: str
    reason: str
    mend: str
    more: str = ""


CHECK_CREDENTIALS = "check the credentials that the AWS chain finds (aws sts get-caller-identity)"
REFUSALS = {
    "denied": Refusal(403, "AccessDenied", "Access Denied", "denied", "allow s3:PutObject on test-bucket"),
    "unknown key": Refusal(
        403,
        "InvalidAccessKeyId",
        "The AWS Access Key Id you provided does not exist in our records.",
        "credentials",
        CHECK_CREDENTIALS,
    ),
    "wrong secret": Refusal(
        403,
        "SignatureDoesNotMatch",
        "The request signature we calculated does not match the signature you provided.",
        "credentials",
        CHECK_CREDENTIALS,
    ),
    "expired": Refusal(
        400, "ExpiredToken", "The provided token has expired.", "credentials", CHECK_CREDENTIALS
    ),
    "region, redirected": Refusal(
        301,
        "PermanentRedirect",
        "The bucket you are attempting to access must be addressed using the specified endpoint.",
        "region",
        "set AWS_REGION=eu-central-1",
        "<Endpoint>test-bucket.s3.eu-central-1.amazonaws.com</Endpoint><Region>eu-central-1</Region>",
    ),
    "region, signed": Refusal(
        400,
        "AuthorizationHeaderMalformed",
        "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-central-1'",
        "region",
        "set AWS_REGION=eu-central-1",
        "<Region>eu-central-1</Region>",
    ),
}


@contextmanager
def refusing(it: Refusal) -> Iterator[str]:
    """Answer every request as S3 does when it refuses; yield the endpoint."""
    text = f"<Error><Code>{it.code}</Code><Message>{it.message}</Message>{it.more}</Error>"
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()

    class Refuses(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            self.send_response(it.status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _refuse  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Nobody reads it."""

    with served(Refuses) as url:
        yield url


@pytest.mark.fault("C11", "C12", "C14")
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_bucket_that_refuses_us_keeps_it_not_ready_and_is_named_with_the_mend(
    watch: Path, refusal: Refusal
) -> None:
    """By its own words and ours; what is saved is held, and named at the end with exit code 3."""
    save(watch / "early.pt", archive(), age=HOUR)
    with (
        refusing(refusal) as endpoint,
        daemon(watch, Target(endpoint, "test-bucket"), "--drain-timeout", "0") as it,
    ):
        why = it.wait_not_ready("s3://test-bucket/", refusal.mend)
        assert refusal.code in why
        failed = it.wait_said("failed", stage="start", reason=refusal.reason)
        assert failed["what"] == "s3://test-bucket/team/run/"
        assert refusal.mend in failed["hint"]
        assert failed["error"].count(refusal.mend) == 1
        save(watch / "good.pt", archive())
        wait_held(it, "good.pt")
        assert it.ask("/healthz")[0] == 200
        assert it.stop() == 3
        assert "early.pt" in it.events("drained")[0]["left"]
        assert it.events("restored") == []
    for name in ("early.pt", "good.pt"):
        held = [path for path in (watch / HOME).rglob(name) if path.samefile(watch / name)]
        assert len(held) == 1


def test_what_is_saved_before_ready_counts_as_not_durable(watch: Path) -> None:
    """In the queue, in the lag, and at the end: exit code 3, and its name."""
    with daemon(watch, Target(NOWHERE, "bucket"), "--drain-timeout", "0") as it:
        it.wait_not_ready()
        save(watch / "good.pt", archive())
        wait_held(it, "good.pt")
        it.until(lambda: [each["name"] for each in it.status()["queue"]] == ["good.pt"])
        assert it.status()["lag_seconds"] > 0
        assert it.stop() == 3
        assert it.events("drained")[0]["left"] == ["good.pt"]


@ON_ONE
def test_what_a_bucket_refused_becomes_durable_once_it_does_not(watch: Path, target: Target) -> None:
    """The trainer may have deleted it meanwhile."""
    with (
        refusing(REFUSALS["unknown key"]) as endpoint,
        daemon(watch, Target(endpoint, "test-bucket"), "--drain-timeout", "0") as it,
    ):
        it.wait_not_ready("InvalidAccessKeyId")
        body = save(watch / "good.pt", archive())
        wait_held(it, "good.pt")
        (watch / "good.pt").unlink()
        it.stop()
    with daemon(watch, target) as it:
        it.wait_durable("good.pt", body)
        assert it.stop() == 0


@pytest.mark.s3
@pytest.mark.skipif("ceph" not in SERVERS, reason="only Ceph checks signatures")
@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_named_by_a_real_store_too(watch: Path, name: str) -> None:
    """An unknown key, or a wrong secret."""
    with daemon(watch, Target.new(SERVERS["ceph"]), env={name: "wrong"}) as it:
        it.wait_not_ready("check the credentials that the AWS chain finds")
        assert it.stop() == 0


class _Pump(socketserver.BaseRequestHandler):
    """Passes bytes on, both ways, until one side ends."""

    def __init__(self, endpoint: str, *rest: Any) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._to = (host, int(port))
        super().__init__(*rest)

    def handle(self) -> None:
        """Serve one connection."""
        with socket.create_connection(self._to) as onward:
            back = threading.Thread(target=self._pass, args=(onward, self.request), daemon=True)
            back.start()
            self._pass(self.request, onward)
            back.join()

    @staticmethod
    def _pass(source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                to.sendall(data)
        for each in (source, to):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class _Forwarder(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


@contextmanager
def forwarding(port: int, endpoint: str) -> Iterator[None]:
    """Have the server at `endpoint` answer at this port, too."""
    with _Forwarder(("127.0.0.1", port), partial(_Pump, endpoint)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def seeded(watch: Path, target: Target, *names: str) -> dict[str, bytes]:
    """Have checkpoints of an earlier run in the bucket; return their bytes."""
    with daemon(watch, target) as it:
        it.wait_ready()
        for name in names:
            goes_on(it, name)
        assert it.stop() == 0
    return {name: (watch / name).read_bytes() for name in names}


@pytest.mark.fault("F7", "C15")
@ON_ONE
def test_an_endpoint_that_is_down_at_first_is_not_taken_for_an_empty_bucket(
    tmp_path: Path, watch: Path, target: Target
) -> None:
    """Not ready until it comes up; then the newest checkpoint is restored, and what was saved is durable.

    As history: whoever saves before the restore has not begun from the newest.
    """
    bodies = seeded(tmp_path / "earlier", target, "old.pt", "new.pt")
    port = free_port()
    away = Target(f"http://127.0.0.1:{port}", target.bucket)
    with daemon(watch, away) as it:
        it.wait_not_ready(f"127.0.0.1:{port}")
        trying = it.wait_said("retrying", reason="connection")
        assert f"127.0.0.1:{port}" in trying["error"]
        assert "check the endpoint, DNS and the way to it" in trying["error"]
        body = save(watch / "good.pt", archive())
        wait_held(it, "good.pt")
        assert it.events("restored") == []
        with forwarding(port, target.endpoint):
            it.wait_ready()
            until(lambda: target.holds("good.pt", body), "good.pt")
            assert it.stop() == 0
        assert [each["outcome"] for each in it.events("restored")] == ["restored"]
        assert (watch / "new.pt").read_bytes() == bodies["new.pt"]
        assert target.listed() == ["new.pt", "old.pt", "good.pt"]


# --- latest.json ---------------------------------------------------------------------------------------


def mangled(raw: bytes, how: str) -> bytes:
    """Return `latest.json` with something wrong in it."""
    data = json.loads(raw)
    newest = data["checkpoints"][0]
    match how:
        case "empty":
            return b""
        case "not JSON":
            return b"\x00\xff not JSON"
        case "wrong types":
            newest["size"] = str(newest["size"])
        case "up and away":
            newest["name"] = newest["key"] = "../../etc/passwd"
        case "outside the prefix":
            newest["key"] = f"team/other/{newest['name']}"
    return json.dumps(data).encode()


def check_rebuilt(watch: Path, target: Target, bodies: dict[str, bytes], how: str, said: str) -> None:
    """Mangle `latest.json`, and have it rebuilt, the newest checkpoint restored, and the next one durable."""
    raw = target.read("latest.json")
    assert raw is not None
    target.write("latest.json", mangled(raw, how))
    with daemon(watch, target) as it:
        it.wait_ready()
        rebuilt = it.wait_said("rebuilt", error=said)
        assert rebuilt["found"] == len(bodies)
        assert rebuilt["level"] == "warning"
        newest = list(bodies)[-1]
        assert (watch / newest).read_bytes() == bodies[newest]
        assert it.wait_said("restored", outcome="restored", name=newest)
        goes_on(it, f"after {how}.pt")
        assert it.stop() == 0
    assert target.listed() == [f"after {how}.pt", *list(bodies)[::-1]]
    bodies[f"after {how}.pt"] = archive(f"after {how}.pt")


@pytest.mark.fault("F8")
def test_a_manifest_that_leads_out_of_the_prefix_is_rebuilt(tmp_path: Path, target: Target) -> None:
    """Nothing outside is read or written."""
    bodies = seeded(tmp_path / "earlier", target, "old.pt", "new.pt")
    check_rebuilt(tmp_path / "ckpt", target, bodies, "up and away", "'../../etc/passwd' is not normalised")


@ON_ONE
def test_a_manifest_that_is_mangled_is_rebuilt_loudly_from_the_objects(
    tmp_path: Path, target: Target
) -> None:
    """However it is mangled: the place and what is wrong there are said, and the newest is restored."""
    bodies = seeded(tmp_path / "earlier", target, "old.pt", "new.pt")
    for n, (how, said) in enumerate(
        (
            ("empty", "not JSON"),
            ("not JSON", "not JSON"),
            ("wrong types", "checkpoints[0].size is not a whole number"),
            ("outside the prefix", "is not a checkpoint's under the prefix 'team/run/'"),
        )
    ):
        check_rebuilt(tmp_path / f"ckpt-{n}", target, bodies, how, said)


@ON_ONE
def test_a_manifest_of_a_newer_version_is_left_alone(tmp_path: Path, watch: Path, target: Target) -> None:
    """Not ready, with the schema and the mend; byte for byte as it was, until somebody puts it right."""
    bodies = seeded(tmp_path / "earlier", target, "new.pt")
    raw = target.read("latest.json")
    assert raw is not None
    newer = json.dumps(json.loads(raw) | {"schema": 99}).encode()
    target.write("latest.json", newer)
    with daemon(watch, target) as it:
        it.wait_not_ready("schema 99 is newer than the 1 that this ckpt-sidecar knows")
        failed = it.wait_said("failed", stage="start", error="schema 99")
        assert failed["what"] == f"s3://{target.bucket}/team/run/"
        body = save(watch / "good.pt", archive())
        wait_held(it, "good.pt")
        assert target.read("latest.json") == newer
        it.stop()
    assert target.read("latest.json") == newer
    assert target.names() == {"new.pt"}
    target.write("latest.json", raw)
    with daemon(watch, target) as it:
        it.wait_durable("good.pt", body)
        assert it.stop() == 0
    assert target.read("new.pt") == bodies["new.pt"]


@ON_ONE
def test_a_manifest_of_a_newer_version_is_named_with_its_mend(
    tmp_path: Path, watch: Path, target: Target
) -> None:
    """Which object it is, and what to do."""
    seeded(tmp_path / "earlier", target, "new.pt")
    raw = target.read("latest.json")
    assert raw is not None
    target.write("latest.json", json.dumps(json.loads(raw) | {"schema": 99}).encode())
    with daemon(watch, target) as it:
        why = it.wait_not_ready("schema 99")
        failed = it.wait_said("failed", stage="start", error="schema 99")
        assert it.stop() == 0
    assert "latest.json" in why
    assert "latest.json" in failed["error"]
    assert "(" in why  # the mend


# --- the spool -----------------------------------------------------------------------------------------

GARBAGE = {
    "nothing": b"",
    "zeros": bytes(4096),
    "cut": b'{"schema": 1, "spool": "abc',
    "list": b"[]",
    "null": b"null",
    "types": b'{"spool": 7, "id": 7, "name": [], "state": {}, "files": 7, "saved_at": "x"}',
    "bytes": b"\xff\xfe\x00",
}


def left_behind(watch: Path, *names: str) -> dict[str, bytes]:
    """Have pins in the spool that never reached a bucket, their files gone; return their bytes."""
    bodies = {name: save(watch / name, archive(name), age=HOUR) for name in names}
    with daemon(watch, Target(NOWHERE, "bucket"), "--drain-timeout", "0") as it:
        for name in names:
            it.wait_said("checkpoint_pinned", name=name)
            (watch / name).unlink()
        assert it.stop() == 3
    return bodies


@ON_ONE
def test_a_spool_that_cannot_be_read_keeps_what_is_pinned(watch: Path, target: Target) -> None:
    """Its record and the pins' entries are named, and made anew; every pin becomes durable."""
    names = [f"{how}.pt" for how in GARBAGE]
    bodies = left_behind(watch, *names)
    home = watch / HOME
    pins = {path.name: path.parent.name for path in (home / "pins").rglob("*.pt")}
    for how, garbage in GARBAGE.items():
        (home / f"pins/{pins[f'{how}.pt']}.json").write_bytes(garbage)
    (home / "known.jsonl").write_bytes(b"\n".join(GARBAGE.values()))
    (home / "spool.json").write_bytes(GARBAGE["cut"])
    with daemon(watch, target) as it:
        broken = it.wait_said("failed", stage="start", error="spool.json cannot be read, a new one is made")
        assert broken["what"] == str(home)
        for name in names:
            it.wait_said("failed", stage="pin", what=f"{home}/pins/{pins[name]}.json", error="cannot be read")
            it.wait_durable(name, bodies[name])
        goes_on(it)
        assert it.stop() == 0
    assert list((home / "pins").iterdir()) == []


@ON_ONE
@pytest.mark.parametrize("how", ["zeros", "null", "types"])
def test_a_spools_record_that_cannot_be_read_is_made_anew(watch: Path, target: Target, how: str) -> None:
    """Whatever stands in it."""
    bodies = left_behind(watch, "pinned.pt")
    (watch / HOME / "spool.json").write_bytes(GARBAGE[how])
    with daemon(watch, target) as it:
        it.wait_said("failed", stage="start", error="spool.json cannot be read, a new one is made")
        it.wait_durable("pinned.pt", bodies["pinned.pt"])
        assert it.stop() == 0


@ON_ONE
@pytest.mark.parametrize("name", ["spool.json", "known.jsonl", "pins/{}.json"])
def test_json_that_is_nested_without_end_is_no_more_than_garbage(
    watch: Path, target: Target, name: str
) -> None:
    """Python's parser raises another error for it than for other garbage."""
    bodies = left_behind(watch, "pinned.pt")
    (pin,) = (watch / HOME / "pins").rglob("pinned.pt")
    (watch / HOME / name.format(pin.parent.name)).write_bytes(b"[" * 100_000)
    with daemon(watch, target) as it:
        it.wait_durable("pinned.pt", bodies["pinned.pt"])
        assert it.stop() == 0


@ON_ONE
def test_a_pins_entry_with_a_number_that_is_none_is_no_more_than_garbage(watch: Path, target: Target) -> None:
    """Python's parser takes 1e999 for infinity, of which there is no whole number."""
    bodies = left_behind(watch, "pinned.pt")
    (pin,) = (watch / HOME / "pins").rglob("pinned.pt")
    entry = watch / HOME / f"pins/{pin.parent.name}.json"
    entry.write_bytes(re.sub(rb'"saved_at": \d+', b'"saved_at": 1e999', entry.read_bytes()))
    assert b"1e999" in entry.read_bytes()
    with daemon(watch, target) as it:
        it.wait_said("failed", stage="pin", what=str(entry), error="cannot be read")
        it.wait_durable("pinned.pt", bodies["pinned.pt"])
        assert it.stop() == 0


# --- names ---------------------------------------------------------------------------------------------

NAMES = [
    "with  two blanks.pt",
    " begins with one.pt",
    "100%.pt",
    "%2F%00%.pt",
    "a+b=c&d.pt",
    "#1?.pt",
    "q?versionId=null.pt",
    "semi;colon,comma:colon@at!.pt",
    "quotes'\"`.pt",
    "back\\slash.pt",
    "<xml>&amp;.pt",
    "[a-z]*?.pt",
    "$(id) ${HOME} {}.pt",
    "-rf.pt",
    "ünïcödé-äß-日本語-😀.pt",
    "line\u2028separator.pt",
    "turned\u202eround.pt",
    "deep/er/with blank/x.pt",
    "not-latest.json.pt",
    "n" * 252 + ".pt",
    unicodedata.normalize("NFC", "é-composed.pt"),
    unicodedata.normalize("NFD", "é-composed.pt"),
]
REFUSED = {
    b"bad-\xff.pt": ("bad-\\udcff.pt", "is not valid UTF-8"),
    b"new\nline.pt": ("new\\nline.pt", "has a control character"),
    b"tab\t.pt": ("tab\\t.pt", "has a control character"),
    b"\x1b[31mred.pt": ("\\x1b[31mred.pt", "has a control character"),
    b"/".join([b"d" * 250] * 4) + b"/x.pt": ("d" * 250, "is too long"),
}


@pytest.mark.fault("A11")
def test_names_go_round_byte_for_byte_or_are_refused_with_a_reason(
    tmp_path: Path, watch: Path, target: Target
) -> None:
    """Those that are refused are said once; the others are keys, and come back as they were."""
    with daemon(watch, target) as it:
        it.wait_ready()
        for raw in REFUSED:
            save(os.fsencode(watch) + b"/" + raw, archive())
        bodies = {name: save(watch / name, archive(name)) for name in NAMES}
        for name, body in bodies.items():
            it.wait_durable(name, body)
        until(lambda: sorted(target.listed()) == sorted(NAMES), "all are listed")
        for shown, reason in REFUSED.values():
            it.wait_said("ignored", name=shown, reason=reason)
        it.wait_rescans(2)
        assert len(it.events("ignored")) == len(REFUSED)
        assert target.names() == set(NAMES)
        assert it.stop() == 0
    last = NAMES[0]
    with daemon(watch, target) as it:
        it.wait_ready()
        save(watch / last, bodies[last])
        newest = "e\u0301 %2F+#?&='\"\\*[x];\u2028$.pt"
        bodies[newest] = save(watch / newest, archive(newest))
        it.wait_durable(newest)
        assert it.stop() == 0
    with daemon(tmp_path / "next", target) as it:
        it.wait_ready()
        assert (tmp_path / "next" / newest).read_bytes() == bodies[newest]
        assert os.fsencode(newest) in os.listdir(os.fsencode(tmp_path / "next"))  # noqa: PTH208
        assert it.stop() == 0


@pytest.mark.fault("A11")
@ON_ONE
def test_our_own_names_are_never_shadowed(watch: Path, target: Target) -> None:
    """Whatever the pattern: not the manifest, and nothing out of the spool."""
    (watch / "deeper").mkdir()
    with daemon(watch, target, "--pattern", "*") as it:
        it.wait_ready()
        save(watch / "latest.json", b'{"schema": 1}')
        save(watch / HOME / "planted.pt", archive())
        save(watch / HOME / "pins/planted.pt", archive())
        save(watch / "deeper/latest.json", b"another job's, should its prefix be so")
        for name in ("latest.json", "deeper/latest.json"):
            assert it.wait_said("ignored", name=name)["reason"] == "is one of ckpt-sidecar's own names"
        goes_on(it, "good.bin")
        it.wait_rescans(2)
        assert len(it.events("ignored")) == 2
        assert it.stop() == 0
    assert target.names() == {"good.bin"}
    assert target.listed() == ["good.bin"]


# --- files ---------------------------------------------------------------------------------------------


def saved_by_torch(content: int, **more: Any) -> bytes:
    """Return what torch.save writes."""
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    weight = torch.full((64, 64), float(content))
    state = {"weight": weight, "bias": weight + 1, "step": torch.tensor(content)}
    torch.save(state, buffer, **more)
    return buffer.getvalue()


def torn_files() -> dict[str, tuple[bytes, str]]:
    """Return names, bytes that are not whole, and what is to be said of them."""
    whole = saved_by_torch(1)
    directory = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"PK\x01\x02"))
    headers = [found.start() for found in re.finditer(rb"PK\x03\x04", whole)]
    page = max(at // 4096 * 4096 for at in headers if at // 4096 * 4096 + 4096 < directory)
    zipped = "zip archive"
    return {
        "zero-bytes.pt": (b"", "is empty"),
        "zeros.pt": (bytes(100_000), "is nothing but zeros"),
        "cut-in-the-last-byte.pt": (whole[:-1], zipped),
        "cut-in-the-directory.pt": (whole[: directory + 10], zipped),
        "cut-in-a-record.pt": (whole[: len(whole) // 2], zipped),
        "hole.pt": (whole[:page] + bytes(4096) + whole[page + 4096 :], "a hole?"),
        "first-page-lost.pt": (bytes(4096) + whole[4096:], "its first page is lost"),
    }


@pytest.mark.fault("A3", "A4")
def test_a_torn_file_is_reported_and_never_uploaded_and_its_whole_version_is(
    watch: Path, target: Target
) -> None:
    """Once each, with the reason; those that lay there at the start, and those that come."""
    torn = torn_files()
    for name, (body, _) in torn.items():
        save(watch / name, body, age=HOUR)
    with daemon(watch, target) as it:
        it.wait_ready()
        for name, (_, reason) in torn.items():
            it.wait_said("torn", name=name, reason=reason)
        goes_on(it)
        it.wait_rescans(2)
        assert len(it.events("torn")) == len(torn)
        assert target.names() == {"good.pt"}
        for name in torn:
            save(watch / name, saved_by_torch(2))
            it.wait_durable(name)
        assert it.stop() == 0
    assert target.names() == {"good.pt", *torn}


@ON_ONE
def test_a_file_is_called_torn_only_after_a_while(watch: Path, target: Target) -> None:
    """It may just be slow; at the end of the patience it is said, and a whole save after it is taken."""
    torn = torn_files()
    with daemon(watch, target) as it:
        it.wait_ready()
        for name, (body, _) in torn.items():
            save(watch / name, body)
        goes_on(it)
        for name, (_, reason) in torn.items():
            it.wait_said("torn", name=name, reason=reason)
        assert len(it.events("torn")) == len(torn)
        assert target.names() == {"good.pt"}
        for name in torn:
            (watch / name).write_bytes(saved_by_torch(3))
            it.wait_durable(name)
        assert it.stop() == 0


@ON_ONE
def test_a_legacy_save_is_uploaded_once_it_has_settled_and_loads(watch: Path, target: Target) -> None:
    """A pickle does not say where it ends: only rest tells."""
    torch = pytest.importorskip("torch")
    body = saved_by_torch(4, _use_new_zipfile_serialization=False)
    with daemon(watch, target) as it:
        it.wait_ready()
        with (watch / "legacy.pt").open("wb") as file:
            for start in range(0, len(body), 1000):
                file.write(body[start : start + 1000])
                file.flush()
        it.wait_durable("legacy.pt", body)
        assert it.stop() == 0
    stored = target.read("legacy.pt")
    assert stored is not None
    loaded = torch.load(io.BytesIO(stored), weights_only=True)
    assert int(loaded["step"]) == 4
    assert bool((loaded["weight"] == 4).all())


@pytest.mark.fault("A10")
@ON_ONE
def test_symlinks_are_never_followed_and_said_once(tmp_path: Path, watch: Path, target: Target) -> None:
    """To a checkpoint inside or outside, dangling, in a loop, to a directory: the bytes behind stay there."""
    outside = tmp_path / "outside"
    save(outside / "secret.pt", archive("secret"))
    links = {
        "inside.pt": "real.pt",
        "outside.pt": str(outside / "secret.pt"),
        "dangling.pt": "nowhere.pt",
        "loop.pt": "loop.pt",
        "pair-a.pt": "pair-b.pt",
        "pair-b.pt": "pair-a.pt",
        "directory.pt": str(outside),
    }
    with daemon(watch, target) as it:
        it.wait_ready()
        save(watch / "real.pt", archive("real"))
        for name, to in links.items():
            (watch / name).symlink_to(to)
        for name in links:
            it.wait_said("ignored", name=name, reason="is a symlink")
        goes_on(it)
        it.wait_durable("real.pt")
        it.wait_rescans(3)
        assert sorted(each["name"] for each in it.events("ignored")) == sorted(links)
        assert it.stop() == 0
    assert target.names() == {"real.pt", "good.pt"}
    assert all((watch / name).is_symlink() for name in links)


@pytest.mark.fault("A10")
@ON_ONE
def test_a_symlinked_directory_is_not_entered_and_said(tmp_path: Path, watch: Path, target: Target) -> None:
    """Its checkpoints would else be missed in silence."""
    outside = tmp_path / "outside"
    save(outside / "missed.pt", archive())
    (watch / "run").symlink_to(outside)
    with daemon(watch, target) as it:
        it.wait_ready()
        goes_on(it)
        it.wait_rescans(2)
        assert target.names() == {"good.pt"}
        assert [each["name"] for each in it.events("ignored")] == ["run"]
        assert it.stop() == 0


@ON_ONE
def test_what_is_no_file_is_passed_over_without_a_hang(watch: Path, target: Target) -> None:
    """A FIFO is never opened; a socket and a directory called x.pt are no checkpoints; what is in one is."""
    os.mkfifo(watch / "before.pt")
    with daemon(watch, target) as it, socket.socket(socket.AF_UNIX) as listening:
        it.wait_ready()
        os.mkfifo(watch / "fifo.pt")
        here = Path.cwd()
        os.chdir(watch)  # the path of a socket must be short
        try:
            listening.bind("socket.pt")
        finally:
            os.chdir(here)
        (watch / "directory.pt").mkdir()
        goes_on(it)
        goes_on(it, "directory.pt/inside.pt")
        it.wait_rescans(2)
        assert it.stop() == 0
    assert target.names() == {"good.pt", "directory.pt/inside.pt"}


@ON_ONE
def test_what_is_no_file_is_said_once(watch: Path, target: Target) -> None:
    """By its name: it is called like a checkpoint, and none will be had of it."""
    os.mkfifo(watch / "fifo.pt")
    os.mknod(watch / "socket.pt", stat.S_IFSOCK | 0o600)
    with daemon(watch, target) as it:
        it.wait_ready()
        goes_on(it)
        it.wait_rescans(2)
        assert sorted(each["name"] for each in it.events("ignored")) == ["fifo.pt", "socket.pt"]


@WITHOUT_POWER
@ON_ONE
def test_a_file_that_may_not_be_read_is_said_with_the_mend_and_taken_once_it_may(
    watch: Path, target: Target
) -> None:
    """Beside others that are served; once, not at every rescan."""
    save(watch / "before.pt", archive("before"))
    (watch / "before.pt").chmod(0)
    with daemon(watch, target, before=powerless() or ()) as it:
        it.wait_ready()
        save(watch / "closed.tmp", archive("closed"))
        (watch / "closed.tmp").chmod(0)
        (watch / "closed.tmp").rename(watch / "closed.pt")
        goes_on(it)
        for name in ("before.pt", "closed.pt"):
            it.wait_said("failed", what=name, error="Permission denied")
        it.wait_rescans(3)
        assert target.names() == {"good.pt"}
        assert len(it.events("failed")) == 2
        for name in ("before.pt", "closed.pt"):
            (watch / name).chmod(0o600)
            it.wait_durable(name)
        assert it.stop() == 0


@WITHOUT_POWER
@ON_ONE
def test_a_file_that_may_not_be_read_is_said_with_its_mend(watch: Path, target: Target) -> None:
    """Who is to do what."""
    save(watch / "closed.pt", archive("closed"))
    (watch / "closed.pt").chmod(0)
    with daemon(watch, target, before=powerless() or ()) as it:
        failed = it.wait_said("failed", what="closed.pt", error="Permission denied")
        assert MEND_RIGHTS in failed["hint"] + failed["error"]


@WITHOUT_POWER
@ON_ONE
def test_a_file_that_may_not_be_read_is_no_event_that_was_missed(watch: Path, target: Target) -> None:
    """Else every rescan would warn of events that do not come."""
    save(watch / "closed.pt", archive("closed"), age=HOUR)
    (watch / "closed.pt").chmod(0)
    with daemon(watch, target, before=powerless() or ()) as it:
        it.wait_said("failed", what="closed.pt", error="Permission denied")
        it.wait_ready()
        it.wait_rescans(3)
        assert it.events("rescanned") == []


@pytest.mark.fault("A18")
@WITHOUT_POWER
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@ON_ONE
def test_a_file_of_another_user_that_may_not_be_read_is_said_with_its_mend(
    watch: Path, target: Target
) -> None:
    """Neither link nor descriptor can hold it."""
    save(watch / "others.pt", archive("others"))
    (watch / "others.pt").chmod(0o600)
    os.chown(watch / "others.pt", 65534, 65534)
    with daemon(watch, target, before=powerless() or ()) as it:
        it.wait_ready()
        goes_on(it)
        it.wait_rescans(2)
        (failed,) = it.events("failed", what="others.pt", error="Permission denied")
        assert MEND_RIGHTS in failed["hint"] + failed["error"]


@pytest.mark.fault("B8")
@WITHOUT_POWER
@ON_ONE
def test_a_directory_that_may_not_be_listed_is_said_once(watch: Path, target: Target) -> None:
    """By its name; the others are served."""
    save(watch / "closed/hidden.pt", archive())
    (watch / "closed").chmod(0)
    try:
        with daemon(watch, target, before=powerless() or ()) as it:
            it.wait_ready()
            goes_on(it)
            it.wait_said("ignored", name="closed", reason="cannot be listed: Permission denied")
            it.wait_rescans(2)
            assert len(it.events("ignored")) == 1
            (watch / "closed").chmod(0o700)
            it.wait_durable("closed/hidden.pt")
            assert it.stop() == 0
    finally:
        (watch / "closed").chmod(0o700)


@pytest.mark.fault("B5")
@ON_ONE
def test_files_that_vanish_or_come_and_go_leave_nothing_half(watch: Path, target: Target) -> None:
    """Whatever of them is in the bucket was saved just so; the last of each name is durable."""
    with daemon(watch, target) as it:
        it.wait_ready()
        written: dict[str, set[bytes]] = {}
        for n in range(100):
            name, body = f"gone-{n}.pt", archive(f"{n}" * 2000)
            written[name] = {body}
            (watch / name).write_bytes(body)
            (watch / name).unlink()
            name, body = "again.pt", archive(f"again {n}" * 1000)
            written.setdefault(name, set()).add(body)
            (watch / name).unlink(missing_ok=True)
            (watch / name).write_bytes(body)
            with (watch / f"half-{n}.pt").open("wb") as file:
                file.write(body[: len(body) // 2])
                file.flush()
                (watch / f"half-{n}.pt").unlink()
            os.mkdir(watch / f"folder-{n}")  # noqa: PTH102
            save(watch / f"folder-{n}/x.pt", body)
            written[f"folder-{n}/x.pt"] = {body}
            shutil.rmtree(watch / f"folder-{n}")
        it.wait_durable("again.pt")
        goes_on(it)
        it.until(lambda: not it.status()["queue"], "all is durable")
        assert it.stop() == 0
        assert it.events("failed") == []
    written["good.pt"] = {archive("good.pt")}
    names = target.names()
    assert names <= set(written)
    for name in names:
        assert target.read(name) in written[name], name
    assert names == set(target.listed())


@pytest.fixture
def roomy() -> Iterator[Path]:
    """A directory on a file system that can have a sparse file larger than S3 can hold."""
    for place in (None, "/dev/shm"):
        with suppress(OSError), tempfile.TemporaryDirectory(dir=place) as path:
            try:
                (Path(path) / "try").write_bytes(b"")
                os.truncate(Path(path) / "try", TOO_LARGE)
            except OSError:
                continue
            (Path(path) / "try").unlink()
            yield Path(path)
            return
    pytest.skip("no file system here takes a sparse file of 49 TiB")


TOO_LARGE = 49 * 1024**4


@pytest.mark.fault("A17")
@ON_ONE
def test_a_file_larger_than_s3_can_hold_is_refused_and_not_read_through(roomy: Path, target: Target) -> None:
    """It is named with both sizes and the mend, as what can never be uploaded; the others are served."""
    watch = roomy / "ckpt"
    with daemon(watch, target, "--drain-timeout", "2") as it:
        it.wait_ready()
        (watch / "huge.tmp").write_bytes(b"weights")
        os.truncate(watch / "huge.tmp", TOO_LARGE)
        (watch / "huge.tmp").rename(watch / "huge.pt")
        torn = it.wait_said("torn", name="huge.pt")
        assert f"has {TOO_LARGE} bytes, more than the" in torn["reason"]
        assert "shards" in torn["reason"]
        goes_on(it)
        assert target.names() == {"good.pt"}
        assert it.metrics()["process_cpu_seconds_total"] < 20
        assert it.stop() == 0
    assert json.loads(target.read("latest.json") or b"")["uploads"] == []
