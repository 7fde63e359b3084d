"""How well an SAE reconstructs activations: FVU and L0."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any, NamedTuple

import torch
from sae_lens import SAE, Transcoder
from torch import Tensor

from saesub.errors import SaesubError
from saesub.evaluation.passes import encoded
from saesub.precision import where_float64
from saesub.topk.encode import autoencoder_of, times_fired


class Reconstruction(NamedTuple):
    """How well an SAE reconstructs: fraction of variance unexplained, active features a token."""

    fvu: float
    l0: float
    n_tokens: int


@torch.no_grad()
def reconstruction(
    sae: SAE[Any], activations: Tensor | Iterable[Tensor], *, progress: bool = True
) -> Reconstruction:
    """FVU = Σ‖x − x̂‖² / Σ‖x − mean‖² and mean L0; the mean is that of these activations.

    SAELens' own explained variance is a difference of float32 sums, which a large mean ruins. A
    BatchTopK SAE in training form shares out its features over each block of at most 1,024 tokens.

    Args:
        sae: any SAELens SAE, in training or inference form.
        activations: (n, d_in), or an iterable of such blocks, as the SAE was trained on them:
            scaled if its trainer's scaler has not been folded in.
        progress: show a bar, if it takes more than a second.

    Raises:
        SaesubError: there are no activations, they are constant, have another width or hold NaN
            or Inf, or `sae` is a transcoder or one that `saesub.topk.encode.encoder_of` refuses.
    """
    if isinstance(sae, Transcoder):
        raise SaesubError(
            "reconstruction() judges autoencoders, and a transcoder writes to another place than "
            "it reads: use saesub.extras.transcoders.transcoder_reconstruction"
        )
    blocks = encoded(sae, activations, autoencoder_of(sae), progress=progress)
    return unexplained((x, rebuilt, features) for x, (features, rebuilt) in blocks)


@torch.no_grad()
def unexplained(blocks: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Reconstruction:
    """FVU and mean L0 over blocks (targets, reconstructions, features) of the same tokens.

    Raises SaesubError if there are no blocks, or targets or reconstructions are not finite, or the
    targets are constant.
    """
    n, active, error, squares = 0, 0, 0.0, 0.0
    origin = sums = torch.zeros(())
    for target, reconstructed, features in blocks:
        if not len(target):
            continue
        y = where_float64(target).double()
        if n == 0:
            origin = y[0]  # a large mean would cancel the variance
        error += (where_float64(reconstructed) - y).square().sum().item()
        squares += (y - origin).square().sum().item()
        sums = sums.to(y) + (y - origin).sum(0)
        active += int(times_fired(features).sum())
        n += len(y)
    variance = squares - sums.square().sum().item() / max(n, 1)
    if not variance > 0:
        raise SaesubError(
            "FVU needs finite activations that vary: none were given, all are equal, or some are "
            "NaN or Inf"
        )
    if not isfinite(error):
        raise SaesubError(
            "the SAE's reconstructions of these activations are not finite: convert the SAE by "
            "sae.to(dtype=torch.float32)"
        )
    return Reconstruction(error / variance, active / n, n)
