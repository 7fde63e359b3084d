"""Each token's k best features by torch's own 8-bit product, ranked again in full precision.

For CPUs with AVX-512 VNNI where `saesub.topk.cpu` has no compiler: torch operators only. As there,
8-bit scores and statistical bounds on their error say which features can be among the k best;
tokens for which the bounds do not hold are ranked by the whole product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesub.topk.ops import Selected, dense_search, row_products, top_k

# Below these, rounding the dictionary and selecting candidates take what the product saves.
LEAST_FEATURES_PER_CANDIDATE = 128  # where `top_k` works in two stages
LEAST_TOKENS = 512
_STEPS = 127  # of the 8-bit range, either side of zero
_LEAST_STEP = 1e-30  # a row of zeros has steps too
_SCORES_AT_A_TIME = 2**22  # 16 MB in int32 and as much in float32, for the caches' sake
_LEAST_TOKENS_AT_A_TIME = 32  # or the product reads the dictionary too often
_ROWS_AT_A_TIME = 512

# Half-width of the bounds in steps: rounding errors are uniform over one, with a standard
# deviation of 1/√12, as long as they have no direction.
_BOUND_WIDTH = 5 / 12**0.5
# Where one massive coordinate takes the range for itself, the others (of fewer steps than this)
# round towards zero, and the error lies along them.
_MASSIVE = 16

_int_mm = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]


@cache
def available() -> bool:
    """Whether this CPU multiplies 8-bit integers fast, and without saturating, in torch."""
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", bool)()
    if not (has_vnni and torch.backends.mkldnn.is_available()):
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
    """`dense_search` at up to twice its speed, for a `W_enc` that lies feature-major in memory.

    Products in 8 bits give every score an upper bound, five standard deviations of the rounding
    error wide. The 2 k + 32 features of the highest bounds are ranked in the precision of `x`; a
    token whose k-th best of them lies below the last of these bounds is ranked by the whole
    product. So is everything where there is no VNNI or little to win: few tokens, few features,
    other precisions than float32.
    """
    if not pays(x, W_enc.shape[1], k):
        return dense_search(x, W_enc, b_enc, k, feature_scale)
    scale = torch.ones_like(b_enc) if feature_scale is None else feature_scale
    tokens = Rounded.of(x)
    candidates, bounds = _candidates(tokens, Rounded.of(W_enc.T), b_enc, scale, _width(k))
    pre = row_products(x, Selected.equally(candidates, bounds, len(b_enc)), W_enc.T)
    pre = pre.view_as(candidates) + b_enc[candidates]
    best = (pre * scale[candidates]).topk(k, dim=-1, sorted=False)
    features, pre = candidates.gather(1, best.indices), pre.gather(1, best.indices)
    last = bounds.amin(1)
    # A comparison with NaN is false: what is not finite is ranked, and shows, by the product.
    failed = ~((best.values.amin(1) >= last * tokens.step) & last.isfinite())
    if bool(failed.any()):
        features[failed], pre[failed] = dense_search(x[failed], W_enc, b_enc, k, feature_scale)
    return features, pre


def _width(k: int) -> int:
    """How many candidates a token has."""
    return 2 * k + 32


def pays(x: Float[Tensor, "n d_in"], d_sae: int, k: int) -> bool:
    """Whether the search is possible and faster than the whole product."""
    enough = len(x) >= LEAST_TOKENS and d_sae >= LEAST_FEATURES_PER_CANDIDATE * _width(k)
    if not enough or x.shape[1] == 1:  # of vectors of one number torch's 8-bit product is wrong
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and available()


@dataclass(frozen=True)
class Rounded:
    """Vectors in 8 bits: row i is about `whole[i] * step[i]`.

    Attributes:
        whole: (n, d) int8.
        step: (n,) length of one of the 127 steps to a row's largest magnitude.
        norm: (n,) of the rows before rounding.
        width: (n,) half-width, in steps, of the bound on the rounding error's product with a unit
            vector. If A steps of the error lie along the row itself, massive coordinates aside,
            a vector at cosine c to it sees A c + w √(1 - c²), at most √(A² + w²).
    """

    whole: Int[Tensor, "n d"]
    step: Float[Tensor, " n"]
    norm: Float[Tensor, " n"]
    width: Float[Tensor, " n"]

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> Rounded:
        """Round some rows at a time, which stay in cache."""
        whole = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
        made = cls(whole, *rows.new_empty(3, len(rows)))
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            part = slice(start, start + _ROWS_AT_A_TIME)
            _round_into(made, part, rows[part])
        return made


def _round_into(made: Rounded, part: slice, rows: Float[Tensor, "m d"]) -> None:
    step = rows.abs().amax(1, keepdim=True).div_(_STEPS).clamp_min_(_LEAST_STEP)
    steps = rows / step
    whole = steps.round()
    made.whole[part], made.step[part] = whole, step.squeeze(1)
    made.norm[part] = steps.norm(dim=1) * step.squeeze(1)  # of a square that does not underflow
    error = steps - whole
    steps.masked_fill_(whole.abs_() > _MASSIVE, 0)
    aligned = (error * steps).sum(1) / steps.norm(dim=1).clamp_min_(_LEAST_STEP)
    made.width[part] = aligned.square_().add_(_BOUND_WIDTH**2).sqrt_()


def _candidates(
    tokens: Rounded,
    table: Rounded,
    b_enc: Float[Tensor, " d_sae"],
    scale: Float[Tensor, " d_sae"],
    width: int,
) -> tuple[Int[Tensor, "n width"], Float[Tensor, "n width"]]:
    """Every token's features of highest bounds on their scores, and these, over its step."""
    n, d_sae = len(tokens.whole), len(b_enc)
    features = torch.empty(n, width, dtype=torch.int64, device=b_enc.device)
    bounds, step = b_enc.new_empty(n, width), table.step * scale
    of_tokens = (1 / tokens.step, tokens.width, tokens.norm / tokens.step)
    of_table = (b_enc * scale, table.norm * scale, table.width * step)
    block = max(_LEAST_TOKENS_AT_A_TIME, _SCORES_AT_A_TIME // d_sae)
    products = torch.empty(block, d_sae, dtype=torch.int32, device=b_enc.device)
    scores = b_enc.new_empty(block, d_sae)
    for start in range(0, n, block):
        rows = slice(start, min(start + block, n))
        size = rows.stop - start
        _int_mm(tokens.whole[rows], table.whole.T, out=products[:size])
        found = torch.mul(products[:size], step, out=scores[:size])
        for of_token, of_feature in zip(of_tokens, of_table, strict=True):
            found.addr_(of_token[rows], of_feature)
        features[rows] = top_k(found, width)
        torch.gather(found, 1, features[rows], out=bounds[rows])
    return features, bounds
