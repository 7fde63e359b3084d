"""The one cache of activations and spectra: a folder for each of what decides the numbers.

`<cache>/activations/<key>` holds stores, `<cache>/spectra/<key>` totals of spectra, by hook point.
The key is a hash of the model, the text, the settings, saesub's own code and the libraries. How
many tokens were asked for is not in it: what is there grows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from saesub.errors import SaesubError
from saesub.files import write_atomically
from saesub.paths import cache_dir, library_versions, source_digest

KINDS = ("activations", "spectra")
_ABOUT, _LOCK = "about.json", ".lock"
_NAMES = ("model", "corpus", "context_size", "skip_first", "dtype")  # what a reader wants to know


def cached_folder(kind: str, settings: Mapping[str, str], whole_text: str) -> Path:
    """The folder in the cache for results of these settings and of the corpus with this hash.

    Raises SaesubError for a model with hooks or code of the user's, which no key tells apart.
    """
    if (hooks := settings["hooks"]) != "none":
        raise SaesubError(
            f"the model has hooks or code of your own, in {hooks}, and the cache cannot tell what "
            "they do: remove them, merge adapters into the weights, or name a folder or "
            "checkpoint of your own"
        )
    deciding = {k: v for k, v in settings.items() if k not in ("model", "corpus")}
    code = source_digest("activations/", "loading/models.py")
    parts = json.dumps([deciding, whole_text, code, library_versions()], sort_keys=True)
    folder = cache_dir() / kind / hashlib.sha256(parts.encode()).hexdigest()[:32]
    if not (folder / _ABOUT).exists():
        about = {key: settings[key] for key in _NAMES if key in settings}
        with suppress(OSError):  # whoever writes results there will say so
            write_atomically(folder / _ABOUT, json.dumps(about))
    return folder


@dataclass(frozen=True)
class Kept:
    """One folder of the cache: its kind, what it is of, and its size in bytes."""

    folder: Path
    kind: str
    about: dict[str, str]
    n_bytes: int

    def __str__(self) -> str:
        about = ", ".join(f"{key} {value}" for key, value in self.about.items())
        return f"{self.n_bytes / 1e6:,.1f} MB of {self.kind}: {about or 'not known of what'}"


def kept() -> list[Kept]:
    """What the cache holds of activations and spectra, the largest first."""
    found = []
    for kind in KINDS:
        for folder in sorted(path for path in (cache_dir() / kind).glob("*") if path.is_dir()):
            size, about = 0, {}
            for file in _files(folder):
                with suppress(FileNotFoundError):  # removed or renamed meanwhile
                    size += file.stat().st_size
            with suppress(OSError, ValueError):
                about = json.loads((folder / _ABOUT).read_bytes())
            if size:
                found.append(Kept(folder, kind, about, size))
    return sorted(found, key=lambda one: -one.n_bytes)


def clear() -> tuple[list[Kept], list[Kept]]:
    """Empty the cache of activations and spectra; what was removed, and what was left because a
    process writes there. Who reads a store goes on reading it.

    Raises OSError where a file cannot be removed.
    """
    removed, left = [], []
    for one in kept():
        try:
            with FileLock(one.folder / _LOCK, timeout=0):
                for file in _files(one.folder):
                    file.unlink(missing_ok=True)
            removed.append(one)
        except Timeout:
            left.append(one)
    return removed, left


def free_bytes() -> int:
    """Free bytes on the disk of the cache."""
    place = cache_dir()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _files(folder: Path) -> list[Path]:
    """But for the lock, which others may wait for."""
    return [path for path in folder.iterdir() if path.is_file() and path.name != _LOCK]
