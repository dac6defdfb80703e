"""The command line: flags and environment into Settings, how a run ended into an exit code.

Heavy modules are imported where they are used, so that `--help`, `latest` and `status` answer at once.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click

from ckpt_sidecar import __version__
from ckpt_sidecar.names import HOME
from ckpt_sidecar.settings import ENV_PREFIX, BadSetting, Settings

TERMINATION_LOG = Path("/dev/termination-log")
EPILOG = "After `--`: a command to restore for, run as a child, and drain after. Documentation: README.md."

Decorated = Callable[..., Any]


def options(*names: str) -> Callable[[Decorated], Decorated]:
    """Give a command the flags of these settings; with none named all, and it asks for them itself."""
    chosen = [each for each in fields(Settings) if not names or each.name in names]

    def decorate(command: Decorated) -> Decorated:
        for each in reversed(chosen):
            command = _option(each, required=bool(names) and each.default is MISSING)(command)
        return command

    return decorate


def _option(each: Any, *, required: bool) -> Callable[[Decorated], Decorated]:
    more: dict[str, Any] = {"callback": _not_empty, "required": required}
    if each.default is not MISSING:
        default = each.default
        more = {"default": default, "show_default": default != "" and not isinstance(default, bool)}
        if isinstance(default, bool | tuple):
            more |= {"is_flag": True} if isinstance(default, bool) else {"multiple": True}
        else:
            more["type"] = type(default)
    return click.option(
        f"--{each.name.replace('_', '-')}",
        each.name,
        metavar=each.metadata["metavar"],
        envvar=ENV_PREFIX + each.name.upper(),
        show_envvar=True,
        help=each.metadata["help"],
        **more,
    )


def _not_empty(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """An unset variable of a script must not become the directory one happens to be in."""
    if value is not None and not value:
        raise click.BadParameter("is empty")
    return value


class Usage(click.ClickException):
    """A setting cannot be used."""

    exit_code = 2


def settings_from(given: dict[str, Any]) -> Settings:
    """Make the settings, or say on the command line's terms what is wrong with them."""
    try:
        return Settings(**{**given, "watch": Path(given["watch"]).absolute()})
    except BadSetting as error:
        raise Usage(str(error)) from None


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
    options_metavar="--watch DIR --bucket BUCKET [OPTIONS]",
    subcommand_metavar="[-- COMMAND…]\n       ckpt-sidecar COMMAND [ARGS]…",
)
@click.version_option(__version__, prog_name="ckpt-sidecar")
@options()
@click.pass_context
def cli(context: click.Context, /, **given: Any) -> None:
    """Make a training job's checkpoints durable in S3 while it trains; restore the newest on the next node.

    Without a command it runs the sidecar: claim the prefix, restore, be ready, watch, upload; on SIGTERM,
    drain. With `-- COMMAND` it does the same around that command.

    Exit codes: 0 all is durable; 1 an error; 2 usage; 3 not everything was durable at the drain deadline;
    4 another sidecar holds the prefix; 5 nothing could be restored although the bucket holds checkpoints;
    70 a bug ended it, and the log has the traceback.
    After `--` the command's own code, when it is not 0.
    """
    _check_child(context)
    if context.invoked_subcommand is None:
        for name in ("watch", "bucket"):
            if not given[name]:
                raise click.UsageError(f"Missing option '--{name}' (or {ENV_PREFIX}{name.upper()}).", context)
        from ckpt_sidecar.daemon import run_daemon  # noqa: PLC0415  (the heavy half)

        settings = settings_from(given)
        try:
            end = run_daemon(settings, context.obj or [], _leave)
        except click.ClickException as error:
            _last_words(error.message)
            raise
        _last_words(end.reason)
        raise SystemExit(int(end.code))


def _leave(code: int, reason: str) -> None:
    """End the process at once: what still waits in a thread would hold up every other way out."""
    _last_words(reason)
    os._exit(code)


def _check_child(context: click.Context) -> None:
    """Say at once what is wrong with what stands after `--`, and not after a long restore."""
    command: Sequence[str] | None = context.obj
    if command is None:
        return
    if context.invoked_subcommand is not None:
        raise click.UsageError(f"no command can follow {context.invoked_subcommand!r} after --", context)
    if not command:
        raise click.UsageError("nothing stands after --: give the command to run", context)
    if shutil.which(command[0]) is None:
        raise click.ClickException(
            f"cannot run {command[0]!r}: no such program (give its path, or mend PATH)"
        )


def _last_words(reason: str) -> None:
    """Kubernetes fails no Job for a sidecar's exit code: the reason goes to the termination message too."""
    with suppress(OSError):
        if TERMINATION_LOG.exists():
            TERMINATION_LOG.write_text(reason[:4000], encoding="utf-8", errors="backslashreplace")


JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
STORE = ("bucket", "prefix", "endpoint_url", "expected_bucket_owner")


@cli.command()
@options("watch", *STORE, "pattern", "workers", "spool")
@JSON
def restore(*, as_json: bool, **given: Any) -> None:
    """Restore the newest good checkpoint into DIR, once, and print its path.

    For init containers and scripts. Exit codes: 0 restored, kept what was there, or nothing to restore;
    1 an error; 5 the bucket holds checkpoints and none could be restored.
    """
    from ckpt_sidecar.commands import run_restore  # noqa: PLC0415

    code, told = run_restore(settings_from(given))
    click.echo(json.dumps(told) if as_json else told["path"] or "")
    raise SystemExit(int(code))


