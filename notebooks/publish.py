"""Take over a `full` run: executed notebooks, claims, and what the README and docs/ show of them.

    saesub reproduce --profile full && python notebooks/publish.py results/full

A run of some notebooks only is taken over too: the record keeps what it has of the others, and
`--seed` gives the run their claims, so that the scorecard can be run with all of them.

    saesub reproduce && python notebooks/publish.py results/quick

takes over what a `quick` run measured and took, and leaves the notebooks' outputs as they are.

    python notebooks/publish.py --pages

writes the pages and the figure again from what is recorded, without a run.

Run from a checkout. Nothing here is typed by hand: what the README and the pages in docs/ say of
findings and times is what the runs left.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import runpy
import sys
from base64 import b64decode, b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import nbformat
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import saesub
from saesub.errors import SaesubError
from saesub.evaluation import protocol
from saesub.files import write_atomically
from saesub.reproduce import claims, claims_table, studies
from saesub.reproduce.plots import dead_against_fvu
from saesub.reproduce.report import is_progress, memory_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
SHOWN = "full"  # the profile whose outputs the notebooks show
COMMANDS = {"quick": "make reproduce", SHOWN: f"PROFILE={SHOWN} make reproduce"}
STUDIES = RESULTS / "studies"
FIGURE_FILE = RESULTS / "dead_and_fvu.png"
PNG = "image/png"
# As the data pass through them.
ROOMS = ("loading", "activations", "init", "topk", "training", "evaluation", "errors")
SHOWN_HOOK = "blocks.12.hook_attn_out"
SHOWN_CONDITIONS = ("random", "random + SparseAdam", "ASI", "ASI + SparseAdam")
FAULTS_FILE = RESULTS / "faults.json"
ARCHITECTURES_FILE = RESULTS / "architectures.json"
BOUNDS_FILE = RESULTS / "bounds.json"
REGISTRY = ROOT / "data" / "registry.toml"
ERROR_INDEX = runpy.run_path(str(ROOT / "notebooks" / "error_index.py"))
GPU_TABLES = runpy.run_path(str(ROOT / "notebooks" / "gpu_tables.py"))
RECIPE_TABLES = runpy.run_path(str(ROOT / "notebooks" / "recipe_tables.py"))
LINKS = runpy.run_path(str(ROOT / "notebooks" / "links.py"))
FINDING_PAGES = runpy.run_path(str(ROOT / "notebooks" / "finding_pages.py"))
BOUNDS = runpy.run_path(str(ROOT / "notebooks" / "bounds.py"))
# The packaged files that the notebooks ask for at `full`, by kind, and those of them that `quick`
# leaves out.
FETCHED = {
    "models": ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b"),
    "corpora": ("wiki-en", "wiki-fr", "science-docs"),
    "encoders": ("all-minilm-l6-v2", "all-mpnet-base-v2", "whisper-base"),
    "recordings": ("speech-en",),
}
NOT_AT_QUICK = ("qwen2.5-coder-0.5b", "all-mpnet-base-v2")
_RUN_TIME = re.compile(
    r"(?:Run time at `quick`: [^.]*\. )?"
    rf"(?P<head>Run time at `{SHOWN}`, whose outputs are shown: )[^.;,]*"
    r"(?P<memory>,(?: with)? \d+ GB of memory"
    r"|, peak memory (?:[\d.]+ GB(?: of GPU memory)?(?:, )?)+"
    r"(?: \(on a T4[^)]*\))?)?"
)


def publish(run: Path) -> None:
    """Copy a finished `full` run into the repository, or what a `quick` run measured and took.

    Raises SaesubError for another profile's folder, and if a notebook was never run, failed, ran at
    another profile, or ran other code than the repository's.
    """
    profile, records, taken = run.resolve().name, read_records(), {}
    if profile not in COMMANDS:
        raise SaesubError(f"{run} is of no published profile: give one of {', '.join(COMMANDS)}")
    record = records.get(profile, {})
    for source in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        if not (run / "runs" / f"{source.stem}.json").is_file() and source.stem in record:
            continue
        stamp = _stamp(run, source.stem)
        taken[source] = _executed(run / "notebooks" / source.name, source, profile)
        number = source.stem.split("_")[0]
        record[source.stem] = {
            "run": stamp["facts"],
            "seconds": round(stamp["seconds"]),
            "peak_memory": stamp.get("peak_memory", {}),
            "claims": [row for row in claims.collect(run) if row["notebook"] == number],
        }
    records[profile] = dict(sorted(record.items()))
    for source, notebook in taken.items():
        if profile == SHOWN:
            nbformat.write(notebook, source)
            take_figures(run, source.stem)
        write_first_cell(source, records)
    write_record(profile, records[profile])
    write_pages(read_records())  # in the order of the profiles, also the first time


def take_figures(run: Path, name: str) -> None:
    """Copies what a notebook's figures were drawn from, if it has figures."""
    kept, ours = (folder / "figures" / f"{name}.jsonl" for folder in (run, RESULTS / SHOWN))
    ours.unlink(missing_ok=True)
    if kept.is_file():
        write_atomically(ours, kept.read_text(encoding="utf-8"))


