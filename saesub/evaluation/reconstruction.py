"""How well an SAE reconstructs: FVU and L0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from saesub.errors import SaesubError
from saesub.evaluation.dead_features import times_fired
from saesub.topk.encode import encoder_of, flat_heads


@dataclass(frozen=True)
class Reconstruction:
    """How well an SAE reconstructs: fraction of variance unexplained, active features a token."""

    fvu: float
    l0: float
    n_tokens: int


@torch.no_grad()
def reconstruction(sae: SAE[Any], activations: Iterable[Float[Tensor, "n d"]]) -> Reconstruction:
    """FVU = Σ‖x − x̂‖² / Σ‖x − mean‖² and mean L0 of any SAELens SAE, the mean being that of these
    very activations.

    Give activations as the SAE was trained on them: scaled, if its trainer's scaler has not been
    folded in; heads concatenated. SAELens' own explained variance is a difference of float32 sums,
    which a large mean ruins; here the variance is merged block by block. Raises SaesubError if
    there are no activations, they are constant, or `sae` is a transcoder.
    """
    if hasattr(sae.cfg, "d_out"):
        raise SaesubError(
            "reconstruction() judges autoencoders; a transcoder's target is not what it reads: "
            "use saesub.extras.transcoders.transcoder_reconstruction"
        )

    def judged() -> Iterator[Judged]:
        encode = encoder_of(sae)
        for x in activations:
            x = x.to(sae.device, torch.float32)
            with flat_heads(sae):
                features = encode(x)
                yield Judged(x, sae.decode(features), features)

    return unexplained(judged())


class Judged(NamedTuple):
    """A block of what was to be reconstructed, what came out, and the features behind it."""

    target: Float[Tensor, "n d"]
    reconstructed: Float[Tensor, "n d"]
    features: Float[Tensor, "n d_sae"]


@torch.no_grad()
def unexplained(blocks: Iterable[Judged]) -> Reconstruction:
    """FVU and mean L0 over blocks of tokens, each seen once.

    Raises SaesubError if there are no blocks, or the targets are constant.
    """
    n, mean, total, error, active = 0, torch.zeros(()), 0.0, 0.0, 0
    for y, reconstructed, features in blocks:
        active += int(times_fired(features).sum())
        error += (reconstructed - y).double().square().sum().item()
        block_mean = y.double().mean(0)
        total += (y - block_mean).square().sum().item()
        delta = block_mean - mean.to(block_mean)
        total += delta.square().sum().item() * n * len(y) / (n + len(y))
        mean = mean.to(delta) + delta * (len(y) / (n + len(y)))
        n += len(y)
    if n == 0 or total == 0:
        raise SaesubError("FVU needs activations that vary: none were given, or all are equal")
    return Reconstruction(fvu=error / total, l0=active / n, n_tokens=n)
