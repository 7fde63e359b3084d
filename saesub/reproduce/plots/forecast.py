"""Figures on what is known before training: the starting dimension, and the forecast.

As in `saesub.reproduce.plots`: each takes a tidy DataFrame and returns a closed Figure.
"""

from __future__ import annotations

from typing import cast

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from saesub.reproduce.plots.style import CONDITIONS, SITES, checked, percent, style

_COLUMNS = 3
_LEAST = 1e-4  # of the features: shares below it are drawn there


def d_init_by_place(frame: pd.DataFrame) -> Figure:
    """Dead features by starting dimension, a panel for each place, "auto" marked.

    `frame`: place, d_init_share, dead_share, auto (bool); one run a row, d_init_share 1 the random
    start.
    """
    checked(frame, "place", "d_init_share", "dead_share", "auto")
    places = list(dict.fromkeys(frame["place"]))
    rows = -(-len(places) // _COLUMNS)
    with style():
        figure, grid = plt.subplots(
            rows, _COLUMNS, figsize=(9.0, 2.5 * rows), squeeze=False, sharex=True
        )
        for axes, place in zip(grid.flat, places, strict=False):
            of_place = pd.DataFrame(frame[frame["place"] == place])
            sweep = pd.DataFrame(of_place.groupby("d_init_share")[["dead_share"]].mean())
            random = pd.DataFrame(sweep[sweep.index == 1.0])
            auto = pd.DataFrame(of_place[of_place["auto"]])
            axes.plot(
                sweep.index, sweep["dead_share"], "o-", ms=4, color=CONDITIONS["asi"], label="swept"
            )
            axes.plot(
                random.index,
                random["dead_share"],
                "s",
                color=CONDITIONS["random"],
                label="random start",
            )
            axes.plot(
                auto["d_init_share"], auto["dead_share"], "*", ms=13, color="#D55E00", label="auto"
            )
            axes.set_title(place, fontsize=9.5)
            axes.set_ylim(bottom=0)
            percent(axes.yaxis)
            percent(axes.xaxis)
        for axes in grid.flat[len(places) :]:
            axes.set_axis_off()
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
        figure.supxlabel("d_init (share of width)", fontsize=10.5)
        figure.supylabel("dead features", fontsize=10.5)
        plt.close(figure)
    return figure


def forecast_and_outcome(frame: pd.DataFrame) -> Figure:
    """Dead features as forecast and as they came; a filled mark had no part in the fit.

    `frame`: hook_name, model, test (bool), forecast, dead_share.
    """
    checked(frame, "hook_name", "model", "test", "forecast", "dead_share")
    shapes = dict(zip(dict.fromkeys(frame["model"]), "oD^s", strict=False))
    site = frame["hook_name"].str.split("hook_").str[-1]
    with style():
        figure, axes = plt.subplots(figsize=(6.4, 4.8))
        axes.plot([_LEAST, 1], [_LEAST, 1], color="#888888", lw=1.2, zorder=1)
        for kind, rows in frame.groupby([site, "model", "test"], sort=False):
            name, model, test = cast(tuple[str, str, bool], kind)
            label, color = SITES[name]
            axes.plot(
                rows["forecast"].clip(lower=_LEAST),
                rows["dead_share"].clip(lower=_LEAST),
                shapes[model],
                ms=6,
                alpha=0.8,
                color=color,
                fillstyle="full" if test else "none",
                label=f"{label}, {model}, {'test' if test else 'fitted'}",
            )
        axes.set(xscale="log", yscale="log", xlabel="forecast dead share", ylabel="dead share")
        percent(axes.xaxis)
        percent(axes.yaxis)
        figure.legend(loc="outside right upper", fontsize=8.5)
        plt.close(figure)
    return figure
