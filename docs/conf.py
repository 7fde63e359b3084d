"""The book: the notebooks as they are committed, the README and the pages in docs/, as a site.

    make book

`sphinx-build` reads this file. Nothing is run, and no page asks another host for anything.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ABOUT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = _ABOUT["urls"]["Repository"].rstrip("/")

project = _ABOUT["name"]
release = _ABOUT["version"]
author = copyright = "saesub"
extensions = ["myst_nb", "mathml"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "docs/*.md", "docs/findings/*.md"]
include_patterns += ["notebooks/[0-9]*.ipynb"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline"]
html_theme = "furo"
html_title = "saesub"
html_theme_options = {"source_repository": f"{REPOSITORY}/", "source_branch": "main"}
html_copy_source = False
html_math_renderer = "mathml"

_CONTENTS = """

```{toctree}
:hidden:
:caption: Notebooks
:glob:

notebooks/*
```

```{toctree}
:hidden:
:caption: Pages
:glob:

docs/*
CONTRIBUTING
```
"""
# What the repository holds and the book does not: its files are shown by the code host.
_ELSEWHERE = re.compile(
    r"(?<!!)(\[[^\]]*\])\((?:\.\./)?((?:saesub|tests|data|benchmarks|notebooks/studies)\b[^)\s]*)\)"
)
_BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]")


def _for_the_book(app: Any, docname: str, source: list[str]) -> None:
    """Links that lead out of the book go to the repository; a badge becomes a plain link."""
    where = f"{REPOSITORY}/blob/main/"
    text = _ELSEWHERE.sub(lambda found: f"{found[1]}({where}{found[2]})", source[0])
    source[0] = _BADGE.sub("[Open in Colab]", text)
    if docname == root_doc:
        source[0] += _CONTENTS


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _for_the_book)
