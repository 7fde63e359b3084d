"""Activations of one hook point in a memory-mapped file, read back shuffled and restartable.

A store is `<hook>.bin` (rows of float16 or float32) and `<hook>.json`, which holds checksums. While
it is written it is `<hook>.bin.partial`, and `<hook>.partial.json` says how far it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saesub.activations.finite import require_finite
from saesub.errors import SaesubError
from saesub.files import file_sha256, write_atomically
from saesub.loading.download import require_disk

_DTYPES = {torch.float16: np.dtype("<f2"), torch.float32: np.dtype("<f4")}


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """A read-only view of the rows of a store (all of them, or one side of a `split`)."""

    hook_name: str
    settings: dict[str, str]
    epochs: float
    _rows: np.ndarray

    @classmethod
    def open(cls, folder: str | Path, hook_name: str) -> ActivationStore:
        """Open a finished store. Its checksum is computed if the file is not as old as it was.

        Raises SaesubError if it is missing, unfinished, truncated or damaged.
        """
        data, marker, _ = _paths(Path(folder), hook_name)
        if not marker.is_file() or not data.is_file():
            raise SaesubError(f"no finished store of {hook_name} in {folder}: harvest it first")
        record = _read_record(marker)
        if record is None or record["dtype"] not in {dtype.str for dtype in _DTYPES.values()}:
            raise SaesubError(f"{marker} is damaged: delete it and harvest this hook point again")
        shape, dtype = (record["n_tokens"], record["d_in"]), np.dtype(record["dtype"])
        expected = shape[0] * shape[1] * dtype.itemsize
        if data.stat().st_size != expected:
            raise SaesubError(
                f"{data} is truncated ({data.stat().st_size} bytes of {expected}): delete it and "
                "harvest this hook point again"
            )
        if data.stat().st_mtime_ns != record["mtime_ns"]:
            if file_sha256(data) != record["sha256"]:
                raise SaesubError(
                    f"{data} is damaged, its checksum does not match: delete it and harvest this "
                    "hook point again"
                )
            with suppress(OSError):  # a read-only folder: it is hashed again next time
                _write_record(marker, record | {"mtime_ns": data.stat().st_mtime_ns})
        rows = np.memmap(data, dtype, mode="r", shape=shape)
        return cls(hook_name, record["settings"], record["epochs"], rows)

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
            raise SaesubError(f"rows {start}..{stop} are not within the {self.n_tokens} stored")
        return torch.from_numpy(self._rows[start:stop].astype(np.float32))

    def batches(
        self, batch_size: int, *, seed: int, start_step: int = 0, stop: int | None = None
    ) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Shuffled float32 batches of steps start_step, start_step + 1, ... up to `stop`, or
        endless.

        Every epoch is a new permutation of the whole store, drawn from (seed, epoch), its last
        incomplete batch dropped: step s holds the same rows however one arrives at it. Raises
        SaesubError for a batch larger than the store.
        """
        if not 1 <= batch_size <= self.n_tokens:
            raise SaesubError(f"batch_size must lie in 1..{self.n_tokens}, got {batch_size}")
        steps = self.n_tokens // batch_size
        step, drawn, order = start_step, -1, np.empty(0, np.int64)
        while stop is None or step < stop:
            epoch, at = divmod(step, steps)
            if epoch != drawn:
                order, drawn = (
                    np.random.default_rng([seed, epoch]).permutation(self.n_tokens),
                    epoch,
                )
            # In file order: the set is what was shuffled, and neighbours in a page come together.
            chosen = np.sort(order[at * batch_size : (at + 1) * batch_size])
            yield torch.from_numpy(np.take(self._rows, chosen, axis=0)).float()
            step += 1

    def split(self, n_held_out: int) -> tuple[ActivationStore, ActivationStore]:
        """The store without its last `n_held_out` rows, and those rows. Raises SaesubError if
        either side would be empty."""
        if not 1 <= n_held_out < self.n_tokens:
            raise SaesubError(f"n_held_out must lie in 1..{self.n_tokens - 1}, got {n_held_out}")
        cut = self.n_tokens - n_held_out
        return replace(self, _rows=self._rows[:cut]), replace(self, _rows=self._rows[cut:])


