"""Every evaluator with every architecture and dtype: the right number, or one sentence.

What is right is computed here from the definitions, in float64, from what the SAE and the model
themselves give. The model is a tiny random GPT-2 with dropout, made offline.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny_model
import torch
from sae_lens.evals import get_recons_loss
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.training.activation_scaler import ActivationScaler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import saesub
from saesub.errors import SaesubError
from saesub.evaluation import language_model_loss
from saesub.evaluation.dead_features import overlap, overlap_test
from saesub.evaluation.features import feature_density, match_features
from saesub.evaluation.language_model_loss import SubspaceLoss, sae_loss, subspace_loss_recovered
from saesub.evaluation.probing import RAW, mean_features, probe_tasks, sparse_probe
from saesub.evaluation.reconstruction import reconstruction
from saesub.evaluation.top_activations import top_activations
from saesub.extras.transcoders import (
    TrainingSkipTranscoder,
    TrainingSkipTranscoderConfig,
    TrainingTranscoder,
    TrainingTranscoderConfig,
    transcoder_reconstruction,
)
from saesub.loading.models import context_tokens, in_eval_mode, load_model

D, D_SAE, D_OUT, HOOK, HEADS = 32, 48, 20, "blocks.1.hook_attn_out", "blocks.1.attn.hook_z"
MLP = "blocks.1.mlp.hook_post"  # four times as wide
WORDS = [a + b for a in "bcdfghjklmnp" for b in "aeiou"]
OF_SAESUB = {
    "transcoder": (TrainingTranscoder, TrainingTranscoderConfig),
    "skip_transcoder": (TrainingSkipTranscoder, TrainingSkipTranscoderConfig),
}
CLASSES = {
    **{f"inference {name}": pair for name, pair in SAE_CLASS_REGISTRY.items()},
    **{f"training {name}": pair for name, pair in SAE_TRAINING_CLASS_REGISTRY.items()},
    **{f"training {name}": pair for name, pair in OF_SAESUB.items()},
}
SETTINGS = {
    **{"d_in": D, "d_out": D_OUT, "d_sae": D_SAE, "k": 4, "decoder_init_norm": 1.0},
    **{"matryoshka_widths": [16, D_SAE], "max_iterations": 4, "n_heads": 2, "bottleneck_factor": 4},
    "apply_b_dec_to_input": None,
}
DTYPES = ("float32", "float64", "bfloat16", "float16")


def tiny(dtype: torch.dtype | None = None, bos: bool = True) -> TransformerBridge:
    """A random GPT-2 with dropout, of large weights, so that ablation costs something."""
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<eos>"
    )
    torch.manual_seed(0)
    cfg = GPT2Config(vocab_size=80, n_positions=40, n_embd=D, n_layer=3, n_head=4)
    hf_model = GPT2LMHeadModel(cfg)
    for parameter in hf_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    bridge = load_model((hf_model, fast), dtype=dtype)
    bridge(torch.tensor([[0, 5]]))  # TransformerLens sets its own hooks at the first pass
    return bridge.train()  # with dropout, as a user may have left it


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return tiny()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    ids = torch.randint(2, 62, (5, 16), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[2, 7] = 0, 1  # every context begins with BOS, and one holds a separator
    return ids


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    order = torch.randint(0, 60, (40, 60), generator=torch.Generator().manual_seed(2))
    return [" ".join(WORDS[i] for i in row) for row in order.tolist()]


def make(name: str, **more: Any) -> Any:
    sae_class, cfg_class = CLASSES[name]
    known = {field.name for field in fields(cfg_class)}
    given = {key: value for key, value in (SETTINGS | more).items() if key in known}
    given["apply_b_dec_to_input"] = "transcoder" not in name and "pursuit" not in name
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = sae_class(cfg_class(**given))
    for parameter_name, parameter in sae.named_parameters():
        if parameter_name.startswith(("b_", "r_", "threshold")):
            parameter.data = 0.1 * torch.rand_like(parameter)
    sae.cfg.metadata.hook_name = HOOK
    return sae


def activations(n: int = 300, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (2 * x + 1).to(dtype)


@contextmanager
def everything_unchanged(*objects: Any) -> Iterator[None]:
    """The objects' weights, modes, gradients, hooks and attributes, and torch's global state."""

    def state() -> list[Any]:
        modules = [m for o in objects for m in o.modules()]
        return [
            *(m.training for m in modules),
            *((len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules),
            *(p.requires_grad for o in objects for p in o.parameters()),
            *(p.grad is None for o in objects for p in o.parameters()),
            *({k: id(v) for k, v in vars(o).items() if k != "_modules"} for o in objects),
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist(),
        ]  # fmt: skip

    weights = [copy.deepcopy(o.state_dict()) for o in objects]
    before = state()
    try:
        yield
    finally:
        assert state() == before
        for o, kept in zip(objects, weights, strict=True):
            assert all(torch.equal(v, kept[k]) for k, v in o.state_dict().items())


def kept_at(bridge: TransformerBridge, tokens: Tensor, first: int = 1) -> Tensor:
    kept = ~torch.isin(tokens, torch.tensor(context_tokens(bridge).special_ids))
    kept[:, :first] = False
    return kept


def site_of(bridge: TransformerBridge, tokens: Tensor, hook_name: str = HOOK) -> Tensor:
    with torch.no_grad(), in_eval_mode(bridge):
        return bridge.run_with_cache(tokens, names_filter=[hook_name])[1][hook_name]


def losses_by_hand(
    bridge: TransformerBridge, tokens: Tensor, kept: Tensor, put_in: Callable, at: Tensor
) -> tuple[float, float]:
    """Cross-entropy and divergence from the clean run, in float64."""

    def hook(x: Tensor, hook: Any) -> Tensor:
        out = x.clone()
        out[at] = put_in(x[at]).to(x)
        return out

    with torch.no_grad(), in_eval_mode(bridge):
        clean = bridge(tokens).double().log_softmax(-1)
        logits = bridge.run_with_hooks(tokens, fwd_hooks=[(HOOK, hook)]).double().log_softmax(-1)
    predicts = kept[:, :-1]
    ce = cross_entropy(logits[:, :-1][predicts], tokens[:, 1:][predicts]).item()
    return ce, (clean.exp() * (clean - logits)).sum(-1)[kept].mean().item()


# --- the table: evaluators × architectures -------------------------------------------------------


def judges_loss(sae: Any, bridge: TransformerBridge, tokens: Tensor, rel: float = 1e-5) -> None:
    kept = kept_at(bridge, tokens)
    with everything_unchanged(sae, bridge.original_model):
        loss = sae_loss(bridge, sae, tokens, batch_size=5)

    @torch.no_grad()
    def put_in(x: Tensor) -> Tensor:
        return sae.decode(sae.encode(x).to_dense())

    close = {"rel": rel, "abs": rel}
    nothing = losses_by_hand(bridge, tokens, kept, lambda x: x, kept)
    spliced = losses_by_hand(bridge, tokens, kept, put_in, kept)
    ablated = losses_by_hand(bridge, tokens, kept, torch.zeros_like, torch.ones_like(kept))
    assert loss.clean == pytest.approx(nothing[0], **close)
    assert (loss.with_sae, loss.kl_with_sae) == pytest.approx(spliced, **close)
    assert (loss.zero_ablated, loss.kl_zero_ablated) == pytest.approx(ablated, **close)


def judges_reconstruction(sae: Any, *_: Any, x: Tensor | None = None, rel: float = 1e-5) -> None:
    x = activations() if x is None else x
    with everything_unchanged(sae):
        found = reconstruction(sae, x)
    with torch.no_grad():
        features = sae.encode(x).to_dense()
        rebuilt = sae.decode(features).double()
    y = x.double()
    fvu = (y - rebuilt).square().sum() / (y - y.mean(0)).square().sum()
    assert found.fvu == pytest.approx(fvu.item(), rel=rel)
    assert found.l0 == pytest.approx((features != 0).sum().item() / len(x))


def judges_density(sae: Any, *_: Any, x: Tensor | None = None) -> None:
    x = activations() if x is None else x
    with everything_unchanged(sae):
        density = feature_density(sae, x, n_tokens=len(x))
        dead = saesub.dead_features(sae, x, n_tokens=len(x))
    with torch.no_grad():
        fired = (sae.encode(x).to_dense() != 0).double().mean(0)
    torch.testing.assert_close(density.double(), fired, atol=1e-6, rtol=0)
    assert torch.equal(dead, fired == 0)


def judges_all(sae: Any, *_: Any, x: Tensor | None = None) -> None:
    x = activations() if x is None else x
    with everything_unchanged(sae):
        found = saesub.judge(sae, x, n_tokens=len(x))
    n = len(x)
    assert (found.fvu, found.l0, found.n_tokens) == reconstruction(sae, x)
    assert torch.equal(found.counts.float() / n, feature_density(sae, x, n_tokens=n))
    dead = saesub.dead_features(sae, x, n_tokens=n)
    assert found.silent == {n: pytest.approx(dead.double().mean().item())}
    assert torch.equal(found.counts == 0, dead)


def judges_prediction(sae: Any, *_: Any, x: Tensor | None = None) -> None:
    x = activations() if x is None else x
    y = (x[:, :D_OUT] * 3 + 100).double()
    with everything_unchanged(sae):
        found = transcoder_reconstruction(sae, zip(x.split(70), y.split(70), strict=True))
    with torch.no_grad():
        predicted, features = sae.forward_with_activations(x.to(sae.dtype))
    fvu = (y - predicted.double()).square().sum() / (y - y.mean(0)).square().sum()
    assert found.fvu == pytest.approx(fvu.item(), rel=1e-5)
    assert found.l0 == pytest.approx((features != 0).sum().item() / len(x))


def judges_top(sae: Any, bridge: TransformerBridge, tokens: Tensor) -> None:
    with everything_unchanged(sae, bridge.original_model):
        shown = top_activations(bridge, sae, tokens, range(D_SAE), batch_size=5, n_around=40)
    kept, acts = kept_at(bridge, tokens, 2), torch.zeros(*tokens.shape, D_SAE)
    with torch.no_grad():
        acts[kept] = sae.encode(site_of(bridge, tokens)[kept]).to_dense().float()
    for feature, own in zip(shown.features, acts.unbind(-1), strict=True):
        assert feature.density == pytest.approx((own[kept] != 0).float().mean().item())
        peaks = own.abs().amax(1).sort(descending=True).values
        strongest = [abs(s.activations[s.peak]) for s in feature.snippets]
        expected = [p for p in peaks.tolist()[:4] if p > 0]
        assert strongest == pytest.approx(expected, rel=1e-4)


def judges_texts(sae: Any, bridge: TransformerBridge, tokens: Tensor) -> None:
    texts = [" ".join(WORDS[i - 2] for i in row[1:7]) for row in tokens.tolist()]
    with everything_unchanged(sae, bridge.original_model):
        found = mean_features(bridge, texts, HOOK, {"sae": sae}, max_tokens=30, progress=False)
    ids = torch.cat([torch.zeros(5, 1, dtype=torch.int64), tokens[:, 1:7]], 1)
    x = site_of(bridge, ids)[:, 2:]
    with torch.no_grad():
        of_tokens = sae.encode(x.flatten(0, 1)).to_dense().unflatten(0, x.shape[:2])
    torch.testing.assert_close(found["sae"], of_tokens.float().mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[RAW], x.float().mean(1))


EVALUATORS: dict[str, Callable[..., None]] = {
    "loss": judges_loss,
    "reconstruction": judges_reconstruction,
    "density": judges_density,
    "all": judges_all,
    "prediction": judges_prediction,
    "top": judges_top,
    "texts": judges_texts,
}


def refusal(evaluator: str, name: str) -> str | None:
    if evaluator == "prediction" and "transcoder" not in name:
        return "judge it by saesub.reconstruction"
    if evaluator in ("loss", "reconstruction", "all") and "transcoder" in name:
        return "transcoder"
    return "A temporal SAE predicts each token" if "temporal" in name else None


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_the_number_is_right_or_refused(evaluator, name, bridge, tokens) -> None:
    sae, message = make(name), refusal(evaluator, name)
    if message is None:
        EVALUATORS[evaluator](sae, bridge, tokens)
    else:
        with everything_unchanged(sae), pytest.raises(SaesubError, match=message):
            EVALUATORS[evaluator](sae, bridge, tokens)


@pytest.mark.parametrize("of_activations", DTYPES)
@pytest.mark.parametrize("of_sae", DTYPES)
@pytest.mark.parametrize("name", ["inference topk", "training gated", "training batchtopk"])
def test_any_dtype_of_sae_and_activations(name, of_sae, of_activations) -> None:
    sae, x = make(name, dtype=of_sae), activations(dtype=getattr(torch, of_activations))
    # torch adds up a sparse product in half precision in another order than a dense one
    judges_reconstruction(sae, x=x, rel=1e-3 if of_sae.endswith("16") else 1e-5)
    judges_density(sae, x=x)
    judges_all(sae, x=x)


@pytest.mark.parametrize("of_activations", DTYPES)
@pytest.mark.parametrize("of_sae", DTYPES)
def test_any_dtype_of_transcoder_and_activations(of_sae, of_activations) -> None:
    x = activations(dtype=getattr(torch, of_activations))
    judges_prediction(make("inference skip_transcoder", dtype=of_sae), x=x)


@pytest.mark.parametrize("of_model", DTYPES)
@pytest.mark.parametrize("of_sae", DTYPES)
def test_any_dtype_of_sae_and_model(of_sae, of_model, tokens) -> None:
    model = tiny(getattr(torch, of_model))
    for name in ("inference topk", "training standard"):
        judges_loss(make(name, dtype=of_sae), model, tokens, rel=1e-4)
        judges_top(make(name, dtype=of_sae), model, tokens)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("hook_name", [HOOK, HEADS])
def test_the_loss_is_that_of_saelens_in_float32(hook_name, bos, tokens) -> None:
    model, sae = tiny(bos=bos), make("inference topk", reshape_activations="hook_z")
    sae.cfg.metadata.hook_name = hook_name
    loss = sae_loss(model, sae, tokens)
    given = tokens.clone()
    given[:, 0] = 0 if bos else 1  # without BOS the separator takes its place
    ignored = list(context_tokens(model).special_ids)
    sae.turn_off_forward_pass_hook_z_reshaping()
    with torch.no_grad():
        theirs = get_recons_loss(
            sae, model.eval(), ActivationScaler(), given, True, True, ignore_tokens=ignored
        )
    kept = kept_at(model, given)
    means = {name: v[kept[:, : v.shape[1]]].mean().item() for name, v in theirs.items()}
    assert loss == pytest.approx(
        (
            means["ce_loss_without_sae"],
            means["ce_loss_with_sae"],
            means["ce_loss_with_ablation"],
            means["kl_div_with_sae"],
            means["kl_div_with_ablation"],
        ),
        abs=1e-5,
    )


@pytest.mark.parametrize("of_model", DTYPES)
def test_a_subspaces_loss_in_any_dtype(of_model, tokens, corpus) -> None:
    model = tiny(getattr(torch, of_model))
    settings = {"n_tokens": 600, "context_size": 16, "progress": False}
    spectrum = saesub.measure_spectrum(model, corpus, HOOK, **settings)
    with everything_unchanged(model.original_model):
        found = subspace_loss_recovered(model, tokens, HOOK, spectrum, [D, 5], progress=False)
    kept, mean = kept_at(model, tokens, 2), spectrum.mean
    basis = spectrum.eigenvectors[:, :5]

    def cut(x: Tensor) -> Tensor:
        return mean + (x.double() - mean) @ basis @ basis.T

    by_condition = {
        "clean": lambda x: x,
        "zero": torch.zeros_like,
        0: lambda x: mean.expand_as(x),
        5: cut,
    }
    for condition, put_in in by_condition.items():
        expected = losses_by_hand(model, tokens, kept, put_in, kept)[0]
        assert found.ce(condition) == pytest.approx(expected, rel=1e-5)
    assert found.ce(D) == found.ce("clean")


def test_the_loss_with_several_sites_cut_down_at_once(bridge, tokens, corpus) -> None:
    hooks = [f"blocks.{layer}.hook_{kind}" for layer in (1, 2) for kind in ("attn_out", "mlp_out")]
    settings = {"n_tokens": 600, "context_size": 16, "progress": False}
    spectra = saesub.measure_spectra(bridge, corpus, hooks, **settings)
    with everything_unchanged(bridge.original_model):
        found = subspace_loss_recovered(bridge, tokens, hooks, spectra, [5], progress=False)
    kept = kept_at(bridge, tokens, 2)

    def put_in(name: str, condition: Any) -> Callable:
        def hook(x: Tensor, hook: Any) -> Tensor:
            mean, basis = spectra[name].mean, spectra[name].eigenvectors
            out, basis = x.clone(), basis[:, : 0 if condition == "zero" else condition]
            centred = out[kept].double() - mean
            out[kept] = (mean * (condition != "zero") + centred @ basis @ basis.T).to(x)
            return out

        return hook

    for condition in ("zero", 0, 5):
        with torch.no_grad(), in_eval_mode(bridge):
            points = [(name, put_in(name, condition)) for name in hooks]
            logits = bridge.run_with_hooks(tokens, fwd_hooks=points).double()
        predicts = kept[:, :-1]
        expected = cross_entropy(logits[:, :-1][predicts], tokens[:, 1:][predicts]).item()
        assert found.ce(condition) == pytest.approx(expected, rel=1e-5)
    alone = subspace_loss_recovered(bridge, tokens, HOOK, spectra[HOOK], [5], progress=False)
    one = subspace_loss_recovered(bridge, tokens, [HOOK], spectra, [5], progress=False)
    assert {c: v.tolist() for c, v in one.loss_sums.items()} == {
        c: v.tolist() for c, v in alone.loss_sums.items()
    }
    assert found.ce("clean") == alone.ce("clean")


@pytest.mark.parametrize(
    ("hooks", "spectra", "message"),
    [
        ([HOOK], lambda s: s[HOOK], "give them by name"),
        ([HOOK, HEADS], lambda s: {HOOK: s[HOOK]}, f"no spectrum of {HEADS}"),
        (None, lambda s: s, "no spectrum of None"),
        ([], lambda s: s, "no hook point was named"),
        ([HOOK], lambda s: {HOOK: "file"}, f"the spectrum of {HOOK} must be a Spectrum"),
        ([HOOK, HEADS], lambda s: {HOOK: s[HEADS], HEADS: s[HEADS]}, f"not of {HOOK}"),
        ([HOOK, MLP], lambda s: s, "different widths"),
        (HOOK, lambda s: s, r"take one, spectra\[hook_name\]"),
    ],
)
def test_sites_and_spectra_that_do_not_go_together(
    hooks, spectra, message, bridge, tokens, corpus
) -> None:
    settings = {"n_tokens": 600, "context_size": 16, "progress": False}
    measured = saesub.measure_spectra(bridge, corpus, [HOOK, HEADS, MLP], **settings)
    with pytest.raises(SaesubError, match=message):
        subspace_loss_recovered(bridge, tokens, hooks, spectra(measured), [3], progress=False)


def test_one_context_has_no_interval() -> None:
    sums = {"clean": np.array([20.0]), "zero": np.array([60.0]), 0: np.array([40.0])}
    sums |= {5: np.array([25.0])}
    value, low, high = SubspaceLoss(10, sums, np.array([10])).recovered()[5]
    assert value == pytest.approx(0.75)
    assert np.isnan([low, high]).all()


# --- what does not belong together ---------------------------------------------------------------


def evaluates(name: str, bridge: TransformerBridge, sae: Any, tokens: Tensor) -> Any:
    """An evaluator that reads a model at the SAE's hook point."""
    if name == "texts":
        return mean_features(
            bridge, ["ba be bi bo"], HOOK, {"sae": sae}, max_tokens=9, progress=False
        )
    if name == "top":
        return top_activations(bridge, sae, tokens, [3])
    if name == "subspace":
        spectrum = saesub.Spectrum.from_activations(activations())
        return subspace_loss_recovered(bridge, tokens, HOOK, spectrum, [3], progress=False)
    return sae_loss(bridge, sae, tokens)


