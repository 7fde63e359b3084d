"""What is committed of a run agrees with itself: record, README and notebooks."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from saesub import claims

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "data" / "results" / "quick" / "run.json"
publish = runpy.run_path(str(ROOT / "notebooks" / "publish.py"))


def test_the_readme_shows_the_committed_record():
    readme = (ROOT / "README.md").read_text()
    assert publish["with_tables"](readme, json.loads(RECORD.read_text())) == readme
    assert "F6.asi_dead" in readme


ROWS = [row for recorded in json.loads(RECORD.read_text()).values() for row in recorded["claims"]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_every_recorded_claim_is_in_its_notebook(row):
    (path,) = (ROOT / "notebooks").glob(f"{row['notebook']}_*.ipynb")
    last = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"][-1]
    shown = "".join(out.get("data", {}).get("text/html", "") for out in last.outputs)
    assert claims._html_row(row) in shown


def test_every_notebook_has_a_record():
    names = {path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    assert set(json.loads(RECORD.read_text())) == names


def test_a_run_of_some_notebooks_is_given_the_recorded_claims_of_the_others(tmp_path):
    (tmp_path / "claims_05.json").write_text("[]")
    publish["seed"](tmp_path)
    assert (tmp_path / "claims_05.json").read_text() == "[]"
    given = claims.collect(tmp_path)
    assert given == [row for row in ROWS if row["notebook"] != "05"]


def test_cleaning_drops_what_papermill_added_and_progress_bars():
    given = [
        new_output("stream", name="stderr", text="50%"),
        new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}}),
        new_output("execute_result", {"text/plain": "1"}, execution_count=7),
    ]
    injected = new_code_cell("PROFILE = 'quick'", metadata={"tags": ["injected-parameters"]})
    cell = new_code_cell("1", outputs=given, execution_count=7)
    cleaned = publish["cleaned"](new_notebook(cells=[injected, cell], metadata={"papermill": {}}))
    assert [c.source for c in cleaned.cells] == ["1"]
    assert cleaned.cells[0].execution_count == 1
    assert cleaned.cells[0].outputs == [given[2]]
    assert "papermill" not in cleaned.metadata
