"""The figure of a diagnosis: silent features by window, their causes, and their scores' parts."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from saesub.evaluation.causes import CAUSES, REVIVALS
from saesub.evaluation.diagnosis import SAEDiagnosis
from saesub.reproduce.plots import drawing as draw
from saesub.reproduce.plots.looks import looks_of

_GREYS = np.linspace(0.2, 0.85, len(REVIVALS)).astype(str)
_ABOVE: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2, "fontsize": 8}
_SHOWN = 4000  # features of a kind, as points


def diagnosis(report: SAEDiagnosis) -> Figure:
    """Share of features that have not fired by window; causes of the dead, by what lets them fire
    again; standard deviation and mean of living and dead features' scores.

    Without an explanation only the first panel is drawn.
    """
    told = not isinstance(report.explanation, str)
    size = draw.WIDE * (1.6 if told else 0.7), 3.9
    with draw.closed_figure(3 if told else 1, size=size) as (figure, panels):
        silent = report.judgement.silent
        panels[0].plot(list(silent), list(silent.values()), "o-", color=draw.NOTE)
        panels[0].set_xscale("log", base=2)
        panels[0].set_xticks(list(silent)[-1::-2])
        panels[0].xaxis.set_major_formatter(EngFormatter(places=0))
        panels[0].set(xlabel="tokens watched", ylabel="features that have not fired")
        panels[0].set_title(f"{report.firings:,.0f} firings a feature: {report.cause}")
        draw.percent_from_zero(panels[0].yaxis)
        if told:
            _causes(panels[1], report)
            _scores(panels[2], report)
    return figure


def _causes(axes: Axes, report: SAEDiagnosis) -> None:
    dead = report.table().query("dead")
    left = np.zeros(len(CAUSES))
    for how, grey in zip(REVIVALS, _GREYS, strict=True):
        of_cause = dead.loc[dead["revived_by"] == how, "cause"].value_counts()
        if of_cause.empty:
            continue
        width = of_cause.reindex(list(CAUSES), fill_value=0).to_numpy() / len(dead)
        axes.barh(list(CAUSES), width, left=left, color=grey, label=how)
        left += width
    axes.invert_yaxis()
    axes.set_xlabel("share of dead features")
    draw.percent(axes.xaxis)
    axes.legend(title="revived by", title_fontsize=8, **_ABOVE)


def _scores(axes: Axes, report: SAEDiagnosis) -> None:
    frame = report.table()
    frame["spread"] *= frame["gain"]
    frame["mean"] = frame["offset"] + frame["bias"]
    living = frame[~frame["dead"]]
    looks = looks_of(CAUSES)
    groups = [(living, {"color": "#bbbbbb", "marker": ".", "label": "living"})]
    groups += [(frame[frame["cause"] == name], looks[name]) for name in CAUSES]
    for rows, look in groups:
        some = rows.iloc[:: 1 + len(rows) // _SHOWN]
        if len(some):
            style: Any = look | {"linestyle": "none", "alpha": 0.5}
            axes.plot(some["spread"], some["mean"], **style)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="standard deviation of the score", ylabel="mean of the score")
    axes.legend(**_ABOVE)
