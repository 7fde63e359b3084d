"""What a user lends to a function is afterwards as it was: models, tokenizers, bridges."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from tiny_model import tiny_gpt2, tiny_texts, tiny_tokenizer
from transformer_lens.model_bridge import TransformerBridge

import saesub
from saesub.activations.tokens import pack_contexts
from saesub.evaluation.language_model_loss import sae_loss, subspace_loss_recovered
from saesub.evaluation.probing import mean_features
from saesub.evaluation.top_activations import top_activations

HOOK = "blocks.1.hook_attn_out"
IDS = torch.arange(5, 105).view(5, 20)
STREAM: dict[str, Any] = {"n_tokens": 150, "context_size": 16, "progress": False}


def _sae() -> TopKSAE:
    sae = TopKSAE(TopKSAEConfig(d_in=64, d_sae=64, k=4))
    sae.cfg.metadata.hook_name = HOOK
    return sae


def _spectrum() -> saesub.Spectrum:
    return saesub.Spectrum.from_activations(torch.randn(200, 64))


CALLS: dict[str, Callable[[Any, Path], object]] = {
    "load_model": lambda m, _: saesub.load_model(m),
    "pack_contexts": lambda m, _: pack_contexts(m, tiny_texts(), n_contexts=3, context_size=16),
    "measure_spectrum": lambda m, _: saesub.measure_spectrum(m, tiny_texts(), HOOK, **STREAM),
    "harvest": lambda m, p: saesub.harvest(m, tiny_texts(), [HOOK], p / "acts", **STREAM),
    "sae_loss": lambda m, _: sae_loss(m, _sae(), IDS),
    "subspace_loss_recovered": lambda m, _: subspace_loss_recovered(
        m, IDS, HOOK, _spectrum(), [4], progress=False
    ),
    "mean_features": lambda m, _: mean_features(
        m, tiny_texts(3), HOOK, {"": _sae()}, max_tokens=16
    ),
    "top_activations": lambda m, _: top_activations(m, _sae(), IDS, [0, 1]),
    "an unknown hook point": lambda m, _: saesub.measure_spectrum(m, tiny_texts(), "no", **STREAM),
    "ids beyond the embedding": lambda m, _: pack_contexts(
        m, saesub.load_corpus(["<x>"]), n_contexts=3, context_size=999
    ),
}


def _flags(model: torch.nn.Module) -> dict[str, Any]:
    """All there is to a module but its weights' values, which are compared apart."""
    found: dict[str, Any] = {"keys": list(model.state_dict())}
    for name, part in model.named_modules():
        hooks = {k: len(v) for k, v in vars(part).items() if k.endswith("_hooks") and v}
        found[name] = (part.training, id(part), type(part), hooks)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name}="] = (id(weight), weight.requires_grad, weight.dtype, weight.device)
        found[f"{name}=="] = (weight.data_ptr(), weight.sum().item())
    return found


def _state(tokens: Any) -> dict[str, Any]:
    backend = getattr(tokens, "backend_tokenizer", None)
    return {
        "length": len(tokens),
        "special": copy.deepcopy(tokens.special_tokens_map),
        "init": copy.deepcopy(tokens.init_kwargs),
        "sides": (tokens.padding_side, tokens.truncation_side, tokens.model_max_length),
        "backend": backend and backend.to_str(),  # truncation and padding are in it
        "plain": {k: repr(v) for k, v in vars(tokens).items() if not k.startswith("_tok")},
        "encoded": tokens("a word <|endoftext|>")["input_ids"] if backend is None else None,
    }


def _tokenizers() -> dict[str, Any]:
    found = {
        "both": tiny_tokenizer(),
        "no eos": tiny_tokenizer(eos=None),
        "neither": tiny_tokenizer(bos=None, eos=None),
        "no bos": tiny_tokenizer(bos=None),
    }
    for tokens in found.values():
        tokens.padding_side = "left"
        tokens.backend_tokenizer.enable_truncation(7)
        tokens.backend_tokenizer.enable_padding(length=9)
    return found


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["both", "no eos", "neither", "no bos"])
def test_a_pair_is_as_before(call: str, kind: str, tmp_path: Path) -> None:
    hf_model, tokens = tiny_gpt2(), _tokenizers()[kind]
    hf_model.train()
    hf_model.transformer.h[0].eval()
    hf_model.lm_head.weight.requires_grad_(False)
    hf_model.transformer.h[1].register_forward_hook(lambda *_: None)
    config = copy.deepcopy(hf_model.config.to_dict())
    flags, state = _flags(hf_model), _state(tokens)
    _run(CALLS[call], (hf_model, tokens), tmp_path)
    assert _flags(hf_model) == flags
    assert hf_model.config.to_dict() == config
    assert _state(tokens) == state


def _run(call: Callable[[Any, Path], object], model: Any, folder: Path) -> None:
    try:
        call(model, folder)
    except saesub.SaesubError as error:
        assert any(word in str(error) for word in ("no hook point", "context_size"))  # noqa: PT017


