"""Figures on training: dead features and reconstruction by tokens, width, rank, condition and d_init.

As in `saesub.reproduce.plots`: each takes a tidy DataFrame and returns a closed Figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from saesub.reproduce.plots.style import (
    CONDITIONS,
    MARKERS,
    NOTE,
    beside,
    checked,
    closed_figure,
    condition_looks,
    from_zero,
    legend_above,
    outlined,
    percent,
    rows_where,
    site_looks,
)

_OUTCOMES = {"dead_share": "dead features", "fvu": "fraction of variance unexplained"}


def _grouped(frame: pd.DataFrame, x: str, y: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct values of `x`, rising, and the values of `y` at each."""
    at, values = frame[x].to_numpy(dtype=float), frame[y].to_numpy(dtype=float)
    places = np.unique(at)
    return places, [values[at == place] for place in places]


def _condition_lines(axes: Axes, frame: pd.DataFrame, x: str, y: str) -> None:
    """Per condition the mean over seeds as a line, least to most as a band."""
    for (condition, look), mark in zip(
        condition_looks(frame["condition"]).items(), cycle(MARKERS), strict=False
    ):
        at, seeds = _grouped(rows_where(frame, "condition", condition), x, y)
        axes.plot(
            at, [float(np.mean(v)) for v in seeds], label=condition, marker=mark, ms=4, **look
        )
        low, high = [v.min() for v in seeds], [v.max() for v in seeds]
        axes.fill_between(at, low, high, color=look["color"], alpha=0.18, lw=0)


def dead_over_tokens(frame: pd.DataFrame) -> Figure:
    """Share of dead features in training, one line per condition: mean over seeds, band least to most.

    `frame`: tokens, dead_share, condition, seed.
    """
    checked(frame, "tokens", "dead_share", "condition", "seed")
    with closed_figure() as (figure, axes):
        _condition_lines(axes, frame, "tokens", "dead_share")
        axes.set(xlabel="training tokens", ylabel="dead features")
        from_zero(axes.yaxis)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        percent(axes.yaxis)
        legend_above(figure, axes)
    return figure


