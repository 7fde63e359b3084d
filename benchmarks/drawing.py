"""Colours of the contenders, and lines that are named at their ends."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

COLOURS = {
    "sae-lens": "#444444",
    "sae-lens-two": "#444444",
    "sae-lens-sparse": "#999999",
    "sae-lens-fast": "#999999",
    "llamascopium": "#CC6677",
    "sparsify": "#882255",
    "dictionary-learning": "#B8860B",
    "saesub-saelens-adam": "#88CCEE",
    "saesub-torch-adam": "#56B4E9",
    "saesub-torch-sparse_adam": "#44AA99",
    "saesub-native-adam": "#0072B2",
    "saesub-native-sparse_adam": "#332288",
    "encoder-product": "#000000",
    "saesub": "#0072B2",
    "saesub-two": "#332288",
}
_LABEL_GAP = 0.055  # of the axes' height, between two labels


def ordered(names: pd.Index) -> list[str]:
    """The names in the report's order; what starts in the active subspace follows its like."""
    order = list(COLOURS)
    return sorted(names, key=lambda name: (order.index(name.removesuffix("-asi")), name))


def label_ends(axes: Axes, seconds: pd.DataFrame) -> None:
    """Name each line at its end, the names moved apart where the ends lie close."""
    axes.autoscale_view()
    low, high = np.log(axes.get_ylim())
    last = seconds.apply(pd.Series.last_valid_index)
    for width, of_width in last.groupby(last):
        ends = seconds.loc[width, of_width.index].sort_values()
        heights = _apart(((np.log(ends) - low) / (high - low)).tolist(), _LABEL_GAP)
        for name, height in zip(ends.index, heights, strict=True):
            _label(axes, name, COLOURS[name], (width, height))


def _label(axes: Axes, text: str, colour: str, at: tuple[float, float]) -> None:
    axes.annotate(
        text,
        at,  # a width, and a share of the axes' height
        xycoords=axes.get_xaxis_transform(),
        xytext=(8, 0),
        textcoords="offset points",
        color=colour,
        fontsize=8.5,
        va="center",
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def _apart(heights: list[float], gap: float) -> list[float]:
    """Ascending heights, moved a little, so that neighbours differ by `gap`."""
    y = np.array(heights)
    for _ in range(200):
        for i in range(len(y) - 1):
            lack = gap - (y[i + 1] - y[i])
            if lack > 1e-6:
                y[i], y[i + 1] = y[i] - lack / 2, y[i + 1] + lack / 2
    return y.tolist()


def save_png(made: Figure, path: str | Path) -> None:
    """Write a figure at 150 dpi with a palette of 64 colours, a fifth of the size without one."""
    drawn = BytesIO()
    made.savefig(drawn, dpi=150)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)
