"""The sparse TopK and BatchTopK steps against SAELens' own, on a real model's activations."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    SAETrainer,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.init.subspace import initialize_in_subspace
from saesub.topk import cpu, cpu_library, int8_search, packed_encoder, triton_backend
from saesub.topk.eligibility import lay_out_by_feature, why_dense
from saesub.topk.step import autograd_pass, row_step
from saesub.training.mitigations import GhostGradients
from saesub.training.trainer import SubspaceSAETrainer

D_SAE, K, BATCH = 1152, 8, 128
pytestmark = pytest.mark.model
needs_native = pytest.mark.skipif(cpu_library.library() is None, reason="no C++ compiler here")
needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and triton_backend.available()),
    reason="no CUDA or no Triton here",
)
HAS_INT8 = bool(cpu_library.instructions())
BACKENDS = [pytest.param("auto", marks=needs_native), "torch"]
DEVICES = [pytest.param("cpu", marks=needs_native), pytest.param("cuda", marks=needs_cuda)]


def _sae(kind: str, seed: int = 0, **settings) -> TopKTrainingSAE:
    torch.manual_seed(seed)
    settings = {"d_in": 576, "d_sae": D_SAE, "k": K} | settings
    if kind == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**settings))
    return TopKTrainingSAE(TopKTrainingSAEConfig(**settings))


def _cfg(steps: int) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=5,
    )


def _batches(activations):
    for start in itertools.count():
        yield activations[torch.arange(start * BATCH, (start + 1) * BATCH) % len(activations)]


def _unequal_norms(sae: TopKTrainingSAE, spectrum: Spectrum) -> None:
    initialize_in_subspace(sae, spectrum, d_init=200)
    sae.W_dec.data *= torch.linspace(0.5, 2, sae.cfg.d_sae, dtype=sae.dtype)[:, None]


@pytest.fixture(scope="module")
def spectrum(activations) -> Spectrum:
    return Spectrum.from_activations(activations)


@pytest.mark.parametrize("n_dead", [0, 100, 700])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_autograd_pass_equals_saelens_own(
    activations, spectrum, kind, rescale, apply_b_dec, n_dead
):
    """Loss, both parts, output, features and all gradients, in float64; AuxK with few and many."""
    sae = _sae(kind, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=apply_b_dec)
    sae = sae.double()
    sae.dtype = torch.float64
    _unequal_norms(sae, spectrum)
    x = activations[:300].double()
    dead = torch.arange(D_SAE) % 10 < 10 * n_dead / D_SAE
    theirs = copy.deepcopy(sae).training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    twin = copy.deepcopy(sae)
    expected = twin.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    ours = autograd_pass(sae, x, dead)
    for name, value in expected.losses.items():
        torch.testing.assert_close(ours.losses[name], value)
    assert bool(ours.losses["auxiliary_reconstruction_loss"] > 0) == (n_dead > 0)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.sae_out, expected.sae_out)
    torch.testing.assert_close(ours.feature_acts.to_dense(), theirs.feature_acts)
    if kind == "batchtopk":
        torch.testing.assert_close(sae.topk_threshold, twin.topk_threshold)
    mine = torch.autograd.grad(ours.loss, list(sae.parameters()))
    reference = torch.autograd.grad(expected.loss, list(twin.parameters()))
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


class _GradientAsState(torch.optim.Adam):
    """Adam whose first moment is the clipped gradient, so that a step on rows shows it."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0, betas=(0.0, 0.999), fused=True)