def record_file(profile: str) -> Path:
    """Where the record of a profile's run is committed."""
    return RESULTS / profile / "run.json"


def read_records() -> dict[str, dict]:
    """What is known of every notebook's run at each profile that was recorded."""
    files = {profile: record_file(profile) for profile in COMMANDS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def pages() -> list[Path]:
    """The README and the pages in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def write_pages(records: dict) -> None:
    """Writes the README, the pages in docs/ and the README's figure again from the records, and
    the commits of the claims' bounds again from git."""
    BOUNDS["write_bounds"](ROOT)
    save_figure(readme_figure(), (STUDIES / "cure.json").read_bytes())
    for page in pages():
        write_atomically(page, with_tables(page.read_text(), records))
    for page, text in finding_pages(records).items():
        write_atomically(page, text)


def finding_pages(records: dict) -> dict[Path, str]:
    """The pages in docs/findings with their texts."""
    return FINDING_PAGES["texts"](records[SHOWN], json.loads(BOUNDS_FILE.read_text()))


def _commands() -> str:
    """What is typed first; the address of the repository stands in pyproject.toml alone."""
    address = LINKS["repository"]()
    return (
        f"```bash\ngit clone {address} && cd {address.rsplit('/', 1)[1]}\n"
        "make setup     # .venv in 5 min; then source .venv/bin/activate\n"
        "make reproduce # fetches models, runs notebooks\n"
        "make test      # make test-all: slow ones\n"
        "make book      # a site, in build/book\n```"
    )


def claim_rows(records: dict) -> list[dict]:
    """Every claim of the shown profile in every regime, with the commits of bounds and record."""
    return FINDING_PAGES["claim_rows"](records[SHOWN], json.loads(BOUNDS_FILE.read_text()))


def write_record(profile: str, record: dict) -> None:
    """Commits what is known of every notebook's run at a profile."""
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_atomically(record_file(profile), text)


def write_first_cell(source: Path, records: dict) -> None:
    """Puts time and memory of the recorded runs into a notebook's first cell."""
    notebook = nbformat.read(source, as_version=4)
    first = notebook.cells[0]
    quick = records.get("quick", {}).get(source.stem)
    first.source = with_run_time(first.source, records[SHOWN][source.stem], quick)
    write_atomically(source, nbformat.writes(notebook) + "\n")


def seed(run: Path) -> None:
    """Give a run the recorded claims of the notebooks that it leaves out."""
    for name, recorded in read_records()[SHOWN].items():
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


def _executed(path: Path, source: Path, profile: str) -> nbformat.NotebookNode:
    """The repository's notebook with the outputs of its executed copy."""
    ran, kept = nbformat.read(path, as_version=4), nbformat.read(source, as_version=4)
    given = [c.source for c in ran.cells if "injected-parameters" in c.metadata.get("tags", [])]
    if not any(f'"{profile}"' in text for text in given):
        raise SaesubError(f"{path} did not run at the {profile} profile: run it again")
    ran = cleaned(ran)
    outputs, code = ([c for c in nb.cells if c.cell_type == "code"] for nb in (ran, kept))
    # The first code cell, made by links.py, installs saesub: a run that has it skips that line.
    if [c.source for c in outputs[1:]] != [c.source for c in code[1:]]:
        raise SaesubError(f"{path} ran other code than {source.name} holds: run it again")
    for cell, from_run in zip(code, outputs, strict=True):
        cell.outputs, cell.execution_count = from_run.outputs, from_run.execution_count
    return kept


def with_run_time(text: str, recorded: dict, quick: dict | None = None) -> str:
    """A notebook's first cell with the time and memory that its recorded run took, after the time
    at `quick` where that is recorded.

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
    at_quick = f"Run time at `quick`: {_time(quick['seconds'])}. " if quick else ""
    return _RUN_TIME.sub(lambda found: at_quick + found["head"] + took, text)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without papermill's parameters cell, progress bars and machine details; counted from 1; the
    figures in 256 colours."""
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
            if PNG in out.get("data", {}):
                out.data[PNG] = b64encode(in_few_colours(b64decode(out.data[PNG]))).decode()
    for cell in kept:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags" and v}
    notebook.cells = kept
    names = ("kernelspec", "language_info")
    notebook.metadata = {k: v for k, v in notebook.metadata.items() if k in names}
    return notebook


def in_few_colours(png: bytes) -> bytes:
    """A figure in 256 colours, which no one sees and which takes less than half of the bytes."""
    small, figure = BytesIO(), Image.open(BytesIO(png)).convert("RGBA")
    page = Image.new("RGBA", figure.size, "white")  # else what is transparent would be black
    figure = Image.alpha_composite(page, figure).convert("RGB")
    figure.quantize(256).save(small, "PNG", optimize=True)
    return min(png, small.getvalue(), key=len)


def with_tables(page: str, records: dict) -> str:
    """A page with the text between its `<!-- name -->` marks made anew from the records.

    Links lead from README.md in the tables that it shows, and from docs/ in all others.
    """
    rows = claim_rows(records)
    tables = {
        "summary": FINDING_PAGES["summary"](rows),
        "figure": figure_caption(readme_rows()),
        "run": _commands(),
        "cost": cost_table(records, tomllib.loads(REGISTRY.read_text(encoding="utf-8"))),
        "titles": _titles(records),
        "verdicts": FINDING_PAGES["verdicts"](rows),
        "notebooks": _notebook_table(records),
        "norm": norm_sentence(json.loads((STUDIES / "defaults.json").read_text())),
        "defaults": defaults_table(json.loads((STUDIES / "defaults.json").read_text())),
        "cure": cure_table(cure_rows()),
        "sizes": sizes_table(studies.recorded("subspace_size").rows),
        "faults": faults_table(json.loads(FAULTS_FILE.read_text())),
        "architectures": architectures_table(
            json.loads(ARCHITECTURES_FILE.read_text(encoding="utf-8"))
        ),
        "errors": ERROR_INDEX["tables"](),
        "api": api_table(),
        **GPU_TABLES["tables"](),
        **RECIPE_TABLES["tables"](),
    }
    for name, table in tables.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page = mark.sub(lambda found, t=table: f"{found[1]}{t}\n{found[2]}", page)
    return page


def cure_rows() -> pd.DataFrame:
    """The rows of the study of the cure, with the rates that fit best, or as well, marked by hook
    point and width."""
    rows = studies.recorded("cure").rows
    return studies.with_best(rows, ["model", "hook_name", "d_sae", "condition"])


def readme_rows() -> pd.DataFrame:
    """What the README's figure shows: two initialisations under two optimizers, at all rates, with
    the widest dictionary of the hook point."""
    rows = cure_rows()
    rows = rows[rows["condition"].isin(SHOWN_CONDITIONS) & (rows["hook_name"] == SHOWN_HOOK)]
    rows = rows[rows["d_sae"] == rows["d_sae"].max()]
    place = {condition: place for place, condition in enumerate(SHOWN_CONDITIONS)}
    return rows.sort_values(["condition", "lr"], key=lambda column: column.replace(place))


def readme_figure() -> Figure:
    """The README's figure; its title has the dead features of each condition at its best rate."""
    rows = readme_rows()
    dead = rows[rows["best"]].groupby("condition", sort=False)["dead_share"].mean()
    told = ", ".join(f"{name} {100 * share:.2g} %" for name, share in dead.items())
    return dead_against_fvu(rows, title=f"Dead features, each at its best rate: {told}")


def figure_caption(rows: pd.DataFrame) -> str:
    """What the README's figure is drawn from, and its numbers at all rates that fit as well as the
    best."""
    (d_sae,), (n_train,), (k,), (window,) = (
        rows[name].unique() for name in ("d_sae", "n_train", "k", "n_judged")
    )
    dead = rows[rows["as_good"]].groupby(["condition", "lr"], sort=False)["dead_share"].mean()
    sweeps = [studies.sweep_of(rows[rows["condition"] == name]) for name in ("ASI", "random")]
    equal, _, fvu = protocol.dead_at_equal_fvu(*sweeps)
    asi = sweeps[0]
    slow = max(i for i in range(asi.best) if asi.fvu[i] >= fvu)
    told = "; ".join(
        f"{condition} "
        + ", ".join(f"{100 * share:.2g} % ({lr:g})" for (_, lr), share in of.items())
        for condition, of in dead.groupby(level=0, sort=False)
        if "Sparse" not in condition
    )
    return (
        f"*TopK SAEs of {d_sae:,} features (k {k}) at the attention output of SmolLM2-135M's layer "
        f"{SHOWN_HOOK.split('.')[1]}, {n_train:,} tokens, "
        f"{rows['seed'].nunique()} seeds, no AuxK. Left and low is better. "
        f"Dead: silent over {window:,} held-out tokens, {window * k / d_sae:,.0f} firings a "
        f"feature. Dead at the rates that fit best or less than 1 % worse: {told}. At the FVU of "
        f"random's best rate, ASI loses {100 * equal:.2g} % (between {asi.rates[slow]:g} and "
        f"{asi.rates[slow + 1]:g}; we added this comparison when we had seen the record). "
        "[Other widths and layers](docs/findings/F6.md).*"
    )


def save_figure(figure: Figure, study: bytes) -> None:
    """Writes the README's figure, which notes the record that it is drawn from."""
    drawn, notes = BytesIO(), PngInfo()
    notes.add_text("Description", digest(study))
    figure.savefig(drawn, dpi=130)
    Image.open(drawn).convert("RGB").quantize(64).save(FIGURE_FILE, optimize=True, pnginfo=notes)


def api_table() -> str:
    """The public names by room, each with the first sentence of its description."""
    by_room: dict[str, list[str]] = {}
    for name in sorted(saesub.__all__, key=str.lower):
        module = getattr(saesub, name).__module__
        told = inspect.getdoc(getattr(saesub, name)) or ""
        first = re.split(r"(?<=\.)\s", " ".join(told.split()), maxsplit=1)[0]
        path = module.replace(".", "/")
        path += "/__init__.py" if (ROOT / path).is_dir() else ".py"
        row = f"| [`{name}`](../{path}) | {claims_table.markdown_text(first)} |"
        by_room.setdefault(module.split(".")[1], []).append(row)
    order = [room for room in ROOMS if room in by_room]
    assert len(order) == len(by_room), "a public name lives in a room that is not in ROOMS"
    head = ["| Name | What it does |", "|---|---|"]
    return "\n\n".join("\n".join([f"## {room}", "", *head, *by_room[room]]) for room in order)


def sizes_table(rows: pd.DataFrame) -> str:
    """Dead features of ASI by d_init at each hook point, means over seeds; 1 is the whole space."""
    rows = rows[rows["start"] == "subspace"]
    auto, by_place = rows["d_init"] == "auto", ["model", "hook_name"]
    swept = rows[~auto].assign(share=rows["d_init_share"].round(2))
    means = swept.groupby([*by_place, "share"])["dead_share"].mean().unstack()
    means.columns = [f"{share:g}" for share in means.columns]
    means['"auto"'] = rows[auto].groupby(by_place)["dead_share"].mean()
    lines = [f"| Model | Hook point | {' | '.join(means.columns)} |"]
    lines.append("|---|---|" + "---:|" * len(means.columns))
    for (model, hook_name), dead in means.iterrows():
        cells = " | ".join(f"{100 * share:.2f} %" for share in dead)
        lines.append(f"| {model} | `{hook_name}` | {cells} |")
    return "\n".join(lines)


def digest(study: bytes) -> str:
    """What the figure notes of its record."""
    return hashlib.sha256(study).hexdigest()


def cost_table(records: dict, registry: dict) -> str:
    """What running all notebooks takes at each profile, as far as it is recorded."""
    runs = [run for record in records.values() for run in record.values()]
    facts = [fact for run in runs for fact in run["run"] if "cores" in fact]
    machines = sorted(
        {re.sub(r" Processor| \(family[^)]*\)|\(R\)|, \d+ threads?$", "", f) for f in facts}
    )
    time = f"Time without a GPU ({_machines(machines)})"
    lines = [f"| Command | {time} | Peak memory | Download |", "|---|---|---|---|"]
    for profile, record in records.items():
        seconds = sum(recorded["seconds"] for recorded in record.values())
        peaks = [r["peak_memory"]["cpu"] for r in record.values() if "cpu" in r["peak_memory"]]
        cells = (
            f"`{COMMANDS[profile]}`",
            _time(seconds),
            memory_text({"cpu": max(peaks)}) if peaks else "not recorded",
            f"{_fetched(profile, registry) / 1e9:.1f} GB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _machines(found: Sequence[str]) -> str:
    """Processors with their cores, which are named once where all have as many."""
    cores = {name.rpartition(", ")[2] for name in found}
    if len(cores) != 1:
        return "; ".join(found)
    return " or ".join(name.rpartition(", ")[0] for name in found) + f", {cores.pop()}"


def _fetched(profile: str, registry: dict) -> int:
    """Bytes of the packaged files that the notebooks ask for."""
    return sum(
        file["size"]
        for kind, names in FETCHED.items()
        for name in names
        if profile == SHOWN or name not in NOT_AT_QUICK
        for file in registry[kind][name].get("files", [])
    )


def cure_table(rows: pd.DataFrame) -> str:
    """Each condition at the rates that fit best, or as well, at every hook point and width: dead
    features and FVU, means over seeds, and from least to most."""
    columns = ("Hook point", "Features", "Condition", "Rate", "Dead", "FVU", "Seeds")
    lines = [f"| {' | '.join(columns)} |", "|---|---:|---|---:|---|---|---:|"]
    by_rate = rows[rows["as_good"]].groupby(["hook_name", "d_sae", "condition", "lr"])
    for (hook_name, d_sae, condition, lr), of in by_rate:
        dead, fvu = of["dead_share"], of["fvu"]
        cells = (
            f"`{hook_name}`",
            f"{d_sae:,}",
            condition,
            f"{lr:g}" + ", best" * bool(of["best"].all()),
            f"{100 * dead.mean():.2f} % [{100 * dead.min():.2f}, {100 * dead.max():.2f}]",
            f"{fvu.mean():.4f} [{fvu.min():.4f}, {fvu.max():.4f}]",
            f"{of['seed'].nunique()}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def norm_sentence(study: dict) -> str:
    """What the norm does beside what the directions do, for the README."""
    settings, rows = study["settings"], pd.DataFrame(study["rows"])
    rows = rows[rows["architecture"] == "topk, k 32"]
    lr = rows["lr"].max()
    means = rows[rows["lr"] == lr].groupby("condition")[["dead_share", "fvu"]].mean()

    by_start = pd.DataFrame(study["rows"]).pivot_table("fvu", ["architecture", "lr"], "condition")
    worse = max(
        (by_start[f"subspace, {norm}"] / by_start[f"random, {norm}"]).max() - 1
        for norm in ("kept", "fitted")
    )

    def dead(condition: str) -> str:
        return f"{100 * means.loc[condition, 'dead_share']:.1f} %"

    told = "; ".join(
        f"{name} {dead(f'{start}, kept')} and {dead(f'{start}, fitted')}"
        for start, name in {"random": "random", "subspace": "ASI"}.items()
    )
    return (
        "SAELens gives decoder rows norm 0.1, and there the norm matters more than the directions "
        f"(TopK, layer 3, {settings['d_sae']:,} features, "
        f"{settings['batch'] * settings['steps']:,} tokens, {rows['seed'].nunique()} seed). "
        f"Dead at SAELens' norm and at the fitted: {told}. "
        "[All architectures](docs/initialisations.md#norm); "
        f"in some ASI fits worse, by up to {100 * worse:.0f} %."
    )


def defaults_table(study: dict) -> str:
    """Dead features and FVU of every architecture at SAELens' defaults, kept and fitted norms,
    means over seeds."""
    rows = pd.DataFrame(study["rows"])
    conditions = list(dict.fromkeys(rows["condition"]))
    lines = [f"| Architecture | Learning rate | {' | '.join(conditions)} | Seeds |"]
    lines.append("|---|---:|" + "---|" * len(conditions) + "---:|")
    for (lr, architecture), of_both in rows.groupby(["lr", "architecture"], sort=False):
        runs = [of_both[of_both["condition"] == condition] for condition in conditions]
        cells = " | ".join(_dead_and_fvu(of_condition) for of_condition in runs)
        seeds = of_both["seed"].nunique()
        lines.append(f"| {architecture} | {lr:g} | {cells} | {seeds} |")
    return "\n".join(lines)


def _dead_and_fvu(runs: pd.DataFrame) -> str:
    if runs.empty:
        return "not run"
    return f"{100 * runs['dead_share'].mean():.2f} % dead, FVU {runs['fvu'].mean():.4f}"


def faults_table(counts: dict[str, dict[str, int]]) -> str:
    """What the tests tried and saw survived, and how often, by the module that tried it."""
    lines = ["| Fault | Times | Tried by |", "|---|---:|---|"]
    for module, of_module in sorted(counts.items()):
        file = f"[{module}](../tests/{module}.py)"
        lines += [f"| {fault} | {times:,} | {file} |" for fault, times in sorted(of_module.items())]
    return "\n".join(lines)


def architectures_table(found: dict[str, dict[str, str]]) -> str:
    """What the tests found to work with each architecture, and what is said where it does not."""
    columns = ["architecture", *next(iter(found.values()))]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| `{name}` | {' | '.join(cells.values())} |" for name, cells in found.items()]
    return "\n".join(lines)


def _titles(records: dict) -> str:
    """The notebooks' titles and times."""
    columns = ["Notebook", *(f"Time at `{profile}`" for profile in records)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in sorted(records[SHOWN]):
        title, _ = _opening(_first_cell(name))
        cells = [f"[{title}](notebooks/{name}.ipynb)", *_times(records, name)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(records: dict, name: str) -> list[str]:
    """A notebook's time at each recorded profile."""
    runs = [record.get(name) for record in records.values()]
    return [_time(recorded["seconds"]) if recorded else "–" for recorded in runs]


def _first_cell(name: str) -> str:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    return notebook.cells[0].source


def _notebook_table(records: dict) -> str:
    peaks = {name: memory_text(r["peak_memory"]) for name, r in records[SHOWN].items()}
    columns = ["Notebook", "Claim", *(f"Time at `{profile}`" for profile in records)]
    columns += [f"Peak memory at `{SHOWN}`"] if any(peaks.values()) else []
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in sorted(records[SHOWN]):
        title, claim = _opening(_first_cell(name))
        cells = [f"[{title}](../notebooks/{name}.ipynb)", claim, *_times(records, name)]
        cells += [peaks[name] or "–"] * (len(columns) - len(cells))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _opening(source: str) -> tuple[str, str]:
    """Title and claim of a notebook's first cell."""
    title = source.splitlines()[0].removeprefix("# ")
    claim = re.search(r"\*\*Claim[^*]*\*\*\s*(.+?)(?:\n\n|$)", source, re.DOTALL)
    return title, " ".join(claim[1].split()) if claim else ""


def main(arguments: Sequence[str]) -> None:
    """Publishes a run; or gives it recorded claims (`--seed`), or writes the pages (`--pages`)."""
    folders = [argument for argument in arguments if not argument.startswith("--")]
    if not {*arguments} - {*folders} <= {"--pages", "--seed"}:
        raise SystemExit(__doc__)
    run = Path(*(folders or [ROOT / "results" / SHOWN]))
    if "--pages" in arguments:
        write_pages(read_records())
    elif "--seed" in arguments:
        seed(run)
    else:
        publish(run)


if __name__ == "__main__":
    main(sys.argv[1:])
