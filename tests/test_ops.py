"""The sparse TopK step against float64 dense autograd, over shapes, ties and dead rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.batchtopk_sae import BatchTopK

from saesub.topk.ops import (
    _best_in,
    decode_at,
    encode_at,
    select_batch_topk,
    select_topk,
    top_k,
)


def _weights(d_in: int, d_sae: int, seed: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    parts = [make(d_in, d_sae), make(d_sae), make(d_sae, d_in), make(d_in)]
    return [(p / d_in**0.5).to(dtype).requires_grad_() for p in parts]


def _dense(x, W_enc, b_enc, W_dec, b_dec, k, scale):
    pre = (x - b_dec) @ W_enc + b_enc
    features = (pre * scale).topk(k, dim=-1).indices
    acts = torch.zeros_like(pre).scatter(1, features, pre.gather(1, features).relu())
    return (acts @ W_dec + b_dec - x).square().sum(-1).mean()


def _sparse(x, W_enc, b_enc, W_dec, b_dec, k, scale):
    selected = select_topk(x - b_dec, W_enc, b_enc, k, scale)
    pre = encode_at(selected, x, b_dec, W_enc, b_enc)
    return (decode_at(selected, pre.relu(), W_dec, b_dec) - x).square().sum(-1).mean()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    d_in=st.integers(1, 20),
    d_sae=st.integers(1, 300),
    data=st.data(),
    all_negative=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_equal_dense_autograd(n, d_in, d_sae, data, all_negative, seed):
    k = data.draw(st.integers(1, d_sae))
    weights = _weights(d_in, d_sae, seed, torch.float64)
    if all_negative:
        weights[1].data -= 100.0
    scale = torch.rand(d_sae, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scale += 0.5
    x = torch.randn(n, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ours = _sparse(x, *weights, k, scale)
    reference = _dense(x, *weights, k, scale)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, weights), torch.autograd.grad(reference, weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("n", [1, 511, 1300])
def test_float32_is_within_1e_5_of_the_float64_reference(n):
    """More tokens than one block, enough features for the two-stage search."""
    weights = _weights(48, 2048, 0)
    x = torch.randn(n, 48, generator=torch.Generator().manual_seed(1))
    double = [w.detach().double().requires_grad_() for w in weights]
    scale = torch.ones(2048)
    gradients = torch.autograd.grad(_sparse(x, *weights, 8, scale), weights)
    reference = torch.autograd.grad(_dense(x.double(), *double, 8, scale.double()), double)
    for a, b in zip(gradients, reference, strict=True):
        assert (a.double() - b).norm() / b.norm() < 1e-5


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 5), k=st.integers(1, 12), tiles=st.integers(1, 80), levels=st.integers(1, 50)
)
def test_two_stage_top_k_finds_the_same_values_also_with_ties(n, k, tiles, levels):
    k = min(k, tiles * 32)
    scores = torch.randint(-levels, levels, (n, tiles * 32)).float()
    found = scores.gather(1, top_k(scores, k)).sort(-1).values
    torch.testing.assert_close(found, scores.topk(k, -1).values.sort(-1).values)
    assert all(len(set(row.tolist())) == k for row in top_k(scores, k))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5), k=st.integers(1, 12), levels=st.integers(1, 50))
def test_tiles_that_lie_apart_hold_the_same_best(n, k, levels):
    """As a GPU reads them, of scores that are not copied."""
    scores = torch.randint(-levels, levels, (n, 64 * 32)).float()
    tile, offset = _best_in(scores.view(n, 32, 64).transpose(1, 2), k)
    chosen = offset * 64 + tile
    found = scores.gather(1, chosen).sort(-1).values
    torch.testing.assert_close(found, scores.topk(k, -1).values.sort(-1).values)
    assert all(len(set(row.tolist())) == k for row in chosen)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 30),
    d_sae=st.integers(1, 200),
    share=st.floats(0.01, 0.6),
    bias=st.sampled_from([0.0, -3.0, -100.0]),
    spread=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_batch_topk_selects_what_saelens_does(n, d_sae, share, bias, spread, seed):
    """Also when a few tokens have most of the batch's active features, and when none is."""
    W_enc, b_enc, _, _ = (w.detach() for w in _weights(12, d_sae, seed, torch.float64))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 12, dtype=torch.float64, generator=generator)
    x *= torch.exp(spread * torch.randn(n, 1, dtype=torch.float64, generator=generator))
    scale = 0.5 + torch.rand(d_sae, dtype=torch.float64, generator=generator)
    k = share * d_sae
    expected = BatchTopK(k)((x @ W_enc + b_enc + bias) * scale)
    selected = select_batch_topk(x, W_enc, b_enc + bias, k, scale)
    found = torch.zeros_like(expected)
    found[selected.tokens, selected.features] = (selected.pre * scale[selected.features]).relu()
    torch.testing.assert_close(found, expected)


def test_batch_topk_gradients_equal_dense_autograd():
    weights = _weights(12, 100, 0, torch.float64)
    W_enc, b_enc, W_dec, b_dec = weights
    x = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[::7] *= 0.01  # tokens without any active feature
    selected = select_batch_topk(x - b_dec, W_enc, b_enc, 3.0)
    assert selected.offsets.diff().unique().numel() > 3
    pre = encode_at(selected, x, b_dec, W_enc, b_enc)
    ours = (decode_at(selected, pre.relu(), W_dec, b_dec) - x).square().sum()
    acts = BatchTopK(3.0)((x - b_dec) @ W_enc + b_enc)
    reference = (acts @ W_dec + b_dec - x).square().sum()
    gradients = (torch.autograd.grad(loss, weights) for loss in (ours, reference))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_run_repeats_bit_for_bit():
    weights = _weights(32, 4096, 0)
    x = torch.randn(700, 32, generator=torch.Generator().manual_seed(1))
    first = torch.autograd.grad(_sparse(x, *weights, 16, None), weights)
    second = torch.autograd.grad(_sparse(x, *weights, 16, None), weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
