"""The figure on dictionaries of several kinds.

As in `saesub.reproduce.plots`: it takes a tidy DataFrame with a column `arm` and returns a closed
Figure.
"""

from __future__ import annotations

from itertools import cycle

import pandas as pd
from matplotlib.figure import Figure

from saesub.reproduce.plots.style import (
    MARKERS,
    arm_looks,
    checked,
    closed_figure,
    from_zero,
    legend_above,
    percent,
    rows_where,
)


def dead_by_dictionary(frame: pd.DataFrame) -> Figure:
    """Dead features of each kind of dictionary, its arms joined by a line: large marks are means
    over seeds, small ones the seeds.

    `frame`: dictionary, arm, dead_share; one row per seed. Dictionaries stand in the order in which
    they come.
    """
    checked(frame, "dictionary", "arm", "dead_share")
    names = list(dict.fromkeys(frame["dictionary"]))
    means = pd.DataFrame(frame.groupby(["dictionary", "arm"])["dead_share"].mean()).reset_index()
    with closed_figure(height=1.5 + 0.36 * len(names)) as (figure, axes):
        for place, name in enumerate(names):
            ends = rows_where(means, "dictionary", name)["dead_share"]
            axes.plot([ends.min(), ends.max()], [place] * 2, color="#bbbbbb", lw=2.5, zorder=1)
        arms = arm_looks(frame["arm"]).items()
        for (arm, look), mark in zip(arms, cycle(MARKERS), strict=False):
            for rows, size in ((frame, {"s": 12, "lw": 0}), (means, {"s": 62, "label": arm})):
                of_arm = rows_where(rows, "arm", arm)
                places = [names.index(name) for name in of_arm["dictionary"]]
                size |= {"color": look["color"], "marker": mark, "zorder": 2}
                axes.scatter(of_arm["dead_share"], places, **size)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        from_zero(axes.xaxis)
        axes.set_xlabel("dead features (heads, for Lorsa)")
        axes.grid(axis="y", visible=False)
        percent(axes.xaxis)
        legend_above(figure, axes)
    return figure
