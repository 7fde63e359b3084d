"""Each mitigation against its definition, on a real model's activations, and all together."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatchingPursuitTrainingSAE,
    MatchingPursuitTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from stopping import StoppedError, stopping

from saesub.activations.forward_pass import ReadSoFar
from saesub.activations.spectrum import Spectrum
from saesub.activations.store import ActivationStore
from saesub.activations.store_file import StoreWriter
from saesub.errors import SaesubError
from saesub.init.biases import center_biases
from saesub.init.encoder_scale import scale_encoder
from saesub.init.subspace import initialize_in_subspace
from saesub.topk import cpu_library
from saesub.topk.encode import times_fired
from saesub.training.comparison import joint_batches, train_together
from saesub.training.mitigations import GhostGradients, KAnnealing, Resampling
from saesub.training.mitigations.mitigation import Mitigation
from saesub.training.trainer import SubspaceSAETrainer

HOOK = "blocks.4.hook_attn_out"
D_SAE, K, BATCH = 1152, 8, 128
WINDOW = 6 * BATCH
pytestmark = pytest.mark.model
BACKENDS = [
    pytest.param(
        "auto",
        marks=pytest.mark.skipif(cpu_library.library() is None, reason="no C++ compiler here"),
    ),
    "torch",
    "dense",
]


@pytest.fixture(scope="module")
def spectrum(activations) -> Spectrum:
    return Spectrum.from_activations(activations)


@pytest.fixture(scope="module")
def store(activations, tmp_path_factory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("store")
    with StoreWriter(folder, HOOK, torch.float32, {}) as writer:
        writer.write(activations)
        writer.finish(len(activations), ReadSoFar(1, {}, 1.0))
    return ActivationStore.open(folder, HOOK)


def _cfg(steps: int, norm_batches: int = 16) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=5,
        n_batches_for_norm_estimate=norm_batches,
    )


def _topk(seed: int = 0, **settings) -> TopKTrainingSAE:
    torch.manual_seed(seed)
    settings = {"aux_loss_coefficient": 0.0, "k": K} | settings
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=D_SAE, **settings))


def _batchtopk(**settings) -> BatchTopKTrainingSAE:
    torch.manual_seed(0)
    settings = {"aux_loss_coefficient": 0.0, "k": K} | settings
    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=576, d_sae=D_SAE, **settings))


def _relu(**settings) -> StandardTrainingSAE:
    torch.manual_seed(0)
    return StandardTrainingSAE(StandardTrainingSAEConfig(d_in=576, d_sae=D_SAE, **settings))


def _gated() -> GatedTrainingSAE:
    return GatedTrainingSAE(GatedTrainingSAEConfig(d_in=576, d_sae=D_SAE))


def _pursuit() -> MatchingPursuitTrainingSAE:
    return MatchingPursuitTrainingSAE(MatchingPursuitTrainingSAEConfig(d_in=576, d_sae=D_SAE))


def _trainer(sae, steps: int, *given: Mitigation, **settings) -> SubspaceSAETrainer:
    settings = {"dead_window_tokens": WINDOW} | settings
    return SubspaceSAETrainer(_cfg(steps), sae, iter(()), mitigations=given, **settings)


def _take(trainer: SubspaceSAETrainer, store: ActivationStore, n: int) -> list:
    outputs = []
    start = trainer.n_training_samples // BATCH
    batches = store.batches(BATCH, seed=0, start_step=start, stop=start + n)
    for x in batches:
        outputs.append(trainer.step(x))
        trainer.n_training_steps += 1
    return outputs


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_resampled_features_fire_again(store, activations, backend, optimizer):
    sae = _topk()
    mitigation = Resampling(at_tokens=(30 * BATCH,), encoder_norm=1.0, n_batches=10)
    settings = {"backend": backend, "optimizer": optimizer, "dead_window_tokens": 20 * BATCH}
    trainer = _trainer(sae, 50, mitigation, **settings)
    _take(trainer, store, 29)
    dead = trainer.dead_neurons
    never = times_fired(sae.encode(activations)) == 0
    dead_for_good = dead & never
    assert dead_for_good.sum() > 50
    before = trainer.act_freq_scores.clone()
    _take(trainer, store, 10)  # all of one resampling
    assert not (trainer.tokens_since_fired > 29 * BATCH).any()
    fire = times_fired(sae.encode(activations)) > 0
    assert fire[dead_for_good].float().mean() > 0.9
    _take(trainer, store, 6)
    # Within a few hundred tokens of training, too, where the rest of the dictionary competes.
    fired = trainer.act_freq_scores > before
    assert fired[dead_for_good].float().mean() > 0.4


def _resampled(store, sae, **settings):
    """A trainer, what it was before resampling all its dead features at once, and the step."""
    mitigation = Resampling(at_tokens=(12 * BATCH,), n_batches=1, **settings)
    twin = _trainer(copy.deepcopy(sae), 40)
    trainer = _trainer(sae, 40, mitigation)
    _take(twin, store, 12)
    (*_, output) = _take(trainer, store, 12)
    return trainer, twin, output


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_resampling_writes_what_the_source_says(store, spectrum, apply_b_dec_to_input):
    sae = _topk(apply_b_dec_to_input=apply_b_dec_to_input)
    center_biases(sae, spectrum)
    sae.W_enc.data *= 1.7
    trainer, twin, output = _resampled(store, sae)
    dead, before = twin.dead_neurons, twin.sae
    rows = (dead & ~trainer.dead_neurons).nonzero().squeeze(1)
    assert 50 < len(rows) <= BATCH
    for name, parameter in sae.named_parameters():  # the living are left alone
        others = torch.ones(D_SAE, dtype=torch.bool)
        others[rows] = False
        axis = {"W_enc": 1, "W_dec": 0, "b_enc": 0}.get(name)
        old = dict(before.named_parameters())[name]
        if axis is None:
            assert torch.equal(parameter, old)
        else:
            keep = others.nonzero().squeeze(1)
            assert torch.equal(parameter.index_select(axis, keep), old.index_select(axis, keep))
    inputs = torch.nn.functional.normalize(output.sae_in - sae.b_dec, dim=-1)
    encoder = before.W_enc.norm(dim=0)[~dead].mean()
    decoder = before.W_dec.norm(dim=1)[~dead].mean()
    cosines = torch.nn.functional.normalize(sae.W_dec[rows], dim=-1) @ inputs.T
    best = cosines.max(1)
    torch.testing.assert_close(best.values, torch.ones(len(rows)))
    assert len(best.indices.unique()) == len(rows)
    torch.testing.assert_close(sae.W_dec[rows], inputs[best.indices] * decoder)
    torch.testing.assert_close(sae.W_enc.T[rows], inputs[best.indices] * 0.2 * encoder)
    of_b_dec = sae.b_enc[rows] + (0 if apply_b_dec_to_input else sae.b_dec @ sae.W_enc[:, rows])
    torch.testing.assert_close(of_b_dec, torch.zeros(len(rows)), atol=1e-6, rtol=0)
    assert not trainer.tokens_since_fired[rows].any()
    for parameter, axis in [(sae.W_enc, 1), (sae.W_dec, 0), (sae.b_enc, 0)]:
        kept = trainer.optimizer.state[parameter]
        assert not kept["exp_avg"].index_select(axis, rows).any()
        assert not kept["exp_avg_sq"].index_select(axis, rows).any()
        assert (kept["moved"][rows] == int(kept["step"])).all()
        assert kept["exp_avg_sq"].any()


def test_inputs_are_drawn_by_their_squared_loss(activations):
    from saesub.training.mitigations.resampling import _draw_by_squared_loss

    class Output:
        sae_in = torch.zeros(4, 2)
        sae_out = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [2.0, 0.0]])

    import numpy as np

    rng, every = np.random.default_rng(0), torch.ones(4, dtype=torch.bool)
    drawn = [int(_draw_by_squared_loss(Output, every, 1, rng)) for _ in range(4000)]
    share = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(share, torch.tensor([1, 4, 0, 16]) / 21, atol=0.02, rtol=0)
    assert sorted(_draw_by_squared_loss(Output, every, 4, rng).tolist()) == [0, 1, 3]
    every[0] = False
    assert sorted(_draw_by_squared_loss(Output, every, 4, rng).tolist()) == [1, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_without_a_loss_are_not_drawn_whatever_the_others_lose(dtype):
    from saesub.training.mitigations.resampling import _draw_by_squared_loss

    class Output:
        sae_in = torch.zeros(5, 2, dtype=dtype)
        sae_out = torch.zeros(5, 2, dtype=dtype)

    import numpy as np

    rng, every = np.random.default_rng(0), torch.ones(5, dtype=torch.bool)
    assert _draw_by_squared_loss(Output, every, 5, rng).tolist() == []
    limits = torch.finfo(dtype)
    Output.sae_out[1] = limits.smallest_normal
    assert len(_draw_by_squared_loss(Output, every, 5, rng)) == (dtype != torch.float64)
    Output.sae_out[2], Output.sae_in[2] = limits.max / 4, -limits.max / 4
    if dtype == torch.float64:  # its own largest values have no square
        Output.sae_out[2], Output.sae_in[2] = 1e150, 0
    found = _draw_by_squared_loss(Output, every, 5, rng)
    assert 2 in found.tolist()
    assert not {0, 3, 4} & {*found.tolist()}
    for bad in (torch.inf, torch.nan):
        Output.sae_out[3] = bad
        with pytest.raises(SaesubError, match="NaN or infinite for some"):
            _draw_by_squared_loss(Output, every, 5, rng)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("lossless", ["all", "some", "those without a direction"])
def test_no_feature_is_made_of_an_input_without_loss_or_direction(lossless, apply_b_dec_to_input):
    sae = _topk(apply_b_dec_to_input=apply_b_dec_to_input)
    trainer = _trainer(sae, 40, Resampling(at_tokens=(12 * BATCH,), n_batches=1))
    trainer.tokens_since_fired[:] = 10**9
    trainer.n_training_samples = 12 * BATCH
    x = torch.randn(BATCH, 576, generator=torch.Generator().manual_seed(0))
    lost = torch.zeros(BATCH, 1)
    if lossless != "all":
        lost[:40] = 1.0
    if lossless == "those without a direction":
        x[40:], lost[40:] = sae.b_dec.detach(), 1.0
    before = [sae.W_dec.detach().clone(), sae.W_enc.detach().clone()]
    trainer.mitigations[0].after_step(trainer, SimpleNamespace(sae_in=x, sae_out=x + lost))
    changed = (sae.W_dec != before[0]).any(1)
    assert changed.sum() == (0 if lossless == "all" else 40)
    assert torch.equal((sae.W_enc != before[1]).any(0), changed)
    assert torch.equal(trainer.tokens_since_fired == 0, changed)
    assert (sae.W_dec.norm(dim=1) > 0).all()
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: _relu(l1_coefficient=3.0),
        _gated,
        lambda: JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(d_in=576, d_sae=D_SAE)),
        _batchtopk,
        lambda: _relu(normalize_activations="layer_norm"),
    ],
)
def test_resampling_takes_other_architectures(store, activations, make):
    sae = make()
    mitigation = Resampling(at_tokens=(2 * BATCH,), encoder_norm=1.0, n_batches=1)
    trainer = _trainer(sae, 4, mitigation, dead_window_tokens=BATCH)
    with torch.no_grad():
        for name in ("b_enc", "b_gate"):
            if hasattr(sae, name):
                getattr(sae, name)[:100] = -1e4  # certainly dead
        if hasattr(sae, "threshold"):
            sae.threshold[:100] = 1e4
    _take(trainer, store, 1)
    assert trainer.dead_neurons[:100].all()
    _take(trainer, store, 1)
    rows = (trainer.tokens_since_fired[:100] == 0).nonzero().squeeze(1)
    assert len(rows) >= 1
    with torch.no_grad():
        assert (times_fired(sae.encode(activations))[rows] > 0).float().mean() > 0.9


def test_resampling_falls_where_it_was_asked_for():
    assert Resampling(every_tokens=1000, until=0.5).times(5000) == (1000, 2000)
    assert Resampling(at_tokens=[900, 300]).times(5000) == (300, 900)
    trainer = _trainer(_topk(), 40, Resampling(every_tokens=10 * BATCH, n_batches=3))
    when = {}
    for step in range(1, 41):
        trainer.tokens_before, trainer.n_training_samples = (step - 1) * BATCH, step * BATCH
        when[step] = trainer.mitigations[0]._parts(trainer)
    assert {step: (done, now) for step, (done, now) in when.items() if now > done} == {
        10: (0, 1), 11: (1, 2), 12: (2, 3), 20: (0, 1), 21: (1, 2), 22: (2, 3)
    }  # fmt: skip


def _ghost_by_definition(sae, x, dead):
    """The loss in plain float64 autograd, written from the source's five steps."""
    W_enc, b_enc, W_dec, b_dec = (
        p.detach().double().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    )
    x = x.double()
    with torch.no_grad():
        twin = copy.deepcopy(sae).double()
        twin.dtype = torch.float64
        residual = x - twin(x)
        mse = residual.square().sum(-1).mean()
    centred = x - b_dec.detach() if sae.cfg.apply_b_dec_to_input else x
    acts = torch.exp(centred @ W_enc + b_enc) * dead
    out = acts @ W_dec
    with torch.no_grad():
        scale = residual.norm(dim=-1, keepdim=True) / (2 * out.norm(dim=-1, keepdim=True))
    error = (scale * out - residual).square().sum(-1).mean()
    loss = error * (mse / error.detach())
    loss.backward()
    return loss.detach(), W_enc.grad, b_enc.grad, W_dec.grad


