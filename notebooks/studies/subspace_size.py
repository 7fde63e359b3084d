"""Dead features and FVU by the dimension of the initial subspace, at three attention outputs.

    python notebooks/studies/subspace_size.py

Writes data/results/studies/subspace_size.json. 4,096 features; at each of them the learning rate
is the one that fits best with a random initialisation, of four or more. Eight dimensions, from 0.02
to 1 of the width, and "auto"; one seed, three at the attention output in the middle of the model.
`d_init_share` is the dimension as a share of the width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from protocol import SMALL, Trial, outcome, run, site_of, sweep

import saesub

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
WIDTH = 576
ATTENTION = "blocks.12.hook_attn_out"
PLACES = [ATTENTION, "blocks.21.hook_attn_out", "blocks.6.hook_attn_out"]


def with_dimension(trial: Trial) -> dict[str, Any]:
    """The trial's outcome, and its dimension as a share of the width."""
    spectrum = site_of(trial).spectrum
    d_init = spectrum.d if trial.start == "random" else trial.d_init
    if d_init == "auto":
        d_init = saesub.choose_d_init(spectrum)
    return outcome(trial) | {"d_init_share": float(d_init) / spectrum.d}


def place(hook: str) -> None:
    """Choose the rate of a hook point, and train all dimensions at it."""
    random = Trial(hook, "random", **SMALL)
    rate = sweep("subspace_size", [random], n_seeds=1, outcome=with_dimension)
    lr = rate[replace(random, lr=0.0)]
    sizes = [round(share * WIDTH) for share in SHARES]
    trials = [
        Trial(hook, "subspace", d_init=d_init, lr=lr, seed=seed, **SMALL)
        for seed in range(3 if hook == ATTENTION else 1)
        for d_init in (*sizes, "auto")
    ]
    run("subspace_size", trials, with_dimension)


if __name__ == "__main__":
    for hook in PLACES:
        place(hook)
