"""Weights & Biases through SAELens' logger: real runs, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

from saesub.training.trainer import SubspaceSAETrainer

N_STEPS, BATCH, WINDOW = 6, 64, 64


def trainer(logger: LoggingConfig | None, **settings: Any) -> SubspaceSAETrainer:
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=64, k=2))
    cfg = SAETrainerConfig(
        total_training_samples=N_STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        **({"logger": logger} if logger else {}),
    )
    batches = (torch.randn(BATCH, 8) for _ in range(N_STEPS))
    return SubspaceSAETrainer(cfg, sae, batches, **{"dead_window_tokens": WINDOW, **settings})


def summary(run: SubspaceSAETrainer, folder: Path) -> dict[str, Any]:
    """The last logged values of a fit, as an offline run of Weights & Biases holds them."""
    settings = wandb.Settings(mode="offline", silent=True)
    with wandb.init(project="test", dir=folder, settings=settings) as kept:
        run.fit()
        kept.log({"done": True})  # a step is complete when the next one begins
        found = dict(kept.summary)
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    return found


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_a_run_gets_loss_and_the_dead_share_by_tokens(tmp_path: Path, backend: str) -> None:
    run = trainer(LoggingConfig(wandb_log_frequency=1), backend=backend)
    found = summary(run, tmp_path)
    last = run.history[-1]
    assert found["details/n_training_samples"] == last["tokens"] == N_STEPS * BATCH
    assert found["losses/mse_loss"] == pytest.approx(last["mse"], rel=1e-5)
    assert found["losses/overall_loss"] >= found["losses/mse_loss"]
    assert found["metrics/l0"] == pytest.approx(2, abs=0.2)
    assert found["sparsity/dead_share"] == last["dead_share"] == run.dead_fraction()
    assert 0 < last["dead_share"] < 1


def test_no_dead_share_before_a_window_was_seen(tmp_path: Path) -> None:
    run = trainer(LoggingConfig(wandb_log_frequency=1), dead_window_tokens=N_STEPS * BATCH + 1)
    found = summary(run, tmp_path)
    assert "metrics/explained_variance" in found
    assert "sparsity/dead_share" not in found


def test_nothing_is_logged_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb, "log", lambda *_, **__: pytest.fail("something was logged"))
    trainer(None).fit()
    assert wandb.run is None
    assert list(tmp_path.iterdir()) == []
