"""The `RowBackend` on CUDA: it launches the kernels of triton_kernels.py.

Nothing here waits for the GPU: step count, clipping factor and row counters stay on the device.
Checked in Triton's interpreter and compiled for compute capability 9.0; not yet run on a GPU.
A feature's row is one program's work, so one that fires on most tokens of a large batch holds up
the end of a launch.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesub.topk import backend, cuda_search
from saesub.topk.backend import Decoded, RowBackend, check
from saesub.topk.ops import Selected

_NUMBERS_PER_THREAD = 8  # of a row: two 16-byte loads
_THREADS_PER_WARP, _MOST_WARPS = 32, 16
_LOADED_PER_THREAD, _MOST_ENTRIES = 32, 8  # numbers of the rows loaded at once: they fill registers


@cache
def available() -> bool:
    """Whether Triton is installed and its kernels run; tried once, and a failure warns once."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        one = torch.ones(1, 1, device=BACKEND.device_type)
        none = torch.zeros(1, dtype=torch.int64, device=one.device)
        selected = Selected.equally(none.view(1, 1), one, 1)
        return bool(BACKEND.row_products(one, selected, one) == 1)
    except Exception as error:  # a compiler, Python.h, a GPU that Triton knows: any may lack
        warnings.warn(
            f"saesub's Triton kernels do not run here ({type(error).__name__}: "
            f"{str(error).strip()[-300:]}). Triton needs a free GPU, a C compiler and Python's "
            "headers; backend='torch' does without.",
            stacklevel=2,
        )
        return False


class RowGradients(backend.RowGradients):
    """The entries on the device."""

    def _norms(self, W_enc) -> tuple[Tensor, Tensor]:
        squares, g_bias = self.x.new_zeros(2, self.d_sae)
        _launch("row_norms", self.d_sae, *self._entries(), squares, g_bias, **self._shapes())
        return squares.sum(dtype=torch.float64), W_enc @ g_bias

    def _adam(self, settings, step, clip, tensors, moved) -> None:
        s, step = settings, step.double()
        rate, root = s.lr / (1 - s.beta1**step), (1 - s.beta2**step).rsqrt()
        factors = torch.stack([clip.double(), rate, root]).float()
        decays = torch.ones_like(step).view(1) if moved is None else step - moved
        keep = torch.stack([s.beta1**decays, s.beta2**decays], 1).float()
        given = [*self._entries(), *tensors, factors, keep, 1 - s.beta1, 1 - s.beta2, s.eps]
        _launch("adam_rows", self.d_sae, *given, LAZY=moved is not None, **self._shapes())
        if moved is not None:
            moved.copy_(torch.where(self.start.diff() > 0, step.long(), moved))

    def _entries(self) -> list[Tensor]:
        return [self.start, self.token, self.g_pre, self.value, self.x, self.g_out]

    def _shapes(self) -> dict[str, int]:
        d_in, d_out = self.x.shape[1], self.g_out.shape[1]
        blocks = {"BLOCK_IN": _block(d_in), "BLOCK_OUT": _block(d_out)}
        return {"D_IN": d_in, "D_OUT": d_out, **blocks, **_threads(max(blocks.values()))}


class TritonBackend(RowBackend):
    """The kernels of triton_kernels.py; `available` tells whether they run."""

    def __init__(self) -> None:
        # Without CUDA only Triton's interpreter runs them.
        self.device_type = "cuda" if torch.cuda.is_available() else "cpu"

    def row_products(
        self, vectors: Float[Tensor, "n d"], selected: Selected, table: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, " m"]:
        """`vectors[token] · table[feature]` of every entry, as `ops.row_products`."""
        (n, d), m = vectors.shape, len(selected.features)
        check(self.device_type, (vectors, (n, d)), (table, (len(table), d)))
        where = [(selected.features, (m,)), (selected.offsets, (n + 1,))]
        check(self.device_type, *where, dtype=torch.int64)
        products = vectors.new_empty(m)
        given = [vectors, selected.features, selected.offsets, table, products]
        _launch("row_products", n, *given, **_shape(d))
        return products

    def _search(self, x, W_enc, b_enc, k, feature_scale) -> tuple[Tensor, Tensor]:
        return cuda_search.search(x, W_enc, b_enc, k, feature_scale, products=self.row_products)

    def _exact_search(self, x, W_enc, b_enc, k, feature_scale) -> tuple[Tensor, Tensor]:
        settings = {"exact": True, "products": self.row_products}
        return cuda_search.search(x, W_enc, b_enc, k, feature_scale, **settings)

    def _decode(self, selected, values, W_dec, b_dec, target, weight) -> Decoded:
        n, d = target.shape
        x_hat, g_out = torch.empty_like(target), torch.empty_like(target)
        g_pre, squared_error = torch.empty_like(values), target.new_empty(n)
        given = [selected.features, selected.offsets, values, W_dec, b_dec, target, 2.0 * weight]
        _launch("decode", n, *given, x_hat, g_out, g_pre, squared_error, **_shape(d))
        g_pre.masked_fill_(values == 0, 0)
        g_bias, total = (t.sum(0, dtype=torch.float64).float() for t in (g_out, squared_error))
        return Decoded(x_hat, g_out, g_pre, g_bias, total)

    def _row_gradients(self, features, tokens, values, g_pre, x, g_out, d_sae) -> RowGradients:
        """Entries of value zero come last, beyond `start`.

        Their number is not read: reading it would wait for the device.
        """
        key, order = torch.where(values != 0, features, d_sae).int().sort(stable=True)
        boundaries = torch.arange(d_sae + 1, dtype=torch.int32, device=key.device)
        start = torch.searchsorted(key, boundaries)
        return RowGradients(start, tokens[order], g_pre[order], values[order], x, g_out)


BACKEND = TritonBackend()


def _shape(d: int) -> dict[str, int]:
    return {"D": d, "BLOCK": _block(d), **_threads(_block(d))}


def _block(d: int) -> int:
    """The next power of two."""
    return 1 << (d - 1).bit_length()


def _threads(block: int) -> dict[str, int]:
    """Warps that share a row of `block` numbers, and the rows that they load at once."""
    warps = block // (_THREADS_PER_WARP * _NUMBERS_PER_THREAD)
    warps = min(max(warps, 1), _MOST_WARPS)
    entries = _LOADED_PER_THREAD * _THREADS_PER_WARP * warps // block
    return {"ENTRIES": min(max(entries, 1), _MOST_ENTRIES), "num_warps": warps}


def _launch(kernel: str, programs: int, *arguments: Any, **constants: Any) -> None:
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(arguments[0]):
        getattr(_kernels(), kernel)[(programs,)](*arguments, **constants)


@cache
def _kernels() -> ModuleType:
    """Imported on first use: Triton may not be there, and takes a second to import."""
    return importlib.import_module("saesub.topk.triton_kernels")
