"""Estimate each notebook's peak memory at `quick` from a run at `smoke`, where none is measured.

    python notebooks/memory.py [NUMBER ...]

A notebook runs at `smoke` in a folder of its own. The activations and spectra that it keeps there,
and the largest set of SAEs that it trains side by side, grow to `quick` as its settings do, and are
added to the measured peak as if they all lay in memory at once. A notebook with other models at
`quick` has no estimate; it must be measured.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from saesub import load_model
from saesub.reproduce import find_notebooks, reproduce

publish = runpy.run_path(str(Path(__file__).with_name("publish.py")))
ROOT: Path = publish["ROOT"]
D_IN = 576  # of the default model, SmolLM2-135M
# A row of the encoder and one of the decoder in float32, and Adam's two moments of each.
BYTES_OF_A_FEATURE = 2 * D_IN * 4 * 3


def settings(notebook: nbformat.NotebookNode, profile: str) -> dict[str, Any]:
    """What a profile stands for: the names that the cell after the parameters defines."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    names: dict[str, Any] = {"PROFILE": profile}
    exec(cells[2], names)
    return {**names, **names.get("S", {})}


def sizes(values: Mapping[str, Any]) -> dict[str, float]:
    """Tokens, layers and features that a profile's settings ask for; 1 for what they do not name.

    All layers of the default model where they say `layers=None`.
    """
    layers = values.get("layers", [1])
    n_layers = len(layers) if layers is not None else load_model("smollm2-135m").cfg.n_layers
    widths = values.get("widths") or [values.get("d_sae", 1)]
    return {"tokens": values.get("n_tokens", 1), "layers": n_layers, "features": max(widths)}


def growth(runs: Path, n_saes: int, small: Mapping[str, float], large: Mapping[str, float]) -> int:
    """How many more bytes a large run holds than a small one: what the small one kept in the folder
    `runs`, by the ratio of their sizes, and the largest set of `n_saes` trained side by side."""
    times = {name: large[name] / small[name] for name in small}
    kept = {
        times["tokens"] * times["layers"]: sum(map(_bytes, runs.glob("activations-*"))),
        times["layers"]: sum(map(_bytes, runs.glob("spectra*"))),
    }
    saes = n_saes * (large["features"] - small["features"]) * BYTES_OF_A_FEATURE
    return round(sum((ratio - 1) * size for ratio, size in kept.items()) + saes)


def side_by_side(executed: Path) -> int:
    """The most SAEs that an executed notebook trained at once, as its progress bars say."""
    counts = re.findall(r"Training (\d+) SAEs", executed.read_text(encoding="utf-8"))
    return max(map(int, counts), default=0)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def estimate(path: Path) -> int | None:
    """The estimated peak at `quick` of the notebook at `path`, in bytes."""
    notebook = nbformat.read(path, as_version=4)
    small, large = (settings(notebook, profile) for profile in ("smoke", "quick"))
    if small.get("models") != large.get("models"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        (run,) = reproduce("smoke", [path.stem], folder, quiet=True)
        if run.error or "cpu" not in run.peak_memory:
            return None
        place = Path(folder) / "smoke"
        n_saes = side_by_side(place / "notebooks" / path.name)
        return run.peak_memory["cpu"] + growth(place / "runs", n_saes, sizes(small), sizes(large))


if __name__ == "__main__":
    for source in find_notebooks(sys.argv[1:]):
        record = json.loads(publish["RECORD_FILE"].read_text())
        recorded = record[source.stem]
        if recorded.get("peak_memory") or not (held := estimate(source)):
            continue
        recorded["estimated_memory"] = {"cpu": held}
        publish["write_record"](record)
        publish["write_first_cell"](source, recorded)
        readme = ROOT / "README.md"
        publish["write_atomically"](readme, publish["with_tables"](readme.read_text(), record))
