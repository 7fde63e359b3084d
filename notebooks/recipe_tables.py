"""The table of docs/recipe.md: the recipe beside the baselines, in the regimes that were run."""

from __future__ import annotations

from typing import Any

import pandas as pd

from saesub.reproduce.in_regimes import in_regimes


def tables() -> dict[str, str]:
    """Markdown by the names of the page's marks."""
    found = in_regimes()
    summaries = {"recipe-summary": _summary(found), "recipe-line": _line(found)}
    return {"recipe": _table(found)} | summaries


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
    """What the recipe reaches on the model that it was not made on, and on the others."""
    groups = {
        "In the {} regimes of the model that was untouched before": found[found["untouched"]],
        "In the {} regimes that the recipe was made in": found[~found["untouched"]],
    }
    said = [title.format(len(of)) + _reached(of) for title, of in groups.items() if len(of)]
    (window,) = set(found["window"])
    said.append(f"A dead feature fires at none of {window:,} held-out tokens.")
    return "\n\n".join(said)


def _line(found: pd.DataFrame) -> str:
    """The README's line, on the untouched model."""
    of = found[found["untouched"]]
    said = "[`recommend`](docs/recipe.md) gives TopK settings without a sweep"
    if of.empty:
        return f"{said}."
    change = of["fvu"] / of["baseline_fvu"] - 1
    dead = of.loc[of["firings"] == of["firings"].max(), "dead_share"].max()
    return (
        f"{said}. On a model unseen before, its FVU is lower than the best of three swept "
        f"baselines' in {_counted(change)} regimes; at most {dead:.2%} dead in longer runs."
    )


def _reached(of: pd.DataFrame) -> str:
    plain, early = (of[name] / of["baseline_fvu"] - 1 for name in ("fvu", "fvu_unrefitted"))
    long = of[of["firings"] == of["firings"].max()]
    said = f" the recipe's FVU is lower than the best baseline's in {_counted(plain)}"
    said += f", and before its refit in {_counted(early)}."
    if "refitted_fvu" in of and of["refitted_fvu"].notna().any():
        both = (of["fvu"] / of["refitted_fvu"] - 1).dropna()
        said += f" It is lower than that of the best baseline with a refit in {_counted(both)}."
    said += (
        f" Its rate fits at most {of['above_least'].max():.1%} worse than the best of its half, "
    )
    said += f"itself and its double. Where a feature fires {long['firings'].iloc[0]:,} times in "
    said += f"training, at most {long['dead_share'].max():.2%} of its features are dead, and "
    said += f"{long['baseline_dead'].max():.1%} of the best baseline's."
    least, most = of["seeds"].min(), of["seeds"].max()
    seeds = f"{most}" if least == most else f"{least} to {most}"
    return said + f" Seeds: {seeds}; with {_pairs(of)} the recipe's FVU is lower."


def _pairs(of: pd.DataFrame) -> str:
    return f"{of['lower_in'].sum()} of {of['seeds'].sum()} pairs of them"


def _counted(changes: pd.Series) -> str:
    lower = (changes < 0).sum()
    return f"{lower} of {len(changes)} ({changes.min():+.1%} to {changes.max():+.1%})"
