"""OpenMOSS' llamascopium: its whole `Trainer.fit`, in float32 with Adam.

Left out are its metrics (on by default, meant for logging) and autocast (on by default: bfloat16,
which is slower on most CPUs).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import chain
from math import sqrt

import harness
import torch
from llamascopium import (
    Initializer,
    InitializerConfig,
    SAEConfig,
    SparseAutoEncoder,
    Trainer,
    TrainerConfig,
)
from torch import Tensor

SITE = "site"


def make(d_in: int, d_sae: int, k: int, batch: int, seed: int) -> harness.Step:
    """One round of the training loop on x (batch, d_in), whose mean norm must be sqrt(d_in)."""
    torch.manual_seed(seed)
    first = _labelled(torch.randn(batch, d_in))
    sae = _untrained(d_in, d_sae, k, first)
    trainer = Trainer(
        TrainerConfig(
            amp_dtype=torch.float32,
            skip_metrics_calculation=True,
            k_warmup_steps=0,
            n_checkpoints=0,
            exp_result_path=tempfile.mkdtemp(),
        )
    )

    def fit(batches: Iterator[Tensor]) -> None:
        # It takes one batch to learn the batch's size, and trains on those that follow.
        trainer.fit(sae, chain([first], map(_labelled, batches)))

    return harness.stepwise(fit)


def _untrained(d_in: int, d_sae: int, k: int, batch: dict[str, Tensor]) -> SparseAutoEncoder:
    config = SAEConfig(
        hook_point_in=SITE,
        hook_point_out=SITE,
        d_model=d_in,
        expansion_factor=d_sae / d_in,
        act_fn="topk",
        top_k=k,
    )
    if config.d_sae != d_sae:
        raise ValueError(f"{d_sae} features became {config.d_sae}: choose a multiple of {d_in}")
    return Initializer(InitializerConfig()).initialize_sae_from_config(
        config, activation_stream=[batch], activation_norm={SITE: sqrt(d_in)}
    )


def _labelled(x: Tensor) -> dict[str, Tensor]:
    """x (batch, d_in) with the token numbers and the mask that its activation streams carry."""
    tokens = torch.zeros(len(x), dtype=torch.long)
    return {SITE: x, "tokens": tokens, "mask": torch.ones_like(tokens)}


if __name__ == "__main__":
    harness.main("llamascopium", make, package="llamascopium")
