"""Write each notebook's Colab badge, its links to the next ones and its install cell.

    python notebooks/links.py

All of it follows from `pyproject.toml` (where the repository is) and from the notebooks' names and
titles, so a new address or a new notebook needs no more than another run. Nothing else in a
notebook is touched.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import nbformat

from saesub.files import write_atomically

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
_MARK = re.compile(r"\n*<!-- links -->.*<!-- /links -->\n*", re.DOTALL)
_BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"
_INSTALL = """import importlib.util
if importlib.util.find_spec("saesub") is None:  # on Colab; torch is left as it is
    %pip install -q "saesub[notebooks] @ git+{repository}\""""


def repository() -> str:
    """The repository's address, from the one place where it stands."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].rstrip("/")


def written(path: Path, paths: Sequence[Path], address: str) -> str:
    """The text of the notebook at `path`, one of `paths` in order, with links and install cell."""
    notebook = nbformat.read(path, as_version=4)
    first, install = notebook.cells[:2]
    title, _, body = _MARK.sub("\n\n", first.source).partition("\n")
    first.source = "\n\n".join([title, _links(path, paths, address), body.strip()])
    assert "pip install" in install.source, f"the second cell of {path.name} installs saesub"
    install.source = _INSTALL.format(repository=address)
    return nbformat.writes(notebook) + "\n"


def _links(path: Path, paths: Sequence[Path], address: str) -> str:
    where = urlsplit(address)
    if where.netloc != "github.com":
        raise SystemExit(f"Colab opens notebooks from GitHub only, not from {address}")
    badge = _BADGE.format(
        url=f"https://colab.research.google.com/github{where.path}/blob/main/notebooks/{path.name}"
    )
    place = list(paths).index(path)
    before = [f"← [{_title(p)}]({p.name})" for p in paths[max(place - 1, 0) : place]]
    after = [f"[{_title(p)}]({p.name}) →" for p in paths[place + 1 : place + 2]]
    lines = ["<!-- links -->", badge, "", " · ".join(before + after), "<!-- /links -->"]
    return "\n".join(lines)


def _title(path: Path) -> str:
    first = nbformat.read(path, as_version=4).cells[0]
    return first.source.splitlines()[0].removeprefix("# ")


if __name__ == "__main__":
    notebooks = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    texts = {path: written(path, notebooks, repository()) for path in notebooks}
    for path, text in texts.items():
        write_atomically(path, text)
