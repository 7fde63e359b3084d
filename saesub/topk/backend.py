"""The interface of the code that runs a TopK step on one kind of device.

The gradient of a feature's rows of `W_enc` and `W_dec` is a sum over the few entries that use the
feature. A backend adds it up where it is needed, once for the norm and once inside Adam, and never
stores it. `saesub.topk.cpu` does so on the CPU, `saesub.topk.triton_backend` on CUDA.

The public methods check shapes, types and devices; the private ones hold the device's own code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesub.topk.ops import Selected, dense_search

if TYPE_CHECKING:  # they call the functions of a backend
    from saesub.topk.cpu_shadow import CpuShadow
    from saesub.topk.shadow import EncoderShadow

    Shadow = EncoderShadow | CpuShadow


@dataclass(frozen=True)
class Decoded:
    """A reconstruction and the gradients of its loss.

    Attributes:
        x_hat: (n, d_out) the reconstruction.
        g_out: (n, d_out) gradient of the loss with respect to it.
        g_pre: (m,) gradient with respect to the selected pre-activations.
        g_bias: (d_out,) sum of `g_out` over tokens.
        squared_error: summed over tokens and dimensions.
    """

    x_hat: Float[Tensor, "n d_out"]
    g_out: Float[Tensor, "n d_out"]
    g_pre: Float[Tensor, " m"]
    g_bias: Float[Tensor, " d_out"]
    squared_error: Float[Tensor, ""]


@dataclass(frozen=True)
class AdamSettings:
    """Adam's settings in one step, as a group of torch's optimizer has them.

    The rate of a step that a graph repeats is a tensor, which lies on the device.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class RowGradients(ABC):
    """The gradients of all features' rows, stored as the entries that they are sums of.

    With entries i of feature f, `start[f] <= i < start[f + 1]`: the encoder row's gradient is
    `sum g_pre[i] * x[token[i]]`, the decoder row's `sum value[i] * g_out[token[i]]`, the bias's
    `sum g_pre[i]`.
    """

    start: Int[Tensor, " d_sae_plus_1"]
    token: Int[Tensor, " m"]
    g_pre: Float[Tensor, " m"]
    value: Float[Tensor, " m"]
    x: Float[Tensor, "n d_in"]
    g_out: Float[Tensor, "n d_out"]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.start) - 1

    def norms(
        self, W_enc: Float[Tensor, "d_in d_sae"] | None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " d_in"] | None]:
        """Squared norm of all gradients, float64; and, if asked, `W_enc @ gradient of b_enc`."""
        if W_enc is not None:
            check(self.x.device.type, (W_enc.T, (self.d_sae, self.x.shape[1])))
        return self._norms(W_enc)

    def adam(
        self,
        settings: AdamSettings,
        step: Float[Tensor, ""],
        clip: Float[Tensor, ""],
        *tensors: Tensor,
        moved: Int[Tensor, " d_sae"] | None,
        shadow: Shadow | None = None,
    ) -> None:
        """Update W_enc, W_dec and b_enc, each given with its two moments, W_enc transposed.

        `step` is this update's number, from 1; `clip` a factor on every gradient. With `moved`,
        the last step at which each feature was updated, features without entries stay, and their
        moments decay when next updated; without it every feature moves. A `shadow` gets the rows
        that moved.
        """
        enc, dec = (self.d_sae, self.x.shape[1]), (self.d_sae, self.g_out.shape[1])
        shapes = [enc] * 3 + [dec] * 3 + [(self.d_sae,)] * 3
        check(self.x.device.type, *zip(tensors, shapes, strict=True))
        check(self.x.device.type, (moved, (self.d_sae,)), dtype=torch.int64)
        self._adam(settings, step, clip, tensors, moved, shadow)

    # What a device does with the checked arguments of the methods above, in the same order.
    @abstractmethod
    def _norms(self, W_enc) -> tuple[Tensor, Tensor | None]: ...

    @abstractmethod
    def _adam(self, settings, step, clip, tensors, moved, shadow) -> None: ...


