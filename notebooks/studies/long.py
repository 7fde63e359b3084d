"""Train a dictionary as wide, relative to its site, as the paper's, for long on two cores.

    python notebooks/studies/long.py

Writes data/results/studies/long.json. The paper's widest dictionaries have 2^20 features for 4,096
dimensions, 256 per dimension; 2^17 for SmolLM2's 576 are 228 per dimension. Every condition gets
the same 2,048,000 training tokens, each twice, and is judged over 512,000 held-out ones, on which a
feature fires 125 times on average: `dead_share`. `dead_in_training` is over the last 1,024,000
training tokens. The paper's four conditions come first, then both initialisations under Adam at
lower rates.
"""

from __future__ import annotations

from functools import partial

from trials import run
from wide import BATCH, judged, long_trial

D_SAE, STEPS = 2**17, 1000
WINDOW_IN_TRAINING = 500 * BATCH
CONDITIONS = [
    ("random", "adam", 2e-3),
    ("flat", "adam", 2e-3),
    ("random", "sparse_adam", 2e-3),
    ("flat", "sparse_adam", 2e-3),
    ("random", "adam", 1e-3),
    ("flat", "adam", 1e-3),
    ("random", "adam", 5e-4),
    ("flat", "adam", 5e-4),
]
TRIALS = [long_trial(*condition, D_SAE, STEPS) for condition in CONDITIONS]

if __name__ == "__main__":
    run("long", TRIALS, partial(judged, window_in_training=WINDOW_IN_TRAINING))
