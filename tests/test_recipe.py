"""The recipe: by hand the same, applied to SAELens' objects, withheld where it was not tried."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig

import saesub
from saesub.errors import SaesubError
from saesub.reproduce.in_regimes import in_regimes
from saesub.reproduce.studies import recorded
from saesub.training import recipe as recipes

D = 64


@pytest.fixture(autouse=True)
def small_activations(monkeypatch) -> None:
    """Those of the tests are narrower than the studies'."""
    monkeypatch.setitem(recipes.COVERED, "d_in", (32, 1792))


def _spectrum(high: bool = True) -> saesub.Spectrum:
    """Of Gaussian activations: flat, or with nearly all variance in one direction."""
    return saesub.Spectrum.from_activations(_activations(high))


def _activations(high: bool = True, n: int = 3000) -> torch.Tensor:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1.0 if high else 100.0
    return x + 0.2


def _cfg(**settings: Any) -> TopKTrainingSAEConfig:
    known: dict[str, Any] = {"d_in": D, "d_sae": 1024, "k": 32}
    return TopKTrainingSAEConfig(**known | settings)


def test_it_is_the_five_lines() -> None:
    recipe = saesub.recommend(_spectrum(), _cfg(), 64_000)
    assert (recipe.directions, recipe.optimizer, recipe.lr) == (
        "whitened_data",
        "sparse_adam",
        0.00283,  # 0.002 (250 / 62)^¼
    )
    assert (recipe.batch_size, recipe.warm_up_steps, recipe.decay_steps) == (1024, 3, 31)
    low = saesub.recommend(_spectrum(high=False), _cfg(), 64_000)
    assert (low.directions, low.lr) == ("flat", 0.00496)
    rates = [saesub.recommend(_spectrum(high), _cfg(), 256_000).lr for high in (True, False)]
    assert rates == [0.002, 0.0035]


def test_it_says_why() -> None:
    said = str(saesub.recommend(_spectrum(), _cfg(), 64_000))
    assert "2,000 times" in said  # 64,000 tokens × 32 / 1,024 features
    assert "This run has 62" in said
    assert said.count("\n- ") == 5
    low = str(saesub.recommend(_spectrum(high=False), _cfg(), 64_000))
    share = _spectrum(high=False).effective_rank("variance") / D
    assert f"Effective rank {100 * share:.1f} % of the width, below 5 %" in low


def test_it_is_applied_to_sae_and_config() -> None:
    sae, x = TopKTrainingSAE(_cfg()), _activations()
    cfg = SAETrainerConfig(total_training_samples=1, train_batch_size_samples=1, logger=_quiet())
    recipe = saesub.recommend(_spectrum(), sae.cfg, 64_000)
    done = recipe.apply(sae, cfg, x)
    assert done.directions == "whitened_data"
    assert sae.cfg.normalize_activations == "expected_average_only_in"
    assert sae.cfg.aux_loss_coefficient == 0
    assert (cfg.total_training_samples, cfg.train_batch_size_samples) == (64_000, 1024)
    assert (cfg.lr, cfg.lr_warm_up_steps, cfg.lr_decay_steps) == (0.00283, 3, 31)
    batches = iter([x[:1024]] * 62)
    trainer = saesub.SubspaceSAETrainer(cfg, sae, batches, optimizer=recipe.optimizer)
    rates = [trainer.lr_scheduler.get_last_lr()[0]]
    for _ in range(61):
        trainer.lr_scheduler.step()
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
    assert max(rates) == rates[31] == 0.00283
    assert rates[32] > rates[45] > rates[61] >= 0
    assert rates[61] < 1e-4


def test_it_is_applied_to_the_runners_config() -> None:
    cfg: Any = LanguageModelSAERunnerConfig(sae=_cfg(), training_tokens=1, logger=_quiet())
    sae = TopKTrainingSAE(_cfg())
    with pytest.warns(UserWarning, match="SAELens' runner trains with Adam"):
        saesub.recommend(_spectrum(), sae.cfg, 64_000).apply(sae, cfg, _activations())
    assert (cfg.training_tokens, cfg.train_batch_size_tokens) == (64_000, 1024)
    assert (cfg.lr, cfg.lr_end, cfg.lr_decay_steps) == (0.00283, 0.00283, 31)
    assert cfg.n_batches_for_norm_estimate == 20
    assert cfg.sae.normalize_activations == sae.cfg.normalize_activations
    assert cfg.sae.aux_loss_coefficient == sae.cfg.aux_loss_coefficient == 0


