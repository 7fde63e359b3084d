"""Dictionaries as wide as two CPU cores allow: starts and optimizers at 2^13 to 2^17 features.

    python notebooks/studies/wide.py

Writes data/results/studies/wide.json, one SAE after another on one core. Every arm of every width
gets the same 614,400 tokens, 300 steps and rate, so that the width alone differs. Two windows:
`dead_share` is of the trained SAE over the 60,000 held-out tokens, on which a feature of the widest
dictionary fires fifteen times on average: rare features count as dead. `dead_in_training` is over
the last 245,760 tokens of training: features that died within them do not.
"""

from __future__ import annotations

from dataclasses import asdict

from trials import Trial, package_start, run, site, trained

import saesub

HOOK = "blocks.12.hook_attn_out"
BATCH, STEPS = 2048, 300
WINDOW_IN_TRAINING = 120 * BATCH
WIDTHS = [2**13, 2**15, 2**17]
ARMS = [
    (start, optimizer)
    for optimizer in ("adam", "sparse_adam")
    for start in ("random", "flat", "whitened_data")
]
TRIALS = [
    Trial(HOOK, start, "auto", optimizer, d_sae=d_sae, n_train=STEPS * BATCH, batch_size=BATCH)
    for d_sae in WIDTHS
    for start, optimizer in ARMS
]


def judged(trial: Trial, window_in_training: int = WINDOW_IN_TRAINING) -> dict:
    """The trial's two dead shares, its FVU and its history."""
    trainer = trained(trial, package_start, window_in_training)
    train, held_out, _, _ = site(trial.model, trial.hook_name, trial.corpus)
    x = held_out.rows(0, held_out.n_tokens)
    silent = trainer.tokens_since_fired >= window_in_training
    return asdict(trial) | {
        "epochs": trial.n_train / train.n_tokens,
        "window": held_out.n_tokens,
        "dead_share": saesub.dead_features(trainer.sae, x, n_tokens=len(x)).float().mean().item(),
        "dead_in_training": silent.float().mean().item(),
        "fvu": saesub.reconstruction(trainer.sae, x.split(1024)).fvu,
        "history": trainer.history,
    }


if __name__ == "__main__":
    run("wide", TRIALS, judged, n_workers=1)
