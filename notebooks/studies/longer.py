"""In the time of the recipe's refit, how well do its rivals fit by a longer training?

    python notebooks/studies/longer.py

Writes data/results/studies/longer.json, at the place and width of mitigations.py. The recipe with
its refit takes 2.6 times as long as plain training (rivals_cost.json). So here the rivals without a
refit train three times as long: on three times as many tokens, or three times on the same ones
(`n_read` has how many are different). They are plain training, AuxK with the settings that leave
the fewest dead, the start at data, and ASI and the whitened start under SparseAdam. The last of
these is refitted too, after its FVU without a refit (`fvu_unrefitted`) is taken.

Each is swept by one seed, and then has three at its best rate, as the recipe has. All read one
store, so all are judged on the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from mitigations import AUXK_SETTINGS, OTHERS, PLAIN, Mitigated
from protocol import N_VALIDATION, SMALL, harvest, recommended, run, site_of, sweep
from rivals import RECIPE, REFITTED, SPARSE, outcome

N_SHORT = SMALL["n_train"]
N_LONG = 3 * N_SHORT
RATES = (5e-4, 1e-3, 2e-3)


@dataclass(frozen=True)
class Longer(Mitigated):
    """A trial on the first `n_read` tokens of a store that has enough for the longest."""

    n_read: int = N_SHORT

    @property
    def n_stored(self) -> int:
        return N_LONG + N_VALIDATION + self.n_judged


def longer(trial: Mitigated, n_read: int, n_train: int = N_LONG) -> Longer:
    """The trial, trained on `n_train` tokens of which `n_read` are different."""
    settings = {f.name: getattr(trial, f.name) for f in fields(trial)}
    return Longer(**settings | {"n_train": n_train, "n_read": n_read})


ASI = replace(PLAIN, start="subspace", condition="ASI + SparseAdam", **SPARSE)
WHITENED = REFITTED[1]
RIVALS = [PLAIN, AUXK_SETTINGS[-1], OTHERS[1], ASI, WHITENED]
CONDITIONS = [longer(t, n) for n in (N_LONG, N_SHORT) for t in reversed(RIVALS)]

if __name__ == "__main__":
    plain = longer(replace(PLAIN, condition=RECIPE), N_SHORT, N_SHORT)
    harvest([plain])
    own = recommended(plain, site_of(plain).spectrum)
    run("longer", [replace(own, seed=seed) for seed in range(3)], outcome)
    best = sweep("longer", CONDITIONS, RATES, n_seeds=1, outcome=outcome)
    trials = [replace(condition, lr=lr) for condition, lr in best.items()]
    run("longer", [replace(t, seed=seed) for seed in (1, 2) for t in trials], outcome)
