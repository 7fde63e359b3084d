"""Does one recipe, applied without a sweep, beat three baselines that are swept?

    python notebooks/studies/recipe.py baselines smollm2-135m gemma3-270m
    python notebooks/studies/recipe.py recipe smollm2-135m gemma3-270m
    python notebooks/studies/recipe.py seeds qwen2.5-coder-0.5b
    python notebooks/studies/recipe.py refitted smollm2-135m
    python notebooks/studies/recipe.py parts smollm2-135m

Writes data/results/studies/baselines.json, recipe.json, refitted.json and parts.json. In each
regime of `regimes.py` three baselines, each at its own best learning rate: random directions under
Adam, the subspace under Adam and the subspace under SparseAdam, all with the bias at the mean, the
fitted norm and the schedule of `protocol.py`; four rates, further where the best is at an edge.

The recipe is what `saesub.recommend` says, at its rate and at the half and the double of it.
`fvu_unrefitted` is what it has before its last step, the refit of the decoder. The third command
adds two seeds to the recipe at its own rate and to the best baseline of each regime at its best.

The fourth gives the baselines the refit as well, swept with it, so that one sees what is the
refit's alone. The fifth, in the longer regimes, changes one part of the recipe at a time, at the
same three rates: the start (random, or in the subspace), Adam in place of SparseAdam, the fall of
the rate over the last fifth.

The models are named, so that those that the recipe is developed on come first.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import compress
from typing import Any

from protocol import (
    harvest,
    judged,
    known_before,
    recommended,
    recorded,
    run,
    site_of,
    sweep,
    train,
    trial_of,
    untrained,
)
from regimes import FIRINGS, REGIMES, InRegime, Regime

import saesub

BASELINES = (
    ("random", "adam", "random"),
    ("subspace", "adam", "ASI"),
    ("subspace", "sparse_adam", "ASI + SparseAdam"),
)
REFIT = " + refit"
FACTORS = (1.0, 0.5, 2.0)  # of the recipe's rate


def baselines(regime: Regime, suffix: str = "") -> list[InRegime]:
    """The three baselines of a regime, with a suffix to their names."""
    return [
        regime.trial(start, optimizer, condition=condition + suffix)
        for start, optimizer, condition in BASELINES
    ]


def parts(own: InRegime) -> list[InRegime]:
    """The recipe of a regime with one part at a time replaced by the baselines'."""
    changed: dict[str, dict[str, Any]] = {
        "random start": {"start": "random"},
        "subspace start": {"start": "subspace"},
        "Adam": {"optimizer": "adam"},
        "short fall": {"decay": InRegime.decay},
    }
    trials = [replace(own, condition=f"recipe, {part}", **new) for part, new in changed.items()]
    return [t for t in trials if replace(t, condition=own.condition) != own]


def best_baseline(regime: Regime) -> InRegime:
    """The recorded baseline that fits the regime's validation part best, with its first seed."""
    plain = [replace(trial, lr=0.0) for trial in baselines(regime)]
    rows = [r for r in recorded("baselines") if replace(trial_of(r, InRegime), lr=0.0) in plain]
    return trial_of(min(rows, key=lambda row: row["validation_fvu"]), InRegime)


def outcome(trial: InRegime) -> dict[str, Any]:
    """Train and judge one SAE, before and after a refit if it has one; what was known before."""
    at = site_of(trial)
    sae, spectrum = untrained(trial, at), at.spectrum
    train(trial, sae, at)
    row = judged(trial, sae, at)
    if trial.condition.startswith("recipe") or trial.condition.endswith(REFIT):
        before = {name + "_unrefitted": row[name] for name in ("fvu", "validation_fvu")}
        if row["validation_fvu"] < 1:  # else the rate was far too high, and a refit is refused
            saesub.refit_decoder(sae, at.blocks(0, trial.n_read), progress=False)
            row = judged(trial, sae, at)
        row |= before
    return row | known_before(spectrum)


if __name__ == "__main__":
    what, *models = sys.argv[1:]
    chosen = [regime for regime in REGIMES if regime.model in models]
    if what == "baselines":
        conditions = [trial for regime in chosen for trial in baselines(regime)]
        sweep("baselines", conditions, n_seeds=1, outcome=outcome)
    elif what == "refitted":
        conditions = [trial for regime in chosen for trial in baselines(regime, REFIT)]
        conditions.sort(key=lambda trial: trial.start == "random")  # which fits worst, last
        sweep("refitted", conditions, (1e-3, 2e-3, 4e-3), n_seeds=1, outcome=outcome)
    else:
        harvest([regime.trial("subspace") for regime in chosen])
        spectra = [site_of(regime.trial("subspace")).spectrum for regime in chosen]
        own = [
            recommended(regime.trial("subspace", condition="recipe"), spectrum)
            for regime, spectrum in zip(chosen, spectra, strict=True)
        ]
        if what == "seeds":
            best = [best_baseline(regime) for regime in chosen]
            for name, trials in (("baselines", best), ("recipe", own)):
                run(name, [replace(t, seed=seed) for seed in (1, 2) for t in trials], outcome)
        else:
            if what == "parts":
                long = [r.firings == max(FIRINGS) for r in chosen]
                own = [part for t in compress(own, long) for part in parts(t)]
            run(what, [replace(t, lr=f * t.lr) for f in FACTORS for t in own], outcome)
