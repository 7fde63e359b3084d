"""A run keeps to its plan, by tokens, or says so; and what it cannot train on it refuses."""

from __future__ import annotations

import itertools
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import (
    SAE,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from saesub.errors import SaesubError
from saesub.training.comparison import StoreBatches, _fingerprint, train_together
from saesub.training.distributed import DataParallelSAETrainer, FeatureParallelSAETrainer, join
from saesub.training.mitigations import GhostGradients, KAnnealing, Resampling
from saesub.training.trainer import SubspaceSAETrainer

D_IN, D_SAE, BATCH = 16, 64, 32
STEPS = 40
X = torch.randn(20_000, D_IN, generator=torch.Generator().manual_seed(0))
ODD_SIZES = (BATCH // 4, BATCH - 1, BATCH, BATCH + 5, 4 * BATCH)


def recipe(steps: int = STEPS, **settings: Any) -> SAETrainerConfig:
    settings = {"lr": 1e-3, "lr_end": 1e-4, "lr_warm_up_steps": 5, "lr_decay_steps": 10} | settings
    return SAETrainerConfig(
        **{
            "total_training_samples": steps * BATCH,
            "train_batch_size_samples": BATCH,
            "n_batches_for_norm_estimate": 4,
        }
        | settings
    )


def topk(**settings: Any) -> TopKTrainingSAE:
    torch.manual_seed(0)
    settings = {"k": 4, "d_in": D_IN, "d_sae": D_SAE, "decoder_init_norm": 1.0} | settings
    return TopKTrainingSAE(TopKTrainingSAEConfig(**settings))


def standard() -> StandardTrainingSAE:
    torch.manual_seed(0)
    cfg = StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, l1_coefficient=2.0, l1_warm_up_steps=8)
    return StandardTrainingSAE(cfg)


MAKERS = {"topk": topk, "standard": standard}


def batches(size: int = BATCH) -> Iterator[Tensor]:
    return itertools.cycle(X.split(size)[:-1])


def batches_from(size: int, start: int) -> Iterator[Tensor]:
    return itertools.islice(batches(size), start, None)


def coefficients(trainer: Any) -> list[float]:
    return list(trainer.get_coefficients().values())


def rate(trainer: Any) -> float:
    return trainer.optimizer.param_groups[0]["lr"]


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("mitigations", [[], [GhostGradients()]])
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_schedules_go_by_tokens_whatever_size_batches_have(kind, mitigations, size):
    """By each batch they are where SAELens' are after as many whole steps of the plan."""
    trainer = SubspaceSAETrainer(recipe(), MAKERS[kind](), iter(()), mitigations=mitigations)
    planned, reference = [], SAETrainer(recipe(), MAKERS[kind](), batches())
    for _ in range(STEPS + 5):
        planned.append((rate(reference), coefficients(reference)))
        reference.step(next(reference.data_provider))
    for x in batches(size):
        if trainer.n_training_samples >= STEPS * BATCH:
            break
        step = trainer.n_training_samples // BATCH
        assert (rate(trainer), coefficients(trainer)) == planned[step]
        assert rate(trainer) > 0
        trainer.step(x)


def test_batches_of_the_planned_size_are_saelens_own_to_the_bit():
    ours = SubspaceSAETrainer(recipe(), standard(), batches(), optimizer="adam")
    theirs = SAETrainer(recipe(), standard(), batches())
    torch.testing.assert_close(
        ours.fit().state_dict(), theirs.fit().state_dict(), rtol=1e-5, atol=1e-6
    )
    assert ours.lr_scheduler.state_dict() == theirs.lr_scheduler.state_dict()
    assert coefficients(ours) == coefficients(theirs)


def said(trainer: SubspaceSAETrainer, sizes: list[int]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in sizes:
            trainer.step(X[:size])
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("sizes", "wrong"),
    [
        ([BATCH] * 5, None),
        ([BATCH, BATCH, 7, BATCH, BATCH, 7], None),  # epochs of a loader
        ([7, 7, 7], 7),
        ([BATCH - 2, BATCH - 1, BATCH + 1, BATCH - 3], None),  # a stream without special tokens
        ([BATCH, 7, 7], 7),
        ([BATCH, 2 * BATCH, 3 * BATCH], 2 * BATCH),
    ],
)
def test_batches_of_another_size_are_said_once_with_both_numbers(sizes, wrong):
    trainer = SubspaceSAETrainer(recipe(lr_decay_steps=0), topk(), iter(()))
    found = [text for text in said(trainer, sizes) if "train_batch_size" in text]
    expected = [] if wrong is None else [f"A batch of {wrong} tokens .* is {BATCH}: "]
    assert len(found) == len(expected)
    assert all(map(re.match, expected, found))
    assert trainer.n_training_samples == sum(sizes)
    assert trainer.lr_scheduler.last_epoch == sum(sizes) // BATCH


def test_the_last_batch_of_an_epoch_may_be_smaller_after_a_resume(tmp_path):
    trainer = SubspaceSAETrainer(recipe(), topk(), iter(()))
    trainer.step(X[:BATCH])
    trainer.save_trainer_state(tmp_path)
    resumed = SubspaceSAETrainer(recipe(), topk(), iter(()))
    resumed.load_trainer_state(tmp_path)
    assert said(resumed, [7, BATCH, 7]) == []
    assert len(said(resumed, [7])) == 1


@pytest.mark.parametrize(
    ("total", "steps", "sentence"),
    [
        (4 * BATCH, 4, None),
        (4 * BATCH + 1, 5, r"learning rate is 0 after 128 of 129 tokens, .* 4 whole steps of 32"),
        (4 * BATCH, 6, r"past its 128 tokens"),
    ],
)
def test_training_at_rate_0_or_past_the_plan_is_said_once(total, steps, sentence):
    cfg = recipe(total_training_samples=total, lr_warm_up_steps=0, lr_decay_steps=2)
    found = said(SubspaceSAETrainer(cfg, topk(), iter(())), [BATCH] * steps)
    assert len(found) == (sentence is not None)
    assert sentence is None or re.search(sentence, found[0])


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_history_goes_by_tokens(size):
    trainer = SubspaceSAETrainer(recipe(80), topk(), batches(size))
    losses, step = [], trainer.step
    trainer.step = lambda x: (out := step(x), losses.append(float(out.losses["mse_loss"])))[0]
    trainer.fit()
    tokens = [int(point["tokens"]) for point in trainer.history]
    passed = [t // (2 * BATCH) for t in range(size, 80 * BATCH + size, size)]
    wanted = [s * size for s, n in enumerate(passed, 1) if n > ([0, *passed])[s - 1]]
    assert tokens == wanted
    first = wanted[0] // size
    assert trainer.history[0]["mse"] == pytest.approx(sum(losses[:first]) / first)


# --- mitigations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*ODD_SIZES, 20 * BATCH])
@pytest.mark.parametrize("n_batches", [1, 4])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_dead_feature_is_resampled_by_tokens(size, n_batches):
    resampling = Resampling(at_tokens=(10 * BATCH,), n_batches=n_batches)
    trainer = SubspaceSAETrainer(
        recipe(lr=1e-9), topk(), iter(()), mitigations=[resampling], dead_window_tokens=8 * BATCH
    )
    dead = torch.arange(D_SAE) < 16
    with torch.no_grad():
        trainer.sae.b_enc[dead] = -1e6
    parts = {}
    for x in batches(size):
        trainer.step(x)
        seen = trainer.n_training_samples
        parts[seen] = int((trainer.sae.b_enc[dead] > -1e5).sum())
        if seen >= (10 + n_batches) * BATCH:
            break
    for seen, resampled in parts.items():
        due = min(n_batches, max(0, (seen - 10 * BATCH) // BATCH + 1))
        assert resampled == min(16 * due // n_batches, size if n_batches == 1 else 16)


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_k_falls_by_tokens(size):
    sae = topk()
    annealing = KAnnealing(k_start=24, share=0.5)
    trainer = SubspaceSAETrainer(recipe(), sae, iter(()), mitigations=[annealing])
    for x in itertools.islice(batches(size), 12):
        step = trainer.n_training_samples // BATCH
        k = round(annealing.k_at(step, STEPS, 4))
        found = (trainer.step(x).feature_acts.to_dense() != 0).sum(1)
        assert found.max() == min(k, int(found.max()) if k > 20 else k)


@pytest.mark.parametrize(
    "settings",
    [
        {"every_tokens": 1000.5},
        {"every_tokens": 0},
        {"every_tokens": "1000"},
        {"at_tokens": 1000},
        {"at_tokens": (1000, float("nan"))},
        {"every_tokens": 1000, "n_batches": 0},
        {"every_tokens": 1000, "n_batches": 2.5},
        {"every_tokens": 1000, "seed": -1},
        {"every_tokens": 1000, "encoder_norm": float("nan")},
        {"every_tokens": 1000, "encoder_norm": float("inf")},
        {"every_tokens": 1000, "until": float("nan")},
        {"every_tokens": 1000, "until": "all"},
    ],
)
def test_settings_of_resampling_that_cannot_be(settings):
    with pytest.raises(SaesubError, match="must be"):
        Resampling(**settings)


def test_whole_floats_are_counts_of_resampling():
    given = Resampling(every_tokens=1e3, n_batches=np.int64(2), seed=1.0)  # pyright: ignore
    assert given == Resampling(every_tokens=1000, n_batches=2, seed=1)
    assert repr(given) == repr(Resampling(every_tokens=1000, n_batches=2, seed=1))


@pytest.mark.parametrize("settings", [{"k_start": "8", "share": 1}, {"k_start": 8, "share": "1"}])
def test_settings_of_annealing_that_cannot_be(settings):
    with pytest.raises(SaesubError, match="must"):
        KAnnealing(**settings)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"total_training_samples": 1e4 + 0.5},
        {"total_training_samples": 0},
        {"total_training_samples": "1000"},
        {"train_batch_size_samples": -32},
        {"train_batch_size_samples": float("nan")},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": 0},
        {"lr": -1e-3},
        {"lr": "1e-3"},
        {"lr_end": -1.0},
        {"lr_end": float("nan")},
        {"lr_warm_up_steps": -1},
        {"lr_warm_up_steps": 2.5},
        {"lr_decay_steps": -1},
        {"adam_beta1": 1.0},
        {"adam_beta2": float("nan")},
        {"n_checkpoints": -1},
        {"dead_feature_window": -1},
        {"feature_sampling_window": 0},
        {"n_batches_for_norm_estimate": 0},
        {"lr_scheduler_name": "linear"},
        {"device": "gpu"},
        {"device": "cuda:99"},
        {"lr_scheduler_name": "cosineannealing", "lr_end": 0.0},
        {"lr_scheduler_name": "cosineannealing", "lr_end": 1.0},
        {"lr_scheduler_name": "cosineannealing", "lr_decay_steps": STEPS - 5},
        {"lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 30},
    ],
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(
        SaesubError, match=r"must|is not here|Unknown lr_sch.* known names|too few for"
    ):
        SubspaceSAETrainer(recipe(**settings), topk(), iter(()))


def test_a_runners_config_is_refused():
    with pytest.raises(SaesubError, match="to_sae_trainer_config"):
        SubspaceSAETrainer(SimpleNamespace(lr=1), topk(), iter(()))  # pyright: ignore


@pytest.mark.parametrize("number", [float, np.float32, np.int64])
def test_counts_that_are_whole_are_taken(tmp_path, number):
    counts = {"total_training_samples": number(320), "train_batch_size_samples": number(BATCH)}
    counts |= {"lr_warm_up_steps": number(2), "lr_decay_steps": number(2)}
    cfg = recipe(**counts, n_checkpoints=number(2), checkpoint_path=str(tmp_path))
    trainer = SubspaceSAETrainer(cfg, topk(), batches(), dead_window_tokens=number(64))
    trainer.fit()
    assert trainer.cfg.total_training_samples == 320
    assert isinstance(trainer.dead_window_tokens, int)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("window", [0, -5, 10.5, float("nan"), "64"])
def test_windows_that_cannot_be_are_refused(window):
    with pytest.raises(SaesubError, match="dead_window_tokens must be"):
        SubspaceSAETrainer(recipe(), topk(), iter(()), dead_window_tokens=window)


@pytest.mark.parametrize(
    ("warm_up", "decay", "ok"), [(20, 20, True), (20, 21, False), (41, 0, False)]
)
def test_phases_longer_than_the_run_are_said(warm_up, decay, ok):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cfg = recipe(lr_warm_up_steps=warm_up, lr_decay_steps=decay)
        SubspaceSAETrainer(cfg, topk(), iter(()))
    assert ["more than the 40 steps" in str(w.message) for w in caught] == [True] * (not ok)


def test_a_run_that_diverges_ends_in_a_sentence():
    with pytest.raises(SaesubError, match=r"loss became NaN or infinite before .* smaller lr"):
        SubspaceSAETrainer(recipe(lr=1e30, lr_warm_up_steps=0), topk(), batches()).fit()


# --- weights -------------------------------------------------------------------------------------


def with_nan(sae: TopKTrainingSAE) -> TopKTrainingSAE:
    with torch.no_grad():
        sae.W_dec[3, 2] = torch.nan
    return sae


def with_k(sae: TopKTrainingSAE, k: int) -> TopKTrainingSAE:
    sae.cfg.k = sae.activation_fn.k = k  # pyright: ignore
    return sae


def half_only(sae: TopKTrainingSAE) -> TopKTrainingSAE:
    sae.b_enc.data = sae.b_enc.data.bfloat16()
    return sae


UNFIT = {
    "float16": (lambda: topk(dtype="float16"), r"torch\.float16.* dtype='float32' .*autocast"),
    "bfloat16": (lambda: topk(dtype="bfloat16"), r"torch\.bfloat16.* dtype='float32'"),
    "one parameter": (lambda: half_only(topk()), r"b_enc is in torch\.bfloat16"),
    "NaN": (lambda: with_nan(topk()), "W_dec holds NaN"),
    "k": (lambda: with_k(topk(), D_SAE + 1), r"k must lie in 1\.\.64"),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_weights_that_cannot_be_trained_are_refused_by_every_trainer(fault):
    make, sentence = UNFIT[fault]
    with pytest.raises(SaesubError, match=sentence):
        SubspaceSAETrainer(recipe(), make(), iter(()))
    with join() as processes:
        for kind in (DataParallelSAETrainer, FeatureParallelSAETrainer):
            with pytest.raises(SaesubError, match=f"{sentence}|its weights are in torch"):
                kind(processes, recipe(), make(), lambda step: batches())


def test_another_k_than_the_saved_one_is_said():
    sae = topk()
    sae.cfg.k = 8
    with pytest.warns(UserWarning, match="activation function's k, 4, and is saved .* cfg, 8"):
        SubspaceSAETrainer(recipe(), sae, iter(()))


# --- batches -------------------------------------------------------------------------------------


def loader() -> Iterator[Any]:
    return iter(DataLoader(TensorDataset(X), batch_size=BATCH))


def in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


GIVEN = {
    "lists of one": loader,
    "tuples": lambda: ((x,) for x in batches()),
    "numpy": lambda: (x.numpy() for x in batches()),
    "float64": lambda: (x.double() for x in batches()),
    "float16": lambda: (x.half() for x in batches()),
    "of inference mode": lambda: map(in_inference_mode, batches()),
    "with gradients": lambda: (x.clone().requires_grad_() for x in batches()),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("normalised", ["none", "expected_average_only_in"])
def test_batches_in_other_forms_train_the_same(given, normalised):
    saes = [topk(normalize_activations=normalised) for _ in range(2)]
    SubspaceSAETrainer(recipe(10), saes[0], batches()).fit()
    SubspaceSAETrainer(recipe(10), saes[1], GIVEN[given]()).fit()
    SubspaceSAETrainer(recipe(1), topk(), iter(()), backend="dense").step(next(GIVEN[given]()))
    exact = given not in ("float16", "float64")
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 0.05, "atol": 0.01}
    torch.testing.assert_close(saes[1].state_dict(), saes[0].state_dict(), **tolerance)


BAD = {
    "dict": ({"x": X[:BATCH]}, "must be a tensor .* not a dict"),
    "pair": ([X[:BATCH], X[:BATCH]], "not a list of 2"),
    "integers": (torch.ones(BATCH, D_IN, dtype=torch.int64), "floating-point numbers, not"),
    "NaN": (torch.full((BATCH, D_IN), torch.nan), "NaN or infinite"),
    "width": (torch.ones(BATCH, D_IN + 1), "the SAE reads"),
    "contexts": (torch.ones(2, BATCH, D_IN), "the SAE reads"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("normalised", ["none", "expected_average_only_in", "covariance_whitening"])
def test_bad_batches_are_refused_in_training_and_where_scales_are_estimated(kind, normalised):
    batch, sentence = BAD[kind]
    sae = topk(normalize_activations=normalised)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with pytest.raises(SaesubError, match=sentence):
        SubspaceSAETrainer(recipe(), sae, iter([batch, batch])).fit()
    together = SubspaceSAETrainer(recipe(), sae, iter(()))
    with pytest.raises(SaesubError, match=sentence):
        train_together({"a": together}, lambda step: iter([{"site": batch}] * 2))
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


@pytest.mark.parametrize(
    ("scaling", "n"),
    [
        ("expected_average_only_in", BATCH),
        ("expected_average_only_in", 0),
        ("covariance_whitening", 0),
    ],
)
def test_a_scale_of_nothing_is_refused(scaling, n):
    sae, batch = topk(normalize_activations=scaling), torch.zeros(n, D_IN)
    with pytest.raises(SaesubError, match="empty or all zero"):
        SubspaceSAETrainer(recipe(), sae, itertools.repeat(batch)).fit()
    together = {"a": SubspaceSAETrainer(recipe(), sae, iter(()))}
    with pytest.raises(SaesubError, match="empty or all zero"):
        train_together(together, lambda step: itertools.repeat({"site": batch}))


def test_norms_beyond_float16_give_a_scale():
    sae = topk(normalize_activations="expected_average_only_in")
    large = (X[:BATCH] / X[:BATCH].abs().max() * 60_000).half()
    trainer = SubspaceSAETrainer(recipe(1), sae, itertools.repeat(large))
    scales, step = [], trainer.step
    trainer.step = lambda x: (scales.append(trainer.activation_scaler.scaling_factor), step(x))[1]
    trainer.fit()
    assert scales == [pytest.approx(D_IN**0.5 / large.float().norm(dim=1).mean().item())]
    scales.clear()
    other = topk(normalize_activations="expected_average_only_in")
    together = SubspaceSAETrainer(recipe(1), other, iter(()))
    train_together({"a": together}, lambda step: itertools.repeat({"site": large}))
    assert torch.equal(other.W_dec, sae.W_dec)


@pytest.mark.parametrize("scaling", ["expected_average_only_in", "covariance_whitening"])
def test_steps_by_hand_that_nobody_scaled_are_said(scaling):
    trainer = SubspaceSAETrainer(recipe(), topk(normalize_activations=scaling), iter(()))
    found = said(trainer, [BATCH, BATCH])
    assert len(found) == 1
    assert "fit estimates the scale" in found[0]


@pytest.mark.parametrize("n", [0, 3, 10])
@pytest.mark.parametrize("normalised", ["none", "expected_average_only_in"])
def test_a_provider_that_ends_says_how_far_it_came(n, normalised):
    sae = topk(normalize_activations=normalised)
    trained = n if normalised == "none" else max(0, n - 4)
    sentence = rf"ended after {n} batches, when {trained * BATCH} of 1,280 tokens .*itertools.cycle"
    trainer = SubspaceSAETrainer(recipe(), sae, iter(X.split(BATCH)[:n]))
    with pytest.raises(SaesubError, match=sentence):
        trainer.fit()
    with join() as processes:
        sliced = DataParallelSAETrainer(
            processes, recipe(), topk(), lambda step: iter(X.split(BATCH)[:n])
        )
        with pytest.raises(SaesubError, match=f"ended after {n} batches"):
            sliced.fit()


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_conditions_go_by_tokens_also_when_they_are_interrupted(tmp_path, size):
    def conditions() -> dict[str, SubspaceSAETrainer]:
        saes = {"topk": topk(normalize_activations="expected_average_only_in"), "l1": standard()}
        return {name: SubspaceSAETrainer(recipe(), sae, iter(())) for name, sae in saes.items()}

    def stream(start: int, stop: int | None = None) -> StoreBatches:
        cut_off = itertools.islice(batches(size), start, stop)
        return StoreBatches(({"site": x} for x in cut_off), "the same, though it ends before")

    whole, cut, resumed = conditions(), conditions(), conditions()
    train_together(whole, stream)
    n = -(-STEPS * BATCH // size)
    with pytest.raises(SaesubError, match="ended"):
        train_together(cut, lambda start: stream(start, n - 1), folder=tmp_path)
    starts = []
    train_together(resumed, lambda s: (starts.append(s), stream(s))[1], folder=tmp_path)
    assert 0 < starts[-1] < n
    for name, trainer in whole.items():
        assert trainer.lr_scheduler.last_epoch == trainer.n_training_samples // BATCH
        assert torch.equal(trainer.sae.W_dec, resumed[name].sae.W_dec)
        assert rate(trainer) == rate(resumed[name])


def _set(place: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda trainer: setattr(operator.attrgetter(place)(trainer), name, value)


BY_HAND = {
    "a frozen weight": _set("sae.b_dec", "requires_grad", False),
    "k of the activation function": _set("sae.activation_fn", "k", 5),
    "a weight": lambda t: t.sae.W_dec.data[3, 5].add_(1e-3),
    "the optimizer's rate": lambda t: t.optimizer.param_groups[0].update(lr=2e-3),
    "the window": lambda t: setattr(t, "dead_window_tokens", 999),
    "mitigations": lambda t: setattr(t, "mitigations", (GhostGradients(),)),
}
REPLACED = {
    "a hook": lambda sae: sae.hook_sae_acts_post.add_hook(lambda x, hook: x * 0),
    "a function": lambda sae: setattr(sae, "decode", lambda f: f),
    "the error": lambda sae: setattr(sae, "mse_loss_fn", lambda x, y: (x - y).abs()),
}


@pytest.mark.parametrize("edit", BY_HAND.values(), ids=BY_HAND)
def test_what_decides_a_run_is_in_the_name_of_what_is_kept_of_it(edit):
    def name(edit: Callable[[Any], Any] = lambda trainer: None, batch: Tensor = X[:BATCH]) -> str:
        trainer = SubspaceSAETrainer(recipe(), topk(), iter(()))
        edit(trainer)
        return _fingerprint({"a": trainer}, {"a": "site"}, lambda step: iter([{"site": batch}] * 9))

    assert name() == name()
    assert name(edit) != name()
    assert name(batch=X[1 : BATCH + 1]) != name()


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_a_run_that_no_hash_tells_apart_is_not_kept(tmp_path, replace):
    sae = standard()
    replace(sae)
    conditions = {"a": SubspaceSAETrainer(recipe(), sae, iter(()))}
    with pytest.raises(SaesubError, match="hooks, replaced functions"):
        train_together(conditions, lambda step: itertools.repeat({"site": X[:8]}), folder=tmp_path)


@pytest.mark.parametrize("kind", [DataParallelSAETrainer, FeatureParallelSAETrainer])
@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_processes_go_by_tokens(tmp_path, kind, size):
    """Also after a resume, for which the batches are those of the step that was reached."""
    cfg = recipe(checkpoint_path=str(tmp_path), n_checkpoints=2)
    alone = SubspaceSAETrainer(recipe(), topk(), batches(size), backend="torch")
    alone.fit()
    with join() as processes:
        n = -(-STEPS * BATCH // size)
        first = kind(processes, cfg, topk(), lambda s: itertools.islice(batches(size), n - 1))
        with pytest.raises(SaesubError, match="ended"):
            first.fit()
        starts = []
        second = kind(
            processes, cfg, topk(), lambda s: (starts.append(s), batches_from(size, s))[1]
        )
        second.fit()
    assert 0 < starts[0] < n
    assert second.n_training_steps == alone.n_training_steps == n
    assert rate(second) == rate(alone)
    torch.testing.assert_close(second.sae.W_dec, alone.sae.W_dec, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [1, 3])
def test_batches_of_conditions_that_end_say_how_far_they_came(n):
    conditions = {"a": SubspaceSAETrainer(recipe(), topk(), iter(()))}
    with pytest.raises(SaesubError, match=f"ended after {n} batches, when {n * BATCH} of 1,280"):
        train_together(conditions, lambda step: ({"site": x} for x in X.split(BATCH)[:n]))


def test_a_run_goes_on_with_another_provider():
    whole, parts = topk(), topk()
    SubspaceSAETrainer(recipe(), whole, batches()).fit()
    trainer = SubspaceSAETrainer(recipe(), parts, itertools.islice(batches(), 15))
    with pytest.raises(SaesubError, match="ended"):
        trainer.fit()
    trainer.data_provider = itertools.islice(batches(), 15, None)
    trainer.fit()
    assert torch.equal(whole.W_dec, parts.W_dec)


@pytest.mark.parametrize(
    ("batches_of", "settings", "sentence"),
    [
        (lambda step: iter(()), {}, r"\{site: \(batch, d_in\)\}.* not of NoneType"),
        (lambda step: batches(), {}, "not of Tensor"),
        (batches(), {}, "function of a step's number"),
        (lambda step: iter([{"b": X[:BATCH]}]), {"sites": {"a": "c"}}, r"sites \['b'\], and no"),
        (
            lambda step: iter([{"b": X[:BATCH]}]),
            {"sites": {"x": "b"}},
            "sites names the conditions",
        ),
        (lambda step: iter([{"b": X[:BATCH]}]), {"n_checkpoints": 2.5}, "n_checkpoints must be"),
    ],
)
def test_batches_of_conditions_that_cannot_be(batches_of, settings, sentence):
    conditions = {"a": SubspaceSAETrainer(recipe(), topk(), iter(()))}
    with pytest.raises(SaesubError, match=sentence):
        train_together(conditions, batches_of, **settings)
    with pytest.raises(SaesubError, match="no conditions"):
        train_together({}, batches_of)


@pytest.mark.parametrize("given", [batches(), [X], lambda step: [X]])
def test_batches_of_several_processes_are_a_function_of_the_step(given):
    with join() as processes, pytest.raises(SaesubError, match=r"function of a|an iterator of"):
        DataParallelSAETrainer(processes, recipe(), topk(), given)


# --- checkpoints ---------------------------------------------------------------------------------


def saved(folder: Path, sae: Any, size: int = BATCH, steps: int = 10, **settings: Any) -> Any:
    trainer = SubspaceSAETrainer(recipe(**settings), sae, iter(()))
    for x in itertools.islice(batches(size), steps):
        trainer.step(x)
        trainer.n_training_steps += 1
    trainer.save_checkpoint("here", folder)
    return trainer


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_run_is_the_uninterrupted_one_whatever_size_batches_have(tmp_path, kind, size):
    """Also where nobody loads the weights beside the trainer's state."""
    whole = SubspaceSAETrainer(recipe(200), MAKERS[kind](), iter(()))
    for x in itertools.islice(batches(size), 20):
        whole.step(x)
    saved(tmp_path, MAKERS[kind](), size, steps=12, total_training_samples=200 * BATCH)
    torch.manual_seed(9)
    second = SubspaceSAETrainer(recipe(200), MAKERS[kind](), iter(()))
    second.load_trainer_state(tmp_path / "here")
    assert second.n_training_steps == 12
    for x in itertools.islice(batches(size), 12, 20):
        second.step(x)
    torch.testing.assert_close(
        [list(point.values()) for point in second.history],
        [list(point.values()) for point in whole.history],
        equal_nan=True,
        rtol=0,
        atol=0,
    )
    for name, value in second.sae.state_dict().items():
        assert torch.equal(value, whole.sae.state_dict()[name]), name
    assert (rate(second), coefficients(second)) == (rate(whole), coefficients(whole))


def test_weights_that_cannot_be_restored_are_named(tmp_path):
    theirs = SAETrainer(recipe(), topk(), iter(()))
    theirs.step(X[:BATCH])
    theirs.save_checkpoint("here", tmp_path)  # which has no checksums
    (tmp_path / "here" / "sae_weights.safetensors").write_bytes(b"no weights")
    trainer = SubspaceSAETrainer(recipe(), topk(), iter(()), optimizer="adam")
    with pytest.raises(SaesubError, match=r"The weights in .* are damaged"):
        trainer.load_trainer_state(tmp_path / "here")


@pytest.mark.parametrize("size", [BATCH // 2, 4 * BATCH])
@pytest.mark.parametrize("decay", [0, 10])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_continued_with_another_batch_size_is_at_the_same_token(tmp_path, size, decay):
    saved(tmp_path, standard(), steps=4, lr_decay_steps=decay, lr_warm_up_steps=0)
    cfg = recipe(train_batch_size_samples=size, lr_decay_steps=decay, lr_warm_up_steps=0)
    second = SubspaceSAETrainer(cfg, standard(), iter(()))
    second.load_trainer_state(tmp_path / "here")
    steps = 4 * BATCH // size
    assert second.lr_scheduler.last_epoch == steps
    assert [s.current_step for s in second.coefficient_schedulers.values()] == [steps]
    assert coefficients(second) == [2.0 * min(1, steps / 8)]


def test_a_checkpoint_in_the_scale_of_training_says_so(tmp_path):
    sae = topk(normalize_activations="expected_average_only_in")
    cfg = recipe(n_checkpoints=1, checkpoint_path=str(tmp_path), save_final_checkpoint=True)
    SubspaceSAETrainer(cfg, sae, (5 * x for x in batches())).fit()
    final, middle = sorted(tmp_path.iterdir(), key=lambda path: path.name, reverse=True)
    scaled = SAE.load_from_disk(middle)
    factor = scaled.cfg.metadata.activations_scaled_by
    assert factor == pytest.approx(D_IN**0.5 / (5 * X[: 4 * BATCH].norm(dim=1).mean().item()))
    assert str(factor) in (middle / "saesub_checkpoint.txt").read_text()
    assert "activations_scaled_by" not in SAE.load_from_disk(final).cfg.metadata
    assert "activations_scaled_by" not in sae.cfg.metadata
    assert "scaled" not in (final / "saesub_checkpoint.txt").read_text()
    resumed = topk(normalize_activations="expected_average_only_in")
    trainer = SubspaceSAETrainer(recipe(), resumed, batches())
    trainer.load_trainer_state(middle)
    trainer.data_provider = (5 * x for x in itertools.islice(batches(), 4 + 21, None))
    trainer.fit()
    assert torch.equal(resumed.W_dec, sae.W_dec)
    assert "activations_scaled_by" not in resumed.cfg.metadata


def test_an_sae_in_training_says_that_its_input_is_whitened(tmp_path):
    sae = topk(normalize_activations="covariance_whitening")
    cfg = recipe(n_checkpoints=1, checkpoint_path=str(tmp_path))
    SubspaceSAETrainer(cfg, sae, batches()).fit()
    (middle,) = tmp_path.iterdir()
    found = SAE.load_from_disk(middle).cfg.metadata.activations_scaled_by
    assert found == "covariance_whitening"


def test_a_refusal_to_resume_says_how_to_go_on(tmp_path):
    saved(tmp_path, topk())
    other = SubspaceSAETrainer(recipe(), topk(k=5), iter(()))
    with pytest.raises(SaesubError, match=r"into the SAE of a new trainer.*load_weights_from"):
        other.load_trainer_state(tmp_path / "here")
