"""The active subspace of the tokens that an encoder reads, for a search by fewer coordinates.

A score is the product of a token and an encoder row. Most of it comes from the few directions that
hold nearly all of the tokens' variance. The rest is at most the product of the norms of what both
have outside these directions. Most rests are far from parallel, but a feature that fires on rare
tokens grows along what only these have: no smaller bound is safe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_STEP = 32  # between the ranks that are tried
_SAMPLE_TOKENS, _SAMPLE_FEATURES = 256, 4096
_AT_A_TIME = 32  # tokens of the sample, whose scores are kept meanwhile
_WORTH_IT = 0.9  # of the cost of the search by all coordinates
_QUANTILE = 0.99
_ROUNDING = 1e-6  # of a squared norm: what is left of it by subtraction is uncertain by that much


@dataclass(frozen=True)
class Prices:
    """What a search costs, in products of float32 numbers inside a matrix product.

    Attributes:
        product: one coordinate of one score.
        rotated: one number of a row of the encoder, multiplied by one direction.
        candidate: one coordinate of a candidate that is ranked, whose row is read for it alone.
        whole: one coordinate of one score of a token that has too many candidates, and is ranked by
            the product in all coordinates.
        rounding: half-width of the bound on a product's rounding error, in the subspace, times the
            root of its rank; as a share of the product of the norms.
        equally: whether all tokens are given as many candidates, as torch operators do.
    """

    product: float
    rotated: float
    candidate: float
    whole: float
    rounding: float = 0.0
    equally: bool = False


@dataclass(frozen=True)
class ActiveSubspace:
    """The directions that a search reads.

    Attributes:
        basis: (d_in, rank), orthonormal columns.
        candidates: so many features, at most, of 99 % of tokens have a bound that reaches the
            token's k-th best score.
        ranking: what ranking a token is expected to cost, in float32 scores inside a product.
    """

    basis: Float[Tensor, "d_in rank"]
    candidates: int
    ranking: float

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.basis.shape[1]


def left_out(
    x: Float[Tensor, "n d_in"], basis: Float[Tensor, "d_in rank"]
) -> tuple[Float[Tensor, "n rank"], Float[Tensor, " n"]]:
    """The coordinates in the basis, and the norm of the rest."""
    read = x @ basis
    whole, inside = (torch.linalg.vector_norm(t, dim=1).square_() for t in (x, read))
    return read, rest_of(whole, inside)


def rest_of(whole: Float[Tensor, " n"], inside: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The norm of what is outside a subspace, of the squared norms of the whole and inside."""
    return (whole - inside).clamp_min_(0).add_(whole, alpha=_ROUNDING).sqrt_()


def second_moment(x: Float[Tensor, "n d_in"]) -> Float[Tensor, "d_in d_in"]:
    """Sum of the outer products of tokens with themselves, float64, on the CPU: not every device
    has float64 and eigenvectors."""
    return (x.T @ x).cpu().double()


@torch.no_grad()
def active_subspace(
    moment: Float[Tensor, "d_in d_in"],
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    feature_scale: Float[Tensor, " d_sae"] | None,
    prices: Prices,
    moved: int,
    ranking: float,
) -> ActiveSubspace | None:
    """The subspace of least cost for tokens such as x; None if all coordinates cost less.

    `moment` is the second moment of many more tokens than there are coordinates, none of them in x;
    `moved` the number of rows of the encoder that have to be rotated for each search of n tokens;
    `ranking` what ranking a token costs in a search by all coordinates, as in `ActiveSubspace`.
    """
    try:
        directions = torch.linalg.eigh(moment).eigenvectors.flip(1).to(x)
    except torch.linalg.LinAlgError:  # pyright: ignore  # of numbers that are not finite, or nearly so
        return None
    if not directions.isfinite().all():
        return None
    d_in, d_sae = W_enc.shape
    tokens = x[:: max(1, len(x) // _SAMPLE_TOKENS)][:_SAMPLE_TOKENS]
    sample = _Sample(tokens, directions, W_enc, b_enc, k, feature_scale)
    chosen, least = None, _WORTH_IT * (d_sae * prices.product + ranking)
    for rank in range(_STEP, d_in, _STEP):
        cost = rank * (d_sae / d_in * prices.product + moved / len(x) * prices.rotated)
        if cost >= least:
            break
        counts = sample.candidates(rank, prices.rounding / rank**0.5)
        candidates, ranking = _ranking(counts, k, d_sae, prices)
        if cost + ranking < least:
            chosen, least = (rank, candidates, ranking), cost + ranking
    if chosen is None:
        return None
    rank, candidates, ranking = chosen
    # Mixed at random, so that no coordinate has most of the variance: 8 bits are then well used.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(rank, rank, generator=generator, dtype=torch.float32, device="cpu")
    mixing = torch.linalg.qr(drawn).Q.to(directions)
    return ActiveSubspace(directions[:, :rank] @ mixing, candidates, ranking)


def _ranking(
    counts: Float[Tensor, " tokens"], k: int, d_sae: int, prices: Prices
) -> tuple[int, float]:
    """How many candidates nearly all tokens have at most, and what ranking a token costs."""
    most, whole = int(counts.quantile(_QUANTILE)), d_sae * prices.whole
    if prices.equally:
        most = max(2 * k, most)
        return most, most * prices.candidate + (1 - _QUANTILE) * whole
    return most, float((counts * prices.candidate).clamp_max(whole).mean())


class _Sample:
    """Some tokens and some features, in the coordinates of the directions."""

    def __init__(self, tokens, directions, W_enc, b_enc, k, feature_scale) -> None:
        d_sae = W_enc.shape[1]
        scale = torch.ones_like(b_enc) if feature_scale is None else feature_scale
        best = [
            torch.addmm(b_enc, part, W_enc).mul_(scale).topk(k, dim=1).values
            for part in tokens.split(_AT_A_TIME)
        ]
        self._least = torch.cat(best).amin(1, keepdim=True)  # (tokens, 1)
        some = torch.arange(0, d_sae, -(-d_sae // _SAMPLE_FEATURES), device=W_enc.device)
        self._tokens, self._rows = tokens @ directions, W_enc.T[some] @ directions
        self._bias, self._scale = b_enc[some], scale[some]
        self._per_feature = d_sae / len(some)

    def candidates(self, rank: int, rounding: float) -> Float[Tensor, " tokens"]:
        """How many features of each token have a bound that reaches its k-th best score."""
        (tokens, token_rest), (rows, row_rest) = (
            (t[:, :rank], t[:, rank:].norm(dim=1)) for t in (self._tokens, self._rows)
        )
        bound = torch.addmm(self._bias, tokens, rows.T).addr_(token_rest, row_rest)
        bound.addr_(tokens.norm(dim=1), rows.norm(dim=1), alpha=rounding)
        return (bound * self._scale >= self._least).sum(1) * self._per_feature
