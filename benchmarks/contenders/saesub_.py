"""saesub on SAELens' default TopK SAE; `--variant` names the backend and the optimizer, and may add
asi, for an initialisation in the active subspace; or it is saelens-adam, the sparse SAE in SAELens'
own trainer."""

from __future__ import annotations

import sys

import harness
import numpy as np
import torch
from sae_lens import SAETrainer
from saelens_dense import stepper, trainer_config, untrained

from saesub.activations.spectrum import Spectrum
from saesub.init.subspace import initialize_in_subspace
from saesub.topk import cpu_library
from saesub.topk.sae import use_sparse_step
from saesub.training.trainer import SubspaceSAETrainer

VARIANT = sys.argv.pop(sys.argv.index("--variant") + 1)
sys.argv.remove("--variant")
PATH, OPTIMIZER, *START = VARIANT.split("-")  # saelens, torch or native; adam or sparse_adam; asi


def make(d_in: int, d_sae: int, k: int, batch: int, seed: int) -> harness.Step:
    """One step of saesub's TopK training on x (batch, d_in)."""
    if PATH != "torch" and cpu_library.library() is None:
        raise RuntimeError("there is no compiled step here")
    sae = untrained(d_in, d_sae, k, seed)
    if START:
        rows = np.load(sys.argv[sys.argv.index("--activations") + 1], mmap_mode="r")
        spectrum = Spectrum.from_activations(torch.from_numpy(np.array(rows)))
        initialize_in_subspace(sae, spectrum)
    if PATH == "saelens":
        return stepper(SAETrainer(trainer_config(batch), use_sparse_step(sae), iter(())))
    backend = {"torch": "torch", "native": "auto"}[PATH]
    cfg = trainer_config(batch)
    trainer = SubspaceSAETrainer(cfg, sae, iter(()), optimizer=OPTIMIZER, backend=backend)
    return stepper(trainer)


if __name__ == "__main__":
    harness.main(f"saesub-{VARIANT}", make, package="saesub")
