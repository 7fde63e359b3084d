"""Where the files that ship with saesub lie: in the repository's `data/`, or inside the wheel."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import platformdirs
from filelock import FileLock

from saesub.errors import SaesubError

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


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder` of the cache, which `make` fills under another name: it appears only whole.

    Processes that share the cache wait for one another, and what a killed one left half made is
    thrown away. Raises SaesubError where the cache is full or cannot be written.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    with cache_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    make(partial)
                    os.replace(partial, folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk, or a cache that cannot be written, into a SaesubError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # transformers' own, about what a file holds
            raise
        raise SaesubError(
            f"the cache folder {folder} is of no use ({error.strerror or error}): make room there, "
            "or set SAESUB_CACHE to another folder."
        ) from error


@cache
def source_digest() -> str:
    """A hash of saesub's own code: a kept result of other code is not the same result."""
    digest = hashlib.sha256()
    files = {
        path.relative_to(_PACKAGE).as_posix(): path
        for pattern in ("*.py", "*.cpp")
        for path in _PACKAGE.rglob(pattern)
        if _IN_WHEEL not in path.parents  # notebooks and studies: a checkout has them elsewhere
    }
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode())
        digest.update(path.read_bytes())
        digest.update(b"\0")
    return digest.hexdigest()