@pytest.mark.parametrize("make", [_topk, lambda: _topk(apply_b_dec_to_input=False), _relu])
def test_ghost_gradients_equal_their_definition_and_reach_the_dead_alone(
    activations, spectrum, make, monkeypatch
):
    sae = make()
    center_biases(sae, spectrum)
    sae.W_enc.data *= 20.0  # pre-activations of some size
    trainer = _trainer(sae, 40, GhostGradients(), backend="torch")
    dead = torch.arange(D_SAE) % 7 == 0
    trainer.tokens_since_fired[dead] = WINDOW
    monkeypatch.setattr(
        "saesub.training.mitigations.ghost_gradients._GHOST_ENTRIES", 70 * int(dead.sum())
    )  # blocks, the last short
    x = activations[:200]
    output = sae.training_forward_pass(TrainStepInput(x, {"l1": 0.0}, None, 0, False))
    loss = GhostGradients().extra_loss(trainer, output)
    loss.backward()
    expected, *gradients = _ghost_by_definition(sae, x, dead)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.detach(), output.losses["mse_loss"].detach())
    assert sae.b_dec.grad is None
    for parameter, gradient, axis in zip(
        (sae.W_enc, sae.b_enc, sae.W_dec), gradients, (1, 0, 0), strict=True
    ):
        got = parameter.grad.double()
        assert (got - gradient).norm() < 1e-5 * gradient.norm()
        reached = got.movedim(axis, 0).reshape(D_SAE, -1).abs().amax(1) > 0
        assert torch.equal(reached, dead)


