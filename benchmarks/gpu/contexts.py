"""The load's text: contexts as numbers of embedding rows, the most frequent token's first."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import NamedTuple

import numpy as np

FILE = "contexts.xz"
SIZE, SKIP_FIRST = 256, 1
# Two-byte numbers; measured to be the smallest of several settings.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 3, "lp": 1, "pb": 1}]


class Contexts(NamedTuple):
    """Text for the load's model.

    Attributes:
        rows: (contexts, pos) uint16, each token's number.
        ids: (numbers,) uint16, the model's own id of each number.
        special: numbers of special tokens, whose activations are left out.
        n_kept: positions that `saesub.harvest` keeps.
        corpus: its name.
    """

    rows: np.ndarray
    ids: np.ndarray
    special: tuple[int, ...]
    n_kept: int
    corpus: str

    def kept(self, start: int, stop: int) -> np.ndarray:
        """Mask (stop - start, pos) of the positions that `saesub.harvest` keeps."""
        kept = ~np.isin(self.rows[start:stop], self.special)
        kept[:, :SKIP_FIRST] = False
        return kept


def write(
    path: Path, tokens: np.ndarray, special_ids: tuple[int, ...], n_kept: int, corpus: str
) -> None:
    """Write contexts (contexts, pos) of the model's token ids."""
    ids, numbers, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(len(ids), np.uint16)
    rank[order] = np.arange(len(ids))
    rows, ids = rank[numbers].reshape(tokens.shape), ids[order].astype(np.uint16)
    special = np.flatnonzero(np.isin(ids, special_ids)).tolist()
    head = {"shape": rows.shape, "ids": len(ids), "special": special, "n_kept": n_kept}
    line = json.dumps(head | {"corpus": corpus}).encode()
    line += b" " * (1 - len(line) % 2) + b"\n"  # an even length, as the filters expect
    data = line + ids.astype("<u2").tobytes() + rows.astype("<u2").tobytes()
    path.write_bytes(lzma.compress(data, lzma.FORMAT_XZ, filters=_FILTERS))


def read(folder: Path) -> Contexts:
    """The contexts of a load."""
    line, _, data = lzma.decompress((folder / FILE).read_bytes()).partition(b"\n")
    head = json.loads(line)
    numbers = np.frombuffer(data, "<u2")
    ids, rows = numbers[: head["ids"]], numbers[head["ids"] :].reshape(head["shape"])
    return Contexts(rows, ids, tuple(head["special"]), head["n_kept"], head["corpus"])
