"""The figure on dictionaries of several kinds.

As in `saesub.reproduce.plots`: it takes a tidy DataFrame with a column `condition` and returns a closed
Figure.
"""

from __future__ import annotations

from itertools import cycle

import pandas as pd
from matplotlib.figure import Figure

from saesub.reproduce.plots.style import (
    MARKERS,
    checked,
    closed_figure,
    condition_looks,
    from_zero,
    legend_above,
    percent,
    rows_where,
)


def dead_by_dictionary(frame: pd.DataFrame) -> Figure:
    """Dead features of each kind of dictionary, its conditions joined by a line: large marks are means
    over seeds, small ones the seeds.

    `frame`: dictionary, condition, dead_share; one row per seed. Dictionaries stand in the order in which
    they come.
    """
    checked(frame, "dictionary", "condition", "dead_share")
    names = list(dict.fromkeys(frame["dictionary"]))
    means = pd.DataFrame(
        frame.groupby(["dictionary", "condition"])["dead_share"].mean()
    ).reset_index()
    with closed_figure(height=1.5 + 0.36 * len(names)) as (figure, axes):
        for place, name in enumerate(names):
            ends = rows_where(means, "dictionary", name)["dead_share"]
            axes.plot([ends.min(), ends.max()], [place] * 2, color="#bbbbbb", lw=2.5, zorder=1)
        conditions = condition_looks(frame["condition"]).items()
        for (condition, look), mark in zip(conditions, cycle(MARKERS), strict=False):
            for rows, size in ((frame, {"s": 12, "lw": 0}), (means, {"s": 62, "label": condition})):
                of_condition = rows_where(rows, "condition", condition)
                places = [names.index(name) for name in of_condition["dictionary"]]
                size |= {"color": look["color"], "marker": mark, "zorder": 2}
                axes.scatter(of_condition["dead_share"], places, **size)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        from_zero(axes.xaxis)
        axes.set_xlabel("dead features (heads, for Lorsa)")
        axes.grid(axis="y", visible=False)
        percent(axes.xaxis)
        legend_above(figure, axes)
    return figure
