"""The study of the rivals: each rival is what its definition says, and each condition differs from
plain training in that alone."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from time import sleep

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch.nn.functional import cosine_similarity

import saesub
from saesub.errors import SaesubError

D, D_SAE, K, N_TRAIN, BATCH = 24, 64, 4, 8192, 256
ROOT = Path(__file__).parents[1]


@pytest.fixture
def study(monkeypatch):
    """The study on a small store in memory, whose mean is far from zero and from the median."""
    monkeypatch.syspath_prepend(str(ROOT / "notebooks" / "studies"))
    import protocol
    import rivals

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12_288, D, generator=generator).exp() * 0.8 ** torch.arange(24.0)

    def stores(model, corpus, hook_names, n_tokens):
        return {hook: saesub.ActivationStore.of(x[:n_tokens], hook) for hook in hook_names}

    monkeypatch.setattr(protocol.saesub, "harvest", stores)
    monkeypatch.setattr(protocol, "N_VALIDATION", 1024)
    monkeypatch.setattr(protocol, "N_SPECTRUM", 8192)
    monkeypatch.setattr(protocol, "N_MEDIAN", 4096)
    protocol.site.cache_clear()
    yield rivals
    protocol.site.cache_clear()


@pytest.fixture
def methods(study):
    """What the rivals are."""
    import rival_methods

    return rival_methods


def _small(trial, lr: float = 2e-2):
    size = {"d_sae": D_SAE, "k": K, "n_train": N_TRAIN, "n_judged": 3072, "batch_size": BATCH}
    return replace(trial, **size, dead_window=N_TRAIN // 8, lr=lr)


def _every(study) -> list:
    sweeps = (*study.SWEEPS, study.SIGN_SWEEP, study.REFITTED)
    return [t for several in sweeps for t in several]


def _of(study, condition: str, lr: float = 2e-2):
    every = [*_every(study), study.mitigations.PLAIN]
    (found,) = (trial for trial in every if trial.condition == condition)
    return _small(found, lr)


def _trainer(study, condition: str, lr: float = 2e-2):
    """A condition's trainer before its first step, with the scale of its input known."""
    trial = _of(study, condition, lr)
    at = study.site_of(trial)
    trainer = study.trainer_for(trial, study.untrained(trial, at))
    trainer.activation_scaler.scaling_factor = D**0.5 / at.spectrum.mean_norm
    return trainer


def _batches(study, n: int) -> list[torch.Tensor]:
    store = study.site_of(_of(study, "random")).store
    return list(store.batches(BATCH, seed=1, stop=n))


def _sae(kind=TopKTrainingSAE, **settings) -> TopKTrainingSAE:
    """An SAE that no one has trained, with weights that are not tied and rows of all lengths."""
    torch.manual_seed(3)
    sae = kind(TopKTrainingSAEConfig(D, D_SAE, k=K, **{"aux_loss_coefficient": 0.0} | settings))
    with torch.no_grad():
        sae.W_enc += 0.1 * torch.randn_like(sae.W_enc)
        sae.W_dec *= torch.rand(D_SAE, 1) + 0.5
        sae.b_enc += 0.1 * torch.randn(D_SAE)
        sae.b_dec += 0.1 * torch.randn(D)
    return sae


def _step_input(n: int = 200) -> TrainStepInput:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(5))
    return TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )


def _gradients(sae, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*sae.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def _inner(sae) -> torch.Tensor:
    return (sae.W_enc.double() * sae.W_dec.double().T).sum(0).detach()


# ------------------------------------------------------------------- the conditions


def test_every_condition_has_its_own_name_and_size_and_place(study):
    trials = _every(study)
    recorded = [
        json.loads((ROOT / "data" / "results" / "studies" / f"{name}.json").read_text())
        for name in ("mitigations", "cure")
    ]
    names = {row.get("condition") for record in recorded for row in record["rows"]}
    assert len({trial.condition for trial in trials}) == len(trials)
    assert not {trial.condition for trial in trials} & names
    sizes = ("hook_name", "d_sae", "n_train", "n_judged", "k", "model", "corpus", "batch_size")
    (row, *_) = recorded[0]["rows"]
    for trial in trials:
        assert [getattr(trial, name) for name in sizes] == [row[name] for name in sizes]
        assert trial.condition.startswith("ASI + ") == (trial.start == "subspace")


def test_every_rival_that_is_no_start_comes_with_both(study):
    named = {trial.condition: trial for trial in _every(study)}
    # mitigations.json has the first, and the recipe's start is not random.
    recorded = {"bias at the median", "SparseAdam + refit"}
    for trial in named.values():
        if trial.start == "subspace" and (alone := trial.condition[6:]) not in recorded:
            assert replace(trial, start="random", condition=alone) == named[alone]


@pytest.mark.parametrize("start", ["", "ASI + "])
def test_a_rival_that_changes_training_starts_as_plain_training_does(study, start):
    plain = _of(study, "random")
    at = study.site_of(plain)
    if start:
        plain = replace(plain, start="subspace")
    usual = study.untrained(plain, at)
    for rival in ("AuxK of Gao et al.", study.SIGN):
        trial = _of(study, start + rival)
        for one, other in zip(
            study.untrained(trial, at).parameters(), usual.parameters(), strict=True
        ):
            assert torch.equal(one, other)


def test_a_row_has_the_fields_of_the_mitigations_record(study):
    trial = _of(study, "ASI + aligned")
    row = study.outcome(trial)
    record = json.loads((ROOT / "data/results/studies/mitigations.json").read_text())
    # The record is older than the setting of the schedule.
    assert {*row, "run"} == {*record["rows"][-1], "decay"}
    import protocol

    assert protocol.trial_of(json.loads(json.dumps(row)), study.Mitigated) == trial


def test_a_rate_of_sign_descent_can_be_swept_to_its_edges(study):
    rates = study.SIGN_RATES
    assert all(b == 2 * a for a, b in pairwise(rates))
    authors = 5e-3 / math.sqrt(study.SMALL["d_sae"] / 2**14)
    assert rates[0] < authors < 2 * rates[-1]


# ------------------------------------------------------------------------- aligned


@pytest.mark.parametrize("condition", ["aligned", "ASI + aligned"])
def test_the_inner_products_are_1_at_every_step_and_in_what_is_saved(study, condition, tmp_path):
    trainer = _trainer(study, condition)
    assert torch.allclose(_inner(trainer.sae), torch.ones(D_SAE).double(), atol=1e-5)
    for batch in _batches(study, 8):
        before = trainer.sae.W_enc.detach().clone()
        trainer.step(batch)
        assert (trainer.sae.W_enc - before).abs().max() > 1e-3
        assert torch.allclose(_inner(trainer.sae), torch.ones(D_SAE).double(), atol=1e-5)
    trial = _of(study, condition)
    at = study.site_of(trial)
    whole = study.trainer_for(trial, study.untrained(trial, at))
    study.fit({"trial": whole}, trial, at)
    assert whole.sae.cfg.normalize_activations == "none"  # its scale is folded in
    whole.sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert torch.allclose(_inner(loaded), torch.ones(D_SAE).double(), atol=1e-5)
    x = at.store.rows(0, 500)
    assert torch.allclose(loaded.encode(x), whole.sae.encode(x), rtol=1e-4, atol=1e-4)


def test_plain_training_does_not_keep_the_inner_products(study):
    trainer = _trainer(study, "random")
    with torch.no_grad():
        trainer.sae.W_dec /= trainer.sae.W_dec.norm(dim=1, keepdim=True)
        trainer.sae.W_enc.copy_(trainer.sae.W_dec.T)
    for batch in _batches(study, 8):
        trainer.step(batch)
    assert (_inner(trainer.sae) - 1).abs().max() > 0.1


def test_an_aligned_encoder_is_the_nearest(methods):
    sae = _sae()
    found = methods.aligned(sae.W_enc, sae.W_dec).detach()
    assert torch.allclose((found * sae.W_dec.T).sum(0), torch.ones(D_SAE), atol=1e-5)
    moved = found - sae.W_enc.detach()
    along = cosine_similarity(moved, sae.W_dec.detach().T, dim=0).abs()
    assert torch.allclose(along, torch.ones(D_SAE), atol=1e-5)
    assert torch.allclose(methods.aligned(found, sae.W_dec), found, atol=1e-5)


def test_aligned_gradients_are_those_of_the_reparametrised_sae(methods):
    """SAELens' own pass on an encoder that is made of free weights and of the decoder."""
    sae = _sae(methods.AlignedSAE)
    given = _step_input()
    output = sae.training_forward_pass(given)
    mine = _gradients(sae, output.loss)
    assert isinstance(sae.W_enc, torch.nn.Parameter)

    plain = _sae()
    free = dict(plain.named_parameters())
    inner = torch.einsum("df,fd->f", free["W_enc"], free["W_dec"])
    encoder = free["W_enc"] - free["W_dec"].T * ((inner - 1) / free["W_dec"].norm(dim=1) ** 2)
    plain._parameters["W_enc"] = encoder
    loss = plain.training_forward_pass(given).loss
    wanted = torch.autograd.grad(loss, list(free.values()))
    assert torch.isclose(output.loss, loss, rtol=1e-5)
    for name, gradient in zip(free, wanted, strict=True):
        assert torch.allclose(mine[name], gradient, rtol=1e-3, atol=1e-5), name
    # What lies along the decoder is no parameter.
    along = (mine["W_enc"] * sae.W_dec.T).sum(0)
    assert along.abs().max() < 1e-4 * mine["W_enc"].norm()


# ------------------------------------------------------------------------ GroupMax


def test_exactly_the_largest_of_each_group_is_active(methods):
    x = torch.randn(300, 48, generator=torch.Generator().manual_seed(0))
    acts = methods.GroupMax(6)(x)
    for group, of in zip(acts.split(8, dim=1), x.split(8, dim=1), strict=True):
        largest = of.max(dim=1)
        assert torch.equal((group != 0).sum(1), (largest.values > 0).long())
        assert torch.equal(group.max(1).values, largest.values.relu())
        assert torch.equal(group.gather(1, largest.indices[:, None])[:, 0], largest.values.relu())
    assert (acts != 0).sum(1).double().mean() > 5.9
    with pytest.raises(SaesubError, match="no 5 equal groups: choose"):
        methods.GroupMax(5)(x)


@pytest.mark.parametrize("rescale", [True, False])
def test_its_sparse_pass_is_saelens_own_pass(methods, rescale):
    sae = _sae(methods.GroupMaxSAE, rescale_acts_by_decoder_norm=rescale)
    output = sae.training_forward_pass(_step_input())
    own = TopKTrainingSAE.training_forward_pass(sae, _step_input())
    assert torch.isclose(output.loss, own.loss, rtol=1e-5)
    assert torch.allclose(output.feature_acts.to_dense(), own.feature_acts, atol=1e-5)
    wanted = _gradients(sae, own.loss)
    for name, gradient in _gradients(sae, output.loss).items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-3, atol=1e-5), name