WITHHELD = {
    "TopK SAEs alone": (BatchTopKTrainingSAEConfig(d_in=D, d_sae=1024, k=32), 64_000),
    "width 32": (_cfg(d_in=32), 64_000),
    "one number": (_cfg(normalize_activations="layer_norm"), 64_000),
    "d_sae would be 512": (_cfg(d_sae=512), 64_000),
    "k would be 4,": (_cfg(k=4), 64_000),
    "d_sae / k would be 256": (_cfg(d_sae=8192), 64_000),
    "n_tokens would be 1,000, .* from 32,000 to 512,000": (_cfg(), 1000),
    "n_tokens would be 1,000,000, ": (_cfg(), 1_000_000),
    r"pass sae\.cfg": (TopKTrainingSAE(_cfg()), 64_000),
    "n_tokens must be": (_cfg(), -5),
}


@pytest.mark.parametrize("message", WITHHELD)
def test_it_is_withheld_where_it_was_not_tried(message) -> None:
    cfg, n_tokens = WITHHELD[message]
    with pytest.raises(SaesubError, match=message):
        saesub.recommend(_spectrum(), cfg, n_tokens)


def test_it_is_withheld_for_a_spectrum_that_counts_massive_tokens() -> None:
    counted = saesub.Spectrum.from_activations(_activations(), keep_massive=True)
    with pytest.raises(SaesubError, match="without massive tokens"):
        saesub.recommend(counted, _cfg(), 64_000)


def test_it_says_where_no_site_was_tried() -> None:
    def reason(variance: float) -> tuple[float, str]:
        x = _activations()
        x[:, 0] *= variance**0.5
        spectrum = saesub.Spectrum.from_activations(x)
        said = saesub.recommend(spectrum, _cfg(), 64_000)
        return spectrum.effective_rank("variance") / D, said.reasons[0]

    for variance in (1.0, 10_000.0):
        rank, said = reason(variance)
        assert not recipes.RANKS_TRIED[0] < rank < recipes.RANKS_TRIED[1]
        assert "at no site" not in said
    rank, said = reason(800.0)
    assert recipes.RANKS_TRIED[0] < rank < recipes.RANKS_TRIED[1]
    assert "It was tried at no site between 2.0% and 6.4%." in said


def test_it_is_withheld_at_widths_that_were_not_tried(monkeypatch) -> None:
    monkeypatch.undo()
    with pytest.raises(SaesubError, match="d_in would be 64, and the studies behind the recipe"):
        saesub.recommend(_spectrum(), _cfg(), 64_000)


def test_what_is_covered_is_a_factor_of_two_around_the_regimes() -> None:
    found = in_regimes()
    width = {"smollm2-135m": 576, "gemma3-270m": 640, "qwen2.5-coder-0.5b": 896}
    values = {
        "d_in": found["model"].map(width),
        "d_sae": found["d_sae"],
        "k": found["k"],
        "d_sae / k": found["d_sae"] / found["k"],
        "n_tokens": found["n_train"],
    }
    ranks = recorded("recipe").rows["effective_rank"]
    low = ranks < recipes.LOW_RANK
    nearest = (ranks[low].max(), ranks[~low].min())
    assert nearest == pytest.approx(recipes.RANKS_TRIED, abs=5e-4)
    covered = recipes.COVERED | {"d_in": (288, 1792)}
    for name, (least, most) in covered.items():
        assert (values[name].min() / 2, values[name].max() * 2) == (least, most)


def test_the_reasons_do_not_say_more_than_the_record() -> None:
    assert 0.06 < in_regimes()["above_least"].max() < 0.08
    assert (in_regimes()["above_least"] == 0).mean() > 0.5


def test_what_cannot_be_applied_changes_nothing() -> None:
    sae = TopKTrainingSAE(_cfg())
    before = sae.W_dec.clone()
    recipe = saesub.recommend(_spectrum(), sae.cfg, 64_000)
    cfg = SAETrainerConfig(total_training_samples=1, train_batch_size_samples=1, logger=_quiet())
    with pytest.raises(SaesubError, match="1,024 features need as many"):
        recipe.apply(sae, cfg, _activations(n=500))
    with pytest.raises(SaesubError, match="cfg is a dict"):
        recipe.apply(sae, {}, _activations())  # pyright: ignore[reportArgumentType]
    assert (cfg.lr, sae.cfg.normalize_activations) == (3e-4, "none")
    assert torch.equal(sae.W_dec, before)


def _quiet() -> LoggingConfig:
    return LoggingConfig(log_to_wandb=False)
