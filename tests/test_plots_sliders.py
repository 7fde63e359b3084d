"""A figure with sliders: a picture for each setting, of which one is shown."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from io import BytesIO

import browser
import matplotlib
import numpy as np
import pytest
from PIL import Image

from saesub.errors import SaesubError
from saesub.reproduce import plots

matplotlib.use("Agg")
SETTINGS = {"n": [2048, 4096], "rate": [0.001, 0.002, 0.004]}
NAMES = {"n": "features", "rate": "learning rate"}


def _draw(n: int, rate: float):
    return plots.singular_values({"W": np.array([3.0, 2.0, 1.0]) * n * rate})


def _say(n: int, rate: float) -> str:
    return f"{n:,} features <at {rate}>"


def _page() -> str:
    return plots.with_sliders(_draw, SETTINGS, _say, NAMES)._repr_html_()


def test_there_is_a_picture_for_each_setting_and_the_first_is_shown():
    page = _page()
    at = re.findall(r'<figure data-at="(\d \d)"( hidden)?>', page)
    assert [place for place, _ in at] == [f"{i} {j}" for i in (0, 1) for j in (0, 1, 2)]
    assert [place for place, hidden in at if not hidden] == ["0 0"]
    pictures = re.findall(r"base64,([^\"]+)", page)
    sizes = {Image.open(BytesIO(b64decode(picture))).size for picture in pictures}
    assert len(pictures) == 6
    assert len(sizes) == 1
    assert "4,096 features &lt;at 0.004&gt;" in page
    assert "2,048|4,096" in page


def test_the_same_figure_has_the_same_page():
    assert _page() == _page()


def test_what_is_behind_a_slider_is_not_kept_as_a_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("SAESUB_FIGURES", str(tmp_path / "00.jsonl"))
    _page()
    assert not [*tmp_path.iterdir()]
    _draw(2048, 0.001)
    assert json.loads((tmp_path / "00.jsonl").read_text())["figure"] == "singular_values"


@pytest.mark.parametrize(("settings", "names"), [({"n": []}, NAMES), ({"n": [1]}, {})])
def test_a_slider_without_values_or_name_is_refused(settings, names):
    with pytest.raises(SaesubError, match="needs values and a name"):
        plots.with_sliders(_draw, settings, _say, names)


@pytest.mark.slow
@pytest.mark.skipif(not browser.chromium(), reason="no chromium on the path")
def test_a_slider_moved_by_the_keyboard_shows_another_picture(tmp_path):
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{_page()}{_page()}", encoding="utf-8")
    with browser.browser() as chromium:
        tab = chromium.new_page()
        tab.goto(file.as_uri())
        shown = tab.locator(".saesub-sliders").first.locator("figure:visible figcaption")
        assert shown.inner_text() == _say(2048, 0.001)
        tab.locator("input").nth(1).focus()
        for _ in range(2):
            tab.keyboard.press("ArrowRight")
        assert shown.inner_text() == _say(2048, 0.004)
        tab.locator("input").nth(0).focus()
        tab.keyboard.press("End")
        assert shown.inner_text() == _say(4096, 0.004)
        assert tab.locator("output").first.inner_text() == "4,096"
        assert shown.count() == 1
