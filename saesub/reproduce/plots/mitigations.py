"""The figure on mitigations: what each leaves dead, and what it reconstructs.

As in `saesub.reproduce.plots`: it takes a tidy DataFrame and returns a closed Figure.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from saesub.reproduce.plots.style import checked, closed_figure, percent

# Okabe and Ito's colours, one shape for each round of them: marks differ without colour too.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
_SHAPES = "osD^vP"
_LINEAR_BELOW = 1e-3  # of the features: there the axis of shares passes from linear to logarithmic


def pareto(frame: pd.DataFrame) -> Figure:
    """Dead features against FVU, a mark for each mitigation at its mean over seeds.

    Mitigations that no other beats in both are joined by a line and named first, the others follow by
    FVU. `frame`: condition, dead_share, fvu.
    """
    checked(frame, "condition", "dead_share", "fvu")
    means = pd.DataFrame(frame.groupby("condition", sort=False)[["dead_share", "fvu"]].mean())
    means = means.sort_values(by=["dead_share", "fvu"])
    best = means[means["fvu"] < means["fvu"].cummin().shift(fill_value=float("inf"))]
    others = means.drop(index=best.index).sort_values(by="fvu")
    with closed_figure(width=9.0, height=4.8) as (figure, axes):
        axes.step(best["dead_share"], best["fvu"], where="post", color="#999999", zorder=1)
        for place, (condition, point) in enumerate(pd.concat([best, others]).iterrows()):
            colour = _COLOURS[place % len(_COLOURS)]
            shape = _SHAPES[place // len(_COLOURS) % len(_SHAPES)]
            look = {"ms": 8, "color": colour, "mec": "white", "label": str(condition)}
            axes.plot(*point, shape, **look)
        axes.set_xscale("symlog", linthresh=_LINEAR_BELOW)
        axes.set_xlim(left=-0.1 * _LINEAR_BELOW)
        axes.set_yscale("log")
        percent(axes.xaxis)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(7))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda fvu, _: f"{fvu:.4g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="dead features", ylabel="fraction of variance unexplained")
        figure.legend(loc="outside right upper", fontsize=8.5)
    return figure
