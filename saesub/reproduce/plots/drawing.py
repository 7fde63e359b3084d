"""What all figures share: the style, the figure itself, its axes, and what is written in it.

Figures are drawn in `closed_figure`, from frames that `checked` has let through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

from saesub.errors import SaesubError
from saesub.reproduce.plots.looks import looks_of, series

NOTE = "#444444"
WIDE = 7.4
LINEAR_BELOW = 1e-3  # of the features: there axes of shares pass from linear to logarithmic
_BESIDE = (  # where a text may stand, in points from what it is of
    *(((8, 0), "left"), ((-8, 0), "right"), ((0, 11), "center"), ((0, -11), "center")),
    *(((6, 9), "left"), ((-6, 9), "right"), ((6, -9), "left"), ((-6, -9), "right")),
    *(((14, 18), "left"), ((-14, 18), "right"), ((14, -18), "left"), ((-14, -18), "right")),
)


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
    block the figure is closed. If the block has placed no legend, one of all panels goes above
    them.
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
    """One legend of all panels above them, in as few rows as fit into the figure's width."""
    named = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    for rows in range(1, len(named) + 1):
        columns = -(-len(named) // rows)
        handles, labels = list(named.values()), list(named)
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
        axis.set_major_formatter(FuncFormatter(lambda share, _: signed(f"{100 * share:.4g} %")))


def signed(text: str) -> str:
    """A text with true minus signs before its numbers."""
    return re.sub(r"-(?=\d)", "−", text)


def counted(numbers: Iterable[int], of: str) -> str:
    """How many there are, in words for a note: "3 seeds", "1 to 3 seeds"."""
    numbers = sorted(map(int, numbers))
    least, most = numbers[0], numbers[-1]
    return f"{least:,} to {most:,} {of}s" if least < most else f"{most:,} {of}{'s' * (most != 1)}"


def percent_from_linear(axis: Axis, highest: float) -> None:
    """Shows an axis of shares on a logarithmic scale, which is linear below 0.1 % so that it has 0;
    that part is shaded, and the axis goes to 100 % where values are far above 10 %."""
    top = 1.0 if highest > 0.2 else max(1.6 * highest, 2 * LINEAR_BELOW)
    vertical = axis is axis.axes.yaxis
    scale, limits, shade = (
        (axis.axes.set_yscale, axis.axes.set_ylim, axis.axes.axhspan)
        if vertical
        else (axis.axes.set_xscale, axis.axes.set_xlim, axis.axes.axvspan)
    )
    scale("symlog", linthresh=LINEAR_BELOW)
    limits(-0.2 * LINEAR_BELOW, 1.12 * top)
    shade(-LINEAR_BELOW, LINEAR_BELOW, color="#f5f5f5", zorder=0)
    axis.set_ticks([tick for tick in (0, 1e-3, 1e-2, 1e-1, 1) if tick <= top])
    axis.set_minor_formatter(NullFormatter())
    percent(axis)


def label_points(
    figure: Figure, axes: Axes, points: np.ndarray, texts: Iterable[str], colors: Iterable[str]
) -> None:
    """Writes each point's text beside it, where it covers no line if there is room, and never
    another text or point: then it is left out."""
    figure.draw_without_rendering()
    taken = [_around(at, 10) for at in axes.transData.transform(points)]
    along = [_around(at, 2) for line in axes.lines for at in _dots(line)]
    for point, text, color in zip(points, texts, colors, strict=True):
        own: Any = {"color": color, "fontsize": 8.5, "va": "center", "textcoords": "offset points"}
        for (shift, side), hidden in _tries(taken + along, taken):
            note = axes.annotate(text, tuple(point), xytext=shift, ha=side, **own)
            box = note.get_window_extent()
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            inside = inside and box.y0 >= axes.bbox.y0 and box.y1 <= axes.bbox.y1
            if inside and not box.count_overlaps(hidden):
                taken.append(box)
                break
            note.remove()


def _tries(*hidden: list[Bbox]) -> Iterator[tuple[Any, list[Bbox]]]:
    return ((place, boxes) for boxes in hidden for place in _BESIDE)


def _around(at: np.ndarray, size: float) -> Bbox:
    return Bbox.from_bounds(at[0] - size / 2, at[1] - size / 2, size, size)


def _dots(line: Line2D) -> np.ndarray:
    """Pixels along a line, closer than a text is high."""
    corners = line.get_transform().transform(line.get_xydata())
    return np.concatenate([corners, *(np.linspace(*ends, 40) for ends in pairwise(corners))])


def percent_from_zero(axis: Axis) -> None:
    """Shows an axis of shares in per cent, from a little below 0, so that marks at 0 are whole."""
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


def paper_lines(paper: Mapping[str, float] | None) -> dict[float, tuple[str, str]]:
    """The paper's values with their colour, grey where several sites share one, and their names."""
    named: dict[float, tuple[str, str]] = {}
    for site, look in looks_of(paper or ()).items():
        value, label = (paper or {})[site], f"paper, {look['label']}"
        color = NOTE if value in named else look["color"]
        names = f"{named[value][1]}, {look['label']}" if value in named else label
        named[value] = color, names
    return named