def not_folded(sae: Any, how: str) -> None:
    sae.cfg.normalize_activations = how


def set_metadata(sae: Any, **metadata: Any) -> None:
    for key, value in metadata.items():
        sae.cfg.metadata[key] = value


@pytest.mark.parametrize("name", ["loss", "top", "texts"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: not_folded(s, "expected_average_only_in"), "scaling is not folded"),
        (lambda s: not_folded(s, "covariance_whitening"), "scaling is not folded"),
        (lambda s: set_metadata(s, hook_head_index=1), "reads head 1 of"),
        (lambda s: s.W_enc.data[3].fill_(torch.nan), "W_enc of the SAE holds NaN"),
        (lambda s: s.b_enc.data[3].fill_(torch.nan), "b_enc of the SAE holds NaN"),
        (lambda s: s.half(), "is torch.float16 and the SAE says torch.float32"),
        (lambda s: s.to("meta"), "meta device"),
    ],
)
def test_an_sae_that_cannot_be_read_is_refused(name, change, message, bridge, tokens) -> None:
    sae = make("training standard")
    change(sae)
    with pytest.raises(SaesubError, match=message):
        evaluates(name, bridge, sae, tokens)


@pytest.mark.parametrize("name", ["loss", "top", "texts"])
def test_what_is_no_sae_is_refused(name, bridge, tokens) -> None:
    for wrong in (None, "an SAE", (make("inference topk"), {}, None)):
        with pytest.raises(SaesubError, match="An SAE must be one of SAELens' classes"):
            evaluates(name, bridge, wrong, tokens)


