"""How well an SAE reconstructs activations: FVU and L0."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, Transcoder
from torch import Tensor

from saesub.errors import SaesubError
from saesub.evaluation.passes import Activations, encoded
from saesub.precision import where_float64
from saesub.topk.encode import autoencoder_of, times_fired


class Reconstruction(NamedTuple):
    """How well an SAE reconstructs: fraction of variance unexplained, active features a token."""

    fvu: float
    l0: float
    n_tokens: int


@torch.no_grad()
def reconstruction(
    sae: SAE[Any], activations: Activations, *, progress: bool = True
) -> Reconstruction:
    """FVU = Σ‖x − x̂‖² / Σ‖x − mean‖² and mean L0; the mean is that of these activations.

    SAELens' own explained variance is a difference of float32 sums, which a large mean ruins. A
    BatchTopK SAE in training form shares out its features over each block of at most 1,024 tokens.

    Args:
        sae: any SAELens SAE, in training or inference form.
        activations: (n, d_in), a store, or an iterable of blocks of rows, as the SAE was trained
            on them: scaled if its trainer's scaler has not been folded in.
        progress: show a bar, if it takes more than a second.

    Raises:
        SaesubError: there are no activations, they are constant, have another width or hold NaN
            or Inf, or `sae` is a transcoder or one that `saesub.topk.encode.encoder_of` refuses.
    """
    require_autoencoder(sae)
    blocks = encoded(sae, activations, autoencoder_of(sae), progress=progress)
    return unexplained((x, rebuilt, features) for x, (features, rebuilt) in blocks)


def require_autoencoder(sae: SAE[Any]) -> None:
    """Raise SaesubError for a transcoder."""
    if isinstance(sae, Transcoder):
        raise SaesubError(
            "a transcoder writes to another place than it reads, and autoencoders are judged here: "
            "use saesub.extras.transcoders.transcoder_reconstruction"
        )


@torch.no_grad()
def unexplained(blocks: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Reconstruction:
    """FVU and mean L0 over blocks (targets, reconstructions, features) of the same tokens.

    Raises SaesubError if there are no blocks, or targets or reconstructions are not finite, or the
    targets are constant.
    """
    fit = Fit()
    for target, reconstructed, features in blocks:
        fit.add(target, reconstructed, times_fired(features))
    return fit.result()


class Fit:
    """The sums behind FVU and L0, kept in float64 on the device without waiting for it."""

    _origin: Tensor

    def __init__(self) -> None:
        self._n = 0
        self._active: Any = 0
        self._error: Any = 0.0
        self._squares: Any = 0.0
        self._sums: Any = 0.0

    def add(
        self,
        target: Float[Tensor, "n d"],
        reconstructed: Float[Tensor, "n d"],
        fired: Int[Tensor, " d_sae"],
    ) -> None:
        """Add a block of n tokens, in which each feature fired so often."""
        if not len(target):
            return
        y = where_float64(target).double()
        if self._n == 0:
            self._origin = y[0]  # a large mean would cancel the variance
        origin = self._origin.to(y.device)
        self._error = self._error + (where_float64(reconstructed) - y).square().sum()
        self._squares = self._squares + (y - origin).square().sum()
        self._sums = self._sums + (y - origin).sum(0)
        self._active = self._active + fired.sum()
        self._n += len(y)

    def result(self) -> Reconstruction:
        """What the blocks make together. Raises SaesubError as `unexplained`."""
        sums = torch.as_tensor(self._sums, dtype=torch.float64)
        error, variance = (
            float(self._error),
            float(self._squares - sums.square().sum() / max(self._n, 1)),
        )
        if not variance > 0:
            raise SaesubError(
                "FVU needs finite activations that vary: none were given, all are equal, or some "
                "are NaN or Inf"
            )
        if not isfinite(error):
            raise SaesubError(
                "the SAE's reconstructions of these activations are not finite: convert the SAE by "
                "sae.to(dtype=torch.float32)"
            )
        return Reconstruction(error / variance, int(self._active) / self._n, self._n)
