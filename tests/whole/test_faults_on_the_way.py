"""The daemon as a process on a bad way to S3: a proxy before a real store does its worst.

Each time the end must be that of an undisturbed run: all that was saved is durable, byte for byte, and comes
back on another node.
"""

from __future__ import annotations

import json
import random
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ckpt_sidecar.bucket import MIB
from tests.conftest import ON_ONE, admin
from tests.proxy import EVERY, FOR_LONG, Answer, Broken, Damaged, Proxy, Slow, Whole
from tests.whole.running import HOME, Target, daemon, save

pytestmark = ON_ONE
NOISE = random.Random(17).randbytes(21 * MIB)
BIG = NOISE[: 17 * MIB]  # three parts


@dataclass(frozen=True)
class Road:
    """A bucket, and the way to it."""

    proxy: Proxy
    direct: Target
    through: Target


@pytest.fixture
def road(s3_endpoint: str) -> Iterator[Road]:
    """A fresh bucket behind a proxy that does nothing yet."""
    direct = Target.new(s3_endpoint)
    with Proxy(s3_endpoint) as proxy:
        yield Road(proxy, direct, Target(proxy.url, direct.bucket))


def comes_back(root: Path, road: Road, name: str, body: bytes) -> None:
    """On another node that is what the trainer finds."""
    with daemon(root, road.through) as it:
        it.wait_ready()
        assert (root / name).read_bytes() == body
        assert it.stop() == 0


# --- errors and cuts ---------------------------------------------------------------------------------


@pytest.mark.fault("C1", "C2", "C5")
def test_what_is_saved_under_fire_is_durable_and_comes_back(tmp_path: Path, road: Road) -> None:
    """Every request fails in some way, from the first on."""
    on = road.proxy.on
    rules = [
        on(EVERY, Answer(503, "SlowDown", {"Retry-After": "1"})),
        on("PutObject", Answer(500, "InternalError", done=True), key="latest.json"),
        on("PutObject", Broken("done"), key="small.pt"),
        on("CreateMultipartUpload", Broken("done"), key="big.pt"),
        on("UploadPart", Broken("body"), key="big.pt", times=2),
        on("UploadPart", Answer(429, "TooManyRequests", early=True), key="big.pt"),
        on("CompleteMultipartUpload", Answer(200, "InternalError", done=True), key="big.pt"),
    ]
    with daemon(tmp_path / "a", road.through) as it:
        it.wait_ready()
        small = save(tmp_path / "a/small.pt", NOISE[:1000])
        it.wait_durable("small.pt", small)
        save(tmp_path / "a/big.pt", BIG)
        it.wait_durable("big.pt", BIG)
        retries = {name: value for name, value in it.metrics().items() if "retries_total" in name}
        assert it.stop() == 0
    assert [rule.hits for rule in rules] == [1, 1, 1, 1, 2, 1, 1]
    assert road.direct.names() == {"small.pt", "big.pt"}
    assert not admin(road.direct.endpoint).list_multipart_uploads(Bucket=road.direct.bucket).get("Uploads")
    assert all(_counted(retries, reason) for reason in ("throttled", "connection"))
    down = [
        on("HeadObject", Answer(502, body=b"<html>"), key="big.pt"),
        on("GetObject", Broken("answer"), key="big.pt"),
        on("GetObject", Damaged("down"), key="big.pt", passing=1),
        on("GetObject", Whole(), key="big.pt", passing=2),
    ]
    comes_back(tmp_path / "b", road, "big.pt", BIG)
    assert [rule.hits for rule in down] == [1, 1, 1, 1]


def _counted(metrics: Mapping[str, float], reason: str) -> bool:
    return any(f'reason="{reason}"' in name and value for name, value in metrics.items())


@pytest.mark.fault("C15")
def test_an_endpoint_that_goes_and_comes_back_costs_nothing(tmp_path: Path, road: Road) -> None:
    """The pins are kept and the lag grows; then all is durable."""
    with daemon(tmp_path / "a", road.through) as it:
        it.wait_ready()
        road.proxy.down()
        bodies = {f"{n}.pt": save(tmp_path / f"a/{n}.pt", NOISE[n : 1000 + n]) for n in range(3)}
        it.wait_said("retrying", reason="connection")
        it.until(lambda: len(it.status()["queue"]) == 3)
        assert it.status()["lag_seconds"] > 0
        for name in bodies:
            (tmp_path / "a" / name).unlink()
        road.proxy.up()
        for name, body in bodies.items():
            it.wait_durable(name, body)
        assert it.status()["lag_seconds"] == 0
        assert it.stop() == 0
    comes_back(tmp_path / "b", road, "2.pt", bodies["2.pt"])


