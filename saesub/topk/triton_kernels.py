"""Triton kernels of `saesub.topk.triton_backend`: one program per token, or one per feature.

A program holds a row of D numbers as one masked block of BLOCK, the next power of two, and loads
ENTRIES rows at once, so that their latencies overlap. Tables are row-major and contiguous; indices
are int64. Nothing is added atomically: the order of every sum is fixed.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _rows(table, index, entry, wanted, D: tl.constexpr, BLOCK: tl.constexpr):
    """table[index[entry]] (ENTRIES, BLOCK); zeros, and nothing read, where an entry is unwanted."""
    row = tl.load(index + entry, mask=wanted, other=0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = wanted[:, None] & (column < D)[None, :]
    return tl.load(table + row[:, None] * D + column[None, :], mask=inside, other=0.0)


@triton.jit
def _weighted_sum(
    weight, index, table, first, last, D: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr
):
    """Over the entries first .. last: sum of weight * table[index], (BLOCK,); and of weight."""
    total = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((ENTRIES,), tl.float32)
    for at in range(first, last, ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        w = tl.load(weight + entry, mask=entry < last, other=0.0)
        total += tl.sum(w[:, None] * _rows(table, index, entry, w != 0, D, BLOCK), 0)
        weights += w
    return total, tl.sum(weights)


@triton.jit
def _store_products(
    products,
    vector,
    index,
    table,
    first,
    last,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """products[i] = vector . table[index[i]] for the entries i of first .. last."""
    for at in range(first, last, ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        rows = _rows(table, index, entry, entry < last, D, BLOCK)
        tl.store(products + entry, tl.sum(rows * vector[None, :], 1), mask=entry < last)


@triton.jit
def row_products(
    vectors,
    features,
    offsets,
    table,
    products,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """vectors[token] . table[feature] of every entry."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    vector = tl.load(vectors + token * D + column, mask=column < D, other=0.0)
    first, last = tl.load(offsets + token), tl.load(offsets + token + 1)
    _store_products(products, vector, features, table, first, last, D, BLOCK, ENTRIES)


@triton.jit
def decode(
    features,
    offsets,
    values,
    W_dec,
    b_dec,
    target,
    scale,
    x_hat,
    g_out,
    g_pre,
    squared_error,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """x_hat = sum of value * W_dec[feature] + b_dec; g_out = scale * (x_hat - target); and back.

    g_pre is W_dec[feature] . g_out for every entry, squared_error (n,) is in units of the target.
    """
    token = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + token), tl.load(offsets + token + 1)
    column = tl.arange(0, BLOCK)
    at, inside = token * D + column, column < D
    out, _ = _weighted_sum(values, features, W_dec, first, last, D, BLOCK, ENTRIES)
    if b_dec is not None:
        out += tl.load(b_dec + column, mask=inside, other=0.0)
    residual = out - tl.load(target + at, mask=inside, other=0.0)
    gradient = scale * residual
    tl.store(x_hat + at, out, mask=inside)
    tl.store(g_out + at, gradient, mask=inside)
    tl.store(squared_error + token, tl.sum(residual * residual))
    _store_products(g_pre, gradient, features, W_dec, first, last, D, BLOCK, ENTRIES)


