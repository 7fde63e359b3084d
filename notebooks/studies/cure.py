"""Does Active Subspace Initialization cure, at which rate, and what does SparseAdam add?

    python notebooks/studies/cure.py

Writes data/results/studies/cure.json. Random and subspace initialisation under Adam and SparseAdam
at an attention output in the middle of the model, with 8,192 features, and with 4,096 features in
half as many tokens. With 4,096 features also both initialisations under Adam without momentum
(β₁ = 0), random ones under SparseAdam with β₁ = 0.5, and rows at whitened data points. Each
condition is trained at four learning rates a factor of two apart, and further where the best is at
an edge. The two initialisations under the two optimizers have three seeds at every rate, the others
at the rates that fit as well as their best. All but the whitened have three seeds also at the two
rates that are best for the two initialisations under Adam. quality.py has a first and a late
attention output.
"""

from dataclasses import replace
from typing import Any

from protocol import SMALL, Trial, recorded, run, sweep, trial_of

MIDDLE = "blocks.12.hook_attn_out"


def four(**size: Any) -> list[Trial]:
    """Two initialisations under two optimizers."""
    return [
        Trial(MIDDLE, start, optimizer, **size)
        for optimizer in ("adam", "sparse_adam")
        for start in ("random", "subspace")
    ]


def study(conditions: list[Trial], whole: int) -> None:
    """Sweep the conditions, and train all at the rates that are best for the first two of them; the
    first `whole` of them with three seeds at every rate."""
    best = sweep("cure", conditions)
    rates = dict.fromkeys(best[replace(c, lr=0.0)] for c in conditions[:2])
    trials = [replace(c, lr=lr) for lr in rates for c in conditions]
    trials += [
        t for row in recorded("cure") if replace(t := trial_of(row), lr=1e-3) in conditions[:whole]
    ]
    run("cure", [replace(t, seed=seed) for seed in range(3) for t in trials])


# Without momentum SparseAdam is Adam: a feature without a gradient stands still in both.
MOMENTA = [
    *(Trial(MIDDLE, start, beta1=0.0, **SMALL) for start in ("random", "subspace")),
    Trial(MIDDLE, "random", "sparse_adam", beta1=0.5, **SMALL),
]
WHITENED = [
    Trial(MIDDLE, "whitened_data", optimizer, **SMALL) for optimizer in ("adam", "sparse_adam")
]

if __name__ == "__main__":
    study(four(), whole=4)
    study([*four(**SMALL), *MOMENTA], whole=4)
    sweep("cure", WHITENED)
