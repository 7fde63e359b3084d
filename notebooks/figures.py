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

from saesub.errors import SaesubError
from saesub.files import write_atomically
from saesub.reproduce import claims, plots
from saesub.reproduce.claims_table import ClaimsTable
from saesub.reproduce.plots.kept import redrawn

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "data" / "results" / "full" / "figures"
OUT = ROOT / "build" / "figures"
PNG, CLAIMS = "image/png", "saesub-claims"
PUBLISH = runpy.run_path(str(ROOT / "notebooks" / "publish.py"))


def of_notebook(kept: Path) -> Iterator[Figure]:
    """The figures of a notebook in their order, from the file that keeps them."""
    return map(redrawn, lines_of(kept))


def lines_of(kept: Path) -> list[str]:
    """The lines of such a file; none where a notebook draws nothing."""
    return kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []


def about(kept: Path) -> list[str]:
    """What each figure shows: its title, its function's first sentence, and its note."""
    lines = map(json.loads, lines_of(kept))
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


def with_new_look(kept: Path, notebook: Path, rows: Sequence[dict]) -> str:
    """The notebook with its figures drawn again, in their order, and its table of these claims.

    Raises SaesubError if it shows more or fewer figures than are kept, or several tables of claims.
    """
    shown = nbformat.read(notebook, as_version=4)
    outputs = [out for cell in shown.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if PNG in out.get("data", {})]
    tables = [out for out in outputs if CLAIMS in out.get("data", {}).get("text/html", "")]
    n_kept = len(lines_of(kept))
    if len(pictures) != n_kept or len(tables) > 1:
        raise SaesubError(
            f"{notebook.name} shows {len(pictures)} figures, of which {n_kept} are kept, and "
            f"{len(tables)} tables of claims, of which one is known: run it again and publish it"
        )
    for out in tables:
        out.data["text/html"] = ClaimsTable(rows)._repr_html_()
    for out, figure in zip(pictures, of_notebook(kept), strict=True):
        png = BytesIO()
        saved(figure, png)
        out.data[PNG] = b64encode(PUBLISH["in_few_colours"](png.getvalue())).decode()
    return nbformat.writes(shown) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Draws all of them, or puts them into the notebooks."""
    mpl.use("Agg")
    if "--notebooks" in arguments:
        record = PUBLISH["read_records"]()[PUBLISH["SHOWN"]]
        every = claims.scorecard(row for run in record.values() for row in run["claims"]).rows
        texts = {}
        for name, run in tqdm(record.items(), unit="notebook"):
            notebook, rows = ROOT / "notebooks" / f"{name}.ipynb", run["claims"] or every
            texts[notebook] = with_new_look(KEPT / f"{name}.jsonl", notebook, rows)
        for notebook, text in texts.items():
            write_atomically(notebook, text)
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
