"""The figures draw the data they are given, and nothing overlaps the labels they need."""

from __future__ import annotations

from itertools import combinations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from saesub.errors import SaesubError
from saesub.reproduce import plots
from saesub.reproduce.plots import CONDITIONS, SITES, looks

matplotlib.use("Agg")
matplotlib.rcParams["font.family"] = "DejaVu Sans"  # comes with matplotlib: the same everywhere
TOUCHING = 2  # pixels by which the boxes of two texts may meet, or leave the figure, and be read

SEEDS = (0, 1, 2)


def _layers() -> pd.DataFrame:
    ranks = {"attn_out": 0.52, "mlp_out": 0.82, "resid_post": 0.8, "z": 0.825}
    wave = 0.08 * np.sin(np.arange(30) / 3)
    rows = [(i, s, r + wave[i]) for s, r in ranks.items() for i in range(30)]
    return pd.DataFrame(rows, columns=["layer", "site", "rank_share"])


def _conditions() -> pd.DataFrame:
    rows = [("random", 9216, 0.26 + 0.01 * s, 0.272 + 0.001 * s, s) for s in SEEDS] + [
        ("asi", 9216, 0.018 + 0.001 * s, 0.278 + 0.001 * s, s) for s in SEEDS
    ]
    return pd.DataFrame(rows, columns=["condition", "d_sae", "dead_share", "fvu", "seed"])


def _kept() -> pd.DataFrame:
    x = np.linspace(0.05, 1, 12)
    parts = [
        pd.DataFrame({"site": s, "components_share": x, "recovered": 1 - (1 - x) ** p})
        for s, p in {"attn_out": 2.0, "mlp_out": 1.1}.items()
    ]
    frame = pd.concat(parts)
    return frame.assign(low=frame["recovered"] - 0.03, high=frame["recovered"] + 0.03)


def _kept_by_layer() -> pd.DataFrame:
    r = 2 ** np.arange(10)
    parts = [
        pd.DataFrame({"layer": f"layer {i}", "site": site, "components": r})
        for i in (1, 4, 8, 12, 16, 20, 24)
        for site in ("attn_out", "mlp_out")
    ]
    frame = pd.concat(parts, ignore_index=True)
    fill = frame["components"] / np.where(frame["site"] == "attn_out", 200, 512)
    frame["recovered"] = fill.clip(upper=1) ** 0.5
    return frame.assign(low=frame["recovered"] - 0.05, high=frame["recovered"] + 0.05)


def _overlaps() -> pd.DataFrame:
    kinds = {"heads of one group": 0.3, "heads of two groups": 0.2, "random": 0.11}
    rows = [(i, pairs, share) for pairs, share in kinds.items() for i in range(30)]
    return pd.DataFrame(rows, columns=["layer", "pairs", "overlap"])


def _causes() -> pd.DataFrame:
    changes = {"spectrum": -0.2, "anisotropy": -0.1, "overlap by chance": -0.15, "other": 0.02}
    rows = [(i, cause, change) for cause, change in changes.items() for i in range(30)]
    return pd.DataFrame(rows, columns=["layer", "cause", "change"])


def _points() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    sites = np.repeat(["attn_out", "mlp_out", "resid_post"], 10)
    rank = np.repeat([0.5, 0.82, 0.8], 10) + rng.normal(0, 0.05, 30)
    dead = np.clip(0.6 - 0.6 * rank + rng.normal(0, 0.05, 30), 0, 1)
    labels = [f"L{i}" for i in range(10)] * 3
    columns = {"rank_share": rank, "dead_share": dead, "site": sites, "label": labels}
    return pd.DataFrame(columns)


def _grid() -> pd.DataFrame:
    rows = [
        (m, c, s, r)
        for m in ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b")
        for c in ("wiki-en", "wiki-fr", "code-python", "legal")
        for s, r in {"attn_out": 0.52, "mlp_out": 0.82, "resid_post": 0.8}.items()
    ]
    return pd.DataFrame(rows, columns=["model", "corpus", "site", "rank_share"])


