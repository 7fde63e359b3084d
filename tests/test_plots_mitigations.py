"""The mitigations' figure: a mark for each at its mean, the best joined and named first."""

from __future__ import annotations

import pandas as pd
import pytest

from saesub.errors import SaesubError
from saesub.reproduce.plots import pareto

FRAME = pd.DataFrame(
    {
        "condition": ["a", "a", "b", "c", "d"],
        "dead_share": [0.0, 0.2, 0.0, 0.5, 0.6],
        "fvu": [0.2, 0.4, 0.5, 0.1, 0.2],
    }
)


def test_every_mitigation_is_marked_at_its_mean_and_the_best_are_joined_and_named_first():
    figure = pareto(FRAME)
    line, *marks = figure.axes[0].lines
    places = {mark.get_label(): mark.get_xydata()[0].tolist() for mark in marks}
    assert places["a"] == pytest.approx([0.1, 0.3])
    assert len(places) == 4
    assert line.get_xydata().tolist() == [[0.0, 0.5], [0.1, pytest.approx(0.3)], [0.5, 0.1]]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["b", "a", "c", "d"]


def test_marks_differ_in_colour_or_shape():
    many = pd.DataFrame({"condition": range(20), "dead_share": 0.1, "fvu": 0.2})
    marks = pareto(many).axes[0].lines[1:]
    assert len({(mark.get_color(), mark.get_marker()) for mark in marks}) == 20


def test_a_frame_without_fvu_is_refused():
    with pytest.raises(SaesubError, match="fvu"):
        pareto(FRAME.drop(columns="fvu"))
