"""The TopK training step with k active entries a token: one dense product, everything else sparse.

A TopK autoencoder's loss depends on `k` pre-activations of each token, so decoding and all
gradients need only the `n_tokens * k` active entries. Dense autograd spends five more products of
the size of the encoder's on zeros. The two functions here compose under autograd like their dense
counterparts and give the same values and gradients:

    pre, features = encode_topk(x, sae.b_dec, sae.W_enc, sae.b_enc, k)
    x_hat = decode_sparse(pre.relu(), features, sae.W_dec, sae.b_dec)

Only torch operators are used; torch has them for CPU and CUDA.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

# sampled_addmm on CSR is all that is used of it here, and the tests hold it to dense autograd.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

_TOKENS_PER_BLOCK = 512  # the block of pre-activations stays in cache: 512 × 16K × 4 bytes = 32 MB
_FEATURES_PER_TILE = 32


def encode_topk(
    x: Float[Tensor, "n d_in"],
    b_in: Float[Tensor, " d_in"] | None,
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    feature_scale: Float[Tensor, " d_sae"] | None = None,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest pre-activations of every token and the features that have them.

    Pre-activations are `(x - b_in) @ W_enc + b_enc`; the values returned are these. Which k are
    largest is decided after multiplying by `feature_scale` where it is given: SAELens'
    `rescale_acts_by_decoder_norm` ranks features so, and the scale cancels in the reconstruction.
    Gradients reach `b_in`, `W_enc` and `b_enc`, not `x` nor `feature_scale`.
    """
    return _EncodeTopK.apply(x, b_in, W_enc, b_enc, k, feature_scale)  # pyright: ignore


def decode_sparse(
    values: Float[Tensor, "n k"],
    features: Int[Tensor, "n k"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
) -> Float[Tensor, "n d_out"]:
    """`sum_j values[:, j] * W_dec[features[:, j]] + b_dec`; all but `features` get gradients."""
    return _DecodeSparse.apply(values, features, W_dec, b_dec)  # pyright: ignore


def top_k(scores: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, "n k"]:
    """Indices of each row's k largest scores, unordered: `torch.topk`, in two exact stages.

    The k largest entries lie in the k tiles with the largest maxima, so only those are searched.
    """
    n, d_sae = scores.shape
    if d_sae % _FEATURES_PER_TILE or d_sae < 4 * k * _FEATURES_PER_TILE:
        return scores.topk(k, dim=-1, sorted=False).indices
    tiles = scores.view(n, -1, _FEATURES_PER_TILE)
    best = tiles.amax(-1).topk(k, dim=-1, sorted=False).indices
    candidates = tiles.gather(1, best.unsqueeze(-1).expand(-1, -1, _FEATURES_PER_TILE))
    inside = candidates.view(n, -1).topk(k, dim=-1, sorted=False).indices
    tile, offset = inside // _FEATURES_PER_TILE, inside % _FEATURES_PER_TILE
    return best.gather(1, tile) * _FEATURES_PER_TILE + offset


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, b_in, W_enc, b_enc, k, feature_scale):
        centred = x if b_in is None else x - b_in
        values = x.new_empty(len(x), k)
        features = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
        # Folding the scale into the weights costs d_in × d_sae once, not a pass over n × d_sae.
        scaled_W = W_enc if feature_scale is None else W_enc * feature_scale
        scaled_b = b_enc if feature_scale is None else b_enc * feature_scale
        buffer = x.new_empty(min(len(x), _TOKENS_PER_BLOCK), W_enc.shape[1])
        for start in range(0, len(x), _TOKENS_PER_BLOCK):
            rows = slice(start, start + _TOKENS_PER_BLOCK)
            block = centred[rows]
            scores = torch.addmm(scaled_b, block, scaled_W, out=buffer[: len(block)])
            features[rows] = top_k(scores, k)
            torch.gather(scores, 1, features[rows], out=values[rows])
        if feature_scale is not None:
            values /= feature_scale[features]
        ctx.save_for_backward(centred, features, W_enc)
        ctx.centred_by_bias = b_in is not None
        ctx.mark_non_differentiable(features)
        return values, features

    @staticmethod
    def backward(ctx: Any, *grads):
        centred, features, W_enc = ctx.saved_tensors
        d_sae = W_enc.shape[1]
        g_W_enc = _sum_rows_by_feature(grads[0], features, centred, d_sae).T
        g_b_enc = centred.new_zeros(d_sae).index_add_(0, features.flatten(), grads[0].flatten())
        # The bias enters every token alike, so its gradient is one matrix-vector product.
        g_b_in = -(W_enc @ g_b_enc) if ctx.centred_by_bias else None
        return None, g_b_in, g_W_enc, g_b_enc, None, None


class _DecodeSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values, features, W_dec, b_dec):
        ctx.save_for_backward(values, features, W_dec)
        return F.embedding_bag(features, W_dec, per_sample_weights=values, mode="sum") + b_dec

    @staticmethod
    def backward(ctx: Any, *grads):
        values, features, W_dec = ctx.saved_tensors
        g_out = grads[0].contiguous()
        g_values = _row_products(g_out, features, W_dec)
        g_W_dec = _sum_rows_by_feature(values, features, g_out, len(W_dec))
        return g_values, None, g_W_dec, g_out.sum(0)


def _row_products(
    rows: Float[Tensor, "n d"], features: Int[Tensor, "n k"], table: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "n k"]:
    """`rows[i] · table[features[i, j]]`, without gathering the (n, k, d) rows of the table."""
    n, k = features.shape
    crow = torch.arange(0, n * k + 1, k, device=rows.device)
    pattern = torch.sparse_csr_tensor(
        crow, features.flatten(), rows.new_zeros(n * k), (n, len(table)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, rows, table.T, beta=0.0).values().view(n, k)


def _sum_rows_by_feature(
    weights: Float[Tensor, "n k"],
    features: Int[Tensor, "n k"],
    rows: Float[Tensor, "n d"],
    d_sae: int,
) -> Float[Tensor, "d_sae d"]:
    """`out[f] = sum over entries with features[i, j] == f of weights[i, j] * rows[i]`.

    Sorting the entries by feature turns the scatter into segment sums: no atomics, and the order
    of addition is fixed, so a run repeats bit for bit.
    """
    k = features.shape[1]
    flat = features.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=d_sae)
    offsets = counts.cumsum(0) - counts
    return F.embedding_bag(
        order // k, rows, offsets, mode="sum", per_sample_weights=weights.flatten()[order]
    )