def test_the_trainer_trains_it_as_a_dense_class_of_the_user(study, methods):
    """Neither the compiled step nor its search, which would look for the k largest of all."""

    class Dense(TopKTrainingSAE):
        def get_activation_fn(self):
            return methods.GroupMax(self.cfg.k)

    trainer = _trainer(study, "GroupMax")
    dense = Dense(copy.deepcopy(trainer.sae.cfg))
    dense.load_state_dict(trainer.sae.state_dict())
    with pytest.warns(UserWarning, match="activation function is GroupMax, not SAELens' own"):
        other = study.trainer_of(_of(study, "GroupMax"), dense)
    other.activation_scaler.scaling_factor = trainer.activation_scaler.scaling_factor
    before = dense.W_dec.detach().clone()
    for batch in _batches(study, 5):
        output = trainer.step(batch)
        other.step(batch)
        groups = output.feature_acts.unflatten(1, (K, -1)) != 0
        assert groups.sum(2).max() == 1
        assert not trainer.native_step.fused
        assert not other.native_step.fused
    assert (dense.W_dec - before).abs().max() > 0.01
    for name, weight in trainer.sae.named_parameters():
        assert torch.allclose(weight, dense.get_parameter(name), atol=1e-4), name


def test_groups_are_judged_by_their_maxima(study):
    trial = _of(study, "GroupMax", lr=4e-3)
    at = study.site_of(trial)
    trainer = study.trainer_for(trial, study.untrained(trial, at))
    study.fit({"trial": trainer}, trial, at)
    sae, x = trainer.sae, at.store.rows(8192, 12_288)
    with torch.no_grad():
        pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=1)
        largest = pre.unflatten(1, (K, -1)).max(2).values.relu()
    found = saesub.judge(sae, x, n_tokens=len(x), progress=False)
    assert found.l0 == pytest.approx((largest > 0).sum(1).double().mean().item(), abs=1e-6)
    assert found.counts.unflatten(0, (K, -1)).sum(1).tolist() == (largest > 0).sum(0).tolist()


