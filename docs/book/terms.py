"""A term's definition on hover: where a page first uses a term, it links to docs/terms.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes

_PAGE = "docs/terms"
_SECTION = re.compile(r"^### (.+)\n\n(.+)$", re.MULTILINE)
# Too common as plain words, or as letters, to be linked wherever they stand.
_UNLINKED = {"k", "z", "offset", "refit"}
_LEFT = (nodes.reference, nodes.literal, nodes.title, nodes.math, nodes.image, nodes.raw)


def definitions() -> dict[str, str]:
    """Every term with its definition, in plain text."""
    text = (Path(__file__).parent.parent / "terms.md").read_text(encoding="utf-8")
    return {term: said.replace("`", "") for term, said in _SECTION.findall(text)}


def _link(app: Any, tree: nodes.document, page: str) -> None:
    """Links the first use of each term in the page's paragraphs."""
    if page == _PAGE:
        return
    left = {t: d for t, d in definitions().items() if t not in _UNLINKED}
    target = app.builder.get_relative_uri(page, _PAGE)
    for paragraph in list(tree.findall(nodes.paragraph)):
        for text in list(paragraph.findall(nodes.Text)):
            if not _inside(text, _LEFT):
                _replace(text, left, target)


def _inside(node: nodes.Node, kinds: tuple[type, ...]) -> bool:
    while node := node.parent:
        if isinstance(node, kinds):
            return True
    return False


def _replace(text: nodes.Text, left: dict[str, str], target: str) -> None:
    """Puts links in place of the terms in `text` that are `left`, and takes these out of it."""
    parts: list[nodes.Node] = []
    rest = text.astext()
    while found := _first(rest, left):
        term = next(t for t in left if t.lower() == found[2].lower())
        uri = f"{target}#{nodes.make_id(term)}"
        link = nodes.reference("", found[1], refuri=uri, internal=True, reftitle=left.pop(term))
        link["classes"].append("term")
        parts += [nodes.Text(rest[: found.start()]), link]
        rest = rest[found.end() :]
    if parts:
        text.parent.replace(text, [*parts, nodes.Text(rest)])


def _first(text: str, left: dict[str, str]) -> re.Match | None:
    if not left:
        return None
    longest_first = sorted(left, key=len, reverse=True)
    names = "|".join(re.escape(term) for term in longest_first)
    return re.search(rf"(?<![\w-])(({names})s?)(?![\w-]| initiali)", text, re.IGNORECASE)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("doctree-resolved", _link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
