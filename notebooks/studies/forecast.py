"""Fit the forecast of dead features on two layers, and test it elsewhere.

    python notebooks/studies/forecast.py

Reads the records of starts.py and d_init.py, measures the spectra they used, and writes
data/results/studies/forecast.json: the fit on layers 12 and 20 of SmolLM2-135M, and its error on
layer 4 and on Gemma-3-270M. Takes a few minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
from scipy.optimize import least_squares
from scipy.special import logit
from scipy.stats import spearmanr
from trials import RESULTS, Trial, site

import saesub
from saesub.files import write_atomically
from saesub.reproduce.dead_forecast import LEAST, expected_share
from saesub.reproduce.report import run_facts

CALIBRATED_ON = ("blocks.12.", "blocks.20.")
FIRST_GUESS = [-6.0, 10.0, -12.0, 14.0, 2.4, 6.0]
LEVEL = 0.8


def trained() -> list[dict]:
    """The rows of random and flat initialisations, trained with Adam for the default length."""
    rows = [row for name in ("starts", "d_init") for row in _rows(name)]
    return [
        row
        for row in rows
        if row["optimizer"] == "adam"
        and row["start"] in ("random", "flat")
        and row["n_train"] == Trial.n_train
    ]


def _rows(name: str) -> list[dict]:
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    for row in rows:
        row["study"] = name
    return rows


def with_rank(row: dict, spectrum: saesub.Spectrum) -> dict:
    """The row with `rank`, the dimension of its initial subspace."""
    flat = row["start"] == "flat"
    rank = saesub.choose_d_init(spectrum, row["d_init"]) if flat else spectrum.d
    return row | {"rank": rank}


def forecasts(
    weights: np.ndarray, rows: list[dict], variances: dict[tuple, np.ndarray]
) -> np.ndarray:
    """The forecast share of dead features of every row."""
    return np.array(
        [
            expected_share(
                list(weights), variances[_place(r)], r["rank"], r["d_sae"] / r["k"], r["lr"]
            )[0]
            for r in rows
        ]
    )


def _place(row: dict) -> tuple[str, str]:
    return row["model"], row["hook_name"]


def bounded_logit(shares: np.ndarray) -> np.ndarray:
    """Log odds of shares; a share too small to measure counts as the smallest measurable one."""
    return logit(np.clip(shares, LEAST, 1 - LEAST))


def actual(rows: list[dict]) -> np.ndarray:
    """Measured shares of dead features."""
    return np.array([row["dead_share"] for row in rows])


def errors(predicted: np.ndarray, rows: list[dict]) -> dict:
    """How far the forecasts are from the measured shares."""
    gap = bounded_logit(predicted) - bounded_logit(actual(rows))
    return {
        "n": len(rows),
        "mean_absolute_error": float(np.abs(predicted - actual(rows)).mean()),
        "logit_rmse": float(np.sqrt((gap**2).mean())),
        "spearman": float(spearmanr(predicted, actual(rows)).statistic),
    }


if __name__ == "__main__":
    rows = trained()
    spectra = {place: site(*place)[2] for place in sorted({_place(row) for row in rows})}
    variances = {place: s.eigenvalues.numpy() for place, s in spectra.items()}
    rows = [with_rank(row, spectra[_place(row)]) for row in rows]
    fit_on = [
        r for r in rows if r["model"] == "smollm2-135m" and r["hook_name"].startswith(CALIBRATED_ON)
    ]
    rest = [row for row in rows if row not in fit_on]

    def misfit(weights: np.ndarray) -> np.ndarray:
        return bounded_logit(forecasts(weights, fit_on, variances)) - bounded_logit(actual(fit_on))

    weights = least_squares(misfit, FIRST_GUESS, loss="soft_l1").x
    predicted = forecasts(weights, rows, variances)
    judged = {"calibration": errors(forecasts(weights, fit_on, variances), fit_on)}
    for model in sorted({row["model"] for row in rest}):
        other = [row for row in rest if row["model"] == model]
        judged[f"test, {model}"] = errors(forecasts(weights, other, variances), other)
    gaps = np.abs(bounded_logit(predicted) - bounded_logit(actual(rows)))
    is_test = np.array([row in rest for row in rows])
    shared = {f: rows[0][f] for f in ("k", "n_train", "batch_size", "optimizer")}
    assert all(row[f] == value for row in rows for f, value in shared.items())
    record = {
        "command": "python " + " ".join(sys.argv),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "run": run_facts(),
        "calibration": {
            "weights": weights.tolist(),
            "spread": float(np.quantile(gaps[is_test], LEVEL)),
            "settings": shared,
        },
        "errors": judged,
        "rows": [
            {f: row[f] for f in Trial.__dataclass_fields__}
            | {"rank": row["rank"], "dead_share": row["dead_share"], "forecast": float(share)}
            | {"study": row["study"], "test": bool(test)}
            for row, share, test in zip(rows, predicted, is_test, strict=True)
        ],
        "variances": {" ".join(place): v.round(12).tolist() for place, v in variances.items()},
    }
    write_atomically(RESULTS / "forecast.json", json.dumps(record, indent=1))
    print(json.dumps(judged | record["calibration"], indent=1))
