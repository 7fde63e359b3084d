"""Each token's k best features by torch's own 8-bit product, ranked again in full precision.

For CPUs with AVX-512 VNNI where `saesub.native` has no compiler: torch operators only. As there,
8-bit scores and statistical bounds on their error say which features can be among the k best;
tokens for which the bounds do not hold are ranked by the whole product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesub.sparse_ops import Selected, dense_search, row_products, top_k

# With fewer, selecting the candidates takes what the product saves; measured at k 32.
LEAST_FEATURES_PER_CANDIDATE = 128
_STEPS = 127  # of the 8-bit range, either side of zero
_LEAST_STEP = 1e-30  # a row of zeros has steps too
_SCORES_AT_A_TIME = 2**22  # stay in the last cache: 16 MB in int32 and as much in float32
_LEAST_TOKENS = 32  # of a block, or the product is no longer bound by arithmetic
_ROWS_AT_A_TIME = 512

# A rounding error is uniform over a step: 1/√12 of it on average, if it has no direction.
_BOUND_WIDTH = 5 / 12**0.5
# One massive coordinate takes the range for itself, so that the others (of fewer steps than
# _MASSIVE) round towards zero, along the vector: so much, in steps, is tolerated in a token.
_MASSIVE, _ALIGNED_ERROR = 16, 1.3


_int_mm = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]


@cache
def available() -> bool:
    """Whether this CPU multiplies 8-bit integers fast, and without saturating, in torch."""
    if not getattr(torch.cpu, "get_capabilities", dict)().get("avx512_vnni"):
        return False
    extreme = torch.full((64, 576), _STEPS, dtype=torch.int8, device="cpu")
    return bool((_int_mm(extreme, -extreme.T) == -576 * _STEPS**2).all())


@torch.no_grad()
def search(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    feature_scale: Float[Tensor, " d_sae"] | None = None,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """`dense_search` in about half its time, for a `W_enc` that lies feature-major in memory.

    The 2 k + 32 best by 8-bit products are ranked in the precision of `x`. A feature left out is
    wrongly so only if its rounding error is five standard deviations or more; a token whose k-th
    best lies within that of the candidates' last is ranked by the whole product, and so are all
    tokens of narrow dictionaries, of other precisions than float32, and where there is no VNNI.
    """
    width = 2 * k + 32
    # Of vectors of one number torch's 8-bit product is wrong.
    narrow = W_enc.shape[1] < LEAST_FEATURES_PER_CANDIDATE * width or x.shape[1] == 1
    if narrow or x.device.type != "cpu" or x.dtype != torch.float32 or not available():
        return dense_search(x, W_enc, b_enc, k, feature_scale)
    scale = torch.ones_like(b_enc) if feature_scale is None else feature_scale
    tokens, table = Rounded.of(x), Rounded.of(W_enc.T)
    candidates, scores = _candidates(tokens, table, b_enc * scale, scale, width)
    pre = row_products(x, Selected.equally(candidates, scores, len(b_enc)), W_enc.T)
    pre = pre.view_as(candidates) + b_enc[candidates]
    best = (pre * scale[candidates]).topk(k, dim=-1, sorted=False)
    features, pre = candidates.gather(1, best.indices), pre.gather(1, best.indices)
    error = _largest_error(tokens, table, scale)
    # A comparison with NaN is false: what is not finite is ranked, and shows, by the product.
    holds = best.values.amin(1) >= scores.amin(1) * tokens.step + error
    failed = ~(holds & (tokens.aligned < _ALIGNED_ERROR))
    if bool(failed.any()):
        features[failed], pre[failed] = dense_search(x[failed], W_enc, b_enc, k, feature_scale)
    return features, pre


@dataclass(frozen=True)
class Rounded:
    """Vectors in 8 bits: row i is about `whole[i] * step[i]`.

    Attributes:
        whole: (n, d) int8.
        step: (n,) length of one of the 127 steps to a row's largest magnitude.
        norm: (n,) of the rows before rounding.
        aligned: (n,) steps by which the rounding error lies along the row itself, massive
            coordinates aside.
    """

    whole: Int[Tensor, "n d"]
    step: Float[Tensor, " n"]
    norm: Float[Tensor, " n"]
    aligned: Float[Tensor, " n"]

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> Rounded:
        """Round some rows at a time, which stay in cache."""
        parts = [_rounded(part) for part in rows.split(_ROWS_AT_A_TIME)]
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _rounded(rows: Float[Tensor, "n d"]) -> tuple[Tensor, ...]:
    step = rows.abs().amax(1, keepdim=True).div_(_STEPS).clamp_min_(_LEAST_STEP)
    steps = rows / step
    whole = steps.round()
    error = steps - whole
    steps.masked_fill_(whole.abs() > _MASSIVE, 0)
    aligned = (error * steps).sum(1).abs_() / steps.norm(dim=1).clamp_min_(_LEAST_STEP)
    return whole.to(torch.int8), step.squeeze(1), rows.norm(dim=1), aligned


def _candidates(
    tokens: Rounded,
    table: Rounded,
    bias: Float[Tensor, " d_sae"],
    scale: Float[Tensor, " d_sae"],
    width: int,
) -> tuple[Int[Tensor, "n width"], Float[Tensor, "n width"]]:
    """The `width` best features of every token, and their scores over the token's step."""
    n, d_sae = len(tokens.whole), len(bias)
    features = torch.empty(n, width, dtype=torch.int64, device=bias.device)
    scores, step = bias.new_empty(n, width), table.step * scale
    block = max(_LEAST_TOKENS, _SCORES_AT_A_TIME // d_sae)
    products = torch.empty(block, d_sae, dtype=torch.int32, device=bias.device)
    scored = bias.new_empty(block, d_sae)
    for start in range(0, n, block):
        rows = slice(start, min(start + block, n))
        size = rows.stop - start
        _int_mm(tokens.whole[rows], table.whole.T, out=products[:size])
        found = torch.mul(products[:size], step, out=scored[:size])
        found.addr_(1 / tokens.step[rows], bias)
        features[rows] = top_k(found, width)
        torch.gather(found, 1, features[rows], out=scores[rows])
    return features, scores


def _largest_error(
    tokens: Rounded, table: Rounded, scale: Float[Tensor, " d_sae"]
) -> Float[Tensor, " n"]:
    """Bound on the error of any feature's score, for every token."""
    of_token = _BOUND_WIDTH * (table.norm * scale).amax()
    width = (2 * table.aligned).clamp_min(_BOUND_WIDTH)
    of_table = (width * table.step * scale).amax()
    return of_token * tokens.step + of_table * tokens.norm
