"""What is committed of a run agrees with itself: record, README and notebooks."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from saesub import claims
from saesub.errors import SaesubError

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


RECORDED = {"run": ["a processor, 8 cores, 2 threads"], "seconds": 720}
NOTEBOOK_MARKS = "<!-- notebooks -->\n<!-- /notebooks -->"
MEASURED = RECORDED | {"peak_memory": {"cpu": 3_140_000_000}}


def test_the_first_cell_tells_what_the_recorded_run_took():
    end = "; a GPU is used if there is one. More."
    before = f"# T\n\nRun time at `quick`: 9 s on 2 CPU cores, 4 GB of memory{end}"
    assert f"12 min on 2 CPU threads, 4 GB of memory{end}" in publish["with_run_time"](
        before, RECORDED
    )
    told = publish["with_run_time"](before, MEASURED)
    assert (
        "`quick`: 12 min on 2 CPU threads, peak memory 3.1 GB "
        f"(on a T4 of 16 GB, by estimate, no more of either){end}"
    ) in told
    assert publish["with_run_time"](told, MEASURED) == told
    assert publish["with_run_time"](told, RECORDED) == told

    on_gpu = MEASURED | {"peak_memory": {"cpu": 10**9, "gpu": 2 * 10**9}}
    told = publish["with_run_time"](told, on_gpu)
    assert f"peak memory 1.0 GB, 2.0 GB of GPU memory{end}" in told
    assert publish["with_run_time"](told, on_gpu) == told


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), ids=lambda path: path.stem
)
def test_every_first_cell_takes_a_measured_run(path):
    first = nbformat.read(path, as_version=4).cells[0].source
    assert first.count("Run time at `quick`: ") == 1
    told = publish["with_run_time"](first, MEASURED)
    assert told.count("GB") == 2 + first.count("GB of disk") + first.count("with 80 GB")
    assert publish["with_run_time"](told, MEASURED) == told


def test_the_table_of_notebooks_has_peak_memory_once_a_run_recorded_it():
    record = json.loads(RECORD.read_text())
    bare = {name: r | {"peak_memory": {}} for name, r in record.items()}
    assert "Peak memory" not in publish["with_tables"](NOTEBOOK_MARKS, bare)
    bare["00_tour"]["peak_memory"] = {"cpu": 3_140_000_000}
    head, _, first, second, *_ = publish["with_tables"](NOTEBOOK_MARKS, bare).splitlines()[1:]
    assert head.endswith("| Time at `quick` | Peak memory |")
    assert first.endswith("| 3.1 GB |")
    assert second.endswith("| – |")


def test_a_run_with_another_install_cell_is_taken_and_one_with_other_code_is_not(tmp_path):
    def written(name, *cells):
        nbformat.write(new_notebook(cells=[*cells]), tmp_path / name)
        return tmp_path / name

    def code(*sources):
        return map(new_code_cell, sources)

    injected = new_code_cell('PROFILE = "quick"', metadata={"tags": ["injected-parameters"]})
    ran = written("ran.ipynb", injected, *code("%pip install old", "1 + 1"))
    taken = publish["_executed"](ran, written("kept.ipynb", *code("%pip install new", "1 + 1")))
    assert [c.source for c in taken.cells] == ["%pip install new", "1 + 1"]
    with pytest.raises(SaesubError, match="other code"):
        publish["_executed"](ran, written("kept.ipynb", *code("%pip install new", "1 + 2")))


def test_a_wide_runs_arms_stand_under_their_start_and_beside_their_rate():
    arms = [("random", 2e-3, 8), ("flat", 2e-3, 8), ("flat", 5e-4, 8), ("random", 5e-4, 8)]
    arms += [("flat", 5e-4, 4096), ("flat scaled", 5e-4, 4096), ("whitened_data", 5e-4, 64)]
    rows = [
        {"start": start, "optimizer": "adam", "lr": lr, "d_sae": d_sae, "n_train": 1000}
        | {"dead_share": 0.1 * place, "fvu": 0.01 * place}
        for place, (start, lr, d_sae) in enumerate(arms)
    ]
    none = " | not run | not run |"
    table = publish["wide_table"]({"rows": rows[4:]}, {"rows": rows[:4]})
    assert table.splitlines()[2:] == [
        "| 8 | 1,000 | Adam | 0.0005 | 30.00 % dead, FVU 0.0300 | 20.00 % dead, FVU 0.0200" + none,
        "| 8 | 1,000 | Adam | 0.002 | 0.00 % dead, FVU 0.0000 | 10.00 % dead, FVU 0.0100" + none,
        "| 4,096 | 1,000 | Adam | 0.0005 | not run | 40.00 % dead, FVU 0.0400 | not run "
        "| 50.00 % dead, FVU 0.0500 |",
    ]
