"""Take over a `quick` run: executed notebooks, claims, the README's tables and its figure.

    saesub reproduce --profile quick && python notebooks/publish.py results/quick

A run of some notebooks only is taken over too: the record keeps what it has of the others, and
`--seed` gives the run their claims, so that the scorecard can be run with all of them.

Run from a checkout. Nothing here is typed by hand: what the README says of findings and times is
what the runs left.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pandas as pd

from saesub import claims
from saesub.atomic import write_atomically
from saesub.errors import SaesubError
from saesub.report import is_progress, memory_text

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "data" / "results" / "studies"
RECORD_FILE = ROOT / "data" / "results" / "quick" / "run.json"
WIDE = ("long", "million", "scaled")  # the studies of the README's table of wide dictionaries
FAULTS_FILE = ROOT / "data" / "results" / "faults.json"
README_FIGURE = "05_active_subspace_init"
_RUN_TIME = re.compile(
    r"(?P<head>Run time at `quick`: )[^.;,]*"
    r"(?P<memory>,(?: with)? \d+ GB of memory"
    r"|, peak memory (?:[\d.]+ GB(?: of GPU memory)?(?:, )?)+"
    r"(?: \(on a T4[^)]*\))?)?"
)


def publish(run: Path) -> None:
    """Copy a finished `quick` run into the repository.

    Raises SaesubError if a notebook was never run, failed, ran at another profile, or ran other
    code than the repository's.
    """
    record, taken = json.loads(RECORD_FILE.read_text()), {}
    for source in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        if not (run / "runs" / f"{source.stem}.json").is_file() and source.stem in record:
            continue
        stamp = _stamp(run, source.stem)
        taken[source] = _executed(run / "notebooks" / source.name, source)
        number = source.stem.split("_")[0]
        record[source.stem] = {
            "run": stamp["facts"],
            "seconds": round(stamp["seconds"]),
            "peak_memory": stamp.get("peak_memory", {}),
            "claims": [row for row in claims.collect(run) if row["notebook"] == number],
        }
    for source, notebook in taken.items():
        nbformat.write(notebook, source)
        write_first_cell(source, record[source.stem])
    record = dict(sorted(record.items()))
    write_record(record)
    figures = list(images(nbformat.read(ROOT / "notebooks" / f"{README_FIGURE}.ipynb", 4)))
    write_atomically(RECORD_FILE.parent / "dead_and_fvu.png", figures[1])
    readme = ROOT / "README.md"
    write_atomically(readme, with_tables(readme.read_text(), record))


def write_record(record: dict) -> None:
    """Writes what is known of every notebook's run at `quick`."""
    write_atomically(RECORD_FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def write_first_cell(source: Path, recorded: dict) -> None:
    """Puts time and memory of the recorded run into a notebook's first cell."""
    notebook = nbformat.read(source, as_version=4)
    first = notebook.cells[0]
    first.source = with_run_time(first.source, recorded)
    write_atomically(source, nbformat.writes(notebook) + "\n")


def seed(run: Path) -> None:
    """Give a run the recorded claims of the notebooks that it leaves out."""
    for name, recorded in json.loads(RECORD_FILE.read_text()).items():
        path = run / f"claims_{name.split('_')[0]}.json"
        if recorded["claims"] and not path.is_file():
            write_atomically(path, json.dumps(recorded["claims"], indent=1, ensure_ascii=False))


def _stamp(run: Path, name: str) -> dict:
    path = run / "runs" / f"{name}.json"
    if not path.is_file():
        raise SaesubError(f"{run} lacks {name}: run `saesub reproduce` to its end first")
    stamp = json.loads(path.read_text())
    if stamp["error"]:
        raise SaesubError(f"{name} failed: {stamp['error']}")
    return stamp


def _executed(path: Path, source: Path) -> nbformat.NotebookNode:
    """The repository's notebook with the outputs of its executed copy."""
    ran, kept = nbformat.read(path, as_version=4), nbformat.read(source, as_version=4)
    profile = [c.source for c in ran.cells if "injected-parameters" in c.metadata.get("tags", [])]
    if not any('"quick"' in text for text in profile):
        raise SaesubError(f"{path} did not run at the quick profile")
    ran = cleaned(ran)
    outputs, code = ([c for c in nb.cells if c.cell_type == "code"] for nb in (ran, kept))
    # The first code cell, made by links.py, installs saesub: a run that has it skips that line.
    if [c.source for c in outputs[1:]] != [c.source for c in code[1:]]:
        raise SaesubError(f"{path} ran other code than {source.name} holds: run it again")
    for cell, from_run in zip(code, outputs, strict=True):
        cell.outputs, cell.execution_count = from_run.outputs, from_run.execution_count
    return kept


def with_run_time(text: str, recorded: dict) -> str:
    """A notebook's first cell with the time and memory that its recorded run took.

    What a T4 takes is an estimate, and called one: the same float32 tensors lie on the GPU instead
    of in the machine's memory, and a GPU is no slower at the same products than two CPU cores.
    """
    used = re.findall(r"\d+ (?:cores|threads?)\b", " ".join(recorded["run"]))
    assert used, "run_facts() names the cores, and the threads last"
    took = f"{_time(recorded['seconds'])} on {used[-1].replace(' ', ' CPU ')}"
    if peak := recorded.get("peak_memory"):
        took += f", peak memory {memory_text(peak)}"
        took += "" if "gpu" in peak else " (on a T4 of 16 GB, by estimate, no more of either)"
    elif kept := _RUN_TIME.search(text):
        took += kept["memory"] or ""
    return _RUN_TIME.sub(lambda found: found["head"] + took, text)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without papermill's parameters cell, progress bars and machine details; counted from 1."""
    kept = [
        cell
        for cell in notebook.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    code = [cell for cell in kept if cell.cell_type == "code" and cell.source.strip()]
    for count, cell in enumerate(code, 1):
        cell.execution_count = count
        cell.outputs = [out for out in cell.outputs if not is_progress(out)]
        for out in cell.outputs:
            if "execution_count" in out:
                out.execution_count = count
    for cell in kept:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags" and v}
    notebook.cells = kept
    names = ("kernelspec", "language_info")
    notebook.metadata = {k: v for k, v in notebook.metadata.items() if k in names}
    return notebook


def images(notebook: nbformat.NotebookNode) -> Iterator[bytes]:
    """The PNG figures of an executed notebook, in order."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                yield base64.b64decode(png)


def with_tables(readme: str, record: dict) -> str:
    """The README with the text between its `<!-- name -->` marks made anew from the record."""
    rows = [row for recorded in record.values() for row in recorded["claims"]]
    tables = {
        "findings": claims.scorecard(rows).markdown(),
        "notebooks": _notebook_table(record),
        "starts": starts_table(json.loads((STUDIES / "d_init.json").read_text())),
        "wide": wide_table(*(json.loads((STUDIES / f"{n}.json").read_text()) for n in WIDE)),
        "faults": faults_table(json.loads(FAULTS_FILE.read_text())),
    }
    for name, table in tables.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        readme = mark.sub(lambda found, t=table: f"{found[1]}{t}\n{found[2]}", readme)
    return readme


def starts_table(study: dict) -> str:
    """Dead features and FVU of each start at each hook point, means over seeds."""
    rows = pd.DataFrame(study["rows"])
    rows = rows[rows["d_init"] == "auto"]
    lines = ["| Model | Hook point | Random | ASI | Whitened start | Seeds |", "|---|" + "---|" * 5]
    for (model, hook_name), of_place in rows.groupby(["model", "hook_name"]):
        cells, seeds = [], 0
        for start in ("random", "flat", "whitened_data"):
            runs = of_place[of_place["start"] == start]
            seeds = len(runs)
            cells.append(_dead_and_fvu(runs))
        lines.append(f"| {model} | `{hook_name}` | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines)


def wide_table(*studies: dict) -> str:
    """Dead features and FVU of either start, as it is and with its encoder scaled, by width,
    tokens, optimizer and learning rate."""
    rows = pd.DataFrame([row for study in studies for row in study["rows"]])
    starts = {
        "random": "Random",
        "flat": "ASI",
        "random scaled": "Random, scaled",
        "flat scaled": "ASI, scaled",
    }
    rows = rows[rows["start"].isin(starts)]
    columns = ["Features", "Training tokens", "Optimizer", "Learning rate", *starts.values()]
    lines = [f"| {' | '.join(columns)} |", "|---:|---:|---|---:|---|---|---|---|"]
    for (d_sae, tokens, optimizer, lr), arms in rows.groupby(
        ["d_sae", "n_train", "optimizer", "lr"]
    ):
        cells = [_dead_and_fvu(arms[arms["start"] == start]) for start in starts]
        name = {"adam": "Adam", "sparse_adam": "SparseAdam"}[optimizer]
        lines.append(f"| {d_sae:,} | {tokens:,} | {name} | {lr:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _dead_and_fvu(runs: pd.DataFrame) -> str:
    if runs.empty:
        return "not run"
    return f"{100 * runs['dead_share'].mean():.2f} % dead, FVU {runs['fvu'].mean():.4f}"


def faults_table(counts: dict[str, dict[str, int]]) -> str:
    """What the tests tried and saw survived, and how often, by the module that tried it."""
    lines = ["| Fault | Times | Tried by |", "|---|---:|---|"]
    for module, of_module in sorted(counts.items()):
        file = f"[{module}](tests/{module}.py)"
        lines += [f"| {fault} | {times:,} | {file} |" for fault, times in sorted(of_module.items())]
    return "\n".join(lines)


def _notebook_table(record: dict) -> str:
    peaks = {name: memory_text(recorded["peak_memory"]) for name, recorded in record.items()}
    columns = ["Notebook", "Claim", "Time at `quick`"]
    columns += ["Peak memory"] if any(peaks.values()) else []
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, recorded in sorted(record.items()):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        title, claim = _opening(notebook.cells[0].source)
        cells = [f"[{title}](notebooks/{name}.ipynb)", claim, _time(recorded["seconds"])]
        cells += [peaks[name] or "–"] * (len(columns) - len(cells))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _opening(source: str) -> tuple[str, str]:
    """Title and claim of a notebook's first cell."""
    title = source.splitlines()[0].removeprefix("# ")
    claim = re.search(r"\*\*Claim[^*]*\*\*\s*(.+?)(?:\n\n|$)", source, re.DOTALL)
    return title, " ".join(claim[1].split()) if claim else ""


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if argument != "--seed"]
    (seed if "--seed" in sys.argv else publish)(Path(*(folders or [ROOT / "results" / "quick"])))
