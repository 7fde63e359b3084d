"""The tables, the line and the figure of what `end_to_end.py` has recorded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from drawing import COLOURS, label_ends, ordered
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

BASELINES = {"saesub-two": "sae-lens-two", "sae-lens-two": "sae-lens-two"}  # of others: sae-lens
PARTS = ("start", "load", "activations", "initialisation", "training", "judging")
FIGURE = "end_to_end.png"
PICTURE = (
    "![Seconds from text to a judged SAE, against features and against tokens, for saesub and "
    f"other libraries](../benchmarks/results/{FIGURE})"
)
_CELL = ["model", "d_sae", "tokens"]


def load(results: str | Path) -> pd.DataFrame:
    """One row a run of `<results>/end-to-end/`: model, d_sae, tokens, contender, seconds (NaN
    where it failed), speedup (over SAELens' runner, run as often; NaN without), parts, fvu, dead,
    peak_bytes, machine, settings.

    Empty without records.
    """
    paths = sorted((Path(results) / "end-to-end").glob("*.json"))
    records = [json.loads(path.read_text()) for path in paths]
    runs = pd.DataFrame([_row(record, run) for record in records for run in record["runs"]])
    if runs.empty:
        return runs
    seconds = runs.set_index([*_CELL, "contender"])["seconds"].to_dict()
    baselines = [
        seconds.get((*cell, BASELINES.get(name, "sae-lens")), np.nan)
        for *cell, name in runs[[*_CELL, "contender"]].itertuples(index=False)
    ]
    return runs.assign(speedup=np.array(baselines) / runs["seconds"])


def _row(record: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    settings, saes = record["settings"], run.get("same_tokens", [])
    return {
        "model": settings["model"],
        "d_sae": settings["d_sae"],
        "tokens": settings["steps"] * settings["batch"],
        "contender": run["contender"],
        "seconds": run.get("seconds", np.nan),
        "parts": run.get("parts", {}),
        "fvu": [sae["fvu"] for sae in saes],
        "dead": [sae["dead_share"] for sae in saes],
        "peak_bytes": run.get("peak_bytes", np.nan),
        "machine": record["machine"],
        "settings": settings,
    }


def end_to_end(results: str | Path) -> str:
    """A table for each model, width and number of tokens, and what they were taken on; empty
    without records."""
    runs = load(results)
    if runs.empty:
        return ""
    cells = runs.groupby(_CELL, sort=True)
    tables = [_table(cell, of_cell.set_index("contender")) for cell, of_cell in cells]
    shown = [PICTURE] if (Path(results) / FIGURE).is_file() else []
    return "\n\n".join([*shown, *tables, _conditions(runs)])


def _table(cell: Any, runs: pd.DataFrame) -> str:
    model, d_sae, tokens = cell
    lines = [
        f"From text to a judged SAE of {d_sae:,} features on {tokens:,} tokens of {model}, in "
        "seconds:",
        "",
        "| | " + " | ".join(PARTS) + " | all | against SAELens | FVU | dead | memory |",
        "|---|" + "---:|" * (len(PARTS) + 5),
    ]
    return "\n".join([*lines, *(_line(name, runs.loc[name]) for name in ordered(runs.index))])


def _line(name: str, run: pd.Series) -> str:
    if np.isnan(run["seconds"]):
        return f"| {name} |" + " |" * len(PARTS) + " failed | | | | |"
    parts = [f"{run['parts'][part]:.1f}" if part in run["parts"] else "–" for part in PARTS]
    ratio = "–" if np.isnan(run["speedup"]) else f"{run['speedup']:.2g}×"
    fvu = ", ".join(f"{value:.3f}" for value in run["fvu"])
    dead = ", ".join(f"{value:.1%}" for value in run["dead"])
    memory = f"{run['peak_bytes'] / 1e9:.1f} GB"
    cells = [name, *parts, f"{run['seconds']:.0f}", ratio, fvu, dead, memory]
    return f"| {' | '.join(cells)} |"


def _conditions(runs: pd.DataFrame) -> str:
    machines = {f"{m['processor']}, {m['cores']} cores" for m in runs["machine"]}
    threads = {f"{s['threads']} threads" for s in runs["settings"]}
    n = {f"{s['held_out']:,} held-out tokens" for s in runs["settings"]}
    told = "; ".join([*sorted(machines), *sorted(threads)])
    names = set(runs["contender"])
    sentences = [
        f"{told}; one run each.",
        f"FVU and dead features are of the same {', '.join(sorted(n))}.",
        "saesub starts with ASI and updates by SparseAdam, the others start as they do by default "
        "and update by Adam, all at one learning rate: times are compared here, not "
        "initialisations.",
    ]
    if "saesub-two" in names:
        sentences.append("saesub-two trains a random and an ASI SAE from one harvest.")
    if {"saesub-two", "sae-lens-two"} <= names:
        sentences.append(
            "It is compared with sae-lens-two, SAELens' runner run twice, where that was run."
        )
    if unsteady := _unsteady(runs):
        sentences.append(
            f"The harvest of saesub and saesub-two is the same, and its times differ by up to "
            f"{unsteady:.0%} in a cell: that much is noise."
        )
    return " ".join(sentences)


def _unsteady(runs: pd.DataFrame) -> float:
    """By what share the longer of the same harvest's times exceeds the shorter, at most in a cell;
    0 where none was done twice."""
    ours = runs[runs["contender"].isin(["saesub", "saesub-two"])]
    seconds = ours.assign(harvest=[parts.get("activations", np.nan) for parts in ours["parts"]])
    extremes = seconds.dropna(subset="harvest").groupby(_CELL)["harvest"].agg(["min", "max"])
    return float((extremes["max"] / extremes["min"] - 1).max()) if len(extremes) else 0.0


def in_a_line(results: str | Path) -> str:
    """How much faster saesub is than SAELens' runner in the largest cell that has both, for one SAE
    and, where it was measured, for two; empty without records."""
    runs = load(results)
    if runs.empty:
        return ""
    ours = runs[runs["contender"] == "saesub"].dropna(subset="speedup")
    if ours.empty:
        return ""
    best = ours.sort_values(["d_sae", "tokens"]).iloc[-1]
    at = (runs[_CELL] == best[_CELL]).all(axis=1)
    two = runs[at & (runs["contender"] == "saesub-two")]["speedup"].dropna()
    both = f", {two.iloc[0]:.2g} × for two SAEs from one harvest" if len(two) else ""
    least = ours["speedup"].min()
    processor = re.sub(r" Processor|\(R\)", "", best["machine"]["processor"])
    smaller = f" In smaller runs at least {least:.2g} ×." if least < best["speedup"] else ""
    return (
        f"Text to a judged SAE ({best['d_sae']:,} features, {best['tokens']:,} tokens; "
        f"{processor}; one run each): {best['speedup']:.2g} × as fast as "
        f"SAELens' runner{both}.{smaller}"
    )


def end_to_end_figure(results: str | Path) -> Figure | None:
    """Seconds over d_sae and over tokens, all logarithmic, of the model with most cells: a panel
    for each size that varies while the other stays. None without such sizes."""
    runs = load(results)
    if runs.empty:
        return None
    runs = runs[runs["model"] == runs["model"].mode()[0]].dropna(subset="seconds")
    panels = {"d_sae": _varied(runs, "d_sae", "tokens"), "tokens": _varied(runs, "tokens", "d_sae")}
    panels = {size: (kept, seconds) for size, (kept, seconds) in panels.items() if seconds.size}
    if not panels:
        return None
    made, axes = plt.subplots(
        1,
        len(panels),
        figsize=(5.6 * len(panels), 4.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    labels = {"d_sae": "features (d_sae)", "tokens": "training tokens"}
    for panel, (size, (kept, seconds)) in zip(axes[0], panels.items(), strict=True):
        _panel(panel, seconds, labels[size])
        panel.set_title(kept, loc="left", fontsize=10.5)
    for panel, (_, seconds) in zip(axes[0], panels.values(), strict=True):
        label_ends(panel, seconds)  # where all panels' sizes are known, since they share an axis
    axes[0][0].set_ylabel("seconds from text to a judged SAE")
    made.suptitle(_message(runs), fontsize=12)
    plt.close(made)
    return made


def _varied(runs: pd.DataFrame, size: str, other: str) -> tuple[str, pd.DataFrame]:
    """Seconds, `size` by contender, at the value of `other` that has most sizes; a contender that
    was run at one of them alone is left out."""
    kept = runs.groupby(other)[size].nunique().idxmax()
    name = {"d_sae": "features", "tokens": "training tokens"}[other]
    at = runs[runs[other] == kept]
    seconds = at.pivot(index=size, columns="contender", values="seconds")
    return f"{kept:,} {name}", seconds.dropna(axis=1, thresh=2)


def _message(runs: pd.DataFrame) -> str:
    ratios = runs[runs["contender"] == "saesub"]["speedup"].dropna()
    if ratios.empty:
        return f"From text to a judged SAE of {runs['model'].iloc[0]}"
    low, high = f"{ratios.min():.2g}", f"{ratios.max():.2g}"
    times = low if low == high else f"{low} to {high}"
    return (
        f"From text to a judged SAE of {runs['model'].iloc[0]}, saesub is {times} × as fast as "
        "SAELens' runner (one run each)"
    )


def _panel(axes: Axes, seconds: pd.DataFrame, label: str) -> None:
    for name in ordered(seconds.columns):
        line = seconds[name].dropna()
        ours, style = name.startswith("saesub"), "--" if name.endswith("-two") else "-"
        axes.plot(
            line.index,
            line,
            style,
            color=COLOURS[name],
            linewidth=2.2 if ours else 1.4,
            marker="o",
            markersize=3.5,
        )
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.set_xticks(seconds.index, [f"{size:,}" for size in seconds.index])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
