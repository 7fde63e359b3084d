"""Activations of one hook point in a memory-mapped file, or in memory, read back shuffled and
restartable.

The files of a store on disk are described in `saesub.activations.store_file`.
"""

from __future__ import annotations

import hashlib
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

from saesub.activations.checks import require_finite
from saesub.activations.store_file import DTYPES, Record, held, store_files
from saesub.arguments import batch_of, whole_number
from saesub.errors import SaesubError

_ROWS_PER_COPY = 65_536  # on their way to another device
_TORCH = {dtype.str: kind for kind, dtype in DTYPES.items()}


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
        if rows.dtype not in DTYPES:
            raise SaesubError(
                f"a store holds torch.float16 or torch.float32, not {rows.dtype}: give rows.half() "
                "or rows.float()"
            )
        require_finite(rows)
        return cls(hook_name, {}, 1.0, _Numbers(len(rows), rows), "", rows)

    @classmethod
    def open(cls, folder: str | Path, hook_name: str) -> ActivationStore:
        """Open a store with as many rows as a call of `harvest` asked for at most. Its checksum is
        computed if the file's time has changed.

        Raises SaesubError if it is missing, unfinished, truncated or damaged.
        """
        record = held(folder, hook_name)
        if not record.parts:
            raise SaesubError(
                f"the store of {hook_name} in {folder} is unfinished: harvest it again, which "
                "continues where it stopped"
            )
        return cls.of_record(folder, hook_name, record, max(map(int, record.parts)))

    @classmethod
    def of_record(
        cls, folder: str | Path, hook_name: str, record: Record, n_tokens: int
    ) -> ActivationStore:
        """The first `n_tokens` rows, a part that the record has."""
        part, shape = record.parts[str(n_tokens)], (n_tokens, record.d_in)
        rows = np.memmap(store_files(folder, hook_name)[0], record.dtype, mode="r", shape=shape)
        settings = record.settings | {"n_tokens": str(n_tokens)} | part["text"]
        numbers = _Numbers(n_tokens, checksum=part["sha256"])
        return cls(hook_name, settings, part["epochs"], numbers, "", rows)

    def __repr__(self) -> str:
        device = f", on {self._rows.device}" if isinstance(self._rows, Tensor) else ""
        size = f"{self.n_tokens:,} tokens, d_in {self.d_in}"
        return f"ActivationStore({self.hook_name}, {size}{device})"

    @property
    def identity(self) -> str:
        """The checksum of the numbers, and which rows of them `rows` gives.

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
            digest, dtype = hashlib.sha256(), DTYPES[self._rows.dtype]
            for block in self._rows.split(_ROWS_PER_COPY):
                digest.update(block.cpu().numpy().astype(dtype, copy=False).tobytes())
            self._checksum, self._rows = digest.hexdigest(), None
        return self._checksum


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
