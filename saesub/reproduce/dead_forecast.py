"""How many features will die, told before training from the spectrum and the config alone.

Two ways to die add up, each a logistic function of one number from the singular values σ of the
centred activations, of which the start spans the first r:

- *waste*, 1 - R(σ₁…σᵣ) / r with R the effective rank (exp of the entropy): the share of the
  starting subspace where hardly anything happens. Features that point there never win.
- *crowding*, 1 - Σ_{i≤r} σᵢ / Σ σᵢ: what the starting subspace leaves out. Features that all start
  in a small subspace compete for the same tokens.

Both shift with log(d_sae / k), the tokens between two firings of a feature, and with the log of the
learning rate. The weights come from a recorded study of trained SAEs (`forecast.json`), which also
holds the error on hook points and a model that had no part in the fit. This is a regression on two
physical numbers, not a theory, and it does not carry from one model to another: it orders runs
better than it hits their level. Firing rates at step 0 were tried first and say little, since
hardly any feature starts dead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float
from sae_lens import SAE
from scipy.special import expit, logit

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.init.subspace import choose_d_init
from saesub.paths import data_file

LEAST = 1e-4  # a share below it cannot be told from none with some thousand features


class Calibration(TypedDict):
    """`weights` as in `expected_share`, `spread` of the error's log odds, and the settings that all
    SAEs behind them shared."""

    weights: list[float]
    spread: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class Forecast:
    """The share of features expected to be dead, and a range as wide as held it for 8 in 10 of the
    SAEs that had no part in the fit.

    Attributes:
        dead_share, low, high: shares of d_sae.
        waste, crowding: the two numbers it rests on.
        settings: what the SAEs behind it were trained with; elsewhere it is an extrapolation.
    """

    dead_share: float
    low: float
    high: float
    waste: float
    crowding: float
    settings: Mapping[str, Any]


def forecast_dead(
    spectrum: Spectrum,
    sae_or_cfg: Any,
    *,
    lr: float,
    d_init: int | float | str | None = None,
) -> Forecast:
    """Forecast the dead features of a TopK SAE that is trained with Adam.

    Good for comparing starts, widths and rates at one site; its level was off by 0.3 of the
    features, on average, at the attention and MLP outputs of another model (notebook 12).

    Args:
        spectrum: of the activations it will be trained on.
        sae_or_cfg: a SAELens SAE or its config, with a `k`.
        lr: the peak learning rate.
        d_init: of the start, as in `choose_d_init`; None takes what `initialize_in_subspace` wrote
            into the SAE's config, or else a random start, d_init = d.

    Raises:
        SaesubError: no top-k threshold, a start other than random or flat, another width, an `lr`
            or a `d_init` out of range.
    """
    cfg = sae_or_cfg.cfg if isinstance(sae_or_cfg, SAE) else sae_or_cfg
    if not isinstance(getattr(cfg, "k", None), int | float):
        raise SaesubError(
            f"{type(cfg).__name__} has no top-k threshold (no k), so nothing is known of what it "
            "takes to fire: the forecast is for TopK SAEs"
        )
    if cfg.d_in != spectrum.d:
        raise SaesubError(f"the spectrum is {spectrum.d} wide, the SAE reads {cfg.d_in}")
    if not lr > 0:
        raise SaesubError(f"lr must be positive, not {lr}")
    rank = spectrum.d if d_init is None else choose_d_init(spectrum, d_init)
    if d_init is None and (start := getattr(cfg.metadata, "subspace_init", None)):
        if start["directions"] != "flat":
            raise SaesubError(
                f"no forecast for a start with directions={start['directions']!r}: the study "
                "behind it has random and flat starts"
            )
        rank = start["d_init"]
    spectrum.variance_in(rank)  # refuses constant activations
    variances = spectrum.eigenvalues.numpy()
    known = calibration()
    share, waste, crowding = expected_share(
        known["weights"], variances, rank, cfg.d_sae / cfg.k, lr
    )
    low, high = expit(logit(share) + known["spread"] * np.array([-1, 1]))
    return Forecast(share, float(low), float(high), waste, crowding, known["settings"])


@cache
def calibration() -> Calibration:
    """The recorded fit."""
    return json.loads(data_file("results/studies/forecast.json").read_text())["calibration"]


def subspace_numbers(variances: Float[np.ndarray, " d"], rank: int) -> tuple[float, float]:
    """(waste, crowding) of a start in the first `rank` directions; variances in falling order."""
    sigma = np.sqrt(np.clip(variances, 0, None))
    inside = sigma[:rank] / sigma[:rank].sum()
    entropy = -(inside[inside > 0] * np.log(inside[inside > 0])).sum()
    return float(1 - np.exp(entropy) / rank), float(1 - sigma[:rank].sum() / sigma.sum())


def expected_share(
    weights: list[float],
    variances: Float[np.ndarray, " d"],
    rank: int,
    features_per_active: float,
    lr: float,
) -> tuple[float, float, float]:
    """(share of dead features, waste, crowding) by given weights: constant and slope of waste,
    constant and slope of crowding, slopes of log(d_sae / k) and of log(lr)."""
    waste, crowding = subspace_numbers(variances, rank)
    waste_0, by_waste, crowding_0, by_crowding, by_width, by_rate = weights
    shift = by_width * np.log(features_per_active / 256) + by_rate * np.log(lr / 2e-3)
    share = expit(waste_0 + by_waste * waste + shift)
    share += expit(crowding_0 + by_crowding * crowding + shift)
    return float(np.clip(share, LEAST, 1 - LEAST)), waste, crowding
