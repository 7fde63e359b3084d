"""The protocol's figures: what each draws, and that it does not depend on the order of rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from saesub.errors import SaesubError
from saesub.reproduce.plots import dead_against_fvu, dead_by_window, firing_counts


def _windows() -> pd.DataFrame:
    shares = {"random": [0.5, 0.3, 0.2], "ASI": [0.2, 0.05, 0.0]}
    rows = [
        (name, 8192 * 2**place, share + seed / 100)
        for name, values in shares.items()
        for place, share in enumerate(values)
        for seed in range(3)
    ]
    frame = pd.DataFrame(rows, columns=["condition", "tokens", "silent"])
    return frame.sample(frac=1, random_state=0)


def test_a_line_is_the_mean_of_seeds_by_window_and_the_deciding_window_is_marked():
    frame = _windows()
    (axes,) = dead_by_window(frame, decides=20_000).axes
    drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
    for name, rows in frame.groupby("condition"):
        means = rows.groupby("tokens")["silent"].mean()
        np.testing.assert_allclose(drawn[name], np.column_stack([means.index, means]))
    marked = [line for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert [line.get_xdata()[0] for line in marked] == [20_000]
    assert [text.get_text() for text in axes.texts] == [
        "here a feature fires\n1,000 times on average"
    ]
    assert axes.get_xscale() == "log"
    assert len(dead_by_window(frame).axes[0].lines) == 2
    assert len(dead_by_window(frame, decides=80_000).axes[0].lines) == 2  # far out of the data


def test_a_curve_follows_the_rates_and_the_best_has_a_large_mark():
    rows = [
        (name, lr, dead * factor, fvu, lr == best)
        for name, factor, best in (("random", 1.0, 2e-3), ("ASI", 0.1, 1e-3))
        for lr, dead, fvu in ((4e-3, 0.6, 0.25), (1e-3, 0.01, 0.26), (2e-3, 0.2, 0.24))
    ]
    frame = pd.DataFrame(rows, columns=["condition", "lr", "dead_share", "fvu", "best"])
    (axes,) = dead_against_fvu(frame).axes
    curves, marks, seeds = axes.lines[::3], axes.lines[1::3], axes.lines[2::3]
    assert curves[0].get_xdata().tolist() == [0.26, 0.24, 0.25]  # by rate, not by FVU
    assert [len(of.get_xdata()) for of in seeds] == [3, 3]
    assert [mark.get_xydata().tolist() for mark in marks] == [[[0.24, 0.2]], [[0.26, 0.001]]]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["0.001", "0.002", "0.004"] * 2


def test_steps_hold_the_share_of_each_power_and_those_that_never_fire():
    rows = [("random", -1, 0.5), ("random", 0, 0.25), ("random", 3, 0.25), ("ASI", 3, 1.0)]
    (axes,) = firing_counts(pd.DataFrame(rows, columns=["condition", "power", "share"])).axes
    steps = [patch.get_data() for patch in axes.patches]
    assert [list(step.values) for step in steps] == [[0.5, 0.25, 0, 0, 0.25], [0, 0, 0, 0, 1.0]]
    assert axes.get_xticklabels()[0].get_text() == "never"
    assert axes.get_xticklabels()[1].get_text() == "1"


@pytest.mark.parametrize(
    ("draw", "frame"),
    [
        (dead_by_window, _windows().assign(silent=np.nan)),
        (dead_by_window, _windows().drop(columns="silent")),
        (dead_against_fvu, pd.DataFrame({"condition": []})),
        (firing_counts, pd.DataFrame({"condition": ["a"], "power": [1], "share": [np.inf]})),
    ],
)
def test_bad_frames_are_refused(draw, frame):
    with pytest.raises(SaesubError):
        draw(frame)
