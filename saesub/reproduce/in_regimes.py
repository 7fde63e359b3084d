"""The recorded recipe beside its swept baselines, a row for each regime."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from saesub.errors import SaesubError, needs_extra
from saesub.reproduce import studies

if TYPE_CHECKING:
    import pandas as pd

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
    recipe, baselines = (studies.recorded(name).rows for name in ("recipe", "baselines"))
    try:
        refitted = studies.recorded("refitted").rows
    except SaesubError:  # that study was not run
        refitted = baselines.iloc[:0]
    return pd.DataFrame(list(_rows(recipe, baselines, refitted)))


def _rows(
    recipe: pd.DataFrame, baselines: pd.DataFrame, refitted: pd.DataFrame
) -> Iterator[dict[str, Any]]:
    for values, own in recipe.groupby(_REGIME, sort=False):
        regime = dict(zip(_REGIME, values, strict=True))
        means = own.groupby("lr")[["fvu", "dead_share", "fvu_unrefitted"]].mean()
        others = _of(baselines, regime)
        if len(means) != 3 or others.empty:
            raise SaesubError(
                f"there is no whole record of the recipe in {regime}: run "
                "python notebooks/studies/recipe.py baselines and recipe with its model"
            )
        row: dict[str, Any] = regime | {
            "firings": regime["n_train"] * regime["k"] // regime["d_sae"],
            "window": int(own["window"].iloc[0]),
            "lr": means.index[1],  # between its half and its double
            **means.iloc[1],
            "least_fvu": means["fvu"].min(),
        }
        best = others.loc[others["validation_fvu"].idxmin()]
        row |= {"baseline": best["condition"], "baseline_lr": best["lr"]}
        row |= {"baseline_fvu": best["fvu"], "baseline_dead": best["dead_share"]}
        row["interior"] = all(
            studies.sweep_of(of).interior for _, of in others.groupby("condition")
        )
        if not (again := _of(refitted, regime)).empty:
            best = again.loc[again["validation_fvu"].idxmin()]
            row |= {"refitted": best["condition"].removesuffix(_REFIT)}
            row |= {"refitted_lr": best["lr"], "refitted_fvu": best["fvu"]}
        yield row


def _of(rows: pd.DataFrame, regime: dict[str, Any]) -> pd.DataFrame:
    """The rows of a regime."""
    return rows.loc[(rows[list(regime)] == list(regime.values())).all(axis=1)]
