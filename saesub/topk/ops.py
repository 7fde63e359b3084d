"""The TopK training step through active entries only: one dense product, everything else sparse.

The loss of a TopK (or BatchTopK) autoencoder depends on about `k` pre-activations of each token, so
decoding and all gradients need only those `n_tokens * k` entries. Dense autograd spends five more
products of the size of the encoder's on zeros.

A selection says which entries are active: a flat list of features, token after token, with offsets.
`select_topk` and `select_batch_topk` find it; `encode_at` and `decode_at` are the encoder and the
decoder at the selected entries, and under autograd give the values and gradients of their dense
counterparts:

    selected = select_topk(x - b_dec, W_enc, b_enc, k)
    pre = encode_at(selected, x, b_dec, W_enc, b_enc)
    x_hat = decode_at(selected, pre.relu(), W_dec, b_dec)

Only torch operators are used; torch has them for CPU and CUDA.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# With fewer features most are candidates for the top k, and a search for candidates gains nothing.
LEAST_FEATURES_PER_K = 8
TOKENS_PER_BLOCK = 512  # the block of pre-activations stays in cache: 512 × 16K × 4 bytes = 32 MB
_FEATURES_PER_TILE = 32
_BATCH_TOPK_HEADROOM = 4  # first guess: no token of a batch has more than 4 k active features

# (x, W_enc, b_enc, k, feature_scale) -> (n, k) features and pre-activations
Search = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Selected:
    """The active entries of n tokens, m in all, token after token.

    Attributes:
        features: (m,) int64, distinct within a token.
        offsets: (n + 1,) int64: token i has the entries offsets[i] .. offsets[i + 1].
        pre: (m,) their pre-activations, not differentiable.
        d_sae: number of features there are.
    """

    features: Int[Tensor, " m"]
    offsets: Int[Tensor, " n_plus_1"]
    pre: Float[Tensor, " m"]
    d_sae: int

    @cached_property
    def by_feature(self) -> tuple[Int[Tensor, " m"], Int[Tensor, " d_sae"]]:
        """The order that sorts the entries by feature, and where each feature then starts."""
        counts = torch.bincount(self.features, minlength=self.d_sae)
        return self.features.argsort(stable=True), counts.cumsum(0) - counts

    @cached_property
    def tokens(self) -> Int[Tensor, " m"]:
        """The token that each entry belongs to."""
        counts = self.offsets.diff()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(
            counts, output_size=len(self.features)
        )

    @classmethod
    def equally(
        cls, features: Int[Tensor, "n k"], pre: Float[Tensor, "n k"], d_sae: int
    ) -> Selected:
        """k entries for every token."""
        n, k = features.shape
        offsets = torch.arange(0, n * k + 1, k, device=features.device)
        return cls(features.flatten(), offsets, pre.flatten(), d_sae)

    def then(self, other: Selected) -> Selected:
        """These entries and those of `other`, whose tokens follow as a second copy of the batch."""
        return Selected(
            torch.cat([self.features, other.features]),
            torch.cat([self.offsets, self.offsets[-1] + other.offsets[1:]]),
            torch.cat([self.pre, other.pre]),
            self.d_sae,
        )

    def times_fired(self) -> Int[Tensor, " d_sae"]:
        """On how many of the tokens each feature is active."""
        fired = (self.pre > 0).long()
        return fired.new_zeros(self.d_sae).index_add_(0, self.features, fired)


@torch.no_grad()
def select_topk(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    feature_scale: Float[Tensor, " d_sae"] | None = None,
    *,
    search: Search | None = None,
) -> Selected:
    """The k largest pre-activations `x @ W_enc + b_enc` of every token.

    Which are largest is decided after multiplying by `feature_scale` where it is given: SAELens'
    `rescale_acts_by_decoder_norm` ranks features so. `search` replaces `dense_search`.
    """
    features, pre = (search or dense_search)(x, W_enc, b_enc, k, feature_scale)
    return Selected.equally(features, pre, W_enc.shape[1])


@torch.no_grad()
def select_batch_topk(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: float,
    feature_scale: Float[Tensor, " d_sae"] | None = None,
    *,
    search: Search | None = None,
) -> Selected:
    """The `int(n * k)` largest positive (scaled) pre-activations of the whole batch.

    Every token first gives its own 4 k largest; a token that would still have more above the
    batch's threshold is asked again for twice as many, so the answer is exact.
    """
    search = search or dense_search
    wanted, d_sae = int(k * len(x)), W_enc.shape[1]
    if not wanted:
        none = torch.zeros(0, dtype=torch.int64, device=x.device)
        return Selected(none, none.new_zeros(len(x) + 1), x.new_zeros(0), d_sae)
    width = min(d_sae, max(1, int(_BATCH_TOPK_HEADROOM * k)))
    features, pre = search(x, W_enc, b_enc, width, feature_scale)
    while True:
        scores = (pre if feature_scale is None else pre * feature_scale[features]).relu()
        best = scores.flatten().topk(wanted, sorted=False)
        least = scores.amin(1)
        cut_short = (least > 0) & (least >= best.values.amin())
        if width == d_sae or not bool(cut_short.any()):
            break
        width = min(d_sae, 2 * width)
        features = F.pad(features, (0, width - features.shape[1]))
        pre = F.pad(pre, (0, width - pre.shape[1]), value=-torch.inf)
        features[cut_short], pre[cut_short] = search(
            x[cut_short], W_enc, b_enc, width, feature_scale
        )
    chosen = best.indices[~(best.values <= 0)].sort().values  # NaN is kept, and shows
    counts = torch.bincount(chosen // width, minlength=len(x))
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return Selected(features.flatten()[chosen], offsets, pre.flatten()[chosen], d_sae)


def dense_search(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    feature_scale: Float[Tensor, " d_sae"] | None = None,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Features and pre-activations of each token's k best, by the whole product, block by block."""
    pre = x.new_empty(len(x), k)
    features = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    # The scale goes into the weights or into the scores, whichever are fewer.
    few_tokens = len(x) < len(W_enc)
    weights, bias = W_enc, b_enc
    if feature_scale is not None and not few_tokens:
        weights, bias = W_enc * feature_scale, b_enc * feature_scale
    buffer = x.new_empty(min(len(x), TOKENS_PER_BLOCK), W_enc.shape[1])
    for start in range(0, len(x), TOKENS_PER_BLOCK):
        rows = slice(start, start + TOKENS_PER_BLOCK)
        scores = torch.addmm(bias, x[rows], weights, out=buffer[: len(x[rows])])
        if feature_scale is not None and few_tokens:
            scores *= feature_scale
        features[rows] = top_k(scores, k)
        torch.gather(scores, 1, features[rows], out=pre[rows])
    if feature_scale is not None:
        pre /= feature_scale[features]
    return features, pre


