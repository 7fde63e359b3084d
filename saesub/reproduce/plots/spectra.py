"""Figures on spectra: ranks, variance held, loss recovered, W_O, its heads and what it predicts.

Each takes data and returns a closed Figure, as all of `saesub.reproduce.plots` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.reproduce.plots import drawing as draw
from saesub.reproduce.plots.kept import cumulative_shares, kept
from saesub.reproduce.plots.looks import SITES, curve_looks_of, looks_of, series

_DOTTED = {"linestyle": ":", "alpha": 0.8, "label": "", "markerfacecolor": "none"}


@kept
def rank_by_layer(frame: pd.DataFrame, paper: Mapping[str, float] | None = None) -> Figure:
    """Rank at 99 % of variance by layer, one line per site.

    `frame`: layer, site, rank_share. `paper`: the paper's value by site.
    """
    draw.checked(frame, "layer", "site", "rank_share")
    with draw.closed_figure() as (figure, (axes,)):
        _by_layer(axes, frame, "site", "rank_share")
        _paper(axes, paper)
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("rank at 99 % of variance\n(share of width)")
    return figure


@kept
def rank_by_stack(frame: pd.DataFrame, paper: Mapping[str, float] | None = None) -> Figure:
    """Rank at 99 % of variance by layer, a panel for each stack of layers, one line per site.

    `frame`: stack (the panel's title), layer, site, rank_share, and perhaps weights (trained or
    not): the first kind has full lines, others have dotted ones. `paper`: the paper's value by
    site.
    """
    draw.checked(frame, "stack", "layer", "site", "rank_share")
    if "weights" not in frame.columns:
        frame = frame.assign(weights="")
    stacks, kinds = (list(dict.fromkeys(frame[c])) for c in ("stack", "weights"))
    columns = min(3, len(stacks))
    n_rows = -(-len(stacks) // columns)
    size = (draw.WIDE + 1.5, 1.4 + 2.3 * n_rows)
    with draw.closed_figure(columns, n_rows, size=size, share_x=False) as (figure, panels):
        for axes in panels[len(stacks) :]:
            figure.delaxes(axes)
        for axes, stack in zip(panels, stacks, strict=False):
            for kind in kinds:
                rows = frame[(frame["stack"] == stack) & (frame["weights"] == kind)]
                dots = _DOTTED if kind != kinds[0] else {}
                _by_layer(axes, pd.DataFrame(rows), "site", "rank_share", **dots)
            _paper(axes, paper)
            axes.set(title=fill(stack, 20), ylim=(0, 1.03))
        for kind in kinds[1:]:
            panels[0].plot([], [], ":", color=draw.NOTE, label=kind)
        figure.supylabel("rank at 99 % of variance (share of width)", fontsize=10)
    return figure


@kept
def overlap_by_layer(frame: pd.DataFrame) -> Figure:
    """How far the subspaces of pairs of heads overlap by layer, one line per kind of pairs.

    `frame`: layer, pairs, overlap (a share: 0 if orthogonal, 1 if one holds the other).
    """
    draw.checked(frame, "layer", "pairs", "overlap")
    with draw.closed_figure() as (figure, (axes,)):
        _by_layer(axes, frame, "pairs", "overlap")
        axes.set(ylim=(0, None), ylabel="overlap of two heads' output subspaces")
    return figure


@kept
def causes_by_layer(frame: pd.DataFrame) -> Figure:
    """What each cause adds to the rank at 99 % of variance by layer, one line per cause.

    `frame`: layer, cause, change (a share of the width, below zero where it lowers the rank).
    """
    draw.checked(frame, "layer", "cause", "change")
    with draw.closed_figure() as (figure, (axes,)):
        _by_layer(axes, frame, "cause", "change")
        axes.axhline(0, color=draw.NOTE, linewidth=1, zorder=1)
        axes.set_ylabel("change of the rank at 99 %\n(share of width)")
    return figure


def _paper(axes: Axes, paper: Mapping[str, float] | None) -> None:
    """A dashed line at each of the paper's values, with its sites' names for the legend."""
    for value, (color, names) in draw.paper_lines(paper).items():
        line: Any = {"color": color, "linestyle": (0, (5, 3)), "linewidth": 1.2, "zorder": 1}
        axes.axhline(value, label=f"{names}: {100 * value:.3g} %", **line)


def _by_layer(axes: Axes, frame: pd.DataFrame, column: str, y: str, **instead: Any) -> None:
    """A line by layer for each value of `column`; `instead` replaces a part of their looks."""
    for rows, look in series(frame, column):
        rows = rows.sort_values("layer")
        axes.plot(rows["layer"], rows[y], **look | instead)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    draw.percent(axes.yaxis)


def _cumulative(name: str, curve: np.ndarray | Spectrum) -> np.ndarray:
    if isinstance(curve, Spectrum):
        return cumulative_shares(curve)
    shares = np.asarray(curve, dtype=float)
    if shares.min() < 0 or shares.max() > 1.001 or (np.diff(shares) < -1e-6).any():
        raise SaesubError(f"{name}: give cumulative shares that rise to 1, not variances")
    return shares


@kept
def cumulative_variance(curves: Mapping[str, np.ndarray | Spectrum]) -> Figure:
    """Share of variance held by the top share of directions, one curve per site.

    Each is a `Spectrum`, or cumulative shares: entry i is that of the top i + 1 directions.
    """
    with draw.closed_figure() as (figure, (axes,)):
        for name, look in curve_looks_of(curves).items():
            shares = _cumulative(name, curves[name])
            axes.plot(np.arange(1, len(shares) + 1) / len(shares), shares, **look)
        draw.beside(axes, 0.99, "99 %")
        axes.set(xlabel="share of directions, strongest first", ylabel="share of variance held")
        axes.set(xlim=(0, 1), ylim=(0, 1.03))
        draw.percent(axes.xaxis, axes.yaxis)
    return figure


@kept
def variance_and_loss(
    curves: Mapping[str, np.ndarray | Spectrum], frame: pd.DataFrame, share: float
) -> Figure:
    """The directions that hold a share of the variance, and the loss that comes back with them.

    `curves`: by site, as `cumulative_variance` takes them. `frame`: site, components_share,
    recovered, as `loss_recovered` takes it. A dot is where the share is reached.
    """
    draw.checked(frame, "site", "components_share", "recovered")
    with draw.closed_figure(2, size=(draw.WIDE + 1.5, 3.6)) as (figure, (variance, loss)):
        for name, look in curve_looks_of(curves).items():
            shares = _cumulative(name, curves[name])
            kept_share = directions_for(shares, share)
            variance.plot(np.arange(1, len(shares) + 1) / len(shares), shares, **look)
            variance.plot([kept_share], [share], "o", color=look["color"], ms=8)
            of = pd.DataFrame(frame[frame["site"] == name]).sort_values(by="components_share")
            if not len(of):
                continue
            loss.plot(of["components_share"], of["recovered"], **look)
            back = np.interp(kept_share, of["components_share"], of["recovered"])
            loss.plot([kept_share], [back], "o", color=look["color"], ms=8)
            loss.axvline(kept_share, color=look["color"], lw=1, ls=":")
        variance.axhline(share, color=draw.NOTE, lw=1, ls=":")
        variance.set(ylabel="share of variance held", ylim=(0, 1.03))
        loss.set(ylabel="loss recovered", ylim=(min(0, float(frame["recovered"].min())), 1.05))
        for axes in (variance, loss):
            axes.set(xlabel="directions kept, strongest first (share of width)", xlim=(0, 1))
            draw.percent(axes.xaxis, axes.yaxis)
    return figure


def directions_for(shares: np.ndarray, share: float) -> float:
    """The least part of all directions that holds this share of the variance."""
    return (int((shares < share).sum()) + 1) / len(shares)


@kept
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
        _with_bands(axes, frame, "components_share")
        axes.set(xlabel="principal components kept (share of width)", ylabel="loss recovered")
        axes.set(xlim=(0, 1.02), ylim=(floor - 0.02, 1.05))
        for value, (color, _) in draw.paper_lines(paper).items():
            axes.axvline(value, color=color, linestyle=(0, (5, 3)), linewidth=1.2)
            side = {"rotation": 90, "ha": "right", "va": "bottom", "fontsize": 9}
            axes.text(value - 0.004, floor, f"paper {100 * value:.3g} %", color=color, **side)
        draw.beside(axes, target, f"{100 * target:.3g} %\nof the loss")
        draw.percent(axes.xaxis, axes.yaxis)
    return figure


def _with_bands(axes: Axes, frame: pd.DataFrame, x: str) -> None:
    for rows, look in series(frame, "site"):
        rows = rows.sort_values(x)
        axes.plot(rows[x], rows["recovered"], **look)
        if {"low", "high"} <= set(rows.columns):
            band = {"color": look["color"], "alpha": 0.18, "lw": 0}
            axes.fill_between(rows[x], rows["low"], rows["high"], **band)


@kept
def loss_by_layer(frame: pd.DataFrame, target: float = 0.9) -> Figure:
    """Loss recovered against the number of directions kept, a panel for each layer.

    `frame`: layer (the panel's title), site, components, recovered, and perhaps low, high for a
    band. What lies below -0.5 or above 1.5 is outside of the panels.
    """
    draw.checked(frame, "layer", "site", "components", "recovered")
    layers = list(dict.fromkeys(frame["layer"]))
    columns = min(3, len(layers))
    n_rows = -(-len(layers) // columns)
    ends = [frame[c].to_numpy(dtype=float) for c in ("recovered", "low", "high") if c in frame]
    lowest, highest = max(-0.5, np.min(ends) - 0.03), min(1.5, np.max(ends) + 0.03)
    least, most = frame["components"].min(), frame["components"].max()
    size = (draw.WIDE, 1.2 + 1.8 * n_rows)
    with draw.closed_figure(columns, n_rows, size=size) as (figure, panels):
        for axes in panels[len(layers) :]:
            figure.delaxes(axes)
        for axes, layer in zip(panels, layers, strict=False):
            _with_bands(axes, pd.DataFrame(frame[frame["layer"] == layer]), "components")
            line: Any = {
                "color": draw.NOTE,
                "linestyle": (0, (5, 3)),
                "linewidth": 1.2,
                "zorder": 1,
            }
            axes.axhline(target, label=f"{100 * target:.3g} % of the loss", **line)
            axes.set_xscale("log", base=2)
            axes.set(title=layer, ylim=(min(0.0, lowest), max(1.05, highest)))
            axes.set_xticks([n for n in (1, 4, 16, 64, 256, 1024, 4096) if least <= n <= most])
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.minorticks_off()
            draw.percent(axes.yaxis)
            axes.tick_params(labelbottom=True)
        figure.supxlabel("principal components kept", fontsize=10)
        figure.supylabel("loss recovered", fontsize=10)
    return figure


@kept
def rank_heatmap(frame: pd.DataFrame) -> Figure:
    """Mean rank by model and corpus, one panel per site.

    `frame`: model, corpus, site, rank_share.
    """
    draw.checked(frame, "model", "corpus", "site", "rank_share")
    models, corpora = (list(dict.fromkeys(frame[c])) for c in ("model", "corpus"))
    sites = series(frame, "site")
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


@kept
def rank_heatmap_by_layer(frame: pd.DataFrame) -> Figure:
    """Rank by site and layer, one panel per model; a cell is empty where a model lacks the site.

    `frame`: model, site, layer, rank_share; of several rows for a cell the mean is shown.
    """
    draw.checked(frame, "model", "site", "layer", "rank_share")
    models, sites = (list(dict.fromkeys(frame[c])) for c in ("model", "site"))
    names = [look["label"] for look in looks_of(sites).values()]
    size = draw.WIDE + 1.5, 2.1 + 0.34 * len(sites)
    with draw.closed_figure(len(models), size=size) as (figure, panels):
        for axes, model in zip(panels, models, strict=True):
            rows = frame[frame["model"] == model]
            table = rows.pivot_table("rank_share", "site", "layer").reindex(index=sites)
            cells = {"cmap": "cividis", "vmin": 0, "vmax": 1, "linewidths": 0.4, "cbar": False}
            sns.heatmap(table, ax=axes, yticklabels=names if axes is panels[0] else False, **cells)
            axes.grid(visible=False)  # seen in empty cells
            axes.set(title=model, xlabel="layer", ylabel="")
            every = -(-len(table.columns) // 6)
            at = range(0, len(table.columns), every)
            axes.set_xticks([i + 0.5 for i in at], [str(table.columns[i]) for i in at])
            axes.tick_params(length=0, rotation=0, labelsize=9)
        bar = figure.colorbar(
            panels[0].collections[0], ax=panels, location="bottom", shrink=0.5, aspect=30
        )
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.ax.set_title("rank at 99 % of variance", fontsize=10)
        bar.ax.set_xlabel("share of width", fontsize=10)
        draw.percent(bar.ax.xaxis)
    return figure


@kept
def predicted_variance(frame: pd.DataFrame) -> Figure:
    """Variance predicted from W_O against the measured one, one point for each direction.

    `frame`: predicted, measured.
    """
    draw.checked(frame, "predicted", "measured")
    both = frame[["predicted", "measured"]].to_numpy(dtype=float)
    if (both <= 0).any():
        raise SaesubError("variances must be positive for logarithmic axes; drop the zero ones")
    ends = both.min(), both.max()
    with draw.closed_figure(size=(4.8, 4.5)) as (figure, (axes,)):
        axes.loglog(ends, ends, color=draw.NOTE, linestyle="--", lw=1.2, label="equal", zorder=1)
        axes.scatter(*both.T, s=12, alpha=0.6, color=SITES["attn_out"][1], lw=0)
        axes.set_xlabel(r"predicted variance, $\sigma_i^2\,\mathrm{Var}(z\cdot u_i)$")
        axes.set_ylabel("measured variance along $v_i$")
        axes.legend(loc="upper left")
    return figure


@kept
def singular_values(curves: Mapping[str, np.ndarray]) -> Figure:
    """Singular values in falling order, one curve for each matrix."""
    with draw.closed_figure() as (figure, (axes,)):
        for name, look in curve_looks_of(curves).items():
            axes.plot(np.arange(1, len(curves[name]) + 1), curves[name], **look)
        axes.set(xlabel="index of the singular value, largest first", ylabel="singular value")
        axes.set_ylim(bottom=0)
    return figure
