"""Activations of one hook point in a memory-mapped file, read back shuffled and restartable.

A store is `<hook>.bin`, the numbers in float16 or float32, and `<hook>.json`, which says what they
are. While the store is written, `<hook>.json` says how many rows are safely on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saesub.activations.checks import SameText, all_finite, differing, require_finite
from saesub.arguments import whole_number
from saesub.errors import SaesubError
from saesub.files import file_sha256, write_atomically
from saesub.loading.download import require_disk

_ROUNDING = 1e-2  # of a block, relative; ten times that of float16 within its range
_DTYPES = {torch.float16: np.dtype("<f2"), torch.float32: np.dtype("<f4")}


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """A read-only view of a store, one row a token (all of them, or one side of a `split`)."""

    hook_name: str
    settings: dict[str, str]
    epochs: float
    identity: str
    """The checksum of the numbers on disk, and which rows of them: what `rows` gives."""
    _rows: np.ndarray

    @classmethod
    def open(cls, folder: str | Path, hook_name: str) -> ActivationStore:
        """Open a finished store. Its checksum is computed if the file's time has changed.

        Raises SaesubError if it is missing, unfinished, truncated or damaged.
        """
        data, path = _files(folder, hook_name)
        again = "delete it and harvest this hook point again"
        if not path.is_file() or not data.is_file():
            raise SaesubError(f"no finished store of {hook_name} in {folder}: harvest it first")
        record = _read_record(path)
        if record is None or record.get("file") != data.name:
            raise SaesubError(f"{path} is damaged, or of another hook point: {again}")
        if "sha256" not in record:
            raise SaesubError(
                f"the store of {hook_name} in {folder} is unfinished: harvest it again, which "
                "continues where it stopped"
            )
        shape, dtype = (record["n_tokens"], record["d_in"]), np.dtype(record["dtype"])
        size, expected = data.stat().st_size, shape[0] * shape[1] * dtype.itemsize
        if size != expected:
            raise SaesubError(f"{data} is truncated ({size} bytes of {expected}): {again}")
        if data.stat().st_mtime_ns != record["mtime_ns"]:
            if file_sha256(data) != record["sha256"]:
                raise SaesubError(f"{data} is damaged, its checksum does not match: {again}")
            with suppress(OSError):  # a read-only folder: it is hashed again next time
                _write_record(path, record | {"mtime_ns": data.stat().st_mtime_ns})
        rows = np.memmap(data, dtype, mode="r", shape=shape)
        identity = f"{record['sha256']} rows 0 to {shape[0]}"
        return cls(hook_name, record["settings"], record["epochs"], identity, rows)

    def __repr__(self) -> str:
        return f"ActivationStore({self.hook_name}, {self.n_tokens:,} tokens, d_in {self.d_in})"

    @property
    def n_tokens(self) -> int:
        """Number of rows."""
        return len(self._rows)

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self._rows.shape[1]

    def rows(self, start: int, stop: int) -> Float[Tensor, "n d_in"]:
        """Rows start..stop in the order of the text, float32. Raises SaesubError beyond the end."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise SaesubError(
                f"rows {start}..{stop} are not among the stored: give start and stop within "
                f"0..{self.n_tokens}"
            )
        return torch.from_numpy(self._rows[start:stop].astype(np.float32))

    def batches(
        self, batch_size: int, *, seed: int, start_step: int = 0, stop: int | None = None
    ) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Shuffled float32 batches of steps start_step, start_step + 1, ... up to `stop`, or
        endless.

        Every epoch is a new permutation of the whole store, drawn from (seed, epoch), without its
        last incomplete batch: step s holds the same rows from wherever one starts. Raises
        SaesubError for a batch larger than the store, or a negative seed or step.
        """
        batch_size = whole_number(batch_size, "batch_size")
        if batch_size > self.n_tokens:
            raise SaesubError(f"batch_size must lie in 1..{self.n_tokens}, got {batch_size}")
        seed, start_step = whole_number(seed, "seed", 0), whole_number(start_step, "start_step", 0)
        step, drawn, order = start_step, -1, np.empty(0, np.int64)
        while stop is None or step < stop:
            epoch, at = divmod(step, self.n_tokens // batch_size)
            if epoch != drawn:
                order = np.random.default_rng([seed, epoch]).permutation(self.n_tokens)
                drawn = epoch
            # In file order, because rows of one page of the file are read together.
            chosen = np.sort(order[at * batch_size : (at + 1) * batch_size])
            yield torch.from_numpy(np.take(self._rows, chosen, axis=0)).float()
            step += 1

    def split(self, n_held_out: int) -> tuple[ActivationStore, ActivationStore]:
        """The store without its last `n_held_out` rows, and those rows.

        Warns where the corpus was read more than once, since held-out rows then repeat others.
        Raises SaesubError if either side would be empty.
        """
        n_held_out = whole_number(n_held_out, "n_held_out", 0)
        if not 1 <= n_held_out < self.n_tokens:
            raise SaesubError(f"n_held_out must lie in 1..{self.n_tokens - 1}, got {n_held_out}")
        if self.epochs > 1:
            warnings.warn(
                f"the text of this store was read {self.epochs:.3g} times, so held-out rows are "
                "not new to the others: harvest fewer tokens, or a larger corpus",
                stacklevel=2,
            )
        cut = self.n_tokens - n_held_out
        return self._part(0, cut), self._part(cut, self.n_tokens)

    def _part(self, start: int, stop: int) -> ActivationStore:
        identity = f"{self.identity}, of these {start} to {stop}"
        return replace(self, identity=identity, _rows=self._rows[start:stop])


class StoreWriter:
    """Writes one store, or continues after the first `n_kept` rows of an unfinished one.

    A context manager. If it ends before `finish`, only the rows that `keep` kept remain, and none
    once `write` refused a value, which shows that they are of no use.
    """

    def __init__(
        self, folder: Path, hook_name: str, n_tokens: int, dtype: torch.dtype, n_kept: int = 0
    ) -> None:
        if dtype not in _DTYPES:
            raise SaesubError(f"a store holds torch.float16 or torch.float32, not {dtype}")
        folder.mkdir(parents=True, exist_ok=True)
        self._n_tokens, self._dtype, self._d = n_tokens, dtype, 0
        self._refused = False
        self._data, self._path = _files(folder, hook_name)
        if n_kept == 0:
            self._path.unlink(missing_ok=True)
            self._data.unlink(missing_ok=True)  # another process may still read the old file
            self._file = self._data.open("wb")
        else:
            self._d = (_read_record(self._path) or {})["d_in"]
            self._file = self._data.open("r+b")
            self._file.truncate(n_kept * self._d * _DTYPES[dtype].itemsize)
            self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        with suppress(OSError):  # a full disk did not take the last rows
            self._file.close()
        if self._refused or not self._path.is_file():
            self._path.unlink(missing_ok=True)
            self._data.unlink(missing_ok=True)

    def write(self, x: Float[Tensor, "n d"]) -> None:
        """Append rows. Raises SaesubError for NaN, values beyond or below the dtype's range, or too
        little disk; OSError if the disk fills up."""
        dtype = _DTYPES[self._dtype]
        if not self._file.tell():
            self._d = x.shape[1]
            size = self._n_tokens * self._d * dtype.itemsize
            require_disk(self._data.parent, size, f"the store {self._data.name}")
        stored = x.to(self._dtype)
        if not all_finite(stored):
            self._refused = True
            require_finite(x)
            raise SaesubError(f"values beyond {self._dtype}'s range: pass dtype=torch.float32")
        if (stored.float() - x).norm() > _ROUNDING * x.float().norm():  # in float16, below 1e-7
            self._refused = True
            raise SaesubError(f"values too small for {self._dtype}: pass dtype=torch.float32")
        self._file.write(stored.cpu().numpy().astype(dtype, copy=False).tobytes())

    def keep(self, settings: dict[str, str], n_batches: int, n_rows: int) -> None:
        """Make the rows written so far, `n_rows` of `n_batches`, survive this process."""
        self._file.flush()
        os.fsync(self._file.fileno())
        record = {"n_batches": n_batches, "n_rows": n_rows, "d_in": self._d}
        record |= {"n_bytes": self._file.tell(), "settings": settings, "file": self._data.name}
        _write_record(self._path, record)

    def finish(self, settings: dict[str, str], epochs: float) -> None:
        """Say that the store is whole."""
        self._file.close()
        record = {
            "file": self._data.name,
            "n_tokens": self._n_tokens,
            "d_in": self._d,
            "dtype": _DTYPES[self._dtype].str,
            "settings": settings,
            "epochs": epochs,
            "sha256": file_sha256(self._data),
            "mtime_ns": self._data.stat().st_mtime_ns,
        }
        _write_record(self._path, record)


def open_or_none(
    folder: str | Path, hook_name: str, settings: dict[str, str], same_text: SameText
) -> ActivationStore | None:
    """The finished store of these settings and this text, or None if there is none or it is
    incomplete.

    Raises SaesubError if a finished store of others is in the way.
    """
    try:
        store = ActivationStore.open(folder, hook_name)
    except SaesubError:
        return None
    if other := differing(store.settings, {**settings, **same_text(store.settings)}):
        raise SaesubError(
            f"{folder} already holds a store of {hook_name} that differs in {other}: pass another "
            "folder, or delete that store"
        )
    return store


def unfinished(
    folder: str | Path, hook_name: str, settings: dict[str, str], same_text: SameText
) -> tuple[int, int]:
    """The numbers of batches and rows of an interrupted store that are whole, or (0, 0).

    Raises SaesubError if it was of other settings or another text.
    """
    data, path = _files(folder, hook_name)
    record = _read_record(path)
    if record is None or "sha256" in record or not data.is_file():
        return 0, 0
    if record["settings"].get("hooks") != "none":  # no other call can continue it
        return 0, 0
    if other := differing(record["settings"], {**settings, **same_text(record["settings"])}):
        raise SaesubError(
            f"{folder} holds an interrupted store of {hook_name} that differs in {other}: continue "
            f"that one, pass another folder, or delete {path.name}"
        )
    whole = data.stat().st_size >= record["n_bytes"]
    return (record["n_batches"], record["n_rows"]) if whole else (0, 0)


def _files(folder: str | Path, hook_name: str) -> tuple[Path, Path]:
    """The numbers, and the record of what they are."""
    return Path(folder) / f"{hook_name}.bin", Path(folder) / f"{hook_name}.json"


def _write_record(path: Path, record: dict[str, Any]) -> None:
    write_atomically(path, json.dumps({**record, "checksum": _digest(record)}, indent=1))


def _read_record(path: Path) -> dict[str, Any] | None:
    """What `_write_record` wrote, or None for a missing or damaged file."""
    try:
        record = json.loads(path.read_bytes())
        return record if record.pop("checksum") == _digest(record) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
