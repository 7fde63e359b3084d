"""The README's figure: dead features of two initialisations at every hook point of a study.

As in `saesub.reproduce.plots`: it takes a tidy DataFrame and returns a closed Figure.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from saesub.reproduce.plots.style import (
    CONDITIONS,
    MARKERS,
    WIDE,
    checked,
    closed_figure,
    from_zero,
    percent,
)

_RANDOM, _ASI = "random initialisation", "active subspace initialisation (ASI)"
_COLOURS = {_RANDOM: CONDITIONS["random"], _ASI: CONDITIONS["asi"]}


def dead_by_hook_point(frame: pd.DataFrame) -> Figure:
    """Dead features with a random and with a subspace initialisation, one line for each place.

    The title counts the places at which the subspace initialisation leaves fewer features dead.
    The marks are joined by a solid line there and by a dotted line elsewhere.

    Args:
        frame: one row for each place, in the order of drawing from the top, with the columns
            `place` (text), `random` and `asi` (share of features that are dead).

    Raises:
        SaesubError: a column is missing, there are no rows, or a share is NaN or infinite.
    """
    checked(frame, "place", "random", "asi")
    fewer = int((frame["asi"] < frame["random"]).sum())
    with closed_figure(width=WIDE + 1.2, height=1.5 + 0.28 * len(frame)) as (figure, axes):
        for height, row in enumerate(frame.to_dict("records")):
            line = "-" if row["asi"] < row["random"] else ":"
            axes.plot([row["random"], row["asi"]], [height] * 2, line, color="#9a9a9a", zorder=1)
            text = f"{100 * row['random']:.2f} % → {100 * row['asi']:.2f} %"
            place = axes.get_yaxis_transform()
            axes.text(1.01, height, text, transform=place, va="center", fontsize=9)
        for (label, colour), column, marker in zip(
            _COLOURS.items(), ("random", "asi"), MARKERS, strict=False
        ):
            heights = range(len(frame))
            axes.plot(frame[column], heights, marker, ms=7, color=colour, label=label)
        axes.set_yticks(range(len(frame)), frame["place"].tolist())
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        from_zero(axes.xaxis)
        percent(axes.xaxis)
        axes.set_xlabel(
            "dead features: share of the SAE's features that never fire on held-out text"
        )
        axes.set_title(f"ASI leaves fewer features dead at {fewer} of {len(frame)} hook points")
        figure.legend(loc="outside lower center", ncols=2)
    return figure