def test_ghost_gradients_of_huge_pre_activations_are_finite(activations):
    sae = _topk()
    sae.W_enc.data *= 1e5  # exp of them overflows
    trainer = _trainer(sae, 40, GhostGradients())
    trainer.tokens_since_fired[:50] = WINDOW
    x = activations[:100]
    assert not (x @ sae.W_enc[:, :50]).exp().isfinite().all()
    output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    GhostGradients().extra_loss(trainer, output).backward()
    assert sae.W_enc.grad.isfinite().all()
    assert sae.W_dec.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_ghost_gradients_enter_the_training_step(store, backend):
    plain = _trainer(_topk(), 40, backend=backend)
    ghost = _trainer(_topk(), 40, GhostGradients(), backend=backend)
    for a, b in zip(_take(plain, store, 6), _take(ghost, store, 6), strict=True):
        assert b.losses["ghost_gradient_loss"] == 0  # nothing is dead yet
        torch.testing.assert_close(a.loss, b.loss)
    assert plain.dead_neurons.any()
    torch.testing.assert_close(
        plain.n_forward_passes_since_fired, ghost.n_forward_passes_since_fired
    )
    torch.testing.assert_close(plain.act_freq_scores, ghost.act_freq_scores)
    torch.testing.assert_close(plain.sae.W_dec, ghost.sae.W_dec)
    (output,) = _take(ghost, store, 1)
    torch.testing.assert_close(output.losses["ghost_gradient_loss"], output.losses["mse_loss"])
    torch.testing.assert_close(output.loss, 2 * output.losses["mse_loss"])


