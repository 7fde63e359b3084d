"""The first layers of SmolLM2-135M as the 4-bit and 8-bit blocks that its GGUF file holds.

One zip file. The blocks of all tensors of a kind lie together, quants apart from scales and each
byte of a scale apart from the others, because that compresses best. Needs numpy alone.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

BLOCK = 32
"""Weights in a block, of either kind."""
SCALE_BYTES = {"Q4_1": 4, "Q8_0": 2}
"""The bytes of a block before its quants: a float16 scale, and in Q4_1 a float16 minimum."""
_QUANT_BYTES = {"Q4_1": 16, "Q8_0": 32}


class Blocks(NamedTuple):
    """A tensor of `shape`: its blocks (n, bytes of a block) uint8, or float32 values ("F32")."""

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray


def write(path: Path, tensors: Mapping[str, Blocks]) -> None:
    """Write the tensors to a zip file."""
    index = [{"name": name, "kind": t.kind, "shape": t.shape} for name, t in tensors.items()]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("index.json", json.dumps(index))
        for kind, n_scale in SCALE_BYTES.items():
            blocks = np.concatenate([t.data for t in tensors.values() if t.kind == kind])
            _add(archive, f"{kind}.quants", blocks[:, n_scale:])
            for i in range(n_scale):
                _add(archive, f"{kind}.scales.{i}", blocks[:, i])
        plain = [t.data.ravel() for t in tensors.values() if t.kind == "F32"]
        _add(archive, "F32", np.concatenate(plain).astype("<f4"))


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors in float32, by name."""
    with zipfile.ZipFile(path) as archive:
        index = json.loads(archive.read("index.json"))
        stored = {kind: _blocks(archive, kind) for kind in SCALE_BYTES}
        stored["F32"] = np.frombuffer(archive.read("F32"), "<f4")
    tensors, at = {}, dict.fromkeys(stored, 0)
    for entry in index:
        kind, shape = entry["kind"], tuple(entry["shape"])
        n = int(np.prod(shape)) // (1 if kind == "F32" else BLOCK)
        part = stored[kind][at[kind] : at[kind] + n]
        at[kind] += n
        tensors[entry["name"]] = dequantised(kind, part).reshape(shape)
    return tensors


def dequantised(kind: str, blocks: np.ndarray) -> np.ndarray:
    """Blocks (n, bytes of a block) as (n, 32) float32; "F32" as it is."""
    if kind == "F32":
        return blocks.copy()
    scales = np.ascontiguousarray(blocks[:, : SCALE_BYTES[kind]]).view("<f2").astype(np.float32)
    quants = blocks[:, SCALE_BYTES[kind] :]
    if kind == "Q8_0":
        return quants.view(np.int8).astype(np.float32) * scales
    halves = np.concatenate([quants & 15, quants >> 4], axis=1).astype(np.float32)
    return scales[:, :1] * halves + scales[:, 1:]


def _blocks(archive: zipfile.ZipFile, kind: str) -> np.ndarray:
    """The blocks of a kind (n, bytes of a block), put together from their parts."""
    quants = np.frombuffer(archive.read(f"{kind}.quants"), np.uint8)
    quants = quants.reshape(-1, _QUANT_BYTES[kind])
    names = [f"{kind}.scales.{i}" for i in range(SCALE_BYTES[kind])]
    scales = [np.frombuffer(archive.read(name), np.uint8) for name in names]
    return np.concatenate([np.stack(scales, axis=1), quants], axis=1)


def _add(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Add an array's bytes. LZMA gains nothing on quants, and a tenth or more on the rest."""
    kind = zipfile.ZIP_DEFLATED if name.endswith("quants") else zipfile.ZIP_LZMA
    archive.writestr(name, np.ascontiguousarray(array).tobytes(), kind, 9)
