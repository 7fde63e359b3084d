"""Figures on the quality of features: density, likeness, agreement of seeds, sparse probes.

As in `saesub.reproduce.plots`: each takes a tidy DataFrame with a column `condition` and returns a closed
Figure.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from saesub.reproduce.plots.style import (
    MARKERS,
    checked,
    closed_figure,
    condition_looks,
    legend_above,
    outlined,
    percent,
    rows_where,
)


def density_histogram(frame: pd.DataFrame) -> Figure:
    """How often features fire, by condition, on a logarithmic axis; dead features in a bar at the left.

    `frame`: condition, density (share of tokens on which the feature fires; 0 is dead).
    """
    checked(frame, "condition", "density")
    positive = frame.loc[frame["density"] > 0, "density"]
    floor = np.log10(positive.min()) if len(positive) else -1.0
    step = -floor / 36
    bins = np.linspace(floor, 0, 37)
    with closed_figure() as (figure, axes):
        looks = condition_looks(frame["condition"])
        for place, (condition, look) in enumerate(looks.items()):
            density = rows_where(frame, "condition", condition)["density"].to_numpy(dtype=float)
            alive = np.log10(density[density > 0])
            outlined(axes, alive, bins, len(density), label=condition, **look)
            dead, shift = (density == 0).mean(), (place - (len(looks) - 1) / 2) * step
            axes.bar(floor - 4 * step + shift, dead, 0.9 * step, color=look["color"])
        ticks = [floor - 4 * step, *range(int(np.ceil(floor)), 1)]
        axes.set_xticks(ticks, ["never", *(f"{100 * 10.0**t:.4g} %" for t in ticks[1:])])
        axes.set(xlabel="share of tokens on which a feature fires", ylabel="share of features")
        percent(axes.yaxis)
        legend_above(figure, axes)
    return figure


def cosine_histogram(
    frame: pd.DataFrame, label: str = "largest cosine to another feature"
) -> Figure:
    """The cosines of features, by condition. `frame`: condition, cosine."""
    checked(frame, "condition", "cosine")
    bins = np.linspace(min(0.0, float(frame["cosine"].min())), 1, 51)
    with closed_figure() as (figure, axes):
        for condition, look in condition_looks(frame["condition"]).items():
            values = rows_where(frame, "condition", condition)["cosine"].to_numpy(dtype=float)
            outlined(axes, values, bins, len(values), label=condition, **look)
        axes.set(xlabel=label, ylabel="share of features")
        percent(axes.yaxis)
        legend_above(figure, axes)
    return figure


def shared_features(frame: pd.DataFrame, threshold: float = 0.7) -> Figure:
    """Share of features whose partner in another seed is at least so alike, a line per pair.

    `frame`: condition, pair (of seeds), cosine (of matched features).
    """
    checked(frame, "condition", "pair", "cosine")
    grid = np.linspace(0, 1, 101)
    with closed_figure() as (figure, axes):
        for condition, look in condition_looks(frame["condition"]).items():
            for place, (_, rows) in enumerate(
                rows_where(frame, "condition", condition).groupby("pair")
            ):
                cosine = np.sort(rows["cosine"].to_numpy(dtype=float))
                shares = 1 - np.searchsorted(cosine, grid) / len(cosine)
                axes.plot(grid, shares, lw=1.4, label=condition if place == 0 else None, **look)
        axes.axvline(threshold, color="#444444", lw=1.2, ls=(0, (5, 3)), zorder=1)
        axes.text(threshold + 0.01, 0.97, f"counted as shared: ≥ {threshold:g}", fontsize=9)
        axes.set(xlabel="cosine to the matched feature of another seed", xlim=(0, 1))
        axes.set(ylabel="share of features matched\nat least so well", ylim=(0, 1.03))
        percent(axes.yaxis)
        legend_above(figure, axes)
    return figure


def probe_accuracy(frame: pd.DataFrame, ceiling: pd.DataFrame | None = None) -> Figure:
    """Test accuracy of sparse probes, a panel for each k, a row for each task, a point per seed.

    `frame`: condition, task, k, accuracy. `ceiling`: task, accuracy of a probe that reads everything.
    """
    checked(frame, "condition", "task", "k", "accuracy")
    looks, tasks = condition_looks(frame["condition"]), list(dict.fromkeys(frame["task"]))
    ks = sorted(set(frame["k"].tolist()))
    left = min(0.5, float(frame["accuracy"].min())) - 0.02  # one half is what guessing scores
    with closed_figure(len(ks), height=1.4 + 0.55 * len(tasks)) as (figure, panels):
        panels = panels if len(ks) > 1 else [panels]
        for axes, k in zip(panels, ks, strict=True):
            at_k = pd.DataFrame(frame[frame["k"] == k])
            for place, (condition, look) in enumerate(looks.items()):
                _task_points(
                    axes,
                    rows_where(at_k, "condition", condition),
                    tasks,
                    condition,
                    place,
                    len(looks),
                    look,
                )
            if ceiling is not None:
                best = ceiling.set_index("task")["accuracy"]
                rows = [t for t in tasks if t in best.index]
                line = {"color": "#444444", "lw": 1.4, "label": "all activations, dense probe"}
                heights = [tasks.index(t) for t in rows]
                axes.vlines(
                    best[rows], [y - 0.42 for y in heights], [y + 0.42 for y in heights], **line
                )
            axes.set_yticks(range(len(tasks)), tasks if axes is panels[0] else [])
            axes.set(ylim=(len(tasks) - 0.5, -0.5), title=f"{k} feature{'s' * (k > 1)}")
            axes.set_xlim(left, 1 + 0.06 * (1 - left))  # room for a whole mark at 1
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %"))
        panels[len(panels) // 2].set_xlabel("accuracy on test texts")
        legend_above(figure, panels[0])
    return figure


def _task_points(
    axes: Axes,
    rows: pd.DataFrame,
    tasks: list,
    condition: str,
    place: int,
    n_conditions: int,
    look: dict,
) -> None:
    offset = (place - (n_conditions - 1) / 2) * 0.5 / n_conditions
    at = [tasks.index(task) + offset for task in rows["task"]]
    mark = MARKERS[place % len(MARKERS)]
    axes.plot(rows["accuracy"], at, mark, color=look["color"], ms=6, alpha=0.75, label=condition)