def test_ghost_gradients_save_features(store, activations):
    dead = {}
    for name, given in {"none": (), "ghost": (GhostGradients(),)}.items():
        trainer = _trainer(_topk(), 60, *given)
        _take(trainer, store, 60)
        dead[name] = (times_fired(trainer.sae.encode(activations)) == 0).float().mean().item()
    assert dead["ghost"] < dead["none"] - 0.1, dead


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [_topk, lambda: _batchtopk(k=8.0)])
def test_k_falls_as_stated_and_both_paths_follow_it(store, make, backend, tmp_path):
    sae, plain = make(), make()
    trainer = _trainer(sae, 12, KAnnealing(k_start=29, share=0.5), backend=backend)
    expected = [29, 25.5, 22, 18.5, 15, 11.5, 8, 8]
    if isinstance(make().cfg.k, int):
        expected = [29, 26, 22, 18, 15, 12, 8, 8]
    for step, k in enumerate(expected):
        (output,) = _take(trainer, store, 1)
        if backend == "dense":
            n_active = int((output.feature_acts != 0).sum())
        else:
            output.dense_when_read = False
            n_active = len(output.feature_acts.values())
        assert n_active == int(k * BATCH), step
        assert sae.cfg.k == sae.activation_fn.k == 8
    sae.save_model(tmp_path)
    assert type(sae).from_dict(sae.cfg.to_dict()).cfg.k == plain.cfg.k
    x = store.rows(0, 64)
    assert int((sae.encode(x) != 0).sum()) <= 8 * 64


