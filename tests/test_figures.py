"""What is kept of the notebooks' figures is what the notebooks show."""

from __future__ import annotations

import json
import runpy
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from saesub.errors import SaesubError
from saesub.reproduce import claims, claims_table, runner

ROOT = Path(__file__).resolve().parent.parent
figures = runpy.run_path(str(ROOT / "notebooks" / "figures.py"))
matplotlib.use("Agg")
DRAWS = """from saesub.reproduce import plots
plots.singular_values({"W": [3.0, 2.0, 1.0]})"""
KEPT = sorted(figures["KEPT"].glob("*.jsonl"))


def _shown(name: str) -> list[np.ndarray]:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    outputs = [out for c in notebook.cells if c.cell_type == "code" for out in c.outputs]
    pngs = [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    return [_pixels(BytesIO(b64decode(png))) for png in pngs]


def _pixels(png) -> np.ndarray:
    return np.asarray(Image.open(png).convert("RGB")).astype(int)


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: kept.stem)
def test_a_notebooks_figures_are_drawn_again_as_it_shows_them(kept, tmp_path):
    drawn = []
    for figure in figures["of_notebook"](kept):
        figures["saved"](figure, tmp_path / "figure.png")
        drawn.append(_pixels(tmp_path / "figure.png"))
    shown = _shown(kept.stem)
    assert [image.shape for image in drawn] == [image.shape for image in shown]
    for one, other in zip(drawn, shown, strict=True):
        assert abs(one - other).mean() < 2  # of 255: the notebooks' have 256 colours


def test_a_notebooks_table_of_claims_is_replaced(tmp_path):
    row = claims.compare([claims.Measurement("F1.attn_rank", 0.5)], "01").rows
    old = new_output("display_data", {"text/html": "<table class='saesub-claims'>old</table>"})
    other = new_output("display_data", {"text/html": "<table>another</table>"})
    cells = [new_code_cell("1", outputs=[old, other])]
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    (tmp_path / "kept.jsonl").write_text("")
    text = figures["with_new_look"](tmp_path / "kept.jsonl", tmp_path / "a.ipynb", row)
    (cell,) = nbformat.reads(text, as_version=4).cells
    table, another = (out.data["text/html"] for out in cell.outputs)
    assert table == claims_table.ClaimsTable(row)._repr_html_()
    assert another == "<table>another</table>"
    nbformat.write(new_notebook(cells=[*cells, *cells]), tmp_path / "a.ipynb")
    with pytest.raises(SaesubError, match="2 tables of claims"):
        figures["with_new_look"](tmp_path / "kept.jsonl", tmp_path / "a.ipynb", row)


def test_a_notebooks_figures_are_replaced_in_their_order(tmp_path):
    lines = [
        json.dumps({"figure": "singular_values", "title": title, "note": "", "arguments": {
            "mapping": {"curves": {"mapping": {"W": {"array": values}}}}}})
        for title, values in (("one", [2.0, 1.0]), ("two", [3.0, 1.0]))
    ]  # fmt: skip
    (tmp_path / "kept.jsonl").write_text("\n".join(lines))
    blank = BytesIO()
    Image.new("RGB", (9, 9)).save(blank, "PNG")
    data = {"image/png": b64encode(blank.getvalue()).decode()}
    outputs = [new_output("display_data", data) for _ in lines]
    cells = [new_code_cell("1", outputs=[new_output("stream", text="a"), out]) for out in outputs]
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    text = figures["with_new_look"](tmp_path / "kept.jsonl", tmp_path / "a.ipynb", [])
    shown = nbformat.reads(text, as_version=4).cells
    for cell, figure in zip(shown, figures["of_notebook"](tmp_path / "kept.jsonl"), strict=True):
        assert cell.outputs[0].text == "a"
        figures["saved"](figure, tmp_path / "figure.png")
        one = _pixels(BytesIO(b64decode(cell.outputs[1].data["image/png"])))
        assert abs(one - _pixels(tmp_path / "figure.png")).mean() < 2
    (tmp_path / "kept.jsonl").write_text(lines[0])
    with pytest.raises(SaesubError, match="shows 2 figures, of which 1 are kept"):
        figures["with_new_look"](tmp_path / "kept.jsonl", tmp_path / "a.ipynb", [])


@pytest.mark.slow
def test_a_run_keeps_its_own_figures_and_no_older_ones(tmp_path, monkeypatch):
    parameters = new_code_cell('PROFILE = "quick"', metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell("# a notebook"), parameters, new_code_cell(DRAWS)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "00_draws.ipynb")
    nbformat.write(new_notebook(cells=cells[:2]), tmp_path / "01_none.ipynb")
    monkeypatch.setattr(runner, "notebooks_dir", lambda: tmp_path)
    for _ in range(2):
        ran = runner.reproduce("smoke", results=tmp_path, again=True, quiet=True)
        assert not [outcome.error for outcome in ran if outcome.error]
    (kept,) = (tmp_path / "smoke" / "figures").iterdir()
    assert kept.name == "00_draws.jsonl"
    (figure,) = figures["of_notebook"](kept)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [3.0, 2.0, 1.0]
