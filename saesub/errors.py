"""The error that tells a user what was wrong and what to do, and helpers for its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class SaesubError(ValueError):
    """A mistake that the user can correct: the message says what was wrong and what to do."""


def near_names(name: str, known: Iterable[str]) -> str:
    """A sentence fragment that lists the names closest to `name`, or all of them if none is close.

    >>> near_names("smolm2-135m", ["smollm2-135m", "gpt2"])
    "did you mean 'smollm2-135m'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(map(repr, close)) + "?"
    return "known names: " + ", ".join(map(repr, known[:20]))


@contextmanager
def needs_extra(what: str) -> Iterator[None]:
    """Imports within it are of packages that only the extra `notebooks` installs.

    Raises SaesubError where one of them is missing; `what` is the function that needs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise SaesubError(
            f"{what} needs {error.name}, which is not installed: "
            "run pip install 'saesub[notebooks]'."
        ) from error
