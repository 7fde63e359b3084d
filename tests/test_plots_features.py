"""The quality figures draw what they are given."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
import pytest

from saesub.errors import SaesubError
from saesub.reproduce.plots import features as plots

matplotlib.use("Agg")


def test_coherence_is_a_line_of_seeds_for_each_condition_and_chance_a_line() -> None:
    values = {"random": (0.0, 0.1, 0.2), "asi": (0.3, 0.3, 0.3)}
    rows = [(c, d, value) for c, of in values.items() for d in (0.001, 0.01) for value in of]
    frame = pd.DataFrame(rows, columns=["condition", "density", "coherence"])
    axes = plots.coherence_by_density(frame, chance=0.05).axes[0]
    random, asi, chance = axes.lines
    assert random.get_ydata() == pytest.approx([0.1, 0.1])
    assert asi.get_ydata() == pytest.approx([0.3, 0.3])
    assert chance.get_ydata()[0] == 0.05
    assert axes.get_ylim()[0] == 0


def test_a_shared_curve_falls_from_all_to_none() -> None:
    frame = pd.DataFrame({"condition": "asi", "pair": [0] * 4, "cosine": [0.2, 0.6, 0.71, 0.99]})
    axes = plots.shared_features(frame, 0.7).axes[0]
    x, y = axes.lines[0].get_data()
    assert y[0] == 1
    assert y[np.isclose(x, 0.7)] == 0.5
    assert (np.diff(y) <= 0).all()


def test_probes_have_a_panel_for_each_k_and_the_ceiling() -> None:
    rows = [(a, t, k, 0.7) for a in ("random", "asi") for t in ("x", "y") for k in (1, 5)]
    frame = pd.DataFrame(rows, columns=["condition", "task", "k", "accuracy"])
    ceiling = pd.DataFrame({"task": ["x", "y"], "accuracy": [0.9, 0.95]})
    figure = plots.probe_accuracy(frame, ceiling)
    assert [axes.get_title() for axes in figure.axes] == ["1 feature", "5 features"]
    assert all(len(axes.lines) == 2 for axes in figure.axes)
    plots.probe_accuracy(frame[frame["k"] == 1])


@pytest.mark.parametrize(
    "draw",
    [
        plots.coherence_by_density,
        plots.shared_features,
    ],
)
def test_missing_columns_are_named(draw) -> None:
    with pytest.raises(SaesubError, match="lacks"):
        draw(pd.DataFrame({"condition": ["asi"]}))
