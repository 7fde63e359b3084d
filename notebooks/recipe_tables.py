"""The table of docs/recipe.md: the recipe beside the baselines, in the regimes that were run."""

from __future__ import annotations

from typing import Any

import pandas as pd

from saesub.reproduce.in_regimes import in_regimes


def tables() -> dict[str, str]:
    """Markdown by the names of the page's marks."""
    found = in_regimes()
    return {"recipe": _table(found), "recipe-summary": _summary(found)}


def _table(found: pd.DataFrame) -> str:
    titles = "model | text | site | features | tokens | best baseline, its rate | FVU | refitted"
    lines = [
        f"| {titles} | recipe before its refit | recipe | its dead |",
        "|---|---|---|---:|---:|---|" + "---:|" * 5,
    ]
    lines += [
        f"| {row.model} | {row.corpus} | {row.hook_name.removeprefix('blocks.')} | "
        f"{row.d_sae:,} | {row.n_train:,} | {row.baseline}, {row.baseline_lr:g} | "
        f"{row.baseline_fvu:.4f} | {_refitted(row)} | {row.fvu_unrefitted:.4f} | "
        f"{row.fvu:.4f} | {row.dead_share:.2%} |"
        for row in found.itertuples()
    ]
    return "\n".join(lines)


def _refitted(row: Any) -> str:
    if pd.isna(getattr(row, "refitted_fvu", None)):
        return ""
    return f"{row.refitted_fvu:.4f} ({row.refitted}, {row.refitted_lr:g})"


def _summary(found: pd.DataFrame) -> str:
    """In how many regimes the recipe's FVU is lower than a baseline's, and by how much."""
    plain, early = (found[name] / found["baseline_fvu"] - 1 for name in ("fvu", "fvu_unrefitted"))
    said = f"The recipe's FVU is lower than the best baseline's in {_counted(plain)}"
    said += f"; before its refit in {_counted(early)}"
    if "refitted_fvu" in found:
        both = (found["fvu"] / found["refitted_fvu"] - 1).dropna()
        said += f"; than the best baseline's with a refit in {_counted(both)}"
    (window,) = set(found["window"])
    return f"{said}. A dead feature fires at none of {window:,} held-out tokens."


def _counted(changes: pd.Series) -> str:
    lower = (changes < 0).sum()
    return f"{lower} of {len(changes)} regimes ({changes.min():+.1%} to {changes.max():+.1%})"
