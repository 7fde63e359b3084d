"""A forecast of how many features will die, from the spectrum and the config before training.

The forecast adds two logistic terms, one for each way to die. Both use the singular values σ of the
centred activations and the d_init = r first directions, in which the features are initialised:

- *waste*, 1 - R(σ₁…σᵣ) / r with R the effective rank (exp of the entropy): the share of the
  subspace where hardly anything happens. Features that point there never win.
- *crowding*, 1 - Σ_{i≤r} σᵢ / Σ σᵢ: what the subspace leaves out. Features that are all initialised
  in a small subspace compete for the same tokens.

Both shift with log(d_sae / k), the tokens between two firings of a feature, and with the log of the
learning rate. The weights come from a recorded study of trained SAEs (`forecast.json`), which also
holds the error on hook points and a model that had no part in the fit. This is a regression on two
physical numbers and not a theory. It does not carry from one model to another: it orders runs
better than it predicts their level, which was off by 0.3 of the features on average at the
attention and MLP outputs of another model (notebook 12).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float
from sae_lens import TrainingSAEConfig
from scipy.special import expit, logit

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.evaluation.passes import check_site
from saesub.init.subspace import choose_d_init
from saesub.paths import data_file

LEAST = 1e-4  # a share below it cannot be told from none with some thousand features


@dataclass(frozen=True)
class Forecast:
    """The share of features expected to be dead, and a range.

    Attributes:
        dead_share, low, high: shares of d_sae. The range is as wide as held the outcome for 8 in 10
            of the SAEs that had no part in the fit.
        waste, crowding: the two numbers of the forecast.
        settings: what the fitted SAEs were trained with; with others, the forecast extrapolates.
    """

    dead_share: float
    low: float
    high: float
    waste: float
    crowding: float
    settings: dict[str, Any]


def forecast_dead(
    spectrum: Spectrum, cfg: TrainingSAEConfig, *, lr: float, d_init: int | float | str
) -> Forecast:
    """Forecasts the dead features of a TopK SAE that is trained with Adam.

    Args:
        spectrum: of the activations on which it will be trained.
        cfg: a SAELens config with a `k`.
        lr: the peak learning rate.
        d_init: as in `choose_d_init`; the spectrum's width for a random initialisation.

    Raises:
        SaesubError: no top-k threshold, a spectrum of another hook point or width, an `lr` or a
            `d_init` out of range.
    """
    k = getattr(cfg, "k", None)
    if not isinstance(k, int | float) or not 0 < k <= cfg.d_sae:
        raise SaesubError(
            f"{type(cfg).__name__} has no top-k threshold (k={k}, not in 1..d_sae): give the "
            "config of a TopK SAE"
        )
    if cfg.metadata.hook_name is not None:
        check_site("the spectrum", spectrum.metadata.get("hook_name"), cfg.metadata.hook_name)
    if cfg.d_in != spectrum.d:
        raise SaesubError(
            f"the spectrum is {spectrum.d} wide, the SAE reads {cfg.d_in}: "
            "give the spectrum of the activations that it reads"
        )
    if not isinstance(lr, int | float) or not 0 < lr < float("inf"):
        raise SaesubError(f"lr must be a positive number, not {lr!r}")
    r = choose_d_init(spectrum, d_init)
    spectrum.variance_in(r)  # refuses constant activations
    fit, variances = calibration(), spectrum.eigenvalues.numpy()
    share, waste, crowding = expected_share(fit["weights"], variances, r, cfg.d_sae / k, lr)
    low, high = expit(logit(share) + fit["spread"] * np.array([-1, 1]))
    return Forecast(share, float(low), float(high), waste, crowding, fit["settings"])


@cache
def calibration() -> dict[str, Any]:
    """The recorded fit: `weights` as in `expected_share`, `spread` of the error's log odds, and the
    `settings` that all SAEs behind them shared."""
    return json.loads(data_file("results/studies/forecast.json").read_text())["calibration"]


def subspace_numbers(variances: Float[np.ndarray, " d"], r: int) -> tuple[float, float]:
    """(waste, crowding) of the first `r` directions; the variances must be in falling order."""
    sigma = np.sqrt(np.clip(variances, 0, None))
    inside = sigma[:r] / sigma[:r].sum()
    entropy = -(inside[inside > 0] * np.log(inside[inside > 0])).sum()
    return float(1 - np.exp(entropy) / r), float(1 - sigma[:r].sum() / sigma.sum())


def expected_share(
    weights: list[float],
    variances: Float[np.ndarray, " d"],
    r: int,
    features_per_active: float,
    lr: float,
) -> tuple[float, float, float]:
    """(share of dead features, waste, crowding) by given weights: constant and slope of waste,
    constant and slope of crowding, slopes of log(d_sae / k) and of log(lr)."""
    waste, crowding = subspace_numbers(variances, r)
    waste_0, by_waste, crowding_0, by_crowding, by_width, by_rate = weights
    shift = by_width * np.log(features_per_active / 256) + by_rate * np.log(lr / 2e-3)
    share = expit(waste_0 + by_waste * waste + shift)
    share += expit(crowding_0 + by_crowding * crowding + shift)
    return float(np.clip(share, LEAST, 1 - LEAST)), waste, crowding