@triton.jit
def _row_gradient(
    weight,
    token,
    table,
    partial,
    part,
    first,
    last,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Sum over a feature's entries first .. last of weight * table[token], (BLOCK,).

    Of a feature with more than SEGMENT entries the sums of its segments lie in `partial` from row
    `part` on: one program alone would hold up the launch.
    """
    if last - first > SEGMENT:
        total = tl.zeros((BLOCK,), tl.float32)
        column = tl.arange(0, BLOCK)
        end = part + tl.cdiv(last - first, SEGMENT)
        for at in range(part, end, ENTRIES):
            row = (at + tl.arange(0, ENTRIES)).to(tl.int64)
            inside = (row < end)[:, None] & (column < D)[None, :]
            rows = tl.load(partial + row[:, None] * D + column[None, :], mask=inside, other=0.0)
            total += tl.sum(rows, 0)
    else:
        total, _ = _weighted_sum(weight, token, table, first, last, D, BLOCK, ENTRIES)
    return total


@triton.jit
def _bias_gradient(g_pre, first, last, ENTRIES: tl.constexpr):
    """Sum of g_pre over the entries first .. last."""
    total = tl.zeros((ENTRIES,), tl.float32)
    for at in range(first, last, ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        total += tl.load(g_pre + entry, mask=entry < last, other=0.0)
    return tl.sum(total)


@triton.jit
def segment_sums(
    owner,
    part,
    start,
    token,
    g_pre,
    value,
    x,
    g_out,
    enc_parts,
    dec_parts,
    d_sae,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ENTRIES: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """The two sums of one segment of a feature with many entries; see _row_gradient."""
    segment = tl.program_id(0)
    feature = tl.load(owner + segment)
    if feature >= d_sae:
        return
    first = tl.load(start + feature) + (segment - tl.load(part + feature)) * SEGMENT
    last = tl.minimum(first + SEGMENT, tl.load(start + feature + 1))
    enc, _ = _weighted_sum(g_pre, token, x, first, last, D_IN, BLOCK_IN, ENTRIES)
    column = tl.arange(0, BLOCK_IN)
    tl.store(enc_parts + segment * D_IN + column, enc, mask=column < D_IN)
    dec, _ = _weighted_sum(value, token, g_out, first, last, D_OUT, BLOCK_OUT, ENTRIES)
    column = tl.arange(0, BLOCK_OUT)
    tl.store(dec_parts + segment * D_OUT + column, dec, mask=column < D_OUT)


@triton.jit
def row_norms(
    touched,
    start,
    part,
    token,
    g_pre,
    value,
    x,
    g_out,
    enc_parts,
    dec_parts,
    squares,
    d_sae,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ENTRIES: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """The squared norm of the gradients of every touched feature."""
    feature = tl.load(touched + tl.program_id(0))
    if feature >= d_sae:
        return
    first, last = tl.load(start + feature), tl.load(start + feature + 1)
    p = tl.load(part + feature)
    bias = _bias_gradient(g_pre, first, last, 32)
    enc = _row_gradient(
        g_pre, token, x, enc_parts, p, first, last, D_IN, BLOCK_IN, ENTRIES, SEGMENT
    )
    dec = _row_gradient(
        value, token, g_out, dec_parts, p, first, last, D_OUT, BLOCK_OUT, ENTRIES, SEGMENT
    )
    square = tl.sum(enc * enc) + tl.sum(dec * dec) + bias * bias
    tl.store(squares + tl.program_id(0), square)


@triton.jit
def through_encoder(
    valid,
    feature,
    g_pre,
    W_enc,
    sums,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """sums[i] = sum of g_pre * W_enc[feature] over the i-th SEGMENT of the sorted entries."""
    first = tl.program_id(0) * SEGMENT
    last = tl.minimum(first + SEGMENT, tl.load(valid))
    total, _ = _weighted_sum(g_pre, feature, W_enc, first, last, D, BLOCK, ENTRIES)
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * D + column
    tl.store(sums + at, total, mask=column < D)


@triton.jit
def _adam(
    parameter, average, square, at, inside, gradient, factors, keep, one_less1, one_less2, eps
):
    """Update the numbers `at` and their two moments, and return them; the other names are those of
    adam_rows."""
    g = tl.load(factors) * gradient
    m = tl.load(keep) * tl.load(average + at, mask=inside, other=0.0) + one_less1 * g
    v = tl.load(keep + 1) * tl.load(square + at, mask=inside, other=0.0) + one_less2 * g * g
    change = tl.load(factors + 1) * m / (tl.sqrt(v) * tl.load(factors + 2) + eps)
    p = tl.load(parameter + at, mask=inside, other=0.0) - change
    tl.store(average + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    tl.store(parameter + at, p, mask=inside)
    return p


@triton.jit
def _write_shadow(
    shadow,
    norms,
    stale,
    feature,
    enc,
    dec,
    factor,
    D_IN: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WIDTH: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """A feature's encoder row times `factor` and, where norms are kept, its decoder row's norm."""
    if norms is not None:
        norm = tl.sqrt(tl.sum(dec * dec))
        tl.store(norms + feature, norm)
        enc = enc * norm
    enc = enc * factor
    if tl.max(tl.abs(enc)) > LIMIT:
        tl.store(stale, 1)
    column = tl.arange(0, BLOCK_IN)
    few = tl.clamp(enc, -LIMIT, LIMIT).to(shadow.dtype.element_ty)
    tl.store(shadow + feature * WIDTH + column, few, mask=column < D_IN)


@triton.jit
def write_shadow(
    first_feature,
    enc,
    dec,
    shadow,
    norms,
    stale,
    factor,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """The shadow's row of each feature from first_feature on; see saesub.topk.shadow."""
    feature = (first_feature + tl.program_id(0)).to(tl.int64)
    column = tl.arange(0, BLOCK_IN)
    e = tl.load(enc + feature * D_IN + column, mask=column < D_IN, other=0.0)
    column = tl.arange(0, BLOCK_OUT)
    d = tl.load(dec + feature * D_OUT + column, mask=column < D_OUT, other=0.0)
    _write_shadow(shadow, norms, stale, feature, e, d, factor, D_IN, BLOCK_IN, WIDTH, LIMIT)


@triton.jit
def adam_rows(
    touched,
    start,
    part,
    token,
    g_pre,
    value,
    x,
    g_out,
    enc_parts,
    dec_parts,
    enc,
    enc_m,
    enc_v,
    dec,
    dec_m,
    dec_v,
    bias,
    bias_m,
    bias_v,
    factors,
    keep,
    one_less1,
    one_less2,
    eps,
    shadow,
    norms,
    stale,
    factor,
    d_sae,
    LAZY: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ENTRIES: tl.constexpr,
    SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """One Adam update of every feature; with LAZY, of the touched ones.

    factors (3,): of the gradient (clipping), of the first moment (learning rate and its bias
    correction) and of the root of the second (its bias correction). If that of the gradient is NaN,
    nothing changes.
    keep (d_sae, 2), or without LAZY (1, 2): what the moments are multiplied by.
    one_less1, one_less2: 1 - beta of either moment.
    shadow, if there is one, gets the rows that moved.
    """
    clip = tl.load(factors)
    if clip != clip:
        return
    if LAZY:
        feature = tl.load(touched + tl.program_id(0)).to(tl.int64)
        if feature >= d_sae:
            return
        keep += 2 * feature
    else:
        feature = tl.program_id(0).to(tl.int64)
    first, last = tl.load(start + feature), tl.load(start + feature + 1)
    p = tl.load(part + feature)
    g_bias = _bias_gradient(g_pre, first, last, 32)
    there = feature >= 0
    _adam(bias, bias_m, bias_v, feature, there, g_bias, factors, keep, one_less1, one_less2, eps)
    g_enc = _row_gradient(
        g_pre, token, x, enc_parts, p, first, last, D_IN, BLOCK_IN, ENTRIES, SEGMENT
    )
    at, inside = feature * D_IN + tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_IN) < D_IN
    e = _adam(enc, enc_m, enc_v, at, inside, g_enc, factors, keep, one_less1, one_less2, eps)
    g_dec = _row_gradient(
        value, token, g_out, dec_parts, p, first, last, D_OUT, BLOCK_OUT, ENTRIES, SEGMENT
    )
    at, inside = feature * D_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_OUT) < D_OUT
    d = _adam(dec, dec_m, dec_v, at, inside, g_dec, factors, keep, one_less1, one_less2, eps)
    if shadow is not None:
        _write_shadow(shadow, norms, stale, feature, e, d, factor, D_IN, BLOCK_IN, WIDTH, LIMIT)
