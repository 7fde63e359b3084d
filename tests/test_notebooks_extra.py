"""What needs the extra `notebooks` says so where one of its packages is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("saesub.reproduce.runner", "papermill"),
        ("saesub.reproduce.plots", "matplotlib"),
        ("saesub.reproduce.plots", "seaborn"),
    ],
)
def test_the_error_names_the_package_and_how_to_install_it(module, package):
    code = (
        "import importlib, sys\n"
        f"sys.modules[{package!r}] = None\n"
        "from saesub.errors import SaesubError\n"
        "try:\n"
        f"    importlib.import_module({module!r})\n"
        "except SaesubError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert package in done.stdout
    assert "pip install 'saesub[notebooks]'" in done.stdout
