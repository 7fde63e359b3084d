"""The figure of the recipe by regime: what stands where, and what is beyond its edges."""

from __future__ import annotations

import pandas as pd
import pytest

from saesub.errors import SaesubError
from saesub.reproduce.plots import recipe_by_regime

FRAME = pd.DataFrame(
    {
        "model": ["a", "a", "b"],
        "regime": ["a 1", "a 2", "b 1"],
        "baseline_fvu": [0.2, 0.4, 0.1],
        "fvu": [0.18, 0.42, 0.02],
        "fvu_unrefitted": [0.2, 0.44, 0.3],
        "refitted_fvu": [0.19, None, 0.05],
    }
)


def test_marks_are_shares_of_the_best_baselines_fvu():
    (axes,) = recipe_by_regime(FRAME).axes
    drawn = {of.get_label(): of.get_offsets().tolist() for of in axes.collections}
    assert list(drawn) == ["recipe", "recipe before its refit", "best baseline, refitted too"]
    for place, change in enumerate((-0.1, 0.05, -0.4)):  # the last lies beyond the edge
        assert drawn["recipe"][place] == pytest.approx([change, place])
    assert [text.get_text() for text in axes.texts] == ["−80 %, −50 %", "+200 %"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a 1", "a 2", "b 1"]
    beyond = [drawn[name][2][0] for name in ("recipe", "best baseline, refitted too")]
    assert beyond == pytest.approx([-0.4, -0.38])  # one beside the other
    between = [line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1]
    assert between == [1.5]  # of the models
    low, high = axes.get_ylim()
    assert low > high  # the first regime is at the top


def test_without_refitted_baselines_they_have_no_mark():
    (axes,) = recipe_by_regime(FRAME.drop(columns="refitted_fvu")).axes
    assert len(axes.collections) == 2
    with pytest.raises(SaesubError, match="NaN"):
        recipe_by_regime(FRAME.assign(fvu=float("nan")))