@pytest.mark.parametrize("kind", ["GroupMaxSAE", "AlignedSAE"])
def test_a_pass_that_has_no_auxk_says_so(methods, kind):
    sae = _sae(getattr(methods, kind), aux_loss_coefficient=1.0)
    with pytest.raises(SaesubError, match="no AuxK: set aux_loss_coefficient=0"):
        sae.training_forward_pass(_step_input())


# ---------------------------------------------------------------------------- AuxK


class _Dead:
    """As much of a trainer as AuxK reads."""

    def __init__(self, sae: TopKTrainingSAE, dead: torch.Tensor) -> None:
        self.sae, self.dead_neurons = sae, dead


def _auxk_of_gao(sae, x, x_hat, dead: list[int], k_aux: int) -> tuple[float, float]:
    """(‖ê - e‖² / Σ‖e - ē‖², variance of x) token by token, in float64."""
    weights = {name: p.detach().double() for name, p in sae.named_parameters()}
    e, x = (x - x_hat).detach().double(), x.double()
    error = 0.0
    for token in range(len(x)):
        pre = {
            f: float((x[token] - weights["b_dec"]) @ weights["W_enc"][:, f] + weights["b_enc"][f])
            for f in dead
        }
        ranked = sorted(dead, key=lambda f: -pre[f] * float(weights["W_dec"][f].norm()))
        e_hat = sum(max(pre[f], 0.0) * weights["W_dec"][f] for f in ranked[:k_aux])
        error += float(((e_hat - e[token]) ** 2).sum())
    of_residual = float(((e - e.mean(0)) ** 2).sum())
    return error / of_residual, float(((x - x.mean(0)) ** 2).sum(1).mean())


@pytest.mark.parametrize("k_aux", [3, 256])
def test_auxk_is_gaos_in_the_scale_of_the_main_loss(methods, k_aux):
    sae, given = _sae(), _step_input(60)
    with torch.no_grad():
        sae.b_dec += 2.0  # a residual with a mean, which its variance leaves out
    output = sae.training_forward_pass(given)
    dead = [1, 5, 6, 20, 33, 50, 63]
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    mask[dead] = True
    loss = methods.AuxKOfGao(k_aux=k_aux).extra_loss(_Dead(sae, mask), output)
    share, variance = _auxk_of_gao(sae, given.sae_in, output.sae_out, dead, k_aux)
    assert loss.item() == pytest.approx(variance * share / 32, rel=1e-4)
    # So the sum is the variance times Gao's: normalised error, and 1/32 of AuxK's.
    gaos = output.losses["mse_loss"].item() / variance + share / 32
    assert (output.loss + loss).item() / variance == pytest.approx(gaos, rel=1e-4)
    gradients = _gradients(sae, loss)
    touched = {f for f in range(D_SAE) if gradients["W_dec"][f].any()}
    assert touched <= set(dead)
    assert len(touched) > 3
    assert {f for f in range(D_SAE) if gradients["W_enc"][:, f].any()} == touched


def test_auxk_is_0_without_dead_features_or_without_a_residual(methods):
    sae, given = _sae(), _step_input(60)
    output = sae.training_forward_pass(given)
    none = torch.zeros(D_SAE, dtype=torch.bool)
    assert methods.AuxKOfGao().extra_loss(_Dead(sae, none), output) == 0
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.zero_()
    exact = TrainStepOutput(given.sae_in, given.sae_in, given.sae_in, given.sae_in, sae.b_dec, {})
    assert methods.AuxKOfGao().extra_loss(_Dead(sae, ~none), exact) == 0


