"""The command line as a user meets it: in processes of its own, without any bucket that answers."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from ckpt_sidecar import __version__
from ckpt_sidecar.cli import cli as commands
from ckpt_sidecar.formats import Rules
from ckpt_sidecar.settings import ENV_PREFIX, Settings, names_of_settings
from ckpt_sidecar.standing import newest_whole

SECONDS = 60  # within which every process here must end
HEAVY = ("aioboto3", "aiohttp", "boto3", "botocore", "prometheus_client", "torch")

# The program, and in the end what it has imported, on standard output.
TELLS_IMPORTS = f"""
import sys
from ckpt_sidecar.cli import main
try:
    main()
finally:
    print("imported:", *sorted(set({HEAVY!r}) & set(sys.modules)))
"""

# The program as somebody who may not write everywhere; what it will need is imported while it can be read.
AS_NOBODY = """
import os
import ckpt_sidecar.daemon
from ckpt_sidecar.cli import main
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
main()
"""


def environment(more: Mapping[str, str] = {}) -> dict[str, str]:
    """Return this environment without what would change the answers, and with `more`."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((ENV_PREFIX, "AWS_", "SLURM_", "POD_")) and not name.lower().endswith("_proxy")
    }
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    return {**ours, **keys, "AWS_EC2_METADATA_DISABLED": "true", "COLUMNS": "100", **more}


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def run(*words: str | Path, env: Mapping[str, str] = {}, script: str = "", cwd: Path | None = None) -> Ran:
    """Run the command line to its end."""
    program = ("-c", script) if script else ("-m", "ckpt_sidecar")
    ended = subprocess.run(
        [sys.executable, *program, *words],
        env=environment(env),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return Ran(ended.returncode, ended.stdout, ended.stderr)


def archive(n: int = 1) -> bytes:
    """Return a whole checkpoint, as torch.save makes them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data", b"x" * n)
    return buffer.getvalue()


def save(path: Path, data: bytes, *, at: float) -> Path:
    """Save a file as of then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (at, at))
    return path


# --- help and version -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def help_text() -> str:
    """What --help says, in one line."""
    told = run("--help")
    assert (told.code, told.err) == (0, "")
    return " ".join(told.out.split())


@pytest.mark.parametrize("name", names_of_settings())
def test_help_has_every_setting(help_text: str, name: str) -> None:
    """Its flag, its variable, what it is for, and its default where there is one."""
    setting = next(each for each in fields(Settings) if each.name == name)
    begin = help_text.index(f"--{name.replace('_', '-')} ", help_text.index("Options:"))
    told = help_text[begin : help_text.index("]", help_text.index("[env var", begin)) + 1]
    assert " ".join(setting.metadata["help"].split()) in told
    assert f"env var: {ENV_PREFIX}{name.upper()}" in told
    if isinstance(setting.default, int | float) and not isinstance(setting.default, bool):
        assert f"default: {setting.default}]" in told
    assert "None" not in told


def test_help_tells_the_exit_codes_and_the_commands(help_text: str) -> None:
    """And how to run a trainer as a child."""
    codes = help_text[help_text.index("Exit codes:") : help_text.index("Options:")]
    for code in (
        "0 all is durable",
        "1 an error",
        "2 usage",
        "3 not everything",
        "4 another",
        "5 nothing",
        "70 a bug",
    ):
        assert code in codes
    for name in commands.commands:
        assert f" {name} " in help_text[help_text.index("Commands:") :]
    assert "[-- COMMAND…]" in help_text


def test_h_is_help() -> None:
    """For those who type little."""
    assert run("-h").out == run("--help").out


@pytest.mark.parametrize("name", sorted(commands.commands))
def test_every_command_has_help_and_json(name: str) -> None:
    """And its settings have the same variables."""
    told = run(name, "--help")
    assert (told.code, told.err) == (0, "")
    assert f"Usage: ckpt-sidecar {name}" in told.out
    assert "--json" in told.out
    assert ENV_PREFIX in told.out


def test_the_version_is_told() -> None:
    """As the package has it."""
    assert run("--version") == Ran(0, f"ckpt-sidecar, version {__version__}\n", "")


