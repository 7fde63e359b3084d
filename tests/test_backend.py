"""Both row backends against float64: ragged and empty entries, odd widths, either kind of Adam.

Without a GPU the Triton kernels run in Triton's interpreter (see conftest.py), so their problems
are small.
"""

from __future__ import annotations

import copy
import importlib.util
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

from saesub.topk import cpu, cpu_library, triton_backend
from saesub.topk.backend import AdamSettings, RowBackend, RowGradients
from saesub.topk.eligibility import lay_out_by_feature
from saesub.topk.ops import Selected, row_products, select_topk
from saesub.topk.optim import SparseAdam, parameter_groups
from saesub.topk.step import autograd_pass, row_step

needs_native = pytest.mark.skipif(cpu_library.library() is None, reason="no C++ compiler here")
# Where Triton is installed and does not run, these tests fail.
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
BACKENDS = [
    pytest.param(cpu.BACKEND, marks=needs_native, id="native"),
    pytest.param(triton_backend.BACKEND, marks=needs_triton, id="triton"),
]


def _device(backend: RowBackend) -> str:
    return backend.device_type


def _interpreted(backend: RowBackend) -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return backend is triton_backend.BACKEND and _device(backend) == "cpu"


def _problem(n: int, d: int, d_sae: int, seed: int, device: str = "cpu"):
    """x, W_enc, b_enc, W_dec and b_dec."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    W_enc, W_dec = make(d_sae, d).T / d**0.5, make(d_sae, d) / d**0.5
    return make(n, d), W_enc, make(d_sae) / 4, W_dec, make(d)


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 70),
    d=st.integers(1, 40),
    d_sae=st.integers(1, 300),
    data=st.data(),
    seed=st.integers(0, 1000),
)
def test_native_rows_equal_float64_autograd(n, d, d_sae, data, seed):
    _equals_float64_autograd(cpu.BACKEND, n, d, d_sae, data.draw(st.integers(1, d_sae)), seed)


@needs_triton
@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 9),
    d=st.integers(1, 80),
    d_sae=st.integers(1, 50),
    data=st.data(),
    seed=st.integers(0, 1000),
)
def test_triton_rows_equal_float64_autograd(n, d, d_sae, data, seed):
    k = data.draw(st.integers(1, min(12, d_sae)))
    with pytest.MonkeyPatch.context() as patch:  # some features are several programs' work
        patch.setattr(triton_backend, "_SEGMENT", data.draw(st.sampled_from([2, 256])))
        _equals_float64_autograd(triton_backend.BACKEND, n, d, d_sae, k, seed)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter")
@pytest.mark.parametrize(("n", "d", "d_sae", "k"), [(2000, 576, 4608, 32), (500, 4608, 1000, 100)])
def test_triton_rows_equal_float64_autograd_at_full_size(n, d, d_sae, k):
    _equals_float64_autograd(triton_backend.BACKEND, n, d, d_sae, k, seed=0)


def _equals_float64_autograd(backend: RowBackend, n, d, d_sae, k, seed):
    x, W_enc, b_enc, W_dec, b_dec = _problem(n, d, d_sae, seed, _device(backend))
    selected = _ragged(select_topk(x, W_enc, b_enc, k), seed)
    values = selected.pre.relu()
    decoded = backend.decode(selected, values, W_dec, b_dec, x, 0.5)
    rows = backend.row_gradients(
        selected.features, selected.tokens, values, decoded.g_pre, x, decoded.g_out, d_sae
    )

    doubles = [t.double().requires_grad_() for t in (W_enc, b_enc, W_dec, b_dec)]
    pre = (x.double() @ doubles[0] + doubles[1])[selected.tokens, selected.features]
    acts = torch.zeros(n, d_sae, dtype=torch.float64, device=x.device)
    acts = acts.index_put((selected.tokens, selected.features), pre.relu())
    x_hat = acts @ doubles[2] + doubles[3]
    loss = 0.5 * (x_hat - x).square().sum()
    expected = torch.autograd.grad(loss, doubles)
    close = {"rtol": 1e-4, "atol": 1e-5 * (1 + float(loss.detach()) ** 0.5)}
    torch.testing.assert_close(decoded.x_hat.double(), x_hat.detach(), **close)
    torch.testing.assert_close(decoded.squared_error.double(), 2 * loss.detach(), **close)
    torch.testing.assert_close(decoded.g_bias.double(), expected[3], **close)
    assert not decoded.g_pre[values == 0].any()
    for ours, theirs in zip(_dense(rows), expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    norm, through = rows.norms(W_enc)
    total = sum(e.square().sum() for e in expected[:3])
    torch.testing.assert_close(norm, total, rtol=1e-3, atol=1e-6)  # pyright: ignore
    torch.testing.assert_close(through.double(), W_enc.double() @ expected[1], **close)


def _ragged(selected: Selected, seed: int) -> Selected:
    """A random two thirds of the entries: tokens have unequal numbers, some none at all."""
    kept = torch.rand(len(selected.features), generator=torch.Generator().manual_seed(seed)) < 2 / 3
    kept = kept.to(selected.features.device)
    counts = torch.bincount(selected.tokens[kept], minlength=len(selected.offsets) - 1)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Selected(selected.features[kept], offsets, selected.pre[kept], selected.d_sae)


def _dense(rows: RowGradients):
    """The gradients of W_enc, b_enc and W_dec that `rows` stands for."""
    device, m = rows.x.device, int(rows.start[-1])
    features = torch.arange(rows.d_sae, device=device).repeat_interleave(rows.start.diff())
    token, g_pre, value = (t[:m] for t in (rows.token, rows.g_pre.double(), rows.value.double()))
    one_hot = torch.zeros(rows.d_sae, m, dtype=torch.float64, device=device)
    one_hot[features, torch.arange(m, device=device)] = 1
    enc = one_hot @ (g_pre[:, None] * rows.x[token].double())
    dec = one_hot @ (value[:, None] * rows.g_out[token].double())
    return enc.T, one_hot @ g_pre, dec


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adam_rows_equals_torch_adam_and_the_masked_adam_of_the_paper(backend, lazy):
    n, d, d_sae, k, steps = 6, 10, 30, 3, 8 if _interpreted(backend) else 20
    lr, beta1, beta2, eps = 1e-2, 0.9, 0.99, 1e-8
    device = _device(backend)
    _, W_enc, b_enc, W_dec, _ = _problem(n, d, d_sae, 0, device)
    ours = [W_enc.T.clone(), W_dec.clone(), b_enc.clone()]
    averages = [(torch.zeros_like(t), torch.zeros_like(t)) for t in ours]
    reference = [t.double() for t in (W_enc.T, W_dec, b_enc)]
    expected = [(torch.zeros_like(t), torch.zeros_like(t)) for t in reference]
    moved = torch.zeros(d_sae, dtype=torch.int64, device=device) if lazy else None
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        features = torch.stack([torch.randperm(d_sae, generator=generator)[:k] for _ in range(n)])
        x, g_out = torch.randn(2, n, d, generator=generator).to(device)
        values, g_pre = torch.randn(2, n * k, generator=generator).to(device)
        values[::5] = 0
        g_pre[::5] = 0
        chosen = Selected.equally(features.to(device), values.view(n, k), d_sae)
        rows = backend.row_gradients(chosen.features, chosen.tokens, values, g_pre, x, g_out, d_sae)
        tensors = [t for p, pair in zip(ours, averages, strict=True) for t in (p, *pair)]
        of_step = [torch.tensor(float(t), device=device) for t in (step, 0.5)]
        rows.adam(AdamSettings(lr, beta1, beta2, eps), *of_step, *tensors, moved=moved)
        enc, bias, dec = _dense(rows)
        for p, (m, v), g in zip(reference, expected, (enc.T, dec, bias), strict=True):
            g = 0.5 * g
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).add_(g * g, alpha=1 - beta2)
            root = (v / (1 - beta2**step)).sqrt() + eps
            update = lr * m / (1 - beta1**step) / root
            p -= torch.where(g != 0, update, torch.zeros_like(update)) if lazy else update
    for p, q in zip(ours, reference, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-5)


@needs_triton
def test_triton_runs_where_it_is_installed():
    assert triton_backend.available()


@needs_triton
@pytest.mark.parametrize("d", [1, 24, 80])
def test_row_products_equal_those_of_torch(d):
    x, W_enc, b_enc, _, _ = _problem(7, d, 60, 0, _device(triton_backend.BACKEND))
    selected = _ragged(select_topk(x, W_enc, b_enc, 9), seed=1)
    ours, theirs = (
        f(x, selected, W_enc.T) for f in (triton_backend.BACKEND.row_products, row_products)
    )
    torch.testing.assert_close(ours, theirs)


def _steps():
    """Every backend with every kind of SAE, number of dead features and optimizer; in Triton's
    interpreter, which is slow, half of these, with every pair of settings."""
    every = list(product(("topk", "batchtopk"), (0, 20), ("adam", "sparse_adam")))
    half = [every[i] for i in (0, 3, 5, 6)]
    for backend in BACKENDS:
        (made,) = backend.values
        for step in half if _interpreted(made) else every:
            name = "-".join(map(str, (backend.id, *step)))
            yield pytest.param(made, *step, marks=backend.marks, id=name)


@pytest.mark.parametrize(("backend", "kind", "n_dead", "optimizer"), _steps())
def test_a_step_on_rows_equals_one_by_autograd(backend, kind, n_dead, optimizer):
    """Losses and updated weights of three steps on a small SAE, AuxK on some of them."""
    settings_ = {"d_in": 24, "d_sae": 64, "k": 4, "decoder_init_norm": 0.5}
    torch.manual_seed(0)
    if kind == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**settings_))
    else:
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**settings_))
    sae.b_enc.data.normal_(0, 0.1)
    sae.to(_device(backend))
    twin = copy.deepcopy(sae)
    lay_out_by_feature(sae)
    make = {
        "adam": lambda s: torch.optim.Adam(s.parameters(), lr=1e-2, fused=True),
        "sparse_adam": lambda s: SparseAdam(parameter_groups(s), lr=1e-2),
    }[optimizer]
    ours, theirs = make(sae), make(twin)
    dead = torch.arange(64, device=sae.W_enc.device) < n_dead if n_dead else None
    for _ in range(3):
        x = torch.randn(12, 24).to(sae.W_enc.device)
        found = row_step(backend, sae, ours, x, dead)
        expected = autograd_pass(twin, x, dead)
        expected.loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        theirs.step()
        theirs.zero_grad()
        for name, value in expected.losses.items():
            torch.testing.assert_close(found.losses[name], value.detach(), rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(sae.named_parameters(), twin.parameters(), strict=True):
        # Adam divides by the gradient's size, so where that is rounding error the update is too.
        assert ((a - b).abs() > 1e-4).float().mean() < 0.01, name
