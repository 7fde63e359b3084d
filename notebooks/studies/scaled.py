"""Scale the encoder so that the untrained SAE reconstructs best, and train from there.

    python notebooks/studies/scaled.py

Writes data/results/studies/scaled.json. With many features in few directions, the 32 best features
of a token each answer almost in full, and their sum is too large (it overshoots). A "scaled"
condition multiplies the encoder by the one number that makes the untrained SAE reconstruct best
(`saesub.fit_encoder_scale` over 4,096 tokens: `factor`; `fvu_at_start` is before, `fvu_scaled`
after), and is equal to the unscaled condition in all else. Every condition gets the same 409,600
training tokens once and is judged over 512,000 held-out tokens. The rate is the one at which the
unscaled initialisations fit best under Adam over five times as many tokens (long.py). Random and
flat initialisations are also tried at half, twice and four times that rate, because a shorter
encoder makes the same rate larger relative to its weights. SparseAdam comes first; the record has
the conditions that were run. In its first three calls both FVU before training are relative to the
decoder bias, in the later calls to these tokens' own mean.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from sae_lens import TopKTrainingSAE
from trials import Trial, package_start, run, site, untrained
from wide import BATCH, judged, long_trial

import saesub

D_SAE, STEPS = 2**17, 200
LR, OTHER_RATES = 1e-3, (5e-4, 4e-3, 2e-3)
WINDOW_IN_TRAINING = 100 * BATCH
SCALED = " scaled"


def _trials(starts: tuple[str, ...], optimizer: str, lr: float) -> list[Trial]:
    return [
        long_trial(start + scaled, optimizer, lr, D_SAE, STEPS)
        for scaled in ("", SCALED)
        for start in starts
    ]


TRIALS = [
    trial
    for optimizer in ("sparse_adam", "adam")
    for lr in (LR, *OTHER_RATES)
    for trial in _trials(("flat", "random"), optimizer, lr)
]
for optimizer in ("sparse_adam", "adam"):
    TRIALS += _trials(("whitened_data",), optimizer, LR)


def scaled_or_not(trial: Trial, window_in_training: int = WINDOW_IN_TRAINING) -> dict:
    """The trial's outcome, and how well its initialisation, scaled or not, reconstructs."""
    plain = replace(trial, start=trial.start.removesuffix(SCALED))
    x = site(trial.model, trial.hook_name, trial.corpus)[3][:4096]

    def start(sae: TopKTrainingSAE, trial: Trial) -> None:
        if plain.start != "random":
            package_start(sae, plain)
        if trial.start.endswith(SCALED):
            saesub.fit_encoder_scale(sae, x)

    return judged(trial, window_in_training, start) | _at_start(plain, x)


def _at_start(plain: Trial, x: torch.Tensor) -> dict[str, float]:
    sae = untrained(plain, package_start)
    blocks = (x * sae.cfg.d_in**0.5 / x.norm(dim=-1).mean()).split(1024)  # as training scales it
    before = saesub.reconstruction(sae, blocks).fvu
    factor = saesub.fit_encoder_scale(sae, x)
    after = saesub.reconstruction(sae, blocks).fvu
    return {"factor": factor, "fvu_at_start": before, "fvu_scaled": after}


if __name__ == "__main__":
    run("scaled", TRIALS, scaled_or_not, n_workers=1, n_threads=2)
