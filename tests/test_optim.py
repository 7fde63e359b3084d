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

from saesub.optim import SparseAdam, parameter_groups

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


@pytest.mark.parametrize(("shape", "axis"), [((20, 6), 0), ((6, 20), 1), ((20,), 0)])
def test_equals_the_masked_adam_of_the_paper(shape, axis):
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
