"""Settings: what is asked for is checked when it is made, and what cannot be is said with its mend."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ckpt_sidecar.settings import ENV_PREFIX, BadSetting, Settings, attempt_of, names_of_settings

LONGEST_BUCKET = "b" * 255


def settings(**given: Any) -> Settings:
    """Make settings of the least that must be given, and what is given besides."""
    least: dict[str, Any] = {"watch": Path("/ckpt"), "bucket": "models"}
    return Settings(**least | given)


def complaint(**given: Any) -> str:
    """Return what is said of settings that cannot be."""
    with pytest.raises(BadSetting) as caught:
        settings(**given)
    return str(caught.value)


# --- what is told of them -------------------------------------------------------------------------------


def test_every_setting_says_what_it_is_for() -> None:
    """In a sentence: the command line's help is made of these."""
    for each in fields(Settings):
        assert each.metadata["help"].endswith((".", "]")), each.name
        assert each.metadata["help"][0].isupper() or each.name == "log_format", each.name


def test_the_names_stand_in_the_order_of_help() -> None:
    """What must be given comes first."""
    names = names_of_settings()
    assert names[:3] == ["watch", "bucket", "prefix"]
    assert names == [each.name for each in fields(Settings)]
    assert ENV_PREFIX == "CKPT_SIDECAR_"


def test_the_defaults_are_good_settings() -> None:
    """A watch dir and a bucket are all that one must give."""
    made = settings()
    assert (made.prefix, made.endpoint_url, made.spool, made.attempt) == ("", "", "", "")
    assert made.pattern == ("*.pt", "*.pth", "*.ckpt")
    assert made.address() == ("0.0.0.0", 22578)  # noqa: S104
    assert (made.keep_local, made.keep_remote, made.take_over, made.allow_unfenced) == (0, 0, False, False)


# --- where in the bucket --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bucket", "prefix", "meant"),
    [
        ("models", "", ("models", "")),
        ("models", "run", ("models", "run/")),
        ("models", "run/", ("models", "run/")),
        ("models", "/team/run-17/", ("models", "team/run-17/")),
        ("models", "/", ("models", "")),
        ("s3://models", "", ("models", "")),
        ("s3://models/", "", ("models", "")),
        ("s3://models/team/run", "", ("models", "team/run/")),
        ("s3://models//team/run//", "", ("models", "team/run/")),
        ("s3://models/team", "run", ("models", "team/run/")),
        ("s3://models", "run", ("models", "run/")),
        ("s3://my.models-2/ü b", "", ("my.models-2", "ü b/")),
    ],
)
def test_an_s3_uri_is_taken_apart_and_the_prefix_ends_with_one_slash(
    bucket: str, prefix: str, meant: tuple[str, str]
) -> None:
    """However it is written; a prefix of one's own goes behind that of the URI."""
    made = settings(bucket=bucket, prefix=prefix)
    assert (made.bucket, made.prefix) == meant


@pytest.mark.parametrize("bucket", ["abc", "my.bucket-1", "Old_Bucket", LONGEST_BUCKET])
def test_bucket_names_of_all_stores_are_taken(bucket: str) -> None:
    """Old buckets, and other stores, have capitals and underscores."""
    assert settings(bucket=bucket).bucket == bucket


@pytest.mark.parametrize(
    "bucket",
    [
        "",
        "ab",
        "-ab",
        "abc-",
        "a b",
        "a/b",
        "https://x/y",
        "s3://",
        "s3:///run",
        "bücket",
        "abc\n",
        "b" * 256,
    ],
)
def test_what_is_no_bucket_name_is_said(bucket: str) -> None:
    """With the flag, what was taken for the name, and what one looks like."""
    said = complaint(bucket=bucket)
    assert said.startswith("--bucket: ")
    assert said.endswith("is no bucket name (letters, digits, dots and dashes)")


