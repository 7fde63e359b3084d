"""Figures of the protocol: dead features by window, against FVU, and how often features fire.

Each takes a tidy DataFrame and returns a closed Figure, as all of `saesub.reproduce.plots` do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from saesub.reproduce.plots import drawing as draw
from saesub.reproduce.plots.kept import kept
from saesub.reproduce.plots.looks import series
from saesub.reproduce.plots.training import OUTCOMES

_REACH = 1.5  # times the longest window: a mark farther out would leave the panel empty


@kept
def dead_by_window(
    frame: pd.DataFrame, decides: float | None = None, most: float | None = None
) -> Figure:
    """Share of features that have not fired after so many held-out tokens, a line per condition.

    The seeds' mean is the line, least to most the band. Where a curve still falls, features are
    rare, not dead. `frame`: tokens, silent, condition. `decides`: the window that is marked, where
    the frame comes near it. `most`: where the axis of shares ends, so that several figures have the
    same.
    """
    draw.checked(frame, "tokens", "silent", "condition")
    with draw.closed_figure() as (figure, (axes,)):
        draw.condition_lines(axes, frame, "tokens", "silent")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(EngFormatter(places=0))
        if decides is not None and decides <= _REACH * frame["tokens"].max():
            axes.axvline(decides, color=draw.NOTE, lw=1, ls=":")
            place: Any = {"xycoords": ("data", "axes fraction"), "xytext": (-4, -10)}
            place |= {"textcoords": "offset points", "ha": "right", "va": "top"}
            note = "here a feature fires\n1,000 times on average"
            axes.annotate(note, (decides, 1), fontsize=8.5, color=draw.NOTE, **place)
        axes.set(xlabel="held-out tokens watched")
        axes.set_ylabel("features that have not fired")
        draw.percent_from_zero(axes.yaxis)
        if most is not None:
            axes.set_ylim(-0.02 * most, 1.03 * most)
    return figure


@kept
def dead_against_fvu(frame: pd.DataFrame) -> Figure:
    """Dead features against FVU along the learning rates tried, a line per condition.

    Left and low is better. The line joins means over seeds, the small marks are seeds, and the
    large mark is the condition's own best rate. `frame`: condition, lr, dead_share, fvu, best
    (bool); one row per seed.
    """
    draw.checked(frame, "condition", "lr", "dead_share", "fvu", "best")
    with draw.closed_figure(size=(draw.WIDE, 4.6)) as (figure, (axes,)):
        labels: list[tuple[float, float, str, str]] = []
        for rows, look in series(frame, "condition"):
            means = pd.DataFrame(rows.groupby("lr")[["fvu", "dead_share", "best"]].mean())
            axes.plot(means["fvu"], means["dead_share"], **look)
            best, own = pd.DataFrame(means[means["best"] > 0]), {"color": look["color"]}
            axes.plot(best["fvu"], best["dead_share"], look["marker"], ms=11, mfc="none", **own)
            axes.plot(rows["fvu"], rows["dead_share"], ".", ms=4, alpha=0.6, **own)
            places = zip(means["fvu"], means["dead_share"], means.index, strict=True)
            labels += [(fvu, dead, f"{lr:g}", look["color"]) for fvu, dead, lr in places]
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        note = "numbers: learning rates; large marks: best fit"
        axes.set(xlabel=f"{OUTCOMES['fvu']}\n({note})")
        axes.set_ylabel(f"{OUTCOMES['dead_share']} (linear below 0.1 %)")
        draw.percent_from_linear(axes.yaxis, float(frame["dead_share"].max()))
        draw.legend_above(figure)
        fvu, dead, rates, colors = zip(*labels, strict=True)
        draw.label_points(figure, axes, np.column_stack([fvu, dead]), rates, colors)
    return figure


@kept
def firing_counts(frame: pd.DataFrame) -> Figure:
    """How often features fire over the held-out tokens, by powers of two, one step per condition.

    `frame`: condition, power (-1 for features that never fire), share.
    """
    draw.checked(frame, "condition", "power", "share")
    with draw.closed_figure(size=(draw.WIDE, 3.6)) as (figure, (axes,)):
        highest = int(frame["power"].max())
        for rows, look in series(frame, "condition"):
            shares = pd.Series(rows.groupby("power")["share"].mean())
            shares = shares.reindex(range(-1, highest + 1))
            line = {part: look[part] for part in ("label", "color", "linestyle")}
            axes.stairs(shares.fillna(0), range(-1, highest + 2), lw=1.8, baseline=None, **line)
        powers = range(0, highest + 1, 3)
        names = ["never", *(f"{2**power:,}" for power in powers)]
        axes.set_xticks([-0.5, *(power + 0.5 for power in powers)], names)
        axes.set_xlabel(
            "firings over the held-out tokens (a step goes from this number to its double)"
        )
        axes.set_ylabel("share of features")
        draw.percent_from_zero(axes.yaxis)
    return figure
