"""Figures on spectra: ranks, variance held, loss recovered, W_O and the variance it predicts.

Each takes data and returns a closed Figure, as all of `saesub.reproduce.plots` do.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.reproduce.plots import drawing as draw


def rank_by_layer(frame: pd.DataFrame, paper: Mapping[str, float] | None = None) -> Figure:
    """Rank at 99 % of variance by layer, one line per site.

    `frame`: layer, site, rank_share. `paper`: the paper's value by site.
    """
    draw.checked(frame, "layer", "site", "rank_share")
    with draw.closed_figure() as (figure, (axes,)):
        for rows, look in draw.series(frame, "site"):
            rows = rows.sort_values("layer")
            axes.plot(rows["layer"], rows["rank_share"], **look)
        for value, color in draw.paper_lines(paper).items():
            draw.beside(axes, value, f"paper\n{100 * value:.3g} %", color)
        axes.set(xlabel="layer", ylim=(0, 1.03))
        axes.set_ylabel("rank at 99 % of variance\n(share of width)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        draw.percent(axes.yaxis)
    return figure


def _cumulative(name: str, curve: np.ndarray | Spectrum) -> np.ndarray:
    if isinstance(curve, Spectrum):
        variances = np.sort(curve.eigenvalues.numpy().clip(min=0))[::-1]
        return np.cumsum(variances) / variances.sum()
    shares = np.asarray(curve, dtype=float)
    if shares.min() < 0 or shares.max() > 1.001 or (np.diff(shares) < -1e-6).any():
        raise SaesubError(f"{name}: give cumulative shares that rise to 1, not variances")
    return shares


def cumulative_variance(curves: Mapping[str, np.ndarray | Spectrum]) -> Figure:
    """Share of variance held by the top share of directions, one curve per site.

    Each is a `Spectrum`, or cumulative shares: entry i is that of the top i + 1 directions.
    """
    with draw.closed_figure() as (figure, (axes,)):
        for name, look in draw.curve_looks(curves).items():
            shares = _cumulative(name, curves[name])
            axes.plot(np.arange(1, len(shares) + 1) / len(shares), shares, **look)
        draw.beside(axes, 0.99, "99 %")
        axes.set(xlabel="share of directions, strongest first", ylabel="share of variance held")
        axes.set(xlim=(0, 1), ylim=(0, 1.03))
        draw.percent(axes.xaxis, axes.yaxis)
    return figure


def loss_recovered(
    frame: pd.DataFrame, target: float = 0.9, paper: Mapping[str, float] | None = None
) -> Figure:
    """Loss recovered when only the top principal components are kept, one line per site.

    `frame`: site, components_share, recovered, and perhaps low, high for a band. `paper`: by
    site, the share of components at which the paper reaches `target`.
    """
    draw.checked(frame, "site", "components_share", "recovered")
    floor = min(0.0, float(frame["recovered"].min()))
    with draw.closed_figure() as (figure, (axes,)):
        for rows, look in draw.series(frame, "site"):
            rows = rows.sort_values("components_share")
            kept = rows["components_share"]
            axes.plot(kept, rows["recovered"], **look)
            if {"low", "high"} <= set(rows.columns):
                band = {"color": look["color"], "alpha": 0.18, "lw": 0}
                axes.fill_between(kept, rows["low"], rows["high"], **band)
        axes.set(xlabel="principal components kept (share of width)", ylabel="loss recovered")
        axes.set(xlim=(0, 1.02), ylim=(floor - 0.02, 1.05))
        for value, color in draw.paper_lines(paper).items():
            axes.axvline(value, color=color, linestyle=(0, (5, 3)), linewidth=1.2)
            side = {"rotation": 90, "ha": "right", "va": "bottom", "fontsize": 9}
            axes.text(value - 0.004, floor, f"paper {100 * value:.3g} %", color=color, **side)
        draw.beside(axes, target, f"{100 * target:.3g} %")
        draw.percent(axes.xaxis, axes.yaxis)
    return figure


def rank_heatmap(frame: pd.DataFrame) -> Figure:
    """Mean rank by model and corpus, one panel per site.

    `frame`: model, corpus, site, rank_share.
    """
    draw.checked(frame, "model", "corpus", "site", "rank_share")
    models, corpora = (list(dict.fromkeys(frame[c])) for c in ("model", "corpus"))
    sites = draw.series(frame, "site")
    size = max(draw.WIDE, 1.9 + 0.62 * len(corpora) * len(sites)), 2.0 + 0.4 * len(models)
    with draw.closed_figure(len(sites), size=size) as (figure, panels):
        for axes, (rows, look) in zip(panels, sites, strict=True):
            table = rows.pivot_table("rank_share", "model", "corpus")
            table = table.reindex(index=models, columns=corpora)
            text = {"annot": 100 * table, "fmt": ".0f", "annot_kws": {"fontsize": 9}}
            cells = {"cmap": "cividis", "vmin": 0.2, "vmax": 1, "linewidths": 1, "cbar": False}
            names = models if axes is panels[0] else False
            sns.heatmap(table, ax=axes, yticklabels=names, **text, **cells)
            axes.set(title=look["label"], xlabel="", ylabel="")
            axes.tick_params(length=0)
            axes.set_xticklabels(corpora, rotation=40, ha="right", rotation_mode="anchor")
            axes.tick_params(axis="y", rotation=0)
        figure.supxlabel("rank at 99 % of variance, % of width (mean over layers)", fontsize=10)
    return figure


def predicted_variance(frame: pd.DataFrame) -> Figure:
    """Variance predicted from W_O against the measured one. `frame`: predicted, measured."""
    draw.checked(frame, "predicted", "measured")
    both = frame[["predicted", "measured"]].to_numpy(dtype=float)
    if (both <= 0).any():
        raise SaesubError("variances must be positive for logarithmic axes; drop the zero ones")
    ends = both.min(), both.max()
    with draw.closed_figure(size=(4.8, 4.5)) as (figure, (axes,)):
        axes.loglog(ends, ends, color=draw.NOTE, linestyle="--", lw=1.2, label="equal", zorder=1)
        axes.scatter(*both.T, s=12, alpha=0.6, color=draw.SITES["attn_out"][1], lw=0)
        axes.set_xlabel(r"predicted variance, $\sigma_i^2\,\mathrm{Var}(z\cdot u_i)$")
        axes.set_ylabel("measured variance along $v_i$")
        axes.legend(loc="upper left")
    return figure


def singular_values(curves: Mapping[str, np.ndarray]) -> Figure:
    """Singular values in falling order on a logarithmic axis, one curve per name."""
    with draw.closed_figure() as (figure, (axes,)):
        for name, look in draw.curve_looks(curves).items():
            axes.semilogy(np.arange(1, len(curves[name]) + 1), curves[name], **look)
        axes.set(xlabel="index of the singular value, largest first", ylabel="singular value")
    return figure
