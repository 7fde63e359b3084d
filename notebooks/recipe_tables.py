"""The table of docs/recipe.md: the recipe beside the baselines, in the regimes that were run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saesub.errors import SaesubError
from saesub.reproduce import studies

REGIME = ["model", "corpus", "hook_name", "d_sae", "k", "n_train"]
_REFIT = " + refit"


@dataclass(frozen=True)
class _Compared:
    """A regime, the recipe in it at its own rate, and the best baseline without and with a refit,
    over conditions and rates; None where no baseline was refitted."""

    regime: dict[str, Any]
    recipe: pd.Series
    baseline: pd.Series
    refitted: pd.Series | None


def tables() -> dict[str, str]:
    """Markdown by the names of the page's marks."""
    compared = list(_compared())
    return {"recipe": _table(compared), "recipe-summary": _summary(compared)}


def _compared() -> Iterator[_Compared]:
    recipe, baselines = (studies.recorded(name).rows for name in ("recipe", "baselines"))
    try:
        refitted = studies.recorded("refitted").rows
    except SaesubError:  # that study was not run
        refitted = baselines.iloc[:0]
    for values, rows in recipe.groupby(REGIME, sort=False):
        regime = dict(zip(REGIME, values, strict=True))
        best = _best(baselines, regime)
        assert best is not None, f"no baselines in {regime}"
        # The recipe's own rate is run first, then its half and its double.
        yield _Compared(regime, rows.iloc[0], best, _best(refitted, regime))


def _table(compared: list[_Compared]) -> str:
    titles = "model | text | site | features | tokens | best baseline, its rate | FVU | refitted"
    lines = [
        f"| {titles} | recipe before its refit | recipe | its dead |",
        "|---|---|---|---:|---:|---|" + "---:|" * 5,
    ]
    for row in compared:
        of, own, best = row.regime, row.recipe, row.baseline
        lines.append(
            f"| {of['model']} | {of['corpus']} | {of['hook_name'].removeprefix('blocks.')} | "
            f"{of['d_sae']:,} | {of['n_train']:,} | {best['condition']}, {best['lr']:g} | "
            f"{best['fvu']:.4f} | {_fvu(row.refitted)} | {own['fvu_unrefitted']:.4f} | "
            f"{own['fvu']:.4f} | {own['dead_share']:.2%} |"
        )
    return "\n".join(lines)


def _summary(compared: list[_Compared]) -> str:
    """In how many regimes the recipe's FVU is lower than a baseline's, and by how much."""
    plain = [r.recipe["fvu"] / r.baseline["fvu"] - 1 for r in compared]
    early = [r.recipe["fvu_unrefitted"] / r.baseline["fvu"] - 1 for r in compared]
    both = [r.recipe["fvu"] / r.refitted["fvu"] - 1 for r in compared if r.refitted is not None]
    said = f"The recipe's FVU is lower than the best baseline's in {_counted(plain)}"
    said += f"; before its refit in {_counted(early)}"
    if both:
        said += f"; than the best baseline's with a refit in {_counted(both)}"
    (window,) = {int(r.recipe["window"]) for r in compared}
    return f"{said}. A dead feature fires at none of {window:,} held-out tokens."


def _counted(changes: list[float]) -> str:
    lower = sum(change < 0 for change in changes)
    return f"{lower} of {len(changes)} regimes ({min(changes):+.1%} to {max(changes):+.1%})"


def _best(rows: pd.DataFrame, regime: dict[str, Any]) -> pd.Series | None:
    """The row of a regime that fits the validation part best, of all conditions and rates."""
    chosen = rows
    for name, value in regime.items():
        chosen = chosen[chosen[name] == value]
    return None if chosen.empty else chosen.loc[chosen["validation_fvu"].idxmin()]


def _fvu(row: pd.Series | None) -> str:
    if row is None:
        return ""
    return f"{row['fvu']:.4f} ({row['condition'].removesuffix(_REFIT)}, {row['lr']:g})"
