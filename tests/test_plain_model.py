"""The model within the bridge gives the bridge's activations, or is not run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_model import HOOK, tiny_gpt2, tiny_texts, tiny_tokenizer
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import saesub
from saesub import SaesubError, load_model, stream_activations
from saesub.activations.forward_pass import ModelPass
from saesub.activations.plain_model import PlainModel
from saesub.loading.registry import packaged, packaged_names
from saesub.paths import cache_dir

SITES = [  # those of the notebooks
    *("hook_attn_out", "hook_mlp_out", "hook_resid_post", "attn.hook_z", "attn.hook_out"),
    *("mlp.hook_out", "ln1.hook_normalized", "ln2.hook_normalized"),
    *("hook_resid_pre", "hook_resid_mid"),
]


def _tiny(**changes: Any) -> TransformerBridge:
    return load_model((tiny_gpt2(**changes), tiny_tokenizer()))


def _rows(model: Any, corpus: Any, hooks: list[str], **settings: Any) -> dict[str, Tensor]:
    run = {"n_tokens": 150, "context_size": 32, "batch_size": 3, "progress": False, **settings}
    batches = list(stream_activations(model, corpus, hooks, **run))
    return {name: torch.cat([batch[name] for batch in batches]) for name in hooks}


@pytest.fixture
def by_bridge(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Tensor]]:
    def rows(*args: Any, **settings: Any) -> dict[str, Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(ModelPass, "linear", None)
            return _rows(*args, **settings)

    return rows


@pytest.fixture
def plain_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that went through the plain model, the trial's among them."""
    sizes: list[int] = []
    run = PlainModel.run

    def counted(self: PlainModel, tokens: Tensor, hear: Any) -> None:
        sizes.append(len(tokens))
        run(self, tokens, hear)

    monkeypatch.setattr(PlainModel, "run", counted)
    return sizes


def _off(a: Tensor, b: Tensor) -> float:
    """Root mean square over tokens of the distance, in norms of the token."""
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).square().mean().sqrt())


def _check(model: TransformerBridge, corpus: Any, layers: list[int], by_bridge: Any) -> None:
    hooks = [f"blocks.{layer}.{site}" for layer in layers for site in SITES]
    for settings in ({"n_tokens": 200}, {"context_size": 100, "batch_size": 2, "skip_first": 0}):
        plain = _rows(model, corpus, hooks, **settings)
        expected = by_bridge(model, corpus, hooks, **settings)
        for name in hooks:
            assert plain[name].shape == expected[name].shape
            assert _off(plain[name], expected[name]) < 1e-5, name