@pytest.mark.parametrize("name", ["loss", "top", "texts"])
def test_an_sae_of_another_model_is_warned_of(name, bridge, tokens) -> None:
    sae = make("inference topk")
    bridge.cfg.model_name = "gpt2"
    set_metadata(sae, model_name="EleutherAI/pythia-160m")
    with pytest.warns(UserWarning, match=r"of the model EleutherAI/pythia-160m, and this is gpt2"):
        evaluates(name, bridge, sae, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in ("gpt2", "gpt2-small", "openai-community/gpt2", "/data/models/gpt2", None):
            set_metadata(sae, model_name=same)
            evaluates(name, bridge, sae, tokens)


def test_spectra_and_saes_of_another_site_are_refused(bridge, tokens, corpus) -> None:
    settings = {"n_tokens": 600, "context_size": 16, "progress": False}
    spectrum = saesub.measure_spectrum(bridge, corpus, HOOK, **settings)
    other, alias = "blocks.2.hook_attn_out", "blocks.1.attn.hook_out"
    with pytest.raises(SaesubError, match=f"the spectrum is of {HOOK}, not of {other}"):
        subspace_loss_recovered(bridge, tokens, other, spectrum, [3], progress=False)
    aliased = subspace_loss_recovered(bridge, tokens, alias, spectrum, [3], progress=False)
    plain = subspace_loss_recovered(bridge, tokens, HOOK, spectrum, [3], progress=False)
    assert aliased.ce(3) == plain.ce(3)
    foreign = replace(spectrum, metadata=spectrum.metadata | {"model": "gemma3-270m"})
    with pytest.warns(UserWarning, match="the spectrum says that it is of the model gemma3-270m"):
        subspace_loss_recovered(bridge, tokens, HOOK, foreign, [3], progress=False)
    with pytest.raises(SaesubError, match=f"the SAE is of {HOOK}, not of {other}"):
        mean_features(bridge, ["ba be bi"], other, {"sae": make("inference topk")}, max_tokens=9)
    sae = make("training topk")
    set_metadata(sae, hook_name=other)
    with pytest.raises(SaesubError, match=f"the spectrum is of {HOOK}, not of {other}"):
        saesub.model_card(sae, spectrum, licence="mit")
    transcoder = make("training transcoder", d_out=D)
    set_metadata(transcoder, hook_name=HOOK, hook_name_out=other)
    with pytest.raises(SaesubError, match=f"the spectrum is of {HOOK}, not of {other}"):
        saesub.model_card(transcoder, spectrum, licence="mit")


def unlike(tokens: Tensor, position: int, value: int) -> Tensor:
    return tokens.index_fill(1, torch.tensor([position]), value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.float(), "tensor of integer ids"),
        (lambda t: t > 5, "tensor of integer ids"),
        (lambda t: t.tolist(), "tensor of integer ids"),
        (lambda t: t.to("meta"), "tensor of integer ids"),
        (lambda t: t[0], "contexts of at least 2 positions and at most 40"),
        (lambda t: t[:0], "contexts of at least 2 positions"),
        (lambda t: t[:, :1], "contexts of at least 2 positions"),
        (lambda t: t.repeat(1, 4), "at most 40"),
        (lambda t: unlike(t, 3, -1), r"ids -1\.\.\d+, and the model's vocabulary is 0\.\.79"),
        (lambda t: unlike(t, 3, 80), r"ids 0\.\.80, and the model's vocabulary is 0\.\.79"),
        (lambda t: torch.ones_like(t), "context 0 is padded"),
        (lambda t: torch.cat([t[:, :1]] * 3 + [t[:, 1:-2]], dim=1), "context 0 is padded"),
        (lambda t: torch.cat([t[:, :-3]] + [t[:, :1]] * 3, dim=1), "context 0 is padded"),
        (lambda t: unlike(t[:, :2], 1, 1), "longer contexts"),
    ],
)
@pytest.mark.parametrize("name", ["loss", "top", "subspace"])
def test_tokens_that_are_no_contexts_are_refused(name, change, message, bridge, tokens) -> None:
    sae, given = make("inference topk"), change(tokens)
    with pytest.raises(SaesubError, match=message):
        evaluates(name, bridge, sae, given)


