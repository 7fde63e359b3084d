"""Loss recovered on the real model; FVU and L0 of real SAELens SAEs against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import (
    ActivationsStore,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations import measure_spectrum
from saesub.contexts import kept_positions, pack_contexts
from saesub.errors import SaesubError
from saesub.evaluate import LossRecovered, loss_recovered, reconstruction
from saesub.spectrum import Spectrum

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
def recovered(model: TransformerBridge, tokens: torch.Tensor, spectrum: Spectrum) -> LossRecovered:
    return loss_recovered(
        model, tokens, HOOK, spectrum, [576, 8, 288], batch_size=1, progress=False
    )


@pytest.mark.model
def test_all_directions_recover_everything(recovered: LossRecovered) -> None:
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

    measured = loss_recovered(model, tokens, HEADS, spectrum, [8], progress=False)
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
        loss_recovered(model, tokens, "blocks.0.hook_mlpout", spectrum, [8], progress=False)
    with pytest.raises(SaesubError, match=r"1\.\.576"):
        loss_recovered(model, tokens, HOOK, spectrum, [577], progress=False)
    with pytest.raises(SaesubError, match="empty"):
        loss_recovered(model, tokens, HOOK, spectrum, [], progress=False)
    narrow = Spectrum.from_activations(torch.randn(50, 16))
    with pytest.raises(SaesubError, match="16 wide"):
        loss_recovered(model, tokens[:1], HOOK, narrow, [8], progress=False)


def _made_up(sums: dict[int | str, list[float]]) -> LossRecovered:
    losses = {c: np.array(v, dtype=float) for c, v in sums.items()}
    known = tuple(c for c in losses if isinstance(c, int) and c > 0)
    return LossRecovered("h", 100, known, losses, np.array([10, 30]))


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


SAES = {
    "standard": lambda: StandardSAE(StandardSAEConfig(d_in=12, d_sae=30)),
    "topk": lambda: TopKSAE(TopKSAEConfig(d_in=12, d_sae=30, k=4)),
    "training": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=12, d_sae=30, k=4)),
}


@pytest.mark.parametrize("kind", SAES)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_fvu_and_l0_against_brute_force(kind: str, offset: float) -> None:
    torch.manual_seed(0)
    sae = SAES[kind]()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        sae.b_dec += offset
    x = torch.randn(700, 12) + offset
    blocks = x.split([200, 1, 499])
    got = reconstruction(sae, blocks)
    features = [sae.encode(b).detach() for b in blocks]
    rebuilt = torch.cat([sae.decode(f).detach() for f in features]).double()
    exact = x.double()
    expected = (exact - rebuilt).square().sum() / (exact - exact.mean(0)).square().sum()
    assert got.n_tokens == 700
    assert got.fvu == pytest.approx(expected.item(), rel=1e-5)
    assert got.l0 == pytest.approx(sum(int((f != 0).sum()) for f in features) / 700)
    with pytest.raises(SaesubError, match="FVU"):
        reconstruction(sae, [])


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
