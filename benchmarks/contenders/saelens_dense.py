"""SAELens' `SAETrainer` on a TopK SAE as it comes: dense, AuxK on, Adam."""

from __future__ import annotations

from typing import Any

import harness
import torch
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor

LR = 2e-3


def trainer_config(batch: int) -> SAETrainerConfig:
    """Settings of a long run, `lr_end` as SAELens' runner sets it."""
    return SAETrainerConfig(
        total_training_samples=1_000_000_000,
        train_batch_size_samples=batch,
        lr=LR,
        lr_end=LR / 10,
    )


def untrained(d_in: int, d_sae: int, k: int, seed: int, **changes: Any) -> TopKTrainingSAE:
    """A TopK SAE of SAELens' default settings but for `changes`."""
    torch.manual_seed(seed)
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **changes))


def stepper(trainer: SAETrainer[Any, Any]) -> harness.Step:
    """What `SAETrainer.fit` does with each batch (batch, d_in)."""

    def step(x: Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def make(d_in: int, d_sae: int, k: int, batch: int, seed: int) -> harness.Step:
    """One step of SAELens' default TopK training on x (batch, d_in)."""
    sae = untrained(d_in, d_sae, k, seed)
    return stepper(SAETrainer(trainer_config(batch), sae, iter(())))


if __name__ == "__main__":
    harness.main("sae-lens", make, package="sae-lens")
