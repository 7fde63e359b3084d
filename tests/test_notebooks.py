"""The committed notebooks are clean, and each one runs from the built wheel in an empty folder.

The wheel is unpacked into a folder of its own: the checkout is not on the kernels' path.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from saesub.reproduce.runner import PROFILES

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _code(path: Path) -> list:
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@each_notebook
def test_committed_outputs_come_from_one_clean_run(path):
    cells = [cell for cell in _code(path) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert outputs
    assert not [out for out in outputs if out.output_type == "error"]


@each_notebook
def test_text_is_no_placeholder(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not [c.source for c in cells if c.cell_type == "markdown" and len(c.source.split()) < 2]


@each_notebook
def test_size_is_light(path):
    assert path.stat().st_size < 1_000_000


@each_notebook
def test_cells_are_short_and_end_in_the_claims(path):
    cells = _code(path)
    assert max(len(cell.source.splitlines()) for cell in cells) <= 20
    assert any(call in cells[-1].source for call in ("claims.compare(", "claims.scorecard("))


@each_notebook
def test_the_opening_cells(path):
    first, install, parameters = nbformat.read(path, as_version=4).cells[:3]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "pip install" in install.source
    assert "if " in install.source, "the install line must be guarded"
    assert "parameters" in parameters.metadata.get("tags", [])
    assert "PROFILE" in parameters.source


def _settings(path: Path, profile: str) -> dict:
    """What a notebook's cell of settings defines at a profile."""
    cell = next(cell for cell in _code(path) if "[PROFILE]" in cell.source)
    names: dict = {"PROFILE": profile}
    exec(cell.source, names)
    return names


SETTLED = [path for path in NOTEBOOKS if not path.stem.startswith("12_")]  # it has no settings


@pytest.mark.parametrize("path", SETTLED, ids=lambda path: path.stem)
def test_every_profile_has_settings(path):
    assert all(_settings(path, profile) for profile in PROFILES)


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_the_notebooks_that_train_share_one_store(profile):
    training = [path for path in NOTEBOOKS if "04" <= path.stem[:2] <= "09"]
    found = [_settings(path, profile) for path in training]
    tokens = {s["settings"]["n_tokens"] if "settings" in s else s["n_tokens"] for s in found}
    assert len(tokens) == 1


def test_the_first_cell_asks_for_the_profile_that_is_run_by_default():
    assert all(
        cell.source.startswith('PROFILE = "quick"')
        for path in NOTEBOOKS
        for cell in _code(path)
        if "parameters" in cell.metadata.get("tags", [])
    )


def _environment(installed: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}


@pytest.mark.slow
def test_the_wheel_is_what_runs(installed, tmp_path):
    command = [sys.executable, "-c", "import saesub.paths as r; print(r.notebooks_dir())"]
    run = {"cwd": tmp_path, "env": _environment(installed), "capture_output": True, "text": True}
    shown = Path(subprocess.run(command, check=True, **run).stdout.strip())
    assert shown.is_relative_to(installed)
    assert [p.name for p in sorted(shown.glob("[0-9]*.ipynb"))] == [p.name for p in NOTEBOOKS]
    command = [sys.executable, "-m", "saesub.cli", "list"]
    assert "smollm2-135m" in subprocess.run(command, check=True, **run).stdout


def _solutions(source: str) -> list[str]:
    """The code of the solutions that a cell folds away."""
    folded = re.findall(r"<details>.*?</details>", source, re.DOTALL)
    return [code for text in folded for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@each_notebook
def test_every_notebook_has_exercises_and_the_first_ones_have_solutions(path):
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    (exercises,) = [source for source in sources if source.startswith("## Exercises")]
    numbers = [int(n) for n in re.findall(r"^(\d)\. ", exercises, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 2 <= len(numbers) <= 4
    assert "Solution to 1</summary>" in exercises
    for code in _solutions(exercises):
        compile(code, path.stem, "exec")
        assert max(map(len, code.splitlines())) <= 140


def _with_solutions(path: Path) -> None:
    """Puts each solution into a cell of its own behind the exercises."""
    notebook = nbformat.read(path, as_version=4)
    place = next(i for i, c in enumerate(notebook.cells) if c.source.startswith("## Exercises"))
    solved = [nbformat.v4.new_code_cell(code) for code in _solutions(notebook.cells[place].source)]
    notebook.cells[place + 1 : place + 1] = solved
    nbformat.write(notebook, path)


@pytest.mark.slow
@each_notebook
def test_a_notebook_and_its_solutions_run_from_the_wheel(path, installed, tmp_path):
    (given,) = installed.rglob(f"notebooks/{path.name}")
    _with_solutions(given)
    command = [sys.executable, "-m", "saesub.cli", "reproduce", "--profile", "smoke", "--quiet"]
    command += ["--notebook", path.stem]
    run = {"cwd": tmp_path, "env": _environment(installed), "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **run)
    assert done.returncode == 0, done.stderr[-4000:]
    results = tmp_path / "results" / "smoke"
    executed = nbformat.read(results / "notebooks" / path.name, as_version=4)
    outputs = [out for cell in executed.cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.output_type == "error"]
    assert any("saesub-claims" in out.get("data", {}).get("text/html", "") for out in outputs)
    claimed = json.loads((results / "claims.json").read_text(encoding="utf-8"))
    recorded = json.loads((ROOT / "data/results/full/run.json").read_text(encoding="utf-8"))
    assert [row["id"] for row in claimed] == [row["id"] for row in recorded[path.stem]["claims"]]
