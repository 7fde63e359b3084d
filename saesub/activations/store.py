"""Activations of one hook point in a memory-mapped file, or in memory, read back shuffled and
restartable.

A store on disk is `<hook>.bin`, the numbers in float16 or float32, and `<hook>.json`, which says
what they are. While the store is written, `<hook>.json` says how many rows are safely on the disk.
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
from jaxtyping import Float, Int
from torch import Tensor

from saesub.activations.checks import SameText, all_finite, differing, require_finite
from saesub.arguments import batch_of, whole_number
from saesub.errors import SaesubError
from saesub.files import file_sha256, write_atomically
from saesub.loading.download import require_disk

_ROUNDING = 1e-2  # of a block, relative; ten times that of float16 within its range
_ROWS_PER_COPY = 65_536  # on their way to another device
_DTYPES = {torch.float16: np.dtype("<f2"), torch.float32: np.dtype("<f4")}
_TORCH = {dtype.str: kind for kind, dtype in _DTYPES.items()}


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """A read-only view of a store, one row a token (all of them, or one side of a `split`).

    The rows are in a file (`open`), or in the memory of a device (`of`, `on`). Both kinds give the
    same numbers in the same order.
    """

    hook_name: str
    settings: dict[str, str]
    epochs: float
    _numbers: _Numbers
    _parts: str
    _rows: np.ndarray | Tensor

    @classmethod
    def of(cls, rows: Float[Tensor, "n d_in"], hook_name: str) -> ActivationStore:
        """A store of activations that are in memory, on any device, in float16 or float32.

        The rows are not copied: do not change them while the store is used. There is no text in
        `settings`, and the rows count as read once.

        Raises SaesubError for another shape or dtype, no rows, and NaN or infinite values.
        """
        rows = batch_of(rows, "the rows of a store").detach()
        if rows.ndim != 2 or not rows.numel():
            raise SaesubError(
                f"rows of shape {tuple(rows.shape)} are no store: give activations (n, d_in), a "
                "row for each token"
            )
        if rows.dtype not in _DTYPES:
            raise SaesubError(
                f"a store holds torch.float16 or torch.float32, not {rows.dtype}: give rows.half() "
                "or rows.float()"
            )
        require_finite(rows)
        return cls(hook_name, {}, 1.0, _Numbers(len(rows), rows), "", rows)

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
        numbers = _Numbers(shape[0], checksum=record["sha256"])
        return cls(hook_name, record["settings"], record["epochs"], numbers, "", rows)

    def __repr__(self) -> str:
        device = f", on {self._rows.device}" if isinstance(self._rows, Tensor) else ""
        size = f"{self.n_tokens:,} tokens, d_in {self.d_in}"
        return f"ActivationStore({self.hook_name}, {size}{device})"

    @property
    def identity(self) -> str:
        """The checksum of the numbers, and which rows of them: what `rows` gives.

        It is the same in a file and on any device. For rows in memory it is computed when it is
        first asked for.
        """
        return f"{self._numbers.sha256()} rows 0 to {self._numbers.n}{self._parts}"

    @property
    def n_tokens(self) -> int:
        """Number of rows."""
        return len(self._rows)

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self._rows.shape[1]

    def rows(self, start: int, stop: int) -> Float[Tensor, "n d_in"]:
        """Rows start..stop in the order of the text, float32, on the rows' device.

        Raises SaesubError beyond the end.
        """
        start, stop = whole_number(start, "start", 0), whole_number(stop, "stop", 0)
        if not 0 <= start <= stop <= self.n_tokens:
            raise SaesubError(
                f"rows {start}..{stop} are not among the stored: give start and stop within "
                f"0..{self.n_tokens}"
            )
        if isinstance(self._rows, Tensor):
            return self._rows[start:stop].to(torch.float32, copy=True)
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
        per_epoch = self.n_tokens // batch_size
        step, drawn, order = start_step, -1, []
        while stop is None or step < stop:
            epoch, at = divmod(step, per_epoch)
            if epoch != drawn:
                drawn, generator = epoch, np.random.default_rng([seed, epoch])
                shuffled = generator.permutation(self.n_tokens)[: per_epoch * batch_size]
                order = self._place(shuffled.reshape(per_epoch, batch_size))
            yield self._gather(order[at])
            step += 1

    def _place(self, order: np.ndarray) -> np.ndarray | Int[Tensor, "steps batch"]:
        """Which rows each batch of an epoch holds, where the rows are."""
        if isinstance(self._rows, Tensor):
            return torch.from_numpy(order).to(self._rows.device).sort(1).values
        return order

    def _gather(self, chosen: Any) -> Float[Tensor, "batch d_in"]:
        if isinstance(self._rows, Tensor):
            return self._rows.index_select(0, chosen).float()
        # In file order, because rows of one page of the file are read together.
        return torch.from_numpy(np.take(self._rows, np.sort(chosen), axis=0)).float()

    def on(self, device: str | torch.device) -> ActivationStore:
        """The store with all its rows moved to a device, where batches are then gathered.

        Raises SaesubError for a device that is not here or has too little free memory.
        """
        device = _device_of(device)
        if isinstance(self._rows, Tensor) and self._rows.device == device:
            return self
        kind = self._rows.dtype if isinstance(self._rows, Tensor) else _TORCH[self._rows.dtype.str]
        rows = _empty_on(device, (self.n_tokens, self.d_in), kind, self.hook_name)
        for start in range(0, self.n_tokens, _ROWS_PER_COPY):
            part = self._rows[start : start + _ROWS_PER_COPY]
            block = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
            rows[start : start + len(block)] = block
        whole = _Numbers(len(rows), rows)  # so that the rows from before can be freed
        numbers = self._numbers if self._parts or self._numbers.known else whole
        return replace(self, _numbers=numbers, _rows=rows)

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
        parts = f"{self._parts}, of these {start} to {stop}"
        return replace(self, _parts=parts, _rows=self._rows[start:stop])


class _Numbers:
    """How many rows a whole store has, and their checksum, computed when it is first asked for."""

    def __init__(self, n: int, rows: Tensor | None = None, checksum: str | None = None) -> None:
        self.n, self._rows, self._checksum = n, rows, checksum

    @property
    def known(self) -> bool:
        return self._checksum is not None

    def sha256(self) -> str:
        """That of the file in which `StoreWriter` would write these rows."""
        if self._checksum is None:
            assert self._rows is not None
            digest, dtype = hashlib.sha256(), _DTYPES[self._rows.dtype]
            for block in self._rows.split(_ROWS_PER_COPY):
                digest.update(block.cpu().numpy().astype(dtype, copy=False).tobytes())
            self._checksum, self._rows = digest.hexdigest(), None
        return self._checksum


class StoreWriter:
    """Writes one store, or continues after the first `n_kept` rows of an unfinished one.

    A context manager. If it ends before `finish`, only the rows that `keep` kept remain, and none
    once `write` refused a value, which shows that they are of no use.
    """

    def __init__(
        self, folder: Path, hook_name: str, n_tokens: int, dtype: torch.dtype, n_kept: int = 0
    ) -> None:
        if dtype not in _DTYPES:
            raise SaesubError(
                f"a store holds torch.float16 or torch.float32, not {dtype}: pass one of these"
            )
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


def _device_of(given: str | torch.device) -> torch.device:
    """The device with its number. Raises SaesubError for one that is not here."""
    try:
        device = torch.empty(0, device=given).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SaesubError(
            f"the device {given!r} is not here: give 'cpu' or a device you have"
        ) from error
    if device.type == "meta":
        raise SaesubError("the meta device holds no values: give 'cpu' or a device you have")
    return device


def _empty_on(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype, hook_name: str
) -> Tensor:
    """Memory for the rows of a store. Raises SaesubError if there is too little."""
    needed, free = shape[0] * shape[1] * dtype.itemsize, _free_memory(device)
    try:
        if free is None or needed <= free:
            return torch.empty(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError:  # what is free may lie in pieces
        pass
    free_here = "too little is" if free is None else f"{free / 1e9:.2f} GB are"
    raise SaesubError(
        f"the activations of {hook_name} need {needed / 1e9:.2f} GB, and {free_here} free on "
        f"{device}: move one side of a split, harvest fewer tokens, or read the store from the disk"
    )


def _free_memory(device: torch.device) -> int | None:
    """Bytes that a tensor can still have, or None where that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu":
        with suppress(OSError, ValueError):
            lines = Path("/proc/meminfo").read_text().splitlines()
            sizes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
            return sizes[0] * 1024 if sizes else None
    return None


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
