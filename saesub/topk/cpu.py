"""The `RowBackend` on the CPU: the functions of cpu.cpp; `cpu_library.library` tells whether there
are any."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from saesub.topk import backend
from saesub.topk.backend import Decoded, RowBackend
from saesub.topk.cpu_library import (
    FEATURES_PER_BLOCK,
    TOKENS_PER_BLOCK,
    call,
    empty,
    threads,
)
from saesub.topk.cpu_shadow import CpuShadow
from saesub.topk.packed_encoder import can_search, search_all
from saesub.topk.prices import native_prices
from saesub.topk.subspace_watch import watch_of


class _AdamStruct(ctypes.Structure):
    """The struct AdamSettings of cpu.cpp."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "clip")),
        *((name, ctypes.c_int64) for name in ("step", "lazy")),
    ]


class RowGradients(backend.RowGradients):
    """The entries in CPU memory."""

    def _norms(self, W_enc) -> tuple[Tensor, Tensor | None]:
        blocks = -(-self.d_sae // FEATURES_PER_BLOCK)
        squares, through = empty(blocks, dtype=torch.float64), empty(blocks, self.x.shape[1])
        weights = None if W_enc is None else W_enc.T
        call("row_norms", *self._entries(), weights, *self._sizes(), squares, through, threads())
        return squares.sum(), None if W_enc is None else through.sum(0)

    def _adam(self, settings, step, clip, tensors, moved, shadow) -> None:
        s, lazy = settings, moved is not None
        passed = _AdamStruct(s.lr, s.beta1, s.beta2, s.eps, float(clip), int(step), lazy)
        where = [*self._entries(), *self._sizes()]
        rows = int((self.start.diff() > 0).sum()) if lazy else self.d_sae
        copy = [None, None] if shadow is None else shadow.given(rows)
        call("adam_rows", *where, passed, *tensors, moved, *copy, threads())

    def _entries(self) -> list[Tensor]:
        return [self.start, self.token, self.g_pre, self.value, self.x, self.g_out]

    def _sizes(self) -> list[int]:
        return [self.x.shape[1], self.g_out.shape[1], self.d_sae]


class CpuBackend(RowBackend):
    """The functions of cpu.cpp; `library` tells whether there are any."""

    device_type = "cpu"

    def shadow(self, sae, kept, *, in_subspace=True) -> CpuShadow | None:
        W_enc, W_dec, b_enc = sae.W_enc.detach(), sae.W_dec.detach(), sae.b_enc.detach()
        if not can_search(len(b_enc), int(sae.cfg.k)):
            return None
        scaled = sae.cfg.rescale_acts_by_decoder_norm
        watch = watch_of(sae, native_prices()) if in_subspace else None
        if not (isinstance(kept, CpuShadow) and kept.fits(W_enc, scaled, watch)):
            return CpuShadow(W_enc, W_dec, b_enc, scaled=scaled, watch=watch)
        kept.keep_up(W_enc, W_dec, b_enc)
        return kept

    def _search(self, x, W_enc, b_enc, k, feature_scale) -> tuple[Tensor, Tensor]:
        found = search_all(x, W_enc, b_enc, k, feature_scale)
        return found.features, found.pre

    def _decode(self, selected, values, W_dec, b_dec, target, weight) -> Decoded:
        """Reads each row once."""
        n, d = target.shape
        x_hat, g_out, g_pre = empty(n, d), empty(n, d), empty(len(values))
        sums = empty(-(-n // TOKENS_PER_BLOCK), d + 1)
        given = [selected.features, selected.offsets, values, W_dec, b_dec, target]
        call("decode", *given, n, d, 2.0 * weight, x_hat, g_out, g_pre, sums, threads())
        total = sums.sum(0, dtype=torch.float64)
        squared_error = (total[-1] / (2 * weight) ** 2).float()
        return Decoded(x_hat, g_out, g_pre, total[:-1].float(), squared_error)

    def _row_gradients(self, features, tokens, values, g_pre, x, g_out, d_sae) -> RowGradients:
        m = len(features)
        start, token = empty(d_sae + 1, dtype=torch.int64), empty(m, dtype=torch.int64)
        sorted_g_pre, sorted_value = empty(m), empty(m)
        into = [start, token, sorted_g_pre, sorted_value]
        call("sort", features, tokens, values, g_pre, m, d_sae, *into)
        return RowGradients(start, token, sorted_g_pre, sorted_value, x, g_out)


BACKEND = CpuBackend()
