"""Launching the Triton kernels, and the constants that a row's width gives them."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch

_NUMBERS_PER_THREAD = 8  # of a row: two 16-byte loads
_THREADS_PER_WARP, _MOST_WARPS = 32, 16
_LOADED_PER_THREAD, _MOST_ENTRIES = 32, 8  # numbers of the rows loaded at once: they fill registers


def launch(kernel: str, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run so many programs of a kernel; its first argument that is a tensor says on which card."""
    if not programs:
        return
    on = next(a for a in arguments if isinstance(a, torch.Tensor))
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(on):
        getattr(kernels(), kernel)[(programs,)](*arguments, **constants)


@cache
def kernels(name: str = "triton_kernels") -> ModuleType:
    """A module of kernels, imported on first use: Triton may not be there, and takes a second."""
    return importlib.import_module(f"saesub.topk.{name}")


def row_shapes(d_in: int, d_out: int) -> dict[str, int]:
    """The constants of a kernel whose programs hold both rows of a feature."""
    blocks = {"BLOCK_IN": block_of(d_in), "BLOCK_OUT": block_of(d_out)}
    warps = max(blocks.values()) // (_THREADS_PER_WARP * _NUMBERS_PER_THREAD)
    warps = min(max(warps, 1), _MOST_WARPS)
    return {"D_IN": d_in, "D_OUT": d_out, **blocks, "num_warps": warps}


def row_shape(d: int) -> dict[str, int]:
    """The constants of a kernel whose programs hold one row."""
    both = row_shapes(d, d)
    return {
        "D": d,
        "BLOCK": both["BLOCK_IN"],
        "ENTRIES": rows_at_once(both),
        "num_warps": both["num_warps"],
    }


def rows_at_once(shapes: dict[str, int]) -> int:
    """How many rows a program loads at once."""
    block = max(shapes["BLOCK_IN"], shapes["BLOCK_OUT"])
    rows = _LOADED_PER_THREAD * _THREADS_PER_WARP * shapes["num_warps"] // block
    return min(max(rows, 1), _MOST_ENTRIES)


def block_of(d: int) -> int:
    """The next power of two."""
    return 1 << (d - 1).bit_length()
