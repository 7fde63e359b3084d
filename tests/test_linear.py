"""Linear layers by oneDNN: the numbers of torch's own, and when they are left to it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_model import tiny_texts, tiny_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from saesub import load_model, stream_activations
from saesub.activations import forward_pass
from saesub.activations import linear as module
from saesub.activations.forward_pass import ModelPass
from saesub.activations.linear import by_onednn, linear_layers

HOOKS = ["blocks.1.hook_attn_out", "blocks.1.hook_resid_post"]


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


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    found = by_onednn(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [(), (1,), (7,), (300,), (2, 5), (3, 1, 4)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("order", ["plain", "strided", "transposed"])
@torch.no_grad()
def test_onednn_gives_torchs_numbers(calls, rows, has_bias, order) -> None:
    x, weight = _numbers(*rows, 96), _numbers(40, 96)
    if order == "strided":
        x = _numbers(*rows, 192)[..., ::2]
    if order == "transposed":
        weight = _numbers(96, 40).T
    _check(x, weight, _numbers(40) if has_bias else None)
    assert calls == [(40, 96)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_what_is_not_finite_is_passed_on(calls, value: float) -> None:
    x = _numbers(4, 96)
    x[1, 5] = value
    found = by_onednn(x, _numbers(40, 96), None)
    assert calls
    assert found.isfinite().all(1).tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    "bias", [_numbers(80)[::2], _numbers(1).expand(40), _numbers(1, 40), _numbers(1)]
)
@torch.no_grad()
def test_a_bias_that_onednn_would_misread_is_torchs(calls, bias: Tensor) -> None:
    _check(_numbers(7, 96), _numbers(40, 96), bias)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_dtypes_are_torchs(calls, dtype: torch.dtype) -> None:
    x, weight, bias = _numbers(4, 96).to(dtype), _numbers(40, 96).to(dtype), _numbers(40).to(dtype)
    assert torch.equal(by_onednn(x, weight, bias), F.linear(x, weight, bias))
    assert not calls


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@torch.no_grad()
def test_other_layouts_devices_and_no_rows_are_torchs(calls) -> None:
    x, weight = _numbers(4, 96), _numbers(40, 96)
    assert by_onednn(x[:0], weight, None).shape == (0, 40)
    torch.testing.assert_close(by_onednn(x, weight.to_sparse_csr(), None), F.linear(x, weight))
    assert by_onednn(x.to("meta"), weight.to("meta"), None).shape == (4, 40)
    assert not calls


class _Quantized(torch.Tensor):
    """As a library's: float32 by name, with products of its own."""


@torch.no_grad()
def test_a_class_of_its_own_multiplies_as_it_does(calls) -> None:
    x, weight, bias = _numbers(4, 96), _numbers(40, 96), _numbers(40)
    for i in range(3):
        given = [x, weight, bias]
        given[i] = given[i].as_subclass(_Quantized)
        by_onednn(*given)
    assert not calls
    by_onednn(x, torch.nn.Parameter(weight), bias)
    assert calls


def test_gradients_are_kept(calls) -> None:
    weight = _numbers(40, 96).requires_grad_()
    by_onednn(_numbers(4, 96), weight, None).sum().backward()
    assert weight.grad is not None
    assert not calls


def test_onednn_is_chosen_where_it_is_faster(calls, monkeypatch) -> None:
    weight = _numbers(40, 96)
    assert linear_layers(weight) == [by_onednn, F.linear]
    assert linear_layers(weight.bfloat16()) == [F.linear]
    assert linear_layers(weight.to("meta")) == [F.linear]
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert linear_layers(weight) == [F.linear]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_has_both", module._has_both.__wrapped__)
        patch.setattr(torch.backends.mkl, "is_available", lambda: False)
        assert linear_layers(weight) == [F.linear]
    monkeypatch.setattr(module, "_is_amd", lambda: False)
    assert linear_layers(weight) == [F.linear]


@pytest.mark.parametrize("has_file", [True, False])
@pytest.mark.parametrize(("told", "amd"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_the_processors_maker_is_read(monkeypatch, told: str, amd: bool, has_file: bool) -> None:
    def file(_: str) -> SimpleNamespace:
        text = f"processor: 0\nvendor_id: {told}\n"
        return SimpleNamespace(is_file=lambda: has_file, read_text=lambda: text)

    monkeypatch.setattr(module, "Path", file)
    monkeypatch.setattr(module.platform, "processor", lambda: f"Family 25 Model 17, {told}")
    assert module._is_amd.__wrapped__() == amd


def test_the_operator_takes_what_it_did() -> None:
    """torch does not document it. Should this fail, follow what changed in `by_onednn`."""
    if not module._has_both():
        pytest.skip("this torch lacks MKL or oneDNN")
    assert str(torch.ops.mkldnn._linear_pointwise.default._schema) == (
        "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, "
        "str? algorithm) -> Tensor Y"
    )


@pytest.fixture
def biased() -> TransformerBridge:
    """A model whose linear layers have biases that count."""
    config = GPTNeoXConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = GPTNeoXForCausalLM(config)
        for name, weight in made.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(weight)
    return load_model((made, tiny_tokenizer()))


def _rows(model: TransformerBridge, corpus: Any) -> dict[str, Tensor]:
    run = {"n_tokens": 150, "context_size": 32, "batch_size": 3, "progress": False}
    batches = list(stream_activations(model, corpus, HOOKS, **run))
    return {name: torch.cat([batch[name] for batch in batches]) for name in HOOKS}


def _off(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    each = [((a[n] - b[n]).norm(dim=1) / b[n].norm(dim=1)).square().mean().sqrt() for n in HOOKS]
    return float(max(each))


def test_a_pass_multiplies_by_onednn(biased, calls, monkeypatch) -> None:
    first = _rows(biased, tiny_texts())
    assert len(set(calls)) == 4  # attention's and the MLP's
    with torch.no_grad():
        for part in biased.original_model.modules():
            if isinstance(part, torch.nn.Linear):
                part.weight.mul_(1.5)
    found, n_calls = _rows(biased, tiny_texts()), len(calls)
    assert all("forward" not in vars(part) for part in biased.original_model.modules())
    monkeypatch.setattr(module, "_is_amd", lambda: False)
    assert _off(found, _rows(biased, tiny_texts())) < 1e-5
    assert len(calls) == n_calls
    assert _off(found, first) > 0.01


def test_the_default_model_multiplies_by_onednn(
    model: TransformerBridge, corpus: Dataset, calls, monkeypatch
) -> None:
    found = _rows(model, corpus)
    assert len(set(calls)) == 4
    monkeypatch.setattr(module, "_is_amd", lambda: False)
    assert _off(found, _rows(model, corpus)) < 1e-5


def test_torchs_layers_follow_where_onednn_is_too_far_off(biased, calls, monkeypatch) -> None:
    def rough(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 1.001 * F.linear(x, weight, bias)

    def run() -> ModelPass:
        return ModelPass(biased, tiny_texts(), HOOKS, n_tokens=20, context_size=32)

    assert run().linear is by_onednn
    monkeypatch.setattr(forward_pass, "linear_layers", lambda _: [rough, F.linear])
    assert run().linear is F.linear
    monkeypatch.setattr(forward_pass, "linear_layers", lambda _: [rough])
    assert run().linear is None