@cli.command("ls")
@options(*STORE)
@JSON
def list_checkpoints(*, as_json: bool, **given: Any) -> None:
    """List the durable checkpoints, newest first."""
    from ckpt_sidecar.commands import read_manifest  # noqa: PLC0415

    settings = settings_from(given | {"watch": "."})
    entries = read_manifest(settings)
    if as_json:
        click.echo(json.dumps(entries, indent=1))
        return
    for each in entries:
        click.echo(f"{each['id']:>10}  {each['saved_at'][:19]}Z  {each['size']:>15,}  {each['name']}")


@cli.command()
@options("watch", "spool")
@JSON
def status(*, as_json: bool, watch: str, spool: str) -> None:
    """Ask the running sidecar how things stand; exit code 0 when all is durable, 3 when not yet."""
    told = _ask(watch, spool)
    click.echo(json.dumps(told, indent=1) if as_json else _in_words(told))
    raise SystemExit(3 if told["queue"] else 0)


@cli.command()
@options("watch", "pattern")
@JSON
def latest(*, as_json: bool, watch: str, pattern: Sequence[str]) -> None:
    """Print the path of the newest whole checkpoint in DIR, for --resume; exit code 1 without one."""
    from ckpt_sidecar.formats import Rules  # noqa: PLC0415
    from ckpt_sidecar.standing import newest_whole  # noqa: PLC0415

    path = newest_whole(Path(watch), Rules(tuple(pattern)))
    if as_json:
        click.echo(json.dumps({"path": None if path is None else str(path)}))
    elif path is not None:
        click.echo(str(path))
    else:
        click.echo(f"no whole checkpoint in {watch}", err=True)
    raise SystemExit(0 if path is not None else 1)


@cli.command()
@options("watch", "spool", "pattern")
@click.argument("name", required=False)
@click.option("--timeout", default=600.0, show_default=True, help="Seconds to wait at most.")
@JSON
def wait(*, as_json: bool, name: str | None, timeout: float, **given: Any) -> None:
    """Wait until all checkpoints, or the one called NAME, are durable; 3 when they are not in time.

    All are those that were completed before the call. NAME is relative to the watch dir.
    """
    import time  # noqa: PLC0415

    deadline = time.monotonic() + timeout
    while (left := _not_durable(name, **given)) and time.monotonic() < deadline:
        time.sleep(0.2)
    click.echo(json.dumps({"not_durable": left}) if as_json else "\n".join(left), nl=bool(left) or as_json)
    raise SystemExit(3 if left else 0)


def _not_durable(name: str | None, *, watch: str, spool: str, pattern: Sequence[str]) -> list[str]:
    """What is on its way, and what the sidecar has not judged yet or not even seen."""
    from ckpt_sidecar.formats import Rules  # noqa: PLC0415
    from ckpt_sidecar.standing import not_settled  # noqa: PLC0415

    queued = {each["name"] for each in _ask(watch, spool)["queue"]}
    unsettled = not_settled(Path(watch), _home(watch, spool), Rules(tuple(pattern)), name=name)
    return sorted((queued if name is None else queued & {name}) | set(unsettled))


def _home(watch: str, spool: str) -> Path:
    return Path(spool or Path(watch, HOME))


def _ask(watch: str, spool: str) -> dict[str, Any]:
    """The running sidecar's own account, found through the spool; asked directly, whatever proxy is set."""
    import urllib.request  # noqa: PLC0415
    from http.client import HTTPException  # noqa: PLC0415

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        record = json.loads((_home(watch, spool) / "spool.json").read_bytes())
        address = record["address"]
        with opener.open(f"http://{address}/status.json", timeout=5) as answer:
            told: dict[str, Any] = json.load(answer)
        if told["spool"] != record["spool"]:  # its port has been given to another since it ended
            raise ValueError(f"at {address} answers another sidecar")  # noqa: TRY301
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        raise click.ClickException(
            f"no sidecar answers for {watch}: {error} (is it running, with this --watch and --spool?)"
        ) from None
    return told


def _in_words(told: dict[str, Any]) -> str:
    newest = told["newest"]
    lines = [
        f"{told['state']}: {told['reason']}" if told["reason"] else told["state"],
        f"newest durable: {newest['name']} ({newest['size']:,} bytes)"
        if newest
        else "nothing is durable yet",
        f"lag: {told['lag_seconds']:.1f} s, {len(told['queue'])} on their way",
    ]
    lines += [f"  {each['name']}  {each['state']}" for each in told["queue"]]
    return "\n".join(lines)


def _fill_streams() -> None:
    """Put nothing where a standard stream was closed: else the next file or socket gets its number.

    A trainer, too, then has nothing as its standard output, instead of none.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free is this one
            os.set_inheritable(nothing, True)  # noqa: FBT003
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; what stands after `--` is the child's."""
    _fill_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    child: list[str] | None = None
    if "--" in words:
        at = words.index("--")
        words, child = words[:at], words[at + 1 :]
    cli.main(args=words, prog_name="ckpt-sidecar", obj=child)
