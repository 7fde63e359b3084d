"""What each figure of a run was drawn from, kept so that it can be drawn again without the run.

Where the environment variable SAESUB_FIGURES names a file, every figure adds a line of JSON to it:
the function's name and its arguments. `saesub reproduce` sets it, to a file for each notebook.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from textwrap import fill, wrap
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from pandas.api.types import is_numeric_dtype, is_scalar

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.reproduce.plots.drawing import NOTE

FILE = "SAESUB_FIGURES"
_SIZE, _LETTERS, _INCHES = 11.5, 10, 0.25  # of a title: points, letters to an inch, a line's height
_NOTE, _NOTE_LETTERS = 8.5, 14.5  # of what is written below: points, letters to an inch
_Draws = TypeVar("_Draws", bound=Callable[..., Figure])
_functions: dict[str, Callable[..., Figure]] = {}


def kept(function: _Draws) -> _Draws:
    """The same function, which takes two texts too and adds what it draws to the file that the
    environment names: `title`, what is to be seen, and `note`, what a reader must know of it, such
    as n and what bands and marks are."""
    signature = inspect.signature(function)

    @wraps(function)
    def drawn(*args: Any, title: str = "", note: str = "", **kwargs: Any) -> Figure:
        figure = _told(function(*args, **kwargs), title, note)
        if file := os.environ.get(FILE):
            given = signature.bind(*args, **kwargs).arguments
            line = {"figure": function.__name__, "title": title, "note": note}
            line["arguments"] = _encoded(given)
            path = Path(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
        return figure

    _functions[function.__name__] = function
    return drawn  # pyright: ignore[reportReturnType]


@contextmanager
def not_kept() -> Iterator[None]:
    """Nothing that is drawn inside is kept: a part of something that is no figure by itself."""
    file = os.environ.pop(FILE, None)
    try:
        yield
    finally:
        if file is not None:
            os.environ[FILE] = file


def redrawn(line: str) -> Figure:
    """The figure that a line of such a file is of. Raises SaesubError if it is of none."""
    try:
        found = json.loads(line)
        function, arguments = _functions[found["figure"]], _decoded(found["arguments"])
        title, note = str(found["title"]), str(found["note"])
        inspect.signature(function).bind(**arguments)
    except (ValueError, KeyError, TypeError) as error:
        raise SaesubError(
            f"this line is of no figure ({error}): run the notebook again to keep its figures"
        ) from error
    return _told(function(**arguments), title, note)


def _told(figure: Figure, title: str, note: str) -> Figure:
    """Writes a title at the top of the figure, which becomes as much higher, and a note below it. A
    legend at the top has the title as its own, since it would be drawn over another one."""
    if title.strip():
        lines = _filled(title, _LETTERS, figure)
        figure.set_figheight(figure.get_figheight() + _INCHES * (1 + lines.count("\n")))
        if figure.legends:
            figure.legends[0].set_title(lines, prop=FontProperties(size=_SIZE, weight="bold"))
            written = figure.legends[0].get_title()
            written.set_multialignment("center")
        else:
            written = figure.suptitle(lines, fontsize=_SIZE, fontweight="bold")
        written.set_parse_math(False)
    if note.strip():  # outside: a saved figure is cut around all that is drawn
        lines = _filled(note, _NOTE_LETTERS, figure)
        written = figure.text(0.5, -0.015, lines, ha="center", va="top", fontsize=_NOTE, color=NOTE)
        written.set_parse_math(False)
    return figure


def _filled(text: str, letters: float, figure: Figure) -> str:
    """The text in as few lines as fit into the figure's width, of like length; a number stays
    beside its per cent."""
    held, most = text.replace(" %", "\u00a0%"), round(letters * figure.get_figwidth())
    n = len(wrap(held, most))
    widths = range(max(1, len(held) // n), most)
    least = next((width for width in widths if len(wrap(held, width)) <= n), most)
    return fill(held, least).replace("\u00a0", " ")


def cumulative_shares(spectrum: Spectrum) -> np.ndarray:
    """The share of variance that the strongest direction holds, the two strongest, ...: (d,)."""
    variances = np.sort(spectrum.eigenvalues.numpy().clip(min=0))[::-1]
    return np.cumsum(variances) / variances.sum()


def _encoded(value: Any) -> Any:
    """JSON for an argument. Of a frame, the columns of scalars: no figure draws others."""
    if isinstance(value, pd.DataFrame):
        plain = [column for column in value if value[column].map(is_scalar).all()]
        parts = pd.DataFrame(value[plain]).to_dict("split")
        named = value.index.nlevels == 1 and not is_numeric_dtype(value.index)
        index = parts["index"] if named else None
        rows = [[_encoded(cell) for cell in row] for row in parts["data"]]
        name = value.columns.name
        return {"frame": rows, "columns": parts["columns"], "name": name, "index": index}
    if isinstance(value, Spectrum):
        return {"array": cumulative_shares(value).tolist()}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist()}
    if isinstance(value, Mapping):
        return {"mapping": {key: _encoded(item) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if is_scalar(value) and pd.isna(value) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "mapping" in value:
        return {key: _decoded(item) for key, item in value["mapping"].items()}
    if "array" in value:
        return np.array(value["array"])
    columns = pd.Index(value["columns"], name=value["name"])
    return pd.DataFrame(value["frame"], value["index"], columns)
