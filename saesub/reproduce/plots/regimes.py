"""The recipe beside its baselines, from a frame with a row for each regime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from saesub.reproduce.plots import drawing as draw
from saesub.reproduce.plots.kept import kept
from saesub.reproduce.plots.looks import CONDITIONS

_ASI, _RANDOM = CONDITIONS["asi"], CONDITIONS["random"]
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # column, label and look
    "fvu": ("recipe", {"marker": "o", "color": _ASI}),
    "fvu_unrefitted": (
        "recipe before its refit",
        {"marker": "D", "facecolor": "none", "edgecolor": _ASI},
    ),
    "refitted_fvu": (
        "best baseline, refitted too",
        {"marker": "s", "facecolor": "none", "edgecolor": _RANDOM},
    ),
}


_STEP = 0.02  # between marks that are beyond the edge


@kept
def recipe_by_regime(frame: pd.DataFrame, reach: float = 0.4) -> Figure:
    """How far the recipe's FVU lies from that of the best swept baseline, a line for each regime.

    `frame`: model, regime (what is written beside the line), baseline_fvu, fvu, fvu_unrefitted and,
    missing where no baseline was refitted, refitted_fvu. Values beyond `reach` stand at the edge
    with their number.
    """
    draw.checked(frame, "model", "regime", "baseline_fvu", "fvu", "fvu_unrefitted")
    models, places = frame["model"].to_numpy(), np.arange(len(frame))
    with draw.closed_figure(size=(draw.WIDE, 1.2 + 0.24 * len(frame))) as (figure, (axes,)):
        kinds = [column for column in _KINDS if column in frame]
        changes = pd.DataFrame({c: frame[c] / frame["baseline_fvu"] - 1 for c in kinds})
        drawn = pd.DataFrame(_inside(changes.to_numpy(dtype=float), reach), columns=kinds)
        for column in kinds:
            label, look = _KINDS[column]
            axes.scatter(drawn[column], places, s=30, label=label, zorder=3, **look)
        for side in (-1, 1):
            _at_the_edge(axes, side * changes.to_numpy(dtype=float), side, reach)
        axes.axvline(0, color=draw.NOTE, linewidth=1.2)
        for place in places[1:][models[1:] != models[:-1]]:
            axes.axhline(place - 0.5, color=draw.NOTE, linewidth=0.8)
        axes.set_yticks(places, frame["regime"].tolist())
        axes.set_xlabel("FVU relative to that of the best baseline (left is better)")
        axes.set_xlim(-1.1 * reach, 1.1 * reach)
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(6))
        draw.percent(axes.xaxis)
        draw.legend_above(figure)
    return figure


def _inside(changes: np.ndarray, reach: float) -> np.ndarray:
    """The same, but what is beyond `reach` stands at the edge, one beside the other from there."""
    drawn = changes.clip(-reach, reach)
    for side in (-1, 1):
        beyond = side * changes > reach
        order = np.argsort(np.argsort(-side * changes, axis=1), axis=1)  # 0: the farthest out
        drawn = np.where(beyond, side * (reach - _STEP * order), drawn)
    return drawn


def _at_the_edge(axes: Axes, outward: np.ndarray, side: int, reach: float) -> None:
    """The numbers of all values beyond `reach` on a side, inside of their marks."""
    for place in np.flatnonzero((outward > reach).any(axis=1)):
        beyond = side * np.sort(outward[place][outward[place] > reach])[::-1]
        axes.annotate(
            draw.signed(", ".join(f"{100 * change:+.0f} %" for change in beyond)),
            (side * (reach - _STEP * (len(beyond) - 1)), place),
            xytext=(-7 * side, 0),
            textcoords="offset points",
            ha="left" if side < 0 else "right",
            va="center",
            fontsize=8.5,
            color=draw.NOTE,
        )
