"""Finds the files that ship with saesub, and the cache folder and what is made in it once."""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

import platformdirs
from filelock import FileLock

from saesub.errors import SaesubError

_PACKAGE = Path(__file__).resolve().parent
_DECIDING_LIBRARIES = ("torch", "sae-lens", "transformer-lens", "transformers")
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
def source_digest(*parts: str) -> str:
    """A hash of saesub's own code, or of the `parts` of it: files and, with a slash, folders.

    Results that were kept by other code are computed again. Comments, docstrings and formatting do
    not count; in a .cpp or .h file, only lines that are nothing but a comment are left out.
    """
    digest = hashlib.sha256()
    for part in parts:
        if not (_PACKAGE / part).exists():
            raise ValueError(f"saesub has no {part}")
    for path in sorted(_PACKAGE.rglob("*")):
        name = path.relative_to(_PACKAGE).as_posix()
        code = path.suffix in _CODE and _IN_WHEEL not in path.parents
        if code and name.startswith(parts or ("",)):
            text = _CODE[path.suffix](path.read_text(encoding="utf-8"))
            digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()


def data_digest() -> str:
    """A hash of what ships beside the code: the registry, the paper's claims, recorded studies."""
    digest = hashlib.sha256()
    studies = sorted((_ROOT / "data" / "results" / "studies").glob("*.json"))
    for path in (data_file("registry.toml"), data_file("paper_claims.csv"), *studies):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def library_versions() -> str:
    """The versions of the libraries that decide results beside saesub's own code."""
    return ", ".join(f"{name} {version(name)}" for name in _DECIDING_LIBRARIES)


class _WithoutTexts(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        constant = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if constant else node


def _python(text: str) -> str:
    return ast.dump(_WithoutTexts().visit(ast.parse(text)))


def _cpp(text: str) -> str:
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))


_CODE = {".py": _python, ".cpp": _cpp, ".h": _cpp}
