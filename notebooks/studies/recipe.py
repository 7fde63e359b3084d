"""Does one recipe, applied by hand and without a sweep, beat what a sweep finds?

    python notebooks/studies/recipe.py baselines smollm2-135m gemma3-270m
    python notebooks/studies/recipe.py recipe smollm2-135m gemma3-270m

Writes data/results/studies/baselines.json and recipe.json. In each regime of `regimes.py` three
baselines, each at its own best learning rate: random directions under Adam, the subspace under Adam
and the subspace under SparseAdam, all with the bias at the mean, the fitted norm and the schedule
of `protocol.py`; four rates, further where the best is at an edge. Beside them a first candidate
for the recipe, swept as well: whitened tokens of the data, SparseAdam, and a rate that falls to
zero over all steps but the first twentieth. It is not final: where the effective rank is lowest it
does not beat the baselines, and no claim is judged by it. The models are named, so that those that
the recipe is developed on come first.
"""

from __future__ import annotations

import sys
from typing import Any

from protocol import Trial, outcome, site_of, sweep
from regimes import REGIMES, Regime

BASELINES = (
    ("random", "adam", "random"),
    ("subspace", "adam", "ASI"),
    ("subspace", "sparse_adam", "ASI + SparseAdam"),
)


def baselines(regime: Regime) -> list[Trial]:
    """The three baselines of a regime."""
    return [
        regime.trial(start, optimizer, condition=condition)
        for start, optimizer, condition in BASELINES
    ]


def recipe(regime: Regime) -> Trial:
    """The first candidate in a regime, but for its rate."""
    return regime.trial("whitened_data", "sparse_adam", decay=0.95, condition="recipe")


def with_site(trial: Trial) -> dict[str, Any]:
    """The trial's outcome, and what was known of its site before."""
    spectrum = site_of(trial).spectrum
    return outcome(trial) | {
        "offset": (spectrum.mean.norm() / spectrum.eigenvalues.sum().sqrt()).item(),
        "rank": spectrum.rank_at(0.99) / spectrum.d,
        "effective_rank": spectrum.effective_rank("variance") / spectrum.d,
    }


if __name__ == "__main__":
    what, *models = sys.argv[1:]
    chosen = [regime for regime in REGIMES if regime.model in models]
    if what == "baselines":
        conditions = [trial for regime in chosen for trial in baselines(regime)]
        sweep("baselines", conditions, n_seeds=1, outcome=with_site)
    elif what == "recipe":
        conditions = [recipe(regime) for regime in chosen]
        sweep("recipe", conditions, (2e-3, 4e-3, 8e-3), n_seeds=1, outcome=with_site)
