"""Finds the files that ship with saesub, and the cache folder and what is made in it once."""

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
_IN_WHEEL = _PACKAGE / "_data"  # `data/` and `notebooks/`, which a checkout has beside the package
_ROOT = _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent


def data_file(name: str) -> Path:
    """Path of a file of `data/` (`registry.toml`, `paper_claims.csv`)."""
    return _ROOT / "data" / name


def notebooks_dir() -> Path:
    """The folder of the numbered notebooks."""
    return _ROOT / "notebooks"


def cache_dir() -> Path:
    """The folder of fetched models and corpora: `$SAESUB_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("SAESUB_CACHE") or platformdirs.user_cache_dir("saesub"))


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Has `make` fill a folder of the cache, unless it is there; it appears only when complete.

    Processes that share the cache wait for one another. What a killed process left is thrown away.
    Raises SaesubError where the cache is full or cannot be written.
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
    """Raises a SaesubError where the disk is full or the cache cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # transformers' own, about what a file holds
            raise
        raise SaesubError(
            f"the cache folder {folder} cannot be used ({error.strerror or error}): make room "
            "there, or set SAESUB_CACHE to another folder."
        ) from error


@cache
def source_digest() -> str:
    """A hash of saesub's own code. Results that were kept by other code are computed again."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        if path.suffix in (".py", ".cpp") and _IN_WHEEL not in path.parents:
            digest.update(f"{path.relative_to(_PACKAGE).as_posix()}\0".encode())
            digest.update(path.read_bytes())
            digest.update(b"\0")
    return digest.hexdigest()
