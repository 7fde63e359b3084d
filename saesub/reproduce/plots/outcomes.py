"""Figures on trained SAEs: what is dead or unexplained by rank, condition, kind and hook point.

Each takes a tidy DataFrame and returns a closed Figure, as all of `saesub.reproduce.plots` do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saesub.reproduce.plots import drawing as draw
from saesub.reproduce.plots.kept import kept
from saesub.reproduce.plots.looks import series

_SAME_L0 = 0.05  # active features
_DARK = 0.55  # from this share on, white text is easier to read in a cell than black


@kept
def dead_against_rank(
    frame: pd.DataFrame, rank: str = "rank at 99 % of variance (share of width)"
) -> Figure:
    """Share of dead features against a rank of the activations of each site, one point per site.

    `frame`: rank_share, dead_share, site, label. `rank`: which rank. A label is drawn where there
    is room for it.
    """
    draw.checked(frame, "rank_share", "dead_share", "site", "label")
    with draw.closed_figure(size=(draw.WIDE, 4.4)) as (figure, (axes,)):
        for rows, look in series(frame, "site"):
            axes.scatter(rows["rank_share"], rows["dead_share"], s=34, **look)
        axes.margins(x=0.08)
        axes.set(xlabel=rank, ylabel="dead features (linear below 0.1 %)")
        draw.percent(axes.xaxis)
        draw.percent_from_linear(axes.yaxis, float(frame["dead_share"].max()))
        draw.legend_above(figure)
        points = frame[["rank_share", "dead_share"]].to_numpy(dtype=float)
        draw.label_points(
            figure, axes, points, frame["label"].astype(str), [draw.NOTE] * len(frame)
        )
    return figure


@kept
def dead_by_dictionary(
    frame: pd.DataFrame, ranges: Mapping[str, Sequence[float]] | None = None
) -> Figure:
    """Dead features of each kind of dictionary, a line from its least to its most condition.

    Large marks are means over seeds, small ones the seeds. `frame`: dictionary, condition,
    dead_share; one row per seed. Where it has fvu and l0 too, a second panel shows FVU in the same
    way, and the numbers of active features stand beside it if they differ. Dictionaries stand in
    the order of the frame. `ranges`: dead_share or fvu -> the least and most that its axis has to
    show, so that several figures have the same.
    """
    draw.checked(frame, "dictionary", "condition", "dead_share")
    with_fit = {"fvu", "l0"} <= set(frame.columns)
    columns = ("dead_share", "fvu") if with_fit else ("dead_share",)
    draw.checked(frame, *columns)
    names = list(dict.fromkeys(frame["dictionary"]))
    size = draw.WIDE + 2 * with_fit, 1.5 + 0.36 * len(names)
    with draw.closed_figure(len(columns), size=size) as (figure, panels):
        for axes, column in zip(panels, columns, strict=True):
            _by_dictionary(axes, frame, column, names)
            axes.set_yticks(range(len(names)), names if axes is panels[0] else [])
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.grid(axis="y", visible=False)
            shown = (ranges or {}).get(column, ())
            axes.plot(shown, [0] * len(shown), linestyle="")  # invisible, and inside the limits
        heads = any(str(name).startswith("Lorsa") for name in names)
        panels[0].set_xlabel("dead features" + " (heads, for Lorsa)" * heads)
        draw.percent_from_zero(panels[0].xaxis)
        if with_fit:
            differ = float(np.ptp(frame["l0"])) > _SAME_L0
            panels[1].set_xlabel("FVU")
            if differ:
                draw.in_margin(
                    panels[1], -0.75, f"L0: {' · '.join(dict.fromkeys(frame['condition']))}"
                )
            panels[1].margins(x=0.08)
            for place, name in enumerate(names if differ else []):
                rows = frame[frame["dictionary"] == name]
                means = rows.groupby("condition", sort=False)["l0"].mean()
                draw.in_margin(panels[1], place, " · ".join(f"{l0:.1f}" for l0 in means))
    return figure


def _by_dictionary(axes: Axes, frame: pd.DataFrame, column: str, names: list[str]) -> None:
    """Seeds, means and the line between conditions of each dictionary, at its place in `names`."""
    for place, (_, rows) in enumerate(frame.groupby("dictionary", sort=False)):
        means = draw.over_seeds(rows, "condition", column)["mean"]
        axes.plot((means.min(), means.max()), [place] * 2, color="#bbbbbb", lw=2.5, zorder=1)
    for rows, look in series(frame, "condition"):
        mark = {"color": look["color"], "marker": look["marker"], "zorder": 2}
        means = draw.over_seeds(rows, "dictionary", column)["mean"]
        for values, sizes in (
            (rows.set_index("dictionary")[column], {"s": 12, "lw": 0}),
            (means, {"s": 62, "label": look["label"]}),
        ):
            places = [names.index(str(name)) for name in values.index]
            axes.scatter(values, places, **sizes, **mark)


@kept
def dead_by_remedy(table: pd.DataFrame) -> Figure:
    """Share of dead features by site (rows) and remedy (columns), in the order of the table.

    The name of the columns is written below them.
    """
    draw.checked(table, *table.columns)
    size = (draw.WIDE + 1.8, 1.2 + 0.27 * len(table))
    with draw.closed_figure(size=size) as (figure, (axes,)):
        text = {"annot": 100 * table, "fmt": ".1f", "annot_kws": {"fontsize": 9}}
        cells = {"cmap": "cividis_r", "vmin": 0, "vmax": 1, "linewidths": 1, "cbar": False}
        sns.heatmap(table, ax=axes, **text, **cells)
        for number, share in zip(axes.texts, table.to_numpy().ravel(), strict=True):
            number.set_color("white" if share > _DARK else "black")
        axes.set(title="dead features, %", xlabel=table.columns.name or "remedy", ylabel="")
        axes.tick_params(length=0, rotation=0, labelsize=9)
    return figure
