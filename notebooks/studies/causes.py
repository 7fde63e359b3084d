"""Why do features die? Two tests that decide.

    python notebooks/studies/causes.py

Writes data/results/studies/causes.json.

- One SAE, half of its features initialised at random and half in the subspace ("mixed"), at three
  attention outputs: `dead_by_half` says which half dies.
- Spectra exchanged: the attention output of a layer is given the MLP output's eigenvalues by a
  fixed linear map along its own principal directions, and the MLP output the attention output's.
  Nothing else changes. If the spectrum kills, the deaths go with it.

All have 4,096 features and are initialised at random but for the mixed ones, under Adam, each at
four learning rates or more and at its best rate with three seeds, as in cure.py. Those of exchanged
spectra have three seeds at a second rate too, which fits the attention output equally well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from protocol import SMALL, Trial, judged, run, site_of, sweep, train, untrained

import saesub

LAYERS = (12, 21, 6)
SECOND_RATE = 4e-3


def attention(layer: int) -> str:
    """The hook point of a layer's attention output."""
    return f"blocks.{layer}.hook_attn_out"


MLP = "blocks.12.hook_mlp_out"
EXCHANGED = [
    Trial(attention(12), "random", **SMALL),
    Trial(attention(12), "random", spectrum_of=MLP, **SMALL),
    Trial(MLP, "random", **SMALL),
    Trial(MLP, "random", spectrum_of=attention(12), **SMALL),
]
MIXED = [Trial(attention(layer), "mixed", **SMALL) for layer in LAYERS]


def outcome(trial: Trial) -> dict[str, Any]:
    """Train and judge one SAE; of a mixed one, how much of either half is dead."""
    at = site_of(trial)
    sae = untrained(trial, at)
    norm = sae.W_dec.detach().norm(dim=1).mean().item()
    train(trial, sae, at)
    row = judged(trial, sae, at) | {"norm_at_start": norm, "rank": at.spectrum.rank_at(0.99)}
    if trial.start == "mixed":
        start = at.store.n_tokens - trial.n_judged
        dead = saesub.dead_features(
            sae, at.blocks(start, at.store.n_tokens), n_tokens=trial.n_judged, progress=False
        )
        halves = {"random": dead[: trial.d_sae // 2], "subspace": dead[trial.d_sae // 2 :]}
        row["dead_by_half"] = {half: d.double().mean().item() for half, d in halves.items()}
    return row


if __name__ == "__main__":
    sweep("causes", [*MIXED[:1], *EXCHANGED, *MIXED[1:]], outcome=outcome)
    trials = [replace(t, lr=SECOND_RATE, seed=seed) for seed in range(3) for t in EXCHANGED]
    run("causes", trials, outcome)
