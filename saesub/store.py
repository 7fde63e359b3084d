"""Activations of one hook point in a memory-mapped file, read back shuffled and restartable.

A store is `<hook>.bin` (rows of float16 or float32) and `<hook>.json`, written last: a store
without its JSON was never finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saesub.errors import SaesubError
from saesub.fetch import require_disk

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
        """Open a finished store. Raises SaesubError if it is missing, unfinished or truncated."""
        data, marker = _paths(Path(folder), hook_name)
        if not marker.is_file() or not data.is_file():
            raise SaesubError(f"no finished store of {hook_name} in {folder}: harvest it first")
        try:
            record = json.loads(marker.read_bytes())
            shape = (record["n_tokens"], record["d_in"])
            dtype = np.dtype(record["dtype"])
            described = record["settings"], record["epochs"]
        except (ValueError, KeyError, TypeError) as error:
            raise SaesubError(f"{marker} is damaged: harvest this hook point again") from error
        expected = shape[0] * shape[1] * dtype.itemsize
        if data.stat().st_size != expected:
            raise SaesubError(
                f"{data} is truncated ({data.stat().st_size} bytes of {expected}): delete it and "
                "harvest this hook point again"
            )
        return cls(hook_name, *described, np.memmap(data, dtype, mode="r", shape=shape))

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
    """Writes one store; a context manager that leaves nothing behind unless `finish` was called."""

    def __init__(self, folder: Path, hook_name: str, n_tokens: int, dtype: torch.dtype) -> None:
        if dtype not in _DTYPES:
            raise SaesubError(f"a store holds torch.float16 or torch.float32, not {dtype}")
        folder.mkdir(parents=True, exist_ok=True)
        self._data, self._marker = _paths(folder, hook_name)
        self._n_tokens, self._dtype, self._d = n_tokens, dtype, 0
        self._partial = self._data.with_name(f"{self._data.name}.{os.getpid()}.tmp")
        self._file = self._partial.open("wb")

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def write(self, x: Float[Tensor, "n d"]) -> None:
        """Append rows. Raises SaesubError for NaN, infinite or overflowing values, or a full
        disk."""
        if not self._d:
            self._d = x.shape[1]
            size = self._n_tokens * self._d * _DTYPES[self._dtype].itemsize
            require_disk(self._data.parent, size, f"the store {self._data.name}")
        stored = x.to(self._dtype)
        if not stored.sum(dtype=torch.float32).isfinite():
            if x.sum(dtype=torch.float32).isfinite():
                raise SaesubError(f"values beyond {self._dtype}'s range: pass dtype=torch.float32")
            raise SaesubError("activations hold NaN or infinite values")
        self._file.write(stored.cpu().numpy().astype(_DTYPES[self._dtype], copy=False).tobytes())

    def finish(self, settings: dict[str, str], epochs: float) -> None:
        """Give the files their names, the JSON last."""
        self._file.close()
        self._marker.unlink(missing_ok=True)
        os.replace(self._partial, self._data)
        record = {
            "n_tokens": self._n_tokens,
            "d_in": self._d,
            "dtype": _DTYPES[self._dtype].str,
            "settings": settings,
            "epochs": epochs,
        }
        temporary = self._marker.with_name(f"{self._marker.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(record, indent=1))
        os.replace(temporary, self._marker)


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
    differing = sorted(k for k in settings if store.settings.get(k) != settings[k])
    if differing:
        raise SaesubError(
            f"{folder} already holds a store of {hook_name} with another {', '.join(differing)}: "
            "pass another folder, or delete that store"
        )
    return store


def _paths(folder: Path, hook_name: str) -> tuple[Path, Path]:
    return folder / f"{hook_name}.bin", folder / f"{hook_name}.json"