def test_the_default_model_runs_plain_at_all_sites(
    model: TransformerBridge, corpus: Dataset, by_bridge, plain_runs: list[int]
) -> None:
    _check(model, corpus, [4], by_bridge)
    # Each call tries one context, and then takes all batches, of which the last is shorter.
    assert plain_runs == [1, 3, 3, 1, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", packaged_names("models"))
def test_packaged_models_run_plain_at_all_sites(
    name: str, corpus: Dataset, by_bridge, plain_runs: list[int]
) -> None:
    if packaged()[name].opt_in and not (cache_dir() / "packages" / name).exists():
        pytest.skip(f"{name} is not fetched unless someone asks for it")
    model = load_model(name, device="cpu")
    _check(model, corpus, [0, model.cfg.n_layers // 2, model.cfg.n_layers - 1], by_bridge)
    assert len(plain_runs) >= 5


def test_gemma_runs_plain(corpus: Dataset, by_bridge, plain_runs: list[int]) -> None:
    """It has a BOS, norms after attention and MLP, and layers with a window."""
    model = load_model("gemma3-270m", device="cpu")
    _check(model, corpus, [5], by_bridge)
    assert len(plain_runs) >= 5


def _torch_hook(model: TransformerBridge) -> None:
    model.blocks[0].mlp.original_component.register_forward_hook(lambda *args: args[-1] * 2)


def _point_hook(model: TransformerBridge) -> None:
    model.hook_dict["blocks.0.mlp.hook_out"].add_hook(lambda x, hook: x * 2)


def _torch_hook_at_a_point(model: TransformerBridge) -> None:
    point = model.hook_dict["blocks.0.mlp.hook_out"]
    point.register_forward_hook(lambda *args: args[-1] * 2)


def _own_forward(model: TransformerBridge) -> None:
    part: Any = model.blocks[0].mlp.original_component
    part.forward = lambda x, given=part.forward: 2 * given(x)


class Doubled(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def _own_module(model: TransformerBridge) -> None:
    part: Any = model.blocks[0].mlp.original_component
    part.act = Doubled(part.act)


def _compatibility(model: TransformerBridge) -> None:
    model.enable_compatibility_mode(disable_warnings=True)


_USERS = (_torch_hook, _point_hook, _torch_hook_at_a_point, _own_forward, _own_module)


@pytest.mark.parametrize("change", [*_USERS, _compatibility])
def test_what_is_the_users_runs_in_the_bridge(change, by_bridge, plain_runs: list[int]) -> None:
    model, texts = _tiny(), tiny_texts()
    untouched = _rows(model, texts, [HOOK])[HOOK]
    assert plain_runs.pop() == 2  # it ran so before the change
    plain_runs.clear()
    change(model)
    rows = _rows(model, texts, [HOOK])[HOOK]
    assert not plain_runs
    assert torch.equal(rows, by_bridge(model, texts, [HOOK])[HOOK])
    assert _off(rows, untouched) > 1e-3 or change is _compatibility


@pytest.mark.parametrize("path", ["h.1", "h.1.attn", "h.1.attn.c_proj", "h.0.mlp", "h.1.ln_2"])
def test_a_modules_name_leads_to_hook_points_with_its_output(path: str) -> None:
    texts, settings = tiny_texts(), {"n_tokens": 20, "context_size": 32, "progress": False}
    with pytest.raises(SaesubError, match="that is a module") as told:
        saesub.measure_spectrum(_tiny(), texts, f"transformer.{path}", **settings)
    hooks = re.findall(r"'(blocks[^']+)'", str(told.value))
    assert hooks
    model, tokens = tiny_gpt2().eval(), torch.arange(1, 9)[None]
    outputs: list[Any] = []
    module = model.transformer.get_submodule(path)
    module.register_forward_hook(lambda *given: outputs.append(given[2]))
    model(tokens)
    expected = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
    cache = _tiny().run_with_cache(tokens)[1]
    for hook in hooks:
        torch.testing.assert_close(cache[hook], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hook", ["blocks.1.attn.hook_q", "unembed.hook_out"])
def test_other_hook_points_are_the_bridges(hook: str, by_bridge) -> None:
    model, texts = _tiny(), tiny_texts()
    assert ModelPass(model, texts, hook, n_tokens=20, context_size=32).linear is None
    assert torch.equal(_rows(model, texts, [hook])[hook], by_bridge(model, texts, [hook])[hook])


def test_a_model_in_half_precision_is_the_bridges(plain_runs: list[int]) -> None:
    half = load_model((tiny_gpt2().bfloat16(), tiny_tokenizer()))
    run = ModelPass(half, tiny_texts(), HOOK, n_tokens=20, context_size=32)
    assert run.model.cfg.dtype == torch.bfloat16
    assert run.linear is None
    assert plain_runs == [1]  # tried, and found to differ


def test_a_plain_model_that_differs_is_not_run(monkeypatch, by_bridge) -> None:
    model, texts, run = _tiny(), tiny_texts(), PlainModel.run

    def off(self: PlainModel, tokens: Tensor, hear: Any) -> None:
        run(self, tokens, lambda name, x: hear(name, x * (1 + 3e-5)))

    expected = by_bridge(model, texts, [HOOK])[HOOK]
    monkeypatch.setattr(PlainModel, "run", off)
    assert torch.equal(_rows(model, texts, [HOOK])[HOOK], expected)


def test_a_plain_model_that_fails_is_not_run(monkeypatch, by_bridge) -> None:
    """As where an attention has a soft cap, which sdpa refuses."""
    model, texts = _tiny(), tiny_texts()

    def fail(self: PlainModel, *_: Any) -> None:
        raise ValueError("no softcap")

    expected = by_bridge(model, texts, [HOOK])[HOOK]
    monkeypatch.setattr(PlainModel, "run", fail)
    assert torch.equal(_rows(model, texts, [HOOK])[HOOK], expected)


def test_a_hook_that_is_set_between_batches_is_run(plain_runs: list[int]) -> None:
    model, texts = _tiny(), tiny_texts()
    run = {"n_tokens": 150, "context_size": 32, "batch_size": 2, "progress": False}
    stream = stream_activations(model, texts, [HOOK], **run)
    assert next(stream)[HOOK].any()
    model.hook_dict[HOOK].add_hook(lambda x, hook: x * 0)
    assert not next(stream)[HOOK].any()
    assert plain_runs == [1, 2]


def _state(model: TransformerBridge) -> list[Any]:
    parts = dict(model.original_model.named_modules())
    hooks = [len(p._forward_hooks) + len(p._forward_pre_hooks) for p in parts.values()]
    config = model.original_model.config
    modes = [p.training for p in parts.values()]
    return [hooks, modes, list(parts), config.to_json_string(), config._attn_implementation]


@pytest.mark.parametrize("fails", [False, True])
def test_a_plain_pass_changes_nothing_of_the_model(fails: bool, plain_runs: list[int]) -> None:
    model, texts = _tiny(), tiny_texts()
    model.original_model.config._attn_implementation = "eager"
    model.train()
    run = ModelPass(model, texts, [HOOK], n_tokens=50, context_size=32, progress=False)
    assert run.linear is not None  # the trial runs the bridge, which then hooks its own modules
    before = _state(model)
    assert before[-1] == "eager"

    def receive(name: str, x: Tensor) -> None:
        assert _state(model) == before
        if fails:
            raise SaesubError("bad: give others")

    if fails:
        with pytest.raises(SaesubError, match="bad"):
            list(run.batches(receive))
    else:
        list(run.batches(receive))
    assert plain_runs == [1, 2]
    assert _state(model) == before


def test_activations_can_be_trained_on(plain_runs: list[int]) -> None:
    run = {"n_tokens": 20, "context_size": 32, "progress": False}
    rows = next(stream_activations(_tiny(), tiny_texts(), [HOOK], **run))[HOOK]
    weights = torch.zeros(rows.shape[1], requires_grad=True)
    (rows @ weights).square().sum().backward()
    assert weights.grad is not None
    assert len(plain_runs) > 1


def test_a_window_shorter_than_the_context_counts(by_bridge, plain_runs: list[int]) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    settings = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = MistralForCausalLM(MistralConfig(**settings, sliding_window=8))
    model, texts = load_model((hf, tiny_tokenizer())), tiny_texts()
    rows = _rows(model, texts, [HOOK])[HOOK]
    assert _off(rows, by_bridge(model, texts, [HOOK])[HOOK]) < 1e-5
    assert len(plain_runs) > 1


def test_the_public_functions_are_those_of_the_pass() -> None:
    """Spectra and stores go through the same pass, so what holds for the stream holds for them."""
    spectrum = saesub.measure_spectrum(
        _tiny(), tiny_texts(), HOOK, n_tokens=150, context_size=32, progress=False
    )
    rows = _rows(_tiny(), tiny_texts(), [HOOK], batch_size=16)[HOOK].double()
    assert _off(spectrum.covariance, torch.cov(rows.T, correction=0)) < 1e-5
