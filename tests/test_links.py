"""The notebooks' badges, navigation and install cells are what `notebooks/links.py` writes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
links = runpy.run_path(str(ROOT / "notebooks" / "links.py"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_links_and_install_cell_are_up_to_date(path):
    expected = links["written"](path, NOTEBOOKS, links["repository"]())
    assert path.read_text(encoding="utf-8") == expected, "run `python notebooks/links.py`"


@each_notebook
def test_every_relative_link_leads_to_a_notebook(path):
    first = nbformat.read(path, as_version=4).cells[0].source
    targets = re.findall(r"\]\((\w+\.ipynb)\)", first)
    assert 1 <= len(targets) <= 2
    assert all((path.parent / target).is_file() for target in targets)
    assert first.count(f"/blob/main/notebooks/{path.name})") == 1


def test_a_new_address_reaches_badge_and_install_line_and_leaves_the_rest():
    path = NOTEBOOKS[1]
    moved = nbformat.reads(links["written"](path, NOTEBOOKS, "https://github.com/a/b"), 4)
    first, install = moved.cells[:2]
    assert "colab.research.google.com/github/a/b/blob/main/notebooks/01_" in first.source
    assert '"saesub[notebooks] @ git+https://github.com/a/b"' in install.source
    assert links["repository"]() not in first.source + install.source
    assert moved.cells[2:] == nbformat.read(path, as_version=4).cells[2:]


def test_the_repositorys_address_stands_in_one_place():
    """Elsewhere it is generated: in the notebooks, and in the README's first commands."""
    texts = [*ROOT.glob("*.*"), *ROOT.glob("saesub/**/*.py"), *ROOT.glob("notebooks/*.py")]
    named = [p.name for p in texts if p.is_file() and links["repository"]() in p.read_text("utf-8")]
    assert sorted(named) == ["CITATION.cff", "README.md", "pyproject.toml"]
    readme = (ROOT / "README.md").read_text("utf-8")
    generated = readme.split("<!-- run -->")[1].split("<!-- /run -->")[0]
    assert readme.count(links["repository"]()) == generated.count(links["repository"]()) == 1
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["repository-code"] == links["repository"]()


def test_colab_cannot_open_a_repository_elsewhere():
    with pytest.raises(SystemExit, match="GitHub only"):
        links["written"](NOTEBOOKS[0], NOTEBOOKS, "https://example.org/a/b")
