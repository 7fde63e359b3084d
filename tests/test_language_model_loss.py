"""The language model's loss with a site cut down, or with an SAE in its place."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import (
    ActivationsStore,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.collect import measure_spectrum
from saesub.activations.spectrum import Spectrum
from saesub.activations.tokens import kept_positions, pack_contexts
from saesub.errors import SaesubError
from saesub.evaluation.language_model_loss import (
    SaeLoss,
    SubspaceLoss,
    sae_loss,
    sae_losses,
    subspace_loss_recovered,
)
from saesub.loading.models import context_tokens
from saesub.reproduce import claims
from saesub.reproduce.paper_claims import UNTESTED

HOOK = "blocks.0.hook_mlp_out"
HEADS = "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def tokens(model: TransformerBridge, corpus: Dataset) -> torch.Tensor:
    return pack_contexts(model, corpus.select(range(500, 700)), n_contexts=2, context_size=32)


@pytest.fixture(scope="module")
def spectrum(model: TransformerBridge, corpus: Dataset) -> Spectrum:
    few = corpus.select(range(200))
    return measure_spectrum(model, few, HOOK, n_tokens=2000, context_size=64, progress=False)


@pytest.fixture(scope="module")
def recovered(model: TransformerBridge, tokens: torch.Tensor, spectrum: Spectrum) -> SubspaceLoss:
    return subspace_loss_recovered(
        model, tokens, HOOK, spectrum, [576, 8, 288], batch_size=1, progress=False
    )


@pytest.mark.model
def test_all_directions_recover_everything(recovered: SubspaceLoss) -> None:
    assert recovered.ce(576) == pytest.approx(recovered.ce("clean"), abs=1e-4)
    assert recovered.ce("clean") < recovered.ce(288) < recovered.ce(8) < recovered.ce(0)
    share = {r: e.value for r, e in recovered.recovered().items()}
    assert list(share) == [8, 288, 576]
    assert 0 < share[8] < share[288] < share[576] == pytest.approx(1, abs=1e-4)
    assert 8 / 576 < recovered.components_for(0.9).value < 1


@pytest.mark.model
def test_losses_equal_a_plain_run_with_heads_concatenated(
    model: TransformerBridge, corpus: Dataset, tokens: torch.Tensor
) -> None:
    few = corpus.select(range(100))
    spectrum = measure_spectrum(model, few, HEADS, n_tokens=600, context_size=64, progress=False)
    kept = kept_positions(model, tokens, skip_first=1)
    mean, basis = spectrum.mean.float(), spectrum.basis(8)

    def project(z: torch.Tensor, hook) -> torch.Tensor:
        x = z.flatten(2)
        x = torch.where(kept[..., None], mean + (x - mean) @ basis @ basis.T, x)
        return x.view(z.shape)

    measured = subspace_loss_recovered(model, tokens, HEADS, spectrum, [8], progress=False)
    for condition, hooks in (("clean", []), (8, [(HEADS, project)])):
        losses = model.run_with_hooks(
            tokens, return_type="loss", loss_per_token=True, fwd_hooks=hooks
        )
        expected = losses[kept[:, :-1]].mean().item()
        assert measured.ce(condition) == pytest.approx(expected, rel=1e-4)


@pytest.mark.model
def test_errors_say_what_to_do(
    model: TransformerBridge, tokens: torch.Tensor, spectrum: Spectrum
) -> None:
    with pytest.raises(SaesubError, match="did you mean"):
        subspace_loss_recovered(
            model, tokens, "blocks.0.hook_mlpout", spectrum, [8], progress=False
        )
    with pytest.raises(SaesubError, match=r"1\.\.576"):
        subspace_loss_recovered(model, tokens, HOOK, spectrum, [577], progress=False)
    with pytest.raises(SaesubError, match="empty"):
        subspace_loss_recovered(model, tokens, HOOK, spectrum, [], progress=False)
    narrow = Spectrum.from_activations(torch.randn(50, 16))
    with pytest.raises(SaesubError, match="16 wide"):
        subspace_loss_recovered(model, tokens[:1], HOOK, narrow, [8], progress=False)


def _made_up(sums: dict[int | str, list[float]]) -> SubspaceLoss:
    losses = {c: np.array(v, dtype=float) for c, v in sums.items()}
    return SubspaceLoss(100, losses, np.array([10, 30]))


def test_interpolation_and_interval() -> None:
    flat = _made_up({"clean": [20, 60], "zero": [60, 180], 0: [40, 120], 50: [24, 72]})
    assert flat.ce("clean") == 2
    assert flat.ce("zero") == 6
    assert flat.recovered()[50] == pytest.approx((0.8, 0.8, 0.8))
    assert flat.recovered("zero")[50].value == pytest.approx(0.9)
    assert flat.components_for(0.4).value == pytest.approx(0.25)
    assert flat.components_for(0.9).value == pytest.approx(0.75)
    assert flat.components_for(1.0).value == pytest.approx(1.0)
    assert flat.components_for(0.4, "zero").value == 0
    varied = _made_up({"clean": [20, 60], "zero": [60, 180], 0: [40, 120], 50: [24, 90]})
    value, low, high = varied.components_for(0.7)
    assert low < value < high
    with pytest.raises(SaesubError, match="share"):
        flat.components_for(0)
    with pytest.raises(SaesubError, match="not measured"):
        flat.ce(7)


def test_the_difference_of_two_sites_is_paired() -> None:
    """Contexts that need more at one site need more at the other, so that the interval of the
    difference is narrower than what the two intervals allow."""
    rng = np.random.default_rng(0)
    n, hard = np.full(30, 10), rng.uniform(0, 1, 30)

    def measured(half: np.ndarray) -> SubspaceLoss:
        sums = {"clean": 0 * hard + 10, "zero": 0 * hard + 20, 0: 0 * hard + 20, 50: half}
        return SubspaceLoss(100, sums, n)

    few, many = measured(10 + 4 * hard), measured(12 + 4 * hard)
    value, low, high = many.components_beyond(few, 0.95)
    ends = [loss.components_for(0.95) for loss in (many, few)]
    assert value == pytest.approx(ends[0].value - ends[1].value)
    assert low <= value <= high
    assert high - low < 0.7 * ((ends[0].high - ends[1].low) - (ends[0].low - ends[1].high))
    assert few.components_beyond(few) == (0, 0, 0)
    with pytest.raises(SaesubError, match="different contexts"):
        many.components_beyond(SubspaceLoss(100, few.loss_sums, n + 1))


FREE = {"clean": [20, 60], "zero": [20, 60], 0: [20, 60], 50: [20, 60]}
GAINFUL = FREE | {"zero": [19, 50], 0: [19, 50], 50: [18, 70]}
UNLIKE_RUNS = FREE | {"zero": [20 + 1e-6, 60 - 1e-6], 0: [20 + 1e-6, 60 + 1e-6]}


@pytest.mark.parametrize("sums", [FREE, GAINFUL, UNLIKE_RUNS], ids=["free", "gainful", "rounding"])
@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_where_ablation_costs_nothing_no_share_is_made_up(sums: dict, ablation: str) -> None:
    loss = _made_up(sums)
    with pytest.warns(UserWarning, match=f"{ablation} ablation costs .* no loss to recover"):
        found = loss.components_for(0.9, ablation)
    with pytest.warns(UserWarning, match="measure more contexts"):
        curve = loss.recovered(ablation)
    assert np.isnan([*found, *curve[50]]).all()
    measured = claims.compare([claims.Measurement("F2.gap", *found[:1], found[1:])], "01")
    assert measured.rows[0]["verdict"] == UNTESTED


def test_resamples_without_a_cost_widen_the_interval() -> None:
    # One context of 40 costs nothing, and a resample is of that one alone hardly ever.
    clean, few = np.full(40, 10.0), np.full(40, 1)
    ablated = clean + 1
    ablated[0] = 10
    sums = {"clean": clean, "zero": ablated, 0: ablated, 50: clean + 0.1}
    assert np.isfinite(SubspaceLoss(100, sums, few).recovered()[50]).all()
    # Of two, it is in one resample of four: what the interval ends at is not known.
    sums = {c: values[:2] for c, values in sums.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, low, high = SubspaceLoss(100, sums, few[:2]).recovered()[50]
    assert value == pytest.approx(0.8)
    assert np.isnan([low, high]).all()


def test_an_sae_where_zero_ablation_costs_nothing_recovers_no_share() -> None:
    for clean, zero, kl in ((2.0, 2.0, 0.0), (2.0, 1.5, 1e-9)):
        loss = SaeLoss(clean, 2.5, zero, 0.1, kl)
        for measure in ("recovered", "kl_recovered"):
            with pytest.warns(UserWarning, match="zero ablation costs"):
                assert np.isnan(getattr(loss, measure))


def perfect_sae(x_hat_scale: float = 1.0) -> StandardSAE:
    """Two features for each direction, one for either sign: it returns x, scaled."""
    sae = StandardSAE(StandardSAEConfig(d_in=576, d_sae=1152, apply_b_dec_to_input=False))
    identity = torch.eye(576)
    sae.W_enc.data = torch.cat([identity, -identity], dim=1)
    sae.W_dec.data = torch.cat([identity, -identity]) * x_hat_scale
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    sae.cfg.metadata.hook_name = "blocks.4.hook_attn_out"
    return sae


@pytest.mark.model
def test_a_perfect_sae_recovers_the_whole_loss_and_zero_none(
    model: TransformerBridge, tokens: torch.Tensor
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # SAELens' own, about its store
        loss = sae_loss(model, perfect_sae(), tokens, batch_size=1)
    assert loss.with_sae == pytest.approx(loss.clean, abs=1e-4)
    assert loss.recovered == pytest.approx(1, abs=0.01)
    assert loss.kl_recovered == pytest.approx(1, abs=1e-3)
    assert loss.zero_ablated > loss.clean
    half = sae_loss(model, perfect_sae(0.5), tokens, batch_size=1)
    assert loss.clean < half.with_sae < half.zero_ablated
    assert half.clean == pytest.approx(loss.clean)
    assert 0 < half.kl_recovered < 1


@pytest.mark.model
def test_several_saes_have_the_losses_that_each_has_alone(
    model: TransformerBridge, tokens: torch.Tensor
) -> None:
    saes = [perfect_sae(0.5), perfect_sae(), perfect_sae(0.2)]
    together = sae_losses(model, saes, tokens, batch_size=1)
    for loss, sae in zip(together, saes, strict=True):
        assert loss == pytest.approx(sae_loss(model, sae, tokens, batch_size=1), rel=1e-6, abs=1e-6)
    elsewhere = perfect_sae()
    elsewhere.cfg.metadata.hook_name = "blocks.5.hook_attn_out"
    for given in ([], [perfect_sae(), elsewhere]):
        with pytest.raises(SaesubError, match=f"the SAEs are of {len(given)} hook points"):
            sae_losses(model, given, tokens)


@pytest.mark.model
def test_the_loss_leaves_out_the_first_token(
    model: TransformerBridge, tokens: torch.Tensor
) -> None:
    loss = sae_loss(model, perfect_sae(), tokens, batch_size=2)
    specials = context_tokens(model)
    given = tokens.clone()
    given[:, 0] = specials.separator_id
    per_token = model(given, return_type="loss", loss_per_token=True)
    counted = ~torch.isin(given[:, :-1], torch.tensor(specials.special_ids))
    assert loss.clean == pytest.approx(per_token[counted].mean().item(), rel=1e-4)


@pytest.mark.model
@pytest.mark.parametrize("hook_name", ["blocks.1.hook_attn_out", HEADS])
def test_the_loss_is_that_of_saelens_run_evals(
    model: TransformerBridge, tokens: torch.Tensor, hook_name: str
) -> None:
    """Contexts that do not fill the last batch count like the others."""
    reshape = "hook_z" if hook_name == HEADS else "none"
    sae = TopKSAE(TopKSAEConfig(d_in=576, d_sae=600, k=4, reshape_activations=reshape))
    sae.cfg.metadata.hook_name = hook_name
    loss = sae_loss(model, sae, torch.cat([tokens, tokens[:1]]), batch_size=2)
    assert sae.cfg.metadata.prepend_bos is None
    specials = context_tokens(model)
    given = torch.cat([tokens, tokens[:1]])
    given[:, 0] = specials.separator_id
    sae.cfg.metadata.prepend_bos = False  # SAELens' store asks, though the tokens have decided it
    store = ActivationsStore.from_sae(
        model,
        sae,
        dataset=Dataset.from_dict({"input_ids": given.tolist()}),
        context_size=given.shape[1],
        store_batch_size_prompts=1,
        total_tokens=3,
    )
    config = EvalConfig(
        batch_size_prompts=1,
        n_eval_reconstruction_batches=3,
        compute_ce_loss=True,
        compute_kl=True,
    )
    ignored = list(specials.special_ids)
    metrics, _ = run_evals(
        sae, store, model, ActivationScaler(), config, exclude_special_tokens=ignored
    )
    ce, kl = metrics["model_performance_preservation"], metrics["model_behavior_preservation"]
    assert loss.clean == pytest.approx(ce["ce_loss_without_sae"], rel=1e-5)
    assert loss.with_sae == pytest.approx(ce["ce_loss_with_sae"], rel=1e-5)
    assert loss.zero_ablated == pytest.approx(ce["ce_loss_with_ablation"], rel=1e-5)
    assert loss.kl_with_sae == pytest.approx(kl["kl_div_with_sae"], rel=1e-4)
    assert loss.kl_zero_ablated == pytest.approx(kl["kl_div_with_ablation"], rel=1e-4)
    assert loss.kl_recovered == pytest.approx(kl["kl_div_score"], rel=1e-3)
    assert loss.recovered == pytest.approx(ce["ce_loss_score"], rel=1e-3)


@pytest.mark.model
def test_the_loss_refuses_what_it_cannot_splice_in(
    model: TransformerBridge, tokens: torch.Tensor
) -> None:
    sae = perfect_sae()
    for contexts in (tokens[:0], tokens[0], tokens[:, :1]):
        with pytest.raises(SaesubError, match="contexts of at least 2 positions"):
            sae_loss(model, sae, contexts)
    with pytest.raises(SaesubError, match="batch_size must be a whole number of at least 1"):
        sae_loss(model, sae, tokens, batch_size=0)
    sae.cfg.metadata.hook_name = "blocks.4.mlp.hook_post"
    with pytest.raises(
        SaesubError, match=r"the SAE is 576 wide and blocks.4.mlp.hook_post is 1536"
    ):
        sae_loss(model, sae, tokens)
    sae.cfg.metadata.hook_name = None
    with pytest.raises(SaesubError, match="does not say which hook point"):
        sae_loss(model, sae, tokens)
    transcoder = Transcoder(
        TranscoderConfig(d_in=576, d_sae=8, d_out=576, apply_b_dec_to_input=False)
    )
    with pytest.raises(SaesubError, match="give an autoencoder"):
        sae_loss(model, transcoder, tokens)
