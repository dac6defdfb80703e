"""The tables of docs/architecture.md are the truth: imports, powers, sizes."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from ckpt_sidecar.checkpoint import NEXT

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ckpt_sidecar"
DOCUMENT = (ROOT / "docs/architecture.md").read_text()
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MEDIAN_FUNCTION_LINES = 400, 50, 10
MAX_POSITIONAL = 3  # parameters, self not counted
IMPURE = {"asyncio", "os", "time", "random", "logging", "socket", "threading", "pathlib"}

# Of each power: what is imported, or called as `module.function`, to have it.
POWERS = {
    "import boto3, aioboto3, botocore, aiobotocore": {"boto3", "aioboto3", "botocore", "aiobotocore"},
    "import aiohttp": {"aiohttp"},
    "import structlog, logging": {"structlog", "logging"},
    "import click": {"click"},
    "import watchdog": {"watchdog"},
    "read the environment": {"os.environ", "os.getenv"},
    "read the wall clock or make random numbers": {
        "time.time",
        "time.time_ns",
        "datetime.now",
        "datetime.utcnow",
        "random",
        "secrets",
        "uuid",
    },
    "change the file system (link, rename, unlink, fsync, mkdir)": {
        "os.link",
        "os.rename",
        "os.replace",
        "os.unlink",
        "os.remove",
        "os.fsync",
        "os.mkdir",
        "os.makedirs",
        "os.truncate",
        "shutil.rmtree",
        ".unlink",
        ".mkdir",
        ".hardlink_to",
        ".write_bytes",
        ".write_text",
        ".chmod",
    },
    "start threads": {"threading.Thread", "ThreadPoolExecutor"},
}


def rows(header: str) -> list[list[str]]:
    """Return the cells of the document's table with that header."""
    table = DOCUMENT.split(header)[1].split("\n\n")[0]
    lines = [line for line in table.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


TABLE = rows("| layer | module | what it is | imports |\n")
LAYER = {module: int(layer) for layer, module, _, _ in TABLE}
WRITTEN = {module: [] if imports == "-" else imports.split(", ") for _, module, _, imports in TABLE}


@cache
def tree_of(module: str) -> ast.Module:
    """Parse the module."""
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def ours(module: str) -> set[str]:
    """Return the modules of ours that it imports, anywhere in it."""
    nodes = ast.walk(tree_of(module))
    froms = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[1] for name in froms if name.startswith("ckpt_sidecar.")}


def foreign(module: str) -> set[str]:
    """Return what else it imports, by the top-level name, and as `module.name` where names are imported."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            top = node.module.split(".")[0]
            found |= {top, *(f"{top}.{alias.name}" for alias in node.names)}
    return found


def called(module: str) -> set[str]:
    """Return what it reaches for, as `name.attribute`, as `.method` and as a bare name; not by its `Disk`."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Attribute) and not ast.unparse(node.value).endswith("disk"):
            found.add(f".{node.attr}")
            if isinstance(node.value, ast.Name):
                found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return found


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield every function with where it is."""
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module}.{node.name}", node


def test_every_module_has_its_row() -> None:
    """And every row its module."""
    assert sorted(WRITTEN) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_its_row_says(module: str) -> None:
    """No more and no less, and only what stands above it."""
    order = list(WRITTEN)
    assert ours(module) == set(WRITTEN[module])
    assert all(order.index(each) < order.index(module) for each in WRITTEN[module])


def test_only_the_roots_know_settings_metrics_log_and_s3() -> None:
    """Engines get plain values and one `tell`."""
    for module, imports in WRITTEN.items():
        if LAYER[module] <= 2 and module != "web":  # the status page shows the metrics
            assert not {"settings", "metrics", "log", "s3"} & set(imports), module


@pytest.mark.parametrize("module", [module for module in MODULES if LAYER[module] == 0])
def test_layer_0_is_pure(module: str) -> None:
    """It says what the program means, and does nothing."""
    assert not IMPURE & foreign(module)


def test_every_power_is_in_the_hands_that_the_table_names() -> None:
    """Whoever needs one asks the module that has it."""
    table = {power: set(modules.split(", ")) for power, modules in rows("| who may | modules |\n")}
    assert table.keys() == POWERS.keys()
    for power, words in POWERS.items():
        have = {module for module in MODULES if words & (foreign(module) | called(module))}
        assert have == table[power], power


def test_nothing_is_mocked() -> None:
    """Fakes are small real implementations."""
    for path in (ROOT / "tests").rglob("*.py"):
        tree = ast.parse(path.read_text())
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("unittest" in ast.unparse(node) for node in imported), path.name


def test_files_and_functions_stay_small() -> None:
    """What is longer has a seam somewhere."""
    lines = {module: len((PACKAGE / f"{module}.py").read_text().splitlines()) for module in MODULES}
    assert {module: n for module, n in lines.items() if n > MAX_FILE_LINES} == {}
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}
    assert statistics.median(lengths.values()) <= MEDIAN_FUNCTION_LINES


def test_from_the_fourth_parameter_on_names_are_said() -> None:
    """At the call one must see what is what."""
    for name, node in functions():
        plain = [
            each.arg for each in (*node.args.posonlyargs, *node.args.args) if each.arg not in ("self", "cls")
        ]
        assert len(plain) <= MAX_POSITIONAL, name


def test_the_picture_of_the_life_cycle_is_the_table() -> None:
    """The document draws `checkpoint.NEXT`."""
    section = DOCUMENT.split("## The life of a checkpoint")[1].split("##")[0]
    drawn = {
        left: set(right.split(" | "))
        for left, right in re.findall(r"^    (\w+)\s+-> (.+)$", section, re.MULTILINE)
    }
    assert drawn == {kind.__name__: {to.__name__ for to in tos} for kind, tos in NEXT.items() if tos}
