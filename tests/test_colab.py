"""Colab brings its own torch: the install line of the notebooks leaves it, and what else fits."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
links = runpy.run_path(str(ROOT / "notebooks" / "links.py"))


def _would_install(*requirements: str) -> list[str] | None:
    """The names that pip would install into this environment; None if it had to look further.

    Without an index, so that whatever is not already here and within its bounds is an error.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    ask = [*pip, "--dry-run", "--no-index", "--report", "-", *requirements]
    done = subprocess.run(ask, capture_output=True, text=True, check=False)
    if done.returncode:
        assert re.search("No matching distribution|conflicting dependencies", done.stderr)
        return None
    return [one["metadata"]["name"] for one in json.loads(done.stdout)["install"]]


def test_installing_the_wheel_touches_neither_torch_nor_anything_else_that_fits(wheel):
    found = _would_install(str(wheel))
    assert found is not None
    assert set(found) <= {"saesub"}
    assert _would_install(f"{wheel}[notebooks]") == found
    assert _would_install(str(wheel), f"torch!={version('torch')}") is None


def test_the_install_line_names_saesub_and_asks_for_nothing_newer():
    line = links["_INSTALL"].format(repository=links["repository"]())
    (arguments,) = re.findall(r"%pip install (.*)", line)
    flag, requirement = arguments.split(" ", 1)
    assert flag == "-q"
    parsed = Requirement(requirement.strip('"'))
    assert (parsed.name, parsed.extras) == ("saesub", {"notebooks"})
    assert links["repository"]() in requirement
