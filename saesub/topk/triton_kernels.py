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
    row = tl.load(index + entry, mask=wanted, other=0)
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
def row_norms(
    start,
    token,
    g_pre,
    value,
    x,
    g_out,
    squares,
    g_bias,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Of every feature with entries: squared norm of its gradients, and that of its bias."""
    feature = tl.program_id(0)
    first, last = tl.load(start + feature), tl.load(start + feature + 1)
    if first == last:
        return
    enc, bias = _weighted_sum(g_pre, token, x, first, last, D_IN, BLOCK_IN, ENTRIES)
    square = tl.sum(enc * enc) + bias * bias
    dec, _ = _weighted_sum(value, token, g_out, first, last, D_OUT, BLOCK_OUT, ENTRIES)
    tl.store(squares + feature, square + tl.sum(dec * dec))
    tl.store(g_bias + feature, bias)


@triton.jit
def _adam(
    parameter, average, square, at, inside, gradient, factors, keep, one_less1, one_less2, eps
):
    """Update the numbers `at`, and their two moments; the other names are those of adam_rows."""
    g = tl.load(factors) * gradient
    m = tl.load(keep) * tl.load(average + at, mask=inside) + one_less1 * g
    v = tl.load(keep + 1) * tl.load(square + at, mask=inside) + one_less2 * g * g
    change = tl.load(factors + 1) * m / (tl.sqrt(v) * tl.load(factors + 2) + eps)
    p = tl.load(parameter + at, mask=inside)
    tl.store(average + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    tl.store(parameter + at, p - change, mask=inside)


@triton.jit
def adam_rows(
    start,
    token,
    g_pre,
    value,
    x,
    g_out,
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
    LAZY: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """One Adam update of every feature; with LAZY, of those that have entries.

    factors (3,): of the gradient (clipping), of the first moment (learning rate and its bias
    correction) and of the root of the second (its bias correction).
    keep (d_sae, 2), or without LAZY (1, 2): what the moments are multiplied by.
    one_less1, one_less2: 1 - beta of either moment.
    """
    feature = tl.program_id(0).to(tl.int64)
    first, last = tl.load(start + feature), tl.load(start + feature + 1)
    if LAZY:
        if first == last:
            return
        keep += 2 * feature
    g_enc, g_bias = _weighted_sum(g_pre, token, x, first, last, D_IN, BLOCK_IN, ENTRIES)
    at, inside = feature * D_IN + tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_IN) < D_IN
    _adam(enc, enc_m, enc_v, at, inside, g_enc, factors, keep, one_less1, one_less2, eps)
    _adam(bias, bias_m, bias_v, feature, None, g_bias, factors, keep, one_less1, one_less2, eps)
    g_dec, _ = _weighted_sum(value, token, g_out, first, last, D_OUT, BLOCK_OUT, ENTRIES)
    at, inside = feature * D_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_OUT) < D_OUT
    _adam(dec, dec_m, dec_v, at, inside, g_dec, factors, keep, one_less1, one_less2, eps)