RESOLVER = """
import os, socket, sys
real = socket.getaddrinfo
def getaddrinfo(host, *args, **more):
    if host == "localhost":
        if not os.path.exists(sys.argv[1]):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        host = "127.0.0.1"
    return real(host, *args, **more)
socket.getaddrinfo = getaddrinfo
from ckpt_sidecar.cli import main
main(sys.argv[5:])
"""


@pytest.mark.long
@pytest.mark.fault("C15", "F7")
def test_a_name_that_cannot_be_resolved_is_waited_for(tmp_path: Path, road: Road) -> None:
    """Not ready and no fresh run until it can; later it is no reason to lose anything either."""
    with daemon(tmp_path / "earlier", road.direct) as it:
        it.wait_ready()
        earlier = save(tmp_path / "earlier/earlier.pt", NOISE[:1000])
        it.wait_durable("earlier.pt")
        assert it.stop() == 0
    known = tmp_path / "known"
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = path\n")
    named = Target(f"http://localhost:{road.proxy.port}", road.direct.bucket)
    before = (sys.executable, "-c", RESOLVER, str(known))
    env = {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    with daemon(tmp_path / "a", named, env=env, before=before) as it:
        it.wait_not_ready("localhost")
        assert "check the endpoint, DNS and the way to it" in it.wait_said("retrying")["error"]
        assert it.events("restored") == []
        known.touch()
        it.wait_ready()
        assert (tmp_path / "a/earlier.pt").read_bytes() == earlier
        known.unlink()
        road.proxy.down()  # which ends the connections that are open
        road.proxy.up()
        body = save(tmp_path / "a/x.pt", NOISE[:2000])
        it.wait_said("retrying", operation="upload", reason="connection")
        known.touch()
        it.until(lambda: road.direct.holds("x.pt", body))
        assert it.stop() == 0


# --- who we are, and what time it is -------------------------------------------------------------------


def credentials(path: Path, token: str, *, lasting: timedelta) -> None:
    """Have the chain find these."""
    found = {
        "Version": 1,
        "AccessKeyId": "some-access",
        "SecretAccessKey": "some-secret",
        "SessionToken": token,
        "Expiration": (datetime.now(UTC) + lasting).isoformat(),
    }
    path.with_suffix(".new").write_text(json.dumps(found))
    path.with_suffix(".new").rename(path)


@pytest.mark.fault("C11")
def test_credentials_that_expire_in_mid_upload_are_waited_for(tmp_path: Path, road: Road) -> None:
    """Said, with the pins kept, whatever the chain gives meanwhile; once it gives good ones it goes on."""
    found, config = tmp_path / "found.json", tmp_path / "config"
    config.write_text(f"[default]\nregion = us-east-1\ncredential_process = cat {found}\n")
    env = {
        "AWS_CONFIG_FILE": str(config),
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
    }
    credentials(found, "first-token", lasting=timedelta(minutes=5))  # so that each request asks anew
    with daemon(tmp_path / "a", road.through, "--drain-timeout", "0", env=env) as it:
        it.wait_ready()
        expired = road.proxy.on(
            EVERY, Answer(400, "ExpiredToken"), having="first-token", passing=3, times=FOR_LONG
        )
        save(tmp_path / "a/big.pt", BIG)
        failed = it.wait_said("failed", reason="credentials", what="big.pt")
        assert "check the credentials that the AWS chain finds" in failed["hint"]
        assert expired.hits
        credentials(found, "first-token", lasting=-timedelta(hours=1))  # never renewed
        it.wait_said("failed", reason="credentials", error="still expired")
        (tmp_path / "a/big.pt").unlink()
        assert [each["name"] for each in it.status()["queue"]] == ["big.pt"]
        credentials(found, "second-token", lasting=timedelta(minutes=5))
        it.wait_durable("big.pt", BIG)
        assert it.stop() == 0


@pytest.mark.long
@pytest.mark.fault("C11")
def test_credentials_that_are_never_renewed_leave_the_pins(tmp_path: Path, road: Road) -> None:
    """Exit code 3, and the next life makes it durable."""
    with daemon(tmp_path / "a", road.through, "--drain-timeout", "0") as it:
        it.wait_ready()
        expired = road.proxy.on(EVERY, Answer(400, "ExpiredToken"), times=FOR_LONG)
        body = save(tmp_path / "a/x.pt", NOISE[:1000])
        it.wait_said("failed", reason="credentials", what="x.pt")
        assert it.stop() == 3
        assert it.events("drained")[0]["left"] == ["x.pt"]
    (tmp_path / "a/x.pt").unlink()
    assert expired.hits
    road.proxy.relent()
    with daemon(tmp_path / "a", road.through) as it:
        it.wait_durable("x.pt", body)
        assert it.stop() == 0


@pytest.mark.long
@pytest.mark.fault("C13")
def test_a_wrong_clock_is_said_with_both_times(tmp_path: Path, road: Road) -> None:
    """And nothing is lost until it is set."""
    inside = "<RequestTime>20260102T030405Z</RequestTime><ServerTime>2026-01-02T09:00:00Z</ServerTime>"
    with daemon(tmp_path / "a", road.through) as it:
        it.wait_ready()
        skewed = road.proxy.on(
            EVERY, Answer(403, "RequestTimeTooSkewed", inside=inside), having="PUT ", times=4
        )
        body = save(tmp_path / "a/x.pt", NOISE[:1000])
        said = it.wait_said("retrying", reason="clock")["error"]
        assert "the store's clock says 2026-01-02T09:00:00Z, ours said 20260102T030405Z" in said
        assert "set this machine's clock (NTP)" in said
        it.wait_durable("x.pt", body)
        assert skewed.hits == 4
        assert it.stop() == 0


# --- the bucket ------------------------------------------------------------------------------------------


def emptied(target: Target) -> None:
    """Delete the bucket with all that is in it."""
    client = admin(target.endpoint)
    for each in client.list_objects_v2(Bucket=target.bucket).get("Contents", ()):
        client.delete_object(Bucket=target.bucket, Key=each["Key"])
    client.delete_bucket(Bucket=target.bucket)


@pytest.mark.fault("C14")
def test_a_bucket_that_is_deleted_and_made_again_is_no_fresh_run(tmp_path: Path, road: Road) -> None:
    """Under the daemon: named, and what it had listed is put back, loudly. At a restart: not ready."""
    with daemon(tmp_path / "a", road.direct) as it:
        it.wait_ready()
        one = save(tmp_path / "a/one.pt", NOISE[:1000])
        it.wait_durable("one.pt")
        emptied(road.direct)
        two = save(tmp_path / "a/two.pt", NOISE[:2000])
        failed = it.wait_said("failed", reason="bucket", what="two.pt")
        assert f"there is no bucket '{road.direct.bucket}'" in failed["hint"]
        admin(road.direct.endpoint).create_bucket(Bucket=road.direct.bucket)
        it.wait_durable("two.pt", two)
        assert it.events("rebuilt", level="warning")
        assert road.direct.listed() == ["two.pt", "one.pt"]
        assert it.stop() == 0
    emptied(road.direct)
    admin(road.direct.endpoint).create_bucket(Bucket=road.direct.bucket)
    for _ in range(2):
        with daemon(tmp_path / "a", road.direct) as it:
            it.wait_not_ready("emptied or made anew", f"remove {HOME}")
            assert it.stop() == 0
            assert it.events("restored") == []
    assert (tmp_path / "a/one.pt").read_bytes() == one
    assert road.direct.read("latest.json") is None


@pytest.mark.parametrize(
    ("how", "said"),
    [
        pytest.param("flipped", "do not agree with their checksum", marks=pytest.mark.long),
        ("missing", "is gone"),
        pytest.param("cut short", "was replaced by one that is not ours", marks=pytest.mark.long),
        pytest.param("a stranger's", "was replaced by one that is not ours", marks=pytest.mark.long),
        pytest.param("archived", "restore it to a storage class that can be read", marks=pytest.mark.long),
    ],
)
@pytest.mark.fault("F1")
def test_a_newest_that_cannot_be_had_is_passed_over(tmp_path: Path, road: Road, how: str, said: str) -> None:
    """Said and counted, and the next one restored; exit code 5 when there is none."""
    bodies = {"old.pt": NOISE[:1000], "new.pt": BIG}
    with daemon(tmp_path / "a", road.direct) as it:
        it.wait_ready()
        for name, body in bodies.items():
            save(tmp_path / "a" / name, body)
            it.wait_durable(name)
        assert it.stop() == 0
    spoil(road, "new.pt", bodies["new.pt"], how)
    with daemon(tmp_path / "b", road.through) as it:
        it.wait_ready()
        assert (tmp_path / "b/old.pt").read_bytes() == bodies["old.pt"]
        assert not (tmp_path / "b/new.pt").exists()
        assert said in it.wait_said("fell_back", name="new.pt")["error"]
        assert it.metrics()['ckpt_sidecar_restores_total{outcome="fell_back"}'] == 1
        assert it.stop() == 0
    spoil(road, "old.pt", bodies["old.pt"], how)
    with daemon(tmp_path / "c", road.through) as it:
        it.wait_not_ready("none of the 2 checkpoints")
        assert len(it.events("fell_back")) == 2
        assert it.stop() == 5


def spoil(road: Road, name: str, body: bytes, how: str) -> None:
    """Have an object that is not what it was."""
    client, at = admin(road.direct.endpoint), {"Bucket": road.direct.bucket, "Key": road.direct.prefix + name}
    match how:
        case "flipped":
            road.proxy.on("GetObject", Damaged("down"), key=name, times=FOR_LONG)
        case "missing":
            client.delete_object(**at)
        case "cut short":
            metadata = client.head_object(**at)["Metadata"]
            client.put_object(**at, Body=body[:-1], Metadata=metadata)
        case "a stranger's":
            client.put_object(**at, Body=body[::-1])
        case "archived":
            road.proxy.on("GetObject", Answer(403, "InvalidObjectState"), key=name, times=FOR_LONG)


# --- proxies and certificates ----------------------------------------------------------------------------


def certificate(root: Path, name: str) -> tuple[ssl.SSLContext, Path]:
    """Make a certificate for that name or address; return how to serve with it, and who vouches for it."""
    key, found = root / "key.pem", root / "certificate.pem"
    kind = "IP" if name[0].isdecimal() else "DNS"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    words += ["-addext", f"subjectAltName={kind}:{name}", "-keyout", str(key), "-out", str(found)]
    subprocess.run(words, check=True, capture_output=True)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(found, key)
    return serving, found


@pytest.mark.long
@pytest.mark.fault("C20", "C2")
def test_the_usual_variables_lead_through_a_proxy_to_a_store_of_our_own_authority(
    tmp_path: Path, s3_endpoint: str
) -> None:
    """HTTPS_PROXY and AWS_CA_BUNDLE; a handshake that fails in between is no more than an outage."""
    serving, authority = certificate(tmp_path, "127.0.0.1")
    direct = Target.new(s3_endpoint)
    with Proxy(s3_endpoint, tls=serving) as store, Proxy(s3_endpoint) as forward:
        env = {"HTTPS_PROXY": forward.url, "AWS_CA_BUNDLE": str(authority)}
        with daemon(tmp_path / "a", Target(store.url, direct.bucket), env=env) as it:
            it.wait_ready()
            save(tmp_path / "a/big.pt", BIG)
            it.until(lambda: direct.holds("big.pt", BIG))
            store.down()
            store.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # without a certificate: no handshake
            store.up()
            body = save(tmp_path / "a/x.pt", NOISE[:1000])
            it.wait_said("retrying", reason="connection")
            store.down()
            store.tls = serving
            store.up()
            it.until(lambda: direct.holds("x.pt", body))
            assert it.stop() == 0
        assert set(forward.tunnels) == {f"127.0.0.1:{store.port}"}
        assert "UploadPart" in {each.operation for each in store.seen}


@pytest.mark.long
@pytest.mark.fault("C20")
def test_a_plain_proxy_is_gone_through(tmp_path: Path, road: Road) -> None:
    """HTTP_PROXY, for a store without TLS."""
    with daemon(tmp_path / "a", road.direct, env={"HTTP_PROXY": road.proxy.url}) as it:
        it.wait_ready()
        save(tmp_path / "a/big.pt", BIG)
        it.wait_durable("big.pt")
        assert it.stop() == 0
    assert {"UploadPart", "PutObject"} <= {each.operation for each in road.proxy.seen}


@pytest.mark.fault("C20")
@pytest.mark.parametrize("proxied", [False, True], ids=["", "proxied"])
@pytest.mark.parametrize("wrong", ["authority", "name"])
def test_a_bad_certificate_is_never_accepted(
    tmp_path: Path, s3_endpoint: str, wrong: str, *, proxied: bool
) -> None:
    """Nobody vouches for it, or it is another's: said with the mend, and not one request is sent."""
    serving, authority = certificate(tmp_path, "127.0.0.1" if wrong == "authority" else "elsewhere.test")
    with Proxy(s3_endpoint, tls=serving) as store, Proxy(s3_endpoint) as forward:
        env = {"AWS_CA_BUNDLE": str(authority)} if wrong == "name" else {}
        env |= {"HTTPS_PROXY": forward.url} if proxied else {}
        with daemon(tmp_path / "a", Target(store.url, "some-bucket"), env=env) as it:
            it.wait_not_ready("the store's certificate is not trusted: set AWS_CA_BUNDLE")
            assert it.stop() == 0
        assert store.seen == []
        assert bool(forward.tunnels) == proxied


# --- slow and long ways ------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.fault("C4")
def test_parallel_parts_fill_a_long_link(tmp_path: Path, road: Road) -> None:
    """As many are under way at one time as there are workers, up and down."""
    road.proxy.on("UploadPart", Slow(latency=0.3), key="big.pt", times=FOR_LONG)
    road.proxy.on("GetObject", Slow(latency=0.3), key="big.pt", times=FOR_LONG)
    with daemon(tmp_path / "a", road.through, "--workers", "3") as it:
        it.wait_ready()
        save(tmp_path / "a/big.pt", BIG)
        it.wait_durable("big.pt")
        assert it.stop() == 0
    assert road.proxy.most_at_once("UploadPart") == 3
    comes_back(tmp_path / "b", road, "big.pt", BIG)
    assert road.proxy.most_at_once("GetObject") == 3
