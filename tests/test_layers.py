"""The table of modules in CONTRIBUTING.md names them all, and imports go up it only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = [
    re.findall(r"`([\w*]+)`", line.split("|")[1]) for line in TABLE.splitlines() if "| `" in line
]
MODULES = sorted(path.stem for path in (ROOT / "saesub").glob("*.py") if path.stem != "__init__")


def row_of(module: str) -> int:
    """The first row that names it; a name before a pattern."""
    named = [i for i, row in enumerate(ROWS) if module in row]
    matched = [i for i, row in enumerate(ROWS) if any(fnmatch(module, name) for name in row)]
    return (named + matched)[0]


def imported(module: str) -> Iterator[str]:
    """saesub's modules that a module of it imports, wherever in its text."""
    for node in ast.walk(ast.parse((ROOT / "saesub" / f"{module}.py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if base in ("", "saesub"):
                yield from (alias.name for alias in node.names)
            elif base.startswith("saesub.") or node.level:
                yield base.split(".")[-1]


def test_every_row_names_modules_that_exist():
    names = [name for row in ROWS for name in row]
    assert [n for n in names if not any(fnmatch(module, n) for module in MODULES)] == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_to_earlier_rows_only(module):
    ours = [name for name in imported(module) if name in MODULES]
    assert [name for name in ours if row_of(name) > row_of(module)] == []
