"""The regimes of the recipe and of the two causes: balanced as they say, on one store each."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

import saesub
from saesub.training import recipe as package_recipe


@pytest.fixture(autouse=True)
def _studies(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "notebooks" / "studies"))


def test_regimes_are_balanced_and_a_third_is_of_a_model_of_its_own():
    import regimes

    site = [r.hook_name.partition("hook_")[2] for r in regimes.REGIMES]
    assert len(set(regimes.REGIMES)) == 24
    assert sum(r.untouched for r in regimes.REGIMES) == 8
    assert {r.model for r in regimes.REGIMES if r.untouched} == set(regimes.UNTOUCHED)
    for other in ("corpus", "d_sae", "firings"):
        pairs = Counter(zip(site, (getattr(r, other) for r in regimes.REGIMES), strict=True))
        assert set(pairs.values()) == {4}
    of_models = Counter(zip(site, (r.model for r in regimes.REGIMES), strict=True))
    assert set(of_models.values()) == {2, 3}
    assert Counter(r.model for r in regimes.REGIMES) == dict.fromkeys(regimes.MODELS, 8)


def test_features_fire_as_often_as_a_regime_says_and_all_fit_into_its_store():
    import regimes
    from protocol import N_VALIDATION

    for regime in regimes.REGIMES:
        trial = regime.trial("random")
        assert trial.n_train * trial.k / trial.d_sae == regime.firings
        assert trial.n_judged * trial.k / trial.d_sae == 1000
        assert trial.n_train + N_VALIDATION + trial.n_judged <= trial.n_stored == regimes.STORED


def test_the_two_causes_are_crossed_at_six_sites_of_each_model():
    import offset
    import regimes

    trials = offset.trials(0)
    cells = Counter((t.centre, t.start, t.lr) for t in trials)
    assert len(cells) == 3 * 2 * 2
    assert set(cells.values()) == {6}
    assert {(t.corpus, t.hook_name) for t in trials} == {
        (regimes.TEXTS[text], regimes.hook(0, text, site)) for text in range(2) for site in range(3)
    }
    assert len({t.condition for t in trials}) == 6


@pytest.mark.parametrize("centre", ["zero", "mean", "geometric median"])
def test_a_cell_has_its_centre_and_a_norm_fitted_to_it(monkeypatch, centre):
    import offset
    import protocol

    torch.manual_seed(0)
    x = torch.randn(8192, 16).exp() + 3.0  # its mean and its median differ
    store = saesub.ActivationStore.of(x, "here")
    site = protocol.Site(store, saesub.Spectrum.from_activations(x), None)
    monkeypatch.setattr(protocol, "N_MEDIAN", len(x))
    trial = offset.Centred("here", "random", d_sae=64, k=4, centre=centre)
    sae = protocol.untrained(trial, site, offset.set_start)
    scale = 16**0.5 / site.spectrum.mean_norm
    wanted = {
        "zero": torch.zeros(16),
        "mean": site.spectrum.mean.float(),
        "geometric median": saesub.geometric_median(x),
    }
    assert torch.allclose(sae.b_dec.detach(), wanted[centre] * scale, atol=1e-4)
    # No other norm reconstructs better.
    found = saesub.reconstruction(sae, x * scale, progress=False).fvu
    for factor in (0.8, 1.25):
        other = protocol.untrained(trial, site, offset.set_start)
        with torch.no_grad():
            other.W_dec.mul_(factor)
            other.W_enc.mul_(factor)
            other.b_enc.mul_(factor)
        assert saesub.reconstruction(other, x * scale, progress=False).fvu > found


def test_the_recipe_of_the_study_is_the_packages(monkeypatch):
    import protocol
    import recipe
    import regimes

    monkeypatch.setitem(package_recipe.COVERED, "d_in", (1, 100))  # narrower than the studies'
    rates = {64_000: (0.00283, 0.00496), 256_000: (0.002, 0.0035)}
    for low, start in enumerate(("whitened_data", "subspace")):
        x = torch.randn(2000, 48)
        x[:, 0] *= 100 if low else 1
        spectrum = saesub.Spectrum.from_activations(x)
        for regime in regimes.REGIMES:
            plain = regime.trial("subspace", condition="recipe")
            trial = protocol.recommended(plain, spectrum)
            lr = rates[trial.n_train][low]
            assert (trial.start, trial.optimizer, trial.lr) == (start, "sparse_adam", lr)
            cfg = protocol.schedule(trial)
            said = saesub.recommend(spectrum, _cfg(trial, spectrum.d), trial.n_train)
            assert cfg.lr_warm_up_steps == said.warm_up_steps
            assert cfg.lr_decay_steps == said.decay_steps
            assert cfg.train_batch_size_samples == said.batch_size
            changed = {t.condition: t for t in recipe.parts(trial)}
            names = ["random start", "subspace start", "Adam", "short fall"]
            names = [f"recipe, {name}" for name in names if not (low and "subspace" in name)]
            assert list(changed) == names
            assert changed["recipe, random start"].start == "random"
            assert changed["recipe, Adam"].optimizer == "adam"
            assert changed["recipe, short fall"].decay == protocol.Trial.decay == 0.2
            conditions = [t.condition for t in recipe.baselines(regime)]
            assert conditions == ["random", "ASI", "ASI + SparseAdam"]
            assert {t.n_train for t in recipe.baselines(regime)} == {trial.n_train}


@pytest.mark.parametrize("low", [False, True])
def test_a_trial_of_the_recipe_begins_as_the_package_applies_it(monkeypatch, low):
    import protocol
    import regimes

    for name in package_recipe.COVERED:
        monkeypatch.setitem(package_recipe.COVERED, name, (1, 10**6))
    x = torch.randn(8192 + protocol.N_VALIDATION, 48) + 0.3
    x[:, 0] *= 100 if low else 1
    spectrum = saesub.Spectrum.from_activations(x)
    site = protocol.Site(saesub.ActivationStore.of(x, "here"), spectrum, None)
    plain = regimes.InRegime("here", "random", d_sae=64, k=4, n_train=8192, n_judged=0, seed=3)
    trial = protocol.recommended(plain, spectrum)
    own = protocol.untrained(trial, site)
    torch.manual_seed(trial.seed)
    sae = TopKTrainingSAE(_cfg(trial, spectrum.d))
    cfg = SAETrainerConfig(total_training_samples=1, train_batch_size_samples=1)
    said = saesub.recommend(spectrum, sae.cfg, trial.n_train)
    said.apply(sae, cfg, protocol.sample_for(trial, site), seed=trial.seed)
    for name, value in own.named_parameters():
        assert torch.equal(value, sae.get_parameter(name)), name
    assert sae.cfg.normalize_activations == own.cfg.normalize_activations
    assert sae.cfg.aux_loss_coefficient == own.cfg.aux_loss_coefficient
    wanted = protocol.schedule(trial)
    left_alone = ("device", "logger")
    assert {k: v for k, v in vars(cfg).items() if k not in left_alone} == {
        k: v for k, v in vars(wanted).items() if k not in left_alone
    }


def test_seeds_are_added_to_the_baseline_that_fits_the_validation_part_best(monkeypatch):
    import recipe
    import regimes

    regime, other = regimes.REGIMES[:2]
    swept = [(regime, 0, 0.3), (regime, 1, 0.2), (regime, 2, 0.25), (other, 0, 0.1)]
    rows = [
        vars(replace(recipe.baselines(of)[i], lr=0.004)) | {"validation_fvu": fvu}
        for of, i, fvu in swept
    ]
    monkeypatch.setattr(recipe, "recorded", lambda name: rows)
    found = recipe.best_baseline(regime)
    assert (found.condition, found.lr, found.seed) == ("ASI", 0.004, 0)
    assert (found.hook_name, found.n_train) == (regime.hook_name, rows[0]["n_train"])


def _cfg(trial, d: int) -> TopKTrainingSAEConfig:
    return TopKTrainingSAEConfig(d_in=d, d_sae=trial.d_sae, k=trial.k)