def test_k_is_restored_where_a_step_fails(store):
    sae = _topk()
    trainer = _trainer(sae, 12, KAnnealing(k_start=64, share=1.0), backend="dense")
    trainer.n_training_samples = BATCH
    seen = []

    def fail(module, args):
        seen.append((sae.cfg.k, sae.activation_fn.k))
        raise StoppedError

    sae.activation_fn.register_forward_pre_hook(fail)
    with pytest.raises(StoppedError):
        trainer.step(store.rows(0, BATCH))
    assert seen == [(59, 59)]
    assert sae.cfg.k == sae.activation_fn.k == K


def test_annealing_with_share_one_still_ends_at_the_own_k(store, tmp_path):
    sae = _topk()
    trainer = SubspaceSAETrainer(
        _cfg(4), sae, store.batches(BATCH, seed=0), mitigations=[KAnnealing(64, 1.0)]
    )
    trainer.fit()
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.k == K
    assert loaded.cfg.metadata.mitigations == ["KAnnealing(k_start=64, share=1.0)"]
    assert int((loaded.encode(store.rows(0, 64)) != 0).sum()) == K * 64


def _conditions(spectrum) -> dict[str, SubspaceSAETrainer]:
    """Every mitigation at once on ASI, and the settings of SAELens that are mitigations too."""
    conditions = {}
    trained = {
        "all": (KAnnealing(24, 0.5), Resampling(every_tokens=9 * BATCH, n_batches=4, until=1.0)),
        "ghost": (GhostGradients(), Resampling(at_tokens=(13 * BATCH,), n_batches=6)),
        "auxk": (GhostGradients(), KAnnealing(16, 0.25)),
        "whitened": (Resampling(at_tokens=(13 * BATCH,), n_batches=6), GhostGradients()),
    }
    for name, given in trained.items():
        settings = {"normalize_activations": "expected_average_only_in"}
        if name == "auxk":
            settings["aux_loss_coefficient"] = 1 / 32
        if name == "whitened":
            settings["normalize_activations"] = "covariance_whitening"
        sae = _topk(seed=1, **settings)
        optimizer = "adam" if name == "all" else "sparse_adam"
        if name != "whitened":
            initialize_in_subspace(sae, spectrum, d_init=40)
            scale_encoder(sae, 2.0)
        conditions[name] = SubspaceSAETrainer(
            _cfg(24),
            sae,
            iter(()),
            optimizer=optimizer,
            dead_window_tokens=WINDOW,
            mitigations=given,
        )
    return conditions


def test_all_mitigations_combine_and_a_killed_run_ends_the_same(store, spectrum, tmp_path):
    """Stopped in the middle of a resampling, after some of the dead were resampled."""

    def batches(start, stop_at=None):
        stream = joint_batches({HOOK: store}, BATCH, seed=3, start_step=start)
        return stopping(stream, start, stop_at)

    whole = _conditions(spectrum)
    history = train_together(whole, batches)
    conditions = _conditions(spectrum)
    with pytest.raises(StoppedError):
        train_together(conditions, lambda s: batches(s, stop_at=17), folder=tmp_path)
    assert "resampling.alive_norms" in conditions["ghost"].mitigation_state
    starts = []
    resumed = _conditions(spectrum)
    again = train_together(resumed, lambda s: (starts.append(s), batches(s))[1], folder=tmp_path)
    assert 13 < starts[-1] < 17
    finished = _conditions(spectrum)
    assert train_together(finished, batches, folder=tmp_path).equals(history)
    assert again.equals(history)
    x = store.rows(0, 500)
    for name, trainer in whole.items():
        for other in (resumed[name], finished[name]):
            for a, b in zip(trainer.sae.parameters(), other.sae.parameters(), strict=True):
                assert torch.equal(a, b), name
            assert torch.equal(trainer.tokens_since_fired, other.tokens_since_fired)
            assert torch.equal(trainer.sae(x), other.sae(x)), name
        error, variance = (trainer.sae(x) - x).square().sum(), (x - x.mean(0)).square().sum()
        assert error < (1.1 if name == "whitened" else 0.9) * variance, name


