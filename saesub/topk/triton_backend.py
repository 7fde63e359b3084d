"""The `RowBackend` of `saesub.topk.step` on CUDA: wrappers of the kernels of triton_kernels.py.

Nothing here waits for the GPU: step count, clipping factor and row counters stay on the device.
Checked in Triton's interpreter and compiled for compute capability 9.0; not yet run on a GPU.
A feature's row is one program's work, so one that fires on most tokens of a large batch holds up
the end of a launch.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesub.topk import backend, cuda_search
from saesub.topk.backend import AdamSettings, Decoded, check_shapes
from saesub.topk.ops import Selected

_NUMBERS_PER_THREAD = 8  # of a row: two 16-byte loads
_THREADS_PER_WARP, _MOST_WARPS = 32, 16
_LOADED_PER_THREAD, _MOST_ENTRIES = 32, 8  # numbers of the rows loaded at once: they fill registers


@cache
def available() -> bool:
    """Whether Triton is installed and its kernels run (tried once; if they do not, it is said)."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        one = torch.ones(1, 1, device="cuda" if torch.cuda.is_available() else "cpu")
        none = torch.zeros(1, dtype=torch.int64, device=one.device)
        return bool(row_products(one, Selected.equally(none.view(1, 1), one, 1), one) == 1)
    except Exception as error:  # a compiler, Python.h, a GPU that Triton knows: any may lack
        warnings.warn(
            f"saesub's Triton kernels do not run here ({type(error).__name__}: "
            f"{str(error).strip()[-300:]}). Triton needs a free GPU, a C compiler and Python's "
            "headers; backend='torch' does without.",
            stacklevel=2,
        )
        return False


def row_products(
    vectors: Float[Tensor, "n d"], selected: Selected, table: Float[Tensor, "d_sae d"]
) -> Float[Tensor, " m"]:
    """`vectors[token] · table[feature]` of every entry, as `ops.row_products`."""
    check_shapes(table, (len(table), vectors.shape[1]), selected.offsets, (len(vectors) + 1,))
    products = vectors.new_empty(len(selected.features))
    _launch(
        "row_products",
        len(vectors),
        *(vectors, selected.features, selected.offsets, table, products),
        **_shape(vectors.shape[1]),
    )
    return products


search = partial(cuda_search.search, products=row_products)
exact_search = partial(cuda_search.search, exact=True, products=row_products)


def decode(
    selected: Selected,
    values: Float[Tensor, " m"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None,
    target: Float[Tensor, "n d_out"],
    weight: float,
) -> Decoded:
    """Reconstruct, and differentiate `weight * sum of (x_hat - target)²`."""
    (n, d), m = target.shape, len(values)
    check_shapes(W_dec, (len(W_dec), d), b_dec, (d,), selected.features, (m,))
    check_shapes(selected.offsets, (n + 1,))
    x_hat, g_out = torch.empty_like(target), torch.empty_like(target)
    g_pre, squared_error = torch.empty_like(values), target.new_empty(n)
    _launch(
        "decode",
        n,
        *(selected.features, selected.offsets, values, W_dec, b_dec, target, 2 * float(weight)),
        *(x_hat, g_out, g_pre, squared_error),
        **_shape(d),
    )
    g_pre.masked_fill_(values == 0, 0)
    g_bias, total = (t.sum(0, dtype=torch.float64).float() for t in (g_out, squared_error))
    return Decoded(x_hat, g_out, g_pre, g_bias, total)


def row_gradients(
    features: Int[Tensor, " m"],
    tokens: Int[Tensor, " m"],
    values: Float[Tensor, " m"],
    g_pre: Float[Tensor, " m"],
    x: Float[Tensor, "n d_in"],
    g_out: Float[Tensor, "n d_out"],
    d_sae: int,
) -> RowGradients:
    """Sort entries by feature; those of value zero have no gradient and come last, beyond `start`.

    How many these are is not asked: the answer would have to come from the device.
    """
    m = len(features)
    check_shapes(tokens, (m,), values, (m,), g_pre, (m,), g_out, (len(x), g_out.shape[1]))
    key = torch.where(values != 0, features, d_sae).int()
    key, order = key.sort(stable=True)
    boundaries = torch.arange(d_sae + 1, dtype=torch.int32, device=key.device)
    start = torch.searchsorted(key, boundaries)
    return RowGradients(start, tokens[order], g_pre[order], values[order], x, g_out)


class RowGradients(backend.RowGradients):
    """The entries on the device."""

    def norms(
        self, W_enc: Float[Tensor, "d_in d_sae"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " d_in"]]:
        """Squared norm of all gradients, float64; and `W_enc @ gradient of b_enc`."""
        check_shapes(W_enc, (self.x.shape[1], self.d_sae))
        squares, g_bias = self.x.new_zeros(2, self.d_sae)
        _launch("row_norms", self.d_sae, *self._entries(), squares, g_bias, **self._shapes())
        return squares.sum(dtype=torch.float64), W_enc @ g_bias

    def adam(
        self,
        settings: AdamSettings,
        step: Float[Tensor, ""],
        clip: Float[Tensor, ""],
        *tensors: Tensor,
        moved: Int[Tensor, " d_sae"] | None,
    ) -> None:
        """One update, as `backend.RowGradients` describes it."""
        self.check_parameters(tensors)
        s, step = settings, step.double()
        rate, root = s.lr / (1 - s.beta1**step), (1 - s.beta2**step).rsqrt()
        factors = torch.stack([clip.double(), rate, root]).float()
        decays = torch.ones_like(step).view(1) if moved is None else step - moved
        keep = torch.stack([s.beta1**decays, s.beta2**decays], 1).float()
        _launch(
            "adam_rows",
            self.d_sae,
            *(*self._entries(), *tensors, factors, keep, 1 - s.beta1, 1 - s.beta2, s.eps),
            LAZY=moved is not None,
            **self._shapes(),
        )
        if moved is not None:
            moved.copy_(torch.where(self.start.diff() > 0, step.long(), moved))

    def _entries(self) -> list[Tensor]:
        return [self.start, self.token, self.g_pre, self.value, self.x, self.g_out]

    def _shapes(self) -> dict[str, int]:
        d_in, d_out = self.x.shape[1], self.g_out.shape[1]
        blocks = {"BLOCK_IN": _block(d_in), "BLOCK_OUT": _block(d_out)}
        return {"D_IN": d_in, "D_OUT": d_out, **blocks, **_threads(max(blocks.values()))}


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
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    for t in tensors:
        if not t.is_contiguous() or t.dtype not in (torch.float32, torch.int64):
            raise TypeError(
                f"a contiguous float32 or int64 tensor is wanted, not {t.dtype} with strides "
                f"{t.stride()}"
            )
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(tensors[0]):
        getattr(_kernels(), kernel)[(programs,)](*arguments, **constants)


@cache
def _kernels() -> ModuleType:
    """Imported on first use: Triton may not be there, and takes a second to import."""
    return importlib.import_module("saesub.topk.triton_kernels")
