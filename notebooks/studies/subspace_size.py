"""Dead features and FVU by the dimension of the initial subspace, over sites and two models.

    python notebooks/studies/subspace_size.py

Writes data/results/studies/subspace_size.json. 4,096 features; at each hook point the learning rate
is the one that fits best with a random initialisation, of four or more. Eight dimensions, from 0.02
to 1 of the width, and "auto"; one seed, three at the attention output in the middle of the first
model. `d_init_share` is the dimension as a share of the width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from protocol import SMALL, Trial, outcome, run, site_of, sweep

import saesub

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
WIDTHS = {"smollm2-135m": 576, "gemma3-270m": 640}

# Not Gemma's residual stream: its values are too large for float16, the store's type.
PLACES = [
    ("smollm2-135m", "blocks.12.hook_attn_out"),
    ("smollm2-135m", "blocks.21.hook_attn_out"),
    ("smollm2-135m", "blocks.6.hook_attn_out"),
    ("smollm2-135m", "blocks.12.hook_mlp_out"),
    ("smollm2-135m", "blocks.12.hook_resid_post"),
    ("gemma3-270m", "blocks.9.hook_attn_out"),
    ("gemma3-270m", "blocks.14.hook_attn_out"),
]


def with_dimension(trial: Trial) -> dict[str, Any]:
    """The trial's outcome, and its dimension as a share of the width."""
    spectrum = site_of(trial).spectrum
    d_init = spectrum.d if trial.start == "random" else trial.d_init
    if d_init == "auto":
        d_init = saesub.choose_d_init(spectrum)
    return outcome(trial) | {"d_init_share": float(d_init) / spectrum.d}


def place(model: str, hook: str) -> None:
    """Choose the rate of a hook point, and train all dimensions at it."""
    random = Trial(hook, "random", model=model, **SMALL)
    rate = sweep("subspace_size", [random], n_seeds=1, outcome=with_dimension)
    lr = rate[replace(random, lr=0.0)]
    sizes = [round(share * WIDTHS[model]) for share in SHARES]
    n_seeds = 3 if (model, hook) == PLACES[0] else 1
    trials = [
        Trial(hook, "subspace", d_init=d_init, lr=lr, seed=seed, model=model, **SMALL)
        for seed in range(n_seeds)
        for d_init in (*sizes, "auto")
    ]
    run("subspace_size", trials, with_dimension)


if __name__ == "__main__":
    for model, hook in PLACES:
        place(model, hook)
