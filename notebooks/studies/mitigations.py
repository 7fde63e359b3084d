"""What do the earlier mitigations do for dead features, alone and with subspace initialisation?

    python notebooks/studies/mitigations.py

Writes data/results/studies/mitigations.json. At an attention output in the middle of the model:

- AuxK, ghost gradients and resampling, each with random and with subspace initialisation; AuxK
  from a random start also with shorter dead windows and with SAELens' coefficient, and with
  subspace initialisation at the best of these;
- k-annealing, and an initialisation at data points;
- a decoder bias at zero (SAELens' default) with random and with subspace initialisation, which with
  cure.json's conditions, whose bias is at the mean, makes a 2 × 2; and one at the geometric median.

All are trained under Adam, each with its own learning rate and then three seeds, as in cure.py,
which has the random and the subspace initialisation under Adam and SparseAdam and the whitened
start. Every row says how many features fired again after a whole dead window of silence
(`silent_once`, `revived`, `stayed`: see `RevivalCount`). The control is plain training ("random")
at the rates that are best for the mitigations. `offset` is γ = ‖mean‖ / ‖standard deviation‖ of the
activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import protocol
import torch
from protocol import SMALL, Site, Trial, judged, run, site_of, sweep, train, untrained
from sae_lens import TopKTrainingSAE
from torch.nn.functional import normalize

import saesub
from saesub.reproduce.revival import RevivalCount
from saesub.training.mitigations import Mitigation

HOOK = "blocks.12.hook_attn_out"
AUXK = 1 / 32  # of the loss; Gao et al. 2024. SAELens' default is 1.
SHARE_OF_DATA = 0.8  # of a row; Anthropic, October 2025


@dataclass(frozen=True)
class Mitigated(Trial):
    """A trial with a mitigation, or with its bias elsewhere than at the mean.

    `mitigation` is "AuxK", "ghost gradients", "resampling", "k-annealing" or ""; `centre` is
    "mean", "zero" or "geometric median". The start "data" is a mixture of a data point and noise.
    After `dead_window` training tokens a silent feature is dead to a mitigation. `coefficient` is
    that of AuxK.
    """

    condition: str = "random"
    mitigation: str = ""
    centre: str = "mean"
    dead_window: int = SMALL["n_train"] // 8
    coefficient: float = AUXK


def _trial(start: str, **settings: Any) -> Mitigated:
    return Mitigated(HOOK, start, **SMALL, **settings)


def _with(mitigation: str) -> list[Mitigated]:
    """A mitigation with both initialisations."""
    return [
        _trial("random", condition=mitigation, mitigation=mitigation),
        _trial("subspace", condition=f"ASI + {mitigation}", mitigation=mitigation),
    ]


PLAIN = _trial("random")
RIVALS = [t for name in ("AuxK", "ghost gradients", "resampling") for t in _with(name)]
AUXK_SETTINGS = [
    replace(RIVALS[0], condition=f"AuxK, {n:,} tokens, {c:g}", dead_window=n, coefficient=c)
    for c in (AUXK, 1.0)
    for n in (64_000, 32_000, 16_000)
][1:]  # the first is the rival itself
ASI_AUXK = replace(  # with the settings that left the fewest of a random start dead
    AUXK_SETTINGS[-1], start="subspace", condition=f"ASI + {AUXK_SETTINGS[-1].condition}"
)
OTHERS = [
    _trial("random", condition="k-annealing", mitigation="k-annealing"),
    _trial("data", condition="data start"),
]
CENTRES = [
    _trial("random", condition="bias at zero", centre="zero"),
    _trial("subspace", condition="ASI + bias at zero", centre="zero"),
    _trial("random", condition="bias at the median", centre="geometric median"),
]


def acting(trial: Mitigated) -> Sequence[Mitigation]:
    """What acts during training. AuxK is a setting of the SAE."""
    if trial.mitigation == "ghost gradients":
        return [saesub.GhostGradients()]
    if trial.mitigation == "resampling":
        # At a quarter, a half and three quarters of training: features die late.
        n_batches = min(10, trial.dead_window // trial.batch_size)
        every = trial.n_train // 4
        return [saesub.Resampling(every_tokens=every, until=0.75, n_batches=n_batches)]
    if trial.mitigation == "k-annealing":
        # From k = d_in, over the first tenth, as in the library of the paper's authors.
        return [saesub.KAnnealing(k_start=site_of(trial).spectrum.d, share=0.1)]
    return []


@torch.no_grad()
def set_start(sae: TopKTrainingSAE, trial: Mitigated, at: Site) -> None:
    """Directions, bias and norm of a trial; the norm is fitted to the bias that the SAE has."""
    at_data = trial.start == "data"
    protocol.set_start(sae, replace(trial, start="random") if at_data else trial, at)
    if at_data:
        x = protocol.sample_for(trial, at)
        points = normalize(x[: trial.d_sae] - at.spectrum.mean.float(), dim=1)
        noise = normalize(sae.W_dec, dim=1)
        sae.W_dec.copy_(normalize(SHARE_OF_DATA * points + (1 - SHARE_OF_DATA) * noise, dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
        saesub.fit_norm(sae, at.spectrum, activations=x)
    protocol.move_bias(sae, trial.centre, at)


def outcome(trial: Mitigated) -> dict[str, Any]:
    """Train and judge one SAE; how many features were silent and then revived."""
    at, count = site_of(trial), RevivalCount()
    sae = untrained(
        trial,
        at,
        set_start,
        aux_loss_coefficient=trial.coefficient if trial.mitigation == "AuxK" else 0.0,
    )
    norm = sae.W_dec.detach().norm(dim=1).mean().item()
    mitigations = [count, *acting(trial)]
    trainer = train(trial, sae, at, dead_window_tokens=trial.dead_window, mitigations=mitigations)
    return outcome_of(trial, trainer, at, norm)


def outcome_of(
    trial: Mitigated, trainer: saesub.SubspaceSAETrainer, at: Site, norm_at_start: float
) -> dict[str, Any]:
    """What is recorded of a trained SAE, whose trainer had a `RevivalCount`."""
    offset = at.spectrum.mean.norm() / at.spectrum.eigenvalues.sum().sqrt()
    return judged(trial, trainer.sae, at) | {
        "norm_at_start": norm_at_start,
        "offset": offset.item(),
        **RevivalCount().found(trainer),
    }


if __name__ == "__main__":
    best = sweep("mitigations", RIVALS, outcome=outcome)
    rates = {lr for trial, lr in best.items() if trial.start == "random"}
    controls = [replace(PLAIN, lr=lr, seed=seed) for lr in sorted(rates) for seed in range(3)]
    run("mitigations", controls, outcome)
    sweep("mitigations", CENTRES, outcome=outcome)
    sweep("mitigations", OTHERS, outcome=outcome)
    sweep("mitigations", [*AUXK_SETTINGS, ASI_AUXK], outcome=outcome)