def _bridge(tokens: Any) -> TransformerBridge:
    """As a user makes one, in train mode in part, with hooks of his own."""
    hf_model = tiny_gpt2()
    hf_model.config.architectures = ["GPT2LMHeadModel"]
    tokens.init_kwargs |= {"name_or_path": "x", "add_bos_token": True}
    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=hf_model, tokenizer=tokens)
    bridge.tokenizer.backend_tokenizer.enable_truncation(7)  # pyright: ignore
    bridge.tokenizer.backend_tokenizer.enable_padding(length=9)  # pyright: ignore
    bridge(IDS)  # TransformerLens sets hooks of its own in the first pass
    bridge.train()
    bridge.original_model.transformer.h[0].eval()
    bridge.hook_dict["blocks.0.hook_resid_post"].add_hook(lambda x, hook: x * 1.0)
    bridge.hook_dict[HOOK].add_hook(lambda x, hook: None, is_permanent=True)
    return bridge


@pytest.mark.parametrize("call", CALLS)
def test_a_bridge_is_as_before(call: str, tmp_path: Path) -> None:
    bridge = _bridge(_tokenizers()["both"])
    cfg, flags = copy.deepcopy(vars(bridge.cfg)), _flags(bridge)
    inner, state = _flags(bridge.original_model), _state(bridge.tokenizer)
    hooks = {n: (list(p.fwd_hooks), list(p.bwd_hooks)) for n, p in bridge.hook_dict.items()}
    _run(CALLS[call], bridge, tmp_path)
    assert {n: (list(p.fwd_hooks), list(p.bwd_hooks)) for n, p in bridge.hook_dict.items()} == hooks
    assert _flags(bridge) == flags
    assert _flags(bridge.original_model) == inner
    assert {k: str(v) for k, v in vars(bridge.cfg).items()} == {k: str(v) for k, v in cfg.items()}
    assert _state(bridge.tokenizer) == state
    assert bridge.context_level == 0


def test_a_slow_tokenizer_is_as_before() -> None:
    from test_tokens import _characters

    tokens = _characters()
    state = _state(tokens)
    pack_contexts((tiny_gpt2(), tokens), tiny_texts(), n_contexts=3, context_size=16)
    assert _state(tokens) == state
    assert "<|endoftext|>" not in tokens.get_added_vocab()


def test_a_bridge_has_the_tokenizer_that_was_lent() -> None:
    """Without what TransformerLens adds to one that has no end-of-text token."""
    bridge = saesub.load_model((tiny_gpt2(), tiny_tokenizer(bos=None, eos=None)))
    assert bridge.tokenizer is not None
    assert bridge.tokenizer.eos_token is None
    assert len(bridge.tokenizer) == len(tiny_tokenizer(bos=None, eos=None))
    whole = saesub.load_model((tiny_gpt2(), tiny_tokenizer())).tokenizer
    assert whole is not None
    assert (whole.bos_token, whole.eos_token) == ("<|bos|>", "<|eos|>")


@pytest.mark.parametrize("name", ["load_model", "pack_contexts", "measure_spectrum", "harvest"])
def test_torchs_random_numbers_go_on_as_without_the_call(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    CALLS[name]((tiny_gpt2(), tiny_tokenizer()), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_autocast_around_a_call_rounds_nothing(tmp_path: Path) -> None:
    """A store that was rounded would be used again without autocast."""
    pair, x = (tiny_gpt2(), tiny_tokenizer()), torch.randn(500, 64) + 5
    saes = _topk(), _topk()

    def measured(sae: TopKTrainingSAE, folder: Path) -> list[torch.Tensor]:
        spectrum = saesub.Spectrum.from_activations(x)
        saesub.initialize_in_subspace(sae, spectrum)
        store = saesub.harvest(pair, tiny_texts(), [HOOK], folder, dtype=torch.float32, **STREAM)[
            HOOK
        ]
        sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = HOOK, None
        figures = [*sae_loss(pair, sae, IDS), saesub.reconstruction(sae, x).fvu]
        return [spectrum.covariance, sae.W_dec, store.rows(0, 150), torch.tensor(figures)]

    plain = measured(saes[0], tmp_path / "plain")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = measured(saes[1], tmp_path / "within")
        assert torch.is_autocast_enabled("cpu")
    for one, other in zip(plain, within, strict=True):
        assert torch.equal(one, other)


def _topk() -> TopKTrainingSAE:
    torch.manual_seed(0)
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=64, d_sae=128, k=4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hook_names": None}, "is a text, not None"),
        ({"hook_names": [[HOOK]]}, "is a text, not"),
        ({"hook_names": HOOK, "share": 0.5}, "a share is"),
        ({"hook_names": HOOK, "share": (0.5, 2)}, "a share is"),
    ],
)
def test_hook_points_and_shares_that_are_none_are_refused(given: Any, message: str) -> None:
    pair = tiny_gpt2(), tiny_tokenizer()
    with pytest.raises(saesub.SaesubError, match=message):
        saesub.measure_spectra(pair, tiny_texts(), **given, **STREAM)
    with pytest.raises(saesub.SaesubError, match="one hook point"):
        saesub.measure_spectrum(pair, tiny_texts(), [HOOK], **STREAM)  # pyright: ignore