def _grid_by_layer() -> pd.DataFrame:
    depths = {"smollm2-135m": 30, "gemma3-270m": 18, "qwen2.5-coder-0.5b": 24}
    sites = {"attn_out": 0.52, "mlp_out": 0.82, "attention output, after its norm": 0.3}
    rows = [
        (model, site, layer, rank + layer / 100)
        for model, n in depths.items()
        for site, rank in sites.items()
        if "norm" not in site or model == "gemma3-270m"
        for layer in range(n)
    ]
    return pd.DataFrame(rows, columns=["model", "site", "layer", "rank_share"])


def _stacks() -> pd.DataFrame:
    depths = {"ViT": 12, "speech encoder": 6, "BERT of antibodies": 16, "time series": 10}
    ranks = {"attn_out": 0.52, "mlp_out": 0.82, "resid_post": 0.8, "z": 0.7}
    rows = [
        (stack, weights, site, layer, (rank + layer / 100) * scale)
        for stack, n in depths.items()
        for weights, scale in {"trained": 1.0, "untrained": 0.5}.items()
        for site, rank in ranks.items()
        for layer in range(n)
    ]
    return pd.DataFrame(rows, columns=["stack", "weights", "site", "layer", "rank_share"])


def _variances() -> pd.DataFrame:
    predicted = np.geomspace(1e-6, 1, 200)
    return pd.DataFrame({"predicted": predicted, "measured": predicted * 1.001})


def _remedies() -> pd.DataFrame:
    sites = [f"qwen2.5, english, 16 resid_post (γ {i / 10:.1f}, rank 92%)" for i in range(18)]
    names = ["none", "mean", "median", "subspace", "mean,\nsubspace", "median,\nsubspace"]
    columns = pd.Index(names, name="where the bias and the directions begin")
    return pd.DataFrame(np.linspace(0, 1, 108).reshape(18, 6), sites, columns)


def _widths() -> pd.DataFrame:
    rows = [
        (d, condition, dead * np.log2(d / 2048) / 5)
        for d in (4608, 9216, 18432, 36864)
        for condition, dead in {"random": 0.5, "asi": 0.03}.items()
    ]
    return pd.DataFrame(rows, columns=["d_sae", "condition", "dead_share"])


def _curves() -> dict[str, np.ndarray]:
    values = {"attn_out": np.exp(-np.arange(576) / 60), "mlp_out": np.exp(-np.arange(576) / 160)}
    return {name: np.cumsum(v) / v.sum() for name, v in values.items()}


FIGURES = {
    "rank_by_layer": lambda: plots.rank_by_layer(
        _layers(), {"attn_out": 0.6, "mlp_out": 0.9, "resid_post": 0.9}
    ),
    "cumulative_variance": lambda: plots.cumulative_variance(_curves()),
    "loss_recovered": lambda: plots.loss_recovered(
        _kept(), paper={"attn_out": 0.747, "mlp_out": 0.961}
    ),
    "variance_and_loss": lambda: plots.variance_and_loss(_curves(), _kept(), 0.9),
    "rank_heatmap": lambda: plots.rank_heatmap(_grid()),
    "loss_by_layer": lambda: plots.loss_by_layer(_kept_by_layer()),
    "overlap_by_layer": lambda: plots.overlap_by_layer(_overlaps()),
    "causes_by_layer": lambda: plots.causes_by_layer(_causes()),
    "rank_heatmap_by_layer": lambda: plots.rank_heatmap_by_layer(_grid_by_layer()),
    "rank_by_stack": lambda: plots.rank_by_stack(_stacks(), {"attn_out": 0.6, "mlp_out": 0.9}),
    "predicted_variance": lambda: plots.predicted_variance(_variances()),
    "singular_values": lambda: plots.singular_values({"W_O, layer 12": np.geomspace(9, 0.1, 576)}),
    "dead_against_rank": lambda: plots.dead_against_rank(_points()),
    "dead_by_remedy": lambda: plots.dead_by_remedy(_remedies()),
    "width": lambda: plots.width(_widths()),
}


