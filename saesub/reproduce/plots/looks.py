"""One look for each name in all figures: colours, markers and lines of sites and conditions."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from typing import Any

import pandas as pd

# Sites have Okabe and Ito's colours and conditions have others, so that a reader does not take one
# for the other. The tests look at both as the colour-blind see them.
SITES = {
    "attn_out": ("attention output", "#D55E00"),
    "mlp_out": ("MLP output", "#0072B2"),
    "resid_post": ("residual stream", "#009E73"),
    "z": ("heads' output z", "#CC79A7"),
    "cross_out": ("cross-attention output", "#661100"),
    "cross_z": ("z of the cross-attention", "#7B3FE4"),
}
CONDITIONS = {
    "random": "#7F7F7F",
    "asi": "#332288",
    "random + sparseadam": "#B8860B",
    "asi + sparseadam": "#1E9BD0",
    "random + no momentum": "#117733",
    "random + sparseadam + β₁ = 0.5": "#7B3FE4",
    "asi + no momentum": "#000000",
}
RIVALS = {"auxk": "#117733", "ghost gradients": "#000000", "resampling": "#56B4E9"}
CONTROLS = {  # what stands in W_O's place
    "gaussian": "#000000",
    "same σ": "#7B3FE4",
    "heads turned": "#88CCEE",
    "heads apart": "#225555",
    "heads' σ": "#666633",
}
HEADS = {"heads of one group": "#661100", "heads of different groups": "#E69F00"}
CAUSES = {  # of a low rank
    "heads' spectra": "#117733",
    "correlation of groups": "#E69F00",
    "correlation in a group": "#56B4E9",
    "anisotropy": "#661100",
    "overlap by chance": "#7B3FE4",
    "overlap beyond chance": "#000000",
}
_SAME = {"random half": "random", "subspace half": "asi", "sparseadam": "random + sparseadam"}
_OTHER_COLOURS = ("#117733", "#E69F00", "#56B4E9", "#661100", "#7B3FE4", "#000000", "#CC6677")
_LINES = {"random": "--", "random + sparseadam": "-.", "asi + sparseadam": (0, (6, 2))}
_UNTRAINED = (":", "-.")  # lines of a known name with fresh weights, or before training
MARKERS = "oDs^vPX"  # lines of a figure differ in their markers, or dashes, as well as in colour
_MARKS = (  # names that stand in one figure have different ones
    (SITES, MARKERS),
    (CONDITIONS, MARKERS),
    (RIVALS, "^vP"),
    (CONTROLS, "svPXD"),
    (HEADS, "o^"),
    (CAUSES, MARKERS),
)
_MARKER_OF = {
    name: mark for names, marks in _MARKS for name, mark in zip(names, marks, strict=False)
}
_COLOUR_OF = {site: color for site, (_, color) in SITES.items()}
_COLOUR_OF |= CONDITIONS | RIVALS | CONTROLS | HEADS | CAUSES
_SITE_OF = {label.lower(): site for site, (label, _) in SITES.items()}


def looks_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Label, colour, line style and marker of each site or condition.

    A site is known by its name in SITES, by a hook point that ends in it, or by its label. What is
    known has one look in all figures. Untrained, it keeps its colour, is dotted and has open marks.
    """
    names = list(dict.fromkeys(names))
    found = {name: look for name in names if (look := _known(name))}
    taken = {look[part] for look in found.values() for part in ("color", "marker")}
    others, marks = (
        cycle([of for of in every if of not in taken] or every)
        for every in (_OTHER_COLOURS, MARKERS)
    )
    unknown = {"linestyle": "-"}
    dotted: dict[str, int] = {}
    for name in names:
        if name not in found:
            found[name] = {"label": name, "color": next(others), "marker": next(marks)} | unknown
        elif ", untrained" in name:
            base = name.partition(", untrained")[0]
            dotted[base] = dotted.get(base, -1) + 1
            line = _UNTRAINED[dotted[base] % len(_UNTRAINED)]
            found[name] |= {"linestyle": line, "markerfacecolor": "none"}
    return {name: found[name] for name in names}


def _known(name: str) -> dict[str, Any]:
    """The look of a known name, of one of which it is a control, or which is untrained; or none."""
    base, comma, rest = name.rsplit("hook_", 1)[-1].partition(", untrained")
    key = " ".join(base.lower().removeprefix("control: ").replace("+", " + ").split())
    key = _SITE_OF.get(key) or _SAME.get(key, key)
    if key not in _COLOUR_OF:
        return {}
    label = SITES[key][0] + comma + rest if key in SITES else name
    look = {"label": label, "color": _COLOUR_OF[key], "marker": _MARKER_OF[key]}
    return look | {"linestyle": _LINES.get(key, "-")}


def curve_looks_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The same for curves without markers, which differ in their dashes."""
    dashed = zip(looks_of(names).items(), cycle(("-", "--", "-.", ":")), strict=False)
    return {name: look | {"marker": "", "linestyle": dash} for (name, look), dash in dashed}


def series(frame: pd.DataFrame, column: str) -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    """The rows of each site or condition, in the order of the frame, with the look of each."""
    named = looks_of(frame[column]).items()
    return [(pd.DataFrame(frame[frame[column] == name]), look) for name, look in named]
