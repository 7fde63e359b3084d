"""SAELens with the features as sparse tensors.

`rescale_acts_by_decoder_norm` is off: with it on, as by default, the backward pass of sparse
features fails on a CPU.
"""

from __future__ import annotations

import harness
from sae_lens import SAETrainer
from saelens_dense import stepper, trainer_config, untrained


def make(d_in: int, d_sae: int, k: int, batch: int, seed: int) -> harness.Step:
    """One step of SAELens' sparse TopK training on x (batch, d_in)."""
    sae = untrained(
        d_in, d_sae, k, seed, use_sparse_activations=True, rescale_acts_by_decoder_norm=False
    )
    return stepper(SAETrainer(trainer_config(batch), sae, iter(())))


if __name__ == "__main__":
    harness.main("sae-lens-sparse", make, package="sae-lens")
