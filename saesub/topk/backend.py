"""What a device must be able to do for `saesub.topk.step.row_step`, and what it hands back.

The gradient of a feature's rows of `W_enc` and `W_dec` is a sum over the few entries that use the
feature. It is added up where it is needed, once for the norm and once inside Adam, and never held.
`saesub.topk.cpu` does so on the CPU, `saesub.topk.triton_backend` on CUDA.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from saesub.topk.ops import Search, Selected


class RowBackend(Protocol):
    """A module with the loops of a TopK step for one kind of device, all in float32.

    Attributes:
        search: by products in few bits, refined in float32.
        exact_search: by the whole float32 product.
    """

    @property
    def search(self) -> Search: ...

    @property
    def exact_search(self) -> Search: ...

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
        ...

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
        """Sort entries by feature; those of value zero have no gradient and are left out."""
        ...


@dataclass(frozen=True)
class Decoded:
    """A reconstruction and what goes back from it.

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
    """Adam's settings in one step, as a group of torch's optimizer has them."""

    lr: float
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class RowGradients(ABC):
    """The gradients of all features' rows, held as the entries they are sums of.

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

    def check_parameters(self, tensors: Sequence[Tensor]) -> None:
        """Refuse `tensors` of other shapes than `adam` takes."""
        enc, dec = (self.d_sae, self.x.shape[1]), (self.d_sae, self.g_out.shape[1])
        shapes = [enc] * 3 + [dec] * 3 + [(self.d_sae,)] * 3
        check_shapes(*(part for pair in zip(tensors, shapes, strict=True) for part in pair))

    @abstractmethod
    def norms(
        self, W_enc: Float[Tensor, "d_in d_sae"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " d_in"]]:
        """Squared norm of all gradients, float64; and `W_enc @ gradient of b_enc`."""

    @abstractmethod
    def adam(
        self,
        settings: AdamSettings,
        step: Float[Tensor, ""],
        clip: Float[Tensor, ""],
        *tensors: Tensor,
        moved: Int[Tensor, " d_sae"] | None,
    ) -> None:
        """One update of W_enc, W_dec and b_enc, each given with its two moments, W_enc transposed.

        `step` is this update's number, from 1; `clip` a factor on every gradient. With `moved`,
        the last step at which each feature was updated, features without entries stay, and their
        moments decay when next updated; without it every feature moves.
        """


def check_shapes(*tensors_and_shapes: Any) -> None:
    """Compiled code trusts its sizes, so that a wrong one would read beyond a tensor's end."""
    for tensor, shape in zip(tensors_and_shapes[::2], tensors_and_shapes[1::2], strict=True):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} where {shape} is wanted")
