"""Each token's k best features without the (n_tokens, d_sae) scores: block by block of features.

Made for CUDA, where products in bfloat16 run on tensor cores; only torch operators are used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesub.topk.ops import LEAST_FEATURES_PER_K, Selected, dense_search, row_products, top_k

_TOKENS_PER_BLOCK, _FEATURES_PER_BLOCK = 2048, 32_768  # their scores in bfloat16: 134 MB

# (x, selected, W_enc transposed) -> (m,) their products; as `ops.row_products`
Products = Callable[[Tensor, Selected, Tensor], Tensor]


@torch.no_grad()
def search(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    feature_scale: Float[Tensor, " d_sae"] | None = None,
    *,
    exact: bool = False,
    products: Products = row_products,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """`dense_search`, for a `W_enc` that lies feature-major in memory.

    The 2 k + 32 best by bfloat16 products are ranked again by `products` in the precision of `x`.
    Unlike the 8-bit search on the CPU there is no bound on what that misses; `saesub check-gpu`
    measures its recall of the float32 ranking. `exact` finds the k best by whole products in
    the precision of `x`, with TF32 if torch is set to allow it.
    """
    d_sae = W_enc.shape[1]
    if feature_scale is not None:  # -inf times a scale of 0 is NaN
        feature_scale = torch.where(b_enc == -torch.inf, 1.0, feature_scale)
    if d_sae < LEAST_FEATURES_PER_K * k:
        return dense_search(x, W_enc, b_enc, k, feature_scale)
    dtype = x.dtype if exact else torch.bfloat16
    width = k if exact else min(d_sae, 2 * k + 32)
    scale = torch.ones_like(b_enc) if feature_scale is None else feature_scale
    features, scores = _candidates(x.to(dtype), W_enc, b_enc, scale, width)
    pre = products(x, Selected.equally(features, scores, d_sae), W_enc.T).view_as(features)
    # Where fewer features than asked for have a finite bias, entries of -inf fill up.
    pre = torch.where(scores == -torch.inf, -torch.inf, pre + b_enc[features])
    best = (pre * scale[features]).topk(k, dim=-1, sorted=False).indices
    return features.gather(1, best), pre.gather(1, best)


def _candidates(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    scale: Float[Tensor, " d_sae"],
    width: int,
) -> tuple[Int[Tensor, "n width"], Float[Tensor, "n width"]]:
    """The `width` best features of every token and their scores, in the precision of `x`."""
    scores = x.new_full((len(x), width), -torch.inf)
    features = torch.zeros(scores.shape, dtype=torch.int64, device=x.device)
    for first in range(0, W_enc.shape[1], _FEATURES_PER_BLOCK):
        block = slice(first, first + _FEATURES_PER_BLOCK)
        # Folding the scale into the weights costs a block of them, not a pass over its scores.
        weights = torch.empty_like(W_enc.T[block], dtype=x.dtype)
        torch.mul(W_enc.T[block], scale[block, None], out=weights)
        bias = (b_enc[block] * scale[block]).to(x.dtype)
        for start in range(0, len(x), _TOKENS_PER_BLOCK):
            rows = slice(start, start + _TOKENS_PER_BLOCK)
            found = torch.addmm(bias, x[rows], weights.T)
            inside = top_k(found, min(width, len(bias)))
            both = torch.cat([scores[rows], found.gather(1, inside)], 1)
            ids = torch.cat([features[rows], inside + first], 1)
            scores[rows], best = both.topk(width, dim=-1, sorted=False)
            features[rows] = ids.gather(1, best)
    return features, scores
