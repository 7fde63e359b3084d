"""The figures: a finding's page shows its own, and every figure of a notebook has a text for those
who do not see it. `make figures` has drawn them and says what each shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util import logging

DRAWN = Path(__file__).resolve().parents[2] / "build" / "figures"
_log = logging.getLogger(__name__)
_NAMED = re.compile(r"<!-- figure (\S+) -->")


def about() -> dict[str, str]:
    """What each figure shows, by its name; empty before `make figures`."""
    file = DRAWN / "about.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _show(app: Any, page: str, source: list[str]) -> None:
    """Puts figures in place of the comments that name them."""
    told = about()

    def image(found: re.Match) -> str:
        if found[1] in told:
            return f"![{told[found[1]]}](/build/figures/{found[1]}.png)"
        _log.warning("figure %s is not drawn: run `make figures`", found[1], location=page)
        return ""

    source[0] = _NAMED.sub(image, source[0])


def _describe(app: Any, tree: nodes.document, page: str) -> None:
    """Gives the figures of a notebook their texts, in their order."""
    if not page.startswith("notebooks/"):
        return
    name, told = page.removeprefix("notebooks/"), about()
    for number, image in enumerate(tree.findall(nodes.image), 1):
        image["alt"] = told.get(f"{name}-{number}", f"Figure {number} of this notebook")


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", _show)
    app.connect("doctree-resolved", _describe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
