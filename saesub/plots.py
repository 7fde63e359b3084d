"""The notebooks' figures: one style, one fixed colour per site and per arm.

Every function takes data (a tidy DataFrame, or a dict of arrays) and returns a closed matplotlib
`Figure`: as a cell's last expression it shows once. Missing columns, empty data and values that
are not finite raise `SaesubError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from .errors import SaesubError
from .spectrum import Spectrum

# Sites wear Okabe and Ito's colours, arms Paul Tol's, so that neither is taken for the other.
SITES = {
    "attn_out": ("attention output", "#D55E00"),
    "mlp_out": ("MLP output", "#0072B2"),
    "resid_post": ("residual stream", "#009E73"),
    "z": ("heads' output z", "#CC79A7"),
}
ARMS = {
    "random": "#7F7F7F",
    "random + sparseadam": "#CC6677",
    "asi": "#332288",
    "asi + sparseadam": "#44AA99",
    "auxk": "#B8860B",
    "ghost": "#AA4499",
    "resampling": "#882255",
}
_SPARE = ("#117733", "#E69F00", "#56B4E9", "#661100", "#999933", "#000000")
_LINES = {"random": "--", "random + sparseadam": "-.", "asi + sparseadam": ":"}
_MARKERS = "oDs^vP"
_NOTE = "#444444"
_WIDE = 7.4


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
def _figure(columns: int = 1, width: float = _WIDE, height: float = 3.9) -> Iterator[tuple]:
    with style():
        figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False)
        try:
            yield figure, (axes[0, 0] if columns == 1 else list(axes[0]))
        finally:
            plt.close(figure)


def _checked(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    if missing := [c for c in columns if c not in frame.columns]:
        raise SaesubError(f"the frame lacks {missing}; it has {list(frame.columns)}")
    if frame.empty:
        raise SaesubError(f"nothing to draw: the frame of {list(columns)} has no rows")
    numbers = frame[list(columns)].select_dtypes("number")
    if not np.isfinite(numbers.to_numpy(dtype=float)).all():
        bad = [c for c in numbers if not np.isfinite(numbers[c]).all()]
        raise SaesubError(f"NaN or Inf in {bad}; drop those rows before drawing")
    return frame


def _where(frame: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    return pd.DataFrame(frame[frame[column] == value])


def _site_looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Label and colour of each site, whether named `attn_out`, by hook point or by label."""
    spare = iter(_SPARE * 9)
    looks = {}
    for name in dict.fromkeys(names):
        short = name.rsplit("hook_", 1)[-1].lower()
        known = (look for key, look in SITES.items() if short in (key, look[0].lower()))
        looks[name] = next(known, None) or (name, next(spare))
    return looks


def _arm_looks(names: Iterable[str]) -> dict[str, dict]:
    """Colour and line style of each arm; arms without a fixed colour share the spare ones."""
    spare = iter(_SPARE * 9)
    looks = {}
    for name in dict.fromkeys(names):
        key = " ".join(name.lower().replace("+", " + ").split())
        looks[name] = {"color": ARMS.get(key) or next(spare), "linestyle": _LINES.get(key, "-")}
    return looks


def _percent(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))


def _legend_above(figure: Figure, axes: Axes, columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels)))


def _beside(axes: Axes, y: float, text: str, color: str = _NOTE) -> None:
    """A dashed line across, labelled in the right margin where no data can lie."""
    axes.axhline(y, color=color, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1)
    place = axes.get_yaxis_transform()
    axes.text(1.01, y, text, transform=place, color=color, va="center", fontsize=9)


def _paper_lines(paper: Mapping[str, float]) -> dict[float, str]:
    """The paper's values with their colour: grey where several sites share one."""
    looks = _site_looks(paper)
    return {
        value: looks[sites[0]][1] if len(sites) == 1 else _NOTE
        for value in dict.fromkeys(paper.values())
        if (sites := [s for s, v in paper.items() if v == value])
    }


