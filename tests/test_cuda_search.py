"""The search by blocks of features against the whole product, on the CPU and on CUDA if there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesub.topk import cuda_search
from saesub.topk.ops import dense_search

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _problem(n: int, d: int, d_sae: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    scale = make(d_sae).abs() + 0.1
    return make(n, d), make(d_sae, d).T / d**0.5, make(d_sae) / 4, scale


def _ranked(found, scale):
    features, pre = found
    return (pre * (1 if scale is None else scale[features])).sort(1).values


@pytest.mark.parametrize("exact", [True, False])
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 60),
    d_sae=st.integers(1, 500),
    k=st.integers(1, 20),
    scaled=st.booleans(),
    per_block=st.sampled_from([(7, 64), (64, 100), (64, 4096)]),
    seed=st.integers(0, 1000),
)
def test_search_finds_the_top_k(exact, n, d, d_sae, k, scaled, per_block, seed):
    """Also over several blocks of tokens and of features, the last of them short."""
    x, W_enc, b_enc, scale = _problem(n, d, d_sae, seed)
    k, scale = min(k, d_sae), scale if scaled else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_search, "_TOKENS_PER_BLOCK", per_block[0])
        patch.setattr(cuda_search, "_FEATURES_PER_BLOCK", per_block[1])
        features, pre = cuda_search.search(x, W_enc, b_enc, k, scale, exact=exact)
    expected = _ranked(dense_search(x, W_enc, b_enc, k, scale), scale)
    torch.testing.assert_close(_ranked((features, pre), scale), expected, rtol=1e-5, atol=1e-5)
    whole = torch.gather(x @ W_enc + b_enc, 1, features)
    torch.testing.assert_close(pre, whole, rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == len(row) for row in features.tolist())


def test_features_of_bias_minus_infinity_never_double_another(monkeypatch):
    """Also where a top k takes the first of equals, as a card's may."""

    def first(x, k, dim=-1, largest=True, sorted=True):
        values, indices = x.sort(dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))

    monkeypatch.setattr(torch.Tensor, "topk", first)
    x, W_enc, bias, _ = _problem(3, 8, 2048, 0)
    bias.fill_(-torch.inf)
    bias[[0, 5]] = 0
    for exact in (False, True):
        _, pre = cuda_search.search(x, W_enc, bias, 16, exact=exact)
        assert pre.isfinite().sum(1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("d_sae", [100, 2048])
def test_a_silenced_feature_without_a_decoder_row_changes_no_other(d_sae):
    """A scale of 0 and a bias of -inf; the rest is as if the feature were not there."""
    x, W_enc, bias, scale = _problem(3, 8, d_sae, 0)
    rest = dense_search(x, W_enc[:, 1:], bias[1:], 16, scale[1:])
    bias[0], scale[0] = -torch.inf, 0
    features, pre = cuda_search.search(x, W_enc, bias, 16, scale, exact=True)
    assert torch.equal(features.sort(1).values, rest[0].sort(1).values + 1)
    assert pre.isfinite().all()
