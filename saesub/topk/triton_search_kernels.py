"""Triton kernels of `saesub.topk.shadow`: which features may be among a token's k best.

A group is MEMBERS features that lie STRIDE apart. A program takes BN groups, so its tiles of BN
features lie STRIDE apart too, and the maximum of a group needs no exchange between threads: it is a
running maximum over tiles. BN divides STRIDE.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def group_maxima(
    tokens,
    features,
    bias,
    scale,
    maxima,
    n,
    d_sae,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STRIDE: tl.constexpr,
    MEMBERS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """maxima[token, group] = max over members of tokens . features + bias * scale.

    tokens and features are descriptors of (n, WIDTH) and (d_sae, WIDTH); what lies beyond reads as
    zero. Programs of neighbouring numbers share a tile of features, which then stays in the cache.
    """
    program = tl.program_id(0)
    token_tiles = tl.cdiv(n, BM)
    first_token = (program % token_tiles) * BM
    tile = program // token_tiles
    token = first_token + tl.arange(0, BM)
    column = tl.arange(0, BN)
    inv = tl.load(scale + token, mask=token < n, other=0.0)
    first_group = tile * BN
    begin = first_group // STRIDE * (STRIDE * MEMBERS) + first_group % STRIDE
    best = tl.full((BM, BN), float("-inf"), tl.float32).to(tl.bfloat16)
    for member in tl.range(0, MEMBERS, flatten=FLATTEN):  # one pipeline through all tiles
        first = begin + member * STRIDE
        b = tl.load(bias + first + column, mask=first + column < d_sae, other=float("-inf"))
        product = b[None, :] * inv[:, None]  # of a token beyond the last 0 * -inf, not stored
        for k in range(0, WIDTH, BK):
            t = tokens.load([first_token, k])
            f = features.load([first, k])
            product = tl.dot(t, f.T, product)
        best = tl.maximum(best.to(tl.float32), product).to(tl.bfloat16)
    n_groups = tl.cdiv(d_sae, STRIDE * MEMBERS) * STRIDE
    at = token.to(tl.int64)[:, None] * n_groups + (first_group + column)[None, :]
    tl.store(maxima + at, best, mask=(token < n)[:, None])


@triton.jit
def member_scores(
    tokens,
    features,
    bias,
    scale,
    groups,
    scores,
    ids,
    d_sae,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    MEMBERS: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Scores and features of the members of every token's chosen groups, (n, GROUPS * MEMBERS).

    A program takes PER_PROGRAM of a token's members, ENTRIES at once. Members that do not exist
    score -inf.
    """
    parts: tl.constexpr = (GROUPS * MEMBERS + PER_PROGRAM - 1) // PER_PROGRAM
    token = (tl.program_id(0) // parts).to(tl.int64)
    begin = (tl.program_id(0) % parts) * PER_PROGRAM
    column = tl.arange(0, BLOCK)
    x = tl.load(tokens + token * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    inv = tl.load(scale + token)
    for at in range(0, PER_PROGRAM, ENTRIES):
        entry = begin + at + tl.arange(0, ENTRIES)
        inside = entry < GROUPS * MEMBERS
        group = tl.load(groups + token * GROUPS + entry // MEMBERS, mask=inside, other=0)
        feature = (group // STRIDE * MEMBERS + entry % MEMBERS) * STRIDE + group % STRIDE
        exists = inside & (feature < d_sae)
        where = feature.to(tl.int64)[:, None] * WIDTH + column[None, :]
        mask = exists[:, None] & (column < WIDTH)[None, :]
        rows = tl.load(features + where, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(bias + feature, mask=exists, other=float("-inf"))
        place = token * GROUPS * MEMBERS + entry
        tl.store(scores + place, tl.sum(rows * x[None, :], 1) + b * inv, mask=inside)
        tl.store(ids + place, tl.where(exists, feature, 0), mask=inside)
