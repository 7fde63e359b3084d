"""Try initialisations other than whitened data points, at layer 12.

The rules are powers of the spectrum, a mixture, encoders matched to a firing rate, and a subspace
for each head at the concatenated head outputs.

    python notebooks/studies/tried.py

Writes data/results/studies/tried.json, to be read with starts.json, which has random, flat and
whitened initialisations at the same settings; takes an hour on one core.

"power p" is Gaussian with variances λ^p (0: isotropic in the whole space, 1: as the data; the
package's "spectrum" is 1/2), encoder tied. "half flat, half whitened" has half of the rows by each
rule. "flat by head" has each feature in the active subspace of one head, heads taking turns.

"matched" means that every feature fires at the same rate at step 0. For Gaussian activations, the
encoder's columns are scaled until all features have the same variance: their centred
pre-activations then pass any threshold equally often, and the top-k threshold in k of d_sae cases.
The package does this for "whitened_data". "measured rate" sets the encoder's bias instead, until
every pre-activation passes one threshold on k / d_sae of the tokens, whatever its distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from sae_lens import TopKTrainingSAE
from starts import SITES
from torch import Tensor
from torch.nn.functional import normalize
from trials import Trial, outcome, package_start, run, site

import saesub
from saesub.init.directions import directions_at, draw_tokens, equal_variance, random_directions

Z = "blocks.12.attn.hook_z"
D_HEAD = 64
N_TOKENS = 32_768  # behind a measured rate
BLOCK = 1024


def power(
    p: float, spectrum: saesub.Spectrum, x: Tensor, n: int, generator: torch.Generator
) -> Tensor:
    """Unit rows, Gaussian with the variances of the activations to the power p."""
    coordinates = torch.randn(n, spectrum.d, generator=generator)
    coordinates *= spectrum.eigenvalues.float().clamp(min=0).pow(p / 2)
    return normalize(coordinates, dim=-1) @ spectrum.basis(spectrum.d).T


def flat(spectrum: saesub.Spectrum, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Unit rows of Active Subspace Initialization."""
    rank = saesub.choose_d_init(spectrum)
    return random_directions(spectrum, rank, "flat", n, generator)


def mixture(spectrum: saesub.Spectrum, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Half of the rows flat, half at whitened tokens."""
    tokens = draw_tokens(spectrum, spectrum.d, "whitened_data", n - n // 2, generator, x)
    whitened = directions_at(spectrum, spectrum.d, "whitened_data", x[tokens])
    return torch.cat([flat(spectrum, x, n // 2, generator), whitened])


def by_head(spectrum: saesub.Spectrum, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Row i flat in the active subspace of head i, heads taking turns."""
    rows, heads = torch.zeros(n, spectrum.d), spectrum.d // D_HEAD
    for head in range(heads):
        part = slice(head * D_HEAD, (head + 1) * D_HEAD)
        mine = rows[head::heads, part]
        mine.copy_(flat(saesub.Spectrum.from_activations(x[:, part]), x, len(mine), generator))
    return rows


ROWS: dict[str, Callable[..., Tensor]] = {
    "power 1/4": partial(power, 0.25),
    "power 1/2": partial(power, 0.5),
    "power 1": partial(power, 1.0),
    "power 0, matched": partial(power, 0.0),
    "power 1/2, matched": partial(power, 0.5),
    "flat, matched": flat,
    "half flat, half whitened, matched": mixture,
    "flat by head": by_head,
}
MEASURED = "whitened, measured rate"
TRIED = [name for name in ROWS if name != "flat by head"] + [MEASURED]


@torch.no_grad()
def start(sae: TopKTrainingSAE, trial: Trial) -> None:
    """Set the directions of a rule of this study or of the package."""
    if trial.start not in ROWS:
        name = "whitened_data" if trial.start == MEASURED else trial.start
        package_start(sae, Trial(trial.hook_name, name, seed=trial.seed))
        if trial.start == MEASURED:
            match_rate(sae, trial)
        return
    _, _, spectrum, x = site(trial.model, trial.hook_name)
    generator = torch.Generator().manual_seed(trial.seed)
    rows = ROWS[trial.start](spectrum, x, trial.d_sae, generator)
    sae.W_dec.copy_(rows)
    if trial.start.endswith("matched"):
        rows = rows * equal_variance(rows, spectrum.covariance)
    sae.W_enc.copy_(rows.T)


def match_rate(sae: TopKTrainingSAE, trial: Trial) -> None:
    """Set the encoder's bias: every feature passes one threshold on k / d_sae of the tokens."""
    _, _, spectrum, x = site(trial.model, trial.hook_name)
    x = x[:N_TOKENS].float() * (spectrum.d**0.5 / spectrum.mean_norm) - sae.b_dec
    n_over = round(len(x) * trial.k / trial.d_sae)
    passed = [(x @ W).topk(n_over, dim=0).values[-1] for W in sae.W_enc.split(BLOCK, dim=1)]
    threshold = torch.cat(passed)
    sae.b_enc.copy_(threshold.median() - threshold)


TRIALS = [
    Trial(place, name, seed=seed)
    for seed in range(2)
    for place, names in [
        *((place, TRIED) for place in SITES),
        (Z, ["random", "flat", "flat by head", "whitened_data"]),
    ]
    for name in names
]

if __name__ == "__main__":
    run("tried", TRIALS, partial(outcome, start=start))