@needs_native
@pytest.mark.parametrize("n_dead", [0, 100, 700])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_native_gradients_are_within_1e_5_of_float64(activations, spectrum, kind, rescale, n_dead):
    sae = _sae(kind, rescale_acts_by_decoder_norm=rescale)
    _unequal_norms(sae, spectrum)
    double = copy.deepcopy(sae).double()
    double.dtype = torch.float64
    lay_out_by_feature(sae)
    x, dead = activations[:300], torch.arange(D_SAE) % 10 < 10 * n_dead / D_SAE
    optimizer = _GradientAsState(sae.parameters())
    ours = row_step(cpu.BACKEND, sae, optimizer, x, dead)
    expected = autograd_pass(double, x.double(), dead)
    expected.loss.backward()
    torch.nn.utils.clip_grad_norm_(double.parameters(), 1.0)
    for name, value in expected.losses.items():
        torch.testing.assert_close(ours.losses[name].double(), value, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(ours.sae_out.double(), expected.sae_out, rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(sae.named_parameters(), double.parameters(), strict=True):
        gradient = optimizer.state[a]["exp_avg"].double()
        assert (gradient - b.grad).norm() / b.grad.norm() < 1e-5, name


AUXK_FROM_20 = dataclasses.replace(_cfg(100), dead_feature_window=20)


@pytest.fixture(scope="module")
def saelens_run(activations):
    """By kind of SAE: the losses of 100 steps of SAELens' trainer, and how often features fired."""

    @cache
    def run(kind: str) -> tuple[torch.Tensor, float]:
        trainer = SAETrainer(AUXK_FROM_20, _sae(kind), iter(()))
        losses = _losses_of_100_steps(trainer, activations)
        return losses, float(trainer.act_freq_scores.sum())

    return run


def _losses_of_100_steps(trainer: SAETrainer, activations) -> torch.Tensor:
    losses = []
    for x, step in zip(_batches(activations), range(100), strict=False):
        losses.append(trainer.step(x).losses["mse_loss"].item())
        trainer.n_training_steps = step + 1
    return torch.tensor(losses)


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("exact_search", marks=needs_native)])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_a_hundred_steps_follow_saelens_trainer(activations, saelens_run, kind, backend):
    """With AuxK, from the 20th step on; which SAELens' window of steps says."""
    trainer = SubspaceSAETrainer(
        AUXK_FROM_20, _sae(kind), iter(()), optimizer="adam", backend=backend
    )
    assert trainer.dead_window_tokens == 21 * BATCH
    assert why_dense(trainer.sae) is None
    losses = _losses_of_100_steps(trainer, activations)
    expected, fired = saelens_run(kind)
    assert expected[-10:].mean() < 0.7 * expected[:10].mean()
    difference = (losses - expected).abs() / expected
    assert difference[:50].median() < 1e-5
    # Rounding grows with time: SAELens in float32 is 1 % from SAELens in float64 after 200.
    assert difference.max() < 3e-2
    assert abs(float(trainer.act_freq_scores.sum()) / fired - 1) < 1e-3


@pytest.mark.parametrize("aux", [0.0, 1.0])
@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_torch_backends_train_alike(activations, device, optimizer, aux):
    """Also with AuxK, which the dead of the first window switch on."""
    trained = []
    rows = "triton" if device == "cuda" else "auto"
    for backend, place in ((rows, device), ("torch", "cpu")):
        sae = _sae("topk", aux_loss_coefficient=aux).to(place)
        cfg = dataclasses.replace(_cfg(60), device=place)
        trainer = SubspaceSAETrainer(
            cfg, sae, iter(()), optimizer=optimizer, backend=backend, dead_window_tokens=640
        )
        outputs = []
        for step, x in zip(range(60), _batches(activations), strict=False):
            outputs.append(trainer.step(x))
            trainer.n_training_steps = step + 1
        trained.append(outputs)
    for name in ("mse_loss", "auxiliary_reconstruction_loss"):
        a, b = (torch.stack([o.losses[name].cpu() for o in outputs]) for outputs in trained)
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)
    assert (float(a.max()) > 0) == (aux > 0)  # the last compared are the AuxK losses


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_a_resumed_run_ends_with_identical_weights(activations, tmp_path, backend, optimizer):
    def trainer() -> SubspaceSAETrainer:
        sae = _sae("topk", aux_loss_coefficient=0.0)
        return SubspaceSAETrainer(
            _cfg(30), sae, iter(()), optimizer=optimizer, backend=backend, dead_window_tokens=640
        )

    def train(trainer: SubspaceSAETrainer, start: int, stop: int) -> None:
        for step, x in enumerate(itertools.islice(_batches(activations), start, stop), start):
            trainer.step(x)
            trainer.n_training_steps = step + 1

    whole = trainer()
    train(whole, 0, 30)
    first = trainer()
    train(first, 0, 17)
    first.save_checkpoint("half", base_path=tmp_path)
    resumed = trainer()
    resumed.sae.load_weights_from_checkpoint(tmp_path / "half")
    resumed.load_trainer_state(tmp_path / "half")
    train(resumed, 17, 30)
    for a, b in zip(whole.sae.parameters(), resumed.sae.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_laid_out_by_feature_are_saved_as_saelens_has_them(activations, tmp_path):
    trainer = SubspaceSAETrainer(_cfg(5), _sae("topk"), _batches(activations))
    trainer.step(next(_batches(activations)))
    assert trainer.sae.W_enc.T.is_contiguous()
    trainer.sae.save_model(tmp_path / "on the way")
    sae = trainer.fit()
    assert sae.W_enc.is_contiguous()
    assert sae.W_enc.shape == (576, D_SAE)
    sae.save_inference_model(tmp_path)
    x = activations[:50]
    torch.testing.assert_close(SAE.load_from_disk(tmp_path)(x), sae(x), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_trained_is_refused_in_a_sentence():
    with pytest.raises(SaesubError, match=r"k must lie in 1\.\.1152"):
        SubspaceSAETrainer(_cfg(5), _sae("topk", k=D_SAE + 1), iter(()))
    with pytest.raises(SaesubError, match="k must lie in"):
        SubspaceSAETrainer(_cfg(5), _sae("batchtopk", k=0.0), iter(()))
    with pytest.raises(SaesubError, match="float32"):
        SubspaceSAETrainer(_cfg(5), _sae("topk", dtype="float16"), iter(()))
    with pytest.raises(SaesubError, match="Unknown backend 'torhc': did you mean 'torch'"):
        SubspaceSAETrainer(_cfg(5), _sae("topk"), iter(()), backend="torhc")  # pyright: ignore
    with pytest.raises(SaesubError, match="needs a GPU, and torch finds no"):
        SubspaceSAETrainer(_cfg(5), _sae("topk"), iter(()), backend="triton")


def test_an_optimizer_state_of_another_shape_is_refused(activations, tmp_path):
    trainer = SubspaceSAETrainer(_cfg(3), _sae("topk"), _batches(activations))
    trainer.fit()
    trainer.save_trainer_state(tmp_path)
    narrow = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=64, d_sae=D_SAE, k=K))
    with pytest.raises(SaesubError, match=r"d_in 576 \(here 64\)"):
        SubspaceSAETrainer(_cfg(3), narrow, iter(())).load_trainer_state(tmp_path)


