"""The book: the notebooks as they are committed, the README and the pages in docs/, as a site.

    make book

`sphinx-build` reads this file. Nothing is run, and no page asks another host for anything.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.util import logging

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ABOUT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = _ABOUT["urls"]["Repository"].rstrip("/")

project = _ABOUT["name"]
release = _ABOUT["version"]
author = copyright = "saesub"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "accessible"]
extensions += ["drawn", "mathml", "terms"]
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "docs/findings/*.md",
]
include_patterns += ["notebooks/[0-9]*.ipynb"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline"]
html_theme = "furo"
default_role = "code"
html_title = "saesub"
html_theme_options = {"source_repository": f"{REPOSITORY}/", "source_branch": "main"}
html_static_path = ["static"]
html_css_files = ["book.css"]
html_copy_source = False
html_use_index = False
html_math_renderer = "mathml"

_CONTENTS = """

```{toctree}
:hidden:
:caption: Findings

docs/findings
docs/terms
```

```{toctree}
:hidden:
:caption: Notebooks
:glob:

notebooks/*
```

```{toctree}
:hidden:
:caption: On your own model

docs/initialisations
docs/recipe
docs/diagnosis
docs/architectures
docs/speed
docs/gpu
docs/several_processes
docs/eight_gpus
docs/errors
docs/faults
docs/api
docs/upstream
CONTRIBUTING
CHANGELOG
```
"""
_FINDINGS = """

```{toctree}
:hidden:

%s
```
"""
# What the repository holds and the book does not: its files are shown by the code host.
_FOLDERS = r"saesub|tests|data|benchmarks|notebooks/studies|CITATION\.cff"
_ELSEWHERE = re.compile(rf"(?<!!)(\[[^\]]*\])\((?:\.\./)*((?:{_FOLDERS})\b[^)\s]*)\)")
_log = logging.getLogger(__name__)
_BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\](\([^)]*\))")


def _api() -> str:
    """The description of every public name, by room."""
    import saesub

    lines = []
    for name in sorted(saesub.__all__, key=str.lower):
        found = getattr(saesub, name)
        kind = "autoclass" if isinstance(found, type) else "autofunction"
        lines += [f".. {kind}:: {found.__module__}.{name}"]
        lines += ["   :members:"] * (kind == "autoclass") + [""]
    return "\n\n## In full\n\n```{eval-rst}\n" + "\n".join(lines) + "\n```\n"


def _by_number(page: Path) -> tuple[bool, int]:
    """F1 to F12, then B1 to B5."""
    return page.stem[0] == "B", int(page.stem[1:])


def _for_the_book(app: Any, docname: str, source: list[str]) -> None:
    """Links that lead out of the book go to the repository. A notebook's badge becomes a plain
    link, beside one that downloads the notebook."""
    where = f"{REPOSITORY}/blob/main/"
    text = _ELSEWHERE.sub(lambda found: f"{found[1]}({where}{found[2]})", source[0])
    keep = f" · {{download}}`Download this notebook </{docname}.ipynb>`"
    if docname.startswith("notebooks/") and not _BADGE.search(text):
        _log.warning(
            "no badge, so no link to download it: run notebooks/links.py", location=docname
        )
    source[0] = _BADGE.sub(rf"[Open in Colab]\1{keep}", text)
    if docname == root_doc:
        source[0] += _CONTENTS
    if docname == "docs/api":
        source[0] += _api()
    if docname == "docs/findings":
        pages = sorted((ROOT / "docs" / "findings").glob("*.md"), key=_by_number)
        source[0] += _FINDINGS % "\n".join(f"findings/{page.stem}" for page in pages)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _for_the_book)