@pytest.mark.parametrize(
    "words",
    [("--help",), ("--version",), ("latest", "--watch", "."), ("status", "--watch", "."), ("ls",), ("--",)],
    ids=" ".join,
)
def test_what_needs_no_bucket_imports_nothing_heavy(words: Sequence[str]) -> None:
    """It answers at once."""
    assert run(*words, script=TELLS_IMPORTS).out.splitlines()[-1] == "imported:"


# --- usage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ((), "--watch"),
        (("--bucket", "models"), "--watch"),
        (("--watch", "ckpt"), "--bucket"),
        (("--watch", "ckpt", "--", "true"), "--bucket"),
        (("restore", "--watch", "ckpt"), "--bucket"),
        (("restore", "--bucket", "models"), "--watch"),
        (("ls",), "--bucket"),
        (("status",), "--watch"),
        (("latest",), "--watch"),
        (("wait",), "--watch"),
    ],
    ids=str,
)
def test_what_must_be_given_is_asked_for(words: Sequence[str], flag: str) -> None:
    """By its flag and its variable; exit code 2."""
    told = run(*words)
    assert (told.code, told.out) == (2, "")
    assert f"Missing option '{flag}'" in told.err
    assert ENV_PREFIX + flag.removeprefix("--").upper() in told.err
    assert "Traceback" not in told.err


def test_all_that_must_be_given_is_in_these_tests() -> None:
    """A new setting without a default would be missing above."""
    assert [each.name for each in fields(Settings) if each.default is MISSING] == ["watch", "bucket"]


@pytest.mark.parametrize(
    "words", [("--watch", "", "--bucket", "b"), ("latest", "--watch", ""), ("ls", "--bucket=")]
)
def test_an_empty_word_is_not_taken_for_the_directory_one_is_in(words: Sequence[str]) -> None:
    """A script whose variable is not set asks for that."""
    told = run(*words)
    assert told.code == 2
    assert "is empty" in told.err


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--bucket", "a b", "--bucket: 'a b' is no bucket name"),
        ("--prefix", "a/../b", "--prefix: 'a/../b/' is not normalised (give a path such as team/run-17)"),
        ("--endpoint-url", "localhost", "--endpoint-url: 'localhost' is no URL"),
        ("--pattern", "", "--pattern: ('',) is empty: nothing would ever be uploaded"),
        ("--listen", "22578", "--listen: '22578' is not HOST:PORT (for example 0.0.0.0:22578"),
        ("--workers", "0", "--workers: 0 is not from 1 to 64"),
        ("--workers", "many", "Invalid value for '--workers'"),
        ("--settle", "nan", "--settle: nan is not from 0 to 3600"),
        ("--drain-timeout", "-1", "--drain-timeout: -1.0 is not from 0 to 86400"),
        ("--keep-remote", "-1", "--keep-remote: -1 is not from 0 to 1e+09"),
        ("--history", "0", "--history: 0 is not from 1 to 10000"),
        ("--spool", "ckpt/queue", "--spool: 'ckpt/queue' is in the watch dir"),
        ("--log-format", "xml", "--log-format: 'xml' is none of auto, json, console"),
        ("--colour", "red", "No such option '--colour'"),
    ],
)
def test_a_value_that_cannot_be_is_refused(tmp_path: Path, flag: str, value: str, said: str) -> None:
    """With exit code 2 and what is wrong; nothing was made."""
    told = run("--watch", "ckpt", "--bucket", "models", flag, value, cwd=tmp_path)
    assert (told.code, told.out) == (2, "")
    assert said in told.err
    assert "Traceback" not in told.err
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_is_not_there_is_named() -> None:
    """Exit code 2."""
    told = run("upload", "--watch", ".")
    assert told.code == 2
    assert "No such command 'upload'" in told.err


def test_nothing_after_the_dashes_is_a_mistake() -> None:
    """A script whose variable is not set asks for that."""
    told = run("--watch", "ckpt", "--bucket", "models", "--")
    assert told.code == 2
    assert "nothing stands after --: give the command to run" in told.err


def test_a_command_of_ours_takes_no_trainer() -> None:
    """It is refused, and not left out of account."""
    told = run("wait", "--watch", "ckpt", "--", "x.pt")
    assert told.code == 2
    assert "no command can follow 'wait' after --" in told.err


