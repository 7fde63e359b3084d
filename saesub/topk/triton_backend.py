"""The `RowBackend` on CUDA: it launches the kernels of triton_kernels.py.

Nothing here waits for the GPU: step count, clipping factor, row counters and the number of features
that have entries stay on the device. Checked in Triton's interpreter and on an H200; `saesub
check-gpu` runs it on a card.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesub.topk import backend, cuda_search
from saesub.topk.backend import Decoded, RowBackend, check
from saesub.topk.ops import Selected
from saesub.topk.shadow import EncoderShadow
from saesub.topk.triton_launch import launch, row_shape, row_shapes, rows_at_once

LEAST_CAPABILITY, _HOPPER = (8, 0), (9, 0)
# On an H200 a step of 4,096 tokens took as long in 8 bits as in 16 at 2^17 features, and three
# quarters of it at 2^20 (no width between was timed); of the top 32 it found 99.969 % or more on
# trained weights.
LEAST_FOR_EIGHT_BITS = 2**18
_SEGMENT = 256  # a feature with more entries is the work of several programs
_ENTRIES_PER_SUM = 64  # of the product of the encoder and its bias's gradient


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


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a card; Triton is made for newer ones than Colab's T4."""
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY and available()


def is_hopper(device: torch.device) -> bool:
    """Whether it is an H100, an H200 or another card of their kind."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == _HOPPER


@dataclass(frozen=True)
class RowGradients(backend.RowGradients):
    """The entries on the device, sorted by feature; those without a gradient come last.

    Attributes:
        feature: (m,) int32, that of each entry; `d_sae` of those without a gradient.
    """

    feature: Int[Tensor, " m"]

    @cached_property
    def _touched(self) -> Int[Tensor, " programs"]:
        """The features that have entries, in order; then `d_sae`, as often as there is room."""
        new = self.feature.diff(prepend=self.feature.new_full((1,), -1)) != 0
        room = min(len(self.feature), self.d_sae + 1)
        place = torch.where(new, new.cumsum(0) - 1, room)
        found = self.feature.new_full((room + 1,), self.d_sae)
        return found.scatter_(0, place, torch.where(new, self.feature, self.d_sae))

    @cached_property
    def _segments(self) -> tuple[Tensor, Tensor, Tensor]:
        """(d_sae,) the first segment of each feature with over `_SEGMENT` entries; and the two
        sums of every segment, (segments, d_in) and (segments, d_out)."""
        counts = self.start.diff()
        several = torch.where(counts > _SEGMENT, (counts + _SEGMENT - 1) // _SEGMENT, 0)
        ends = several.cumsum(0)
        part = (ends - several).int()
        most = 2 * len(self.feature) // _SEGMENT  # such a feature fills one of two at least
        numbers = torch.arange(most, device=ends.device)
        owner = torch.searchsorted(ends, numbers, right=True, out_int32=True)
        sums = self.x.new_empty(most, self.x.shape[1]), self.x.new_empty(most, self.g_out.shape[1])
        given = [owner, part, self.start, *self._entries(), *sums, self.d_sae]
        launch("segment_sums", most, *given, **self._shapes())
        return part, *sums

    def _norms(self, W_enc) -> tuple[Tensor, Tensor | None]:
        part, *sums = self._segments
        programs = len(self._touched)
        squares = self.x.new_zeros(programs)
        given = [self._touched, self.start, part, *self._entries(), *sums, squares, self.d_sae]
        launch("row_norms", programs, *given, **self._shapes())
        through = None if W_enc is None else self._through(W_enc)
        return squares.sum(dtype=torch.float64), through

    def _through(self, W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, " d_in"]:
        programs = -(-len(self.feature) // _ENTRIES_PER_SUM)
        sums = self.x.new_empty(programs, len(W_enc))
        given = [self.start[-1:], self.feature, self.g_pre, W_enc.T, sums]
        shape = row_shape(len(W_enc)) | {"SEGMENT": _ENTRIES_PER_SUM}
        launch("through_encoder", programs, *given, **shape)
        return sums.sum(0, dtype=torch.float64)

    def _adam(self, settings, step, clip, tensors, moved, shadow) -> None:
        s, step, lazy = settings, step.double(), moved is not None
        rate, root = s.lr / (1 - s.beta1**step), (1 - s.beta2**step).rsqrt()
        factors = torch.stack([clip.double(), rate, root]).float()
        decays = step - moved if lazy else torch.ones_like(step).view(1)
        keep = torch.stack([s.beta1**decays, s.beta2**decays], 1).float()
        part, *sums = self._segments
        given = [self._touched, self.start, part, *self._entries(), *sums, *tensors]
        given += [factors, keep, 1 - s.beta1, 1 - s.beta2, s.eps]
        kept = [None, None, None, 1.0] if shadow is None else shadow.given()
        shapes = self._shapes() | ({"WIDTH": 0, "LIMIT": 0} if shadow is None else shadow.shape())
        programs = len(self._touched) if lazy else self.d_sae
        launch("adam_rows", programs, *given, *kept, self.d_sae, LAZY=lazy, **shapes)
        if lazy:
            moves = (self.start.diff() > 0) & ~clip.isnan()
            moved.copy_(torch.where(moves, step.long(), moved))

    def _entries(self) -> list[Tensor]:
        return [self.token, self.g_pre, self.value, self.x, self.g_out]

    def _shapes(self) -> dict[str, int]:
        shapes = row_shapes(self.x.shape[1], self.g_out.shape[1])
        return shapes | {"ENTRIES": rows_at_once(shapes), "SEGMENT": _SEGMENT}


class TritonBackend(RowBackend):
    """The kernels of triton_kernels.py; `available` tells whether they run.

    Attributes:
        eight_bits: whether to search in float8, which cards of compute capability 8.9 or more have;
            None where that was measured to pay.
    """

    skips_nan = True

    def __init__(self, *, eight_bits: bool | None = None) -> None:
        self.eight_bits = eight_bits
        # Without CUDA only Triton's interpreter runs them.
        self.device_type = "cuda" if torch.cuda.is_available() else "cpu"

    def shadow(self, sae: Any, kept: Any, *, in_subspace: bool = True) -> EncoderShadow:
        """`kept`, if it is of this SAE's kind, brought up to date; else a new one."""
        scaled = sae.cfg.rescale_acts_by_decoder_norm
        if not isinstance(kept, EncoderShadow) or not kept.fits(sae.W_enc, scaled):
            return self.shadow_of(sae.W_enc, sae.W_dec, scaled=scaled)
        kept.keep_up(sae.W_enc, sae.W_dec)
        return kept

    def shadow_of(self, W_enc: Tensor, W_dec: Tensor, *, scaled: bool) -> EncoderShadow:
        """A new shadow of these weights."""
        eight_bits = self.eight_bits
        if eight_bits is None:
            eight_bits = W_enc.shape[1] >= LEAST_FOR_EIGHT_BITS and is_hopper(W_enc.device)
        settings = {"products": self.row_products, "eight_bits": eight_bits}
        return EncoderShadow(W_enc, W_dec, scaled=scaled, **settings)

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
        launch("row_products", n, *given, **row_shape(d))
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
        launch("decode", n, *given, x_hat, g_out, g_pre, squared_error, **row_shape(d))
        g_pre.masked_fill_(values == 0, 0)
        g_bias, total = (t.sum(0, dtype=torch.float64).float() for t in (g_out, squared_error))
        return Decoded(x_hat, g_out, g_pre, g_bias, total)

    def _row_gradients(self, features, tokens, values, g_pre, x, g_out, d_sae) -> RowGradients:
        """Entries of value zero come last, beyond `start`.

        Their number is not read: reading it would wait for the device.
        """
        key, order = torch.where(values != 0, features, d_sae).int().sort(stable=True)
        boundaries = torch.arange(d_sae + 1, dtype=torch.int32, device=key.device)
        start = torch.searchsorted(key, boundaries, out_int32=True)
        entries = tokens[order], g_pre[order], values[order]
        return RowGradients(start, *entries, x, g_out, key)


BACKEND = TritonBackend()
