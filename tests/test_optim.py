"""SparseAdam against the masked Adam it claims to be, written out entry by entry in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from sae_lens import (
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from torch import nn
from waiting import WaitingError, no_waiting

from saesub.topk import optim
from saesub.topk.optim import SparseAdam, parameter_groups

LR, BETA1, BETA2, EPS = 1e-2, 0.9, 0.99, 1e-8


def _gradients(shape: tuple[int, ...], axis: int, steps: int) -> list[torch.Tensor]:
    """Random gradients in which each row along `axis` is zero in most steps."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(steps):
        grad = torch.randn(shape, generator=generator)
        rows = torch.rand(shape[axis], generator=generator) < 0.3
        view = [1] * len(shape)
        view[axis] = -1
        out.append(grad * rows.view(view))
    return out


def _masked_adam(start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    p = start.double().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        update = LR * (m / (1 - BETA1**t)) / ((v / (1 - BETA2**t)).sqrt() + EPS)
        p = p - torch.where(g != 0, update, torch.zeros_like(update))
    return p


@pytest.fixture
def as_on_cuda(monkeypatch):
    """SparseAdam takes CUDA's path on the CPU."""
    monkeypatch.setattr(optim, "reading_waits", lambda parameter: True)


@pytest.mark.parametrize("path", ["as_on_cpu", "as_on_cuda"])
@pytest.mark.parametrize(("shape", "axis"), [((20, 6), 0), ((6, 20), 1), ((20,), 0)])
def test_equals_the_masked_adam_of_the_paper(shape, axis, path, request):
    if path == "as_on_cuda":
        request.getfixturevalue(path)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    parameter = nn.Parameter(start.clone())
    optimizer = SparseAdam(
        [{"params": [parameter], "feature_axis": axis}], lr=LR, betas=(BETA1, BETA2), eps=EPS
    )
    gradients = _gradients(shape, axis, steps=60)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = _masked_adam(start, gradients)
    torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6)


def test_differs_from_plain_adam_and_leaves_a_silent_row_exactly_alone():
    start = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    sparse, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    sparse_adam = SparseAdam([{"params": [sparse], "feature_axis": 0}], lr=LR)
    adam = torch.optim.Adam([plain], lr=LR)
    for step in range(10):
        gradient = torch.ones(8, 4)
        gradient[3] = 0.0 if step else 1.0  # row 3 has a gradient in the first step only
        sparse.grad, plain.grad = gradient.clone(), gradient.clone()
        sparse_adam.step(), adam.step()
        if step == 0:
            after_first = sparse[3].detach().clone()
    assert torch.equal(sparse[3], after_first)
    assert (plain[3] - after_first).abs().min() > LR
    torch.testing.assert_close(sparse[:3], plain[:3])


def test_without_momentum_it_is_plain_adam():
    start = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    sparse, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    betas = (0.0, BETA2)
    sparse_adam = SparseAdam([{"params": [sparse], "feature_axis": 0}], lr=LR, betas=betas)
    adam = torch.optim.Adam([plain], lr=LR, betas=betas)
    for gradient in _gradients((20, 6), 0, steps=60):
        sparse.grad, plain.grad = gradient.clone(), gradient.clone()
        sparse_adam.step(), adam.step()
    torch.testing.assert_close(sparse, plain, rtol=1e-5, atol=1e-6)


def test_state_resumes_exactly():
    gradients = _gradients((30, 5), 0, steps=20)
    parameter = nn.Parameter(torch.randn(30, 5, generator=torch.Generator().manual_seed(2)))
    optimizer = SparseAdam([{"params": [parameter], "feature_axis": 0}], lr=LR)
    for step, gradient in enumerate(gradients):
        if step == 10:
            kept = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict())
        parameter.grad = gradient.clone()
        optimizer.step()
    resumed = nn.Parameter(kept[0])
    again = SparseAdam([{"params": [resumed], "feature_axis": 0}], lr=LR)
    again.load_state_dict(kept[1])
    for gradient in gradients[10:]:
        resumed.grad = gradient.clone()
        again.step()
    assert torch.equal(resumed, parameter)


@pytest.mark.parametrize(
    "sae",
    [
        TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=16, k=2)),  # both axes equally long
        GatedTrainingSAE(GatedTrainingSAEConfig(d_in=16, d_sae=48)),
    ],
    ids=["topk", "gated"],
)
def test_groups_name_the_feature_axis_of_every_parameter(sae):
    groups = parameter_groups(sae)
    assert len(groups) == len(list(sae.parameters()))
    for (name, parameter), group in zip(sae.named_parameters(), groups, strict=True):
        assert group["params"][0] is parameter
        axis = group["feature_axis"]
        assert (axis is None) == (name == "b_dec")
        assert axis is None or parameter.shape[axis] == sae.cfg.d_sae


def test_bfloat16_states_keep_their_row_counters():
    parameter = nn.Parameter(torch.randn(40, 5).bfloat16())
    optimizer = SparseAdam([{"params": [parameter], "feature_axis": 0}], lr=LR)
    for step in range(300):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[step % 40] = 1.0  # one row in forty: the lazy path
        optimizer.step()
    again = SparseAdam([{"params": [parameter], "feature_axis": 0}], lr=LR)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    moved = again.state[parameter]["moved"]
    assert torch.equal(moved, optimizer.state[parameter]["moved"])
    assert moved.max() == 300


