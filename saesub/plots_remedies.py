"""The figure on remedies: what each leaves dead, and what it reconstructs.

As in `saesub.plots`: it takes a tidy DataFrame and returns a closed Figure.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from saesub.plots import _arm_looks, _checked, _figure, _percent


def pareto(frame: pd.DataFrame) -> Figure:
    """Dead features against FVU, a mark for each remedy at its mean over seeds, its name beside it.

    Remedies that no other beats in both are joined by a line. `frame`: arm, dead_share, fvu.
    """
    _checked(frame, "arm", "dead_share", "fvu")
    means = pd.DataFrame(frame.groupby("arm", sort=False)[["dead_share", "fvu"]].mean())
    means = means.sort_values(by="dead_share")
    best = means[means["fvu"] < means["fvu"].cummin().shift(fill_value=float("inf"))]
    with _figure(height=5.2) as (figure, axes):
        axes.step(best["dead_share"], best["fvu"], where="post", color="#bbbbbb", zorder=1)
        looks = _arm_looks(means.index)
        for place, (arm, point) in enumerate(means.iterrows()):
            axes.scatter(*point, color=looks[str(arm)]["color"], s=45, zorder=2)
            shift = (6, 5) if place % 2 else (6, -9)  # neighbours' names above and below
            axes.annotate(str(arm), tuple(point), shift, textcoords="offset points", fontsize=8.5)
        axes.margins(x=0.18, y=0.08)
        axes.set(xlabel="dead features", ylabel="fraction of variance unexplained")
        _percent(axes.xaxis)
    return figure
