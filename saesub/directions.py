"""Where a dictionary's features may start: unit directions drawn from a spectrum or from data.

Each rule works in the coordinates of the top `rank` principal directions U of the centred
activations, with variances λ:

- "flat": isotropic in span(U). Active Subspace Initialization (arXiv 2508.16929).
- "spectrum": Gaussian with variances √λ, half-way between flat and the covariance of the data.
- "data": centred activations of random tokens.
- "whitened_data": centred activations of random tokens, coordinates divided by λ^¼: half-way
  between the data and white data, directions that occur with less of the few strong ones that all
  activations share.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from saesub.errors import SaesubError, near_names
from saesub.spectrum import Spectrum

Directions = Literal["flat", "spectrum", "data", "whitened_data"]
FROM_DATA = ("data", "whitened_data")

_LEAST_VARIANCE = 1e-6  # of the largest; what is below has no direction to speak of


def draw_directions(
    spectrum: Spectrum,
    rank: int,
    directions: Directions,
    generator: torch.Generator,
    *,
    n: int,
    activations: Float[Tensor, "tokens d"] | None = None,
) -> Float[Tensor, "n d"]:
    """`n` unit directions by one of the rules above, float32.

    Raises:
        SaesubError: an unknown rule, or activations that are missing, too few, of another width,
            or given to a rule that uses none.
    """
    _check(directions, spectrum, n, activations)
    basis = spectrum.basis(rank)
    variance = spectrum.eigenvalues[:rank].float()
    if activations is None:
        coordinates = torch.randn(n, rank, generator=generator)
        if directions == "spectrum":
            coordinates *= variance.pow(0.25)
    else:
        tokens = torch.randperm(len(activations), generator=generator)[:n]
        rows = activations[tokens.to(activations.device)].cpu().float()
        coordinates = (rows - spectrum.mean.float()) @ basis
        if directions == "whitened_data":
            coordinates /= variance.clamp(min=_LEAST_VARIANCE * float(variance[0])).pow(0.25)
    return torch.nn.functional.normalize(coordinates, dim=-1) @ basis.T


def _check(directions: str, spectrum: Spectrum, n: int, activations: Tensor | None) -> None:
    if directions not in get_args(Directions):
        known = get_args(Directions)
        raise SaesubError(f"Unknown directions {directions!r}: {near_names(directions, known)}")
    if directions not in FROM_DATA:
        if activations is not None:
            raise SaesubError(f"directions={directions!r} are drawn from the spectrum alone.")
        return
    if activations is None:
        raise SaesubError(
            f"directions={directions!r} start at tokens of the data: pass activations=(n, d) of "
            "the same hook point as the spectrum's."
        )
    if activations.ndim != 2 or activations.shape[1] != spectrum.d or len(activations) < n:
        raise SaesubError(
            f"{n:,} features need as many activations of width {spectrum.d}, not a tensor of shape "
            f"{tuple(activations.shape)}: pass more tokens of the spectrum's hook point."
        )
