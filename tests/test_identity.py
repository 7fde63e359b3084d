"""Kept activations come back only for the model, the tokenizer and the text that made them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_model import HOOK, tiny_gpt2, tiny_texts, tiny_tokenizer
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from saesub import SaesubError, harvest, load_model, measure_spectrum
from saesub.activations import identity
from saesub.activations.forward_pass import capture
from saesub.activations.identity import DocumentsDigest, model_settings
from saesub.activations.store import ActivationStore
from saesub.loading.models import ContextTokens
from saesub.training.comparison import joint_batches

RUN: dict[str, Any] = {"n_tokens": 600, "context_size": 64, "batch_size": 4, "progress": False}


def _weight(at: tuple[int, ...]) -> Callable[[Any], Any]:
    def edit(pair: tuple[Any, Any]) -> Any:
        with torch.no_grad():
            pair[0].transformer.h[1].attn.c_proj.weight[at] += 1e-3
        return pair

    return edit


def _head(pair: tuple[Any, Any]) -> Any:
    with torch.no_grad():
        pair[0].transformer.h[1].attn.c_proj.weight[32:48] = 0  # rows of head 2's W_O
    return pair


def _through_data(pair: tuple[Any, Any]) -> Any:
    pair[0].transformer.ln_f.bias.data[-1] = 0.5  # no version counter sees it
    return pair


def _config(pair: tuple[Any, Any]) -> Any:
    return tiny_gpt2(activation_function="relu"), pair[1]


def _dtype(pair: tuple[Any, Any]) -> Any:
    return pair[0].double(), pair[1]


def _vocabulary(pair: tuple[Any, Any]) -> Any:
    return pair[0], tiny_tokenizer(eos="<|other|>")


def _hook(pair: tuple[Any, Any]) -> Any:
    bridge = load_model(pair)
    bridge.add_hook("blocks.0.hook_attn_out", lambda x, hook: x * 0)
    return bridge


def _permanent_hook(pair: tuple[Any, Any]) -> Any:
    bridge = load_model(pair)
    bridge.add_perma_hook("blocks.0.hook_mlp_out", lambda x, hook: x * 0)
    return bridge


def _torch_hook(pair: tuple[Any, Any]) -> Any:
    pair[0].transformer.h[0].mlp.register_forward_hook(lambda module, given, out: out * 0)
    return pair


def _pre_hook(pair: tuple[Any, Any]) -> Any:
    pair[0].transformer.h[0].mlp.register_forward_pre_hook(lambda module, given: (given[0] * 0,))
    return pair


def _forward(pair: tuple[Any, Any]) -> Any:
    mlp = pair[0].transformer.h[0].mlp
    mlp.forward = lambda x: x * 0
    return pair


def _activation(pair: tuple[Any, Any]) -> Any:
    pair[0].transformer.h[0].mlp.act = torch.nn.ReLU()  # the config says GELU
    return pair


class Lora(torch.nn.Module):
    """As PEFT's layers, it has a scale that is no weight."""

    def __init__(self, base: torch.nn.Module, scale: float) -> None:
        super().__init__()
        self.base, self.scaling = base, {"default": scale}
        self.register_buffer("update", torch.eye(64).repeat(4, 1))

    def forward(self, x: Any) -> Any:
        return self.base(x) + self.scaling["default"] * x @ self.update


def _adapted(scale: float) -> tuple[Any, Any]:
    model = tiny_gpt2()
    model.transformer.h[0].mlp.c_proj = Lora(model.transformer.h[0].mlp.c_proj, scale)
    return model, tiny_tokenizer()


def test_a_store_of_a_model_with_a_module_of_the_users_own_is_never_used_again(
    tmp_path: Path, texts: list[str]
) -> None:
    """No hash tells what its code does, nor what it holds."""
    harvest(_adapted(1.0), texts, [HOOK], tmp_path, **RUN)
    for scale in (1.0, 0.0):
        with pytest.raises(SaesubError, match="differs in hooks"):
            harvest(_adapted(scale), texts, [HOOK], tmp_path, **RUN)


def test_numbers_of_a_librarys_modules_tell_models_apart(tmp_path: Path, texts: list[str]) -> None:
    edited = tiny_gpt2()
    edited.transformer.h[0].ln_1.eps = 3.0
    harvest((tiny_gpt2(), tiny_tokenizer()), texts, [HOOK], tmp_path, **RUN)
    with pytest.raises(SaesubError, match="differs in architecture"):
        harvest((edited, tiny_tokenizer()), texts, [HOOK], tmp_path, **RUN)


