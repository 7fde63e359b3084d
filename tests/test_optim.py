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