def test_auxk_differs_from_saelens_where_the_docstring_says(methods):
    """Without ReLU, with the residual's variance as the measure, few dead features scale it."""
    sae, given = _sae(aux_loss_coefficient=1 / 32), _step_input(60)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:4] = True
    step = replace(given, dead_neuron_mask=dead)
    output = sae.training_forward_pass(step)
    saelens = output.losses["auxiliary_reconstruction_loss"].item()
    with torch.no_grad():
        pre = (given.sae_in - sae.b_dec) @ sae.W_enc[:, :4] + sae.b_enc[:4]
        residual = given.sae_in - output.sae_out
        plain = (pre @ sae.W_dec[:4] - residual).square().sum(1).mean().item()
        mine = (pre.relu() @ sae.W_dec[:4] - residual).square().sum(1).mean().item()
        of_residual = residual.var(0, correction=0).sum().item()
        of_x = given.sae_in.var(0, correction=0).sum().item()
    assert saelens == pytest.approx(plain / 32 * 4 / (D // 2), rel=1e-4)
    loss = methods.AuxKOfGao().extra_loss(_Dead(sae, dead), output).item()
    assert loss == pytest.approx(mine / of_residual * of_x / 32, rel=1e-4)


@pytest.mark.parametrize("condition", ["random", "AuxK of Gao et al."])
def test_auxk_of_gao_moves_the_dead(study, condition):
    """With SparseAdam, by which a feature without a gradient stands still."""
    trial = replace(_of(study, condition, 0.1), optimizer="sparse_adam")
    at = study.site_of(trial)
    trainer = study.trainer_for(trial, study.untrained(trial, at))
    trainer.activation_scaler.scaling_factor = D**0.5 / at.spectrum.mean_norm
    for batch in _batches(study, 8):
        trainer.step(batch)
    dead, before = trainer.dead_neurons.clone(), trainer.sae.W_dec.detach().clone()
    output = trainer.step(_batches(study, 9)[-1])
    silent = dead & (trainer.tokens_since_fired > 0)
    moved = (trainer.sae.W_dec != before).any(1)[silent]
    assert len(moved) > 1
    if condition == "random":
        assert not moved.any()
    else:
        assert moved.all()
        losses = output.losses
        assert losses["auxk_of_gao"] > 0
        assert torch.isclose(output.loss, losses["mse_loss"] + losses["auxk_of_gao"])


def test_its_window_is_what_the_condition_says(study):
    windows = {t.condition: t.dead_window for t in _every(study) if "Gao" in t.condition}
    assert windows == {"AuxK of Gao et al.": 16_000, "ASI + AuxK of Gao et al.": 16_000}
    trial = replace(_of(study, "AuxK of Gao et al."), dead_window=777)
    assert study.trainer_for(trial, _sae(decoder_init_norm=1.0)).dead_window_tokens == 777


# --------------------------------------------------------------- sign descent, starts, the recipe


def test_schedule_free_sign_is_the_recursion_of_its_paper(methods):
    y = torch.nn.Parameter(torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64))
    optimizer = methods.ScheduleFreeSign([y], lr=0.1)
    z = x = y.detach().clone()
    for step in range(1, 8):
        gradient = 2 * y.detach() * torch.tensor([1.0, 3.0, 0.0])  # of the last entry none
        assert torch.allclose(y, 0.05 * z + 0.95 * x)
        z = z - 0.1 * gradient.sign()
        x = (1 - 1 / step) * x + z / step
        y.grad = gradient
        optimizer.step()
    assert torch.allclose(y, 0.05 * z + 0.95 * x)
    optimizer.average()
    assert torch.allclose(y, x)
    assert y[2].item() == pytest.approx(2.0)


def test_sign_descent_has_its_own_optimizer_and_no_schedule(study, methods):
    trial = _of(study, study.SIGN, lr=1e-2)
    at = study.site_of(trial)
    trainer = study.trainer_for(trial, study.untrained(trial, at))
    rates, given = set(), trainer.step

    def step(batch):
        rates.add(trainer.optimizer.param_groups[0]["lr"])
        return given(batch)

    trainer.step = step
    study.fit({"trial": trainer}, trial, at)
    assert not trainer.native_step.fused
    assert trainer.sae.cfg.metadata.optimizer == study.SIGN
    assert type(trainer.optimizer) is methods.ScheduleFreeSign
    assert rates == {1e-2}


def test_a_schedule_free_run_ends_in_the_average(study):
    trainer = _trainer(study, "schedule-free sign", 1e-2)
    visited = []
    for batch in _batches(study, N_TRAIN // BATCH):
        trainer.step(batch)
        visited.append(trainer.optimizer.state[trainer.sae.W_dec]["z"].clone())
    mean = torch.stack(visited).mean(0)
    assert torch.allclose(trainer.sae.W_dec, mean, atol=1e-5)
    assert (visited[-1] - mean).abs().max() > 0.01


def test_rows_of_the_start_at_data_are_mixtures_with_a_data_point(study):
    trial = _of(study, "data start + SparseAdam")
    assert trial.optimizer == "sparse_adam"
    at = study.site_of(trial)
    sae = study.untrained(trial, at)
    points = study.mitigations.protocol.sample_for(trial, at)[:D_SAE] - at.spectrum.mean.float()
    cosines = cosine_similarity(sae.W_dec.detach(), points, dim=1)
    # Of a mixture of orthogonal unit vectors, 0.8 and 0.2; in 24 dimensions they are nearly so.
    assert cosines.mean().item() == pytest.approx(0.8 / 0.68**0.5, abs=0.03)
    assert cosines.min() > 0.85


def test_the_bias_is_where_the_distances_pull_nowhere(study):
    trial = _of(study, "ASI + bias at the median")
    at = study.site_of(trial)
    sae = study.untrained(trial, at)
    x = at.store.rows(0, 4096).double()
    centre = sae.b_dec.detach().double() * at.spectrum.mean_norm / D**0.5
    pull = torch.nn.functional.normalize(x - centre, dim=1).mean(0).norm()
    of_mean = torch.nn.functional.normalize(x - x.mean(0), dim=1).mean(0).norm()
    assert pull < 1e-4
    assert of_mean > 0.1
    assert not sae.b_enc.any()
    basis = at.spectrum.eigenvectors[:, : sae.cfg.d_in // 2].float()
    kept = (sae.W_dec @ basis).norm(dim=1) / sae.W_dec.norm(dim=1)
    usual = study.untrained(_of(study, "random"), at)
    of_random = (usual.W_dec @ basis).norm(dim=1) / usual.W_dec.norm(dim=1)
    assert kept.mean() > of_random.mean() + 0.1


@pytest.mark.parametrize("condition", ["norm 0.1", "ASI + norm 0.1"])
def test_the_norm_is_saelens_default_where_it_is_not_searched(study, condition):
    trial = _of(study, condition)
    sae = study.untrained(trial, study.site_of(trial))
    assert trial.norm == TopKTrainingSAEConfig(D, D_SAE).decoder_init_norm
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.full((D_SAE,), 0.1), rtol=1e-5)
    assert torch.allclose(sae.W_enc, sae.W_dec.T)


def test_sparse_adam_has_auxk_at_its_best_settings(study):
    trials = [t for t in _every(study) if t.mitigation == "AuxK"]
    assert {(t.optimizer, t.coefficient, t.dead_window) for t in trials} == {
        ("sparse_adam", 1.0, 16_000)
    }
    trainer = _trainer(study, "AuxK + SparseAdam")
    assert trainer.sae.cfg.aux_loss_coefficient == 1.0
    assert type(trainer.optimizer) is saesub.SparseAdam


def test_the_recipe_is_the_packages_and_its_last_step_a_refit(study, monkeypatch):
    from saesub.training import recipe as package

    for name in package.COVERED:
        monkeypatch.setitem(package.COVERED, name, (1, 10**6))
    trial = study.recipe()
    assert (trial.start, trial.optimizer, trial.lr) == ("whitened_data", "sparse_adam", 0.00168)
    assert (trial.condition, trial.decay, trial.d_sae) == ("recipe", 0.5, 4096)
    row = study.outcome(_small(trial))
    assert row["fvu"] < row["fvu_unrefitted"] < 1


def test_two_rivals_have_the_recipes_refit(study):
    for trial in study.REFITTED:
        assert (trial.optimizer, trial.decay) == ("sparse_adam", 0.2)
        row = study.outcome(_small(trial))
        assert row["fvu"] < row["fvu_unrefitted"] < 1
    assert "fvu_unrefitted" not in study.outcome(_of(study, "norm 0.1"))


# ---------------------------------------------------------------------------- the cost


def test_costs_are_ratios_to_plain_training(study):
    plain, other = study.COSTED[:2]
    assert plain.condition == "random"
    steps = [1.0] * 30 + [2.0] * 10
    slower = [3 * t for t in steps[:39]] + [42.0]
    times = [
        {"start_seconds": 1.0, "step_seconds": steps, "end_seconds": 0.0},
        {"start_seconds": 3.0, "step_seconds": slower, "end_seconds": 5.0},
    ]
    held = [{"peak_bytes": 100, "kept_bytes": 10}, {"peak_bytes": 160, "kept_bytes": 20}]
    first, second = study.cost_rows([plain, other], times, held)
    assert first["step_ratio"] == first["whole_ratio"] == 1.0
    assert first["extra_bytes"] == 0
    assert second["condition"] == other.condition
    assert second["step_ratio"] == 3.0  # one slow step does not change it
    assert second["whole_ratio"] == pytest.approx((30 * 3 + 9 * 6 + 42 + 5) / 50)
    assert second["end_seconds"] == 5
    assert len(second["step_ratios"]) == study.N_BLOCKS
    assert (second["extra_bytes"], second["kept_bytes"]) == (60, 20)


def test_every_kind_of_condition_has_a_cost(study):
    def kinds(trials) -> set:
        return {(t.mitigation, t.optimizer if "sign" in t.optimizer else "") for t in trials}

    names = [t.condition for t in study.COSTED]
    assert names[0] == "random"
    assert names[-1] == "random, again"
    assert len(set(names)) == len(names)
    assert kinds(_every(study)) <= kinds(study.COSTED)


def test_steps_of_all_conditions_are_timed_on_the_same_batches(study, monkeypatch):
    seen: dict[int, list[float]] = {}
    given = saesub.SubspaceSAETrainer.step

    def step(trainer, batch):
        seen.setdefault(id(trainer), []).append(batch.sum().item())
        return given(trainer, batch)

    monkeypatch.setattr(saesub.SubspaceSAETrainer, "step", step)
    refitted: list[int] = []

    def refit(sae, *_, **__):
        refitted.append(id(sae))
        sleep(0.05)

    monkeypatch.setattr(saesub, "refit_decoder", refit)
    trials = (*study.COSTED[:2], replace(study.COSTED[-1], condition=study.RECIPE))
    measured = study.seconds([_small(t, t.lr) for t in trials])
    assert [len(m["step_seconds"]) for m in measured] == [N_TRAIN // BATCH] * 3
    assert all(t > 0 for m in measured for t in (m["start_seconds"], *m["step_seconds"]))
    one, other, of_recipe = seen.values()
    assert one == other == of_recipe
    assert measured[2]["end_seconds"] >= 0.05
    assert len(refitted) == 1


def test_memory_counts_weights_moments_and_counters(study):
    trial = _of(study, "random")
    held = study.memory(trial)
    weights = 4 * (2 * D * D_SAE + D_SAE + D)
    counters = 3 * D_SAE  # of RevivalCount, one byte each
    assert held["kept_bytes"] == pytest.approx(3 * weights + counters, abs=64)
    assert held["peak_bytes"] >= 0
    sign = study.memory(_of(study, study.SIGN))
    assert sign["kept_bytes"] == pytest.approx(2 * weights + counters, abs=64)


def test_the_longer_trainings_are_judged_on_the_same_tokens(study):
    import longer

    own = longer.longer(longer.WHITENED, longer.N_SHORT, longer.N_SHORT)  # as the recipe
    trials = [own, *longer.CONDITIONS]
    assert len({(t.n_stored, t.n_judged, t.d_sae, t.k, t.hook_name) for t in trials}) == 1
    assert {t.n_train for t in longer.CONDITIONS} == {longer.N_LONG}
    both = [(t.condition, n) for t in longer.RIVALS for n in (longer.N_LONG, longer.N_SHORT)]
    assert sorted(both) == sorted((t.condition, t.n_read) for t in longer.CONDITIONS)


def test_a_longer_training_reads_no_more_tokens_than_it_says(study, monkeypatch):
    import longer

    monkeypatch.setattr(longer, "N_LONG", 2 * BATCH * 8)
    read: list[torch.Tensor] = []
    given = saesub.SubspaceSAETrainer.step

    def step(trainer, batch):
        read.append(batch.clone())
        return given(trainer, batch)

    monkeypatch.setattr(saesub.SubspaceSAETrainer, "step", step)
    short = BATCH * 8
    for n_read in (short, 2 * short):
        read.clear()
        small = replace(_small(study.mitigations.PLAIN), n_train=2 * short)
        trial = longer.longer(small, n_read, 2 * short)
        study.outcome(trial)
        assert len(read) == 16
        assert len(torch.cat(read).unique(dim=0)) == n_read