def test_narrow_integers_and_whole_floats_are_taken(bridge, tokens) -> None:
    sae, spectrum = make("inference topk"), saesub.Spectrum.from_activations(activations())
    assert sae_loss(bridge, sae, tokens.to(torch.int32), batch_size=2.0) == pytest.approx(
        sae_loss(bridge, sae, tokens), rel=1e-5
    )
    kept = np.array([3, 5])
    found = subspace_loss_recovered(bridge, tokens.int(), HOOK, spectrum, kept, progress=False)
    assert {3, 5} < {*found.loss_sums}
    for wrong in (3, [], [0], ["3"], [0.5], [True], None):
        with pytest.raises(SaesubError):
            subspace_loss_recovered(bridge, tokens, HOOK, spectrum, wrong, progress=False)
    for setting in ({"batch_size": 0}, {"batch_size": 1.5}, {"skip_first": -1}):
        with pytest.raises(SaesubError, match="must be a whole number"):
            subspace_loss_recovered(bridge, tokens, HOOK, spectrum, [3], progress=False, **setting)
        with pytest.raises(SaesubError, match="must be a whole number"):
            top_activations(bridge, sae, tokens, [3], **setting)


def test_the_first_position_is_left_out_of_contexts_without_bos(bridge, tokens) -> None:
    sae, inner = make("inference topk"), tokens[:, 1:]
    set_metadata(sae, hook_name=HOOK)
    with torch.no_grad():
        sae.b_dec += 100  # what it writes is far from any activation
    assert not language_model_loss._counted(bridge, inner)[1][:, 0].any()
    seen = []
    bridge.add_hook("blocks.1.hook_out", lambda x, hook: seen.append(x[:, 0].clone()))
    try:
        sae_loss(bridge, sae, inner, batch_size=len(inner))
    finally:
        bridge.reset_hooks()
    clean, _, with_sae = seen[-3:]
    assert torch.equal(clean, with_sae)


