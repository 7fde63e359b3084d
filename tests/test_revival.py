"""The count of revived features: against a count by hand, and without an effect on training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

from saesub.errors import SaesubError
from saesub.reproduce.revival import RevivalCount
from saesub.training.mitigations import GhostGradients, Resampling
from saesub.training.trainer import SubspaceSAETrainer

BATCH, STEPS, D, D_SAE = 64, 60, 12, 96
WINDOW = 6 * BATCH


def _trained(*mitigations: Any, watch: Any = None) -> SubspaceSAETrainer:
    """An SAE whose rate is so high that features fall silent; `watch` sees each step."""
    torch.manual_seed(0)
    cfg = TopKTrainingSAEConfig(d_in=D, d_sae=D_SAE, k=3, aux_loss_coefficient=0.0)
    plan = SAETrainerConfig(
        total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=2e-2, lr_end=2e-2
    )
    sae = TopKTrainingSAE(cfg)
    trainer = SubspaceSAETrainer(
        plan,
        sae,
        iter(()),
        optimizer="adam",
        dead_window_tokens=WINDOW,
        mitigations=mitigations,
        backend="torch",
    )
    x = torch.randn(STEPS * BATCH, D, generator=torch.Generator().manual_seed(1))
    for batch in x.split(BATCH):
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        if watch:
            watch(trainer, output)
    return trainer


def _fired(trainer: SubspaceSAETrainer, output: Any) -> torch.Tensor:
    return (output.feature_acts.to_dense() > 0).any(0)


@pytest.mark.parametrize(
    "other", [(), (Resampling(every_tokens=15 * BATCH, until=0.9, n_batches=2),)]
)
def test_it_counts_what_firing_by_itself_says(other):
    silent_for, silent, revived, once = torch.zeros(4, D_SAE, dtype=torch.int64)

    def watch(trainer, output):
        nonlocal silent_for, silent, revived, once
        fired = _fired(trainer, output)
        revived |= silent & fired
        silent_for = torch.where(fired, 0, silent_for + BATCH)
        silent = silent * ~fired | (silent_for >= WINDOW)
        once |= silent

    count = RevivalCount()
    trainer = _trained(count, *other, watch=watch)
    found = count.found(trainer)
    assert 0 < found["revived"] < found["silent_once"]
    assert 0 < found["stayed"] <= found["revived"]
    assert found["revived"] == int(revived.sum())
    assert found["silent_once"] == int(once.sum())


def test_training_is_as_without_it():
    for other in ((), (GhostGradients(),)):
        without, counted = _trained(*other), _trained(RevivalCount(), *other)
        for name, weight in without.sae.named_parameters():
            assert torch.equal(weight, dict(counted.sae.named_parameters())[name])


def test_a_run_without_steps_has_revived_nothing():
    trainer = SimpleNamespace(mitigation_state={})
    assert RevivalCount().found(trainer) == {"silent_once": 0, "revived": 0, "stayed": 0}


def test_it_must_come_first():
    with pytest.raises(SaesubError, match="make it the first"):
        _trained(Resampling(every_tokens=15 * BATCH, n_batches=2), RevivalCount())
