"""No evaluator changes the SAE that it is given, nor when it stops halfway."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from torch import nn

import saesub
from saesub.activations.tokens import pack_contexts
from saesub.evaluation.features import feature_density, match_features
from saesub.evaluation.probing import mean_features
from saesub.evaluation.top_activations import top_activations
from saesub.extras.transcoders import transcoder_reconstruction
from saesub.init.encoder_scale import fit_encoder_scale
from saesub.topk.encode import autoencoder_of, encoder_of
from saesub.topk.sae import use_sparse_step

HOOK, HEADS = "blocks.1.hook_attn_out", "blocks.1.attn.hook_z"
SIZES: dict[str, Any] = {"d_in": 576, "d_sae": 640}


class StoppedError(Exception):
    """What a hook raises in the middle of an evaluation."""


def scaled(by: str, heads: bool = False) -> TopKSAE:
    more: Any = {"reshape_activations": "hook_z"} if heads else {}
    return TopKSAE(TopKSAEConfig(**SIZES, k=8, normalize_activations=by, **more))


def used(sae: SAE[Any]) -> SAE[Any]:
    """It still has the scale and the shape of an input that its user is about to decode."""
    sae.encode(torch.randn(5, 9, 64) if sae.cfg.reshape_activations == "hook_z" else x(5))
    return sae


def sparse() -> TopKTrainingSAE:
    return TopKTrainingSAE(TopKTrainingSAEConfig(**SIZES, k=8, use_sparse_activations=True))


SAES = {
    "standard": lambda: StandardSAE(StandardSAEConfig(**SIZES)),
    "training": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(**SIZES)),
    "gated": lambda: GatedSAE(GatedSAEConfig(**SIZES)),
    "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**SIZES)),
    "topk": lambda: scaled("none"),
    "sparse topk": sparse,
    "sparse pass": lambda: use_sparse_step(sparse()),
    "batch topk": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**SIZES, k=8)),
    "layer norm": lambda: scaled("layer_norm"),
    "constant norm": lambda: scaled("constant_norm_rescale"),
    "constant norm, used": lambda: used(scaled("constant_norm_rescale")),
    "layer norm, used": lambda: used(scaled("layer_norm")),
    "heads": lambda: scaled("none", heads=True),
    "heads, used": lambda: used(scaled("constant_norm_rescale", heads=True)),
}


def x(n: int = 1500) -> torch.Tensor:
    return torch.randn(n, 576, generator=torch.Generator().manual_seed(0))


def spectrum(hook_name: str = HOOK) -> saesub.Spectrum:
    metadata = {"model": "smollm2-135m", "hook_name": hook_name}
    return saesub.Spectrum.from_activations(x(), metadata)


def overlap_test(sae: SAE[Any]) -> None:
    dead = torch.arange(640) % 3 == 0
    for directions in (sae.W_dec, sae.W_enc.T):
        saesub.overlap_test(directions, dead, spectrum().basis(9))


# Evaluators of an SAE alone, and of one at work in a language model.
ALONE = {
    "density": lambda sae: feature_density(sae, x(), n_tokens=1200, progress=False),
    "dead": lambda sae: saesub.dead_features(sae, x(), n_tokens=1200, progress=False),
    "reconstruction": lambda sae: saesub.reconstruction(sae, x().split(700), progress=False),
    "encoder": lambda sae: encoder_of(sae)(x()),
    "autoencoder": lambda sae: autoencoder_of(sae)(x()),
    "overlap test": overlap_test,
    "matching": lambda sae: match_features(sae.W_dec[:9], sae.W_dec[9:20]),
    "card": lambda sae: saesub.model_card(sae, spectrum(sae.cfg.metadata.hook_name)),
}
IN_A_MODEL = {
    "loss": lambda sae, it: saesub.sae_loss(it.model, sae, it.tokens),
    "top": lambda sae, it: top_activations(it.model, sae, it.tokens, [1, 5]),
    "probing": lambda sae, it: mean_features(
        it.model, ["One text.", "And another."], sae.cfg.metadata.hook_name, {"sae": sae}
    ),
}


def prepared(kind: str, *, stops: bool = False) -> SAE[Any]:
    """With everything that could change: a listener, a gradient, strides, frozen weights."""
    torch.manual_seed(0)
    sae = SAES[kind]()
    sae.cfg.metadata.hook_name = HEADS if "heads" in kind else HOOK
    sae.W_enc.data = sae.W_enc.data.T.contiguous().T
    sae.b_dec.requires_grad_(False)
    sae.W_dec.grad = torch.ones_like(sae.W_dec)
    sae.hook_sae_acts_post.eval()

    def stop(tensor: torch.Tensor, hook: Any) -> None:
        raise StoppedError

    if stops:
        sae.hook_sae_acts_post.add_hook(stop)
    return sae


def snapshot(sae: SAE[Any]) -> dict[str, Any]:
    """All there is to a module and its parts; functions by identity, tensors by all they have."""

    def frozen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            facts = value.dtype, value.device, value.requires_grad, value.data_ptr(), id(value)
            bits = value.detach().flatten().view(torch.uint8).numpy().tobytes()
            grad = frozen(value.grad) if value.is_leaf else None
            hooks = value._backward_hooks, getattr(value, "_post_accumulate_grad_hooks", None)
            held = [*map(frozen, hooks), type(value), frozen(vars(value))]
            return *facts, value.shape, value.stride(), grad, bits, *held
        if isinstance(value, nn.Module):
            return id(value), type(value), {name: frozen(v) for name, v in vars(value).items()}
        if isinstance(value, dict):
            return [(name, frozen(v)) for name, v in value.items()]
        if isinstance(value, (list, tuple)):
            return [frozen(v) for v in value]
        return id(value), repr(value)

    cfg = vars(sae.cfg) | {"metadata": copy.deepcopy(vars(sae.cfg.metadata))}
    modules = {name: frozen(m) for name, m in sae.named_modules() if m is not sae}
    hooks = {name: frozen(vars(point)) for name, point in sae.hook_dict.items()}
    own = {name: frozen(v) for name, v in vars(sae).items() if name != "mod_dict"}
    own["class"] = type(sae)
    return {
        "cfg": repr(cfg),
        "metadata": repr(list(vars(sae.cfg.metadata).items())),
        "own": own,
        "modules": modules,
        "hooks": hooks,
        "states": {name: frozen(v) for name, v in sae.state_dict(keep_vars=True).items()},
    }


def check(sae: SAE[Any], evaluate: Any) -> None:
    before = snapshot(sae)
    evaluate(sae)
    after = snapshot(sae)
    # Compared outside of the assertion: where CI is set, pytest shows all that differs between two
    # values, which takes hours for the bytes of a weight.
    changed = [part for part in before if after[part] != before[part]]
    assert not changed


CHANGES: dict[str, Callable[[SAE[Any]], Any]] = {
    "value": lambda sae: sae.W_dec.data[3, 5].neg_(),
    "sign of zero": lambda sae: sae.b_dec.data[:1].neg_(),
    "strides": lambda sae: setattr(sae.W_enc, "data", sae.W_enc.data.contiguous()),
    "frozen": lambda sae: sae.b_dec.requires_grad_(True),
    "gradient": lambda sae: sae.W_dec.grad.neg_(),  # pyright: ignore
    "hook of a weight": lambda sae: sae.W_dec.register_hook(lambda grad: grad),
    "hook of its gradient": lambda sae: sae.W_dec.register_post_accumulate_grad_hook(print),
    "note on a weight": lambda sae: setattr(sae.W_dec, "note", 1),
    "class": lambda sae: setattr(sae, "__class__", type("Other", (type(sae),), {})),
    "training": lambda sae: sae.train(not sae.training),
    "config": lambda sae: setattr(sae.cfg, "dtype", "float64"),
    "metadata": lambda sae: setattr(sae.cfg.metadata, "hook_name", "another"),
    "hook point": lambda sae: sae.hook_sae_acts_pre.add_hook(lambda x, hook: x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_kind_of_change_is_seen(change: str) -> None:
    with pytest.raises(AssertionError):
        check(prepared("training"), CHANGES[change])


@pytest.mark.parametrize("kind", SAES)
@pytest.mark.parametrize("name", ALONE)
def test_an_sae_is_as_it_was(name: str, kind: str) -> None:
    check(prepared(kind), ALONE[name])


@pytest.mark.parametrize("kind", SAES)
@pytest.mark.parametrize("name", ["density", "dead", "reconstruction", "encoder", "autoencoder"])
def test_an_sae_is_as_it_was_after_an_exception(name: str, kind: str) -> None:
    def stopped(sae: SAE[Any]) -> None:
        with pytest.raises(StoppedError):
            ALONE[name](sae)

    check(prepared(kind, stops=True), stopped)


@pytest.fixture(scope="module")
def it(model, corpus) -> SimpleNamespace:
    tokens = pack_contexts(model, corpus.select(range(20)), n_contexts=2, context_size=12)
    return SimpleNamespace(model=model, tokens=tokens)


@pytest.mark.model
@pytest.mark.parametrize("kind", SAES)
@pytest.mark.parametrize("name", IN_A_MODEL)
def test_an_sae_at_work_in_a_model_is_as_it_was(it, name: str, kind: str) -> None:
    check(prepared(kind), lambda sae: IN_A_MODEL[name](sae, it))

    def stopped(sae: SAE[Any]) -> None:
        with pytest.raises(StoppedError):
            IN_A_MODEL[name](sae, it)

    check(prepared(kind, stops=True), stopped)


def test_a_transcoder_is_as_it_was() -> None:
    def evaluate(transcoder: Any) -> None:
        transcoder_reconstruction(transcoder, [(x(), x())])
        saesub.dead_features(transcoder, x(), n_tokens=1200, progress=False)

    settings = SIZES | {"d_out": 576, "apply_b_dec_to_input": False}
    check(Transcoder(TranscoderConfig(**settings)), evaluate)


def test_a_fitted_scale_is_all_that_fitting_changes() -> None:
    """What its user has noted of an input stays, too."""
    sae = used(scaled("constant_norm_rescale"))
    before = dict(vars(sae))
    fit_encoder_scale(sae, x())
    assert list(vars(sae)) == list(before)
    assert vars(sae)["x_norm_coeff"] is before["x_norm_coeff"]


def test_features_found_before_an_evaluation_decode_after_it() -> None:
    sae, inputs = scaled("constant_norm_rescale"), 7 * x(5)
    features, expected = sae.encode(inputs), sae(inputs)
    sae.encode(inputs)
    saesub.reconstruction(sae, x(), progress=False)
    torch.testing.assert_close(sae.decode(features), expected)