class Times:
    """An activation function of the user's own, which keeps its factor in no `__dict__`."""

    __slots__ = ("by",)

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: Any) -> Any:
        return self.by * x


def _edited_mlp(edit: Callable[[Any], Any]) -> Callable[[], TransformerBridge]:
    """A bridge whose first MLP the edit has changed."""

    def make() -> TransformerBridge:
        model = tiny_gpt2()
        edit(model.transformer.h[0].mlp)
        return load_model((model, tiny_tokenizer()))

    return make


def _edited_point(edit: Callable[[Any], Any]) -> Callable[[], TransformerBridge]:
    """A bridge of whose hook points the edit has changed one."""

    def make() -> TransformerBridge:
        bridge = load_model((tiny_gpt2(), tiny_tokenizer()))
        edit(bridge.hook_dict["blocks.0.hook_mlp_out"])
        return bridge

    return make


def _doubled(own: Callable[..., Any]) -> Callable[..., Any]:
    """As decorators do, it takes over the name and the module of what it replaces."""
    return wraps(own)(lambda *given: 2 * own(*given))


def _without_gradient(own: Callable[..., Any]) -> Callable[..., Any]:
    return torch.no_grad()(_doubled(own))


OWN_CODE = {
    "module": _edited_mlp(lambda mlp: setattr(mlp, "c_proj", Lora(mlp.c_proj, 1.0))),
    "forward": _edited_mlp(lambda mlp: setattr(mlp, "forward", _doubled(mlp.forward))),
    "forward in a library's wrapper": _edited_mlp(
        lambda mlp: setattr(mlp, "forward", _without_gradient(mlp.forward))
    ),
    "partial": _edited_mlp(lambda mlp: setattr(mlp, "forward", partial(_doubled(mlp.forward)))),
    "hook": _edited_mlp(
        lambda mlp: mlp.register_forward_hook(wraps(torch.relu)(lambda m, given, out: 2 * out))
    ),
    "another method": _edited_mlp(
        lambda mlp: setattr(mlp.dropout, "extra_repr", MethodType(lambda module: "", mlp.dropout))
    ),
    "held function": _edited_mlp(lambda mlp: setattr(mlp, "scale", lambda x: 2 * x)),
    "held object": _edited_mlp(lambda mlp: setattr(mlp, "scale", Times(2.0))),
    "a library's partial": _edited_mlp(
        lambda mlp: setattr(mlp, "forward", partial(torch.mul, torch.tensor(2.0)))
    ),
    "another module's method": _edited_mlp(
        lambda mlp: setattr(mlp, "forward", tiny_gpt2().transformer.h[1].mlp.forward)
    ),
    "hook of a point": _edited_point(lambda p: p.register_forward_hook(lambda m, i, out: 2 * out)),
    "pre-hook of a point": _edited_point(
        lambda p: p.register_forward_pre_hook(lambda m, given: (2 * given[0],))
    ),
    "forward of a point": _edited_point(lambda p: setattr(p, "forward", lambda x: 2 * x)),
}


@pytest.mark.parametrize("made", OWN_CODE.values(), ids=OWN_CODE)
def test_code_of_the_users_own_is_a_hook(made: Callable[[], TransformerBridge]) -> None:
    names = [model_settings(made())["hooks"] for _ in range(2)]
    assert "none" not in names
    assert names[0] != names[1]


@pytest.mark.parametrize("method", ["forward", "extra_repr"])
def test_a_method_replaced_for_a_whole_class_is_a_hook(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    bridge = load_model((tiny_gpt2(), tiny_tokenizer()))
    assert model_settings(bridge)["hooks"] == "none"
    monkeypatch.setattr(Conv1D, method, _doubled(getattr(Conv1D, method)))
    assert model_settings(bridge)["hooks"] != "none"


def _hashes(edit: Callable[[Any], Any]) -> dict[str, str]:
    model = tiny_gpt2()
    edit(model)
    return model_settings(load_model((model, tiny_tokenizer())))


def _activation_of(module: torch.nn.Module) -> Callable[[Any], Any]:
    return lambda model: setattr(model.transformer.h[0].mlp, "act", module)


def _quantized(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Linear(256, 256))
    return torch.ao.quantization.quantize_dynamic(layers, {torch.nn.Linear})


def _held_by_config(value: Any) -> Callable[[Any], Any]:
    return lambda model: setattr(model.config, "more", value)


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        (*map(_activation_of, (torch.nn.AvgPool1d(3, 1, 1), torch.nn.AvgPool1d(9, 1, 4))), "arch"),
        (
            _held_by_config(torch.tensor([1.00001])),
            _held_by_config(torch.tensor([1.00002])),
            "arch",
        ),
        (_held_by_config({1: 4.0, "a": {2}}), _held_by_config({"1": 4.0, "a": {2}}), "arch"),
        (
            lambda model: setattr(model.transformer.h[0].mlp, "more", torch.relu),
            lambda model: setattr(model.transformer.h[0].mlp, "more", torch.tanh),
            "arch",
        ),
        (
            lambda model: setattr(model.transformer, "more", partial(torch.round, decimals=1)),
            lambda model: setattr(model.transformer, "more", partial(torch.round, decimals=2)),
            "arch",
        ),
        (_held_by_config(torch.float32), _held_by_config(torch.bfloat16), "arch"),
        (_activation_of(_quantized(0)), _activation_of(_quantized(1)), "weights"),
    ],
)
def test_what_a_librarys_module_or_a_config_holds_tells_models_apart(
    one: Callable[[Any], Any], other: Callable[[Any], Any], named: str
) -> None:
    found, again, another = _hashes(one), _hashes(one), _hashes(other)
    assert found == again
    different = {key for key in found if found[key] != another[key]}
    assert [key.startswith(named) for key in different] == [True]


