"""Train the paper's headline width, 2^20 features, at SmolLM2's 576 dimensions, on two cores.

    python notebooks/studies/million.py

Writes data/results/studies/million.json: the paper's four conditions (random and active-subspace
initialisation under Adam and SparseAdam), and initialisations whose encoder is scaled as in
scaled.py, under the optimizer that works best with them there. The conditions run one after another
on both cores. Every condition gets the same 1,024,000 training tokens once, at the rate at which
both initialisations fit best at 2^17 under Adam (long.py), and is judged over 512,000 held-out
tokens, on which a feature fires 16 times on average. `dead_in_training` is over the last 512,000
training tokens.
"""

from __future__ import annotations

from functools import partial

from scaled import scaled_or_not
from trials import run
from wide import BATCH, long_trial

D_SAE, STEPS, LR = 2**20, 500, 1e-3
WINDOW_IN_TRAINING = 250 * BATCH
CONDITIONS = [
    ("random", "adam"),
    ("flat", "adam"),
    ("flat", "sparse_adam"),
    ("flat scaled", "sparse_adam"),
    ("random scaled", "sparse_adam"),
    ("random", "sparse_adam"),
]
TRIALS = [long_trial(*condition, LR, D_SAE, STEPS) for condition in CONDITIONS]

if __name__ == "__main__":
    run(
        "million",
        TRIALS,
        partial(scaled_or_not, window_in_training=WINDOW_IN_TRAINING),
        n_workers=1,
        n_threads=2,
    )
