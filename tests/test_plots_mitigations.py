"""The mitigations' small multiples: what each panel holds, and that its texts can be read."""

from __future__ import annotations

import pandas as pd
import pytest

from saesub.errors import SaesubError
from saesub.reproduce.plots import mitigation_panels

PANELS = {
    "AuxK": ["AuxK", "ASI + AuxK"],
    "ghost gradients": ["ghost gradients", "ASI + ghost gradients"],
    "resampling": ["resampling", "ASI + resampling"],
    "SparseAdam": ["random + SparseAdam", "ASI + SparseAdam"],
    "data start": ["data start"],
    "bias at the median": ["bias at the median"],
}
CONDITIONS = ["random", "ASI", *(name for names in PANELS.values() for name in names)]


def _rates() -> pd.DataFrame:
    outcomes = [(1e-3, 0.0, 0.24), (2e-3, 0.02, 0.22), (4e-3, 0.4, 0.23)]
    rows = [
        (name, lr, dead / (1 + place), fvu + 0.001 * place, lr == 2e-3)
        for place, name in enumerate(CONDITIONS)
        for lr, dead, fvu in outcomes
    ]
    frame = pd.DataFrame(rows, columns=["condition", "lr", "dead_share", "fvu", "best"])
    return frame.sample(frac=1, random_state=0)


def _tokens() -> pd.DataFrame:
    rows = [(name, 1000 * n, n / 20) for name in CONDITIONS for n in range(1, 9)]
    return pd.DataFrame(rows, columns=["condition", "tokens", "dead_share"])


def _shown(figure) -> list:
    return [axes for axes in figure.axes if axes.get_visible()]


def test_each_panel_holds_its_mitigation_and_the_two_it_is_held_against():
    frame = _rates()
    panels = _shown(mitigation_panels(frame, PANELS))
    assert [axes.get_title() for axes in panels] == list(PANELS)
    for axes, names in zip(panels, PANELS.values(), strict=True):
        drawn = [line.get_xydata().tolist() for line in axes.lines]
        for name in ["random", "ASI", *names]:
            rows = frame[frame["condition"] == name].sort_values("lr")
            assert rows[["fvu", "dead_share"]].to_numpy().tolist() in drawn
            assert rows[rows["best"]][["fvu", "dead_share"]].to_numpy().tolist() in drawn
        assert len(drawn) == 2 * (2 + len(names))


def test_colours_and_scales_are_the_same_in_every_panel():
    panels = _shown(mitigation_panels(_rates(), PANELS))
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in panels}) == 1
    assert len({tuple(line.get_color() for line in axes.lines)[:6] for axes in panels}) == 1
    colours = [line.get_color() for line in panels[0].lines[::2]]
    assert len(set(colours)) == 4


def test_over_training_the_lines_have_no_marks():
    panels = _shown(mitigation_panels(_tokens(), PANELS, x="tokens"))
    for axes, names in zip(panels, PANELS.values(), strict=True):
        assert len(axes.lines) == 2 + len(names)
        assert {line.get_marker() for line in axes.lines} == {""}
        assert axes.lines[0].get_xdata().tolist() == [1000 * n for n in range(1, 9)]


def test_the_legend_names_what_is_drawn():
    def names(panels: dict, **how: str) -> list[str]:
        (legend,) = mitigation_panels(_tokens() if how else _rates(), panels, **how).legends
        return [text.get_text() for text in legend.get_texts()]

    assert names(PANELS)[2:4] == ["this mitigation", "this mitigation + ASI"]
    assert "large" in names(PANELS)[-1]
    alone = {"data start": ["data start"]}
    assert names(alone, x="tokens") == [
        "random initialisation, no mitigation",
        "ASI alone",
        "this mitigation",
    ]


def test_a_note_is_below_its_title():
    notes = {"AuxK": "1.2 × time, +10 MB", "data start": "1 × time"}
    panels = _shown(mitigation_panels(_rates(), PANELS, notes=notes))
    for axes in panels:
        (text,) = axes.texts
        assert text.get_text() == notes.get(axes.get_title(), "")
    with pytest.raises(SaesubError, match=r"notes on \['signum'\], which no panel is of; add"):
        mitigation_panels(_rates(), PANELS, notes={"signum": ""})


@pytest.mark.parametrize("notes", [{}, dict.fromkeys(PANELS, "1.35 × time, +123 MB")])
@pytest.mark.parametrize("x", ["fvu", "tokens"])
def test_no_two_texts_overlap(x, notes):
    figure = mitigation_panels(_rates() if x == "fvu" else _tokens(), PANELS, x=x, notes=notes)
    figure.draw_without_rendering()
    texts = [*figure.legends, figure._supxlabel, figure._supylabel]
    for axes in _shown(figure):
        texts += [axes.title, *(text for text in axes.texts if text.get_text())]
        for axis, bounds in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = [t for t in axis.get_major_ticks() if bounds[0] <= t.get_loc() <= bounds[1]]
            texts += [t.label1 for t in ticks if t.label1.get_visible()]
    boxes = [text.get_window_extent().padded(-1) for text in texts]
    for i, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:i]) == 0, str(texts[i])
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("frame", "how", "message"),
    [
        (_rates().drop(columns="fvu"), {}, "fvu"),
        (_rates().drop(columns="best"), {}, "best"),
        (_rates()[_rates()["condition"] != "ASI + AuxK"], {}, "no rows of .*ASI [+] AuxK"),
        (_rates(), {"x": "steps"}, "fvu or tokens"),
    ],
)
def test_what_cannot_be_drawn_is_refused(frame, how, message):
    with pytest.raises(SaesubError, match=message):
        mitigation_panels(frame, PANELS, **how)
