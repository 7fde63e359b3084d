"""Draw every figure of the notebooks and of the README again, from what is recorded alone.

    python notebooks/figures.py

Writes `07_rival_mitigations-2.png`, which is the second figure of notebook 07, and so on, into
build/figures, and `about.json`, which says in a sentence what each shows. A full run keeps what its
figures were drawn from; `publish.py` takes it over into data/results/full/figures.

    python notebooks/figures.py --notebooks

puts them into the committed notebooks, in place of those there, and the tables of claims as well:
where their look has changed, nothing has to be run again.
"""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from base64 import b64encode
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import matplotlib as mpl
import nbformat
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from saesub.files import write_atomically
from saesub.reproduce import plots
from saesub.reproduce.claims_table import ClaimsTable
from saesub.reproduce.plots.kept import redrawn

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "data" / "results" / "full" / "figures"
OUT = ROOT / "build" / "figures"
PNG, CLAIMS = "image/png", "saesub-claims"
PUBLISH = runpy.run_path(str(ROOT / "notebooks" / "publish.py"))


def of_notebook(kept: Path) -> Iterator[Figure]:
    """The figures of a notebook in their order, from the file that keeps them."""
    return map(redrawn, kept.read_text(encoding="utf-8").splitlines())


def about(kept: Path) -> list[str]:
    """What each figure shows: its title, its function's first sentence, and its note."""
    lines = map(json.loads, kept.read_text(encoding="utf-8").splitlines())
    return [
        " ".join(filter(None, (_sentence(line["title"]), _drawn(line), line["note"])))
        for line in lines
    ]


def _drawn(line: dict) -> str:
    text = inspect.getdoc(getattr(plots, line["figure"])) or ""
    return " ".join(text.split("\n\n")[0].split())


def _sentence(text: str) -> str:
    return text and text.rstrip(".") + "."


def saved(figure: Figure, to: Path | BinaryIO) -> None:
    """Writes a figure as a notebook shows it."""
    figure.savefig(to, bbox_inches="tight", format="png")


def into_notebook(kept: Path, notebook: Path, rows: Sequence[dict] = ()) -> None:
    """Replaces the notebook's figures by those drawn again, in their order, and its table of claims
    by that of these rows.

    Raises ValueError if it shows more or fewer figures than are kept.
    """
    shown = nbformat.read(notebook, as_version=4)
    outputs = [out for cell in shown.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if PNG in out.get("data", {})]
    for out, figure in zip(pictures, of_notebook(kept), strict=True):
        png = BytesIO()
        saved(figure, png)
        out.data[PNG] = b64encode(PUBLISH["in_few_colours"](png.getvalue())).decode()
    for out in outputs:
        if rows and CLAIMS in out.get("data", {}).get("text/html", ""):
            out.data["text/html"] = ClaimsTable(rows)._repr_html_()
    write_atomically(notebook, nbformat.writes(shown) + "\n")


def main(arguments: Sequence[str]) -> None:
    """Draws all of them, or puts them into the notebooks."""
    mpl.use("Agg")
    if "--notebooks" in arguments:
        record = PUBLISH["read_records"]()[PUBLISH["SHOWN"]]
        for kept in tqdm(sorted(KEPT.glob("*.jsonl")), unit="notebook"):
            notebook = ROOT / "notebooks" / f"{kept.stem}.ipynb"
            into_notebook(kept, notebook, record[kept.stem]["claims"])
        return
    OUT.mkdir(parents=True, exist_ok=True)
    told: dict[str, str] = {}
    for kept in tqdm(sorted(KEPT.glob("*.jsonl")), unit="notebook"):
        for number, figure in enumerate(of_notebook(kept), 1):
            saved(figure, OUT / f"{kept.stem}-{number}.png")
            told[f"{kept.stem}-{number}"] = about(kept)[number - 1]
    (OUT / "about.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    saved(PUBLISH["readme_figure"](), OUT / "README.png")


if __name__ == "__main__":
    main(sys.argv[1:])
