"""The same SAE at ten layers and three kinds of sites: where do features die, and which ones?

    python notebooks/studies/sites.py

Writes data/results/studies/sites.json. 4,096 features, random initialisation, Adam, two learning
rates: the one that fits best at layer 12's attention output with three seeds, half of it with one.
`at_start` says, for each of four measures of an untrained feature, how well it tells the features
that live from those that die (area under the ROC curve; 0.5 is chance): its direction's share
inside the subspace that holds 99 % of the variance (`inside`) and inside the one that ASI would
take (`inside_init`), the variance along it (`variance`, uᵀCu), and how often it fires before the
first step (`firing`).
"""

from __future__ import annotations

from typing import Any

import torch
from protocol import N_FIRST, SMALL, Trial, judged, run, site_of, train, untrained
from scipy.stats import rankdata
from torch import Tensor

import saesub
from saesub.evaluation.features import feature_density

SITES = ("attn_out", "mlp_out", "resid_post")
LAYERS = range(0, 30, 3)
RATE, LOWER = 2e-3, 1e-3  # the first fits best at layer 12's attention output, see causes.py


def trials(lr: float, seed: int) -> list[Trial]:
    """One SAE at every site."""
    return [
        Trial(f"blocks.{layer}.hook_{kind}", "random", lr=lr, seed=seed, **SMALL)
        for layer in LAYERS
        for kind in SITES
    ]


def area(score: Tensor, lives: Tensor) -> float | None:
    """Probability that a feature that lives has the higher score; None if all live or all died."""
    n, n_lives = len(lives), int(lives.sum())
    if n_lives in (0, n):
        return None
    ranks = torch.from_numpy(rankdata(score.cpu().double().numpy()))
    above = ranks[lives].sum().item() - n_lives * (n_lives + 1) / 2
    return above / (n_lives * (n - n_lives))


def outcome(trial: Trial) -> dict[str, Any]:
    """Train and judge one SAE; what told its dead features before training."""
    at = site_of(trial)
    sae, spectrum = untrained(trial, at), at.spectrum
    unit = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    rank, d_init = spectrum.rank_at(0.99), saesub.choose_d_init(spectrum)
    scale = spectrum.d**0.5 / spectrum.mean_norm  # of training's input
    scores = {
        "inside": saesub.overlap(unit, spectrum.basis(rank)),
        "inside_init": saesub.overlap(unit, spectrum.basis(d_init)),
        "variance": (unit.double() @ spectrum.covariance * unit.double()).sum(1),
        "firing": feature_density(
            sae, (x * scale for x in at.blocks(0, N_FIRST)), n_tokens=N_FIRST, progress=False
        ),
    }
    train(trial, sae, at)
    start = at.store.n_tokens - trial.n_judged
    dead = saesub.dead_features(
        sae, at.blocks(start, at.store.n_tokens), n_tokens=trial.n_judged, progress=False
    )
    return judged(trial, sae, at) | {
        "rank": rank / spectrum.d,
        "effective_rank": spectrum.effective_rank("variance") / spectrum.d,
        "offset": (spectrum.mean.norm() / spectrum.eigenvalues.sum().sqrt()).item(),
        "at_start": {name: area(score, ~dead.cpu()) for name, score in scores.items()},
    }


if __name__ == "__main__":
    for seed in range(3):
        run("sites", trials(RATE, seed), outcome)
    run("sites", trials(LOWER, 0), outcome)
