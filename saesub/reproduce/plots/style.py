"""The one look of all figures: a fixed colour per site and per condition, and what figures share.

Figures are drawn in `closed_figure`, from frames that `checked` has let through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from saesub.errors import SaesubError

# Sites wear Okabe and Ito's colours, conditions others, so that neither is taken for the other; the tests
# look at both through the eyes of the colour-blind.
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
_SPARE = ("#117733", "#E69F00", "#56B4E9", "#661100", "#999933", "#000000")
_LINES = {"random": "--", "random + sparseadam": "-.", "asi + sparseadam": ":"}
MARKERS = "oDs^vP"  # lines of a figure differ in their marks, or dashes, as well as in colour
DASHES = ("-", "--", "-.", ":")
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
        "figure.facecolor": "white",
        "axes.facecolor": "white",
    }
    with plt.rc_context(cast(Any, look)):
        yield


@contextmanager
def closed_figure(columns: int = 1, width: float = WIDE, height: float = 3.9) -> Iterator[tuple]:
    """A figure in saesub's look, closed at the end of the `with` block, and its axes: a list of
    them where there are several columns. Width and height are in inches."""
    with style():
        figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False)
        try:
            yield figure, (axes[0, 0] if columns == 1 else list(axes[0]))
        finally:
            plt.close(figure)


def checked(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The frame, if it has these columns, rows in them and no NaN or Inf; else SaesubError."""
    if missing := [c for c in columns if c not in frame.columns]:
        raise SaesubError(f"the frame lacks {missing}; it has {list(frame.columns)}")
    if frame.empty:
        raise SaesubError(f"nothing to draw: the frame of {list(columns)} has no rows")
    numbers = frame[list(columns)].select_dtypes("number")
    if not np.isfinite(numbers.to_numpy(dtype=float)).all():
        bad = [c for c in numbers if not np.isfinite(numbers[c]).all()]
        raise SaesubError(f"NaN or Inf in {bad}; drop those rows before drawing")
    return frame


def rows_where(frame: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """The rows with this value in the column."""
    return pd.DataFrame(frame[frame[column] == value])


def site_looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Label and colour of each site, whether named `attn_out`, by hook point or by label."""
    spare = iter(_SPARE * 9)
    looks = {}
    for name in dict.fromkeys(names):
        short = name.rsplit("hook_", 1)[-1].lower()
        known = (look for key, look in SITES.items() if short in (key, look[0].lower()))
        looks[name] = next(known, None) or (name, next(spare))
    return looks


def condition_looks(names: Iterable[str]) -> dict[str, dict]:
    """Colour and line style of each condition; conditions without a fixed colour share the spare ones."""
    spare = iter(_SPARE * 9)
    looks = {}
    for name in dict.fromkeys(names):
        key = " ".join(name.lower().replace("+", " + ").split())
        looks[name] = {
            "color": CONDITIONS.get(key) or next(spare),
            "linestyle": _LINES.get(key, "-"),
        }
    return looks


def percent(axis: Axis) -> None:
    """Shows an axis of shares in per cent."""
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))


def legend_above(figure: Figure, axes: Axes) -> None:
    """The legend of `axes` above the figure's panels, in as few rows as fit into its width."""
    handles, labels = axes.get_legend_handles_labels()
    for rows in range(1, len(labels) + 1):
        columns = -(-len(labels) // rows)
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def outlined(axes: Axes, values: np.ndarray, bins: np.ndarray, n: int, **look: Any) -> None:
    """An outlined histogram in shares of `n`, so that one does not hide another."""
    shares = np.histogram(values.clip(bins[0], bins[-1]), bins)[0] / n
    axes.stairs(shares, bins, lw=1.8, **look)
    axes.stairs(shares, bins, fill=True, alpha=0.12, color=look["color"])


def from_zero(axis: Axis) -> None:
    """Starts an axis of shares a little below 0, so that marks at 0 are whole."""
    low, high = axis.get_data_interval()
    vertical = axis is axis.axes.yaxis
    (axis.axes.set_ylim if vertical else axis.axes.set_xlim)(min(low, 0) - 0.02 * max(high, 1e-3))


def beside(axes: Axes, y: float, text: str, color: str = NOTE) -> None:
    """A dashed line across, labelled in the right margin where no data can lie."""
    axes.axhline(y, color=color, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1)
    place = axes.get_yaxis_transform()
    axes.text(1.01, y, text, transform=place, color=color, va="center", fontsize=9)


def paper_lines(paper: Mapping[str, float]) -> dict[float, str]:
    """The paper's values with their colour: grey where several sites share one."""
    looks = site_looks(paper)
    return {
        value: looks[sites[0]][1] if len(sites) == 1 else NOTE
        for value in dict.fromkeys(paper.values())
        if (sites := [s for s, v in paper.items() if v == value])
    }
