"""The 8-bit searches, compiled and by torch operators, against the whole product."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesub.topk import cpu, cpu_library, int8_search, packed_encoder
from saesub.topk.ops import dense_search


def _exact_int_mm(a, b, out):
    """What torch's 8-bit product gives where there is one."""
    return out.copy_(a.double() @ b.double())


@contextmanager
def _whatever_the_size_and_the_cpu():
    """So that what is tested is no other search."""
    with ExitStack() as stack:
        for name, value in {
            "LEAST_FEATURES_PER_CANDIDATE": 1,
            "LEAST_TOKENS": 0,
            "available": lambda: True,
            "_int_mm": int8_search._int_mm if int8_search.available() else _exact_int_mm,
        }.items():
            stack.enter_context(mock.patch.object(int8_search, name, value))
        yield


def _in_torch(*arguments):
    with _whatever_the_size_and_the_cpu():
        return int8_search.search(*arguments)


SEARCHES = pytest.mark.parametrize(
    "search",
    [
        pytest.param(
            cpu.BACKEND.search,
            marks=pytest.mark.skipif(
                not bool(cpu_library.instructions()), reason="no compiler or VNNI"
            ),
            id="native",
        ),
        pytest.param(_in_torch, id="torch"),
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


@pytest.mark.skipif(not bool(cpu_library.instructions()), reason="no compiler or VNNI")
def test_features_that_crowd_near_the_top_do_not_send_a_token_to_the_whole_product():
    """As training makes them: hundreds within rounding of one another, on many tokens."""
    x, W_enc, b_enc = _problem(200, 64, 8192, 0)
    near = torch.randn(64, 1100, generator=torch.Generator().manual_seed(1))
    W_enc[:, 4000:5100], b_enc[:] = W_enc[:, :1] + 1e-3 * near, 0
    x += 5 * W_enc[:, 0]
    expected = dense_search(x, W_enc, b_enc, 32)
    with mock.patch.object(
        packed_encoder, "dense_search", side_effect=AssertionError("not needed")
    ):
        found = cpu.BACKEND.search(x, W_enc, b_enc, 32)
    crowded = (expected[0] >= 4000) & (expected[0] < 5100)
    assert crowded.any(1).float().mean() > 0.9
    _same_sets(x, W_enc, b_enc, None, found, expected)


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
    from saesub.activations.collect import stream_activations

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


@pytest.mark.parametrize("massive", [1, 100, 305, 2000])
@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.85, 1.0])
def test_no_score_exceeds_its_bound(massive, cosine):
    """Of features along what a massive coordinate leaves too little range for, as of any other."""
    n, d, d_sae = 50, 2048, 500
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    unit = torch.nn.functional.normalize
    rows = unit(torch.randn(d_sae, d, generator=generator), dim=1) * (1 - cosine**2) ** 0.5
    rows += cosine * unit(x, dim=1)[torch.arange(d_sae) % n]
    x[:, 0] *= massive
    bias, scale = torch.randn(2, d_sae, generator=generator)
    scale = scale.abs() + 0.1
    tokens, table = int8_search.Rounded.of(x), int8_search.Rounded.of(rows)
    with _whatever_the_size_and_the_cpu():
        features, bounds = int8_search._candidates(tokens, table, bias, scale, d_sae)
    exact = ((x.double() @ rows.double().T + bias) * scale).gather(1, features)
    room = bounds * tokens.step[:, None] - exact
    assert (room > 0).all()
    # Nor are the bounds so wide that they say nothing.
    half = _half_width(tokens, table, scale).gather(1, features)
    assert (room <= 2 * half).float().mean() > 0.999
    assert (room < 0.7 * half).any()


def _half_width(tokens, table, scale):
    of_token = tokens.width * tokens.step
    return of_token[:, None] * table.norm * scale + tokens.norm[:, None] * (
        table.width * table.step * scale
    )


def test_one_odd_feature_sends_no_token_to_the_whole_product(monkeypatch):
    x, W_enc, b_enc = _problem(64, 64, 4096, 0)
    expected = dense_search(x, W_enc, b_enc, 8)
    for column, scaled in ((W_enc[:, 3] * 10, 1.0), (torch.eye(64)[7], 1.0), (W_enc[:, 3], 4.0)):
        odd, scale = W_enc.clone(), torch.ones(4096)
        odd[:, 5], scale[5] = column, scaled
        expected = dense_search(x, odd, b_enc, 8, scale)
        with monkeypatch.context() as patch:
            patch.setattr(int8_search, "dense_search", _ranked_wholly([]))
            found = _in_torch(x, odd, b_enc, 8, scale)
        _same_sets(x, odd, b_enc, scale, found, expected)


def _ranked_wholly(counts, limit=3):
    """`dense_search`, of at most so many tokens in all."""

    def search(x, *arguments):
        counts.append(len(x))
        assert sum(counts) <= limit
        return dense_search(x, *arguments)

    return search


def test_biases_that_overflow_in_steps_of_a_zero_token_are_ranked_by_the_whole_product():
    _, W_enc, _ = _problem(1, 64, 4608, 0)
    x, b_enc = torch.zeros(4, 64), -1e9 * (1 + torch.rand(4608))
    _same_sets(
        x, W_enc, b_enc, None, _in_torch(x, W_enc, b_enc, 2), dense_search(x, W_enc, b_enc, 2)
    )


@pytest.mark.parametrize("d_sae", [4096, 4099])
def test_row_major_weights_odd_widths_and_no_tokens_are_searched_too(d_sae):
    x, W_enc, b_enc = _problem(40, 33, d_sae, 0)
    found = _in_torch(x, W_enc.contiguous(), b_enc, 8)
    _same_sets(x, W_enc, b_enc, None, found, dense_search(x, W_enc, b_enc, 8))
    assert _in_torch(x[:0], W_enc, b_enc, 8)[0].shape == (0, 8)


def test_few_real_tokens_need_the_whole_product(model, corpus, monkeypatch):
    """A search that fell back always would be right, and slower than the product."""
    from saesub.activations.collect import stream_activations

    hook = "blocks.12.hook_attn_out"
    blocks = stream_activations(model, corpus, [hook], n_tokens=1024, progress=False)
    x = torch.cat([block[hook] for block in blocks])
    W_enc = torch.nn.functional.normalize(x[torch.arange(16_384) % len(x)], dim=1)
    W_enc = W_enc + 0.02 * torch.randn(W_enc.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(int8_search, "dense_search", _ranked_wholly([], limit=len(x) // 10))
    _in_torch(x, W_enc.T, torch.zeros(16_384), 32)


@SEARCHES
def test_rounding_errors_along_a_feature_do_not_hide_it(search):
    """Beside a massive coordinate the others round to nothing, and the best feature reads them."""
    d, d_sae = 1025, 4096
    x, rows = torch.full((600, d), 0.04), torch.zeros(d_sae, d)
    x[:, 0], rows[:, 0] = 127, torch.linspace(0.5, 1.25, d_sae) / 127
    rows[7] = 1 / 32
    rows[7, 0] = 0
    found = search(x, rows.T, torch.zeros(d_sae), 1)
    expected = dense_search(x, rows.T, torch.zeros(d_sae), 1)
    assert (expected[0] == 7).all()
    assert torch.equal(found[0], expected[0])
