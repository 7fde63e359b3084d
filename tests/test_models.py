"""Models: the packaged one is sane, and the bridge computes what Hugging Face computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from saesub.errors import SaesubError
from saesub.loading import conversion, models
from saesub.loading.models import ContextTokens, context_tokens, load_model, model_name
from saesub.loading.registry import packaged

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def folder(model: TransformerBridge) -> Path:
    """The packaged model as a Hugging Face folder on disk."""
    return models._converted(packaged()["smollm2-135m"])


@pytest.fixture(scope="module")
def tokens(model: TransformerBridge, corpus: Dataset) -> torch.Tensor:
    page = "\n\n".join(corpus["text"][:10])
    return torch.tensor([model.tokenizer(page)["input_ids"][:256]])


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def test_it_predicts_english(model: TransformerBridge, tokens: torch.Tensor) -> None:
    loss = torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
    assert loss < 4.0


@torch.no_grad()
def test_logits_are_those_of_hugging_face(
    model: TransformerBridge, tokens: torch.Tensor, folder: Path
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-4, rtol=0)


def test_it_is_ready_for_reading(model: TransformerBridge) -> None:
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model_name(model) == "smollm2-135m"


def test_special_tokens_are_those_of_training(model: TransformerBridge) -> None:
    tokenizer = model.tokenizer
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert context_tokens(model) == ContextTokens(None, 0, (0, 1, 2))
    assert model.to_tokens("Hello world").tolist() == [tokenizer.encode("Hello world")]
    assert model.to_tokens("Hello world").shape == (1, 2)


def test_a_bridge_comes_back_as_it_is(model: TransformerBridge) -> None:
    assert load_model(model) is model


@torch.no_grad()
def test_a_local_folder_loads(model: TransformerBridge, tokens: torch.Tensor, folder: Path) -> None:
    local = load_model(str(folder), device="cpu")
    torch.testing.assert_close(local(tokens), model(tokens))
    assert model_name(local) == folder.name
    assert context_tokens(local).bos_id is None


@torch.no_grad()
def test_a_live_model_and_its_tokenizer_load(
    model: TransformerBridge, tiny: LlamaForCausalLM
) -> None:
    ids = torch.arange(20)[None]
    expected = tiny.eval()(ids).logits
    live = load_model((tiny, model.tokenizer))
    torch.testing.assert_close(live(ids), expected, atol=1e-4, rtol=0)
    assert context_tokens(live).separator_id == model.tokenizer.eos_token_id
    assert load_model((tiny, model.tokenizer), dtype=torch.bfloat16)(ids).dtype == torch.bfloat16


def test_a_live_model_is_borrowed_and_never_changed(
    model: TransformerBridge, tiny: LlamaForCausalLM
) -> None:
    tiny.train()
    tiny.lm_head.weight.requires_grad_(False)
    before = {name: (p, p.requires_grad, p.clone()) for name, p in tiny.named_parameters()}
    bridge = load_model((tiny, model.tokenizer), dtype=torch.bfloat16)
    assert not bridge.training
    assert tiny.training
    assert all(module.training for module in tiny.modules())
    for name, p in tiny.named_parameters():
        same, gradients, values = before[name]
        assert p is same
        assert p.requires_grad == gradients
        assert torch.equal(p, values)
    assert tiny.dtype == torch.float32


@torch.no_grad()
def test_a_live_models_weights_are_shared_not_copied(
    model: TransformerBridge, tiny: LlamaForCausalLM
) -> None:
    bridge = load_model((tiny, model.tokenizer))
    ids = torch.arange(20)[None]
    tiny.lm_head.weight.mul_(2)
    torch.testing.assert_close(bridge(ids), tiny.eval()(ids).logits, atol=1e-4, rtol=0)
    assert not any(p.requires_grad for p in bridge.parameters())


def test_a_live_model_finds_its_tokenizer(tiny: LlamaForCausalLM, folder: Path) -> None:
    tiny.name_or_path = str(folder)
    assert load_model(tiny).to_tokens("Hello world").shape == (1, 2)


def test_a_live_model_without_tokenizer_is_named(tiny: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny.name_or_path = str(tmp_path)
    with pytest.raises(SaesubError, match=r"give the pair \(model, tokenizer\)"):
        load_model(tiny)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaesubError, match=r"no config\.json"):
        load_model(tmp_path)


def test_unknown_name_offline_gets_near_and_packaged_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "hub_is_reachable", lambda: False)
    with pytest.raises(SaesubError, match=r"did you mean 'smollm2-135m'.*gemma3-270m.*connect"):
        load_model("smolm2-135m")


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (3, {}, "not int"),
        (("a", "b"), {}, r"pair \(model, tokenizer\) of transformers.* not a pair \(str, str\)"),
        ((), {}, "not tuple"),
        ("smollm2-135m", {"device": "gpu"}, "device='gpu' is not here"),
        ("smollm2-135m", {"device": None}, "device=None is not here"),
        ("smollm2-135m", {"dtype": "float32"}, r"such as torch\.float32, not 'float32'"),
    ],
)
def test_mistakes_are_named(given: object, settings: dict, message: str) -> None:
    with pytest.raises(SaesubError, match=message):
        load_model(given, **settings)  # pyright: ignore


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_named_before_anything_is_loaded() -> None:
    with pytest.raises(SaesubError, match="device='cuda' is not here"):
        load_model("some/model-of-the-hub", device="cuda")


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(conversion.AutoConfig, "from_pretrained", interrupted)
    entry = packaged()["smollm2-135m"]
    with pytest.raises(KeyboardInterrupt):
        models._converted(entry)
    assert [p for p in (tmp_path / "models").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("changed", ["code", "transformers", "setting", "file"])
def test_a_conversion_is_keyed_by_all_that_decides_it(
    changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = packaged()["smollm2-135m"]
    before = conversion.conversion_key(entry, "loading/conversion.py")
    assert conversion.conversion_key(entry, "loading/conversion.py") == before
    if changed == "code":
        monkeypatch.setattr(conversion, "source_digest", lambda _: "other")
    elif changed == "transformers":
        monkeypatch.setattr(conversion.transformers, "__version__", "99")
    elif changed == "setting":
        entry = replace(entry, details={**entry.details, "bos": True})
    else:
        entry = replace(entry, files=(replace(entry.files[0], sha256="0" * 64),))
    assert conversion.conversion_key(entry, "loading/conversion.py") != before