def test_a_trainer_that_is_not_there_is_named_before_anything_is_done(tmp_path: Path) -> None:
    """And not after the prefix was claimed and a checkpoint restored."""
    (tmp_path / "script").write_text("not executable")
    for program in ("no-such-program", str(tmp_path / "script")):
        told = run("--watch", tmp_path / "ckpt", "--bucket", "models", "--", program, "--flag")
        assert told.code == 1
        assert f"cannot run '{program}': no such program (give its path, or mend PATH)" in told.err
        assert not (tmp_path / "ckpt").exists()


# --- variables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("BUCKET", "a b", "--bucket: 'a b'"),
        ("PREFIX", "..", "--prefix: '../'"),
        ("WORKERS", "0", "--workers: 0"),
        ("LISTEN", "x", "--listen: 'x'"),
        ("KEEP_LOCAL", "-1", "--keep-local: -1"),
        ("TAKE_OVER", "perhaps", "CKPT_SIDECAR_TAKE_OVER"),
    ],
)
def test_a_variable_is_as_good_as_a_flag(name: str, value: str, said: str) -> None:
    """What is wrong with it is said in the flag's name."""
    told = run(env={f"{ENV_PREFIX}WATCH": "ckpt", f"{ENV_PREFIX}BUCKET": "models", ENV_PREFIX + name: value})
    assert told.code == 2
    assert said in told.err


def test_a_flag_beats_its_variable_and_an_empty_variable_is_none(tmp_path: Path) -> None:
    """The nearer one counts."""
    newest = save(tmp_path / "x.pt", archive(), at=1)
    env = {f"{ENV_PREFIX}WATCH": "/nowhere", f"{ENV_PREFIX}PATTERN": ""}
    assert run("latest", "--watch", tmp_path, env=env).out == f"{newest}\n"


def test_a_variable_may_hold_several_patterns(tmp_path: Path) -> None:
    """With blanks between them."""
    save(tmp_path / "x.pt", archive(), at=3)
    newest = save(tmp_path / "b.model", b"weights", at=2)
    save(tmp_path / "a.bin", b"weights", at=1)
    env = {f"{ENV_PREFIX}WATCH": str(tmp_path), f"{ENV_PREFIX}PATTERN": "*.bin *.model"}
    assert run("latest", env=env) == Ran(0, f"{newest}\n", "")


# --- latest ---------------------------------------------------------------------------------------------


def test_latest_prints_the_newest_whole_file(tmp_path: Path) -> None:
    """By when it was saved, at any depth; one that is torn is passed over."""
    save(tmp_path / "z.pt", archive(), at=10)
    newest = save(tmp_path / "deep/er/a b.ckpt", archive(), at=30)
    save(tmp_path / "m.pth", archive(), at=20)
    save(tmp_path / "torn.pt", archive()[:-1], at=40)
    save(tmp_path / "empty.pt", b"", at=50)
    save(tmp_path / "zeros.pt", bytes(5000), at=60)
    save(tmp_path / "notes.txt", b"text", at=70)
    assert run("latest", "--watch", tmp_path) == Ran(0, f"{newest}\n", "")
    told = run("latest", "--watch", tmp_path, "--json")
    assert (told.code, json.loads(told.out)) == (0, {"path": str(newest)})


def test_latest_prints_nothing_that_a_trainer_should_not_resume_from(tmp_path: Path) -> None:
    """Neither what is being written, nor the queue, nor links, nor what is no file."""
    outside = save(tmp_path / "outside/x.pt", archive(), at=10)
    root = tmp_path / "ckpt"
    for name in ("x.pt.tmp", ".hidden.pt", ".ckpt-sidecar/pins/1-1/x.pt", ".a/x.pt", "a\nb.pt"):
        save(root / name, archive(), at=10)
    (root / "link.pt").symlink_to(outside)
    (root / "dangling.pt").symlink_to("nowhere")
    (root / "dir.pt").mkdir()
    os.mkfifo(root / "pipe.pt")
    assert newest_whole(root, Rules()) is None
    newest = save(root / "real.pt", archive(), at=1)
    assert newest_whole(root, Rules()) == newest


