"""Does Active Subspace Initialization cure, at which rate, and what does SparseAdam add?

    python notebooks/studies/cure.py

Writes data/results/studies/cure.json. Random and subspace initialisation under Adam and SparseAdam
at an attention output in the middle of the model, with 8,192 features, and with 4,096 features in
half as many tokens, there also at a late attention output. With 4,096 features and in the middle,
also both initialisations under Adam without momentum (β₁ = 0), random ones under SparseAdam with
β₁ = 0.5, and rows at whitened data points. Each condition is trained at four learning rates a
factor of two apart, and further where the best is at an edge, and at its best rate with three
seeds; all but the whitened also at the two rates that are best for the two initialisations under
Adam.
"""

from dataclasses import replace
from typing import Any

from protocol import SMALL, Trial, run, sweep

MIDDLE, LATE = "blocks.12.hook_attn_out", "blocks.21.hook_attn_out"


def four(hook_name: str, **size: Any) -> list[Trial]:
    """Two initialisations under two optimizers."""
    return [
        Trial(hook_name, start, optimizer, **size)
        for optimizer in ("adam", "sparse_adam")
        for start in ("random", "subspace")
    ]


def study(conditions: list[Trial]) -> None:
    """Sweep the conditions, and train all at the rates that are best for the first two of them."""
    best = sweep("cure", conditions)
    rates = dict.fromkeys(best[replace(c, lr=0.0)] for c in conditions[:2])
    trials = [replace(c, lr=lr, seed=s) for lr in rates for s in range(3) for c in conditions]
    run("cure", trials)


# Without momentum SparseAdam is Adam: a feature without a gradient stands still in both.
MOMENTA = [
    *(Trial(MIDDLE, start, beta1=0.0, **SMALL) for start in ("random", "subspace")),
    Trial(MIDDLE, "random", "sparse_adam", beta1=0.5, **SMALL),
]
WHITENED = [
    Trial(MIDDLE, "whitened_data", optimizer, **SMALL) for optimizer in ("adam", "sparse_adam")
]

if __name__ == "__main__":
    study(four(MIDDLE))
    study([*four(MIDDLE, **SMALL), *MOMENTA])
    study(four(LATE, **SMALL))
    sweep("cure", WHITENED)