@pytest.mark.parametrize(
    ("prefix", "flaw"),
    [
        ("..", "is not normalised"),
        ("team/../../other", "is not normalised"),
        ("team/./run", "is not normalised"),
        ("team//run", "is not normalised"),
        ("a\nb", "has a control character"),
        ("a\x00b", "has a control character"),
        ("a\x1b[31mb", "has a control character"),
        ("caf\udce9", "is not valid UTF-8"),
        ("x" * 124, "is longer than 124 bytes"),  # with its slash; a name may then still have 900
        ("\xe9" * 62, "is longer than 124 bytes"),
        ("latest.json", "is one of ckpt-sidecar's own names"),
        (".ckpt-sidecar", "is one of ckpt-sidecar's own names"),
        (".ckpt-sidecar/run", "is one of ckpt-sidecar's own names"),
    ],
)
def test_a_prefix_that_cannot_be_is_said(prefix: str, flaw: str) -> None:
    """On its own, and as it stands in a URI; what it is called is shown escaped."""
    said = complaint(prefix=prefix)
    assert said == f"--prefix: {prefix + '/'!r} {flaw} (give a path such as team/run-17)"
    assert said.isprintable()
    assert complaint(bucket=f"s3://models/{prefix}") == said


# --- one by one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["", "http://127.0.0.1:9000", "https://s3.example.com", "http://[::1]:9000/", "https://gate.example/s3"],
)
def test_endpoints_are_urls(url: str) -> None:
    """None at all is the standard chain's."""
    assert settings(endpoint_url=url).endpoint_url == url


@pytest.mark.parametrize(
    "url",
    [
        "s3.example.com",
        "ftp://x",
        "http://",
        "http:///x",
        "http://a b",
        "http://a/b c",
        "http://a\n",
        " http://a",
        "http://a:x9",
        "http://a:99999",
        "http://[::1",
    ],
)
def test_what_is_no_url_is_said(url: str) -> None:
    """With an example."""
    assert complaint(endpoint_url=url) == (
        f"--endpoint-url: {url!r} is no URL (for example https://s3.example.com)"
    )


@pytest.mark.fault("G3")
@pytest.mark.parametrize(
    "url", ["http://user:hidden@host", "https://hidden@host/x", "http://us er:hid/den@ho st", "//hidden@x"]
)
def test_a_password_in_an_endpoint_is_refused_and_not_told(url: str) -> None:
    """It would be of no use: requests are signed."""
    said = complaint(endpoint_url=url)
    assert "has a user or a password in it" in said
    assert "hid" not in said.replace("--endpoint-url: ", "")


@pytest.mark.fault("G7")
@pytest.mark.parametrize("account", ["1234", "12345678901a", "1234567890123", "\u0661" * 12, " 123456789012"])
def test_an_owner_is_an_account(account: str) -> None:
    """A slip must not be taken for a bucket of somebody else's."""
    assert "is no AWS account (12 digits)" in complaint(expected_bucket_owner=account)
    assert settings(expected_bucket_owner="123456789012").expected_bucket_owner == "123456789012"


@pytest.mark.parametrize("pattern", [(), ("",), ("*.pt", "")])
def test_an_empty_pattern_is_said(pattern: tuple[str, ...]) -> None:
    """It would match nothing, and nobody would notice."""
    assert complaint(pattern=pattern) == f"--pattern: {pattern!r} is empty: nothing would ever be uploaded"


NUMBERS = [
    ("workers", 1, 64),
    ("settle", 0, 3600),
    ("rescan_every", 0.1, 86_400),
    ("drain_timeout", 0, 86_400),
    ("keep_local", 0, 1_000_000_000),
    ("keep_remote", 0, 1_000_000_000),
    ("history", 1, 10_000),
]


@pytest.mark.parametrize(("name", "least", "most"), NUMBERS)
def test_a_number_may_be_from_its_least_to_its_most(name: str, least: float, most: float) -> None:
    """Both included."""
    assert getattr(settings(**{name: least}), name) == least
    assert getattr(settings(**{name: most}), name) == most


