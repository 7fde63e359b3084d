"""The recorded recipe beside its swept baselines, a row for each regime."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from saesub.errors import SaesubError, needs_extra
from saesub.evaluation.protocol import sweep_of
from saesub.reproduce import studies

if TYPE_CHECKING:
    import pandas as pd

Row = dict[Any, Any]
_REGIME = ["model", "corpus", "hook_name", "d_sae", "k", "n_train"]
_REFIT = " + refit"


def in_regimes() -> pd.DataFrame:
    """A row for each regime (`notebooks/studies/regimes.py`) in which the recipe was trained.

    Columns: model, corpus, hook_name, d_sae, k, n_train (tokens), firings (of a feature in
    training, on average), window (held-out tokens that decide what is dead);

    - of the recipe at its own rate: lr, fvu, dead_share, fvu_unrefitted (before its last step), and
      least_fvu, the least at half, once and twice its rate;
    - of the baseline that fits the validation part best: baseline (its name), baseline_lr,
      baseline_fvu, baseline_dead, and interior, whether no baseline's best rate is at an edge of
      those tried;
    - of the best baseline with a refit of its own: refitted, refitted_lr, refitted_fvu; missing
      where none was trained.

    Raises SaesubError if the recipe or its baselines are not recorded, or not at three rates.
    """
    with needs_extra("saesub.reproduce.in_regimes"):
        import pandas as pd
    recipe, baselines = (_by_regime(name) for name in ("recipe", "baselines"))
    try:
        refitted = _by_regime("refitted")
    except SaesubError:  # that study was not run
        refitted = {}
    rows = []
    for regime, own in recipe.items():
        if len({row["lr"] for row in own}) != 3 or regime not in baselines:
            raise SaesubError(
                f"there is no whole record of the recipe in {regime}: run "
                "python notebooks/studies/recipe.py baselines and recipe with its model"
            )
        rows.append(_recipe(own) | _baseline(baselines[regime]))
        if regime in refitted:
            best = _best(refitted[regime])
            name = best["condition"].removesuffix(_REFIT)
            rows[-1] |= {"refitted": name, "refitted_lr": best["lr"], "refitted_fvu": best["fvu"]}
    return pd.DataFrame(rows)


def _by_regime(name: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of a record, by the regime that they are of."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in studies.recorded(name).rows.to_dict("records"):
        found.setdefault(tuple(row[column] for column in _REGIME), []).append(row)
    return found


def _recipe(rows: list[Row]) -> Row:
    """What is said of the recipe in a regime, as means over seeds."""
    by_rate: dict[float, list[Row]] = {}
    for row in rows:
        by_rate.setdefault(row["lr"], []).append(row)
    _, lr, _ = sorted(by_rate)  # its own is between its half and its double
    fvu = {rate: fmean(row["fvu"] for row in of) for rate, of in by_rate.items()}
    first = rows[0]
    return {name: first[name] for name in _REGIME} | {
        "firings": first["n_train"] * first["k"] // first["d_sae"],
        "window": first["window"],
        "lr": lr,
        "fvu": fvu[lr],
        "dead_share": fmean(row["dead_share"] for row in by_rate[lr]),
        "fvu_unrefitted": fmean(row["fvu_unrefitted"] for row in by_rate[lr]),
        "least_fvu": min(fvu.values()),
    }


def _baseline(rows: list[Row]) -> Row:
    """What is said of the baseline that fits best."""
    best = _best(rows)
    by_condition: dict[str, list[Row]] = {}
    for row in rows:
        by_condition.setdefault(row["condition"], []).append(row)
    return {
        "baseline": best["condition"],
        "baseline_lr": best["lr"],
        "baseline_fvu": best["fvu"],
        "baseline_dead": best["dead_share"],
        "interior": all(sweep_of(of).interior for of in by_condition.values()),
    }


def _best(rows: list[Row]) -> Row:
    """Of all conditions and rates the row that fits the validation part best."""
    return min(rows, key=lambda row: row["validation_fvu"])