class RowBackend(ABC):
    """The loops of a TopK step for one kind of device, all in float32.

    Attributes:
        device_type: the kind of device that all tensors must be on.
        skips_nan: whether an update whose clipping factor is NaN changes nothing.
    """

    device_type: str
    skips_nan = False

    def shadow(self, sae: Any, kept: Shadow | None, *, in_subspace: bool = True) -> Shadow | None:
        """The encoder in few bits, up to date, if the backend searches by one; `kept` is that of
        the last step, and `in_subspace` lets it leave coordinates out."""
        return None

    @torch.no_grad()
    def search(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        k: int,
        feature_scale: Float[Tensor, " d_sae"] | None = None,
        *,
        exact: bool = False,
    ) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
        """`ops.dense_search` by products in few bits, refined in float32; `exact`: in float32.

        `W_enc` must be feature-major in memory.
        """
        (n, d), d_sae = x.shape, W_enc.shape[1]
        wanted = [(x, (n, d)), (W_enc.T, (d_sae, d)), (b_enc, (d_sae,)), (feature_scale, (d_sae,))]
        check(self.device_type, *wanted)
        find = self._exact_search if exact else self._search
        return find(x, W_enc, b_enc, k, feature_scale)

    def decode(
        self,
        selected: Selected,
        values: Float[Tensor, " m"],
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"] | None,
        target: Float[Tensor, "n d_out"],
        weight: float,
    ) -> Decoded:
        """Reconstruct, and differentiate `weight * sum of (x_hat - target)²`."""
        (n, d), m = target.shape, len(selected.features)
        wanted = [(values, (m,)), (W_dec, (len(W_dec), d)), (b_dec, (d,)), (target, (n, d))]
        check(self.device_type, *wanted)
        where = [(selected.features, (m,)), (selected.offsets, (n + 1,))]
        check(self.device_type, *where, dtype=torch.int64)
        return self._decode(selected, values, W_dec, b_dec, target, weight)

    def row_gradients(
        self,
        features: Int[Tensor, " m"],
        tokens: Int[Tensor, " m"],
        values: Float[Tensor, " m"],
        g_pre: Float[Tensor, " m"],
        x: Float[Tensor, "n d_in"],
        g_out: Float[Tensor, "n d_out"],
        d_sae: int,
    ) -> RowGradients:
        """Sort the entries by feature, without those of value zero, which have no gradient."""
        n, m = len(x), len(features)
        check(self.device_type, (features, (m,)), (tokens, (m,)), dtype=torch.int64)
        of_tokens = [(x, (n, x.shape[1])), (g_out, (n, g_out.shape[1]))]
        check(self.device_type, (values, (m,)), (g_pre, (m,)), *of_tokens)
        return self._row_gradients(features, tokens, values, g_pre, x, g_out, d_sae)

    # What a device does with the checked arguments of the methods above, in the same order.
    @abstractmethod
    def _search(self, x, W_enc, b_enc, k, feature_scale) -> tuple[Tensor, Tensor]: ...

    def _exact_search(self, x, W_enc, b_enc, k, feature_scale) -> tuple[Tensor, Tensor]:
        return dense_search(x, W_enc, b_enc, k, feature_scale)

    @abstractmethod
    def _decode(self, selected, values, W_dec, b_dec, target, weight) -> Decoded: ...

    @abstractmethod
    def _row_gradients(self, features, tokens, values, g_pre, x, g_out, d_sae) -> RowGradients: ...


def check(
    device_type: str,
    *tensors_and_shapes: tuple[Tensor | None, tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Refuse what the device's code would misread: it trusts sizes and types, and checks nothing.

    Raises ValueError for another shape, TypeError for another type, device or layout in memory.
    """
    for tensor, shape in tensors_and_shapes:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} where {shape} is wanted")
        on_device = tensor.dtype == dtype and tensor.device.type == device_type
        if not (on_device and tensor.is_contiguous()):
            raise TypeError(
                f"a contiguous {dtype} tensor on {device_type} is wanted, not {tensor.dtype} on "
                f"{tensor.device} with strides {tensor.stride()}"
            )
