"""Where a dictionary's features may start: unit directions drawn from a spectrum or from data.

Each rule works in the coordinates of the top `rank` principal directions U of the centred
activations, with variances λ:

- "flat": isotropic in span(U). Active Subspace Initialization (arXiv 2508.16929).
- "spectrum": Gaussian with variances √λ, half-way between flat and the covariance of the data.
- "data": centred activations of random tokens.
- "whitened_data": whitened activations of random tokens, coordinates divided by √λ: what sets a
  token apart from the others, without the few strong directions that all of them share. Such
  directions vary little where λ is small, so the encoder's columns are scaled until all features
  vary alike (`equal_variance`); else those of low variance would never be among the top k.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from saesub.activations.checks import require_finite
from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError, near_names
from saesub.precision import where_float64

Directions = Literal["flat", "spectrum", "data", "whitened_data"]
FROM_DATA = ("data", "whitened_data")

_CANDIDATES = 2  # tokens drawn for each whitened feature
_COMPARED = 2**15  # candidates among which a token must differ: the cost grows with it
_ROWS = 2048
_LEAST_VARIANCE = 1e-6  # of the largest; what is below has no direction to speak of
_LEAST_PART = 1e-5  # of a token's distance from the mean; a smaller part may be rounding alone


def random_directions(
    spectrum: Spectrum, rank: int, directions: Directions, n: int, generator: torch.Generator
) -> Float[Tensor, "n d"]:
    """`n` unit directions by a rule that needs the spectrum alone, float32."""
    coordinates = torch.randn(n, rank, generator=generator, dtype=torch.float32)
    if directions == "spectrum":
        coordinates *= spectrum.eigenvalues[:rank].float().pow(0.25)
    return normalize(coordinates, dim=-1) @ spectrum.basis(rank).T


def draw_tokens(
    spectrum: Spectrum,
    rank: int,
    directions: Directions,
    n: int,
    generator: torch.Generator,
    activations: Float[Tensor, "tokens d"],
) -> Int[Tensor, " n"]:
    """`n` different tokens to start at: any for "data"; for "whitened_data" the n of twice as many
    that are least like any drawn before them, since many tokens of a text are nearly the same. They
    are compared on the activations' device, whose rounding decides among those that are as like.
    Raises SaesubError where most are the same."""
    candidates = n if directions == "data" else _CANDIDATES * n
    tokens = torch.randperm(len(activations), generator=generator)[:candidates]
    drawn = activations[tokens.to(activations.device)]
    _check_different(drawn, n)
    if directions == "data":
        return tokens
    rows, lost = _coordinates(spectrum, rank, directions, drawn)
    likeness = _likeness(rows.to(activations.device)).cpu()  # the long part, on a GPU if they are
    return tokens[likeness.masked_fill_(lost, torch.inf).argsort(stable=True)[:n]]


def _check_different(drawn: Float[Tensor, "tokens d"], n: int) -> None:
    """Refuse tokens of which fewer than half of the n features would get one of their own."""
    weights = torch.linspace(1, 2, drawn.shape[1], device=drawn.device)  # equal rows, equal sums
    sums = [(block.float() * weights).sum(-1) for block in drawn.split(_ROWS)]  # no second copy
    different = len(torch.cat(sums).unique())
    if different < n / 2:
        raise SaesubError(
            f"Only {different:,} of the {len(drawn):,} tokens drawn for {n:,} features differ, and "
            "features that start at the same token are the same: pass more text, without padding, "
            "or directions='flat'."
        )


def directions_at(
    spectrum: Spectrum, rank: int, directions: Directions, rows: Float[Tensor, "n d"]
) -> Float[Tensor, "n d"]:
    """The unit directions of given tokens' activations by a rule that starts at data, float32.

    Raises SaesubError for tokens that have none within the subspace.
    """
    coordinates, lost = _coordinates(spectrum, rank, directions, rows)
    if bool(lost.any()):
        raise SaesubError(
            f"{int(lost.sum()):,} of the {len(rows):,} tokens to start at lie at the mean of the "
            f"activations, or outside the spectrum's top {rank} directions: pass other activations "
            "or a larger d_init."
        )
    return coordinates @ spectrum.basis(rank).T


def _coordinates(
    spectrum: Spectrum, rank: int, directions: Directions, rows: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "n rank"], Bool[Tensor, " n"]]:
    """Unit coordinates, and which tokens have no direction in the subspace, but for rounding."""
    basis, variance = spectrum.basis(rank), spectrum.eigenvalues[:rank].float()
    centred = rows.float().to(basis) - spectrum.mean.float()
    coordinates = centred @ basis
    lost = coordinates.norm(dim=-1) <= _LEAST_PART * centred.norm(dim=-1)
    if directions == "whitened_data":
        coordinates /= variance.clamp(min=_LEAST_VARIANCE * float(variance[0])).sqrt()
    return normalize(coordinates, dim=-1), lost


def _likeness(rows: Float[Tensor, "n rank"]) -> Float[Tensor, " n"]:
    """The largest cosine of each unit row with any of the `_COMPARED` rows before it."""
    likeness = rows.new_full((len(rows),), -1.0)
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS]
        first = max(0, start - _COMPARED)
        cosine = block @ rows[first : start + len(block)].T
        column = torch.arange(cosine.shape[1], device=rows.device)
        later = column >= column[start - first :].unsqueeze(-1)
        likeness[start : start + len(block)] = cosine.masked_fill_(later, -1).amax(-1)
    return likeness


def reading_directions(
    rows: Float[Tensor, "n d"],
    input_spectrum: Spectrum,
    rank: int,
    read: Float[Tensor, "tokens d_in"],
    written: Float[Tensor, "tokens d"],
) -> Float[Tensor, "n d_in"]:
    """For each direction that is written, the unit direction of what is read that predicts it best.

    Least squares over the pairs, on the top `rank` principal directions of what is read. Of an
    autoencoder, which reads what it writes, it is the row itself, so this is what a tie is between
    two spaces. Raises SaesubError for no more tokens than directions.
    """
    if len(read) <= rank:
        raise SaesubError(
            f"{len(read)} pairs of activations cannot tie an encoder within {rank} directions: "
            f"pass more than {rank}, better {10 * rank}, or a smaller d_init."
        )
    basis = input_spectrum.basis(rank).double()
    rows, read, written = (where_float64(x) for x in (rows, read, written))
    read_mean, written_mean = (x.mean(0, dtype=torch.float64).to(basis) for x in (read, written))
    gram, together = basis.new_zeros(rank, rank), basis.new_zeros(rank, written.shape[1])
    for x, y in zip(read.split(_ROWS), written.split(_ROWS), strict=True):
        seen = (x.to(basis) - read_mean) @ basis
        gram += seen.T @ seen
        together += seen.T @ (y.to(basis) - written_mean)
    gram.diagonal().add_(_LEAST_VARIANCE * gram.diagonal().max())
    predicts = torch.linalg.solve(gram, together)
    return normalize(rows.to(basis) @ predicts.T @ basis.T, dim=-1).float()


def equal_variance(
    rows: Float[Tensor, "n d"], covariance: Float[Tensor, "d d"]
) -> Float[Tensor, "n 1"]:
    """Factors around 1 that give the activations the same variance along all `rows`."""
    deviation = ((rows @ covariance.to(rows)) * rows).sum(-1, keepdim=True).sqrt()
    return deviation.median() / deviation


def check_directions(
    directions: str, spectrum: Spectrum, n: int, activations: Tensor | None
) -> None:
    """Raise SaesubError for an unknown rule, or activations that are missing, too few, of another
    width, or not finite."""
    if directions not in get_args(Directions):
        known = get_args(Directions)
        raise SaesubError(f"Unknown directions {directions!r}: {near_names(directions, known)}")
    if activations is None and directions not in FROM_DATA:
        return
    if activations is None:
        raise SaesubError(
            f"directions={directions!r} start at tokens of the data: pass activations=(n, d) of "
            "the same hook point as the spectrum's."
        )
    least = n if directions in FROM_DATA else 1
    if activations.ndim != 2 or activations.shape[1] != spectrum.d or len(activations) < least:
        wanted = f"{n:,} features need as many" if least == n else "The norm is fitted to"
        raise SaesubError(
            f"{wanted} activations of width {spectrum.d}, not a tensor of shape "
            f"{tuple(activations.shape)}: pass more tokens of the spectrum's hook point."
        )
    require_finite(activations)
