"""Linear layers by oneDNN: the numbers of torch's own, and when they are left to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

from saesub import stream_activations
from saesub.activations import linear as module
from saesub.activations.linear import linear

HOOKS = ["blocks.3.hook_attn_out", "blocks.3.hook_resid_post"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """An AMD processor, and the shapes of the weights that oneDNN multiplies."""
    if not module._has_both():
        pytest.skip("this torch lacks MKL or oneDNN")
    monkeypatch.setattr(module, "_is_amd", lambda: True)
    shapes: list[tuple[int, ...]] = []
    multiply = torch.ops.mkldnn._linear_pointwise

    def counted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(weight.shape))
        return multiply(x, weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return shapes


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("rows", [(1,), (7,), (300,), (2, 5), (3, 1, 4)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("order", ["plain", "strided", "transposed"])
@torch.no_grad()
def test_onednn_gives_torchs_numbers(calls, rows, has_bias, order) -> None:
    x, weight = _numbers(*rows, 96), _numbers(40, 96)
    bias = _numbers(40) if has_bias else None
    if order == "strided":
        x = _numbers(*rows, 192)[..., ::2]
    if order == "transposed":
        weight = _numbers(96, 40).T
    found = linear(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert calls == [(40, 96)]
    assert found.dtype == torch.float32
    assert found.shape == (*rows, 40)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * 96**0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_what_is_not_finite_is_passed_on(calls, value: float) -> None:
    x = _numbers(4, 96)
    x[1, 5] = value
    found = linear(x, _numbers(40, 96), None)
    assert calls
    assert found.isfinite().all(1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(calls, dtype: torch.dtype) -> None:
    x, weight = _numbers(4, 96).to(dtype), _numbers(40, 96).to(dtype)
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))
    assert not calls


def test_no_rows_no_onednn_and_other_processors_are_torchs(calls, monkeypatch) -> None:
    x, weight = _numbers(4, 96), _numbers(40, 96)
    assert linear(x[:0], weight, None).shape == (0, 40)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert torch.equal(linear(x, weight, None), F.linear(x, weight))
    monkeypatch.setattr(module, "_is_amd", lambda: False)
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))
    assert not calls


def test_the_operator_takes_what_it_did() -> None:
    """torch does not document it. Should this fail, follow what changed in `linear`."""
    if not module._has_both():
        pytest.skip("this torch lacks MKL or oneDNN")
    assert str(torch.ops.mkldnn._linear_pointwise.default._schema) == (
        "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, "
        "str? algorithm) -> Tensor Y"
    )


def _rows(model: TransformerBridge, corpus: Dataset) -> dict[str, Tensor]:
    run = {"n_tokens": 150, "context_size": 32, "batch_size": 3, "progress": False}
    batches = list(stream_activations(model, corpus, HOOKS, **run))
    return {name: torch.cat([batch[name] for batch in batches]) for name in HOOKS}


def test_a_pass_multiplies_by_onednn(
    model: TransformerBridge, corpus: Dataset, calls, monkeypatch
) -> None:
    found = _rows(model, corpus)
    assert len(calls) > 50
    assert len(set(calls)) == 4
    calls.clear()
    monkeypatch.setattr(module, "_is_amd", lambda: False)
    for name, rows in _rows(model, corpus).items():
        off = ((found[name] - rows).norm(dim=1) / rows.norm(dim=1)).square().mean().sqrt()
        assert 0 < off < 1e-5, name
    assert not calls


class _Quantized(torch.Tensor):
    """As a library's: float32 by name, with products of its own."""


def test_a_weight_of_another_kind_multiplies_as_it_does(
    model: TransformerBridge, corpus: Dataset, calls, monkeypatch
) -> None:
    part: Any = model.blocks[0].mlp.original_component.up_proj
    while hasattr(part, "original_component"):
        part = part.original_component
    kind = torch.nn.Parameter(part.weight.detach().as_subclass(_Quantized))
    shape = tuple(part.weight.shape)
    _rows(model, corpus)
    before = calls.count(shape)
    calls.clear()
    monkeypatch.setitem(part._parameters, "weight", kind)
    _rows(model, corpus)
    assert 0 < calls.count(shape) < before
