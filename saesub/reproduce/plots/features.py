"""Figures on features: coherence, agreement of seeds, accuracy of probes.

Each takes a tidy DataFrame with a column `condition` and returns a closed Figure.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from saesub.reproduce.plots import drawing as draw
from saesub.reproduce.plots.kept import kept
from saesub.reproduce.plots.looks import series


@kept
def coherence_by_density(frame: pd.DataFrame, chance: float | None = None) -> Figure:
    """How alike the contexts of features are, by how often they fire, a line per condition.

    The seeds' mean is the line, least to most the band. `frame`: condition, density (share of
    tokens), coherence (mean cosine of a feature's contexts). `chance`: that of contexts
    exchanged among features.
    """
    draw.checked(frame, "condition", "density", "coherence")
    with draw.closed_figure() as (figure, (axes,)):
        draw.condition_lines(axes, frame, "density", "coherence")
        if chance is not None:
            draw.beside(axes, chance, "chance: shuffled\ncontexts")
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        draw.percent(axes.xaxis)
        axes.set(xlabel="share of tokens on which a feature fires", ylim=(0, None))
        axes.set_ylabel("mean cosine of its contexts")
    return figure


@kept
def shared_features(frame: pd.DataFrame, threshold: float = 0.7) -> Figure:
    """Share of features whose match in another seed has at least this cosine, a line per pair.

    `frame`: condition, pair (of seeds), cosine (of matched features).
    """
    draw.checked(frame, "condition", "pair", "cosine")
    grid = np.linspace(0, 1, 101)
    with draw.closed_figure() as (figure, (axes,)):
        for rows, look in series(frame, "condition"):
            look["marker"] = ""
            for _, pair in rows.groupby("pair"):
                cosine = np.sort(pair["cosine"].to_numpy(dtype=float))
                shares = 1 - np.searchsorted(cosine, grid) / len(cosine)
                axes.plot(grid, shares, lw=1.4, **look)
                look["label"] = None  # one entry of the legend for all pairs
        axes.axvline(threshold, color=draw.NOTE, lw=1.2, ls=(0, (5, 3)), zorder=1)
        axes.text(threshold + 0.01, 0.97, f"counted as shared: ≥ {threshold:g}", fontsize=9)
        axes.set(xlabel="cosine to the matched feature of another seed", xlim=(0, 1))
        axes.set(ylabel="share of features matched\nat least so well", ylim=(0, 1.03))
        draw.percent(axes.yaxis)
    return figure


@kept
def probe_accuracy(frame: pd.DataFrame, ceiling: pd.DataFrame | None = None) -> Figure:
    """Test accuracy of sparse probes, a panel for each k, a row for each task, a point per seed.

    `frame`: condition, task, k, accuracy. `ceiling`: task and accuracy of a probe that reads all
    activations.
    """
    draw.checked(frame, "condition", "task", "k", "accuracy")
    conditions, tasks = series(frame, "condition"), list(dict.fromkeys(frame["task"]))
    ks = sorted(set(frame["k"].tolist()))
    left = min(0.5, float(frame["accuracy"].min())) - 0.02  # one half is what guessing scores
    with draw.closed_figure(len(ks), size=(draw.WIDE, 1.4 + 0.55 * len(tasks))) as (figure, panels):
        for axes, k in zip(panels, ks, strict=True):
            for place, (rows, look) in enumerate(conditions):
                rows = rows[rows["k"] == k]
                offset = (place - (len(conditions) - 1) / 2) * 0.5 / len(conditions)
                heights = [tasks.index(task) + offset for task in rows["task"]]
                mark = {
                    part: of for part, of in look.items() if part not in ("marker", "linestyle")
                }
                axes.plot(rows["accuracy"], heights, look["marker"], ms=6, alpha=0.75, **mark)
            if ceiling is not None:
                best = ceiling[ceiling["task"].isin(tasks)]
                heights = np.array([tasks.index(task) for task in best["task"]])
                line = {"color": draw.NOTE, "lw": 1.4, "label": "all activations, dense probe"}
                axes.vlines(best["accuracy"], heights - 0.42, heights + 0.42, **line)
            axes.set_yticks(range(len(tasks)), tasks if axes is panels[0] else [])
            axes.set(ylim=(len(tasks) - 0.5, -0.5), title=f"{k} feature{'s' * (k > 1)}")
            axes.set_xlim(left, 1 + 0.06 * (1 - left))  # room for a whole mark at 1
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %"))
        panels[len(panels) // 2].set_xlabel("accuracy on test texts")
    return figure
