"""Take what came back from a card over into data/results/gpu/, a file a card, and print tables.

    python benchmarks/gpu/record.py OUT [OUT ...]    # the folders of the calls, in their order

The record names the commit whose code ran. What ran on two cards, or was a rehearsal, is refused.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import stage

RECORDS = stage.ROOT / "data" / "results" / "gpu"
_BRIDGED = stage.ROOT / "data" / "results" / "studies" / "million.json"
PARTS = ("check", "harvest", "headline", "speed")
_FIRES = ("fires", "fires_rates")


class RecordError(Exception):
    """What came back is no record."""


def merged(folders: list[Path]) -> dict[str, Any]:
    """One record of all the calls; a later call's result takes the place of an earlier one's.

    Raises:
        RecordError: nothing is there, several cards or codes, or a rehearsal.
    """
    paths = [f / f"{part}.json" for f in folders for part in PARTS]
    found = [(path, json.loads(path.read_text())) for path in paths if path.is_file()]
    if not found:
        raise RecordError("no results are in these folders: give those that run.sh wrote to")
    facts = [content["facts"] for _, content in found]
    if any(f["rehearsal"] for f in facts):
        raise RecordError("some results are of a rehearsal: give those of a card alone")
    for key in ("card", "driver", "code"):
        if len({f[key] for f in facts}) > 1:
            raise RecordError(f"the results differ in {key}: record each by itself")
    record: dict[str, Any] = {"facts": facts[0], "calls": len(folders)}
    for path, content in found:
        record[path.stem] = record.get(path.stem, {}) | content["results"]
    fires = [f / f"{name}.npz" for f in folders for name in _FIRES]
    record["features by fires"] = histograms([path for path in fires if path.is_file()])
    profiles = [f / "profile.txt" for f in folders]
    record["profile"] = [
        line for p in profiles if p.is_file() for line in p.read_text().split("\n")
    ]
    return record


def histograms(paths: list[Path]) -> dict[str, dict[str, int]]:
    """For each arm and text, how many features fired 0, 1, 2 to 3, 4 to 7, ... times."""
    found = {}
    for path in paths:
        with np.load(path) as counts:
            for name in counts.files:
                bins = np.bincount(np.frexp(counts[name].astype(np.float64))[1])
                starts = [0, *(1 << i for i in range(len(bins) - 1))]
                found[name] = {str(s): int(n) for s, n in zip(starts, bins, strict=True)}
    return found


def commit(code: str) -> str:
    """The commit that is checked out. Raises RecordError if its code is not what ran."""
    if stage.code_digest() != code:
        raise RecordError("other code ran on the card than is here: check that commit out first")
    git = ["git", "-C", str(stage.ROOT)]
    changed = [*git, "status", "--porcelain", "--", "saesub", "benchmarks/gpu"]
    if subprocess.check_output(changed, text=True).strip():
        raise RecordError("saesub or benchmarks/gpu have changes: commit them before the record")
    return subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()


def tables(record: dict[str, Any]) -> str:
    """Markdown of the speeds and of the arms."""
    lines = [f"{record['facts']['card']}, {record['facts']['date']}", ""]
    lines += [
        "| contender | features | batch | tokens a second | peak memory, GB |",
        "|---|" + "---:|" * 4,
    ]
    for row in record.get("speed", {}).values():
        if isinstance(row, dict) and "name" in row:
            lines.append(_speed_row(row))
    lines += ["", "| arm | features | rate | tokens | silent held out | never fired | FVU |"]
    lines.append("|---|" + "---:|" * 6)
    for name, row in record.get("headline", {}).items():
        if isinstance(row, dict) and "fvu" in row:
            silent = list(row["silent_held_out"].values())[-1]
            lines.append(
                f"| {name} | {row['d_sae']:,} | {row['lr']:g} | {row['tokens']:,} | {silent:.2%} | "
                f"{row['never_fired_in_training']:.2%} | {row['fvu']:.4f} |"
            )
    cpu = json.loads(_BRIDGED.read_text())["rows"][0]
    lines.append(f"\nThe bridge on the CPU: {cpu['dead_share']:.2%} silent, FVU {cpu['fvu']:.4f}.")
    return "\n".join(lines)


def _speed_row(row: dict[str, Any]) -> str:
    where = f"| {row['name']} | {row['d_sae']:,} | {row['batch']:,} |"
    if "tokens_per_second" not in row:
        return f"{where} out of memory | |"
    return f"{where} {row['tokens_per_second']:,.0f} | {row['peak_bytes'] / 1e9:.1f} |"


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]]
    try:
        record = merged(folders)
        record["commit"] = commit(record["facts"]["code"])
    except RecordError as error:
        raise SystemExit(str(error)) from error
    record["command"] = "bash benchmarks/gpu/run.sh, parts A, B and C"
    slug = re.sub(r"[^a-z0-9]+", "-", record["facts"]["card"].lower()).strip("-")
    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / f"{slug}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(tables(record))
    print(f"\nwritten to {path.relative_to(stage.ROOT)}")


if __name__ == "__main__":
    main()