def test_whitening_is_estimated_from_the_first_batches_and_folded_into_the_weights(
    store, activations, tmp_path
):
    def make():
        sae = _topk(normalize_activations="covariance_whitening")
        return {"white": SubspaceSAETrainer(_cfg(30, norm_batches=30), sae, iter(()))}

    def batches(start):
        return joint_batches({HOOK: store}, BATCH, seed=0, start_step=start)

    conditions, again = make(), make()
    history = train_together(conditions, batches, folder=tmp_path)
    assert 400 < history.mse.iloc[0] < 700  # 576 directions of unit variance
    assert history.mse.iloc[-1] < 0.97 * history.mse.iloc[0]
    sae, x = conditions["white"].sae, activations
    assert sae.cfg.normalize_activations == "none"
    assert (sae(x) - x).square().sum() < (x - x.mean(0)).square().sum()
    train_together(
        again, batches, folder=tmp_path
    )  # finished: loads weights that are folded already
    assert torch.equal(again["white"].sae(x), sae(x))
    assert again["white"].sae.cfg.to_dict() == sae.cfg.to_dict() | {
        "metadata": again["white"].sae.cfg.to_dict()["metadata"]
    }


def test_conditions_of_other_mitigations_are_other_conditions(store, spectrum, tmp_path):
    def batches(start):
        return joint_batches({HOOK: store}, BATCH, seed=0, start_step=start)

    def make(*given):
        return {"a": _trainer(_topk(), 8, *given)}

    train_together(make(KAnnealing(16, 0.5)), batches, folder=tmp_path)
    train_together(make(KAnnealing(16, 0.5)), batches, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    train_together(make(KAnnealing(16, 0.6)), batches, folder=tmp_path)
    train_together(make(), batches, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@dataclass(frozen=True)
class _Unknown:
    pass


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (_topk, [KAnnealing(16, 0.5), KAnnealing(32, 0.5)], "Two mitigations of one kind"),
        (
            _topk,
            [Resampling(at_tokens=(2000,)), Resampling(every_tokens=1000)],
            "Two mitigations of one kind",
        ),
        (_topk, GhostGradients(), "not a sequence of mitigations"),
        (_topk, [GhostGradients], "not a sequence of mitigations"),
        (_topk, [_Unknown()], "not a sequence of mitigations"),
        (_relu, [KAnnealing(16, 0.5)], "needs an SAE with a k, which 'standard' has not"),
        (_topk, [KAnnealing(K - 1, 0.5)], "k_start=7 must lie in 8..1152"),
        (_topk, [KAnnealing(D_SAE + 1, 0.5)], "must lie in 8..1152"),
        (_topk, [KAnnealing(8.5, 0.5)], "whole number"),
        (_pursuit, [Resampling(at_tokens=(2000,))], "has no W_enc"),
        (_pursuit, [GhostGradients()], "has no W_enc and no b_enc"),
        (_gated, [GhostGradients()], "has no b_enc"),
        (
            lambda: _topk(normalize_activations="layer_norm"),
            [GhostGradients()],
            "different spaces",
        ),
        (_topk, [Resampling(at_tokens=(10**6,))], "would never resample"),
        (_topk, [Resampling(every_tokens=10**6)], "would never resample"),
        (_topk, [Resampling(at_tokens=(100,), n_batches=1)], "would never resample"),
        (_topk, [Resampling(at_tokens=(2000,))], "longer than the dead window"),
        (
            _topk,
            [Resampling(at_tokens=(2000, 2100), n_batches=2)],
            "before the last resampling is over",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, given, message):
    with pytest.raises(SaesubError, match=message):
        SubspaceSAETrainer(_cfg(40), make(), iter(()), mitigations=given, dead_window_tokens=WINDOW)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resampling(), "not neither"),
        (lambda: Resampling(every_tokens=5, at_tokens=(5,)), "not both"),
        (lambda: Resampling(every_tokens=0), "at least 1, not 0"),
        (lambda: Resampling(at_tokens=(5,), encoder_norm=0), "out of range"),
        (lambda: Resampling(every_tokens=5, until=1.5), "out of range"),
        (lambda: KAnnealing(16, 0.0), r"must lie in \(0, 1\]"),
        (lambda: KAnnealing(16, 1.1), r"must lie in \(0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(SaesubError, match=message):
        make()
