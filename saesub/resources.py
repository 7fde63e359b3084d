"""Where the files that ship with saesub lie: in the repository's `data/`, or inside the wheel."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

import platformdirs

_PACKAGE = Path(__file__).resolve().parent
_IN_WHEEL = _PACKAGE / "_data"


def data_file(name: str) -> Path:
    """Path of a file of `data/` (`registry.toml`, `paper_claims.csv`)."""
    return (_IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent / "data") / name


def notebooks_dir() -> Path:
    """The folder of the numbered notebooks."""
    return (_IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent) / "notebooks"


def cache_dir() -> Path:
    """Fetched models and corpora: `$SAESUB_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("SAESUB_CACHE") or platformdirs.user_cache_dir("saesub"))


@cache
def source_digest() -> str:
    """A hash of saesub's own code: a kept result of other code is not the same result."""
    digest = hashlib.sha256()
    for path in sorted([*_PACKAGE.glob("*.py"), *_PACKAGE.glob("*.cpp")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