def test_a_hook_point_without_a_vector_a_token_is_refused(bridge, tokens) -> None:
    sae, name = make("inference topk"), "blocks.1.attn.hook_pattern"
    set_metadata(sae, hook_name=name)
    spectrum = saesub.Spectrum.from_activations(activations())
    for call in (
        lambda: sae_loss(bridge, sae, tokens),
        lambda: top_activations(bridge, sae, tokens, [3]),
        lambda: subspace_loss_recovered(bridge, tokens, name, spectrum, [3], progress=False),
    ):
        with pytest.raises(SaesubError, match=r"not one vector for each token|never fired"):
            call()


# --- live objects --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loss", "top", "texts", "subspace"])
def test_a_model_that_gives_nan_is_not_judged(name, tokens) -> None:
    model = tiny()
    for parameter_name, parameter in model.original_model.named_parameters():
        if "wte" in parameter_name or "embed" in parameter_name:
            parameter.data.fill_(torch.nan)
    with pytest.raises(SaesubError, match=r"NaN|not finite"):
        evaluates(name, model, make("inference topk"), tokens)


class _StopError(Exception):
    pass


@pytest.mark.parametrize("name", ["loss", "top", "texts"])
def test_an_exception_leaves_sae_and_model_as_they_were(name, bridge, tokens) -> None:
    sae = make("training topk", reshape_activations="hook_z", normalize_activations="layer_norm")
    set_metadata(sae, hook_name=HOOK)

    def stop(x: Tensor, hook: Any) -> None:
        raise _StopError

    sae.hook_sae_acts_post.add_hook(stop)
    with everything_unchanged(sae, bridge.original_model), pytest.raises(_StopError):
        evaluates(name, bridge, sae, tokens)