def test_latest_has_an_exit_code_for_nothing(tmp_path: Path) -> None:
    """1, and nothing on standard output: a script can tell."""
    save(tmp_path / "torn.pt", archive()[:-1], at=40)
    for watch in (tmp_path, tmp_path / "nowhere"):
        assert run("latest", "--watch", watch) == Ran(1, "", f"no whole checkpoint in {watch}\n")
        told = run("latest", "--watch", watch, "--json")
        assert (told.code, json.loads(told.out), told.err) == (1, {"path": None}, "")


# --- status and wait ------------------------------------------------------------------------------------


@contextmanager
def answering(watch: Path, *answers: bytes) -> Iterator[None]:
    """Answer as the sidecar of `watch`: one answer after the other, the last one for good."""
    left = list(answers)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.recv(65_536)
                    client.sendall(left.pop(0) if len(left) > 1 else left[0])

        thread = threading.Thread(target=serve)
        thread.start()
        note_address(watch, f"127.0.0.1:{server.getsockname()[1]}")
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def note_address(watch: Path, address: str) -> None:
    """Write down where a sidecar answers, as it does."""
    home = watch / ".ckpt-sidecar"
    home.mkdir(exist_ok=True)
    (home / "spool.json").write_text(json.dumps({"spool": "s", "address": address}))


def account(*queue: str, reason: str = "", newest: str = "") -> bytes:
    """Return a sidecar's answer: names that are on their way."""
    told = {
        "schema": 1,
        "spool": "s",
        "state": "ready",
        "reason": reason,
        "lag_seconds": 12.345,
        "newest": {"name": newest, "size": 1234567} if newest else None,
        "queue": [{"id": "1-1", "name": name, "state": "uploading"} for name in queue],
    }
    return b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(told).encode()


@pytest.mark.parametrize("command", ["status", "wait"])
def test_without_a_sidecar_there_is_a_clear_answer(tmp_path: Path, closed: int, command: str) -> None:
    """There never was one, it has gone, or what it noted is broken: exit code 1, and what to look at."""
    for record in (None, f"127.0.0.1:{closed}", "", "no address", "127.0.0.1:99999", "127.0.0.1:x y"):
        if record is not None:
            note_address(tmp_path, record)
        told = run(command, "--watch", tmp_path)
        assert (told.code, told.out) == (1, "")
        assert told.err.startswith(f"Error: no sidecar answers for {tmp_path}: ")
        assert told.err.endswith("(is it running, with this --watch and --spool?)\n")
    for broken in ("{", "[]", "null", '{"address": 3}'):
        (tmp_path / ".ckpt-sidecar/spool.json").write_text(broken)
        assert "no sidecar answers" in run(command, "--watch", tmp_path).err


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
        b"HTTP/1.0 404 Not Found\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n<html>",
        b"HTTP/1.0 200 OK\r\n\r\n[1]",
        b"HTTP/1.0 200 OK\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\n\r\n3",
        b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n{",
    ],
    ids=str,
)
def test_somebody_else_at_the_address_is_no_sidecar(tmp_path: Path, answer: bytes) -> None:
    """After a crash another program may have the port."""
    with answering(tmp_path, answer):
        told = run("status", "--watch", tmp_path)
    assert told.code == 1
    assert told.err.startswith("Error: no sidecar answers for ")


def test_status_tells_in_words_how_things_stand(tmp_path: Path) -> None:
    """Exit code 0 when all is durable, 3 when not yet."""
    with answering(tmp_path, account(newest="x.pt")):
        told = run("status", "--watch", tmp_path)
    assert told == Ran(0, "ready\nnewest durable: x.pt (1,234,567 bytes)\nlag: 12.3 s, 0 on their way\n", "")
    with answering(tmp_path, account("a.pt", "b.pt", reason="tries again")):
        told = run("status", "--watch", tmp_path)
    assert told.code == 3
    assert told.out.splitlines() == [
        "ready: tries again",
        "nothing is durable yet",
        "lag: 12.3 s, 2 on their way",
        "  a.pt  uploading",
        "  b.pt  uploading",
    ]


def test_status_hands_on_the_sidecars_own_json(tmp_path: Path) -> None:
    """All of it."""
    with answering(tmp_path, account("a.pt")):
        told = run("status", "--watch", tmp_path, "--json")
    assert told.code == 3
    assert json.loads(told.out) == json.loads(account("a.pt").partition(b"\r\n\r\n")[2])


