"""Figures on spectra: ranks, variance held, what the loss needs of it, W_O and its output.

As in `saesub.reproduce.plots`: each takes data and returns a closed Figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.reproduce.plots.style import (
    DASHES,
    MARKERS,
    NOTE,
    SITES,
    WIDE,
    beside,
    checked,
    closed_figure,
    legend_above,
    paper_lines,
    percent,
    rows_where,
    site_looks,
)


def rank_by_layer(frame: pd.DataFrame, paper: Mapping[str, float] | None = None) -> Figure:
    """Rank at 99 % of variance by layer, one line per site.

    `frame`: layer, site, rank_share. `paper`: the paper's value by site.
    """
    checked(frame, "layer", "site", "rank_share")
    with closed_figure() as (figure, axes):
        looks = site_looks(frame["site"]).items()
        for (site, (label, color)), mark in zip(looks, cycle(MARKERS), strict=False):
            rows = rows_where(frame, "site", site).sort_values("layer")
            look = {"marker": mark, "ms": 4, "color": color, "label": label}
            axes.plot(rows["layer"], rows["rank_share"], **look)
        for value, color in paper_lines(paper or {}).items():
            beside(axes, value, f"paper\n{100 * value:.3g} %", color)
        axes.set(
            xlabel="layer", ylabel="rank at 99 % of variance\n(share of width)", ylim=(0, 1.03)
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        percent(axes.yaxis)
        legend_above(figure, axes)
    return figure


def _cumulative(curve: np.ndarray | Spectrum) -> np.ndarray:
    if not isinstance(curve, Spectrum):
        return np.asarray(curve, dtype=float)
    variances = np.sort(curve.eigenvalues.numpy().clip(min=0))[::-1]
    return np.cumsum(variances) / variances.sum()


def cumulative_variance(curves: Mapping[str, np.ndarray | Spectrum]) -> Figure:
    """Share of variance held by the top share of directions, one curve per site.

    Each is a `Spectrum`, or cumulative shares: entry i is that of the top i + 1 directions.
    """
    with closed_figure() as (figure, axes):
        looks = site_looks(curves).items()
        for (name, (label, color)), dash in zip(looks, cycle(DASHES), strict=False):
            shares = _cumulative(curves[name])
            if shares.min() < 0 or shares.max() > 1.001 or (np.diff(shares) < -1e-6).any():
                raise SaesubError(f"{name}: give cumulative shares that rise to 1, not variances")
            directions = np.arange(1, len(shares) + 1) / len(shares)
            axes.plot(directions, shares, dash, color=color, label=label)
        beside(axes, 0.99, "99 %")
        axes.set(xlabel="share of directions, strongest first", ylabel="share of variance held")
        axes.set(xlim=(0, 1), ylim=(0, 1.03))
        percent(axes.xaxis)
        percent(axes.yaxis)
        legend_above(figure, axes)
    return figure


def loss_recovered(
    frame: pd.DataFrame, target: float = 0.9, paper: Mapping[str, float] | None = None
) -> Figure:
    """Loss recovered when only the top principal components are kept, one line per site.

    `frame`: site, components_share, recovered, and perhaps low, high for a band. `paper`: by
    site, the share of components at which the paper reaches `target`.
    """
    checked(frame, "site", "components_share", "recovered")
    with closed_figure() as (figure, axes):
        looks = site_looks(frame["site"]).items()
        for (site, (label, color)), mark in zip(looks, cycle(MARKERS), strict=False):
            rows = rows_where(frame, "site", site).sort_values("components_share")
            x = rows["components_share"]
            axes.plot(x, rows["recovered"], marker=mark, ms=4, color=color, label=label)
            if {"low", "high"} <= set(rows.columns):
                axes.fill_between(x, rows["low"], rows["high"], color=color, alpha=0.18, lw=0)
        floor = min(0.0, float(frame["recovered"].min()))
        axes.set(xlabel="principal components kept (share of width)", ylabel="loss recovered")
        axes.set(xlim=(0, 1.02), ylim=(floor - 0.02, 1.05))
        for value, color in paper_lines(paper or {}).items():
            axes.axvline(value, color=color, linestyle=(0, (5, 3)), linewidth=1.2)
            side = {"rotation": 90, "ha": "right", "va": "bottom", "fontsize": 9}
            axes.text(value - 0.004, floor, f"paper {100 * value:.3g} %", color=color, **side)
        beside(axes, target, f"{100 * target:.3g} %")
        percent(axes.xaxis)
        percent(axes.yaxis)
        legend_above(figure, axes)
    return figure


def rank_heatmap(frame: pd.DataFrame) -> Figure:
    """Mean rank by model and corpus, one panel per site.

    `frame`: model, corpus, site, rank_share.
    """
    checked(frame, "model", "corpus", "site", "rank_share")
    looks = site_looks(frame["site"])
    models, corpora = (list(dict.fromkeys(frame[c])) for c in ("model", "corpus"))
    size = {
        "width": max(WIDE, 1.9 + 0.62 * len(corpora) * len(looks)),
        "height": 2.0 + 0.4 * len(models),
    }
    with closed_figure(len(looks), **size) as (figure, panels):
        for axes, (site, (label, _)) in zip(np.atleast_1d(panels), looks.items(), strict=True):
            rows = rows_where(frame, "site", site)
            table = rows.pivot_table("rank_share", "model", "corpus").reindex(
                models, columns=corpora
            )
            first = axes is np.atleast_1d(panels)[0]
            marks = {"annot": 100 * table, "fmt": ".0f", "annot_kws": {"fontsize": 9}}
            look = {"cmap": "cividis", "vmin": 0.2, "vmax": 1, "linewidths": 1, "cbar": False}
            sns.heatmap(table, ax=axes, yticklabels=models if first else False, **marks, **look)
            axes.set(title=label, xlabel="", ylabel="")
            axes.tick_params(length=0)
            axes.set_xticklabels(corpora, rotation=40, ha="right", rotation_mode="anchor")
            axes.tick_params(axis="y", rotation=0)
        figure.supxlabel("rank at 99 % of variance, % of width (mean over layers)", fontsize=10)
    return figure


def predicted_variance(frame: pd.DataFrame) -> Figure:
    """Variance predicted from W_O against the measured one. `frame`: predicted, measured."""
    checked(frame, "predicted", "measured")
    if (frame[["predicted", "measured"]] <= 0).any(axis=None):
        raise SaesubError("variances must be positive for logarithmic axes; drop the zero ones")
    with closed_figure(width=4.8, height=4.5) as (figure, axes):
        ends = [
            frame[["predicted", "measured"]].min().min(),
            frame[["predicted", "measured"]].max().max(),
        ]
        axes.loglog(ends, ends, color=NOTE, linestyle="--", lw=1.2, label="equal", zorder=1)
        color = SITES["attn_out"][1]
        axes.scatter(frame["predicted"], frame["measured"], s=12, alpha=0.6, color=color, lw=0)
        axes.set_xlabel(r"predicted variance, $\sigma_i^2\,\mathrm{Var}(z\cdot u_i)$")
        axes.set_ylabel("measured variance along $v_i$")
        axes.legend(loc="upper left")
    return figure


def singular_values(curves: Mapping[str, np.ndarray]) -> Figure:
    """Singular values in falling order on a logarithmic axis, one curve per name."""
    with closed_figure() as (figure, axes):
        looks = site_looks(curves).items()
        for (name, (label, color)), dash in zip(looks, cycle(DASHES), strict=False):
            values = np.asarray(curves[name], dtype=float)
            axes.semilogy(np.arange(1, len(values) + 1), values, dash, color=color, label=label)
        axes.set(xlabel="index of the singular value, largest first", ylabel="singular value")
        legend_above(figure, axes)
    return figure
