"""The figures: a finding's page shows its own, and every figure of a notebook has a text for those
who do not see it. `make figures` has drawn them and says what each shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes

DRAWN = Path(__file__).resolve().parents[2] / "build" / "figures"
_NAMED = re.compile(r"<!-- figure (\S+) -->")


def about() -> dict[str, str]:
    """What each figure shows, by its name; empty before `make figures`."""
    file = DRAWN / "about.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _show(app: Any, page: str, source: list[str]) -> None:
    """Puts figures in place of the comments that name them."""
    told = about()
    source[0] = _NAMED.sub(
        lambda found: (
            f"![{told[found[1]]}](/build/figures/{found[1]}.png)" if found[1] in told else ""
        ),
        source[0],
    )


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