def test_a_gpu_too_small_is_met_with_the_number_of_features_that_fit(monkeypatch):
    def run_out(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = SubspaceSAETrainer(_cfg(5), _sae("topk"), iter(()))
    monkeypatch.setattr(trainer, "_train_step", run_out)
    memory = SimpleNamespace(total_memory=10**10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    # 10 GB less one for the search and ten batches of 128 × 576 floats, at 23,060 bytes a feature
    expected = r"d_sae=1,152: .*, and in its 10 GB about 390,158 features fit .* free the GPU"
    with pytest.raises(SaesubError, match=expected):
        trainer.step(torch.zeros(BATCH, 576))
    memory.total_memory = 1_010_000_000
    with pytest.raises(SaesubError, match=r"about 305 features fit .* train fewer features"):
        trainer.step(torch.zeros(BATCH, 576))


def _searches_in_8_bits(monkeypatch) -> list:
    """What grows by one for every search that the compiled code makes in few bits."""
    searched, find = [], packed_encoder.PackedEncoder.search
    count = lambda *given: searched.append(1) or find(*given)  # noqa: E731
    monkeypatch.setattr(packed_encoder.PackedEncoder, "search", count)
    return searched


@needs_native
@pytest.mark.parametrize(
    ("backend", "row_steps", "searches"),
    [("auto", 3, 3), ("exact_search", 3, 0), ("torch", 0, 0), ("dense", 0, 0)],
)
def test_each_backend_takes_the_step_it_is_named_for(
    activations, monkeypatch, backend, row_steps, searches
):
    """All end alike, so a step that fell back in silence would not show in what is learnt."""
    taken, searched = [], _searches_in_8_bits(monkeypatch)

    def step(rows, *arguments, **settings):
        taken.append(rows)
        return row_step(rows, *arguments, **settings)

    monkeypatch.setattr("saesub.training.native_step.row_step", step)
    sae = _sae("topk", aux_loss_coefficient=0.0)
    SubspaceSAETrainer(_cfg(3), sae, _batches(activations), backend=backend).fit()
    assert (len(taken), len(searched)) == (row_steps, searches)


@needs_native
@pytest.mark.parametrize(("backend", "searches"), [("auto", 3), ("exact_search", 0), ("torch", 0)])
@pytest.mark.parametrize("why", ["a loss is added", "frozen"])
def test_a_step_that_autograd_takes_still_searches_by_the_backend(
    activations, monkeypatch, backend, searches, why
):
    searched = _searches_in_8_bits(monkeypatch)
    sae = _sae("topk", aux_loss_coefficient=0.0)
    sae.W_dec.requires_grad_(why != "frozen")
    mitigations = [GhostGradients()] if why == "a loss is added" else []
    given = {"backend": backend, "mitigations": mitigations}
    SubspaceSAETrainer(_cfg(3), sae, _batches(activations), **given).fit()
    assert len(searched) == searches


@needs_native
def test_auxk_through_the_8_bit_search_equals_saelens_own(activations, spectrum, monkeypatch):
    """Enough dead features for AuxK's own search (288 of each token) not to go by the product."""
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=4096, k=K))
    initialize_in_subspace(sae, spectrum, d_init=200)
    kept = []
    real = packed_encoder.can_search
    monkeypatch.setattr(packed_encoder, "can_search", lambda *a: kept.append(1) or real(*a))
    double = copy.deepcopy(sae).double()
    double.dtype = torch.float64
    lay_out_by_feature(sae)
    x, dead = activations[:200], torch.arange(4096) % 4 > 0
    optimizer = _GradientAsState(sae.parameters())
    ours = row_step(cpu.BACKEND, sae, optimizer, x, dead)
    assert len(kept) == 2  # the search of the step, and that of AuxK
    expected = double.training_forward_pass(TrainStepInput(x.double(), {}, dead, 0, False))
    expected.loss.backward()
    torch.nn.utils.clip_grad_norm_(double.parameters(), 1.0)
    for name, value in expected.losses.items():
        torch.testing.assert_close(ours.losses[name].double(), value, rtol=1e-5, atol=1e-9)
    for (name, a), b in zip(sae.named_parameters(), double.parameters(), strict=True):
        gradient = optimizer.state[a]["exp_avg"].double()
        assert (gradient - b.grad).norm() / b.grad.norm() < 1e-5, name


