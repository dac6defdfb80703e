"""The fault matrix in docs/reliability.md: every row is held by the tests that it names, or says why not."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?P<row>[A-H]\d+) \| [^|]+ \| [^|]+ \| (?P<held>[^|]+) \|$", re.MULTILINE)
ROWS = {match["row"]: match["held"] for match in ROW.finditer((ROOT / "docs/reliability.md").read_text())}
SIZES = {"A": 18, "B": 8, "C": 20, "D": 10, "E": 14, "F": 9, "G": 8, "H": 5}


def marked() -> dict[str, set[str]]:
    """Return for each row the test files in which a `fault` mark names it."""
    files: dict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                for row in node.args:
                    files[ast.literal_eval(row)].add(path.relative_to(ROOT / "tests").as_posix())
    return files


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