def test_a_state_of_plain_adam_goes_on_without_a_jump():
    """Its moments are all up to date: nothing must be decayed a second time."""
    parameter = nn.Parameter(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)))
    adam = torch.optim.Adam([parameter], lr=LR, fused=True)
    for _ in range(50):
        parameter.grad = torch.ones_like(parameter)
        adam.step()
    ours = SparseAdam([{"params": [parameter], "feature_axis": 0}], lr=LR)
    ours.load_state_dict(copy.deepcopy(adam.state_dict()))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[3] = 1.0
    ours.step()
    assert torch.allclose(before[3] - parameter[3], torch.tensor(LR), rtol=1e-3)
    assert torch.equal(before[4:], parameter[4:])


@pytest.mark.parametrize("share", [0.05, 0.9])
def test_a_row_of_nan_gradients_shows(share):
    parameter = nn.Parameter(torch.ones(100, 5))
    optimizer = SparseAdam([{"params": [parameter], "feature_axis": 0}], lr=LR)
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[: int(100 * share)] = torch.nan
    optimizer.step()
    assert parameter[0].isnan().all()
    assert parameter[-1].isfinite().all()


def test_a_gradient_that_lies_otherwise_in_memory_meets_its_own_entries():
    start = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(12, 7, generator=torch.Generator().manual_seed(1))
    moved = []
    for lay in (lambda g: g, lambda g: g.T.contiguous().T):
        parameter = nn.Parameter(start.clone())
        optimizer = SparseAdam([{"params": [parameter], "feature_axis": 0}], lr=LR)
        parameter.grad = lay(gradient.clone())
        optimizer.step()
        moved.append(parameter.detach())
    torch.testing.assert_close(*moved)


def _one_of(shape: tuple[int, ...]) -> tuple[nn.Parameter, SparseAdam]:
    parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    groups = [{"params": [parameter], "feature_axis": 0}]
    return parameter, SparseAdam(groups, lr=LR, betas=(BETA1, BETA2), eps=EPS)


def _take(parameter: nn.Parameter, optimizer: SparseAdam, gradients: list[torch.Tensor]) -> None:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()


def test_the_path_on_cuda_is_that_of_many_rows_bit_for_bit(request):
    """Three in ten rows move at each step, so that the CPU updates all as well."""
    gradients = _gradients((300, 6), 0, steps=30)
    assert all((g != 0).any(1).float().mean() > optim._LAZY_BELOW for g in gradients)
    expected = _one_of((300, 6))
    _take(*expected, gradients)
    request.getfixturevalue("as_on_cuda")
    found = _one_of((300, 6))
    _take(*found, gradients)
    assert torch.equal(found[0], expected[0])


def test_a_step_on_cuda_waits_for_nothing(as_on_cuda):
    parameter, optimizer = _one_of((40, 5))
    bias = nn.Parameter(torch.zeros(5))
    optimizer.add_param_group({"params": [bias], "feature_axis": None})
    for gradient in _gradients((40, 5), 0, steps=3):
        parameter.grad, bias.grad = gradient, gradient.sum(0)
        with no_waiting():
            optimizer.moved(parameter, 0)  # as a fused step leaves it
            optimizer.step()


def test_the_path_on_the_cpu_would_wait():
    """Else the test above could not fail."""
    parameter, optimizer = _one_of((40, 5))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(WaitingError), no_waiting():
        optimizer.step()


def test_a_state_moves_between_the_paths(monkeypatch):
    """As a checkpoint does between devices; few rows move, so that the CPU's moments lag behind."""
    gradients = [
        g * (torch.arange(40) % 7 == i % 7)[:, None]
        for i, g in enumerate(_gradients((40, 5), 0, steps=40))
    ]
    expected, found = _one_of((40, 5)), _one_of((40, 5))
    _take(*expected, gradients)
    for start in range(0, 40, 10):
        monkeypatch.setattr(optim, "reading_waits", lambda p, on=start % 20 == 0: on)
        kept = copy.deepcopy(found[1].state_dict())
        found = (found[0], _one_of((40, 5))[1])
        found[1].param_groups[0]["params"] = [found[0]]
        found[1].load_state_dict(kept)
        _take(*found, gradients[start : start + 10])
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6)


def test_a_row_of_nan_shows_and_a_silent_row_stays_on_cuda(as_on_cuda):
    parameter, optimizer = _one_of((10, 5))
    before = parameter.detach().clone()
    gradient = torch.zeros(10, 5)
    gradient[0] = torch.nan
    _take(parameter, optimizer, [gradient])
    assert parameter[0].isnan().all()
    assert torch.equal(parameter[1:], before[1:])


def test_a_step_that_found_infinity_changes_nothing_and_is_forgotten():
    for name in ("adam", "sparse_adam"):
        module = torch.nn.Linear(3, 2)
        made = optim.make_optimizer(name, module, lr=1e-2, betas=(0.9, 0.999))
        before = [p.detach().clone() for p in module.parameters()]
        for p in module.parameters():
            p.grad = torch.full_like(p, torch.nan)
        with optim.found_inf(made, torch.ones(())):
            made.step()
        assert not hasattr(made, "found_inf")
        assert not hasattr(made, "grad_scale")
        for p, was in zip(module.parameters(), before, strict=True):
            assert torch.equal(p, was)
