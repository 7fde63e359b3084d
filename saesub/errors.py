"""The one exception a user of saesub meets, and the near-name hint its messages carry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaesubError(ValueError):
    """A mistake that the user can mend: the message says what was wrong and what to do."""


def near_names(name: str, known: Iterable[str], n: int = 3) -> str:
    """A sentence fragment listing the names closest to `name`, or all of them if none is close.

    >>> near_names("smolm2-135m", ["smollm2-135m", "gpt2"])
    "did you mean 'smollm2-135m'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known names: " + ", ".join(repr(k) for k in known[:20])