class StoreWriter:
    """Writes one store, or goes on after the first `n_kept` rows of an unfinished one.

    A context manager. Left before `finish`, it leaves behind what `keep` was called for, unless a
    SaesubError shows that the rows are of no use, and nothing otherwise.
    """

    def __init__(
        self, folder: Path, hook_name: str, n_tokens: int, dtype: torch.dtype, n_kept: int = 0
    ) -> None:
        if dtype not in _DTYPES:
            raise SaesubError(f"a store holds torch.float16 or torch.float32, not {dtype}")
        folder.mkdir(parents=True, exist_ok=True)
        self._n_tokens, self._dtype, self._d = n_tokens, dtype, 0
        self._data, self._marker, self._progress = _paths(folder, hook_name)
        self._partial = _partial(self._data)
        if n_kept == 0:
            self._progress.unlink(missing_ok=True)
            self._file = self._partial.open("wb")
        else:
            self._d = (_read_record(self._progress) or {})["d_in"]
            self._file = self._partial.open("r+b")
            self._file.truncate(n_kept * self._d * _DTYPES[dtype].itemsize)
            self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        with suppress(OSError):  # what a full disk did not take
            self._file.close()
        if isinstance(error, SaesubError) or not self._progress.is_file():
            self._partial.unlink(missing_ok=True)
            self._progress.unlink(missing_ok=True)

    def write(self, x: Float[Tensor, "n d"]) -> None:
        """Append rows. Raises SaesubError for NaN, infinite or overflowing values, or too little
        disk; OSError where the disk fills up."""
        if not self._file.tell():
            self._d = x.shape[1]
            size = self._n_tokens * self._d * _DTYPES[self._dtype].itemsize
            require_disk(self._data.parent, size, f"the store {self._data.name}")
        stored = x.to(self._dtype)
        if not stored.sum(dtype=torch.float32).isfinite():
            require_finite(x)
            if not stored.isfinite().all():
                raise SaesubError(f"values beyond {self._dtype}'s range: pass dtype=torch.float32")
        self._file.write(stored.cpu().numpy().astype(_DTYPES[self._dtype], copy=False).tobytes())

    def keep(self, settings: dict[str, str], n_batches: int, n_rows: int) -> None:
        """Have what was written so far, `n_rows` rows of `n_batches`, survive this process."""
        self._file.flush()
        os.fsync(self._file.fileno())
        record = {"n_batches": n_batches, "n_rows": n_rows, "d_in": self._d}
        record |= {"n_bytes": self._file.tell(), "settings": settings}
        _write_record(self._progress, record)

    def finish(self, settings: dict[str, str], epochs: float) -> None:
        """Give the files their names; a kill on the way leaves what `keep` kept."""
        self._file.close()
        record = {
            "n_tokens": self._n_tokens,
            "d_in": self._d,
            "dtype": _DTYPES[self._dtype].str,
            "settings": settings,
            "epochs": epochs,
            "sha256": file_sha256(self._partial),
            "mtime_ns": self._partial.stat().st_mtime_ns,
        }
        self._data.unlink(missing_ok=True)
        _write_record(self._marker, record)
        os.replace(self._partial, self._data)
        self._progress.unlink(missing_ok=True)


def open_or_none(
    folder: str | Path, hook_name: str, settings: dict[str, str]
) -> ActivationStore | None:
    """The finished store of these settings, or None if there is none or it is incomplete.

    Raises SaesubError if a finished store of other settings is in the way.
    """
    try:
        store = ActivationStore.open(folder, hook_name)
    except SaesubError:
        return None
    if differing := _differing(store.settings, settings):
        raise SaesubError(
            f"{folder} already holds a store of {hook_name} with another {differing}: "
            "pass another folder, or delete that store"
        )
    with suppress(OSError):  # left by a process that was killed as it finished
        _paths(Path(folder), hook_name)[2].unlink(missing_ok=True)
    return store


def unfinished(folder: str | Path, hook_name: str, settings: dict[str, str]) -> tuple[int, int]:
    """The batches and rows of an interrupted store that are whole; (0, 0) if there are none.

    Raises SaesubError if it was of other settings.
    """
    data, _, progress = _paths(Path(folder), hook_name)
    record, partial = _read_record(progress), _partial(data)
    if record is None or not partial.is_file():
        return 0, 0
    if differing := _differing(record["settings"], settings):
        raise SaesubError(
            f"{partial} is an interrupted store of {hook_name} with another {differing}: go on "
            f"with that one, pass another folder, or delete {progress.name}"
        )
    if partial.stat().st_size < record["n_bytes"]:
        return 0, 0
    return record["n_batches"], record["n_rows"]


def _differing(kept: dict[str, str], wanted: dict[str, str]) -> str:
    return ", ".join(sorted(name for name in wanted if kept.get(name) != wanted[name]))


def _paths(folder: Path, hook_name: str) -> tuple[Path, Path, Path]:
    """Of the rows, of what describes them, and of how far unfinished ones are whole."""
    names = f"{hook_name}.bin", f"{hook_name}.json", f"{hook_name}.partial.json"
    return folder / names[0], folder / names[1], folder / names[2]


def _partial(data: Path) -> Path:
    return data.with_name(f"{data.name}.partial")


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
