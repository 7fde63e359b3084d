"""The packaged corpora's formats: from fetched files to documents."""

from __future__ import annotations

import ast
import gzip
import html
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_MIN_CHARS = 300
_CONTROL = dict.fromkeys([*(c for c in range(32) if chr(c) not in "\t\n\r"), 127])


def clean(text: str) -> str:
    """Without control characters, and with anything that is not Unicode text replaced."""
    return text.translate(_CONTROL).encode("utf-8", errors="replace").decode()


def documents(parser: str, source: Path) -> list[str]:
    """The documents of a fetched folder, stripped, each once and none empty."""
    texts = (clean(text).strip() for text in PARSERS[parser](source))
    return list(dict.fromkeys(text for text in texts if text))


def decode(data: bytes) -> str:
    return data.decode("utf-8-sig", errors="replace")


def _members(wheel: Path, pattern: str) -> Iterator[bytes]:
    """The members whose whole name matches, in sorted order."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if re.fullmatch(pattern, name):
                yield archive.read(name)


def _wiki(folder: Path) -> Iterator[str]:
    for article in json.loads((folder / "summaries.json").read_bytes()).values():
        yield article["extract"]


def _recipes(folder: Path) -> Iterator[str]:
    for recipe in json.loads((folder / "recipes.json").read_bytes()).values():
        if recipe["steps"]:
            yield "\n".join([recipe["title"], *recipe["steps"]])


def _licences(folder: Path) -> Iterator[str]:
    """Licence texts without their YAML front matter; the collection's 35,000 rules are excerpts."""
    for data in _members(folder / "licensedcode.whl", r"licensedcode/data/licenses/.*\.LICENSE"):
        text = re.sub(r"\A---\n.*?\n---(\n|\Z)", "", decode(data), flags=re.DOTALL)
        if len(text) > _MIN_CHARS:
            yield text


def _botocore(folder: Path) -> Iterator[str]:
    pattern = r"botocore/data/[^/]+/[^/]+/service-2\.json\.gz"
    for data in _members(folder / "botocore.whl", pattern):
        for markup in _documentation(json.loads(gzip.decompress(data))):
            text = _without_tags(markup)
            if len(text) > _MIN_CHARS:
                yield text


def _documentation(node: Any) -> Iterator[str]:
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in children:
        if key == "documentation" and isinstance(child, str):
            yield child
        elif isinstance(child, (dict, list)):
            yield from _documentation(child)


def _without_tags(markup: str) -> str:
    broken = re.sub(r"</(p|li|dt|dd|note|h\d)>|<br ?/?>", "\n", markup)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", "", broken))
    return "\n".join(line for raw in text.split("\n") if (line := " ".join(raw.split())))


def _docstrings(folder: Path) -> Iterator[str]:
    for wheel in sorted(folder.glob("*.whl")):
        for data in _members(wheel, r"(?!.*/tests?/).*\.py"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(data)
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = ast.get_docstring(node) or ""
                    if len(text) > _MIN_CHARS:
                        yield text


def _stdlib(folder: Path) -> Iterator[str]:
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    for path in sorted(folder.rglob("*.py")):
        if not left_out & set(path.relative_to(folder).parts):
            yield decode(path.read_bytes())


PARSERS: dict[str, Callable[[Path], Iterator[str]]] = {
    "wiki": _wiki,
    "recipes": _recipes,
    "licences": _licences,
    "botocore": _botocore,
    "docstrings": _docstrings,
    "stdlib": _stdlib,
}
