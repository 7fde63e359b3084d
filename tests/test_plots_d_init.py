"""The figure on d_init: every run drawn where it lies."""

from __future__ import annotations

import pandas as pd
import pytest

from saesub.errors import SaesubError
from saesub.reproduce.plots import d_init_by_place

SWEEP = pd.DataFrame(
    {
        "place": ["a"] * 4 + ["b"] * 4,
        "d_init_share": [0.1, 0.3, 0.6, 1.0] * 2,
        "dead_share": [0.2, 0.1, 0.3, 0.4, 0.5, 0.3, 0.2, 0.1],
        "auto": [False, True, False, False] * 2,
    }
)


def test_a_panel_for_each_place_with_auto_and_the_random_start_marked():
    panels = d_init_by_place(SWEEP).axes
    assert [axes.get_title() for axes in panels[:2]] == ["a", "b"]
    swept, random, auto = panels[0].lines
    assert swept.get_xydata().tolist() == [[0.1, 0.2], [0.3, 0.1], [0.6, 0.3], [1.0, 0.4]]
    assert random.get_xydata().tolist() == [[1.0, 0.4]]
    assert auto.get_xydata().tolist() == [[0.3, 0.1]]


def test_a_missing_column_is_named():
    with pytest.raises(SaesubError, match="auto"):
        d_init_by_place(SWEEP.drop(columns="auto"))
