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
LONG = 4000  # firings of a feature in training, at which a share of dead features is judged
UNTOUCHED = "qwen2.5-coder-0.5b"  # nothing was trained on it before the recipe was final
_REGIME = ["model", "corpus", "hook_name", "d_sae", "k", "n_train"]
_OF_RECIPE = ("fvu", "dead_share", "fvu_unrefitted")
_REFIT = " + refit"


def in_regimes() -> pd.DataFrame:
    """A row for each regime (`notebooks/studies/regimes.py`) with the recipe, the untouched last.

    Columns: model, corpus, hook_name, d_sae, k, n_train (tokens), firings (of a feature in
    training, on average), window (held-out tokens that decide what is dead), untouched (whether
    nothing was trained on the model before the recipe was final);

    - of the recipe at its own rate: lr, fvu, dead_share, fvu_unrefitted (before its last step),
      above_least, its FVU divided by the least at half, once and twice its rate, minus 1, and
      least_at, where that least is (0.5, 1 or 2);
    - of the baseline that fits the validation part best: baseline (its name), baseline_lr,
      baseline_fvu, baseline_dead;
    - of all baselines, each at its own best rate: fewest_dead, the least share of dead features,
      and interior, whether no best rate is at an edge of those tried;
    - seeds, which the recipe and the best baseline both have, and lower_in, those of them in which
      the recipe's FVU is the lower one;
    - of the best baseline with a refit of its own: refitted, refitted_lr, refitted_fvu, and
      against_refitted, the recipe's FVU divided by it, minus 1; missing where not all baselines
      were swept with it, to a best rate that is not at an edge.

    Shares and FVU of the recipe and of the best baseline are means over seeds. All choices and all
    else are of the first seed, since the others have one rate.

    Raises SaesubError if a regime has the recipe without baselines or the reverse, or has not three
    rates of the recipe.
    """
    with needs_extra("saesub.reproduce.in_regimes"):
        import pandas as pd
    recipe, baselines = (_by_regime(name) for name in ("recipe", "baselines"))
    try:
        refitted = _by_regime("refitted")
    except SaesubError:  # that study was not run
        refitted = {}
    rows = []
    for regime in recipe | baselines:
        own = recipe.get(regime, [])
        if len(_first_by_rate(own)) != 3 or regime not in baselines:
            raise SaesubError(
                f"there is no whole record of the recipe in {regime}: run "
                "python notebooks/studies/recipe.py baselines and recipe with its model"
            )
        rows.append(_compared(own, baselines[regime]))
        again = [row for row in refitted.get(regime, []) if row["seed"] == 0]
        if _is_whole(again, {row["condition"] + _REFIT for row in baselines[regime]}):
            rows[-1] |= _against(again, own)
    models = [row["model"] for row in rows]
    rows.sort(key=lambda row: (row["untouched"], models.index(row["model"])))
    return pd.DataFrame(rows)


def claimed(regimes: pd.DataFrame) -> dict[str, float]:
    """What the claims on the recipe measure in these rows of `in_regimes`, by claim."""
    change = regimes["fvu"] / regimes["baseline_fvu"] - 1
    return {
        "B3.dead": float(regimes.loc[regimes["firings"] == LONG, "dead_share"].max()),
        "B3.wins": float((change < 0).mean()),
        "B3.worst": float(change.max()),
        "B3.rate": float(regimes["above_least"].max()),
    }


def _by_regime(name: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of a record, by the regime that they are of."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in studies.recorded(name).rows.to_dict("records"):
        found.setdefault(tuple(row[column] for column in _REGIME), []).append(row)
    return found


def _is_whole(rows: list[Row], conditions: set[str]) -> bool:
    """Whether all conditions have a sweep whose best rate is inside of it."""
    of = {name: [row for row in rows if row["condition"] == name] for name in conditions}
    return all(several and sweep_of(several).interior for several in of.values())


def _compared(recipe: list[Row], baselines: list[Row]) -> Row:
    """What is said of a regime."""
    first_of = _first_by_rate(recipe)
    half, lr, _ = sorted(first_of)  # its own is between its half and its double
    least = min(first_of.values(), key=lambda row: row["fvu"])
    own = {row["seed"]: row for row in recipe if row["lr"] == lr}
    first = [row for row in baselines if row["seed"] == 0]
    by_condition: dict[str, list[Row]] = {}
    for row in first:
        by_condition.setdefault(row["condition"], []).append(row)
    best, known = _best(first), ("condition", "lr")
    others = {r["seed"]: r for r in baselines if all(r[name] == best[name] for name in known)}
    seeds = sorted(own.keys() & others.keys())
    return {name: best[name] for name in (*_REGIME, "window")} | {
        "firings": best["n_train"] * best["k"] // best["d_sae"],
        "untouched": best["model"] == UNTOUCHED,
        "lr": lr,
        **{name: fmean(own[seed][name] for seed in seeds) for name in _OF_RECIPE},
        "above_least": first_of[lr]["fvu"] / least["fvu"] - 1,
        "least_at": 1.0 if least["lr"] == lr else 0.5 if least["lr"] == half else 2.0,
        "baseline": best["condition"],
        "baseline_lr": best["lr"],
        "baseline_fvu": fmean(others[seed]["fvu"] for seed in seeds),
        "baseline_dead": fmean(others[seed]["dead_share"] for seed in seeds),
        "fewest_dead": min(_best(of)["dead_share"] for of in by_condition.values()),
        "interior": all(sweep_of(of).interior for of in by_condition.values()),
        "seeds": len(seeds),
        "lower_in": sum(own[seed]["fvu"] < others[seed]["fvu"] for seed in seeds),
    }


def _against(refitted: list[Row], recipe: list[Row]) -> Row:
    """The recipe against the best refitted baseline, by the first seed of both."""
    first_of = _first_by_rate(recipe)
    best = _best(refitted)
    return {
        "refitted": best["condition"].removesuffix(_REFIT),
        "refitted_lr": best["lr"],
        "refitted_fvu": best["fvu"],
        "against_refitted": first_of[sorted(first_of)[1]]["fvu"] / best["fvu"] - 1,
    }


def _first_by_rate(rows: list[Row]) -> dict[float, Row]:
    """The rows of the first seed, by rate."""
    return {row["lr"]: row for row in rows if row["seed"] == 0}


def _best(rows: list[Row]) -> Row:
    """Of all conditions and rates the row that fits the validation part best."""
    return min(rows, key=lambda row: row["validation_fvu"])