def test_what_a_tied_weight_is_tied_to_counts_and_not_that_it_is_tied() -> None:
    def hashed(tied_to: int, *, copied: bool = False) -> str:
        model = tiny_gpt2(n_layer=3)
        layers = model.transformer.h
        with torch.no_grad():
            layers[0].mlp.c_fc.weight *= 9
            same = layers[tied_to].mlp.c_fc.weight
            layers[2].mlp.c_fc.weight = torch.nn.Parameter(same.clone()) if copied else same
        return identity._weights(model)

    assert hashed(0) != hashed(1)
    assert hashed(0) == hashed(0, copied=True)


def test_a_forward_replaced_for_a_whole_class_is_a_hook(
    kept: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Conv1D.forward
    monkeypatch.setattr(Conv1D, "forward", lambda module, x: 2 * own(module, x))
    with pytest.raises(SaesubError, match="differs in hooks"):
        harvest((tiny_gpt2(), tiny_tokenizer()), texts, [HOOK], kept, **RUN)


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python alone, of which no file describes what it does."""

    def __init__(self, *, lower: bool) -> None:
        self.lower, self.ids = lower, {"<e>": 0, **{chr(i): i - 31 for i in range(32, 127)}}
        super().__init__(eos_token="<e>")

    @property
    def vocab_size(self) -> int:
        return len(self.ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text.lower() if self.lower else text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, 1)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.ids)[index]


def test_a_tokenizer_in_python_is_told_apart_by_what_it_gives() -> None:
    def hashed(lower: bool) -> str:
        return model_settings(load_model((tiny_gpt2(), Letters(lower=lower))))["tokenizer"]

    assert hashed(False) == hashed(False) != hashed(True)


class Lowercasing(PreTrainedTokenizerFast):
    """A fast tokenizer whose file does not say all that it does."""

    def _encode_plus(self, text: Any, *args: Any, **more: Any) -> Any:
        return super()._encode_plus(text.lower(), *args, **more)


def test_a_fast_tokenizer_of_the_users_own_is_told_apart_by_what_it_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = Lowercasing(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    specials = ContextTokens(0, 1, (0, 1))
    lowered = identity._tokenizer(tokenizer, specials)
    assert lowered == identity._tokenizer(tokenizer, specials)
    monkeypatch.delattr(Lowercasing, "_encode_plus")
    assert identity._tokenizer(tokenizer, specials) != lowered


EDITS = {
    "one weight, the last": (_weight((63, 63)), "weights"),
    "one weight, the first": (_weight((0, 0)), "weights"),
    "a head ablated": (_head, "weights"),
    "a bias, through .data": (_through_data, "weights"),
    "dtype": (_dtype, "weights"),
    "config": (_config, "architecture"),
    "an activation function": (_activation, "architecture"),
    "tokenizer": (_vocabulary, "tokenizer"),
    "hook": (_hook, "hooks"),
    "permanent hook": (_permanent_hook, "hooks"),
    "torch's hook": (_torch_hook, "hooks"),
    "torch's pre-hook": (_pre_hook, "hooks"),
    "replaced forward": (_forward, "hooks"),
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return tiny_texts(60)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    model = tiny_gpt2(), tiny_tokenizer()
    harvest(model, texts, [HOOK], folder, **RUN)
    measure_spectrum(model, texts, HOOK, checkpoint=folder / "spectrum", **RUN)
    return folder


@pytest.mark.parametrize(("edit", "named"), EDITS.values(), ids=EDITS)
def test_an_edited_model_is_refused_with_what_was_edited(
    kept: Path, texts: list[str], edit: Callable[[Any], Any], named: str
) -> None:
    model = edit((tiny_gpt2(), tiny_tokenizer()))
    with pytest.raises(SaesubError, match=f"differs in .*{named}"):
        harvest(model, texts, [HOOK], kept, **RUN)
    with pytest.raises(SaesubError, match=f"differs in .*{named}"):
        measure_spectrum(model, texts, HOOK, checkpoint=kept / "spectrum", **RUN)


def test_the_same_model_made_again_is_the_same(kept: Path, texts: list[str], monkeypatch) -> None:
    monkeypatch.setattr(
        "saesub.activations.forward_pass.capture", lambda *_: pytest.fail("ran the model")
    )
    for model in ((tiny_gpt2(), tiny_tokenizer()), load_model((tiny_gpt2(), tiny_tokenizer()))):
        harvest(model, texts, [HOOK], kept, **RUN)
        measure_spectrum(model, texts, HOOK, checkpoint=kept / "spectrum", **RUN)
    bridge = load_model((tiny_gpt2(), tiny_tokenizer())).train()
    bridge.add_hook("blocks.0.hook_attn_out", lambda x, hook: None)
    bridge.reset_hooks()
    harvest(bridge, texts, [HOOK], kept, **RUN)


@pytest.mark.parametrize("document", [0, 7, 11])
def test_a_changed_document_is_refused(kept: Path, texts: list[str], document: int) -> None:
    changed = [*texts]
    changed[document] = changed[document][:-1] + "!"
    model = tiny_gpt2(), tiny_tokenizer()
    with pytest.raises(SaesubError, match="differs in text"):
        harvest(model, changed, [HOOK], kept, **RUN)
    with pytest.raises(SaesubError, match="differs in text"):
        measure_spectrum(model, changed, HOOK, checkpoint=kept / "spectrum", **RUN)


def test_every_document_counts_where_the_corpus_is_read_again(tmp_path: Path) -> None:
    texts, model = tiny_texts(2), (tiny_gpt2(), tiny_tokenizer())
    with pytest.warns(UserWarning, match="read again"):
        harvest(model, texts, [HOOK], tmp_path, **RUN)
    with pytest.raises(SaesubError, match=r"differs in .*text"):
        harvest(model, [*texts, texts[0] + "more"], [HOOK], tmp_path, **RUN)


def test_a_store_made_under_hooks_is_never_used_again(tmp_path: Path, texts: list[str]) -> None:
    bridge = load_model((tiny_gpt2(), tiny_tokenizer()))
    bridge.add_hook("blocks.1.hook_attn_out", lambda x, hook: x * 2)
    doubled = harvest(bridge, texts, [HOOK], tmp_path / "a", **RUN)[HOOK].rows(0, 600)
    with pytest.raises(SaesubError, match="differs in hooks"):
        harvest(bridge, texts, [HOOK], tmp_path / "a", **RUN)
    bridge.reset_hooks()
    plain = harvest(bridge, texts, [HOOK], tmp_path / "b", **RUN)[HOOK].rows(0, 600)
    torch.testing.assert_close(doubled, 2 * plain, rtol=2e-3, atol=1e-4)
    with pytest.raises(SaesubError, match="differs in hooks"):
        harvest(bridge, texts, [HOOK], tmp_path / "a", **RUN)


def test_stores_of_other_text_or_settings_hold_other_tokens(
    kept: Path, texts: list[str], tmp_path: Path
) -> None:
    model, store = (tiny_gpt2(), tiny_tokenizer()), ActivationStore.open(kept, HOOK)
    reversed_text = harvest(model, texts[::-1], [HOOK], tmp_path / "a", **RUN)[HOOK]
    later = harvest(model, texts, [HOOK], tmp_path / "b", skip_first=3, **RUN)[HOOK]
    for other in (reversed_text, later):
        with pytest.raises(SaesubError, match="not of the same tokens"):
            joint_batches({"a": store, "b": other}, 4, seed=0)


def test_documents_are_told_apart_by_where_they_end() -> None:
    def digest(*texts: str) -> str:
        return DocumentsDigest(Dataset.from_dict({"text": list(texts)})).of(len(texts))

    assert digest("ab", "c") == digest("ab", "c")
    longer = DocumentsDigest(Dataset.from_dict({"text": ["ab", "c", "d"]}))
    found = [longer.of(n) for n in (2, 3, 2, 9)]
    assert found == [digest("ab", "c"), digest("ab", "c", "d"), found[0], found[1]]
    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("c", "ab")}) == 4


def test_a_pass_does_not_change_what_a_model_is() -> None:
    bridge = load_model((tiny_gpt2(), tiny_tokenizer()))
    before = model_settings(bridge)
    measure_spectrum(bridge, tiny_texts(30), HOOK, **RUN)
    assert model_settings(bridge) == before
    bridge.run_with_cache(torch.arange(3, 27)[None])  # transformers notes that it was hooked
    assert model_settings(bridge) == before
    bridge.original_model.name_or_path = bridge.original_model.base_model.name_or_path = "elsewhere"
    assert model_settings(bridge) == before
    bridge.enable_compatibility_mode()
    assert model_settings(bridge)["architecture"] != before["architecture"]


@pytest.mark.model
def test_a_real_model_is_itself_after_a_pass(model: TransformerBridge, corpus: Dataset) -> None:
    before = model_settings(model)
    measure_spectrum(model, corpus, HOOK, **RUN)
    assert model_settings(model) == before
    assert before["hooks"] == "none"


def test_weights_without_values_are_refused() -> None:
    bridge = load_model((tiny_gpt2(), tiny_tokenizer()))
    bridge.original_model.to("meta")
    with pytest.raises(SaesubError, match="meta device"):
        identity._weights(bridge.original_model)


def test_buffers_that_no_state_dict_holds_count() -> None:
    module = torch.nn.Module()
    module.register_buffer("frequencies", torch.zeros(2), persistent=False)
    before = identity._weights(module)
    module.frequencies += 1
    assert identity._weights(module) != before


def test_hooks_of_all_modules_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = load_model((tiny_gpt2(), tiny_tokenizer()))
    hooks = torch.nn.modules.module
    for register in (
        hooks.register_module_forward_hook,
        hooks.register_module_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert model_settings(bridge)["hooks"].startswith("every ")
        handle.remove()
    assert model_settings(bridge)["hooks"] == "none"


def test_the_padding_of_the_last_call_is_none_of_a_tokenizers() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    specials = ContextTokens(0, 1, (0, 1))
    before = identity._tokenizer(tokenizer, specials)
    tokenizer(["a b c", "a"], padding=True, truncation=True, max_length=2)
    assert identity._tokenizer(tokenizer, specials) == before
    assert identity._tokenizer(tokenizer, ContextTokens(None, 1, (0, 1))) != before


def test_a_checkpoint_keeps_to_its_keep_massive(texts: list[str], tmp_path: Path) -> None:
    model, path = (tiny_gpt2(), tiny_tokenizer()), tmp_path / "spectrum"
    measure_spectrum(model, texts, HOOK, checkpoint=path, **RUN)
    with pytest.raises(SaesubError, match="differs in keep_massive"):
        measure_spectrum(model, texts, HOOK, checkpoint=path, keep_massive=True, **RUN)


def test_an_unfinished_store_made_under_hooks_is_begun_anew(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saesub.activations.forward_pass.KEEP_EVERY", 0.0)
    bridge = load_model((tiny_gpt2(), tiny_tokenizer()))
    bridge.add_hook("blocks.1.hook_attn_out", lambda x, hook: x * 2)
    passes = iter(range(3))

    def interrupted(*given: Any) -> None:
        if next(passes) == 2:
            raise KeyboardInterrupt
        capture(*given)

    with monkeypatch.context() as patch:
        patch.setattr("saesub.activations.forward_pass.capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            harvest(bridge, texts, [HOOK], tmp_path, **RUN)
    assert (tmp_path / f"{HOOK}.json").is_file()
    bridge.reset_hooks()
    plain = harvest(bridge, texts, [HOOK], tmp_path, **RUN)[HOOK].rows(0, 600)
    whole = harvest(bridge, texts, [HOOK], tmp_path / "whole", **RUN)[HOOK].rows(0, 600)
    assert torch.equal(plain, whole)


def test_dropout_is_off_in_a_pass_and_on_again_after_it() -> None:
    texts = tiny_texts(30)
    bridge = load_model((tiny_gpt2(resid_pdrop=0.5, attn_pdrop=0.5), tiny_tokenizer()))
    still = measure_spectrum(bridge, texts, HOOK, **RUN).covariance
    bridge.train()
    bridge.original_model.transformer.h[0].eval()  # a mode of its own
    before = [module.training for module in bridge.modules()]
    assert torch.equal(measure_spectrum(bridge, texts, HOOK, **RUN).covariance, still)
    assert [module.training for module in bridge.modules()] == before
    with pytest.raises(SaesubError):  # at the first batch
        measure_spectrum(bridge, texts, "blocks.1.attn.hook_pattern", **RUN)
    assert [module.training for module in bridge.modules()] == before
