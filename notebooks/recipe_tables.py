"""The table of docs/recipe.md: the recipe beside the baselines, in the regimes that were run."""

from __future__ import annotations

from typing import Any

import pandas as pd

from saesub.reproduce import claims_table, paper_claims
from saesub.reproduce.in_regimes import claimed, in_regimes
from saesub.reproduce.longer import NEW, SAME, TIMES, trained_longer
from saesub.training.recipe import COVERED

BOUNDS = {
    "B3.dead": "hardly a dead feature",
    "B3.wins": "a lower FVU in nine regimes of ten",
    "B3.worst": "never a much higher one",
    "B3.rate": "a rate near the best of a sweep",
}


def tables() -> dict[str, str]:
    """Markdown by the names of the page's marks."""
    found = in_regimes()
    summaries = {"recipe-summary": _summary(found), "recipe-line": _line(found)}
    summaries["recipe-longer"] = _longer(trained_longer())
    return {"recipe": _table(found), "recipe-reach": _reach()} | summaries


def _reach() -> str:
    """What `recommend` answers for."""
    names = {"n_tokens": "tokens", "d_sae": "features", "k": "active ones (k)"}
    names |= {"d_sae / k": "features for each active one", "d_in": "dimensions of the activations"}
    ends = ("{:,} to {:,} {}".format(*COVERED[name], what) for name, what in names.items())
    return (
        f"`recommend` answers for {', '.join(ends)}. Beyond, it refuses and says which number it "
        "was."
    )


def _longer(found: pd.DataFrame) -> str:
    """What a rival reaches in the time of the refit, and what a refit then still brings."""
    said = []
    for tokens, where in ((SAME, "on the same tokens"), (NEW, f"on {TIMES} times as many")):
        of = found[found["tokens"] == tokens].set_index("condition")
        best = of[~of["refitted"]].iloc[0]
        plain, (refit,) = of.loc["random"], of.index[of["refitted"]]
        gain = of.loc[refit, "fvu"] / of.loc[refit.removesuffix(" + refit"), "fvu"] - 1
        said.append(
            f"{where}, its FVU is {best['change']:.1%} above that of the best of them "
            f"({best.name}; interval {best['low']:.1%} to {best['high']:.1%}) and "
            f"{plain['change']:.1%} above plain training's; a refit of that best one, after its "
            f"longer training, changes its FVU by {gain:+.1%}"
        )
    worth = "not the best" if _is_longer_better(found) else "a good"
    return (
        f"On a CPU the refit is {worth} use of its time. At one place (SmolLM2, layer 12's "
        "attention output, 4,096 features) the recipe, with one pass over its tokens and the "
        f"refit, stands beside five rivals without a refit that train {TIMES} times as long, each "
        f"at its own best rate. Where these train {'. Where they train '.join(said)}. "
        "[Notebook 07](../notebooks/07_rival_mitigations.ipynb) has all rows."
    )


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
    """What the recipe reaches in all regimes, and in those of the model that it was not made on."""
    groups = {"In all {} regimes": found}
    if found["untouched"].any():
        title = "In the {} regimes of the model on which nothing was trained before"
        groups[title] = found[found["untouched"]]
    said = [f"{title.format(len(of))}:\n\n{_reached(of)}" for title, of in groups.items()]
    (window,) = set(found["window"])
    said.append(
        f"A dead feature fires at none of {window:,} held-out tokens. No baseline has AuxK."
    )
    return "\n\n".join(said)


def _reached(of: pd.DataFrame) -> str:
    """A list of what a group of regimes shows."""
    plain, early = (of[name] / of["baseline_fvu"] - 1 for name in ("fvu", "fvu_unrefitted"))
    lines = [
        f"The recipe's FVU is lower than the best baseline's in {_counted(plain)}, and before its "
        f"refit in {_counted(early)}.",
    ]
    if of["seeds"].max() > 1:
        pairs = f"{of['lower_in'].sum()} of {of['seeds'].sum()}"
        lines.append(f"Of pairs of SAEs with the same seed, it is lower in {pairs}.")
    if "against_refitted" in of and (both := of["against_refitted"].dropna()).size:
        lines.append(
            f"Where the baselines have a refit of their own, it is lower than the best one's in "
            f"{_counted(both)}."
        )
    lines += [
        _met(of),
        f"It is at most {of['above_least'].max():.1%} above the lowest of three rates, the "
        f"recipe's, its half and its double. The double fits best in "
        f"{(of['least_at'] == 2).sum()} regimes, the half in {(of['least_at'] == 0.5).sum()}.",
    ]
    for firings, some in sorted(of.groupby("firings"), reverse=True):
        lines.append(
            f"Where a feature fires {firings:,} times in training, the recipe's FVU is lower in "
            f"{_counted(some['fvu'] / some['baseline_fvu'] - 1)}, and at most "
            f"{some['dead_share'].max():.2%} of the features are dead. Of the baseline that fits "
            f"best it is up to {some['baseline_dead'].max():.2%}; of the baseline that loses "
            f"fewest, each at its own best rate, up to {some['fewest_dead'].max():.2%}."
        )
    return "\n".join(f"- {line}" for line in lines)


def _met(of: pd.DataFrame) -> str:
    """In which of the ranges that were set before its values lie."""
    by_verdict: dict[str, list[str]] = {}
    for name, value in claimed(of).items():
        found = paper_claims.verdict(paper_claims.find(name), value)
        by_verdict.setdefault(found, []).append(BOUNDS[name])
    told = [f"{claims_table.SYMBOLS[of]} {of}: {'; '.join(s)}" for of, s in by_verdict.items()]
    return f"Beside the ranges that were set before ([B3](findings/B3.md)): {' · '.join(told)}."


def _line(found: pd.DataFrame) -> str:
    """The README's line, on the untouched model."""
    of = found[found["untouched"]]
    tokens, features = (COVERED[name][1] for name in ("n_tokens", "d_sae"))
    said = (
        "[`recommend`](docs/recipe.md): TopK settings without a sweep, up to "
        f"{tokens:,} tokens and {features:,} features"
    )
    if of.empty:
        return f"{said}."
    plain, early = (of[name] < of["baseline_fvu"] for name in ("fvu", "fvu_unrefitted"))
    return (
        f"{said}. On an unseen model its FVU is below the best of three swept "
        f"baselines' (no AuxK) in {plain.sum()} of {len(of)} regimes, and in {early.sum()} before "
        f"the decoder's refit. {_against_longer()}"
    )


def _against_longer() -> str:
    better = "better" if _is_longer_better(trained_longer()) else "no better"
    rival = f"the best rival, trained {TIMES} times as long without a refit,"
    return f"At one site {rival} fits {better}."


def _is_longer_better(found: pd.DataFrame) -> bool:
    """Whether some rival without a refit fits better than the recipe, on the same tokens and on
    new ones."""
    most = found[~found["refitted"]].groupby("tokens")["change"].max()
    return bool((most > 0).all())


def _counted(changes: pd.Series) -> str:
    lower = (changes < 0).sum()
    ends = f"{changes.min():+.1%} to {changes.max():+.1%}, median {changes.median():+.1%}"
    return f"{lower} of {len(changes)} ({ends})"
