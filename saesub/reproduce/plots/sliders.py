"""A figure that a reader moves: a picture for each setting, and a slider for each number.

The pictures are in the page, so that it needs no server. Without scripts the first one is shown.
"""

from __future__ import annotations

import hashlib
import html
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from itertools import product
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from saesub.errors import SaesubError
from saesub.reproduce.plots.kept import not_kept

_COLOURS = 64
_SCRIPT = """
(root => {
  const sliders = [...root.querySelectorAll("input")], shown = root.querySelectorAll("figure");
  const show = () => {
    const at = sliders.map(slider => slider.value).join(" ");
    for (const figure of shown) figure.hidden = figure.dataset.at !== at;
    for (const slider of sliders) {
      const value = slider.dataset.values.split("|")[slider.value];
      slider.setAttribute("aria-valuetext", value);
      slider.nextElementSibling.textContent = value;
    }
  };
  for (const slider of sliders) slider.addEventListener("input", show);
  show();
})(document.getElementById("%s"));
"""


class Sliders:
    """What `with_sliders` returns: a notebook shows it as HTML."""

    def __init__(self, page: str) -> None:
        self._page = page

    def _repr_html_(self) -> str:
        return self._page


def with_sliders(
    draw: Callable[..., Figure],
    settings: Mapping[str, Sequence[Any]],
    say: Callable[..., str],
    names: Mapping[str, str],
) -> Sliders:
    """Pictures of all combinations of settings, with a slider for each of them.

    Args:
        draw: makes the figure of a setting, which it takes by keyword.
        settings: the values that each keyword takes, in the order of the slider.
        say: what the figure of a setting shows, in a sentence; it is written below, and is the
            picture's text for readers who do not see it.
        names: what is written beside each slider, by keyword.

    Raises SaesubError for a slider without values or without a name.
    """
    for key, values in settings.items():
        if not values or key not in names:
            raise SaesubError(f"the slider of {key!r} needs values and a name; give both")
    figures = []
    for at in product(*(range(len(values)) for values in settings.values())):
        given = {key: settings[key][place] for key, place in zip(settings, at, strict=True)}
        with not_kept():
            picture = _data(draw(**given))
        told = html.escape(say(**given))
        hidden = "" if not any(at) else " hidden"
        figures.append(
            f'<figure data-at="{" ".join(map(str, at))}"{hidden}>'
            f'<img style="max-width:100%" src="{picture}" alt="{told}">'
            f"<figcaption>{told}</figcaption></figure>"
        )
    inputs = "".join(_slider(names[key], values) for key, values in settings.items())
    body = inputs + "".join(figures)
    name = f"sliders-{hashlib.sha256(body.encode()).hexdigest()[:10]}"
    script = f"<script>{_SCRIPT % name}</script>"
    return Sliders(f'<div class="saesub-sliders" id="{name}">{body}</div>{script}')


def _slider(name: str, values: Sequence[Any]) -> str:
    shown = [f"{value:,}" if isinstance(value, int) else f"{value}" for value in values]
    return (
        f"<p><label>{html.escape(name)} "
        f'<input type="range" min="0" max="{len(shown) - 1}" value="0" '
        f'data-values="{html.escape("|".join(shown))}" aria-valuetext="{html.escape(shown[0])}">'
        f" <output>{html.escape(shown[0])}</output></label></p>"
    )


def _data(figure: Figure) -> str:
    """The figure as the address of an image in few colours."""
    drawn, small = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(_COLOURS).save(small, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(small.getvalue()).decode()