def test_a_users_own_hooks_stay_and_act(bridge, tokens) -> None:
    sae, seen = make("inference topk"), []
    plain = sae_loss(bridge, sae, tokens)
    point = bridge.hook_dict[HOOK]
    point.add_hook(lambda x, hook: seen.append(x.shape))
    try:
        assert sae_loss(bridge, sae, tokens) == plain
        assert len(point.fwd_hooks) == 1
    finally:
        point.remove_hooks()
    assert seen


# --- what activations may be ---------------------------------------------------------------------


def half_read(x: Tensor) -> Iterator[Tensor]:
    blocks = iter(x.split(100))
    next(blocks)
    return blocks


def on_disk(x: Tensor, folder: Any) -> np.ndarray:
    np.save(folder / "x.npy", x.numpy())
    return np.load(folder / "x.npy", mmap_mode="c")


@pytest.mark.parametrize(
    "give",
    [
        lambda x, _: x,
        lambda x, _: x.numpy(),
        on_disk,
        lambda x, _: [x[:7], x[7:7], x[7:]],
        lambda x, _: tuple(x.split(50)),
        lambda x, _: iter(x.split(64)),
        lambda x, _: DataLoader(TensorDataset(x), batch_size=70),
        lambda x, _: DataLoader(x, batch_size=70),
        lambda x, _: [part.numpy() for part in x.split(100)],
        lambda x, _: x.clone().requires_grad_(),
    ],
)
def test_activations_of_any_kind_give_the_same(give, tmp_path) -> None:
    sae, x = make("inference topk"), activations()
    found = reconstruction(sae, give(x, tmp_path))
    assert found == pytest.approx(reconstruction(sae, x))
    assert not torch.tensor(found.fvu).requires_grad
    density = feature_density(sae, give(x, tmp_path), n_tokens=2.5e2)
    assert torch.equal(density, feature_density(sae, x, n_tokens=250))


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda x: x.long(), "floating-point"),
        (lambda x: x.long().numpy(), "floating-point"),
        (lambda x: x[0], r"shape \(n, 32\)"),
        (lambda x: [x[0, 0]], r"shape \(n, 32\)"),
        (lambda x: [x[0]], r"shape \(n, 32\)"),
        (list, r"shape \(n, 32\)"),
        (lambda x: x.tolist(), "tensor of floating-point numbers"),
        (lambda x: zip(x.split(9), x.split(9), strict=True), "give one tensor for each batch"),
        (lambda x: [{"x": x}], "not a dict"),
        (lambda x: None, "iterable of tensors, not NoneType"),
        (lambda x: 3, "iterable of tensors, not int"),
        (lambda x: x.to("meta"), "meta device"),
        (lambda x: x[:, :9], "reads activations of shape"),
        (lambda x: [], "none were given|Only 0 of 300"),
        (lambda x: x[:0], "none were given|Only 0 of 300"),
        (half_read, "Only 200 of 300"),
        (lambda x: x.index_fill(0, torch.tensor([7]), torch.nan), "NaN or infinite"),
    ],
)
def test_activations_that_are_none_are_refused(give, message) -> None:
    sae, x = make("inference topk"), activations()
    for judge in (feature_density, saesub.dead_features):
        with pytest.raises(SaesubError, match=message):
            judge(sae, give(x), n_tokens=300)
    if "200" not in message:
        with pytest.raises(SaesubError, match=message):
            reconstruction(sae, give(x))


