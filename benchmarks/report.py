"""The tables and the figure of what `run.py` has recorded, beside the records and in docs/.

python benchmarks/report.py --results benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from drawing import COLOURS, label_ends, ordered, save_png
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from report_end_to_end import FIGURE, end_to_end, end_to_end_figure, in_a_line

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parent.parent / "docs" / "speed.md"
README = RESULTS.parent.parent / "README.md"
BASELINE, FLOOR = "sae-lens", "encoder-product"
_ASI = {"saesub-native-adam-asi": "Adam", "saesub-native-sparse_adam-asi": "SparseAdam"}


def load(results: str | Path) -> pd.DataFrame:
    """One row a process: batch, d_sae, round, contender, version, seconds (the median of its timed
    steps), speedup (over SAELens in the same round), peak_bytes, d_in, error (None if it went
    well).

    Raises:
        FileNotFoundError: no record in the folder.
    """
    records = [json.loads(path.read_text()) for path in _records(results)]
    runs = pd.DataFrame([_row(r["settings"], run) for r in records for run in r["runs"]])
    keys = ["batch", "d_sae", "round"]
    baseline = runs[runs["contender"] == BASELINE].set_index(keys)["seconds"].rename("baseline")
    runs = runs.join(baseline, on=keys)
    return runs.assign(speedup=runs.pop("baseline") / runs["seconds"])


def _records(results: str | Path) -> list[Path]:
    paths = sorted(Path(results).glob("b*-d*.json"))
    if not paths:
        raise FileNotFoundError(f"no records in {results}: run benchmarks/run.py first")
    return paths


def _row(settings: dict, run: dict) -> dict:
    return {
        "batch": settings["batch"],
        "d_sae": settings["d_sae"],
        "round": run["round"],
        "contender": run["contender"],
        "version": run.get("version"),
        "seconds": float(np.median(run["seconds"])) if "seconds" in run else np.nan,
        "peak_bytes": run.get("peak_bytes", np.nan),
        "d_in": run.get("d_in", np.nan),
        "error": run.get("error"),
    }


def summary(results: str | Path) -> pd.DataFrame:
    """Medians over rounds by (batch, d_sae, contender): seconds (per step), speedup, peak_bytes,
    d_in, tokens_per_second; NaN, and a `fault`, where every round failed."""
    cells = load(results).groupby(["batch", "d_sae", "contender"])
    medians = cells[["seconds", "speedup", "peak_bytes", "d_in"]].median()
    batch = medians.index.get_level_values("batch")
    faults = cells["error"].first().where(medians["seconds"].isna())
    return medians.assign(
        tokens_per_second=batch / medians["seconds"],
        fault=faults.map(_fault, na_action="ignore"),
    )


def _fault(error: str) -> str:
    short = re.search(r"MemoryError|bad_alloc|(can't|cannot|unable to) allocate", error, re.I)
    return "no memory" if short else "failed"


def markdown_table(results: str | Path) -> str:
    """For each batch a table of time and one of throughput and memory: contenders by widths."""
    runs = load(results)
    parts = []
    for batch in sorted(runs["batch"].unique()):
        parts += [_times(results, batch), _costs(results, batch)]
    return "\n\n".join([*parts, *_failures(runs), *_beside(results)]) + "\n"


def page_block(results: str | Path) -> str:
    """The times at the smallest batch, what they were taken on, and what else was timed."""
    times = _times(results, load(results)["batch"].min())
    whole = end_to_end(results)
    return "\n\n".join(filter(None, [whole, times, _widest(results), *_beside(results)]))


def readme_block(results: str | Path) -> str:
    """The whole job in a line, and a step in another."""
    step = " ".join(filter(None, [once_trained(results), in_saelens(results)]))
    return "\n\n".join(filter(None, [in_a_line(results), step]))


def _beside(results: str | Path) -> list[str]:
    """What the tables do not say, a paragraph each."""
    parts = (_conditions, _held_back, in_saelens, _trained, _one_thread, _passes, _half_precision)
    parts += (_subspace_recall, _subspace_curves)
    return [text for text in (part(results) for part in parts) if text]


def _times(results: str | Path, batch: int) -> str:
    cells = summary(results).loc[batch].apply(_speed_cell, axis=1).unstack("d_sae")
    title = (
        f"Seconds per step of {batch:,} tokens, and how many times faster than SAELens, on "
        f"{_processors(results)}:"
    )
    return f"{title}\n\n{_markdown(cells, load(results))}"


def _processors(results: str | Path) -> str:
    """The processors of the records, and what of them is used; all that occur where they differ."""
    machines = [json.loads(path.read_text())["machine"] for path in _records(results)]
    return "; ".join(sorted({f"{m['processor']}, {kind(m)}" for m in machines}))


def kind(machine: dict) -> str:
    """Whether products in 8 bits have instructions of their own, which decides a step's time.

    Records that do not name the instruction sets are of machines with AVX-512 VNNI: the compiled
    step was timed nowhere else then.
    """
    if "held_to" in machine:
        return f"held to {machine['held_to'].upper()}"
    named = machine.get("instructions", ["AVX-512 VNNI"])
    return "AVX-512 VNNI" if "AVX-512 VNNI" in named else "no AVX-512 VNNI"


def _held_back(results: str | Path) -> str:
    """The times of a step without newer instruction sets, from the records in `avx2/`, if any."""
    folder = Path(results) / "avx2"
    if not any(folder.glob("b*-d*.json")):
        return ""
    times = _times(folder, load(folder)["batch"].min())
    return f"{times}\n\n{_conditions(folder)}"


def _costs(results: str | Path, batch: int) -> str:
    cells = summary(results).loc[batch].apply(_cost_cell, axis=1).unstack("d_sae")
    title = f"Tokens per second, and peak memory, at {batch:,} tokens per step:"
    return f"{title}\n\n{_markdown(cells, load(results))}"


def _speed_cell(row: pd.Series) -> str:
    if np.isnan(row["seconds"]):
        return row["fault"]
    ratio = "" if np.isnan(row["speedup"]) else f" ({row['speedup']:.2g}×)"
    return f"{_three_digits(row['seconds'])} s{ratio}"


def _cost_cell(row: pd.Series) -> str:
    if np.isnan(row["seconds"]):
        return row["fault"]
    return f"{row['tokens_per_second']:,.0f} · {row['peak_bytes'] / 1e9:.1f} GB"


def _three_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:#.3g}"


def _markdown(cells: pd.DataFrame, runs: pd.DataFrame) -> str:
    """Cells by contender (in the report's order) and width, the contender's version beside it."""
    versions = runs.dropna(subset="version").groupby("contender")["version"].last()
    lines = [
        "| | version |" + "".join(f" d_sae {width:,} |" for width in cells.columns),
        "|---|---|" + "---:|" * len(cells.columns),
    ]
    for name in ordered(cells.index):
        texts = cells.loc[name].fillna("–")
        lines.append(f"| {name} | {versions.get(name, '?')} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _failures(runs: pd.DataFrame) -> list[str]:
    failed = runs.dropna(subset="error")
    lines = [
        f"- {r.contender}, d_sae {r.d_sae:,}, batch {r.batch:,}: `{r.error}`"
        for r in failed.drop_duplicates(["batch", "d_sae", "contender"]).itertuples()
    ]
    return ["Failed:\n\n" + "\n".join(lines)] if lines else []


def _conditions(results: str | Path) -> str:
    """Machine, threads, torch and number of runs, in a line; all that occur where they differ."""
    records = [json.loads(path.read_text()) for path in _records(results)]
    machines = {
        "{processor}, {cores} cores, {memory_gb} GB, {system}".format(**r["machine"])
        for r in records
    }
    threads = {f"{r['settings']['threads']} threads" for r in records}
    torches = {f"torch {run['torch']}" for r in records for run in r["runs"] if "torch" in run}
    steps = max(r["settings"]["steps"] for r in records)
    runs = f"medians of {steps} steps in each of {_rounds(results)}"
    told = "; ".join([*sorted(machines), *sorted(threads), *sorted(torches), runs]) + "."
    short = (summary(results)["fault"] == "no memory").any()
    # The share is run.py's MEMORY_SHARE.
    return told + (" *No memory*: more than 90 % of the machine's was asked for." if short else "")


def _rounds(results: str | Path) -> str:
    """The most rounds of any cell, and which cells have fewer."""
    rounds = load(results).groupby(["batch", "d_sae"])["round"].max() + 1
    fewer = rounds[rounds < rounds.max()]
    cells = [f"{n} at {batch:,} × {d_sae:,}" for (batch, d_sae), n in fewer.items()]
    return f"{rounds.max()} rounds" + (f" ({', '.join(cells)})" if cells else "")


def _widest(results: str | Path) -> str:
    """Throughput and memory of the trainers at the widest dictionary that any could train."""
    cells = summary(results).drop(FLOOR, level="contender", errors="ignore").dropna(subset="d_in")
    if cells.empty:
        return ""
    batch, width = max(cells.index.droplevel("contender"), key=lambda cell: (cell[1], -cell[0]))
    at = cells.loc[batch, width]
    told = [
        f"{name} {row.tokens_per_second:,.0f} tokens per second, {row.peak_bytes / 1e9:.1f} GB"
        for name, row in at.loc[ordered(at.index)].iterrows()
    ]
    state = 3 * 4 * width * (2 * at["d_in"].iloc[0] + 1) / 1e9  # in float32
    return (
        f"At d_sae {width:,}, {batch:,} tokens per step: {'; '.join(told)}. "
        f"Of each, {state:.1f} GB are the weights and Adam's two averages of them."
    )


def in_saelens(results: str | Path) -> str:
    """How much faster than SAELens' class the sparse one is in SAELens' own trainer, from the
    records in `in-saelens/`, if any."""
    folder = Path(results) / "in-saelens"
    if not any(folder.glob("b*-d*.json")):
        return ""
    speedups = summary(folder)["speedup"]
    widths = " / ".join(f"{width:,}" for width in speedups.index.unique("d_sae"))
    of_class = speedups.xs("saesub-saelens-adam", level="contender")
    (machine,) = {_machine(json.loads(path.read_text())) for path in _records(folder)}
    return (
        "The sparse class in SAELens' own trainer: "
        f"{' / '.join(f'{ratio:.2g}' for ratio in of_class)} × at {widths} ({machine})."
    )


def once_trained(results: str | Path) -> str:
    """How much faster than SAELens' a step of an SAE is that began with ASI and was trained, from
    the records in `trained/` and its folder `avx2/`, if any."""
    folder = Path(results) / "trained"
    if not any(folder.glob("b*-d*.json")):
        return ""
    (width,) = summary(folder).index.unique("d_sae")
    (record,) = (json.loads(path.read_text()) for path in _records(folder))
    told = (
        f"A step of `SubspaceSAETrainer` at d_sae {width:,}, {_warm_up(folder)} steps after ASI, "
        f"is {_with_asi(folder)} as fast as SAELens' ({_machine(record)})"
    )
    if not any((folder / "avx2").glob("b*-d*.json")):
        return f"{told}."
    (record,) = (json.loads(path.read_text()) for path in _records(folder / "avx2"))
    return f"{told}; {kind(record['machine'])} {_with_asi(folder / 'avx2')}."


def _with_asi(folder: Path) -> str:
    speedups = summary(folder)["speedup"].droplevel(["batch", "d_sae"])
    return " and ".join(f"{speedups[name]:.2g} × ({of})" for name, of in _ASI.items())


def _machine(record: dict) -> str:
    machine, threads = record["machine"], record["settings"]["threads"]
    return f"{machine['processor']}, {kind(machine)}, {threads} threads"


def _one_thread(results: str | Path) -> str:
    """How much longer a step takes on one thread, from the records in `one-thread/`, if any, and
    once trained, from those in `trained/one-thread/`."""
    told = _compared(results, "one-thread")
    if not told:
        return ""
    trained = Path(results) / "trained"
    later = _compared(trained, "one-thread")
    once_trained = (
        f" After {_warm_up(trained)} steps of training, a step of {later}." if later else ""
    )
    return f"Times as long on one thread as on all, a step of {told}.{once_trained}"


def _trained(results: str | Path) -> str:
    """The times of a step once trained, from the records in `trained/` and its folder `avx2/`, if
    any, and how much longer it takes than at the start."""
    told, folder = _compared(results, "trained"), Path(results) / "trained"
    if not told:
        return ""
    steps = _warm_up(folder)
    text = f"Times as long after {steps} steps of training as at the start, a step of {told}."
    if "sae-lens" not in set(load(folder)["contender"]):
        return text
    tables = [
        _times(place, load(place)["batch"].min())
        for place in (folder, folder / "avx2")
        if any(place.glob("b*-d*.json"))
    ]
    when = f"After {steps} steps of training (*asi*: initialised in the active subspace)."
    return "\n\n".join([when, *tables, text])


def _warm_up(results: Path) -> int:
    """Steps before the timed ones, the same in all records."""
    (steps,) = {json.loads(path.read_text())["settings"]["warm_up"] for path in _records(results)}
    return steps


def _compared(results: str | Path, folder: str) -> str:
    """Times of a step in the records of a `folder` of `results`, in those of `results` itself."""
    both = Path(results), Path(results) / folder
    if not all(any(place.glob("b*-d*.json")) for place in both):
        return ""
    ratios = (summary(Path(results) / folder)["seconds"] / summary(results)["seconds"]).dropna()
    cells = []
    for (batch, width), of_cell in ratios.groupby(level=["batch", "d_sae"]):
        each = [f"{name} {ratio:.2f}" for (_, _, name), ratio in of_cell.items()]
        cells.append(f"{batch:,} tokens at d_sae {width:,}: {', '.join(each)}")
    return "; of ".join(cells)


def _subspace_recall(results: str | Path) -> str:
    """What the search in the active subspace loses, from the record of `subspace_recall.py`."""
    path = Path(results) / "subspace_recall.json"
    if not path.is_file():
        return ""
    record = json.loads(path.read_text())
    each = []
    for search in ("compiled", "torch"):
        rows = [row for row in record["rows"] if row["search"] == search]
        shares, ranks = ([row[name] for row in rows] for name in ("recall", "rank"))
        each.append(
            f"{search} {min(shares):.6f} to {max(shares):.6f} (ranks {min(ranks)} to {max(ranks)})"
        )
    settings = record["settings"]
    return (
        f"Share of the float32 top {settings['k']} that the search in the active subspace returns "
        f"after {settings['tokens']:,} tokens of training at d_sae {settings['d_sae']:,}, for "
        f"three sites of layer 12, two initialisations, TopK and BatchTopK: {'; '.join(each)}. It "
        "searched in the subspace of least cost, also where a run would search all coordinates. "
        f"One entry of the {settings['entries']:,} is {1 / settings['entries']:.1g}."
    )


def _subspace_curves(results: str | Path) -> str:
    """How far losses in training are from the exact search's, from the record of
    `subspace_curves.py`."""
    path = Path(results) / "subspace_curves.json"
    if not path.is_file():
        return ""
    record = json.loads(path.read_text())
    s, least, most = record["settings"], min(record["ranks"]), max(record["ranks"])
    ranks = f"rank {least}" if least == most else f"ranks {least} to {most}"
    losses = {name: np.array([mse for _, mse in rows]) for name, rows in record["curves"].items()}
    inside, every, apart = (
        np.abs(losses[one] / losses[other] - 1).max()
        for one, other in (
            ("in the subspace", "exact"),
            ("all coordinates", "exact"),
            ("in the subspace", "all coordinates"),
        )
    )
    return (
        f"Over {s['steps']:,} steps of {s['batch']:,} tokens at d_sae {s['d_sae']:,} the training "
        f"loss at {s['site']}, from a {s['start']} start, of the search in the active subspace "
        f"(told to use it, {ranks}) is never more than {inside:.2%} from that of the exact search, "
        f"and that of the 8-bit search by all coordinates never more than {every:.2%}. These two "
        f"differ by at most {apart:.1g} of the loss."
    )


def _passes(results: str | Path) -> str:
    """What a harvest and a pass for spectra cost, from the record of `passes.py`, if any."""
    path = Path(results) / "passes.json"
    if not path.is_file():
        return ""
    record = json.loads(path.read_text())
    hooks = " and at ".join(row["hooks"] for row in record["rows"])
    harvest, spectra = (
        " and ".join(_ratios(row["seconds"], kind) for row in record["rows"])
        for kind in ("harvest", "spectra")
    )
    return _of_products(record) + (
        f"Times of the model's bare forward pass (1 = as long), at the {hooks} of layer "
        f"{record['settings']['layer']} of SmolLM2-135M: a harvest {harvest}; a pass for spectra "
        f"{spectra}. Medians of {record['settings']['rounds']} rounds, and their range; "
        f"{record['machine']['processor']}, {record['settings']['threads']} threads."
    )


def _half_precision(results: str | Path) -> str:
    """What a float16 store changes, from the record of `half_precision.py`, if any."""
    path = Path(results) / "half_precision.json"
    if not path.is_file():
        return ""
    record = json.loads(path.read_text())
    rows, settings = record["rows"], record["settings"]
    values, outside = (max(row[part] for row in rows) for part in ("eigenvalues", "basis_outside"))
    ranks = [f"{row['rank']['float16']} and {row['rank']['float32']}" for row in rows]
    fvu, fvu_seeds = _differences(rows, "fvu")
    dead, dead_seeds = _differences(rows, "dead_share")
    return (
        f"A float16 store beside one of float32, at {len(rows)} sites of layer 12 of SmolLM2-135M "
        f"({settings['n_tokens']:,} tokens): no eigenvalue up to the rank at 99 % differs by more "
        f"than {values:.1g} of itself, that rank is {', '.join(ranks)}, and at most {outside:.1g} "
        f"of one's active subspace lies outside the other's. SAEs of {settings['d_sae']:,} "
        f"features, trained for {settings['steps']} steps of {settings['batch']} from the same "
        f"weights on the same batches, differ by at most {fvu:.1g} in FVU and {dead:.1g} in the "
        f"share of dead features; float32 SAEs of two seeds by up to {fvu_seeds:.1g} and "
        f"{dead_seeds:.1g}."
    )


def _differences(rows: list[dict[str, Any]], of: str) -> tuple[float, float]:
    """The largest difference between SAEs on both stores, and between two seeds on float32."""
    halves, wholes = (
        np.array([[sae[of] for sae in row["saes"][dtype]] for row in rows])
        for dtype in ("float16", "float32")
    )
    return np.abs(halves - wholes).max(), np.ptp(wholes, axis=1).max()


def _of_products(record: dict[str, Any]) -> str:
    """What the pass without the bridge costs: a record that lacks it gives nothing."""
    seconds = record["rows"][0]["seconds"]
    if "products" not in seconds:
        return ""
    plain, bridge = (_ratios(seconds, kind, "products") for kind in ("plain", "bare"))
    said = (
        f"The pass to the {record['rows'][0]['hooks']} of layer {record['settings']['layer']}, "
        "without the bridge, takes as long as its matrix products alone in float32 times "
        f"{plain}, and through the bridge {bridge}; the bridge's time is that without it times "
        f"{_ratios(seconds, 'bare', 'plain')} ({record['machine']['instructions']}). "
    )
    if "plain by MKL" in seconds:
        said += (
            "On AMD processors saesub leaves linear layers to oneDNN: with torch's own, by MKL, as "
            "the products alone are here, the pass takes "
            f"{_ratios(seconds, 'plain by MKL', 'plain')} times as long."
        )
    return said.rstrip() + "\n\n"


def _ratios(seconds: dict[str, list[float]], kind: str, one: str = "bare") -> str:
    each = np.array(seconds[kind]) / np.array(seconds[one])
    return f"{np.median(each):.2f} [{each.min():.2f}, {each.max():.2f}]"


def figure(results: str | Path) -> Figure:
    """Seconds per step over d_sae, both logarithmic, a panel for each batch; the dashed line is the
    encoder's product alone. A line ends where the next width found no memory."""
    medians = summary(results)["seconds"].dropna()
    batches = sorted(medians.index.unique("batch"))
    made, panels = plt.subplots(
        1, len(batches), figsize=(5.6 * len(batches), 4.4), squeeze=False, layout="constrained"
    )
    for axes, batch in zip(panels[0], batches, strict=True):
        _panel(axes, medians.loc[batch].unstack("contender"))
        axes.set_title(f"{batch:,} tokens per step", loc="left", fontsize=10.5)
    panels[0][0].set_ylabel("seconds per training step")
    plt.close(made)
    return made


def _panel(axes: Axes, seconds: pd.DataFrame) -> None:
    """`seconds`: d_sae by contender."""
    for name in ordered(seconds.columns):
        line = seconds[name].dropna()
        axes.plot(
            line.index,
            line,
            color=COLOURS[name],
            linestyle="--" if name == FLOOR else "-",
            linewidth=2.2 if name.startswith("saesub") else 1.4,
            marker="" if name == FLOOR else "o",
            markersize=3.5,
        )
    axes.set(xscale="log", yscale="log", xlabel="d_sae")
    widths = [f"{width:,}" for width in seconds.index]
    axes.set_xticks(seconds.index, widths, rotation=30, ha="right", rotation_mode="anchor")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    label_ends(axes, seconds)


def with_block(page: str, block: str) -> str:
    """A page with the text between its speed marks made anew."""
    mark = re.compile(r"(<!-- speed -->\n).*?(<!-- /speed -->)", re.DOTALL)
    return mark.sub(lambda found: f"{found[1]}{block}\n{found[2]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    results = parser.parse_args().results
    (results / "README.md").write_text(f"# Time of a training step\n\n{markdown_table(results)}")
    save_png(figure(results), results / "speed.png")
    if (whole := end_to_end_figure(results)) is not None:
        save_png(whole, results / FIGURE)
    if results.resolve() == RESULTS:
        PAGE.write_text(with_block(PAGE.read_text(), page_block(results)))
        README.write_text(with_block(README.read_text(), readme_block(results)))
    print(markdown_table(results))


if __name__ == "__main__":
    main()
