"""Transcoders trained on a real model's MLP: SAELens' loss, SAELens' files, resumable, judged."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from stopping import StoppedError, stopping

from saesub.activations.collect import harvest
from saesub.activations.spectrum import Spectrum
from saesub.activations.store import ActivationStore
from saesub.errors import SaesubError
from saesub.evaluation.reconstruction import reconstruction
from saesub.extras.transcoders import (
    TrainingSkipTranscoder,
    TrainingSkipTranscoderConfig,
    TrainingTranscoder,
    TrainingTranscoderConfig,
    paired_batches,
    transcoder_reconstruction,
)
from saesub.init.biases import center_biases
from saesub.init.subspace import initialize_in_subspace
from saesub.topk.encode import times_fired
from saesub.training.comparison import train_together
from saesub.training.mitigations import GhostGradients, KAnnealing, Resampling
from saesub.training.trainer import SubspaceSAETrainer

READS, WRITES = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
D, D_SAE, BATCH, N = 576, 300, 64, 1200
KINDS = {
    "transcoder": (TrainingTranscoder, TrainingTranscoderConfig, Transcoder),
    "skip_transcoder": (TrainingSkipTranscoder, TrainingSkipTranscoderConfig, SkipTranscoder),
}
pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def stores(model, corpus, tmp_path_factory) -> tuple[ActivationStore, ActivationStore]:
    folder = tmp_path_factory.mktemp("stores")
    found = harvest(model, corpus, [READS, WRITES], folder, n_tokens=N, progress=False)
    return found[READS], found[WRITES]


@pytest.fixture(scope="module")
def spectra(stores) -> tuple[Spectrum, Spectrum]:
    reads, writes = (Spectrum.from_activations(s.rows(0, N)) for s in stores)
    return reads, writes


def _transcoder(kind: str = "transcoder", **settings):
    torch.manual_seed(0)
    sae_class, cfg_class, _ = KINDS[kind]
    return sae_class(cfg_class(d_in=D, d_out=D, d_sae=D_SAE, **settings))


def _cfg(steps: int) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=5,
    )


def _batches(stores, start_step: int = 0):
    for batch in paired_batches(*stores, BATCH, seed=0, start_step=start_step):
        yield from batch.values()


def _step_input(sae_in: torch.Tensor, l1: float) -> TrainStepInput:
    return TrainStepInput(sae_in, {"l1": l1}, None, n_training_steps=0, is_logging_step=False)


def test_of_a_target_that_is_the_input_it_is_saelens_standard_sae(stores):
    x = stores[0].rows(0, 50)
    sae = StandardTrainingSAE(
        StandardTrainingSAEConfig(
            d_in=D, d_sae=D_SAE, apply_b_dec_to_input=False, decoder_init_norm=None
        )
    )
    transcoder = _transcoder()
    transcoder.load_state_dict(sae.state_dict())
    expected = sae.training_forward_pass(_step_input(x, 2.5))
    got = transcoder.training_forward_pass(_step_input(torch.cat([x, x], 1), 2.5))
    assert got.losses["l1_loss"] > 0
    for name, value in expected.losses.items():
        torch.testing.assert_close(got.losses[name], value)
    expected.loss.backward()
    got.loss.backward()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(transcoder.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_learns_the_target_and_saves_a_plain_saelens_transcoder(
    kind, stores, spectra, tmp_path
):
    transcoder = _transcoder(kind, l1_coefficient=0.1)
    initialize_in_subspace(transcoder, spectra[1], input_spectrum=spectra[0])
    x, y = (s.rows(0, 500) for s in stores)
    before = transcoder_reconstruction(transcoder, [(x, y)])
    trainer = SubspaceSAETrainer(_cfg(60), transcoder, _batches(stores))
    assert trainer.fit() is transcoder
    after = transcoder_reconstruction(transcoder, [(x, y)])
    assert after.fvu < 0.9 * min(before.fvu, 1.0)
    if kind == "skip_transcoder":
        assert transcoder.W_skip.norm() > 0
    transcoder.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is KINDS[kind][2]
    torch.testing.assert_close(loaded(x), transcoder(x))
    assert loaded.cfg.metadata.optimizer == "sparse_adam"
    assert transcoder_reconstruction(loaded, [(x, y)]).fvu == pytest.approx(after.fvu, rel=1e-4)


def test_a_stronger_penalty_leaves_fewer_features(stores, spectra):
    l0 = []
    for l1 in (0.1, 10.0):
        transcoder = _transcoder(l1_coefficient=l1)
        center_biases(transcoder, spectra[1], input_spectrum=spectra[0])
        SubspaceSAETrainer(_cfg(30), transcoder, _batches(stores)).fit()
        pairs = [tuple(s.rows(0, 300) for s in stores)]
        l0.append(transcoder_reconstruction(transcoder, pairs).l0)
    assert 2 * l0[1] < l0[0]


def test_the_dead_are_counted_in_tokens(stores):
    transcoder = _transcoder(l1_coefficient=20.0)
    trainer = SubspaceSAETrainer(
        _cfg(30), transcoder, _batches(stores), optimizer="adam", dead_window_tokens=5 * BATCH
    )
    fired = []
    for step, batch in zip(range(30), _batches(stores), strict=False):
        with torch.no_grad():
            fired.append(times_fired(transcoder.encode(batch[:, :D])) > 0)
        trainer.step(batch)
        trainer.n_training_steps = step + 1
    expected = ~torch.stack(fired[-5:]).any(0)
    assert torch.equal(trainer.dead_neurons, expected)
    assert 0 < expected.sum() < D_SAE


def test_an_interrupted_run_of_conditions_ends_with_the_same_weights(stores, spectra, tmp_path):
    def conditions():
        made = {}
        for name, kind in (("random", "transcoder"), ("asi", "skip_transcoder")):
            transcoder = _transcoder(kind, l1_coefficient=3.0, l1_warm_up_steps=10)
            initialize_in_subspace(transcoder, spectra[1], input_spectrum=spectra[0])
            made[name] = SubspaceSAETrainer(_cfg(16), transcoder, iter(()))
        return made

    def batches(start, stop_at=None):
        return stopping(paired_batches(*stores, BATCH, seed=3, start_step=start), start, stop_at)

    whole, resumed = conditions(), conditions()
    history = train_together(whole, batches)
    with pytest.raises(StoppedError):
        train_together(conditions(), lambda start: batches(start, 12), folder=tmp_path)
    starts = []
    again = train_together(resumed, lambda s: (starts.append(s), batches(s))[1], folder=tmp_path)
    assert starts[-1] > 0
    assert again.equals(history)
    for name in whole:
        for a, b in zip(whole[name].sae.parameters(), resumed[name].sae.parameters(), strict=True):
            assert torch.equal(a, b)


def test_batches_hold_the_same_tokens_side_by_side(stores):
    (key, first), *_ = next(paired_batches(*stores, BATCH, seed=1)).items()
    assert key == f"{READS} -> {WRITES}"
    alone = [next(store.batches(BATCH, seed=1)) for store in stores]
    assert torch.equal(first, torch.cat(alone, 1))
    second = next(itertools.islice(paired_batches(*stores, BATCH, seed=1), 1, None))
    resumed = next(paired_batches(*stores, BATCH, seed=1, start_step=1))
    assert torch.equal(second[key], resumed[key])
    assert not torch.equal(second[key], first)


@pytest.mark.parametrize("kind", [*KINDS, "jumprelu_transcoder"])
def test_fvu_and_l0_of_a_target_against_brute_force(kind):
    torch.manual_seed(0)
    sizes = {"d_in": 12, "d_out": 7, "d_sae": 30}
    if kind in KINDS:
        sae_class, cfg_class, _ = KINDS[kind]
        transcoder = sae_class(cfg_class(**sizes))
    else:
        cfg = JumpReLUTranscoderConfig(**sizes, apply_b_dec_to_input=False)
        transcoder = JumpReLUTranscoder(cfg)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    x, y = torch.randn(300, 12), torch.randn(300, 7) + 50
    got = transcoder_reconstruction(transcoder, zip(x.split(77), y.split(77), strict=True))
    predicted = transcoder(x).detach().double()
    exact = y.double()
    expected = (exact - predicted).square().sum() / (exact - exact.mean(0)).square().sum()
    assert got.fvu == pytest.approx(expected.item(), rel=1e-5)
    assert got.l0 == pytest.approx((transcoder.encode(x) != 0).sum().item() / 300)
    assert got.n_tokens == 300


def test_what_does_not_fit_is_refused(stores):
    reads, writes = stores
    plain = Transcoder(TranscoderConfig(d_in=D, d_sae=8, d_out=D, apply_b_dec_to_input=False))
    with pytest.raises(SaesubError, match=r"Transcoder has no loss .* TrainingTranscoder"):
        SubspaceSAETrainer(_cfg(1), plain, iter(()))
    for scaled in ("expected_average_only_in", "covariance_whitening"):
        with pytest.raises(SaesubError, match=f"normalize_activations='{scaled}'"):
            _transcoder(normalize_activations=scaled)
    for mitigation, message in (
        (GhostGradients(), "batch holds x and y"),
        (Resampling(every_tokens=BATCH), "batch holds x and y"),
        (KAnnealing(k_start=8, share=0.5), "needs an SAE with a k"),
    ):
        with pytest.raises(SaesubError, match=message):
            SubspaceSAETrainer(_cfg(9), _transcoder(), iter(()), mitigations=[mitigation])
    with pytest.raises(SaesubError, match="different lengths"):
        next(paired_batches(reads, writes.split(100)[0], BATCH, seed=0))
    with pytest.raises(SaesubError, match="different text or settings"):
        next(paired_batches(reads, replace(writes, settings={"corpus": "other"}), BATCH, seed=0))
    with pytest.raises(SaesubError, match="autoencoders"):
        reconstruction(_transcoder(), [reads.rows(0, 10)])


def test_bad_batches_are_refused_before_any_weight_moves(stores):
    transcoder = _transcoder()
    trainer = SubspaceSAETrainer(_cfg(5), transcoder, _batches(stores))
    before = copy.deepcopy(transcoder.state_dict())
    batch = next(_batches(stores))
    with pytest.raises(SaesubError, match="side by side"):
        trainer.step(batch[:, :D])
    for column in (3, D + 3):
        bad = batch.clone()
        bad[7, column] = float("nan")
        with pytest.raises(SaesubError, match=f"batch 0 .* first nan in row 7, column {column}"):
            trainer.step(bad)
    assert all(torch.equal(v, before[k]) for k, v in transcoder.state_dict().items())


def test_pairs_that_do_not_belong_together_are_refused(stores):
    x, y = (s.rows(0, 20) for s in stores)
    for pair in ((x, y[:10]), (x[:, :9], y), (x, y[:, :9])):
        with pytest.raises(SaesubError, match="pass both of the same tokens"):
            transcoder_reconstruction(_transcoder(), [pair])
    with pytest.raises(SaesubError, match="none were given"):
        transcoder_reconstruction(_transcoder(), [])
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=8))
    with pytest.raises(SaesubError, match="predicts what it reads"):
        transcoder_reconstruction(sae, [(x, y)])  # pyright: ignore
