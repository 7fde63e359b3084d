"""Rivals of the recipe that train three times as long, in the time of its refit."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from saesub.errors import SaesubError, needs_extra
from saesub.evaluation.protocol import interval, sweep_of
from saesub.reproduce import studies

if TYPE_CHECKING:
    import pandas as pd

RECIPE, REFIT = "recipe", " + refit"
NEW, SAME = "new", "same"
TIMES = 3


def trained_longer() -> pd.DataFrame:
    """A row for each rival of the record `longer`, those that fit best first.

    Columns: tokens (NEW: on three times as many, SAME: three times on the recipe's), condition,
    refitted (whether the decoder was refitted at the end), lr (the rate that fits the validation
    part of the first seed best), interior (whether that is inside of the sweep), seeds, dead_share
    and fvu (means over seeds); recipe_fvu, and change, low and high: the recipe's FVU divided by
    the rival's, minus 1, paired by seed, with Student's 95 % interval.

    A rival that was refitted has two rows, one of them before its refit. Raises SaesubError if the
    record is not whole.
    """
    with needs_extra("saesub.reproduce.longer"):
        import pandas as pd
    rows = studies.recorded("longer").rows.to_dict("records")
    recipe = {row["seed"]: row for row in rows if row["condition"] == RECIPE}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["condition"] != RECIPE:
            for one in (row, *_before_its_refit(row)):
                tokens = SAME if one["n_read"] * TIMES == one["n_train"] else NEW
                groups.setdefault((tokens, one["condition"]), []).append(one)
    found = [
        {"tokens": tokens, "condition": condition} | _beside(of, recipe)
        for (tokens, condition), of in groups.items()
    ]
    return pd.DataFrame(sorted(found, key=lambda row: row["fvu"]))


def _before_its_refit(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row as it was before the refit at the end, if there was one."""
    if not row["condition"].endswith(REFIT):
        return []
    names = ("fvu", "validation_fvu")
    before = {name: row[f"{name}_unrefitted"] for name in names}
    return [row | before | {"condition": row["condition"].removesuffix(REFIT)}]


def _beside(of: list[dict[str, Any]], recipe: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """A rival at its own best rate, and the recipe against it."""
    sweep = sweep_of(row for row in of if row["seed"] == 0)
    lr = sweep.rates[sweep.best]
    own = {row["seed"]: row for row in of if row["lr"] == lr}
    if set(own) != set(recipe):
        raise SaesubError(
            f"{of[0]['condition']} has the seeds {sorted(own)} at its best rate and the recipe "
            f"{sorted(recipe)}: run python notebooks/studies/longer.py to its end"
        )
    change = interval([recipe[seed]["fvu"] / own[seed]["fvu"] - 1 for seed in sorted(own)])
    return {
        "refitted": of[0]["condition"].endswith(REFIT),
        "lr": lr,
        "interior": sweep.interior,
        "seeds": len(own),
        "dead_share": fmean(row["dead_share"] for row in own.values()),
        "fvu": fmean(row["fvu"] for row in own.values()),
        "recipe_fvu": fmean(row["fvu"] for row in recipe.values()),
        "change": change.mean,
        "low": change.low,
        "high": change.high,
    }
