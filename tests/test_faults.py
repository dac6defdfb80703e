"""The fault matrix in docs/reliability.md: every row is held by the tests that it names, or says why not."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?P<row>[A-H]\d+) \| [^|]+ \| [^|]+ \| (?P<held>[^|]+) \|$", re.MULTILINE)
RELIABILITY = (ROOT / "docs/reliability.md").read_text()
ROWS = {match["row"]: match["held"] for match in ROW.finditer(RELIABILITY)}
SIZES = {"A": 18, "B": 8, "C": 20, "D": 10, "E": 14, "F": 9, "G": 8, "H": 5}


def rows_in(tree: ast.Module) -> set[str]:
    """Return the rows that `fault` marks name; a computed one is from the rows that the file names."""
    rows: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
            given = node.args if all(isinstance(each, ast.Constant) for each in node.args) else ast.walk(tree)
            rows |= {str(each.value) for each in given if isinstance(each, ast.Constant)}
    return {row for row in rows if re.fullmatch(r"[A-H]\d+", row)}


def marked() -> dict[str, set[str]]:
    """Return for each row the test files in which a `fault` mark names it."""
    files: dict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "tests").rglob("test_*.py"):
        for row in rows_in(ast.parse(path.read_text(encoding="utf-8"))):
            files[row].add(path.relative_to(ROOT / "tests").as_posix())
    return files


def mutants() -> list[dict[str, str]]:
    """Return what is broken on purpose, in the order of the files."""
    files = sorted((ROOT / "tests/mutants").glob("*.toml"))
    return [each for path in files for each in tomllib.loads(path.read_text())["mutant"]]


def test_every_row_is_there() -> None:
    """None is left out, and none is there twice."""
    assert list(ROWS) == [f"{letter}{n}" for letter, size in SIZES.items() for n in range(1, size + 1)]


def test_every_row_names_the_tests_that_hold_it_or_says_why_there_is_none() -> None:
    """In the order of their names; where only a part is held, the rest is said after a semicolon."""
    held = marked()
    assert set(held) <= set(ROWS)
    wrong = {}
    for row, cell in ROWS.items():
        wanted = ", ".join(f"`{name}`" for name in sorted(held[row]))
        found, _, reason = cell.partition("; ")
        if (found if wanted else "") != wanted or (not wanted and not reason):
            wrong[row] = wanted or "-; and the reason"
    assert wrong == {}


def test_every_mutant_is_in_the_list_of_those_that_the_tests_notice() -> None:
    """By its name, in the order of the files."""
    told = re.findall(r"^\| (.+) \| `\w+` \| `[\w/.]+` \|$", RELIABILITY, re.MULTILINE)
    assert told == [each["name"] for each in mutants()]


def test_every_mutant_can_be_made() -> None:
    """What it breaks stands in the program, just once: `make mutants`, which runs them, takes minutes."""
    wrong = [each["name"] for each in mutants() if (ROOT / each["file"]).read_text().count(each["old"]) != 1]
    assert wrong == []