def test_status_goes_by_no_proxy_and_finds_a_spool_elsewhere(tmp_path: Path, closed: int) -> None:
    """A proxy of the cluster cannot reach this host; the record is where --spool says."""
    proxy = f"http://127.0.0.1:{closed}"
    watch, home = tmp_path / "ckpt", tmp_path / "queue"
    home.mkdir()
    with answering(home, account()):
        (home / ".ckpt-sidecar/spool.json").rename(home / "spool.json")
        env = {"http_proxy": proxy, "HTTP_PROXY": proxy, "ALL_PROXY": proxy}
        assert run("status", "--watch", watch, "--spool", home, env=env).code == 0
        assert run("wait", "--watch", watch, env=env | {f"{ENV_PREFIX}SPOOL": str(home)}).code == 0
        assert run("status", "--watch", watch).code == 1


def note_settled(watch: Path, name: str, id_: str | None = "1-1") -> None:
    """Write down that the file is settled, as the sidecar does."""
    status = (watch / name).stat()
    with (watch / ".ckpt-sidecar/known.jsonl").open("a") as known:
        known.write(json.dumps([name, status.st_size, status.st_mtime_ns, id_]) + "\n")


def test_a_sidecar_of_another_watch_dir_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """Its predecessor on the port has ended, and what it noted is stale."""
    with answering(tmp_path, account().replace(b'"s"', b'"another"')):
        told = run("status", "--watch", tmp_path)
    assert told.code == 1
    assert "answers another sidecar" in told.err


def test_wait_waits_until_all_is_durable(tmp_path: Path) -> None:
    """All that was on its way."""
    both, one, none = account("a.pt", "b.pt"), account("b.pt"), account()
    with answering(tmp_path, both, one, none):
        assert run("wait", "--watch", tmp_path) == Ran(0, "", "")
    with answering(tmp_path, both, none):
        told = run("wait", "--watch", tmp_path, "--json")
        assert (told.code, json.loads(told.out)) == (0, {"not_durable": []})


def test_wait_waits_for_the_one_that_it_was_asked_for(tmp_path: Path) -> None:
    """Also when the trainer has deleted it meanwhile; whatever the others do."""
    with answering(tmp_path, account("a.pt", "b.pt"), account("b.pt")):
        (tmp_path / "a.pt").write_bytes(b"weights")
        note_settled(tmp_path, "a.pt")
        assert run("wait", "--watch", tmp_path, "a.pt") == Ran(0, "", "")
        (tmp_path / "a.pt").unlink()
        assert run("wait", "--watch", tmp_path, "a.pt") == Ran(0, "", "")


