"""What the documents say of the program is what the program says of itself."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from ckpt_sidecar.checkpoint import Book
from ckpt_sidecar.cli import cli
from ckpt_sidecar.metrics import Metrics
from ckpt_sidecar.settings import Settings
from ckpt_sidecar.sidecar import Exit

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").rglob("*.md"))
)


def test_the_readme_has_every_flag_with_its_default() -> None:
    """In the order of `--help`."""
    table = re.findall(r"^\| `--([a-z0-9-]+)` \| (.+?) \|", README, re.MULTILINE)
    assert [flag for flag, _ in table] == [each.name.replace("_", "-") for each in fields(Settings)]
    told = dict(table)
    for each in fields(Settings):
        default, cell = each.default, told[each.name.replace("_", "-")]
        if default is MISSING:
            assert cell == "required"
        elif isinstance(default, bool):
            assert (default, cell) == (False, "off")
        elif isinstance(default, tuple):
            assert re.findall(r"`(.+?)`", cell) == list(default)
        elif default != "":
            assert cell == f"`{default}`"


def test_the_readme_has_every_command_and_no_other() -> None:
    """Each with what it is for."""
    table = set(re.findall(r"^\| `ckpt-sidecar ([a-z]+) ", README, re.MULTILINE))
    assert table == set(cli.commands)


def test_the_readme_has_every_exit_code() -> None:
    """2 is the command line's own."""
    sentence = README.split("Exit codes: ")[1].split("After `--`")[0]
    assert {int(code) for code in re.findall(r"\b(\d+) ", sentence)} == {each.value for each in Exit} | {2}


def test_the_metrics_in_the_readme_exist() -> None:
    """An alert that is copied from there has something to look at."""
    text = Metrics(version="", python="", clock=lambda: 0.0, book=Book()).render().decode()
    for name in set(re.findall(r"`(ckpt_sidecar_[a-z_]+)`", README)):
        assert f"\n# HELP {name.removesuffix('_total')}" in f"\n{text}".replace("_total ", " "), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_every_link_leads_somewhere(path: Path) -> None:
    """Within the project."""
    text = (ROOT / path).read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (ROOT / path.parent / target).exists(), target
