"""Two causes of dead features, an offset and a low rank: which explains what?

    python notebooks/studies/offset.py

Writes data/results/studies/offset.json. At 18 sites, three kinds of them in three models on two
texts (`regimes.py`), a 2 × 2: the bias at zero, as SAELens makes it, or at the mean; directions at
random or in the subspace. Besides, the bias at the geometric median (Simon, Adams and Zou 2026,
arXiv 2605.31518), also with the subspace. 2,048 features, 4,000 firings of each in training, Adam,
every cell at the same two learning rates, so that no cell's rate is chosen by its deaths; three
seeds. A norm is fitted in each cell, to the bias that it has.

Each row has `offset`, which is γ = ‖mean‖ / ‖standard deviation‖, `rank` (at 99 % of the variance)
and `effective_rank` (of the variances) as shares of the width, and `inside`, the share of an
isotropic direction that lies in the subspace, which is d_init / d.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import protocol
from protocol import Site, Trial, judged, run, site_of, train, untrained
from regimes import FIRINGS, MODELS, SIZES, TEXTS, InRegime, Regime, hook
from sae_lens import TopKTrainingSAE

import saesub

RATES = (1e-3, 4e-3)
N_SEEDS = 3
CENTRES = ("zero", "mean", "geometric median")


@dataclass(frozen=True)
class Centred(InRegime):
    """A trial whose decoder bias begins at `centre`."""

    centre: str = "mean"


def set_start(sae: TopKTrainingSAE, trial: Centred, at: Site) -> None:
    """Directions as the trial has them, the bias at its centre, the norm fitted to both."""
    protocol.set_start(sae, trial, at)
    protocol.move_bias(sae, trial.centre, at)


def outcome(trial: Centred) -> dict[str, Any]:
    """Train and judge one SAE; what was known of its site before."""
    at = site_of(trial)
    sae, spectrum = untrained(trial, at, set_start), at.spectrum
    norm = sae.W_dec.detach().norm(dim=1).mean().item()
    train(trial, sae, at)
    return judged(trial, sae, at) | {
        "norm_at_start": norm,
        **protocol.known_before(spectrum),
        "inside": saesub.choose_d_init(spectrum) / spectrum.d,
    }


def trials(model: int) -> list[Trial]:
    """All cells at all sites of a model."""
    found = []
    for text, site, centre, start, lr in product(
        range(2), range(3), CENTRES, ("random", "subspace"), RATES
    ):
        regime = Regime(MODELS[model], TEXTS[text], hook(model, text, site), *SIZES[0], FIRINGS[0])
        condition = ("ASI" if start == "subspace" else "random") + f", bias at {centre}"
        trial = regime.trial(start, lr=lr, condition=condition)
        found.append(Centred(**{**vars(trial), "centre": centre}))
    return found


if __name__ == "__main__":
    for seed, model in product(range(N_SEEDS), range(len(MODELS))):
        run("offset", [replace(trial, seed=seed) for trial in trials(model)], outcome)
