"""Draw every figure of the notebooks and of the README again, from what is recorded alone.

    python notebooks/figures.py

Writes `07_rival_mitigations-2.png`, which is the second figure of notebook 07, and so on, into
build/figures, and `about.json`, which says in a sentence what each shows. A full run keeps what its
figures were drawn from; `publish.py` takes it over into data/results/full/figures.
"""

from __future__ import annotations

import inspect
import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from saesub.reproduce import plots
from saesub.reproduce.plots.kept import redrawn

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "data" / "results" / "full" / "figures"
OUT = ROOT / "build" / "figures"


def of_notebook(kept: Path) -> Iterator[Figure]:
    """The figures of a notebook in their order, from the file that keeps them."""
    return map(redrawn, kept.read_text(encoding="utf-8").splitlines())


def about(kept: Path) -> list[str]:
    """What each figure shows: its title, and the first sentence of its function's description."""
    lines = map(json.loads, kept.read_text(encoding="utf-8").splitlines())
    told = ((line["title"], inspect.getdoc(getattr(plots, line["figure"])) or "") for line in lines)
    return [". ".join(filter(None, (title, _first(text)))) for title, text in told]


def _first(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def saved(figure: Figure, path: Path) -> None:
    """Writes a figure as a notebook shows it."""
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    """Draws all of them."""
    mpl.use("Agg")
    OUT.mkdir(parents=True, exist_ok=True)
    told: dict[str, str] = {}
    for kept in tqdm(sorted(KEPT.glob("*.jsonl")), unit="notebook"):
        for number, figure in enumerate(of_notebook(kept), 1):
            saved(figure, OUT / f"{kept.stem}-{number}.png")
            told[f"{kept.stem}-{number}"] = about(kept)[number - 1]
    readme = runpy.run_path(str(ROOT / "notebooks" / "publish.py"))["readme_rows"]()
    (OUT / "about.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    saved(plots.dead_against_fvu(readme), OUT / "README.png")


if __name__ == "__main__":
    main()
