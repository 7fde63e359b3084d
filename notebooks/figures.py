"""Draw every figure of the notebooks and of the README again, from what is recorded alone.

    python notebooks/figures.py

Writes `07_rival_mitigations-2.png`, which is the second figure of notebook 07, and so on, into
build/figures. A full run keeps what its figures were drawn from; `publish.py` takes it over into
data/results/full/figures.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from saesub.reproduce.plots import dead_against_fvu
from saesub.reproduce.plots.kept import redrawn

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "data" / "results" / "full" / "figures"
OUT = ROOT / "build" / "figures"


def of_notebook(kept: Path) -> Iterator[Figure]:
    """The figures of a notebook in their order, from the file that keeps them."""
    return map(redrawn, kept.read_text(encoding="utf-8").splitlines())


def saved(figure: Figure, path: Path) -> None:
    """Writes a figure as a notebook shows it."""
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    """Draws all of them."""
    mpl.use("Agg")
    OUT.mkdir(parents=True, exist_ok=True)
    for kept in tqdm(sorted(KEPT.glob("*.jsonl")), unit="notebook"):
        for number, figure in enumerate(of_notebook(kept), 1):
            saved(figure, OUT / f"{kept.stem}-{number}.png")
    readme = runpy.run_path(str(ROOT / "notebooks" / "publish.py"))["readme_rows"]()
    saved(dead_against_fvu(readme), OUT / "README.png")


if __name__ == "__main__":
    main()