def test_wait_is_not_fooled_by_what_the_sidecar_has_not_seen_yet(tmp_path: Path) -> None:
    """Just saved, held without a verdict, saved anew since, or not even saved: not durable."""
    with answering(tmp_path, account()):

        def left(*name: str) -> str:
            told = run("wait", "--watch", tmp_path, "--timeout", "0", *name)
            assert told.code == (3 if told.out else 0)
            return told.out

        assert left("never.pt") == "never.pt\n"
        (tmp_path / "a.pt").write_bytes(b"weights")
        (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04, and no more")
        (tmp_path / "notes.txt").write_bytes(b"no checkpoint")
        assert left() == left("a.pt") == "a.pt\n"
        note_settled(tmp_path, "a.pt")
        assert left() == left("a.pt") == ""
        (tmp_path / "a.pt").write_bytes(b"other weights")
        assert left() == left("a.pt") == "a.pt\n"
        note_settled(tmp_path, "a.pt", None)
        held = tmp_path / ".ckpt-sidecar/caught/1-2-3/run"
        held.mkdir(parents=True)
        (held / "b.pt").write_bytes(b"weights")
        assert left() == left("run/b.pt") == "run/b.pt\n"
        assert left("a.pt") == ""


def test_wait_ends_when_its_time_is_over(tmp_path: Path) -> None:
    """With exit code 3, and the names of what is not durable."""
    with answering(tmp_path, account("a.pt", "b.pt")):
        assert run("wait", "--watch", tmp_path, "--timeout", "0") == Ran(3, "a.pt\nb.pt\n", "")
        assert run("wait", "--watch", tmp_path, "--timeout=0", "b.pt").out == "b.pt\n"
        told = run("wait", "--watch", tmp_path, "--timeout", "0.3", "--json")
        assert (told.code, json.loads(told.out)) == (3, {"not_durable": ["a.pt", "b.pt"]})


def test_wait_ends_when_the_sidecar_does(tmp_path: Path) -> None:
    """It is not waited for in vain."""
    with answering(tmp_path, account("a.pt"), b""):
        assert run("wait", "--watch", tmp_path).code == 1


# --- the daemon -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed() -> Iterator[int]:
    """Hold a port on which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


class Daemon:
    """A sidecar that runs, and cannot reach its bucket."""

    def __init__(self, watch: Path, endpoint: int, *words: str | Path, script: str = TELLS_IMPORTS) -> None:
        self.watch = watch
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        store = ("--bucket", "models", "--prefix", "run", "--endpoint-url", f"http://127.0.0.1:{endpoint}")
        where = ("--watch", watch, "--listen", "127.0.0.1:0")
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *where, *store, *words],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def lines(self) -> list[dict[str, Any]]:
        """Return what it has logged; every line is JSON."""
        self._log.seek(0)
        return [json.loads(line) for line in self._log.read().splitlines(keepends=True) if line[-1] == "\n"]

    def until(self, is_so: Callable[[], Any]) -> Any:
        """Wait until it is so, and return it; the daemon must be alive."""
        deadline = time.monotonic() + SECONDS
        while not (told := is_so()):
            assert self.process.poll() is None, self.lines()
            assert time.monotonic() < deadline, self.lines()
            time.sleep(0.02)
        return told

    def until_told(self, event: str) -> dict[str, Any]:
        """Wait for a line of the log, and return it."""
        told: dict[str, Any] = self.until(
            lambda: next((line for line in self.lines() if line["event"] == event), None)
        )
        return told

    def address(self) -> str:
        """Return where it answers, once it does."""
        record = self.watch / ".ckpt-sidecar/spool.json"
        told: str = self.until(lambda: record.exists() and json.loads(record.read_bytes())["address"])
        return told

    def get(self, path: str) -> tuple[int, str]:
        """Ask it; return the HTTP status and the text."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://{self.address()}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def stop(self) -> tuple[int, str]:
        """Ask it to stop as Kubernetes does; return its exit code and its standard output."""
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=20)  # less than the 25 s that a drain may take
        return self.process.returncode, out

    def close(self) -> None:
        """Leave nothing behind."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._log.close()


@contextmanager
def running(watch: Path, endpoint: int, *words: str | Path, script: str = TELLS_IMPORTS) -> Iterator[Daemon]:
    """Run a sidecar."""
    daemon = Daemon(watch, endpoint, *words, script=script)
    try:
        yield daemon
    finally:
        daemon.close()


def test_a_sidecar_that_cannot_reach_its_bucket_lives_is_not_ready_and_says_why(
    tmp_path: Path, closed: int
) -> None:
    """It answers, holds what was saved, and at a stop says that it is not durable; nor is torch imported."""
    watch, data = tmp_path / "ckpt", archive()
    save(watch / "step_1.pt", data, at=time.time() - 60)
    with running(watch, closed) as daemon:
        retrying = daemon.until_told("retrying")
        assert retrying["reason"] == "connection"
        assert daemon.get("/healthz") == (200, "ok\n")
        code, text = daemon.get("/readyz")
        assert code == 503
        assert text.startswith("not ready: tries again: ") and str(closed) in text
        assert daemon.get("/metrics")[0] == 200
        daemon.until_told("checkpoint_pinned")

        status = run("status", "--watch", watch)
        assert status.code == 3
        assert "starting: tries again: " in status.out
        assert "step_1.pt  pinned" in status.out
        assert run("wait", "--watch", watch, "--timeout", "0") == Ran(3, "step_1.pt\n", "")

        second = run("--watch", watch, "--bucket", "models", "--listen", "127.0.0.1:0")
        assert second.code == 1
        assert second.err == (
            f"Error: another ckpt-sidecar serves {watch}/.ckpt-sidecar (pid {daemon.process.pid}): "
            "stop it first\n"
        )

        taken = run("--watch", tmp_path / "other", "--bucket", "models", "--listen", daemon.address())
        assert taken.code == 1
        error = next(line for line in taken.err.splitlines() if line.startswith("Error: "))
        assert f"cannot listen on {daemon.address()}: " in error
        assert "address already in use" in error.lower()
        assert error.endswith("(choose another --listen)")
        assert "Traceback" not in taken.err

        assert daemon.stop() == (3, "imported: aioboto3 aiohttp boto3 botocore prometheus_client\n")
        assert daemon.lines()[-1]["event"] == "drained"
        assert daemon.lines()[-1]["left"] == ["step_1.pt"]
    assert (watch / "step_1.pt").read_bytes() == data
    assert run("status", "--watch", watch).code == 1


def test_a_trainer_is_not_started_before_its_checkpoint_is_there(tmp_path: Path, closed: int) -> None:
    """A stop meanwhile ends the sidecar with the code of a stopped trainer; it has never been started."""
    started = tmp_path / "started"
    with running(tmp_path / "ckpt", closed, "--", "touch", started) as daemon:
        daemon.until_told("retrying")
        assert daemon.get("/readyz")[0] == 503
        assert daemon.stop()[0] == 128 + signal.SIGTERM
    assert not started.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a PID namespace")
@pytest.mark.fault("E2")
def test_pid_1_hears_a_stop_from_its_first_moments(tmp_path: Path, closed: int) -> None:
    """In a container of its own the kernel drops a signal that nobody has asked for."""
    unshared = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*unshared, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no PID namespace to be had here")
    watch = tmp_path / "ckpt"
    words = ["--watch", str(watch), "--bucket", "models", "--endpoint-url", f"http://127.0.0.1:{closed}"]
    command = [*unshared, sys.executable, "-m", "ckpt_sidecar", *words, "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            record, deadline = watch / ".ckpt-sidecar/spool.json", time.monotonic() + SECONDS
            while not record.exists():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGTERM)
            _, error = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode in (0, 128 + signal.SIGTERM)
    assert "Traceback" not in error


def test_a_stop_when_there_is_nothing_to_send_is_a_good_end(tmp_path: Path, closed: int) -> None:
    """Nothing is at risk: exit code 0, at once; why it ended goes to the pod's termination message."""
    message = tmp_path / "termination-log"
    message.touch()
    script = f"""
from pathlib import Path
from ckpt_sidecar import cli
cli.TERMINATION_LOG = Path({str(message)!r})
cli.main()
"""
    with running(tmp_path / "ckpt", closed, script=script) as daemon:
        daemon.until_told("retrying")
        assert daemon.stop() == (0, "")
        assert message.read_text().startswith("nothing was saved, and it never became ready: ")
    told = run("--watch", message, "--bucket", "models", script=script)
    assert told.code == 1
    assert message.read_text() == f"not a directory: {message} (--watch takes the checkpoint directory)"


