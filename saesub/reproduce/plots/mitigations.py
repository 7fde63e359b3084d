"""Small multiples: one panel for each mitigation, and in every panel the conditions it is held
against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter

from saesub.errors import SaesubError
from saesub.reproduce.plots import drawing as draw
from saesub.reproduce.plots.kept import kept
from saesub.reproduce.plots.looks import looks_of

_COLUMNS = 4  # panels side by side
_EVERYWHERE = {"random": "random initialisation, no mitigation", "ASI": "ASI alone"}
# What is in every panel stands in another colour in each: these are of no condition.
_ALONE: dict[str, Any] = {
    "color": "#CC3311",
    "marker": "s",
    "linestyle": "-",
    "label": "this mitigation",
}
_WITH_ASI: dict[str, Any] = {
    "color": "#E69F00",
    "marker": "^",
    "linestyle": "--",
    "label": "this mitigation + ASI",
}
_BELOW_TITLE: dict[str, Any] = {
    "xycoords": "axes fraction",
    "xytext": (0, 4),
    "textcoords": "offset points",
    "ha": "center",
    "fontsize": 8.5,
    "color": draw.NOTE,
}
_LABELS = {
    "fvu": ("fraction of variance unexplained (FVU; left is better)", "dead features"),
    "tokens": ("training tokens", "silent features"),
}


@kept
def mitigation_panels(
    frame: pd.DataFrame,
    panels: Mapping[str, Sequence[str]],
    x: str = "fvu",
    *,
    notes: Mapping[str, str] | None = None,
) -> Figure:
    """Dead features of each mitigation against FVU along its learning rates, or over training.

    Every panel has the conditions "random" (grey) and "ASI" (blue), and those of its mitigation.

    Args:
        frame: condition, dead_share, and for `x="fvu"` fvu, lr and best (bool: whether the rate is
            the condition's best, which has a large mark), for `x="tokens"` tokens. One row for each
            point.
        panels: title -> the mitigation's condition and, if there is one, that with ASI.
        x: "fvu" or "tokens".
        notes: title -> a few words below it, such as what the mitigation costs.

    Raises SaesubError for another `x`, a condition that is not in the frame, or a note without its
    panel.
    """
    if x not in _LABELS:
        raise SaesubError(f"mitigation_panels draws over {' or '.join(_LABELS)}, not {x!r}")
    along = "lr" if x == "fvu" else "tokens"
    draw.checked(frame, "condition", "dead_share", x, along, *(["best"] if x == "fvu" else []))
    wanted = [*_EVERYWHERE, *(name for names in panels.values() for name in names)]
    if missing := sorted(set(wanted) - set(frame["condition"])):
        raise SaesubError(
            f"the frame has no rows of {missing}; add these conditions, or drop their panels"
        )
    notes = notes or {}
    if unknown := sorted(set(notes) - set(panels)):
        raise SaesubError(
            f"there are notes on {unknown}, which no panel is of; add it, or drop them"
        )
    frame = pd.DataFrame(frame[frame["condition"].isin(wanted)])
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (0.9 + 2.15 * columns, 1.3 + (2.25 if notes else 2.1) * rows)
    everywhere = {
        name: {**look, "label": _EVERYWHERE[name]} for name, look in looks_of(_EVERYWHERE).items()
    }
    with draw.closed_figure(columns, rows, size=size) as (figure, grid):
        for place, (axes, (title, names)) in enumerate(zip(grid, panels.items(), strict=False)):
            looks = everywhere | dict(zip(names, (_ALONE, _WITH_ASI), strict=False))
            for name, look in looks.items():
                of = pd.DataFrame(frame[frame["condition"] == name])
                _line(axes, of.sort_values(by=along), x, look)
            below = notes.get(title, "").count("\n") + bool(notes)  # lines of notes
            axes.set_title(title, pad=5 + 11 * below)
            axes.annotate(notes.get(title, ""), (0.5, 1), **_BELOW_TITLE)
            _set_axes(axes, frame, x)
            axes.tick_params(labelleft=place % columns == 0)
            axes.tick_params(labelbottom=place + columns >= len(panels))
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel(_LABELS[x][0], fontsize=10.5)
        scale = "; linear below 0.1 %" if x == "fvu" else ""
        figure.supylabel(f"{_LABELS[x][1]} (low is better{scale})", fontsize=10.5)
        _legend(figure, [*everywhere.values(), _ALONE, _WITH_ASI], panels, marks=x == "fvu")
    return figure


def _line(axes: Axes, rows: pd.DataFrame, x: str, look: dict[str, Any]) -> None:
    """A condition's line, and a large mark at its best rate."""
    own: dict[str, Any] = look if x == "fvu" else {**look, "marker": ""}
    axes.plot(rows[x], rows["dead_share"], **own)
    if x == "fvu":
        best = pd.DataFrame(rows[rows["best"].astype(bool)])
        mark: dict[str, Any] = {"color": look["color"], "marker": look["marker"], "mfc": "none"}
        axes.plot(best[x], best["dead_share"], linestyle="", ms=9, mew=1.4, zorder=3, **mark)


def _set_axes(axes: Axes, frame: pd.DataFrame, x: str) -> None:
    """The same limits in every panel. Over FVU, shares pass to a logarithmic scale that shows 0."""
    highest = max(frame["dead_share"].max(), draw.LINEAR_BELOW)
    if x == "fvu":
        draw.percent_from_linear(axes.yaxis, highest)
    else:
        axes.set_ylim(-0.03 * highest, 1.05 * highest)
        draw.percent(axes.yaxis)
    low, high = frame[x].min(), frame[x].max()
    room = 0.06 * (high - low) or 0.06 * high
    axes.set_xlim(low - room, high + room)
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    plain = ScalarFormatter(useOffset=False)  # as many decimals as tell the ticks apart
    axes.xaxis.set_major_formatter(plain if x == "fvu" else EngFormatter(sep=" "))


def _legend(
    figure: Figure,
    looks: Sequence[dict[str, Any]],
    panels: Mapping[str, Sequence[str]],
    *,
    marks: bool,
) -> None:
    """What each line is, once for all panels, and what the large marks are."""
    shown = looks if any(len(names) > 1 for names in panels.values()) else looks[:-1]
    plain: dict[str, Any] = {} if marks else {"marker": ""}
    drawn: list[dict[str, Any]] = [{**look, **plain} for look in shown]
    handles = [Line2D([], [], **look) for look in drawn]
    if marks:
        large: dict[str, Any] = {
            "color": draw.NOTE,
            "marker": "o",
            "ms": 9,
            "linestyle": "",
            "mfc": "none",
        }
        handles.append(Line2D([], [], label="each mark: a rate; large, open: the best", **large))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9)
