"""Each token's k best features by torch operators, found in the active subspace of the tokens.

The product of tokens and encoder is taken in the few directions of the subspace; one more
coordinate adds the bound on what they leave out. The features of the highest bounds are ranked in
all coordinates. A token whose k-th best of them lies below the last of these bounds is ranked by
the whole product.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saesub.topk.active_subspace import ActiveSubspace, left_out
from saesub.topk.ops import TOKENS_PER_BLOCK, Selected, dense_search, row_products, top_k
from saesub.topk.subspace_watch import Found

# With fewer, selecting the candidates takes what the product saves.
_LEAST_TOKENS, _LEAST_FEATURES_PER_K = 512, 256


@torch.no_grad()
def search(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    feature_scale: Float[Tensor, " d_sae"] | None,
    subspace: ActiveSubspace,
) -> Found:
    """`ops.dense_search` of a `W_enc` that lies feature-major in memory."""
    width = min(len(b_enc), max(k, subspace.candidates))
    scale = torch.ones_like(b_enc) if feature_scale is None else feature_scale
    read, rest = left_out(x, subspace.basis)
    tokens = torch.cat([read, rest[:, None]], 1)
    table = _table(W_enc, scale, subspace)
    candidates, bounds = _candidates(tokens, table, b_enc * scale, width)
    pre = row_products(x, Selected.equally(candidates, bounds, len(b_enc)), W_enc.T)
    pre = pre.view_as(candidates) + b_enc[candidates]
    best = (pre * scale[candidates]).topk(k, dim=-1, sorted=False)
    least = best.values.amin(1)
    features, pre = candidates.gather(1, best.indices), pre.gather(1, best.indices)
    last = bounds.amin(1)
    # A comparison with NaN is false: what is not finite is ranked, and shows, by the product.
    failed = ~((least >= last) & last.isfinite()) if width < len(b_enc) else ~least.isfinite()
    if bool(failed.any()):
        features[failed], pre[failed] = dense_search(x[failed], W_enc, b_enc, k, feature_scale)
    return Found(features, pre, width, float(failed.sum()) / max(1, len(x)))


def pays(n_tokens: int, d_sae: int, k: int) -> bool:
    """Whether there are tokens and features enough."""
    return n_tokens >= _LEAST_TOKENS and d_sae >= _LEAST_FEATURES_PER_K * k


def _table(
    W_enc: Float[Tensor, "d_in d_sae"], scale: Float[Tensor, " d_sae"], subspace: ActiveSubspace
) -> Float[Tensor, "d_sae rank_and_one"]:
    """Rows of the encoder in the subspace, and the bound on the rest for a rest of norm 1."""
    rows, rest = left_out(W_enc.T, subspace.basis)
    return torch.cat([rows, rest[:, None]], 1).mul_(scale[:, None])


def _candidates(
    tokens: Float[Tensor, "n rank_and_one"],
    table: Float[Tensor, "d_sae rank_and_one"],
    bias: Float[Tensor, " d_sae"],
    width: int,
) -> tuple[Tensor, Tensor]:
    """(n, width) every token's features of the highest bounds on their scores, and these."""
    features = torch.empty(len(tokens), width, dtype=torch.int64, device=tokens.device)
    bounds = tokens.new_empty(len(tokens), width)
    buffer = tokens.new_empty(min(len(tokens), TOKENS_PER_BLOCK), len(table))
    for start in range(0, len(tokens), TOKENS_PER_BLOCK):
        rows = slice(start, start + TOKENS_PER_BLOCK)
        scores = torch.addmm(bias, tokens[rows], table.T, out=buffer[: len(tokens[rows])])
        features[rows] = top_k(scores, width)
        torch.gather(scores, 1, features[rows], out=bounds[rows])
    return features, bounds
