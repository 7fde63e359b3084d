"""What the theme leaves out for readers who use a keyboard or a screen reader."""

from __future__ import annotations

from typing import Any

_AFTER_THE_THEME = 900
# Whatever scrolls sideways can be reached by the keyboard; a heading of the menu has a level.
_BODY = {
    "<pre>": '<pre tabindex="0">',
    '<div class="table-wrapper': '<div tabindex="0" class="table-wrapper',
    '<div class="output text_html">': '<div class="output text_html" tabindex="0">',
    "<div style='overflow-x:auto'>": "<div style='overflow-x:auto' tabindex='0'>",
}
_MENU = {'role="heading">': 'role="heading" aria-level="2">'}


def _amend(app: Any, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    for key, changes in (("body", _BODY), ("furo_navigation_tree", _MENU)):
        for old, new in changes.items():
            context[key] = (context.get(key) or "").replace(old, new)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("html-page-context", _amend, priority=_AFTER_THE_THEME)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
