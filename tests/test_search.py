"""The 8-bit searches, compiled and by torch operators, against the whole product."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesub import int8_search, native
from saesub.sparse_ops import dense_search


def _in_torch(*arguments):
    """For narrow dictionaries too, so that what is tested is no other search."""
    with mock.patch.object(int8_search, "LEAST_FEATURES_PER_CANDIDATE", 1):
        return int8_search.search(*arguments)


_no_vnni = {"reason": "no AVX-512 VNNI, or no compiler"}
SEARCHES = pytest.mark.parametrize(
    "search",
    [
        pytest.param(
            native.search,
            marks=pytest.mark.skipif(not native.has_int8_search(), **_no_vnni),
            id="native",
        ),
        pytest.param(
            _in_torch,
            marks=pytest.mark.skipif(not int8_search.available(), **_no_vnni),
            id="torch",
        ),
    ],
)


def _problem(n: int, d: int, d_sae: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return make(n, d), make(d_sae, d).T / d**0.5, make(d_sae) / 4


def _same_sets(x, W_enc, b_enc, scale, found, expected):
    """The same features, or others of scores equal to rounding error."""
    ranked = lambda features, pre: (pre * (1 if scale is None else scale[features])).sort(1).values  # noqa: E731
    atol = 1e-6 * float(x.norm(dim=1).max() * W_enc.norm(dim=0).max() + b_enc.abs().max())
    atol *= 1 if scale is None else float(scale.max())
    torch.testing.assert_close(ranked(*found), ranked(*expected), rtol=1e-6, atol=atol)
    exact = torch.gather(x @ W_enc + b_enc, 1, found[0])
    torch.testing.assert_close(found[1], exact, rtol=1e-6, atol=atol)
    assert all(len(set(row)) == len(row) for row in found[0].tolist())


@SEARCHES
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 210),
    d=st.integers(1, 70),
    d_sae=st.integers(8, 900),
    k=st.integers(1, 20),
    scaled=st.booleans(),
    outliers=st.booleans(),
    offset=st.sampled_from([0.0, -50.0]),
    seed=st.integers(0, 1000),
)
def test_search_finds_the_top_k(search, n, d, d_sae, k, scaled, outliers, offset, seed):
    x, W_enc, b_enc = _problem(n, d, d_sae, seed)
    if outliers:  # a massive dimension takes the whole 8-bit range for itself
        x[:, 0] *= 300
        W_enc[d // 2] *= 30
    scale = torch.linspace(0.1, 3, d_sae) if scaled else None
    k = min(k, d_sae // 8)
    found = search(x, W_enc, b_enc + offset, k, scale)
    _same_sets(
        x, W_enc, b_enc + offset, scale, found, dense_search(x, W_enc, b_enc + offset, k, scale)
    )


@SEARCHES
def test_search_ranks_ties_and_empty_rows_by_the_whole_product(search):
    x, W_enc, b_enc = _problem(200, 16, 2048, 0)
    x[:50] = 0  # every feature scores its bias
    W_enc[:, 100:1500] = W_enc[:, 99:100]  # 1,401 equal features
    b_enc[:] = 0
    found, expected = (find(x, W_enc, b_enc, 8) for find in (search, dense_search))
    _same_sets(x, W_enc, b_enc, None, found, expected)


@SEARCHES
def test_more_features_than_8_bits_tell_apart_are_ranked_right(search):
    """The k best and the last candidates lie some roundings from one another."""
    x, W_enc, _ = _problem(200, 64, 4096, 0)
    W_enc = (W_enc.T * 0.03 + x.mean(0)).T
    bias = torch.zeros(4096)
    _same_sets(x, W_enc, bias, None, search(x, W_enc, bias, 8), dense_search(x, W_enc, bias, 8))


@SEARCHES
def test_a_massive_coordinate_hides_no_feature(search):
    """The others round towards zero: the error then lies along what aligned features read."""
    n, d, d_sae = 64, 2048, 4096
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d, generator=generator), dim=1)
    rest = torch.randn(n, d, generator=generator)
    rows[:n] = torch.nn.functional.normalize(rest + 0.5 * rest.roll(1, 0), dim=1)
    for size in (50, 150, 300, 500, 2000):
        x = rest.clone()
        x[:, 0] = size
        for W_enc in (rows.T, (rows + size / 40 * torch.eye(d_sae, d)[7]).T):
            bias = torch.zeros(d_sae)
            found = search(x, W_enc, bias, 4)
            _same_sets(x, W_enc, bias, None, found, dense_search(x, W_enc, bias, 4))


@SEARCHES
@pytest.mark.parametrize("where", ["weights", "one row", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_and_does_not_crash(search, where, value):
    x, W_enc, b_enc = _problem(200, 16, 4096, 0)
    if where == "weights":
        W_enc = (W_enc.T * value).T
    elif where == "one row":
        W_enc[:, 5] = value
    else:
        b_enc[5] = value
    features, pre = search(x, W_enc, b_enc, 8)
    expected, reference = dense_search(x, W_enc, b_enc, 8)
    assert features.min() >= 0
    assert features.max() < 4096
    assert torch.equal(pre.isfinite().sum(1), reference.isfinite().sum(1))
    assert torch.equal((features == 5).any(1), (expected == 5).any(1)) or where == "weights"


@SEARCHES
def test_tokens_beyond_every_scale_are_ranked_by_the_whole_product(search):
    x, W_enc, b_enc = _problem(200, 16, 4096, 0)
    b_enc = b_enc.abs()
    x[3] *= 1e20
    x[4] *= 1e-38
    x[5] = 1e-42
    found, expected = (find(x, W_enc, b_enc, 8) for find in (search, dense_search))
    ordinary = torch.arange(200) != 3
    torch.testing.assert_close(
        found[1][ordinary].sort(1).values, expected[1][ordinary].sort(1).values
    )
    torch.testing.assert_close(found[1][3].sort().values, expected[1][3].sort().values)


@SEARCHES
def test_search_keeps_the_top_k_on_real_activations(search, model, corpus):
    """Every feature of the float32 ranking is found, for activations with their own outliers."""
    from saesub.activations import stream_activations

    for hook in ("blocks.12.hook_attn_out", "blocks.12.hook_resid_post"):
        blocks = stream_activations(model, corpus, [hook], n_tokens=1024, progress=False)
        x = torch.cat([block[hook] for block in blocks])
        generator = torch.Generator().manual_seed(0)
        rows = torch.nn.functional.normalize(
            torch.randn(8192, x.shape[1], generator=generator), dim=1
        )
        features, _ = search(x, rows.T, torch.zeros(8192), 32)
        expected, pre = dense_search(x.double(), rows.T.double(), torch.zeros(8192).double(), 32)
        hit = (features[:, :, None] == expected[:, None, :]).any(1)
        kth = pre.amin(1, keepdim=True)
        lost = ~hit & (pre - kth > 1e-5 * pre.abs())
        assert not lost.any(), f"{int(lost.sum())} of {lost.numel()} at {hook}"
        assert hit.float().mean() > 0.9999


@pytest.mark.parametrize("massive", [1, 30])
def test_no_score_is_further_off_than_its_bound(massive):
    x, W_enc, _ = _problem(300, 256, 4096, 0)
    x[:, 0] *= massive
    tokens, table = int8_search.Rounded.of(x), int8_search.Rounded.of(W_enc.T)
    rounded = [(r.whole * r.step[:, None]).double() for r in (tokens, table)]
    off = (rounded[0] @ rounded[1].T - x.double() @ W_enc.double()).abs().amax(1)
    bound = int8_search._largest_error(tokens, table, torch.ones(4096))
    within = tokens.aligned < int8_search._ALIGNED_ERROR
    assert within.all() or massive > 1
    assert (off < bound)[within].all()
    assert (off > bound / 4).all()  # nor is the bound so wide that it says nothing


@pytest.mark.skipif(not int8_search.available(), **_no_vnni)
def test_few_real_tokens_need_the_whole_product(model, corpus, monkeypatch):
    """A search that fell back always would be right, and slower than the product."""
    from saesub.activations import stream_activations

    ranked = []

    def product(x, *arguments):
        ranked.append(len(x))
        return dense_search(x, *arguments)

    monkeypatch.setattr(int8_search, "dense_search", product)
    hook = "blocks.12.hook_attn_out"
    blocks = stream_activations(model, corpus, [hook], n_tokens=1024, progress=False)
    x = torch.cat([block[hook] for block in blocks])
    W_enc = torch.nn.functional.normalize(x[torch.arange(16_384) % len(x)], dim=1)
    W_enc = W_enc + 0.02 * torch.randn(W_enc.shape, generator=torch.Generator().manual_seed(0))
    int8_search.search(x, W_enc.T, torch.zeros(16_384), 32)
    assert sum(ranked) < 0.1 * len(x)