@pytest.mark.parametrize("command", [(), ("restore",)], ids=["daemon", "restore"])
def test_a_watch_dir_that_cannot_be_is_said(tmp_path: Path, command: Sequence[str]) -> None:
    """Its parent is missing, or it is a file: exit code 1, in one line, with the mend."""
    file = tmp_path / "file"
    file.touch()
    for watch, said in (
        (tmp_path / "typo/ckpt", f"no such directory: {tmp_path / 'typo'} (make it, or mend --watch)"),
        (file, f"not a directory: {file} (--watch takes the checkpoint directory)"),
    ):
        told = run(*command, "--watch", watch, "--bucket", "models")
        assert (told.code, told.out, told.err) == (1, "", f"Error: {said}\n")
    assert list(tmp_path.iterdir()) == [file]


def test_a_watch_dir_that_cannot_be_written_is_said() -> None:
    """With the path, the cause and the mend."""
    with tempfile.TemporaryDirectory() as name:
        watch = Path(name)
        watch.chmod(0o555)
        told = run("--watch", watch, "--bucket", "models", script=AS_NOBODY)
        assert (told.code, told.out) == (1, "")
        assert told.err == (
            f"Error: cannot write into the watch dir: Permission denied: {watch / '.ckpt-sidecar'} (run the "
            "sidecar as the trainer's user, with the directory writable for it)\n"
        )
