"""The look that all figures share: colours of sites and conditions, the figure itself, its axes.

Figures are drawn in `closed_figure`, from frames that `checked` has let through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from saesub.errors import SaesubError

# Sites have Okabe and Ito's colours and conditions have others, so that a reader does not take one
# for the other. The tests look at both as the colour-blind see them.
SITES = {
    "attn_out": ("attention output", "#D55E00"),
    "mlp_out": ("MLP output", "#0072B2"),
    "resid_post": ("residual stream", "#009E73"),
    "z": ("heads' output z", "#CC79A7"),
}
CONDITIONS = {
    "random": "#7F7F7F",
    "random + sparseadam": "#B8860B",
    "asi": "#332288",
    "asi + sparseadam": "#1E9BD0",
}
_LOOKS = SITES | {label.lower(): (label, color) for label, color in SITES.values()}
_LOOKS |= {name: ("", color) for name, color in CONDITIONS.items()}
_OTHER_COLOURS = ("#117733", "#E69F00", "#56B4E9", "#661100", "#999933", "#000000")
_LINES = {"random": "--", "random + sparseadam": "-.", "asi + sparseadam": ":"}
MARKERS = "oDs^vP"  # lines of a figure differ in their markers, or dashes, as well as in colour
NOTE = "#444444"
WIDE = 7.4


@contextmanager
def style() -> Iterator[None]:
    """saesub's look, for the figures made inside the `with` block only."""
    look = {
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "font.size": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 11,
        "grid.color": "#e4e4e4",
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 4,
        "figure.facecolor": "white",
        "axes.facecolor": "white",
    }
    with plt.rc_context(cast(Any, look)):
        yield


@contextmanager
def closed_figure(
    columns: int = 1,
    rows: int = 1,
    *,
    size: tuple[float, float] = (WIDE, 3.9),
    share_x: bool = True,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in saesub's look and its panels, row by row; its size is in inches.

    Panels in several rows have one range of x, unless `share_x` is False. At the end of the `with`
    block the figure is closed. If the block has placed no legend, the first panel's legend goes
    above the panels.
    """
    with style():
        figure, grid = plt.subplots(
            rows, columns, figsize=size, squeeze=False, sharex=share_x and rows > 1
        )
        try:
            yield figure, list(grid.flat)
            if not figure.legends and not grid[0, 0].get_legend():
                legend_above(figure)
        finally:
            plt.close(figure)


def legend_above(figure: Figure) -> None:
    """The first panel's legend above all panels, in as few rows as fit into the figure's width."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for rows in range(1, len(labels) + 1):
        columns = -(-len(labels) // rows)
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def checked(frame: pd.DataFrame, *columns: str) -> None:
    """SaesubError if a column is missing, if there are no rows, or for NaN or Inf."""
    if missing := [c for c in columns if c not in frame.columns]:
        raise SaesubError(
            f"the frame lacks the columns {missing}; add them to those it has: "
            f"{list(frame.columns)}"
        )
    if frame.empty:
        raise SaesubError(f"the frame of {list(columns)} has no rows; give at least one to draw")
    numbers = frame[list(columns)].select_dtypes("number")
    if bad := [c for c in numbers if not np.isfinite(numbers[c].to_numpy(dtype=float)).all()]:
        raise SaesubError(f"NaN or Inf in {bad}; drop those rows before drawing")


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Label, colour, line style and marker of each site or condition.

    A site is known by its name in SITES, by a hook point that ends in it, or by its label.
    """
    others, markers, found = cycle(_OTHER_COLOURS), cycle(MARKERS), {}
    for name in dict.fromkeys(names):
        key = " ".join(name.rsplit("hook_", 1)[-1].lower().replace("+", " + ").split())
        label, color = _LOOKS.get(key) or ("", next(others))
        line = {"linestyle": _LINES.get(key, "-"), "marker": next(markers)}
        found[name] = {"label": label or name, "color": color} | line
    return found


def curve_looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The same for curves without markers, which differ in their dashes."""
    dashed = zip(looks(names).items(), cycle(("-", "--", "-.", ":")), strict=False)
    return {name: look | {"marker": "", "linestyle": dash} for (name, look), dash in dashed}


def series(frame: pd.DataFrame, column: str) -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    """The rows of each site or condition, in the order of the frame, with the look of each."""
    named = looks(frame[column]).items()
    return [(pd.DataFrame(frame[frame[column] == name]), look) for name, look in named]


def over_seeds(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The mean, min and max of `y` at each value of `x`, which rises."""
    return pd.DataFrame(frame.groupby(x)[y].agg(["mean", "min", "max"]))


def condition_lines(axes: Axes, frame: pd.DataFrame, x: str, y: str) -> None:
    """Per condition the mean over seeds as a line, least to most as a band."""
    for rows, look in series(frame, "condition"):
        seeds = over_seeds(rows, x, y)
        axes.plot(seeds.index, seeds["mean"], **look)
        band = {"color": look["color"], "alpha": 0.18, "lw": 0}
        axes.fill_between(seeds.index, seeds["min"], seeds["max"], **band)


def percent(*axes: Axis) -> None:
    """Shows axes of shares in per cent."""
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))


def percent_from_zero(axis: Axis) -> None:
    """The same, and starts the axis a little below 0, so that marks at 0 are whole."""
    percent(axis)
    low, high = axis.get_data_interval()
    vertical = axis is axis.axes.yaxis
    (axis.axes.set_ylim if vertical else axis.axes.set_xlim)(min(low, 0) - 0.02 * max(high, 1e-3))


def beside(axes: Axes, y: float, text: str, color: str = NOTE) -> None:
    """A dashed line across the panel, labelled in the right margin where no data can lie."""
    axes.axhline(y, color=color, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1)
    in_margin(axes, y, text, color=color)


def in_margin(axes: Axes, y: float, text: str, **look: Any) -> None:
    """Text right of the panel at height `y`."""
    axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9, **look)


def paper_lines(paper: Mapping[str, float] | None) -> dict[float, str]:
    """The paper's values with their colour: grey where several sites share one."""
    colours: dict[float, str] = {}
    for site, look in looks(paper or ()).items():
        value = (paper or {})[site]
        colours[value] = NOTE if value in colours else look["color"]
    return colours