@pytest.mark.parametrize("n_tokens", [0, -5, 2.5, "10", None, float("nan"), float("inf"), True])
def test_a_window_is_a_whole_number(n_tokens) -> None:
    for judge in (feature_density, saesub.dead_features):
        with pytest.raises(SaesubError, match="n_tokens must be a whole number"):
            judge(make("inference topk"), activations(), n_tokens=n_tokens)


@pytest.mark.parametrize("how", ["expected_average_only_in", "covariance_whitening"])
def test_given_activations_must_be_scaled_as_the_sae_was_trained(how) -> None:
    sae = make("training standard", normalize_activations=how)
    for judge in (reconstruction, lambda *given: feature_density(*given, n_tokens=300)):
        with pytest.warns(UserWarning, match="not folded .* give activations scaled"):
            judge(sae, activations())


@pytest.mark.parametrize("name", ["inference topk", "training jumprelu", "inference gated"])
def test_a_feature_that_nan_weights_silence_is_not_called_dead(name) -> None:
    sae = make(name)
    sae.W_enc.data[:, 5] = torch.nan
    for judge in (reconstruction, lambda *given: saesub.dead_features(*given, n_tokens=300)):
        with pytest.raises(SaesubError, match="W_enc of the SAE holds NaN or infinite values"):
            judge(sae, activations())


def test_a_feature_may_be_silenced_by_an_infinite_bias_or_threshold() -> None:
    sae = make("inference jumprelu")
    sae.threshold.data[3] = torch.inf
    sae.b_enc.data[4] = -torch.inf
    dead = saesub.dead_features(sae, activations(), n_tokens=300)
    assert dead.nonzero().flatten().tolist() == [3, 4]


def test_values_that_the_saes_dtype_cannot_hold_are_refused() -> None:
    sae = make("inference topk", dtype="float16")
    for judge in (reconstruction, lambda *given: saesub.dead_features(*given, n_tokens=300)):
        with pytest.raises(SaesubError, match=r"not finite in torch\.float16"):
            judge(sae, activations() * 1e5)


def test_a_rare_feature_is_not_dead_whatever_the_default_dtype() -> None:
    sae, x = make("inference standard"), torch.zeros(200_000, D)
    sae.b_enc.data.fill_(-1)
    sae.b_dec.data.zero_()
    sae.W_enc.data.fill_(0)[0, 7] = 1
    x[123, 0] = 5
    torch.set_default_dtype(torch.float16)
    try:
        tenfold = itertools.repeat(x, 200)  # one token of 40 million, were they all read
        density = feature_density(sae, tenfold, n_tokens=200_000)
        assert density[7].item() == pytest.approx(1 / 200_000)
        assert saesub.dead_features(sae, x, n_tokens=200_000).sum() == D_SAE - 1
    finally:
        torch.set_default_dtype(torch.float32)


# --- quotients, directions and classes -----------------------------------------------------------


def test_zero_directions_have_no_cosine_and_are_no_neighbours() -> None:
    rows = torch.tensor([[1.0, 0], [-1, 0.1], [0, 0], [0, -1e-30], [0, -1]])
    with pytest.warns(UserWarning, match="1 of 5 directions are zero"):
        matching = match_features(rows, rows[[4, 2, 0]])
    assert matching.cosine[matching.of_b == 1].isnan().all()
    assert matching.cosine[matching.of_b != 1].tolist() == pytest.approx([1, 1])
    with pytest.warns(UserWarning, match="directions are zero"):
        inside = overlap(rows, torch.eye(2)[:, :1])
    assert inside[2].isnan()
    assert inside[3] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_cosines_and_overlaps_of_any_dtype(dtype) -> None:
    rows = activations(40).to(getattr(torch, dtype))
    basis = torch.linalg.qr(activations(D).double()).Q[:, :5].float()
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
    close = {"atol": 1e-5, "rtol": 0, "check_dtype": False}
    torch.testing.assert_close(match_features(rows, rows).cosine, torch.ones(40), **close)
    expected = (unit @ basis.double()).square().sum(1)
    torch.testing.assert_close(overlap(rows, basis), expected, **close)