def rank_by_layer(frame: pd.DataFrame, paper: Mapping[str, float] | None = None) -> Figure:
    """Rank at 99 % of variance by layer, one line per site.

    `frame`: layer, site, rank_share. `paper`: the paper's value by site.
    """
    _checked(frame, "layer", "site", "rank_share")
    with _figure() as (figure, axes):
        looks = _site_looks(frame["site"])
        for site, (label, color) in looks.items():
            rows = _where(frame, "site", site).sort_values("layer")
            axes.plot(rows["layer"], rows["rank_share"], "o-", ms=4, color=color, label=label)
        for value, color in _paper_lines(paper or {}).items():
            _beside(axes, value, f"paper\n{100 * value:.3g} %", color)
        axes.set(
            xlabel="layer", ylabel="rank at 99 % of variance\n(share of width)", ylim=(0, 1.03)
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _percent(axes.yaxis)
        _legend_above(figure, axes, 4)
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
    with _figure() as (figure, axes):
        for name, (label, color) in _site_looks(curves).items():
            shares = _cumulative(curves[name])
            if shares.min() < 0 or shares.max() > 1.001 or (np.diff(shares) < -1e-6).any():
                raise SaesubError(f"{name}: give cumulative shares that rise to 1, not variances")
            axes.plot(np.arange(1, len(shares) + 1) / len(shares), shares, color=color, label=label)
        _beside(axes, 0.99, "99 %")
        axes.set(xlabel="share of directions, strongest first", ylabel="share of variance held")
        axes.set(xlim=(0, 1), ylim=(0, 1.03))
        _percent(axes.xaxis)
        _percent(axes.yaxis)
        _legend_above(figure, axes, 4)
    return figure


def loss_recovered(
    frame: pd.DataFrame, target: float = 0.9, paper: Mapping[str, float] | None = None
) -> Figure:
    """Loss recovered when only the top principal components are kept, one line per site.

    `frame`: site, components_share, recovered, and perhaps low, high for a band. `paper`: by
    site, the share of components at which the paper reaches `target`.
    """
    _checked(frame, "site", "components_share", "recovered")
    with _figure() as (figure, axes):
        for site, (label, color) in _site_looks(frame["site"]).items():
            rows = _where(frame, "site", site).sort_values("components_share")
            x = rows["components_share"]
            axes.plot(x, rows["recovered"], "o-", ms=4, color=color, label=label)
            if {"low", "high"} <= set(rows.columns):
                axes.fill_between(x, rows["low"], rows["high"], color=color, alpha=0.18, lw=0)
        floor = min(0.0, float(frame["recovered"].min()))
        axes.set(xlabel="principal components kept", ylabel="loss recovered")
        axes.set(xlim=(0, 1.02), ylim=(floor - 0.02, 1.05))
        for value, color in _paper_lines(paper or {}).items():
            axes.axvline(value, color=color, linestyle=(0, (5, 3)), linewidth=1.2)
            side = {"rotation": 90, "ha": "right", "va": "bottom", "fontsize": 9}
            axes.text(value - 0.004, floor, f"paper {100 * value:.3g} %", color=color, **side)
        _beside(axes, target, f"{100 * target:.3g} %")
        _percent(axes.xaxis)
        _percent(axes.yaxis)
        _legend_above(figure, axes, 4)
    return figure


def rank_heatmap(frame: pd.DataFrame) -> Figure:
    """Mean rank by model and corpus, one panel per site.

    `frame`: model, corpus, site, rank_share.
    """
    _checked(frame, "model", "corpus", "site", "rank_share")
    looks = _site_looks(frame["site"])
    models, corpora = (list(dict.fromkeys(frame[c])) for c in ("model", "corpus"))
    size = {
        "width": max(_WIDE, 1.9 + 0.62 * len(corpora) * len(looks)),
        "height": 2.0 + 0.4 * len(models),
    }
    with _figure(len(looks), **size) as (figure, panels):
        for axes, (site, (label, _)) in zip(np.atleast_1d(panels), looks.items(), strict=True):
            rows = _where(frame, "site", site)
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
    _checked(frame, "predicted", "measured")
    if (frame[["predicted", "measured"]] <= 0).any(axis=None):
        raise SaesubError("variances must be positive for logarithmic axes; drop the zero ones")
    with _figure(width=4.8, height=4.5) as (figure, axes):
        ends = [
            frame[["predicted", "measured"]].min().min(),
            frame[["predicted", "measured"]].max().max(),
        ]
        axes.loglog(ends, ends, color=_NOTE, linestyle="--", lw=1.2, label="equal", zorder=1)
        color = SITES["attn_out"][1]
        axes.scatter(frame["predicted"], frame["measured"], s=12, alpha=0.6, color=color, lw=0)
        axes.set_xlabel(r"predicted variance, $\sigma_i^2\,\mathrm{Var}(z\cdot u_i)$")
        axes.set_ylabel("measured variance along $v_i$")
        axes.legend(loc="upper left")
    return figure


def singular_values(curves: Mapping[str, np.ndarray]) -> Figure:
    """Singular values in falling order on a logarithmic axis, one curve per name."""
    with _figure() as (figure, axes):
        for name, (label, color) in _site_looks(curves).items():
            values = np.asarray(curves[name], dtype=float)
            axes.semilogy(np.arange(1, len(values) + 1), values, color=color, label=label)
        axes.set(xlabel="index of the singular value, largest first", ylabel="singular value")
        _legend_above(figure, axes)
    return figure


def _grouped(frame: pd.DataFrame, x: str, y: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct values of `x`, rising, and the values of `y` at each."""
    at, values = frame[x].to_numpy(dtype=float), frame[y].to_numpy(dtype=float)
    places = np.unique(at)
    return places, [values[at == place] for place in places]


def _arm_lines(axes: Axes, frame: pd.DataFrame, x: str, y: str) -> None:
    """Per arm the mean over seeds as a line, least to most as a band."""
    for arm, look in _arm_looks(frame["arm"]).items():
        at, seeds = _grouped(_where(frame, "arm", arm), x, y)
        axes.plot(at, [np.mean(v) for v in seeds], label=arm, marker="o", ms=3.5, **look)
        low, high = [v.min() for v in seeds], [v.max() for v in seeds]
        axes.fill_between(at, low, high, color=look["color"], alpha=0.18, lw=0)


def dead_over_tokens(frame: pd.DataFrame) -> Figure:
    """Share of dead features in training, one line per arm: mean over seeds, band least to most.

    `frame`: tokens, dead_share, arm, seed.
    """
    _checked(frame, "tokens", "dead_share", "arm", "seed")
    with _figure() as (figure, axes):
        _arm_lines(axes, frame, "tokens", "dead_share")
        axes.set(xlabel="training tokens", ylabel="dead features")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        _percent(axes.yaxis)
        _legend_above(figure, axes, 2)
    return figure


def width(frame: pd.DataFrame, measure: str = "dead_share") -> Figure:
    """Share of dead features, or FVU, by dictionary width, one line per arm.

    `frame`: d_sae, arm, and the `measure`, "dead_share" or "fvu".
    """
    _checked(frame, "d_sae", "arm", measure)
    with _figure() as (figure, axes):
        _arm_lines(axes, frame, "d_sae", measure)
        axes.set_xscale("log", base=2)
        widths = sorted(frame["d_sae"].unique())
        axes.set_xticks(widths[:: -(-len(widths) // 6)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        label = {"dead_share": "dead features", "fvu": "fraction of variance unexplained"}[measure]
        axes.set(xlabel="width of the dictionary (features)", ylabel=label)
        if measure == "dead_share":
            axes.set_ylim(bottom=0)
        _percent(axes.yaxis)
        _legend_above(figure, axes, 2)
    return figure


def dead_against_rank(frame: pd.DataFrame) -> Figure:
    """Share of dead features against the rank of the site, one point per SAE.

    `frame`: rank_share, dead_share, site, label. A label is drawn where there is room for it.
    """
    _checked(frame, "rank_share", "dead_share", "site", "label")
    with _figure(height=4.4) as (figure, axes):
        for site, (label, color) in _site_looks(frame["site"]).items():
            rows = _where(frame, "site", site)
            axes.scatter(rows["rank_share"], rows["dead_share"], s=34, color=color, label=label)
        axes.set(xlabel="rank at 99 % of variance (share of width)", ylabel="dead features")
        axes.margins(0.08)
        _percent(axes.xaxis)
        _percent(axes.yaxis)
        _legend_above(figure, axes, 4)
        _label_points(figure, axes, frame)
    return figure


def _label_points(figure: Figure, axes: Axes, frame: pd.DataFrame) -> None:
    """Writes each point's label beside it, unless that would cover a point or another label."""
    figure.draw_without_rendering()
    points = axes.transData.transform(frame[["rank_share", "dead_share"]].to_numpy(dtype=float))
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    for at, text in zip(
        frame[["rank_share", "dead_share"]].to_numpy(), frame["label"], strict=True
    ):
        for shift, side in (
            ((7, 0), "left"),
            ((-7, 0), "right"),
            ((0, 9), "center"),
            ((0, -9), "center"),
        ):
            place = {"xytext": shift, "textcoords": "offset points", "ha": side, "va": "center"}
            note = axes.annotate(str(text), tuple(at), fontsize=8.5, color=_NOTE, **place)
            box = note.get_window_extent()
            if box.count_overlaps(taken) == 0 and axes.bbox.containsx(box.x1):
                taken.append(box)
                break
            note.remove()


def overlap_by_fate(frame: pd.DataFrame) -> Figure:
    """How far features lay in the active subspace at the start, by whether they lived.

    `frame`: overlap (share of the initial direction's squared norm), alive (bool).
    """
    _checked(frame, "overlap", "alive")
    alive = frame["alive"].astype(bool)
    with _figure(height=3.6) as (figure, axes):
        bins = np.histogram_bin_edges(frame["overlap"], bins=40)
        for rows, name, color in ((alive, "alive", "#0072B2"), (~alive, "dead", "#D55E00")):
            values = frame.loc[rows, "overlap"].to_numpy(dtype=float)
            if len(values):
                weights = np.full(len(values), 1 / len(values))
                look = {
                    "color": color,
                    "alpha": 0.5,
                    "label": f"{name} at the end ({len(values):,})",
                }
                axes.hist(values, bins=bins, weights=weights, **look)
                axes.axvline(float(np.median(values)), color=color, lw=1.4, ls="--")
        axes.set_xlabel(
            "share of the initial direction inside the active subspace (dashed: median)"
        )
        axes.set_ylabel("features of that fate")
        _percent(axes.xaxis)
        _percent(axes.yaxis)
        _legend_above(figure, axes, 2)
    return figure


def dead_and_fvu(frame: pd.DataFrame) -> Figure:
    """Dead features and fraction of variance unexplained by arm, a point per seed, bar at the mean.

    `frame`: arm, d_sae, dead_share, fvu, seed.
    """
    _checked(frame, "arm", "d_sae", "dead_share", "fvu", "seed")
    looks, widths = _arm_looks(frame["arm"]), sorted(frame["d_sae"].unique())
    rows = [
        (arm, d)
        for arm in looks
        for d in widths
        if ((frame["arm"] == arm) & (frame["d_sae"] == d)).any()
    ]
    names = [arm if len(widths) == 1 else f"{arm}\n{d:,} features" for arm, d in rows]
    with _figure(2, height=1.3 + 0.42 * len(rows)) as (figure, panels):
        for axes, column in zip(panels, ("dead_share", "fvu"), strict=True):
            for place, (arm, d) in enumerate(rows):
                values = frame[column][(frame["arm"] == arm) & (frame["d_sae"] == d)]
                color, mark = looks[arm]["color"], _MARKERS[widths.index(d) % len(_MARKERS)]
                axes.plot(values, [place] * len(values), mark, color=color, ms=7, alpha=0.75)
                axes.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color=color, lw=2)
            axes.set_yticks(range(len(rows)), names if column == "dead_share" else [])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.margins(x=0.1)
            axes.xaxis.set_major_locator(MaxNLocator(5))
        panels[0].set_xlim(left=-0.02 * frame["dead_share"].max())
        panels[0].set_xlabel("dead features")
        panels[1].set_xlabel("fraction of variance unexplained")
        _percent(panels[0].xaxis)
    return figure


def d_init_sweep(frame: pd.DataFrame, baseline: Mapping[str, float] | None = None) -> Figure:
    """Dead features and FVU by the width of the starting subspace; points are runs, lines means.

    `frame`: d_init_share, dead_share, fvu. `baseline`: the random start's dead_share and fvu.
    """
    _checked(frame, "d_init_share", "dead_share", "fvu")
    with _figure(2, height=3.5) as (figure, panels):
        names = {"dead_share": "dead features", "fvu": "fraction of variance unexplained"}
        for axes, (column, label) in zip(panels, names.items(), strict=True):
            color, (shares, runs) = ARMS["asi"], _grouped(frame, "d_init_share", column)
            axes.plot(frame["d_init_share"], frame[column], "o", ms=5, alpha=0.6, color=color)
            axes.plot(shares, [np.mean(v) for v in runs], color=color)
            if baseline:
                _beside(axes, baseline[column], "random\nstart", ARMS["random"])
            axes.set(xlabel="d_init (share of width)", title=label)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            _percent(axes.xaxis)
        panels[0].set_ylim(bottom=0)
        _percent(panels[0].yaxis)
    return figure