def width(frame: pd.DataFrame, measure: str = "dead_share") -> Figure:
    """Share of dead features, or FVU, by dictionary width, one line per condition.

    `frame`: d_sae, condition, and the `measure`, "dead_share" or "fvu".
    """
    checked(frame, "d_sae", "condition", measure)
    with closed_figure() as (figure, axes):
        _condition_lines(axes, frame, "d_sae", measure)
        axes.set_xscale("log", base=2)
        widths = sorted(frame["d_sae"].unique())
        axes.set_xticks(widths[:: -(-len(widths) // 6)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.set(xlabel="width of the dictionary (features)", ylabel=_OUTCOMES[measure])
        if measure == "dead_share":
            from_zero(axes.yaxis)
            percent(axes.yaxis)
        legend_above(figure, axes)
    return figure


def learning_rate(frame: pd.DataFrame) -> Figure:
    """Dead features and FVU by learning rate, a line per condition: mean over seeds, band least to most.

    `frame`: lr, condition, dead_share, fvu.
    """
    checked(frame, "lr", "condition", "dead_share", "fvu")
    rates = sorted(frame["lr"].unique())
    with closed_figure(2, height=3.7) as (figure, panels):
        for axes, (column, label) in zip(panels, _OUTCOMES.items(), strict=True):
            _condition_lines(axes, frame, "lr", column)
            axes.set_xscale("log")
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set(xlabel="learning rate", title=label)
        from_zero(panels[0].yaxis)
        percent(panels[0].yaxis)
        legend_above(figure, panels[0])
    return figure


def dead_against_rank(frame: pd.DataFrame) -> Figure:
    """Share of dead features against the rank of the site, one point per SAE.

    `frame`: rank_share, dead_share, site, label. A label is drawn where there is room for it.
    """
    checked(frame, "rank_share", "dead_share", "site", "label")
    with closed_figure(height=4.4) as (figure, axes):
        looks = site_looks(frame["site"]).items()
        for (site, (label, color)), mark in zip(looks, cycle(MARKERS), strict=False):
            rows = rows_where(frame, "site", site)
            look = {"s": 34, "color": color, "marker": mark, "label": label}
            axes.scatter(rows["rank_share"], rows["dead_share"], **look)
        axes.set(xlabel="rank at 99 % of variance (share of width)", ylabel="dead features")
        axes.margins(0.08)
        percent(axes.xaxis)
        percent(axes.yaxis)
        legend_above(figure, axes)
        _label_points(figure, axes, frame)
    return figure


def _label_points(figure: Figure, axes: Axes, frame: pd.DataFrame) -> None:
    """Writes each point's label beside it, unless that would cover a point or another label."""
    figure.draw_without_rendering()
    points = axes.transData.transform(frame[["rank_share", "dead_share"]].to_numpy(dtype=float))
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    for at, text in zip(
        frame[["rank_share", "dead_share"]].to_numpy(), frame["label"], strict=True
    ):
        for shift, side in (
            ((7, 0), "left"),
            ((-7, 0), "right"),
            ((0, 9), "center"),
            ((0, -9), "center"),
        ):
            place = {"xytext": shift, "textcoords": "offset points", "ha": side, "va": "center"}
            note = axes.annotate(str(text), tuple(at), fontsize=8.5, color=NOTE, **place)
            box = note.get_window_extent()
            if box.count_overlaps(taken) == 0 and axes.bbox.containsx(box.x1):
                taken.append(box)
                break
            note.remove()


def overlap_by_fate(frame: pd.DataFrame) -> Figure:
    """How far features lay in the active subspace at the start, by whether they lived.

    `frame`: overlap (share of the initial direction's squared norm), alive (bool).
    """
    checked(frame, "overlap", "alive")
    alive = frame["alive"].astype(bool)
    with closed_figure(height=3.6) as (figure, axes):
        bins = np.histogram_bin_edges(frame["overlap"], bins=40)
        for rows, name, color in ((alive, "alive", "#0072B2"), (~alive, "dead", "#D55E00")):
            values = frame.loc[rows, "overlap"].to_numpy(dtype=float)
            if len(values):
                look = {"color": color, "label": f"{name} at the end ({len(values):,})"}
                outlined(axes, values, bins, len(values), **look)
                axes.axvline(float(np.median(values)), color=color, lw=1.4, ls="--")
        axes.set_xlabel(
            "share of the initial direction inside the active subspace (dashed: median)"
        )
        axes.set_ylabel("share of features of that fate")
        percent(axes.xaxis)
        percent(axes.yaxis)
        legend_above(figure, axes)
    return figure


def dead_and_fvu(frame: pd.DataFrame) -> Figure:
    """Dead features and fraction of variance unexplained by condition, a point per seed, bar at the mean.

    `frame`: condition, d_sae, dead_share, fvu, seed.
    """
    checked(frame, "condition", "d_sae", "dead_share", "fvu", "seed")
    looks, widths = condition_looks(frame["condition"]), sorted(frame["d_sae"].unique())
    rows = [
        (condition, d)
        for condition in looks
        for d in widths
        if ((frame["condition"] == condition) & (frame["d_sae"] == d)).any()
    ]
    names = [
        condition if len(widths) == 1 else f"{condition}\n{d:,} features" for condition, d in rows
    ]
    with closed_figure(2, height=1.3 + 0.42 * len(rows)) as (figure, panels):
        for axes, (column, label) in zip(panels, _OUTCOMES.items(), strict=True):
            for place, (condition, d) in enumerate(rows):
                values = frame[column][(frame["condition"] == condition) & (frame["d_sae"] == d)]
                color, mark = looks[condition]["color"], MARKERS[widths.index(d) % len(MARKERS)]
                axes.plot(values, [place] * len(values), mark, color=color, ms=7, alpha=0.75)
                axes.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color=color, lw=2)
            axes.set_yticks(range(len(rows)), names if column == "dead_share" else [])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.margins(x=0.1)
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        from_zero(panels[0].xaxis)
        percent(panels[0].xaxis)
    return figure


def d_init_sweep(frame: pd.DataFrame, baseline: Mapping[str, float] | None = None) -> Figure:
    """Dead features and FVU by the width of the starting subspace; points are runs, lines means.

    `frame`: d_init_share, dead_share, fvu. `baseline`: the random start's dead_share and fvu.
    """
    checked(frame, "d_init_share", "dead_share", "fvu")
    with closed_figure(2, height=3.5) as (figure, panels):
        for axes, (column, label) in zip(panels, _OUTCOMES.items(), strict=True):
            color, (shares, runs) = CONDITIONS["asi"], _grouped(frame, "d_init_share", column)
            axes.plot(frame["d_init_share"], frame[column], "o", ms=5, alpha=0.6, color=color)
            axes.plot(shares, [np.mean(v) for v in runs], color=color)
            if baseline:
                beside(axes, baseline[column], "random\nstart", CONDITIONS["random"])
            axes.set(xlabel="d_init (share of width)", title=label)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            percent(axes.xaxis)
        from_zero(panels[0].yaxis)
        percent(panels[0].yaxis)
    return figure