@pytest.mark.parametrize(
    "wrong", [torch.full((3, 4), torch.nan), torch.ones(3, 4).long(), torch.ones(4), None, [[1.0]]]
)
def test_directions_that_are_none_are_refused(wrong) -> None:
    right, basis, dead = torch.ones(3, 4), torch.eye(4)[:, :2], torch.tensor([True, False, True])
    for call in (
        lambda: match_features(wrong, right),
        lambda: match_features(right, wrong),
        lambda: overlap(wrong, basis),
        lambda: overlap_test(wrong, dead, basis),
    ):
        with pytest.raises(SaesubError):
            call()


def test_a_basis_is_orthonormal_and_the_dead_are_boolean() -> None:
    rows, dead = torch.eye(4), torch.tensor([True, False, True, False])
    for basis in (2 * torch.eye(4)[:, :2], torch.ones(4, 2) / 2, torch.eye(4)[:, [0, 0]]):
        with pytest.raises(SaesubError, match="basis is not orthonormal"):
            overlap(rows, basis)
    for wrong in (dead.long(), dead.numpy(), dead.float()):
        with pytest.raises(SaesubError, match="dead must be a boolean tensor"):
            overlap_test(rows, wrong, torch.eye(4)[:, :2])
    for alike in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
        with pytest.warns(UserWarning, match="no two groups to compare and auc is NaN"):
            assert np.isnan(overlap_test(rows, alike, torch.eye(4)[:, :2]).auc)
    ties = overlap_test(torch.ones(4, 4), dead, torch.eye(4)[:, :2])
    assert (ties.auc, ties.p_value) == (0.5, 1)


@pytest.mark.parametrize(
    "features", [torch.tensor([3, 5]), np.array([3, 5]), (3, 5), range(3, 7, 2), [3.0, 5]]
)
def test_features_may_be_any_list_of_indices(features, bridge, tokens) -> None:
    shown = top_activations(bridge, make("inference topk"), tokens, features)
    assert [f.feature for f in shown.features] == [3, 5]


@pytest.mark.parametrize(
    "features",
    [
        [-1],
        [D_SAE],
        torch.arange(D_SAE) < 3,
        [True],
        np.ones(D_SAE, bool),
        ["3"],
        3,
        "3",
        [[3]],
        [0.5],
    ],
)
def test_features_that_are_no_indices_are_refused(features, bridge, tokens) -> None:
    with pytest.raises(SaesubError):
        top_activations(bridge, make("inference topk"), tokens, features)


def test_padding_is_no_token_of_a_text_whatever_its_id_is() -> None:
    pair = tiny_model.tiny_gpt2(), tiny_model.tiny_tokenizer(bos=None, eos=None)
    short, long = "ba be bi bo", "ba be bi bo bu ba be bi bo bu"
    both = mean_features(pair, [short, long], tiny_model.HOOK, {}, progress=False)[RAW]
    alone = mean_features(pair, [short], tiny_model.HOOK, {}, progress=False)[RAW]
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [list, tuple, pd.Series, iter, np.array])
def test_texts_may_be_any_list(wrap, bridge) -> None:
    texts, settings = ["ba be bi bo", "du da do"], {"max_tokens": 9, "progress": False}
    found = mean_features(bridge, wrap(texts), HOOK, {}, **settings)[RAW]
    torch.testing.assert_close(found, mean_features(bridge, texts, HOOK, {}, **settings)[RAW])


@pytest.mark.parametrize("texts", ["ba be bi", [], None, 3, [3], ["ba be", None], [["ba", "be"]]])
def test_texts_that_are_none_are_refused(texts, bridge) -> None:
    with pytest.raises(SaesubError, match="at least one text, as a list of strings"):
        mean_features(bridge, texts, HOOK, {}, max_tokens=9, progress=False)
    with pytest.raises(SaesubError, match="more than the model's 40"):
        mean_features(bridge, ["ba be"], HOOK, {}, max_tokens=40, progress=False)


def test_classes_are_boolean_and_features_finite() -> None:
    x, y = activations(40), torch.arange(40) % 2 == 0
    right = sparse_probe(x, y, x, y, 2)
    assert sparse_probe(x.double(), y, x.double(), y, np.int64(2)) == right
    assert sparse_probe(x.clone().requires_grad_(), y, x.numpy(), y, 2.0) == right
    assert sparse_probe(x.bfloat16(), y, x.bfloat16(), y, None) >= 0.5
    for wrong in (y.long(), y.numpy(), y.float(), y[:9]):
        with pytest.raises(SaesubError, match="boolean"):
            sparse_probe(x, wrong, x, y, 2)
        with pytest.raises(SaesubError, match="boolean"):
            sparse_probe(x, y, x, wrong, 2)
    bad = x.index_fill(0, torch.tensor([3]), torch.nan)
    for train, test in ((bad, x), (x, bad), (x[:0], x), (x, x[:0]), (x[0], x)):
        with pytest.raises(SaesubError):
            sparse_probe(train, y, test, y, 2)
    for k in (0, D + 1, 1.5, "2", True):
        with pytest.raises(SaesubError, match="k must"):
            sparse_probe(x, y, x, y, k)
    groups = {"a": x[y], "b": x[~y], "narrow": x[:, :9]}
    for task, settings in (
        (("a", "a"), {}),
        (("a", "narrow"), {}),
        (("a",), {}),
        ("ab", {}),
        (("a", "b"), {"ks": 5}),
        (("a", "b"), {"test_share": float("nan")}),
        (("a", "b"), {"test_share": -0.5}),
    ):
        with pytest.raises(SaesubError):
            probe_tasks(groups, {"task": task}, **settings)
