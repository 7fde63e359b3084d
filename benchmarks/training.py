"""SAEs that are trained for the benchmarks of recall."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig

import saesub
from saesub.training.trainer import SubspaceSAETrainer

K, N_SPECTRUM = 32, 100_000
KINDS = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
}


def trained(
    store: saesub.ActivationStore,
    start: str,
    kind: str,
    d_sae: int,
    batch: int,
    steps: int,
    *,
    optimizer: str = "adam",
    **search: Any,
) -> SubspaceSAETrainer:
    """The trainer of an SAE trained with the random start or that in the active subspace;
    `search` is as in `saesub.use_sparse_step`."""
    torch.manual_seed(0)
    spectrum = saesub.Spectrum.from_activations(store.rows(0, N_SPECTRUM))
    make, config = KINDS[kind]
    sae = make(
        config(
            d_in=spectrum.d,
            d_sae=d_sae,
            k=K,
            decoder_init_norm=1.0,
            aux_loss_coefficient=0.0,
            normalize_activations="expected_average_only_in",
        )
    )
    saesub.center_biases(sae, spectrum)
    if start == "subspace":
        saesub.initialize_in_subspace(sae, spectrum)
    else:
        saesub.fit_norm(sae, spectrum)
    settings = SAETrainerConfig(
        total_training_samples=batch * steps,
        train_batch_size_samples=batch,
        lr=1e-3,
        lr_end=1e-4,
        n_batches_for_norm_estimate=20,
        device="cpu",
    )
    sae, batches = saesub.use_sparse_step(sae, **search), store.batches(batch, seed=0)
    trainer = SubspaceSAETrainer(settings, sae, batches, optimizer=optimizer)  # pyright: ignore
    trainer.fit()
    return trainer
