"""What a person sees: notebooks run in JupyterLab, and the report at the width of a phone.

`SAESUB_TEST_PICTURES=folder pytest tests/test_browser.py` leaves pictures there to look at.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import browser
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from saesub.reproduce import claims
from saesub.reproduce.report import Outcome, report_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not browser.chromium(), reason="no chromium on the path: apt-get install chromium"
    ),
    pytest.mark.skipif(
        not importlib.util.find_spec("playwright"), reason="no playwright: pip install '.[dev]'"
    ),
]
ROOT = Path(__file__).resolve().parent.parent
RECORD = json.loads((ROOT / "data" / "results" / "full" / "run.json").read_text())
NAMES = ("00_tour", "05_active_subspace_init")
RAW_WIDGETS = ("HBox(", "FloatProgress(", "IntProgress(", "VBox(")  # what a widget is as text
PHONE, DESKTOP = 390, 1280


@dataclass
class Lab:
    """JupyterLab at `address`, which serves `folder`; `page` is its tab in the browser."""

    address: str
    folder: Path
    page: browser.Any

    def run(self, name: str) -> dict:
        """Runs a notebook by the menu and returns what its outputs show."""
        browser.run_all(self.page, self.address, f"{name}.ipynb", seconds=300)
        return browser.shown(self.page, ".jp-Notebook")


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Any]:
    with browser.browser() as started:
        yield started


@pytest.fixture(scope="module")
def lab(chromium, installed, tmp_path_factory) -> Iterator[Lab]:
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("home")
    # One thread: kernels that share two cores with a browser only get in their own way.
    env = {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    env["SAESUB_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # empty: bars show what is read
    with browser.jupyter_lab(folder, home, **env) as address:
        yield Lab(address, folder, chromium.new_page(viewport={"width": DESKTOP, "height": 900}))


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = Path(os.environ.get("SAESUB_TEST_PICTURES", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_run_by_hand_shows_its_figures_bars_and_claims(lab, pictures, name):
    source = ROOT / "notebooks" / f"{name}.ipynb"
    browser.with_profile(source, lab.folder / source.name, "smoke")
    shown = lab.run(name)
    browser.picture(lab.page, pictures / f"{name}.png")
    browser.save(lab.page)
    assert shown["errors"] == []
    cells = nbformat.read(source, as_version=4).cells
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    figures = sum("image/png" in out.get("data", {}) for out in outputs)
    assert len(shown["figures"]) == figures > 0
    assert min(shown["figures"]) > 0
    assert len(shown["bars"]) > 0
    assert min(shown["bars"]) > 0
    assert not [text for text in RAW_WIDGETS if text in shown["text"]]
    assert shown["claims"] == [len(RECORD[name]["claims"])]
    assert RECORD[name]["claims"][0]["claim"] in shown["text"]


def test_what_is_broken_is_seen(lab):
    """The check above fails where it should."""
    sources = [
        "from IPython.display import HTML, display\n"
        "HTML('<img src=\"data:image/png;base64,AAAA\">')",
        "display({'text/plain': 'HBox(children=(FloatProgress(value=0.0), ))'}, raw=True)",
        "1 / 0",
    ]
    cells = [new_code_cell(source) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), lab.folder / "broken.ipynb")
    shown = lab.run("broken")
    assert len(shown["errors"]) == 1
    assert "ZeroDivisionError" in shown["errors"][0]
    assert shown["figures"] == [0]
    assert "HBox(" in shown["text"]
    assert shown["bars"] == shown["claims"] == []


def _report(notebooks: Path, path: Path) -> Path:
    """The report of the notebooks in a folder, with the committed record's claims."""
    names = [p.stem for p in sorted(notebooks.glob("[0-9]*.ipynb"))]
    runs = [Outcome(name, "", RECORD[name]["seconds"]) for name in names]
    rows = [row for recorded in RECORD.values() for row in recorded["claims"]]
    path.write_text(report_page(notebooks, "full", claims.scorecard(rows), runs), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_report_fits_its_window_and_needs_nothing_else(chromium, pictures, tmp_path, width):
    report = _report(ROOT / "notebooks", tmp_path / "report.html")
    page = chromium.new_page(viewport={"width": width, "height": 900})
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(report.as_uri())
    browser.picture(page, pictures / f"report-{width}.png")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    assert wrong == []
    shown = browser.shown(page)
    assert min(shown["figures"]) > 0
    assert len(shown["claims"]) == 1 + len(RECORD)
    page.close()


def test_the_report_of_a_run_in_jupyterlab_has_no_trace_of_its_widgets(lab, chromium, tmp_path):
    if not list(lab.folder.glob("[0-9]*.ipynb")):
        pytest.skip("no notebook has been run by hand: run the whole file")
    saved = "".join(p.read_text() for p in lab.folder.glob("[0-9]*.ipynb"))
    assert "application/vnd.jupyter.widget-view+json" in saved
    report = _report(lab.folder, tmp_path / "report.html")
    assert "widget" not in report.read_text()
    page = chromium.new_page(viewport={"width": PHONE, "height": 900})
    page.goto(report.as_uri())
    text = browser.shown(page)["text"]
    assert not [raw for raw in RAW_WIDGETS if raw in text]
    page.close()
