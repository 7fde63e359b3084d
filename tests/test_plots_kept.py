"""A figure that is kept in a run is drawn again as it was, to the pixel."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import test_plots
import test_plots_d_init
import test_plots_dictionaries
import test_plots_mitigations
import test_plots_protocol
import test_plots_regimes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.reproduce import plots
from saesub.reproduce.plots import looks
from saesub.reproduce.plots.kept import redrawn

matplotlib.use("Agg")


def _rates() -> pd.DataFrame:
    rows = [
        (name, lr, dead, 0.2 + lr, lr == 1e-3, {"a": 1})
        for name in ("random", "ASI")
        for lr, dead in ((5e-4, 0.0), (1e-3, 0.2))
    ]
    columns = ["condition", "lr", "dead_share", "fvu", "best", "density"]
    return pd.DataFrame(rows, columns=columns, index=pd.Index([4, 2, 9, 7]))


def _probes() -> pd.DataFrame:
    rows = [(a, t, k, 0.7) for a in ("random", "asi") for t in ("x", "y") for k in (1, 5)]
    return pd.DataFrame(rows, columns=["condition", "task", "k", "accuracy"])


def _features() -> pd.DataFrame:
    values = {"condition": ["random", "asi"] * 3, "pair": [0, 0, 1, 1, 2, 2]}
    shares = np.linspace(0.1, 0.9, 6)
    return pd.DataFrame(values | {"density": shares, "coherence": shares, "cosine": shares})


def _spectrum() -> Spectrum:
    import torch

    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    return Spectrum.from_activations(x * torch.linspace(0.2, 2, 8))


FIRED = pd.DataFrame({"condition": ["random", "ASI"], "power": [-1, 3], "share": [0.5, 1.0]})
CALLS = test_plots.FIGURES | {
    "a spectrum": lambda: plots.cumulative_variance({"x": _spectrum()}),
    "d_init_by_place": lambda: plots.d_init_by_place(test_plots_d_init.SWEEP),
    "dead_by_dictionary": lambda: plots.dead_by_dictionary(test_plots_dictionaries._frame()),
    "mitigation_panels": lambda: plots.mitigation_panels(
        test_plots_mitigations._rates(), test_plots_mitigations.PANELS, notes={"AuxK": "2 ×"}
    ),
    "dead_by_window": lambda: plots.dead_by_window(test_plots_protocol._windows(), decides=2e4),
    "dead_against_fvu": lambda: plots.dead_against_fvu(_rates()),
    "firing_counts": lambda: plots.firing_counts(FIRED),
    "recipe_by_regime": lambda: plots.recipe_by_regime(test_plots_regimes.FRAME),
    "coherence_by_density": lambda: plots.coherence_by_density(_features(), chance=0.1),
    "shared_features": lambda: plots.shared_features(_features()),
    "probe_accuracy": lambda: plots.probe_accuracy(
        _probes(), pd.DataFrame({"task": ["x", "y"], "accuracy": [0.9, 0.95]})
    ),
}


def _pixels(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize("name", CALLS)
def test_a_figure_is_drawn_again_from_what_is_kept(name, tmp_path, monkeypatch):
    file = tmp_path / "figures" / "07.jsonl"
    monkeypatch.setenv("SAESUB_FIGURES", str(file))
    figure = CALLS[name]()
    monkeypatch.delenv("SAESUB_FIGURES")
    (line,) = file.read_text(encoding="utf-8").splitlines()
    np.testing.assert_array_equal(_pixels(redrawn(line)), _pixels(figure))


def test_every_figure_of_the_notebooks_is_kept():
    drawn = {line.split(".")[0] for line in CALLS}
    public = {name for name in plots.__all__ if callable(getattr(plots, name))}
    texts = {"diagnosis", "style", "with_sliders", "counted", "signed"}  # and one of an SAE at hand
    assert public - texts <= drawn


RUN = Path(__file__).parents[1] / "data" / "results" / "full" / "figures"
LOOKS = ("condition", "site", "pairs", "cause")
ROLES = {"mitigation_panels", "rank_heatmap_by_layer"}  # which have no line of a name's own look


def test_every_name_in_the_notebooks_figures_has_a_look_of_its_own():
    names = set()
    for line in (line for file in RUN.glob("*.jsonl") for line in file.read_text().splitlines()):
        found = json.loads(line)
        frames = [of for of in found["arguments"]["mapping"].values() if isinstance(of, dict)]
        for frame in (of for of in frames if "frame" in of and found["figure"] not in ROLES):
            at = [place for place, name in enumerate(frame["columns"]) if name in LOOKS]
            names |= {row[place] for row in frame["frame"] for place in at}
    assert {"random", "attn_out", "control: same σ", "AuxK"} <= names
    first, second = looks.looks_of(sorted(names)), looks.looks_of(["new", *sorted(names)])
    changed = {name for name in names if first[name]["color"] != second[name]["color"]}
    assert not changed


def test_figures_are_kept_in_the_order_in_which_they_are_drawn(tmp_path, monkeypatch):
    file = tmp_path / "00.jsonl"
    monkeypatch.setenv("SAESUB_FIGURES", str(file))
    plots.firing_counts(FIRED)
    plots.dead_against_fvu(_rates())
    with pytest.raises(SaesubError):
        plots.firing_counts(FIRED.drop(columns="power"))
    found = [json.loads(line)["figure"] for line in file.read_text().splitlines()]
    assert found == ["firing_counts", "dead_against_fvu"]


def test_a_title_is_kept_and_stands_above_the_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("SAESUB_FIGURES", str(tmp_path / "00.jsonl"))
    title = "Half of the features of the random initialisation never fire, and of ASI none does"
    figure = plots.firing_counts(FIRED, title=title)
    again = redrawn((tmp_path / "00.jsonl").read_text())
    drawn, redone = (of.legends[0].get_title() for of in (figure, again))
    assert redone.get_text() == drawn.get_text()
    assert drawn.get_text().replace("\n", " ") == title
    plain = plots.firing_counts(FIRED)
    for of in (figure, plain):
        of.draw_without_rendering()
    assert drawn.get_window_extent().width <= figure.bbox.width
    names = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert not any(drawn.get_window_extent().overlaps(name) for name in names)
    heights = [of.axes[0].get_window_extent().height for of in (figure, plain)]
    assert heights[0] == pytest.approx(heights[1], rel=0.05)  # no smaller for its title


def test_a_figure_without_a_legend_has_its_title_above_it():
    figure = plots.dead_by_remedy(test_plots._remedies(), title="A title")
    assert figure.get_suptitle() == "A title"


def test_columns_that_no_figure_draws_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("SAESUB_FIGURES", str(tmp_path / "00.jsonl"))
    plots.dead_against_fvu(_rates())
    frame = json.loads((tmp_path / "00.jsonl").read_text())["arguments"]["mapping"]["frame"]
    assert frame["columns"] == [
        "condition",
        "lr",
        "dead_share",
        "fvu",
        "best",
    ]  # "density" holds dicts


def test_without_the_variable_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAESUB_FIGURES", raising=False)
    plots.firing_counts(FIRED)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        '{"figure": "no such", "title": "", "arguments": {"mapping": {}}}',
        '{"figure": "width"}',
        '{"figure": "width", "title": "", "note": "", "arguments": []}',
        '{"figure": "width", "title": "", "note": "", "arguments": {"mapping": {"x": 1}}}',
    ],
)
def test_a_line_of_no_figure_is_refused(line):
    with pytest.raises(SaesubError, match="run the notebook again"):
        redrawn(line)


def test_any_text_is_a_title(tmp_path, monkeypatch):
    monkeypatch.setenv("SAESUB_FIGURES", str(tmp_path / "kept.jsonl"))
    frame = pd.DataFrame({"condition": ["random"] * 2, "power": [0, 1], "share": [0.4, 0.6]})
    for text in (" ", "\n", "$\\foo$", "a\x85b\u2028c", "w" * 500, "a " * 80):
        _pixels(plots.firing_counts(frame, title=text, note=text))
    lines = (tmp_path / "kept.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 6
    assert all(redrawn(line) for line in lines)


def test_a_line_does_not_begin_with_a_per_cent_sign():
    frame = pd.DataFrame({"condition": ["random"] * 2, "power": [0, 1], "share": [0.4, 0.6]})
    for words in range(8, 24):
        title = "a " * words + "12 % and 34 % of the features"
        figure = plots.firing_counts(frame, title=title, note=title * 3)
        lines = [figure._suptitle or figure.legends[0].get_title(), *figure.texts]
        assert not any("\n%" in text.get_text() for text in lines)
