"""The active subspace of the tokens that an encoder reads, for a search by fewer coordinates.

A score is the product of a token and an encoder row. Most of it comes from the few directions that
hold nearly all of the tokens' variance. The rest is at most the product of the norms of what both
have outside these directions, times the largest cosine that such remainders have. The cosine is
measured on the best features of some tokens: it is far below 1, but no constant, since features
grow along the tokens they fire on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_STEP = 32  # between the ranks that are tried
_SAMPLE_TOKENS, _SAMPLE_FEATURES = 64, 4096
_MARGIN = 1.25  # by which the bound exceeds the largest cosine that mattered in the sample
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
    """

    product: float
    rotated: float
    candidate: float


@dataclass(frozen=True)
class ActiveSubspace:
    """The directions that a search reads.

    Attributes:
        basis: (d_in, rank), orthonormal columns.
        cosine: bound on the cosine of what they leave out of a token and of a feature.
        candidates: of 99 % of tokens at most so many features reach the k-th best score.
    """

    basis: Float[Tensor, "d_in rank"]
    cosine: float
    candidates: int

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.basis.shape[1]


def left_out(
    x: Float[Tensor, "n d_in"], basis: Float[Tensor, "d_in rank"]
) -> tuple[Float[Tensor, "n rank"], Float[Tensor, " n"]]:
    """The coordinates in the basis, and the norm of the rest."""
    read = x @ basis
    whole, inside = (torch.linalg.vector_norm(t, dim=1) for t in (x, read))  # no squares are kept
    square = whole.square_()
    return read, (square - inside.square_()).clamp_min_(0).add_(square, alpha=_ROUNDING).sqrt_()


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
) -> ActiveSubspace | None:
    """The subspace of least cost for tokens such as x; None if all coordinates cost less.

    `moment` is the second moment of at least as many tokens as there are coordinates; `moved` the
    number of rows of the encoder that have to be rotated for each search of n tokens.
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
    chosen, least = None, _WORTH_IT * d_in * (d_sae * prices.product + 1.5 * k * prices.candidate)
    for rank in range(_STEP, d_in, _STEP):
        cost = rank * (d_sae * prices.product + d_in * moved / len(x) * prices.rotated)
        if cost >= least:
            break
        cosine = _MARGIN * sample.cosine(rank)
        counts = sample.candidates(rank, cosine)
        cost += counts.mean().item() * d_in * prices.candidate
        if cost < least:
            chosen, least = (rank, cosine, int(counts.quantile(_QUANTILE))), cost
    if chosen is None:
        return None
    rank, cosine, candidates = chosen
    # Mixed at random, so that no coordinate has most of the variance: 8 bits are then well used.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(rank, rank, generator=generator, dtype=torch.float32, device="cpu")
    mixing = torch.linalg.qr(drawn).Q.to(directions)
    return ActiveSubspace(directions[:, :rank] @ mixing, cosine, candidates)


class _Sample:
    """Some tokens, their best features and some others, in the coordinates of the directions."""

    def __init__(self, tokens, directions, W_enc, b_enc, k, feature_scale) -> None:
        d_sae = W_enc.shape[1]
        scale = torch.ones_like(b_enc) if feature_scale is None else feature_scale
        scores = torch.addmm(b_enc, tokens, W_enc).mul_(scale)
        best = scores.topk(k, dim=1)
        self._least = best.values.amin(1)  # (tokens,)
        self._tokens = tokens @ directions
        few = torch.arange(0, d_sae, -(-d_sae // _SAMPLE_FEATURES), device=W_enc.device)
        self._best = _Rows(best.indices.flatten(), directions, W_enc, b_enc, scale)
        self._others = _Rows(few, directions, W_enc, b_enc, scale)
        self._of_token = torch.arange(len(tokens), device=few.device).repeat_interleave(k)
        self._per_other = d_sae / len(few)

    def cosine(self, rank: int) -> float:
        """The least bound on the cosine with which no best feature is lost."""
        rows, tokens = self._best, self._tokens[self._of_token]
        read = (tokens[:, :rank] * rows.rows[:, :rank]).sum(1)
        wanted = self._least[self._of_token] / rows.scale - rows.bias - read
        rest = tokens[:, rank:].norm(dim=1) * rows.rows[:, rank:].norm(dim=1)
        needed = torch.where((rest > 0) & (rows.scale > 0), wanted / rest, 0.0)
        return float(needed.nan_to_num(0, 0, 0).amax().clamp(0, 1))

    def candidates(self, rank: int, cosine: float) -> Float[Tensor, " tokens"]:
        """How many features of each token have a bound that reaches its k-th best score."""
        rows, tokens = self._others, self._tokens
        bound = torch.addmm(rows.bias, tokens[:, :rank], rows.rows[:, :rank].T)
        rest = rows.rows[:, rank:].norm(dim=1)
        bound.addr_(tokens[:, rank:].norm(dim=1), rest, alpha=cosine)
        reached = (bound * rows.scale >= self._least[:, None]).sum(1) * self._per_other
        return reached


class _Rows:
    def __init__(self, features, directions, W_enc, b_enc, scale) -> None:
        self.rows = W_enc.T[features] @ directions
        self.bias, self.scale = b_enc[features], scale[features]
