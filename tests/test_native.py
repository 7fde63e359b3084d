"""The compiled CPU functions: their search against the whole product, threads, refusals.

What they share with the Triton kernels is in test_rows.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesub import native
from saesub.rows import AdamSettings
from saesub.sparse_ops import dense_search, select_topk

has_compiler = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(not has_compiler, reason="no C++ compiler here")
needs_int8 = pytest.mark.skipif(not native.has_int8_search(), reason="no AVX-512 VNNI here")


def test_it_is_built_where_it_can_be():
    """Else every other test here would be skipped without a word."""
    assert native.library() is not None
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and "avx512_vnni" in cpuinfo.read_text():
        assert native.has_int8_search()


def _problem(n: int, d: int, d_sae: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return make(n, d), make(d_sae, d).T / d**0.5, make(d_sae) / 4, make(d_sae, d) / d**0.5


def _same_sets(x, W_enc, b_enc, scale, found, expected):
    """The same features, or others of scores equal to rounding error."""
    ranked = lambda features, pre: (pre * (1 if scale is None else scale[features])).sort(1).values  # noqa: E731
    atol = 1e-6 * float(x.norm(dim=1).max() * W_enc.norm(dim=0).max() + b_enc.abs().max())
    atol *= 1 if scale is None else float(scale.max())
    torch.testing.assert_close(ranked(*found), ranked(*expected), rtol=1e-6, atol=atol)
    exact = torch.gather(x @ W_enc + b_enc, 1, found[0])
    torch.testing.assert_close(found[1], exact, rtol=1e-6, atol=atol)
    assert all(len(set(row)) == len(row) for row in found[0].tolist())


@needs_int8
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
def test_search_finds_the_top_k(n, d, d_sae, k, scaled, outliers, offset, seed):
    x, W_enc, b_enc, _ = _problem(n, d, d_sae, seed)
    if outliers:  # a massive dimension takes the whole 8-bit range for itself
        x[:, 0] *= 300
        W_enc[d // 2] *= 30
    scale = torch.linspace(0.1, 3, d_sae) if scaled else None
    k = min(k, d_sae // 8)
    found = native.search(x, W_enc, b_enc + offset, k, scale)
    _same_sets(
        x, W_enc, b_enc + offset, scale, found, dense_search(x, W_enc, b_enc + offset, k, scale)
    )


@needs_int8
def test_search_ranks_ties_and_empty_rows_by_the_whole_product():
    x, W_enc, b_enc, _ = _problem(200, 16, 2048, 0)
    x[:50] = 0  # every feature scores its bias
    W_enc[:, 100:1500] = W_enc[:, 99:100]  # 1,401 equal features
    b_enc[:] = 0
    found, expected = (search(x, W_enc, b_enc, 8) for search in (native.search, dense_search))
    _same_sets(x, W_enc, b_enc, None, found, expected)


@needs_int8
def test_a_massive_coordinate_hides_no_feature():
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
            found = native.search(x, W_enc, bias, 4)
            _same_sets(x, W_enc, bias, None, found, dense_search(x, W_enc, bias, 4))


@needs_int8
@pytest.mark.parametrize("where", ["weights", "one row", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_and_does_not_crash(where, value):
    x, W_enc, b_enc, _ = _problem(200, 16, 4096, 0)
    if where == "weights":
        W_enc = (W_enc.T * value).T
    elif where == "one row":
        W_enc[:, 5] = value
    else:
        b_enc[5] = value
    features, pre = native.search(x, W_enc, b_enc, 8)
    expected, reference = dense_search(x, W_enc, b_enc, 8)
    assert features.min() >= 0
    assert features.max() < 4096
    assert torch.equal(pre.isfinite().sum(1), reference.isfinite().sum(1))
    assert torch.equal((features == 5).any(1), (expected == 5).any(1)) or where == "weights"


@needs_int8
def test_tokens_beyond_every_scale_are_ranked_by_the_whole_product():
    x, W_enc, b_enc, _ = _problem(200, 16, 4096, 0)
    b_enc = b_enc.abs()
    x[3] *= 1e20
    x[4] *= 1e-38
    x[5] = 1e-42
    found, expected = (search(x, W_enc, b_enc, 8) for search in (native.search, dense_search))
    ordinary = torch.arange(200) != 3
    torch.testing.assert_close(
        found[1][ordinary].sort(1).values, expected[1][ordinary].sort(1).values
    )
    torch.testing.assert_close(found[1][3].sort().values, expected[1][3].sort().values)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, W, b: (x.double(), W, b), TypeError, "float32 tensor on the CPU is wanted"),
        (lambda x, W, b: (x, W.contiguous(), b), TypeError, "strides"),
        (lambda x, W, b: (x, W, b[:-1]), ValueError, r"\(1023,\) where \(1024,\)"),
        (lambda x, W, b: (x, W[:-1], b), ValueError, "is wanted"),
    ],
)
def test_tensors_that_the_compiled_code_would_misread_are_refused(change, error, message):
    x, W_enc, b_enc, _ = _problem(10, 16, 1024, 0)
    with pytest.raises(error, match=message):
        native.search(*change(x, W_enc, b_enc), 8)


def test_the_users_default_dtype_does_not_matter():
    x, W_enc, b_enc, _ = _problem(10, 16, 1024, 0)
    expected = native.search(x, W_enc, b_enc, 8)
    torch.set_default_dtype(torch.float64)
    try:
        found = native.search(x, W_enc, b_enc, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[1], expected[1])


@needs_int8
def test_search_keeps_the_top_k_on_real_activations(model, corpus):
    """Every feature of the float32 ranking is found, for activations with their own outliers."""
    from saesub.activations import stream_activations

    for hook in ("blocks.12.hook_attn_out", "blocks.12.hook_resid_post"):
        blocks = stream_activations(model, corpus, [hook], n_tokens=1024, progress=False)
        x = torch.cat([block[hook] for block in blocks])
        generator = torch.Generator().manual_seed(0)
        rows = torch.nn.functional.normalize(
            torch.randn(8192, x.shape[1], generator=generator), dim=1
        )
        features, _ = native.search(x, rows.T, torch.zeros(8192), 32)
        expected, pre = dense_search(x.double(), rows.T.double(), torch.zeros(8192).double(), 32)
        hit = (features[:, :, None] == expected[:, None, :]).any(1)
        kth = pre.amin(1, keepdim=True)
        lost = ~hit & (pre - kth > 1e-5 * pre.abs())
        assert not lost.any(), f"{int(lost.sum())} of {lost.numel()} at {hook}"
        assert hit.float().mean() > 0.9999


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    x, W_enc, b_enc, W_dec = _problem(500, 48, 1024, 0)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        selected = select_topk(x, W_enc, b_enc, 8, search=native.search)
        values = selected.pre.relu()
        decoded = native.decode(selected, values, W_dec, None, x, 1.0)
        rows = native.row_gradients(
            selected.features, selected.tokens, values, decoded.g_pre, x, decoded.g_out, 1024
        )
        weights = [W_enc.T.clone(), W_dec.clone(), b_enc.clone()]
        tensors = [t for w in weights for t in (w, torch.zeros_like(w), torch.zeros_like(w))]
        first_step, unclipped = torch.ones(2)
        rows.adam(AdamSettings(1e-2, 0.9, 0.99, 1e-8), first_step, unclipped, *tensors, moved=None)
        found = [selected.features, selected.pre, decoded.g_bias, decoded.g_pre]
        results.append([*found, *rows.norms(W_enc), *tensors])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_compiler_with_arguments_is_understood(monkeypatch, tmp_path):
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", f"env {has_compiler} -g0")
    native.library.cache_clear()
    try:
        assert native.library() is not None
        assert len(list(tmp_path.glob("native/*/*.so"))) == 1
    finally:
        monkeypatch.undo()
        native.library.cache_clear()


def test_without_a_compiler_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")  # a compiler that fails
    native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Install a C\\+\\+ compiler"):
            assert native.library() is None
        monkeypatch.setenv("SAESUB_NATIVE", "0")
        native.library.cache_clear()
        assert native.library() is None
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
