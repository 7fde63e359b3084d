"""Train dictionaries as wide as two CPU cores allow: 2^13 to 2^17 features.

    python notebooks/studies/wide.py

Writes data/results/studies/wide.json, one SAE after another on one core. The conditions are
initialisations and optimizers. Every condition of every width gets the same 614,400 tokens, 300
steps and rate, so that only the width differs. There are two windows. `dead_share` is of the
trained SAE over the 60,000 held-out tokens, on which a feature of the widest dictionary fires
fifteen times on average; rare features count as dead. `dead_in_training` is over the last 245,760
tokens of training; features that died within them do not count as dead.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from sae_lens import TopKTrainingSAE
from trials import Start, Trial, package_start, run, site, trained

import saesub

HOOK = "blocks.12.hook_attn_out"
BATCH, STEPS = 2048, 300
WINDOW_IN_TRAINING = 120 * BATCH
WIDTHS = [2**13, 2**15, 2**17]
CONDITIONS = [
    (start, optimizer)
    for optimizer in ("adam", "sparse_adam")
    for start in ("random", "flat", "whitened_data")
]
TRIALS = [
    Trial(HOOK, start, "auto", optimizer, d_sae=d_sae, n_train=STEPS * BATCH, batch_size=BATCH)
    for d_sae in WIDTHS
    for start, optimizer in CONDITIONS
]


def long_trial(start: str, optimizer: str, lr: float, d_sae: int, steps: int) -> Trial:
    """A trial at the same site on a mixture of English texts, which has more tokens."""
    sizes = {"d_sae": d_sae, "n_train": steps * BATCH, "batch_size": BATCH}
    return Trial(HOOK, start, "auto", optimizer, lr, corpus="english-mix", **sizes)


def judged(
    trial: Trial,
    window_in_training: int = WINDOW_IN_TRAINING,
    start: Start = package_start,
) -> dict:
    """The trial's two dead shares, its FVU and its history."""
    trainer = trained(trial, start, window_in_training)
    train, held_out, _, _ = site(trial.model, trial.hook_name, trial.corpus)
    silent = trainer.tokens_since_fired >= window_in_training
    dead_share, fvu = dead_share_and_fvu(trainer.sae, held_out.rows(0, held_out.n_tokens))
    return asdict(trial) | {
        "epochs": trial.n_train / train.n_tokens,
        "window": held_out.n_tokens,
        "dead_share": dead_share,
        "dead_in_training": silent.float().mean().item(),
        "fvu": fvu,
        "history": trainer.history,
    }


def dead_share_and_fvu(sae: TopKTrainingSAE, x: torch.Tensor) -> tuple[float, float]:
    """Both over the same tokens (n, d_in)."""
    found = saesub.judge(sae, x, n_tokens=len(x))
    return (found.counts == 0).double().mean().item(), found.fvu


if __name__ == "__main__":
    run("wide", TRIALS, judged, n_workers=1)
