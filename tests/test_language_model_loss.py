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
)
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.collect import measure_spectrum
from saesub.activations.spectrum import Spectrum
from saesub.activations.tokens import kept_positions, pack_contexts
from saesub.errors import SaesubError
from saesub.evaluation.language_model_loss import SubspaceLoss, sae_loss, subspace_loss_recovered
from saesub.loading.models import context_tokens

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
    assert recovered.ce(576) == pytest.approx(recovered.ce_clean, abs=1e-4)
    assert recovered.ce_clean < recovered.ce(288) < recovered.ce(8) < recovered.ce_mean_ablated
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
    known = tuple(c for c in losses if isinstance(c, int) and c > 0)
    return SubspaceLoss("h", 100, known, losses, np.array([10, 30]))


def test_interpolation_and_interval() -> None:
    flat = _made_up({"clean": [20, 60], "zero": [60, 180], 0: [40, 120], 50: [24, 72]})
    assert flat.ce_clean == 2
    assert flat.ce_zero_ablated == 6
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


@pytest.mark.model
def test_run_evals_of_saelens_takes_the_bridge_and_our_tokens(
    model: TransformerBridge, tokens: torch.Tensor
) -> None:
    sae = TopKSAE(TopKSAEConfig(d_in=576, d_sae=600, k=4))
    sae.cfg.metadata.hook_name = "blocks.1.hook_attn_out"
    sae.cfg.metadata.prepend_bos = False
    store = ActivationsStore.from_sae(
        model,
        sae,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        context_size=tokens.shape[1],
        store_batch_size_prompts=2,
    )
    config = EvalConfig(batch_size_prompts=2, n_eval_reconstruction_batches=1, compute_ce_loss=True)
    metrics, _ = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=[])
    loss = model(tokens, return_type="loss").item()
    measured = metrics["model_performance_preservation"]["ce_loss_without_sae"]
    assert measured == pytest.approx(loss, rel=1e-4)


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
def test_the_loss_refuses_half_a_batch_and_an_sae_without_a_place(
    model: TransformerBridge, tokens: torch.Tensor
) -> None:
    with pytest.raises(SaesubError, match="do not fill batches of 3"):
        sae_loss(model, perfect_sae(), tokens, batch_size=3)
    nowhere = perfect_sae()
    nowhere.cfg.metadata.hook_name = None
    with pytest.raises(SaesubError, match="does not say which hook point"):
        sae_loss(model, nowhere, tokens)
