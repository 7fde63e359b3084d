"""dictionary_learning's `TopKTrainer`: dense, AuxK on, decoder rows kept at unit norm, Adam."""

from __future__ import annotations

from itertools import count

import harness
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor


def make(d_in: int, d_sae: int, k: int, batch: int, seed: int) -> harness.Step:
    """`TopKTrainer.update`, which is all that `trainSAE` does with x (batch, d_in) on a CPU."""
    trainer = TopKTrainer(
        steps=1_000_000_000 // batch,
        activation_dim=d_in,
        dict_size=d_sae,
        k=k,
        layer=12,
        lm_name="smollm2-135m",
        device="cpu",
        seed=seed,
    )
    steps = count()

    def step(x: Tensor) -> None:
        trainer.update(next(steps), x)

    return step


if __name__ == "__main__":
    harness.main("dictionary-learning", make, package="dictionary-learning")