@pytest.mark.skipif(not int8_search.available(), reason="no AVX-512 VNNI here")
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_gradients_through_torchs_8_bit_product_are_within_1e_5_of_float64(
    activations, spectrum, monkeypatch, kind
):
    """The step's search and that of AuxK, which would take the whole product at this width."""
    monkeypatch.setattr(int8_search, "LEAST_FEATURES_PER_CANDIDATE", 4)
    monkeypatch.setattr(int8_search, "LEAST_TOKENS", 0)
    rounded, of = [], int8_search.Rounded.of
    monkeypatch.setattr(int8_search.Rounded, "of", lambda rows: rounded.append(1) or of(rows))
    sae = _sae(kind, d_sae=4096)
    _unequal_norms(sae, spectrum)
    double = copy.deepcopy(sae).double()
    double.dtype = torch.float64
    lay_out_by_feature(sae)
    x, dead = activations[:200], torch.arange(4096) % 4 > 0
    ours = autograd_pass(sae, x, dead)
    assert len(rounded) >= 4  # tokens and features, for the step and for AuxK
    expected = autograd_pass(double, x.double(), dead)
    for name, value in expected.losses.items():
        torch.testing.assert_close(ours.losses[name].double(), value, rtol=1e-5, atol=1e-9)
    mine = torch.autograd.grad(ours.loss, list(sae.parameters()))
    reference = torch.autograd.grad(expected.loss, list(double.parameters()))
    for a, b in zip(mine, reference, strict=True):
        assert (a.double() - b).norm() / b.norm() < 1e-5


@pytest.mark.parametrize(("backend", "searches"), [("auto", 3), ("torch", 3), ("exact_search", 0)])
def test_without_a_compiler_the_search_is_that_of_torch_unless_it_is_to_be_exact(
    activations, monkeypatch, backend, searches
):
    monkeypatch.setattr(cpu_library, "library", lambda: None)
    searched, find = [], int8_search.search
    monkeypatch.setattr(int8_search, "search", lambda *given: searched.append(1) or find(*given))
    sae = _sae("topk", aux_loss_coefficient=0.0)
    SubspaceSAETrainer(_cfg(3), sae, _batches(activations), backend=backend).fit()
    assert len(searched) == searches


@needs_native
def test_weights_replaced_or_frozen_on_the_way_are_trained_right(activations):
    """Frozen weights fall behind in step count, which a row step takes from one parameter."""
    weights = []
    for backend in ("auto", "torch"):
        sae = _sae("topk", aux_loss_coefficient=0.0)
        trainer = SubspaceSAETrainer(_cfg(30), sae, iter(()), backend=backend)
        for step, x in zip(range(30), _batches(activations), strict=False):
            sae.W_dec.requires_grad_(not 5 <= step < 15)
            if step == 3:
                sae.W_enc.data = sae.W_enc.data.contiguous()
                sae.W_dec.data = sae.W_dec.data.T.contiguous().T
            trainer.step(x)
            trainer.n_training_steps = step + 1
        weights.append(sae.W_dec.detach())
    assert (weights[0] - weights[1]).norm() / weights[1].norm() < 1e-3
