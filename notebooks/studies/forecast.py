"""Can the share of dead features be told before training, on a model that was never seen?

    python notebooks/studies/forecast.py

Writes data/results/studies/forecast.json, from the rows of baselines.json alone: it is fitted on
the models that the recipe was developed on, and forecasts every row of the third (`regimes.py`).
A logistic line in what is known before: the logarithms of rate, length and effective rank, start
and optimizer, and the products of the rate with the last three. It was chosen on the two models,
each forecast from the other, before the third was trained. What it is compared with is the
constant of least absolute error, the median of the shares that it is fitted to.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from protocol import RESULTS, recorded, this_run
from regimes import DEVELOPED, UNTOUCHED

from saesub.files import write_atomically

Row = dict[str, Any]
PENALTY = 1.0  # on the squares of the standardised weights
_LEAST = 1 / 8192  # half a feature of the smaller dictionaries


def known(row: Row) -> list[float]:
    """What is known of a run before it starts."""
    rate = np.log2(row["lr"] / 2e-3)
    length = np.log2(row["n_train"] / 256_000)
    rank = np.log2(row["effective_rank"])
    subspace, sparse = row["start"] == "subspace", row["optimizer"] == "sparse_adam"
    return [rate, length, subspace, sparse, rate * subspace, rate * sparse, rank, rank * rate]


def forecast(told: list[Row], asked: list[Row]) -> np.ndarray:
    """The share of dead features in each of the runs that are asked for, from those told."""
    x, y = np.array([known(row) for row in told], float), _shares(told)
    mean, spread = x.mean(0), x.std(0) + 1e-9

    def design(of: np.ndarray) -> np.ndarray:
        return np.c_[np.ones(len(of)), (of - mean) / spread]

    a = design(x)
    target = np.log((y + _LEAST) / (1 - y + _LEAST))
    weights = np.linalg.solve(a.T @ a + PENALTY * np.eye(a.shape[1]), a.T @ target)
    return 1 / (1 + np.exp(-design(np.array([known(row) for row in asked], float)) @ weights))


def errors(told: list[Row], asked: list[Row]) -> tuple[float, float]:
    """Mean absolute error of the forecast, and of the constant."""
    shares = _shares(asked)
    return (
        float(np.abs(forecast(told, asked) - shares).mean()),
        float(np.abs(np.median(_shares(told)) - shares).mean()),
    )


def _shares(rows: list[Row]) -> np.ndarray:
    return np.array([row["dead_share"] for row in rows])


def row_of(asked: tuple[str, ...], told: tuple[str, ...], rows: list[Row]) -> Row:
    """How well models are forecast from others."""
    known_rows = [row for row in rows if row["model"] in told]
    test_rows = [row for row in rows if row["model"] in asked]
    error, constant = errors(known_rows, test_rows)
    return {
        "condition": "logistic line",
        "told": told,
        "asked": asked,
        "n_told": len(known_rows),
        "n_asked": len(test_rows),
        "error": error,
        "error_of_constant": constant,
        "ratio": error / constant,
        "forecast": forecast(known_rows, test_rows).tolist(),
        "dead_share": _shares(test_rows).tolist(),
    }


if __name__ == "__main__":
    rows = [row for row in recorded("baselines") if row["seed"] == 0]
    first, second = ((model,) for model in DEVELOPED)
    pairs = [(first, second), (second, first), (UNTOUCHED, DEVELOPED)]
    found = [row_of(asked, told, rows) | {"run": 0} for asked, told in pairs]
    record = {"runs": [this_run()], "rows": found}
    write_atomically(RESULTS / "forecast.json", json.dumps(record, indent=1))