def top_k(scores: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, "n k"]:
    """Indices of each row's k largest scores, unordered: `torch.topk`, in two exact stages.

    The k largest entries lie in the k tiles with the largest maxima, so only those are searched.
    """
    n, d_sae = scores.shape
    if d_sae % _FEATURES_PER_TILE or d_sae < 4 * k * _FEATURES_PER_TILE:
        return scores.topk(k, dim=-1, sorted=False).indices
    n_tiles = d_sae // _FEATURES_PER_TILE
    if scores.device.type == "cuda":
        # Features far apart: of neighbours torch's maxima took 18 times as long as reading the
        # scores (2,048 × 2^17 in bfloat16 on an H200), of these 0.4 times as long.
        tiles = scores.view(n, _FEATURES_PER_TILE, n_tiles).transpose(1, 2)
        tile, offset = _best_in(tiles, k)
        return offset * n_tiles + tile
    tile, offset = _best_in(scores.view(n, n_tiles, _FEATURES_PER_TILE), k)
    return tile * _FEATURES_PER_TILE + offset


def _best_in(
    tiles: Float[Tensor, "n tiles features"], k: int
) -> tuple[Int[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The tiles of each row's k largest scores, and where they are in them."""
    best = tiles.amax(-1).topk(k, dim=-1, sorted=False).indices
    candidates = tiles.gather(1, best.unsqueeze(-1).expand(-1, -1, _FEATURES_PER_TILE))
    inside = candidates.reshape(len(tiles), -1).topk(k, dim=-1, sorted=False).indices
    return best.gather(1, inside // _FEATURES_PER_TILE), inside % _FEATURES_PER_TILE


def encode_at(
    selected: Selected,
    x: Float[Tensor, "n d_in"],
    b_in: Float[Tensor, " d_in"] | None,
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
) -> Float[Tensor, " m"]:
    """The selected pre-activations of `(x - b_in) @ W_enc + b_enc`, with their gradients.

    Gradients reach `b_in`, `W_enc` and `b_enc`, not `x`.
    """
    return _EncodeAt.apply(selected, x, b_in, W_enc, b_enc)  # pyright: ignore


def decode_at(
    selected: Selected,
    values: Float[Tensor, " m"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "n d_out"]:
    """`sum over a token's entries of values * W_dec[features] + b_dec`."""
    out = _DecodeAt.apply(selected, values, W_dec)
    return out if b_dec is None else out + b_dec  # pyright: ignore


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, selected, x, b_in, W_enc, b_enc):
        ctx.save_for_backward(x if b_in is None else x - b_in, W_enc)
        ctx.selected, ctx.centred_by_bias = selected, b_in is not None
        return selected.pre.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        centred, W_enc = ctx.saved_tensors
        g_W_enc = sum_rows_by_feature(grads[0], ctx.selected, centred).T
        ones = centred.new_ones(len(centred), 1)
        g_b_enc = sum_rows_by_feature(grads[0], ctx.selected, ones).squeeze(1)
        # The bias enters every token alike, so its gradient is one matrix-vector product.
        g_b_in = -(W_enc @ g_b_enc) if ctx.centred_by_bias else None
        return None, None, g_b_in, g_W_enc, g_b_enc


class _DecodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, selected, values, W_dec):
        ctx.save_for_backward(values, W_dec)
        ctx.selected = selected
        return F.embedding_bag(
            selected.features, W_dec, selected.offsets[:-1], mode="sum", per_sample_weights=values
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        values, W_dec = ctx.saved_tensors
        g_out = grads[0].contiguous()
        g_values = row_products(g_out, ctx.selected, W_dec)
        return None, g_values, sum_rows_by_feature(values, ctx.selected, g_out)


def row_products(
    rows: Float[Tensor, "n d"], selected: Selected, table: Float[Tensor, "d_sae d"]
) -> Float[Tensor, " m"]:
    """`rows[token] · table[feature]` of every entry, without gathering the (m, d) rows."""
    _let_torch_warn_of_csr()
    pattern = torch.sparse_csr_tensor(
        selected.offsets,
        selected.features,
        torch.zeros_like(selected.features, dtype=rows.dtype),
        (len(rows), len(table)),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, rows, table.T, beta=0.0).values()


@cache
def _let_torch_warn_of_csr() -> None:
    """Make torch say here, unheard, what it says once in a process: that sparse CSR is in beta.

    Only `sampled_addmm` is used of it, and the tests hold that to dense autograd.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1), check_invariants=False)


def sum_rows_by_feature(
    weights: Float[Tensor, " m"], selected: Selected, rows: Float[Tensor, "n d"]
) -> Float[Tensor, "d_sae d"]:
    """`out[f] = sum over the entries of feature f of weights * rows[token]`.

    Sorting the entries by feature turns the scatter into segment sums: no atomics, and the order
    of addition is fixed, so a run repeats bit for bit.
    """
    order, starts = selected.by_feature
    tokens = selected.tokens[order]
    return F.embedding_bag(tokens, rows, starts, mode="sum", per_sample_weights=weights[order])
