"""Figures on training: dead features and FVU by width and d_init.

Each takes a tidy DataFrame and returns a closed Figure, as all of `saesub.reproduce.plots` do.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from saesub.errors import SaesubError, near_names
from saesub.reproduce.plots import drawing as draw
from saesub.reproduce.plots.kept import kept
from saesub.reproduce.plots.looks import CONDITIONS

OUTCOMES = {"dead_share": "dead features", "fvu": "fraction of variance unexplained"}


@kept
def width(frame: pd.DataFrame, measure: str = "dead_share", most: float | None = None) -> Figure:
    """Share of dead features, or FVU, by dictionary width, one line per condition.

    `frame`: d_sae, condition, and the `measure`, "dead_share" or "fvu". `most`: where the axis of
    shares ends, so that several figures have the same. Raises SaesubError for another measure.
    """
    if measure not in OUTCOMES:
        raise SaesubError(f"no measure {measure!r}; {near_names(measure, OUTCOMES)}")
    draw.checked(frame, "d_sae", "condition", measure)
    widths = sorted(frame["d_sae"].unique())
    with draw.closed_figure() as (figure, (axes,)):
        draw.condition_lines(axes, frame, "d_sae", measure)
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths[:: -(-len(widths) // 6)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.set(xlabel="width of the dictionary (features)", ylabel=OUTCOMES[measure])
        if measure == "dead_share":
            draw.percent_from_zero(axes.yaxis)
        if most is not None:
            axes.set_ylim(-0.02 * most, 1.05 * most)
    return figure


@kept
def d_init_by_place(frame: pd.DataFrame) -> Figure:
    """Dead features by the dimension of the subspace in which features begin, a panel for each
    place, with the automatic choice marked.

    `frame`: place, d_init_share, dead_share, auto (bool); one row per run. d_init_share 1 is the
    whole space.
    """
    draw.checked(frame, "place", "d_init_share", "dead_share", "auto")
    places = dict.fromkeys(frame["place"])
    rows, highest = -(-len(places) // 3), frame["dead_share"].max()
    with draw.closed_figure(3, rows, size=(9.0, 2.5 * rows)) as (figure, panels):
        for axes, place in zip(panels, places, strict=False):
            runs = pd.DataFrame(frame[frame["place"] == place])
            swept = draw.over_seeds(runs, "d_init_share", "dead_share")["mean"]
            auto = runs[runs["auto"]]
            axes.plot(swept, "o-", color=CONDITIONS["asi"], label="swept")
            look = {"ms": 6, "color": CONDITIONS["random"], "label": "d_init = d"}
            axes.plot(swept[swept.index == 1.0], "s", **look)
            look = {"ms": 13, "color": "black", "mfc": "none", "label": '"auto"'}
            axes.plot(auto["d_init_share"], auto["dead_share"], "*", **look)
            axes.set_title(place, fontsize=9.5)
            axes.set_ylim(-0.03 * highest, 1.08 * highest)
            draw.percent(axes.xaxis, axes.yaxis)
        for axes in panels[len(places) :]:
            axes.set_axis_off()
        figure.supxlabel("d_init (share of width)", fontsize=10.5)
        figure.supylabel("dead features", fontsize=10.5)
    return figure