def _line(figure, label: str):
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    return next(line for line in lines if line.get_label() == label)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_labelled_renders_and_leaves_no_open_figure(name, tmp_path):
    before = dict(plt.rcParams)
    figure = FIGURES[name]()
    figure.savefig(tmp_path / "figure.png")
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before
    for axes in figure.axes:
        assert axes.get_xlabel() or figure._supxlabel
        assert axes.get_ylabel() or axes.get_title()


@pytest.mark.parametrize("name", FIGURES)
def test_no_two_texts_overlap(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    texts = [t for axes in figure.axes for t in axes.texts if t.get_text()]
    for axes in figure.axes:
        lows, highs = sorted(axes.get_xlim()), sorted(axes.get_ylim())
        for axis, (low, high) in ((axes.xaxis, lows), (axes.yaxis, highs)):
            shown = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
            texts += [
                t.label1 for t in shown if t.label1.get_text() and not t.label1.get_rotation()
            ]
        texts += [t for t in (axes.xaxis.label, axes.yaxis.label, axes.title) if t.get_text()]
    texts += figure.legends
    boxes = [t.get_window_extent().padded(-TOUCHING / 2) for t in texts]
    for i, (box, text) in enumerate(zip(boxes, texts, strict=True)):
        covered = [str(o) for b, o in zip(boxes[:i], texts[:i], strict=True) if box.overlaps(b)]
        assert not covered, (str(text), covered)
        assert box.x0 >= 0, str(text)
        assert box.x1 <= figure.bbox.x1, str(text)


def test_rank_lines_hold_the_frame_and_the_papers_value_is_drawn():
    frame = _layers().sample(frac=1, random_state=0)
    figure = plots.rank_by_layer(frame, {"attn_out": 0.6})
    line = _line(figure, "attention output")
    rows = frame[frame["site"] == "attn_out"].sort_values("layer")
    np.testing.assert_array_equal(line.get_xdata(), rows["layer"])
    np.testing.assert_array_equal(line.get_ydata(), rows["rank_share"])
    dashed = [ln for ln in figure.axes[0].get_lines() if set(ln.get_ydata()) == {0.6}]
    assert len(dashed) == 1
    assert dashed[0].get_label() == "paper, attention output: 60 %"


def test_a_hook_point_has_its_sites_colour():
    frame = _layers().replace({"attn_out": "blocks.12.hook_attn_out"})
    assert _line(plots.rank_by_layer(frame), "attention output").get_color() == "#D55E00"


def test_cumulative_variance_counts_directions_from_one():
    line = _line(
        plots.cumulative_variance({"attn_out": np.array([0.5, 0.9, 0.99, 1])}), "attention output"
    )
    np.testing.assert_allclose(line.get_xdata(), [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(line.get_ydata(), [0.5, 0.9, 0.99, 1])


def test_cumulative_variance_refuses_plain_variances():
    with pytest.raises(SaesubError, match="cumulative"):
        plots.cumulative_variance({"attn_out": np.array([0.5, 0.3, 0.2])})


def test_cumulative_variance_of_a_spectrum():
    import torch

    from saesub.activations.spectrum import Spectrum

    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [3.0, 2.0, 1.0]
    )
    line = _line(plots.cumulative_variance({"x": Spectrum.from_activations(x)}), "x")
    np.testing.assert_allclose(line.get_ydata(), np.cumsum([9, 4, 1]) / 14, atol=0.02)


def test_loss_recovered_draws_line_band_and_paper():
    frame = _kept()
    figure = plots.loss_recovered(frame, paper={"mlp_out": 0.961})
    rows = frame[frame["site"] == "mlp_out"]
    np.testing.assert_array_equal(_line(figure, "MLP output").get_ydata(), rows["recovered"])
    corners = figure.axes[0].collections[1].get_paths()[0].vertices
    assert np.isclose(corners[:, 1].max(), rows["high"].max())
    assert any(list(ln.get_xdata()) == [0.961, 0.961] for ln in figure.axes[0].get_lines())


def test_the_directions_of_a_share_of_the_variance_and_the_loss_that_they_bring_back():
    curve = np.array([0.5, 0.9, 0.99, 1.0])
    frame = pd.DataFrame(
        {"site": "attn_out", "components_share": [0, 0.5, 1], "recovered": [0, 0.8, 1]}
    )
    figure = plots.variance_and_loss({"attn_out": curve, "resid_post": curve}, frame, 0.99)
    variance, loss = figure.axes
    dots = [
        ln.get_xydata().tolist()
        for ln in variance.lines
        if ln.get_marker() == "o" and len(ln.get_xdata()) == 1
    ]
    assert dots == [[[0.75, 0.99]]] * 2
    (dot,) = [ln.get_xydata().tolist() for ln in loss.lines if len(ln.get_xdata()) == 1]
    assert dot == [[0.75, pytest.approx(0.9)]]


def test_dead_against_rank_has_every_point():
    frame = _points()
    drawn = np.concatenate(
        [c.get_offsets() for c in plots.dead_against_rank(frame).axes[0].collections]
    )
    np.testing.assert_allclose(drawn, frame[["rank_share", "dead_share"]])


def test_heatmap_holds_each_value_in_its_cell():
    frame = _grid()
    frame.loc[0, "rank_share"] = 0.31
    mesh = plots.rank_heatmap(frame).axes[0].collections[0]
    values = np.asarray(mesh.get_array()).reshape(3, 4)
    assert values[0, 0] == 0.31
    np.testing.assert_allclose(values.ravel()[1:], 0.52)


def test_remedies_are_in_the_order_of_the_table_and_in_per_cent():
    table = _remedies()
    (axes,) = plots.dead_by_remedy(table).axes
    written = np.array([float(text.get_text()) for text in axes.texts]).reshape(table.shape)
    np.testing.assert_allclose(written, 100 * table, atol=0.051)
    assert [label.get_text() for label in axes.get_xticklabels()] == [*table.columns]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*table.index]
    with pytest.raises(SaesubError, match="NaN"):
        plots.dead_by_remedy(table.where(table > 0))


def test_heatmap_by_layer_has_a_row_for_each_site_and_leaves_out_what_is_missing():
    frame = _grid_by_layer()
    panels = plots.rank_heatmap_by_layer(frame).axes[:3]
    shapes = [p.collections[0].get_array().shape for p in panels]
    assert shapes == [(3, 30), (3, 18), (3, 24)]
    of_gemma = np.asarray(panels[1].collections[0].get_array())
    np.testing.assert_allclose(of_gemma[2], 0.3 + np.arange(18) / 100)
    assert np.ma.getmaskarray(panels[0].collections[0].get_array())[2].all()


def test_each_stack_has_its_panel_and_its_untrained_layers_are_dotted():
    frame = _stacks()
    figure = plots.rank_by_stack(frame, {"attn_out": 0.6})
    assert [axes.get_title() for axes in figure.axes] == list(dict.fromkeys(frame["stack"]))
    for axes in figure.axes:
        of = frame[frame["stack"] == axes.get_title()]
        for weights, dots in {"trained": "-", "untrained": ":"}.items():
            lines = [
                li for li in axes.get_lines() if li.get_linestyle() == dots and len(li.get_xdata())
            ]
            rows = of[of["weights"] == weights]
            drawn = np.concatenate([line.get_xydata() for line in lines])
            np.testing.assert_allclose(drawn, rows[["layer", "rank_share"]])
        assert [*axes.get_lines()[8].get_ydata()] == [0.6, 0.6]
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    sites = [label for label, _ in SITES.values()][:4]
    assert named == [*sites, "paper, attention output: 60 %", "untrained"]


def test_stacks_without_kinds_of_weights_have_full_lines_alone():
    frame = _stacks()
    figure = plots.rank_by_stack(frame[frame["weights"] == "trained"].drop(columns="weights"))
    assert {line.get_linestyle() for axes in figure.axes for line in axes.get_lines()} == {"-"}
    assert len(figure.legends[0].get_texts()) == 4


def test_the_legend_of_stacks_names_every_line_of_every_panel():
    frame = _stacks()
    cross = frame[(frame["stack"] == "time series") & frame["site"].isin(["attn_out", "z"])]
    cross = cross.replace({"site": {"attn_out": "cross_out", "z": "cross_z"}})
    figure = plots.rank_by_stack(pd.concat([frame, cross]), {"attn_out": 0.6})
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    drawn = {line.get_label() for line in lines if line.get_label()[:1] not in ("", "_")}
    assert drawn == named
    assert {SITES["cross_out"][0], SITES["cross_z"][0]} <= named
    colours = {line.get_color() for line in lines if line.get_linestyle() == "-"}
    assert colours == {color for _, color in SITES.values()}


def test_loss_by_layer_has_a_panel_for_each_layer_with_all_sites():
    frame = _kept_by_layer()
    figure = plots.loss_by_layer(frame)
    assert [axes.get_title() for axes in figure.axes] == list(dict.fromkeys(frame["layer"]))
    for axes in figure.axes:
        for line, site in zip(axes.get_lines(), ("attn_out", "mlp_out"), strict=False):
            rows = frame[(frame["layer"] == axes.get_title()) & (frame["site"] == site)]
            np.testing.assert_allclose(line.get_xydata(), rows[["components", "recovered"]])


def test_bands_of_the_loss_are_not_cut():
    frame = _kept_by_layer()
    frame["high"] = 1.3
    axes = plots.loss_by_layer(frame).axes[0]
    assert axes.get_ylim()[0] <= frame["low"].min()
    assert axes.get_ylim()[1] > 1.3
    assert "90 % of the loss" in [line.get_label() for line in axes.get_lines()]


def test_overlap_by_layer_has_a_line_for_each_kind_of_pairs():
    frame = _overlaps()
    figure = plots.overlap_by_layer(frame)
    for pairs, rows in frame.groupby("pairs"):
        np.testing.assert_allclose(_line(figure, pairs).get_xydata(), rows[["layer", "overlap"]])


def test_causes_by_layer_has_a_line_for_each_cause_and_one_at_zero():
    frame = _causes()
    figure = plots.causes_by_layer(frame)
    for cause, rows in frame.groupby("cause"):
        np.testing.assert_allclose(_line(figure, cause).get_xydata(), rows[["layer", "change"]])
    assert any(list(line.get_ydata()) == [0, 0] for line in figure.axes[0].get_lines())


def test_width_and_spectra_hold_their_data():
    widths, values = _widths(), np.geomspace(9, 0.1, 20)
    line = _line(plots.width(widths), "asi")
    np.testing.assert_allclose(line.get_ydata(), widths[widths["condition"] == "asi"]["dead_share"])
    np.testing.assert_array_equal(
        _line(plots.singular_values({"W": values}), "W").get_ydata(), values
    )
    cloud = plots.predicted_variance(_variances()).axes[0].collections[0]
    np.testing.assert_allclose(cloud.get_offsets(), _variances())


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (_layers().drop(columns="site"), "lacks"),
        (_layers().iloc[:0], "no rows"),
        (_layers().assign(rank_share=np.nan), "NaN"),
    ],
)
def test_bad_frames_are_refused(frame, message):
    with pytest.raises(SaesubError, match=message):
        plots.rank_by_layer(frame)


# Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as the colour-blind see it.
EYES = {
    "normal": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def _lab(color: str, eye: str) -> np.ndarray:
    """CIELAB coordinates of a colour as an eye sees it."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = XYZ @ np.clip(np.array(EYES[eye]) @ linear, 0, 1) / XYZ.sum(axis=1)
    f = np.where(seen > 0.008856, np.cbrt(seen), 7.787 * seen + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


CONTROLS = list(looks.CONTROLS)
TOGETHER = [  # known names that a figure has
    list(SITES),
    list(CONDITIONS),
    ["random", "asi", "SparseAdam", *looks.RIVALS],
    ["z", "attn_out", *CONTROLS],
    [*looks.HEADS, "control: same σ", "control: heads turned"],
    list(looks.CAUSES),
]


@pytest.mark.parametrize("names", TOGETHER)
def test_a_known_name_has_its_look_whatever_stands_beside_it(names):
    together = looks.looks_of(names)
    assert together == {name: looks.looks_of(["new", name])[name] for name in names}
    colours = {look["color"] for look in together.values()}
    assert looks.looks_of([*names, "new"])["new"]["color"] not in colours


def test_names_for_the_same_have_the_same_look():
    def seen(name: str) -> tuple:
        return tuple(looks.looks_of([name])[name][part] for part in ("color", "marker"))

    same = {"random half": "random", "subspace half": "ASI", "SparseAdam": "random + SparseAdam"}
    same |= {"control: same σ": "same σ", "z, untrained, 0.02": "z", "ASI, untrained": "ASI"}
    same |= {"blocks.3.attn.hook_z": "z", "MLP output": "mlp_out"}
    assert {name: seen(name) for name in same} == {name: seen(of) for name, of in same.items()}
    of = looks.looks_of(["z", "z, untrained, 1/√d", "z, untrained, 0.02"])
    assert len({str(look["linestyle"]) for look in of.values()}) == 3
    assert of["z, untrained, 0.02"]["label"] == "heads' output z, untrained, 0.02"


def test_numbers_in_words():
    assert plots.counted([3, 3], "seed") == "3 seeds"
    assert plots.counted([1], "seed") == "1 seed"
    assert plots.counted([3, 1], "seed") == "1 to 3 seeds"
    assert plots.signed("-3 to -1.5, a-b") == "−3 to −1.5, a-b"


@pytest.mark.parametrize("highest", [0.004, 0.05, 0.6])
def test_an_axis_that_is_linear_below_a_thousandth_shows_nothing_and_all(highest):
    frame = _points().assign(dead_share=np.linspace(0, highest, 30))
    (axes,) = plots.dead_against_rank(frame).axes
    low, high = axes.get_ylim()
    assert low < 0 < highest < high
    ticks = [text.get_text() for text in axes.get_yticklabels()]
    assert ticks[0] == "0 %"
    assert ("100 %" in ticks) == (highest > 0.2)


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("names", TOGETHER)
def test_what_stands_together_is_told_apart_by_every_eye(names, eye):
    """By 15 in CIELAB; 2.3 is what is just noticed side by side."""
    found = [*looks.looks_of(names).values()]
    colors = [look["color"] for look in found]
    assert len({look["marker"] for look in found}) == len(names)
    pairs = [np.linalg.norm(_lab(a, eye) - _lab(b, eye)) for a, b in combinations(colors, 2)]
    assert min(pairs) > 15


@pytest.mark.parametrize("figure", ["width", "rank_by_layer", "loss_recovered"])
def test_lines_differ_without_colour_too(figure):
    lines = FIGURES[figure]().axes[0].get_lines()
    lines = [line for line in lines if not line.get_label().startswith(("_", "paper"))]
    assert len({(ln.get_marker(), ln.get_linestyle()) for ln in lines}) == len(lines) > 1


def test_a_long_legend_takes_another_row_rather_than_more_width():
    conditions = [f"a condition with a rather long name, {i}" for i in range(5)]
    frame = pd.DataFrame({"d_sae": 64, "dead_share": 0.5, "condition": conditions})
    figure = plots.width(frame)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert -TOUCHING <= box.x0 < box.x1 <= figure.bbox.x1 + TOUCHING
    assert [t.get_text() for t in figure.legends[0].get_texts()] == conditions
