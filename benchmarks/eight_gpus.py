"""Writes the tables of docs/eight_gpus.md: `python benchmarks/eight_gpus.py`.

Bytes and seconds are those of `benchmarks/parallel_cost.py`; what was measured on a CPU is what
`benchmarks/processes.py` recorded.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from parallel_cost import Job, Rates, memory, seconds, traffic

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "eight_gpus.md", ROOT / "benchmarks" / "results"
JOB = Job(d_in=4096, d_sae=2**22, k=64, batch=4096, processes=8)
JOBS = {
    "features, SparseAdam": JOB,
    "features, Adam": replace(JOB, optimizer="adam"),
    "data, SparseAdam": replace(JOB, mode="data"),
    "data, Adam": replace(JOB, mode="data", optimizer="adam"),
}
# The data sheet of an H100 SXM: float32 without tensor cores, HBM3, NVLink one way.
SHEET, SHARE = Rates(flops=67e12, memory=3.35e12, link=450e9), 0.6
RATES = Rates(SHARE * SHEET.flops, SHARE * SHEET.memory, SHARE * SHEET.link)


def table(columns: dict[str, dict[str, float]], unit: float, digits: int) -> str:
    """Markdown with a row for each part and one for the sum."""
    parts = list(dict.fromkeys(part for column in columns.values() for part in column))
    lines = [f"| | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    for part in parts:
        cells = [
            f"{column[part] / unit:.{digits}f}" if part in column else "–"
            for column in columns.values()
        ]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    sums = [f"**{sum(column.values()) / unit:.{digits}f}**" for column in columns.values()]
    return "\n".join([*lines, f"| **sum** | {' | '.join(sums)} |"])


def state(job: Job) -> float:
    """Bytes of a checkpoint."""
    return sum(memory(job)[part] for part in ("parameters", "moments", "counts"))


def what_it_says() -> str:
    """The tables in words."""
    held = {name: sum(memory(job).values()) / 1e9 for name, job in JOBS.items()}
    parts = memory(JOB)
    whole = 4 * (JOB.d_sae * (2 * JOB.d_in + 1) + JOB.d_in)
    return "\n".join(
        [
            f"- Data parallelism does not fit: {held['data, SparseAdam']:.0f} GB on every GPU.",
            f"- Split by features it takes {held['features, SparseAdam']:.1f} GB, which leaves "
            "an 80 GB card next to nothing for the allocator: take 141 GB cards, or "
            "`rescale_acts_by_decoder_norm=False`, which saves "
            f'{parts["encoder scaled by decoder norms"] / 1e9:.1f} GB. `backend="triton"` '
            f"holds no gradients ({parts['gradients'] / 1e9:.1f} GB).",
            f"- A checkpoint is {state(JOB) * JOB.processes / 1e9:.0f} GB on disk, of which each "
            f"process writes {state(JOB) / 1e9:.0f} GB and holds a copy in host memory meanwhile. "
            f"The gathered SAE is {whole / 1e9:.0f} GB, of which the first process holds two "
            "copies in host memory.",
            f"- AuxK takes up to d_in / 2 = {JOB.d_in // 2:,} dead features of each token: where "
            "so many are dead, their scores travel too, and a second reconstruction.",
        ]
    )


def measured() -> str:
    """What `benchmarks/processes.py` recorded, beside the plan."""
    lines = [
        "| processes | split by | seconds per step | bytes sent by the first process | planned |",
        "|---:|---|---:|---:|---:|",
    ]
    paths = sorted(RESULTS.glob("processes-*.json"))
    records = [json.loads(path.read_text()) for path in paths]
    for record in records:
        for row in record["rows"]:
            job = Job(**record["job"], processes=record["ranks"], mode=row["mode"])
            planned = sum(traffic(job).values())
            lines.append(
                f"| {record['ranks']} | {row['mode']} | {row['seconds']:.2f} "
                f"| {row['bytes_sent']:,} | {planned:,} |"
            )
    r = records[0]
    sizes = {name: value for name, value in r["job"].items() if name != "auxk"}
    job = ", ".join(f"{name} {value:,}" for name, value in sizes.items()) + ", AuxK at work"
    made = "{machine[processor]}, {machine[cores]} cores, torch {torch}, {date}".format(**r)
    return "\n".join([*lines, "", f"{job}; one thread a process; {made}."])


def blocks() -> dict[str, str]:
    """The page's generated parts, by the name of their marks."""
    memories = {name: memory(job) for name, job in JOBS.items()}
    sent = {
        "features": traffic(JOB),
        "features, AuxK": traffic(replace(JOB, auxk=True)),
        "data": traffic(replace(JOB, mode="data")),
    }
    times = {name: seconds(job, RATES) for name, job in JOBS.items()}
    job = f"{JOB.d_sae:,} features, d_in {JOB.d_in:,}, k {JOB.k}, {JOB.batch:,} tokens a step"
    return {
        "job": f"{job}, {JOB.processes} GPUs, float32.",
        "memory": table(memories, 1e9, 2),  # pyright: ignore
        "traffic": table(sent, 1e6, 1),  # pyright: ignore
        "seconds": table(times, 1e-3, 1),
        "rates": f"{SHARE:.0%} of an H100 SXM's data sheet: {SHEET.flops / 1e12:.0f} TFLOP/s in "
        f"float32, {SHEET.memory / 1e12:.2f} TB/s of memory, {SHEET.link / 1e9:.0f} GB/s of NVLink "
        "each way.",
        "words": what_it_says(),
        "cpu": measured(),
    }


def written(page: str) -> str:
    """The page with its generated parts made anew."""
    for name, block in blocks().items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page = mark.sub(lambda found, block=block: f"{found[1]}{block}\n{found[2]}", page)
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