@pytest.mark.parametrize(("name", "least", "most"), NUMBERS)
def test_a_number_beyond_its_bounds_is_said_with_them(name: str, least: float, most: float) -> None:
    """What is no number at all, too."""
    for value in (least - 0.001, most + 1, -1, math.nan, math.inf, -math.inf):
        flag = name.replace("_", "-")
        assert complaint(**{name: value}) == f"--{flag}: {value!r} is not from {least:g} to {most:g}"


def test_the_log_has_three_formats() -> None:
    """Another word is said with them."""
    for word in ("auto", "json", "console"):
        assert settings(log_format=word).log_format == word
    assert complaint(log_format="xml") == "--log-format: 'xml' is none of auto, json, console"


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("0.0.0.0:22578", ("0.0.0.0", 22578)),  # noqa: S104
        ("localhost:0", ("localhost", 0)),
        ("node-7.example.com:65535", ("node-7.example.com", 65535)),
        ("[::]:22578", ("::", 22578)),
        ("[::1]:1", ("::1", 1)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
    ],
)
def test_where_to_listen_is_host_and_port(listen: str, address: tuple[str, int]) -> None:
    """An IPv6 address stands in brackets; port 0 is a free one."""
    assert settings(listen=listen).address() == address


@pytest.mark.parametrize(
    "listen",
    [
        "",
        "22578",
        ":22578",
        "localhost",
        "localhost:",
        "localhost:http",
        "localhost:-1",
        "localhost:65536",
        "localhost:" + "9" * 5000,
        "localhost:\uff11",
        "::",
        "::1",  # not port 1 of the host `:`
        "[::1]",
        "[::1",
        "[::1:80",
        "::1]:80",
        "a b:80",
        "localhost:80\n",
    ],
)
def test_what_is_no_address_is_said(listen: str) -> None:
    """With an example of both kinds."""
    assert complaint(listen=listen) == (
        f"--listen: {listen!r} is not HOST:PORT (for example 0.0.0.0:22578 or [::]:22578)"
    )


@pytest.mark.parametrize(
    "spool", ["/var/spool/run", "/ckpt-spool", "/ckpt/.queue", "/ckpt/.a/b", "spool", "/"]
)
def test_a_spool_may_lie_beside_the_watch_dir_or_hidden_in_it(spool: str) -> None:
    """There the watcher does not look."""
    assert settings(spool=spool).spool == spool


@pytest.mark.parametrize(
    "spool", ["/ckpt", "/ckpt/", "/ckpt/spool", "/ckpt/a/../b", "/ckpt/.x/../b", "/x/../ckpt"]
)
def test_a_spool_in_sight_of_the_watcher_is_refused(spool: str) -> None:
    """Its pins would be taken for checkpoints, and pinned, without end."""
    said = complaint(spool=spool)
    assert said.startswith(f"--spool: {spool!r} is in the watch dir")
    assert "put it beside" in said


# --- which run of the job -------------------------------------------------------------------------------


def test_a_pod_is_an_attempt_by_its_uid() -> None:
    """A restarted container has the same one, a rescheduled pod another; it beats what else is known."""
    given = {"POD_UID": "1f-2e", "SLURM_JOB_ID": "42"}
    assert attempt_of(given, host="node", boot_id="b") == "pod-1f-2e"


def test_a_slurm_job_is_an_attempt_by_job_and_restart() -> None:
    """A requeued job keeps its id, and counts."""
    assert attempt_of({"SLURM_JOB_ID": "42"}, host="node", boot_id="b") == "slurm-42-0"
    given = {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "3"}
    assert attempt_of(given, host="node", boot_id="b") == "slurm-42-3"


@pytest.mark.parametrize(
    "environment", [{}, {"POD_UID": "", "SLURM_JOB_ID": ""}, {"SLURM_RESTART_COUNT": "3"}]
)
def test_elsewhere_an_attempt_is_the_host_and_its_boot(environment: dict[str, str]) -> None:
    """An empty variable is none."""
    assert attempt_of(environment, host="node", boot_id="b-1") == "node-b-1"
