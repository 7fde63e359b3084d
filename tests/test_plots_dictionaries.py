"""The figure on kinds of dictionary: every seed, every mean, the line between conditions."""

from __future__ import annotations

import matplotlib
import pandas as pd
import pytest
from matplotlib.collections import PathCollection

from saesub.errors import SaesubError
from saesub.reproduce.plots import dead_by_dictionary

matplotlib.use("Agg")


def _frame() -> pd.DataFrame:
    rows = [("TopK", "random", 0.10), ("TopK", "random", 0.14), ("TopK", "asi", 0.02)]
    rows += [("Lorsa", "random", 0.3), ("Lorsa", "asi", 0.2), ("Lorsa", "asi, per head", 0.1)]
    return pd.DataFrame(rows, columns=["dictionary", "condition", "dead_share"])


def test_seeds_means_and_lines():
    axes = dead_by_dictionary(_frame()).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["TopK", "Lorsa"]
    lines = {tuple(line.get_ydata()): tuple(line.get_xdata()) for line in axes.lines}
    assert lines[0, 0] == pytest.approx((0.02, 0.12))
    assert lines[1, 1] == pytest.approx((0.1, 0.3))
    dots = [c for c in axes.collections if isinstance(c, PathCollection)]
    means = {c.get_label(): c.get_offsets().tolist() for c in dots if c.get_sizes()[0] > 20}
    assert sorted(means) == ["asi", "asi, per head", "random"]
    assert sorted(means["random"]) == [pytest.approx([0.12, 0]), pytest.approx([0.3, 1])]
    assert sum(len(c.get_offsets()) for c in dots) == 6 + 5
    low, _ = axes.get_xlim()
    assert low < 0, "a mark at zero must not be cut"


def test_the_fit_and_the_active_features_stand_beside():
    frame = _frame().assign(fvu=[0.3, 0.32, 0.25, 0.4, 0.38, 0.36], l0=[32, 34, 31, 32, 32, 30])
    figure = dead_by_dictionary(frame)
    dead, fvu = figure.axes
    lines = {tuple(line.get_ydata()): tuple(line.get_xdata()) for line in fvu.lines}
    assert lines[0, 0] == pytest.approx((0.25, 0.31))
    assert [text.get_text() for text in fvu.texts] == [
        "L0: random · asi · asi, per head",
        *("33.0 · 31.0", "32.0 · 32.0 · 30.0"),
    ]
    assert dead.get_ylim() == fvu.get_ylim()
    assert dead.get_xlabel() == "dead features (heads, for Lorsa)"
    alike = frame[frame["dictionary"] == "TopK"].assign(l0=32.0)
    dead, fvu = dead_by_dictionary(alike).axes
    assert [dead.get_xlabel(), fvu.get_xlabel(), len(fvu.texts)] == ["dead features", "FVU", 0]
    with pytest.raises(SaesubError, match="NaN"):
        dead_by_dictionary(frame.assign(fvu=float("nan")))


def test_figures_of_a_series_have_the_same_axes():
    ranges = {"dead_share": [0.0, 0.9], "fvu": [0.1, 0.8]}
    whole = _frame().assign(fvu=0.3, l0=32.0)
    first, second = (dead_by_dictionary(of, ranges).axes for of in (whole, whole.iloc[:3]))
    assert [axes.get_xlim() for axes in first] == [axes.get_xlim() for axes in second]
    assert first[0].get_xlim()[1] > 0.9


def test_incomplete_data_is_refused():
    with pytest.raises(SaesubError, match="lacks"):
        dead_by_dictionary(_frame().drop(columns="condition"))
    with pytest.raises(SaesubError, match="no rows"):
        dead_by_dictionary(_frame().iloc[:0])
