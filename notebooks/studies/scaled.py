"""Starts whose first reconstructions are as long as they should be.

    python notebooks/studies/scaled.py

Writes data/results/studies/scaled.json. Among many features in few directions a token finds 32 that
each answer almost in full, and their sum overshoots. A "scaled" arm multiplies the encoder by the
one number that makes the untrained SAE reconstruct best (`factor`, least squares over 4,096 tokens;
`fvu_at_start` is before, `fvu_scaled` after), and is like its twin in all else. Every arm gets the
same 409,600 training tokens once and is judged over 512,000 held-out tokens. The rate is the one at
which the unscaled starts fit best under Adam over five times as many tokens (long.py); random and
flat starts are also tried at half and at twice that, alike, since a longer encoder makes the same
rate larger or smaller beside the weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from sae_lens import TopKTrainingSAE
from trials import Trial, package_start, run, site, untrained
from wide import BATCH, judged, long_trial

import saesub
from saesub.encode import encoder_of

D_SAE, STEPS = 2**17, 200
LR, OTHER_RATES = 1e-3, (5e-4, 2e-3)
WINDOW_IN_TRAINING = 100 * BATCH
SCALED = " scaled"


def _trials(starts: tuple[str, ...], lr: float) -> list[Trial]:
    return [
        long_trial(start + scaled, optimizer, lr, D_SAE, STEPS)
        for optimizer in ("sparse_adam", "adam")
        for start in starts
        for scaled in ("", SCALED)
    ]


TRIALS = [trial for lr in (LR, *OTHER_RATES) for trial in _trials(("flat", "random"), lr)]
TRIALS += _trials(("whitened_data",), LR)


def scaled_or_not(trial: Trial) -> dict:
    """The trial's outcome, and what its start, scaled or not, reconstructs."""
    plain = replace(trial, start=trial.start.removesuffix(SCALED))
    at_start = _at_start(untrained(plain, package_start), plain)

    def start(sae: TopKTrainingSAE, trial: Trial) -> None:
        if plain.start != "random":
            package_start(sae, plain)
        if trial.start.endswith(SCALED):
            saesub.scale_encoder(sae, at_start["factor"])

    return judged(trial, WINDOW_IN_TRAINING, start) | at_start


@torch.no_grad()
def _at_start(sae: TopKTrainingSAE, trial: Trial) -> dict[str, float]:
    _, _, spectrum, x = site(trial.model, trial.hook_name, trial.corpus)
    x = x[:4096] * spectrum.d**0.5 / spectrum.mean_norm  # as training scales it
    centred, out = x - sae.b_dec, sae.decode(encoder_of(sae)(x)) - sae.b_dec
    factor = (centred * out).sum() / out.square().sum()

    def fvu(by: float) -> float:
        return ((by * out - centred).square().sum() / centred.square().sum()).item()

    found = factor.item()
    return {"factor": found, "fvu_at_start": fvu(1.0), "fvu_scaled": fvu(found)}


if __name__ == "__main__":
    run("scaled", TRIALS, scaled_or_not, n_workers=1, n_threads=2)
