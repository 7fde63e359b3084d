"""Odd models and corpora: each is used rightly or refused in one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from datasets import Dataset
from tiny_model import tiny_gpt2, tiny_texts, tiny_tokenizer
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.tokens import pack_contexts
from saesub.errors import SaesubError
from saesub.loading import hub, models
from saesub.loading.corpora import load_corpus
from saesub.loading.models import load_model

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "hub_is_reachable", lambda: False)
    monkeypatch.setattr("saesub.loading.corpora.hub_is_reachable", lambda: False)
    monkeypatch.chdir(tmp_path)


def _with(model: Any) -> tuple[Any, Any]:
    return model, tiny_tokenizer()


def _t5() -> Any:
    small = {"vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**small, num_heads=4))


def _vit() -> Any:
    small: Any = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")}
    return transformers.ViTModel(transformers.ViTConfig(**small, num_hidden_layers=1))


def _biogpt() -> Any:
    return transformers.BioGptForCausalLM(transformers.BioGptConfig(**SIZES))


def _on_meta(whole: bool) -> Any:
    model = tiny_gpt2()
    (model if whole else model.transformer.h[1]).to("meta")
    return model


def _hooked() -> HookedTransformer:
    small: dict[str, Any] = {"n_layers": 1, "d_model": 32, "n_ctx": 64, "d_head": 8, "d_vocab": 512}
    return HookedTransformer(HookedTransformerConfig(**small, act_fn="gelu"))


def _quantised() -> Any:
    return torch.ao.quantization.quantize_dynamic(tiny_gpt2(), {torch.nn.Linear}, dtype=torch.qint8)


def _saved(name: str, model: Any, with_tokenizer: bool = True) -> str:
    model.save_pretrained(name)
    if with_tokenizer:
        tiny_tokenizer().save_pretrained(name)
    return name


def _headless() -> Any:
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZES))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _with(_on_meta(True)), "on the meta device and hold no values"),
        (lambda: _with(_on_meta(False)), "some weights .* on the meta device"),
        (lambda: _with(_t5()), "T5ForConditionalGeneration has an encoder and a decoder"),
        (lambda: _with(_vit()), "cannot wrap a ViTModel .*give a causal language model"),
        (lambda: _with(_headless()), r"cannot wrap a LlamaModel .*with its head \(AutoModelForC"),
        (lambda: _with(tiny_gpt2().transformer), "cannot wrap a GPT2Model .*with its head"),
        (lambda: _with(_biogpt()), "cannot wrap a BioGptForCausalLM .*that it supports"),
        (lambda: _with(_quantised()), "cannot wrap a GPT2LMHeadModel"),
        (lambda: _hooked(), r"not HookedTransformer: load it with TransformerBridge\.boot"),
        (lambda: _with(_hooked()), r"HookedTransformer, .*: load it with TransformerBridge\.boot"),
        (
            lambda: transformers.pipeline(
                "text-generation", model=tiny_gpt2(), tokenizer=tiny_tokenizer()
            ),
            r"give \(pipeline\.model, pipeline\.tokenizer\)",
        ),
        (
            lambda: torch.nn.DataParallel(tiny_gpt2()),
            "give the model of transformers within the Data",
        ),
        (
            lambda: _with(torch.nn.DataParallel(tiny_gpt2())),
            "model of transformers within the DataP",
        ),
        (lambda: torch.compile(tiny_gpt2()), "within the OptimizedModule"),
        (lambda: torch.nn.Linear(3, 3), "not Linear"),
        (lambda: (tiny_gpt2(), None), r"not a pair \(GPT2LMHeadModel, NoneType\): load both"),
        (lambda: (tiny_gpt2(), tiny_tokenizer().backend_tokenizer), "GPT2LMHeadModel, Tokenizer"),
        (lambda: (tiny_tokenizer(), tiny_gpt2()), "give the model first"),
        (lambda: ("gpt2", tiny_tokenizer()), r"not a pair \(str, "),
        (lambda: [tiny_gpt2(), tiny_tokenizer()], "not list"),
        (lambda: None, "not NoneType"),
        (lambda: b"gpt2", "not bytes"),
        (lambda: tiny_gpt2(), r"no tokenizer was found .*give the pair \(model, tokenizer\)"),
        (lambda: "", "not ''"),
        (lambda: "a text " * 99, "nothing loads under 'a text"),
        (lambda: "a\0b", "nothing loads under"),
        (lambda: "~nobody-of-that-name/x", r"no config\.json"),
        (lambda: Path("~nobody-of-that-name/x"), r"no config\.json"),
        (lambda: Path("absent"), r"no config\.json"),
        (lambda: "absent/model.gguf", "nothing loads under 'absent/model.gguf'"),
        (lambda: _saved("t5", _t5()), "t5 does not load"),
        (lambda: _saved("biogpt", _biogpt()), "cannot wrap a BioGptForCausalLM"),
        (lambda: _saved("no-head", _headless()), r"lacks weights \(lm_head\.weight\): save"),
        (
            lambda: _saved("no-tokens", tiny_gpt2(), False),
            "tokenizer of .*no-tokens has no vocabulary",
        ),
    ],
)
def test_a_model_that_cannot_be_read_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SaesubError, match=message):
        load_model(make())


def _own_class() -> Any:
    class Mine(transformers.GPT2LMHeadModel):
        """As people write them who add a loss."""

    return Mine(tiny_gpt2().config)


def _compiled() -> Any:
    model = tiny_gpt2()
    model.compile(backend="eager")  # the same wrapper, without a compiler's minute
    return model


def _gemma3() -> Any:
    config = transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8)
    return transformers.Gemma3ForCausalLM(config)


def _olmo2() -> Any:
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES, num_key_value_heads=2))


@pytest.mark.parametrize(
    "make", [_own_class, _compiled, _gemma3, _olmo2, lambda: tiny_gpt2().to(torch.bfloat16)]
)
@torch.no_grad()
def test_a_model_from_a_config_gives_its_own_logits(make: Callable[[], Any]) -> None:
    model = make().eval()
    architectures = model.config.architectures
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(
        load_model((model, tiny_tokenizer()))(ids), model(ids).logits, atol=1e-2, rtol=0
    )
    assert model.config.architectures == architectures


@pytest.mark.parametrize("device", ["meta", "mps", "cuda:99", "gpu", None, torch.device("meta")])
def test_a_device_that_is_not_here_is_named(device: Any) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is here")
    with pytest.raises(SaesubError, match=r"device=.* is not here"):
        load_model((tiny_gpt2(), tiny_tokenizer()), device=device)


@pytest.mark.parametrize("dtype", ["float32", torch.int8, 16])
def test_a_dtype_that_is_of_no_use_is_named(dtype: Any) -> None:
    with pytest.raises(SaesubError, match=r"dtype must be such as torch\.float32"):
        load_model((tiny_gpt2(), tiny_tokenizer()), dtype=dtype)


def test_a_bridge_is_not_moved_and_says_so() -> None:
    bridge = load_model((tiny_gpt2(), tiny_tokenizer()))
    assert load_model(bridge, device="cpu", dtype=torch.float32) is bridge
    with pytest.raises(SaesubError, match=r"on cpu in torch\.float32 and is used as it is"):
        load_model(bridge, dtype=torch.bfloat16)


def test_a_bridge_without_a_tokenizer_is_named() -> None:
    model = tiny_gpt2()
    model.config.architectures = ["GPT2LMHeadModel"]
    adapter = load_model((model, tiny_tokenizer())).adapter
    with pytest.raises(SaesubError, match=r"has no tokenizer: load it as a pair"):
        pack_contexts(
            TransformerBridge(tiny_gpt2(), adapter, None),
            tiny_texts(),
            n_contexts=1,
            context_size=16,
        )


def test_the_working_folders_tokenizer_is_not_taken_for_a_models() -> None:
    _saved(".", tiny_gpt2())
    with pytest.raises(SaesubError, match="no tokenizer was found under the model's name ''"):
        load_model(tiny_gpt2())
    with pytest.raises(SaesubError, match="not ''"):
        load_model("")
    with pytest.raises(SaesubError, match="'' is neither a name nor the path"):
        load_corpus("")


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-160m"])
def test_a_right_name_that_did_not_come_is_not_corrected(name: str) -> None:
    message = hub.not_found(name, "models", "offline", ("gpt2", "EleutherAI/pythia-160m"))
    assert "did you mean" not in message
    assert "try again where it can be reached." in message


# --- corpora -------------------------------------------------------------------------------------


def _generated() -> Any:
    yield from tiny_texts(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), r"Dataset\.from_list"),
        (
            lambda: datasets.DatasetDict(test=Dataset.from_dict({"text": ["a"]})),
            r"corpus\['test'\]",
        ),
        (lambda: datasets.DatasetDict(), r"corpus\['train'\]"),
        (_generated, r"not generator: give list\(corpus\)"),
        (lambda: ("a", "b"), r"not tuple: give list\(corpus\)"),
        (lambda: {"a"}, r"not set: give list\(corpus\)"),
        (lambda: pd.Series(["a"]), r"not Series: give list\(corpus\)"),
        (lambda: np.array(["a"]), r"not ndarray: give list\(corpus\)"),
        (lambda: pd.DataFrame({"text": ["a"]}), r"give Dataset\.from_pandas\(corpus\)"),
        (lambda: {"text": ["a"]}, r"not dict\."),
        (lambda: b"a text", r"not bytes\."),
        (lambda: None, r"not NoneType\."),
        (lambda: tiny_gpt2(), r"not GPT2LMHeadModel\."),
        (lambda: ["a", None], "must hold strings only, not NoneType"),
        (lambda: [b"a"], "must hold strings only, not bytes"),
        (lambda: [{"text": "a"}], "must hold strings only, not dict"),
        (lambda: [[1, 2]], "must hold strings only, not list"),
        (lambda: "word " * 60, r"'word word .*give a list of texts, \[text\]"),
        (lambda: "two words", r"give a list of texts, \[text\]"),
        (lambda: "a\nb", r"give a list of texts, \[text\]"),
        (lambda: "a" * 5000, r"give a list of texts, \[text\]"),
        (lambda: "a\0b", "nothing loads under"),
        (lambda: "~nobody-of-that-name/x.txt", "no file or folder"),
        (lambda: Path("~nobody-of-that-name/x.txt"), "no file or folder"),
        (lambda: _folder("a.json"), "holds no .txt file and is no saved dataset: give one of"),
        (lambda: _folder("dataset_dict.json"), "or a saved dataset's split"),
        (lambda: Dataset.from_dict({"input_ids": [[1.5]]}), "list of token ids for each document"),
        (lambda: Dataset.from_dict({"input_ids": [1]}), "list of token ids for each document"),
        (lambda: Dataset.from_dict({"tokens": [["a"]]}), "list of token ids for each document"),
        (lambda: Dataset.from_dict({"input_ids": [[[1]]]}), "list of token ids for each document"),
        (lambda: Dataset.from_dict({"body": ["a"]}), "no column \"text\" nor .*'body'.*rename"),
        (lambda: Dataset.from_dict({"text": [b"a"]}), "must hold strings, not binary"),
        (lambda: Dataset.from_dict({"text": [None]}), "must hold strings, not null"),
        (lambda: Dataset.from_dict({"text": [["a"]]}), "must hold strings, not a nested type"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SaesubError, match=message):
        load_corpus(make())


def _folder(name: str) -> Path:
    Path("given").mkdir()
    (Path("given") / name).write_text("{}")
    return Path("given")


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow", None])
def test_a_datasets_format_changes_nothing(kind: str | None) -> None:
    given = Dataset.from_dict({"text": ["a", "", "b"]}).with_format(kind)
    assert list(load_corpus(given)["text"]) == ["a", "b"]
    ids = Dataset.from_dict({"input_ids": [[5, 6, 7] * 9]}).with_format(kind)
    found = pack_contexts((tiny_gpt2(), tiny_tokenizer()), ids, n_contexts=1, context_size=16)
    assert found[0, 1:4].tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, None, 7] * 9}, "holds a null"),
        ({"input_ids": [5] * 20, "attention_mask": [1] * 19}, "differ in length"),
        ({"input_ids": [5] * 20, "attention_mask": None}, "differ in length"),
        ({"input_ids": [0, 1, 0, 1]}, "holds 0 tokens, fewer than one context needs"),
        ({"input_ids": [5] * 20, "attention_mask": [0] * 20}, "holds 0 tokens"),
    ],
)
def test_damaged_token_ids_are_named(row: dict[str, Any], message: str) -> None:
    rows = Dataset.from_list([row, row])
    with pytest.raises(SaesubError, match=message):
        pack_contexts((tiny_gpt2(), tiny_tokenizer()), rows, n_contexts=1, context_size=16)


@pytest.mark.parametrize("n", [2, 2.0, np.int64(2), np.float32(2)])
def test_whole_numbers_of_any_type(n: Any) -> None:
    assert len(load_corpus(tiny_texts(), n_documents=n, seed=n)) == 2
