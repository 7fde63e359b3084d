"""The files of a store: numbers to which rows are only ever added, and the record of what they are.

A store on disk is `<hook>.bin`, the numbers in float16 or float32, and `<hook>.json`. The record
vouches for the first rows of the file alone. So a reader and a kill find the old rows whole while
more are written.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from torch import Tensor

from saesub.activations.checks import all_finite, require_finite
from saesub.errors import SaesubError
from saesub.files import sha256_of, write_atomically

DTYPES = {torch.float16: np.dtype("<f2"), torch.float32: np.dtype("<f4")}
_ROUNDING = 1e-2  # of a block, relative; ten times that of float16 within its range


class ReadSoFar(NamedTuple):
    """How far a pass has read its text.

    Attributes:
        n_contexts: contexts that are done.
        text: the number of documents read, and a hash of them.
        epochs: how often the corpus's documents were read.
    """

    n_contexts: int
    text: dict[str, str]
    epochs: float


@dataclass(frozen=True)
class Record:
    """What the files of a store hold.

    Attributes:
        file: name of the file of numbers.
        settings: what decides the numbers, but for how many there are.
        n_rows: rows that are safely there, of `n_contexts` whole contexts and the text `text`.
        sha256: of these rows.
        mtime_ns: the file's time when they were written.
        parts: by how many rows a call asked for, the checksum, text and epochs of so many.
    """

    file: str
    d_in: int
    dtype: str
    settings: dict[str, str]
    n_rows: int
    n_contexts: int
    text: dict[str, str]
    sha256: str
    mtime_ns: int
    parts: dict[str, dict[str, Any]]

    def size(self, n_rows: int) -> int:
        """Bytes of so many rows."""
        return n_rows * self.d_in * np.dtype(self.dtype).itemsize


def store_files(folder: str | Path, hook_name: str) -> tuple[Path, Path]:
    """The numbers, and the record of what they are."""
    return Path(folder) / f"{hook_name}.bin", Path(folder) / f"{hook_name}.json"


def lock_of(folder: Path) -> FileLock:
    """The lock of those who write to a folder; who holds it may take it again."""
    return FileLock(folder / ".lock", is_singleton=True)


def held(folder: str | Path, hook_name: str) -> Record:
    """The record of a store whose numbers are as it says. Their checksum is computed if the file's
    time has changed.

    Raises SaesubError if the store is missing, truncated or damaged.
    """
    data, path = store_files(folder, hook_name)
    again = "delete it and harvest this hook point again"
    if not path.is_file() or not data.is_file():
        raise SaesubError(f"no finished store of {hook_name} in {folder}: harvest it first")
    record = _read(path)
    if record is None or record.file != data.name:
        raise SaesubError(f"{path} is damaged, or of another hook point: {again}")
    found, expected = data.stat(), record.size(record.n_rows)
    if found.st_size < expected:
        raise SaesubError(f"{data} is truncated ({found.st_size} bytes of {expected}): {again}")
    if found.st_mtime_ns != record.mtime_ns:
        if sha256_of(data, expected).hexdigest() != record.sha256:
            raise SaesubError(f"{data} is damaged, its checksum does not match: {again}")
        _amend(path, record, mtime_ns=found.st_mtime_ns)
    return record


def with_part(folder: str | Path, hook_name: str, n_tokens: int, read: ReadSoFar) -> Record:
    """The record of a store that has `n_tokens` rows or more, with the part of so many among its
    parts; it is written where the folder can be."""
    data, path = store_files(folder, hook_name)
    record = held(folder, hook_name)
    whole = n_tokens == record.n_rows
    sha256 = record.sha256 if whole else sha256_of(data, record.size(n_tokens)).hexdigest()
    part = {"sha256": sha256, "text": read.text, "epochs": read.epochs}
    parts = record.parts | {str(n_tokens): part}
    _amend(path, record, parts=parts)
    return replace(record, parts=parts)


def _amend(path: Path, record: Record, **changes: Any) -> None:
    """Write the record with these changes, if no other process has changed it or is about to, and
    the folder can be written."""
    with suppress(OSError, Timeout), lock_of(path.parent).acquire(timeout=0):
        if _read(path) == record:
            _write(path, replace(record, **changes))


class StoreWriter:
    """Adds rows to a store, of which `record` says what is there, or begins it anew without one.

    A context manager. If it ends before `keep`, the store is as it was before; a store of which
    `write` refused a value, and no part was asked for before, is removed.
    """

    def __init__(
        self,
        folder: Path,
        hook_name: str,
        dtype: torch.dtype,
        settings: dict[str, str],
        record: Record | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise SaesubError(
                f"a store holds torch.float16 or torch.float32, not {dtype}: pass one of these"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._hook_name, self._dtype = folder, hook_name, dtype
        self._settings, self._refused = settings, False
        self._data, self._path = store_files(folder, hook_name)
        self._record, self._digest = record, hashlib.sha256()
        if record is not None:  # its file's time says that the numbers are good: they may not be
            self._digest = sha256_of(self._data, record.size(record.n_rows))
            self._record = record if self._digest.hexdigest() == record.sha256 else None
        if self._record is None:
            self._path.unlink(missing_ok=True)
            self._data.unlink(missing_ok=True)  # another process may still read the old file
            self._file, self._digest = self._data.open("wb"), hashlib.sha256()
        else:
            self._file = self._data.open("r+b")
            self._file.truncate(self._record.size(self._record.n_rows))
            self._file.seek(0, os.SEEK_END)
        self.n_rows, self.n_contexts = 0, 0
        if self._record is not None:
            self.n_rows, self.n_contexts = self._record.n_rows, self._record.n_contexts
        self._d = 0 if self._record is None else self._record.d_in

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        with suppress(OSError):  # a full disk did not take the last rows
            self._file.close()
        if self._record is None or (self._refused and not self._record.parts):
            self._path.unlink(missing_ok=True)
            self._data.unlink(missing_ok=True)

    def missing_bytes(self, n_tokens: int) -> int:
        """Bytes that so many rows need yet, or 0 before the first row."""
        return max(0, n_tokens - self.n_rows) * self._d * DTYPES[self._dtype].itemsize

    def write(self, x: Float[Tensor, "n d"]) -> None:
        """Append rows. Raises SaesubError for NaN, or values beyond or below the dtype's range;
        OSError if the disk fills up."""
        stored = x.to(self._dtype)
        if not all_finite(stored):
            self._refused = True
            require_finite(x)
            raise SaesubError(f"values beyond {self._dtype}'s range: pass dtype=torch.float32")
        if (stored.float() - x).norm() > _ROUNDING * x.float().norm():  # in float16, below 1e-7
            self._refused = True
            raise SaesubError(f"values too small for {self._dtype}: pass dtype=torch.float32")
        numbers = stored.cpu().numpy().astype(DTYPES[self._dtype], copy=False).tobytes()
        self._file.write(numbers)
        self._digest.update(numbers)
        self._d, self.n_rows = x.shape[1], self.n_rows + len(x)

    def keep(self, read: ReadSoFar) -> None:
        """Make the rows written so far, all of the text that was read, survive this process."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.n_contexts = read.n_contexts
        self._record = Record(
            file=self._data.name,
            d_in=self._d,
            dtype=DTYPES[self._dtype].str,
            settings=self._settings,
            n_rows=self.n_rows,
            n_contexts=read.n_contexts,
            text=read.text,
            sha256=self._digest.hexdigest(),
            mtime_ns=os.fstat(self._file.fileno()).st_mtime_ns,
            parts={} if self._record is None else self._record.parts,
        )
        _write(self._path, self._record)

    def finish(self, n_tokens: int, read: ReadSoFar) -> None:
        """Keep the rows, and say that the first `n_tokens` of them were asked for."""
        if self._record is None or self._record.n_rows < self.n_rows:
            self.keep(read)
        with_part(self._folder, self._hook_name, n_tokens, read)


def _write(path: Path, record: Record) -> None:
    about = asdict(record)
    write_atomically(path, json.dumps({**about, "checksum": _checksum(about)}, indent=1))


def _read(path: Path) -> Record | None:
    """What `_write` wrote, or None for a missing or damaged file."""
    try:
        about = json.loads(path.read_bytes())
        return Record(**about) if about.pop("checksum") == _checksum(about) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def refuse_another_version(folder: str | Path, hook_name: str) -> None:
    """Raises SaesubError for a store that is whole and not of this version's form, which would
    otherwise be taken for a damaged one and written again."""
    path = store_files(folder, hook_name)[1]
    try:
        about = json.loads(path.read_bytes())
        whole = about.pop("checksum") == _checksum(about) and "settings" in about
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return
    if whole and _read(path) is None:
        raise SaesubError(
            f"{path} is of a store that another version of saesub made: pass another folder, or "
            "delete that store"
        )


def _checksum(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
