"""Take what came back from a card over into data/results/gpu/, a file a card and date, and print
tables.

    python benchmarks/gpu/record.py OUT [OUT ...]    # the folders of the calls, in their order

The record names the commit whose code ran. What ran on two cards, or was a rehearsal, is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import stage

RECORDS = stage.ROOT / "data" / "results" / "gpu"
# On two cores, before the studies had their present protocol; it names its commit.
_BRIDGED = stage.ROOT / "data" / "results" / "studies" / "million.json"
PARTS = ("check", "api", "harvest", "headline", "speed")
_FIRES = ("fires", "fires_rates")


class RecordError(Exception):
    """What came back is no record."""


def merged(folders: list[Path]) -> dict[str, Any]:
    """One record of all the calls; a later call's result takes the place of an earlier one's.

    Raises:
        RecordError: nothing is there, several cards or codes, or a rehearsal.
    """
    for folder in folders:
        if not folder.is_dir():
            raise RecordError(f"{folder} is no folder: give those that run.sh wrote to")
    paths = [f / f"{part}.json" for f in folders for part in PARTS]
    found = [(path, json.loads(path.read_text())) for path in paths if path.is_file()]
    if not found:
        raise RecordError("no results are in these folders: give those that run.sh wrote to")
    facts = [content["facts"] for _, content in found]
    for path, content in found:
        if content["facts"]["rehearsal"]:
            raise RecordError(f"{path} is of a rehearsal: give results of a card alone")
    for key in ("card", "driver", "code"):
        if len({f[key] for f in facts}) > 1:
            raise RecordError(f"the results differ in {key}: record each by itself")
    record: dict[str, Any] = {"facts": facts[0], "calls": len(folders)}
    for path, content in found:
        results = {name: _without_trace(row) for name, row in content["results"].items()}
        record[path.stem] = record.get(path.stem, {}) | results
    fires = [f / f"{name}.npz" for f in folders for name in _FIRES]
    record["features by fires"] = histograms([path for path in fires if path.is_file()])
    profiles = [f / "profile.txt" for f in folders]
    record["profile"] = [
        line for p in profiles if p.is_file() for line in p.read_text().split("\n")
    ]
    return record


def _without_trace(row: Any) -> Any:
    """A result; of an error its kind and message, without the paths of that machine."""
    return {k: v for k, v in row.items() if k != "trace"} if isinstance(row, dict) else row


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
    """Markdown: what was checked, the speeds and the arms; what failed has a row too."""
    lines = [f"{record['facts']['card']}, {record['facts']['date']}"]
    lines += [_checked(record.get("check", {})), ""]
    lines += [
        "| contender | features | batch | tokens a second | peak memory, GB |",
        "|---|" + "---:|" * 4,
    ]
    for name, row in record.get("speed", {}).items():
        if missing := _missing(row):
            lines.append(f"| {name} | | | {missing} | |")
        elif isinstance(row, dict) and "name" in row:
            lines.append(_speed_row(row))
    columns = "arm | backend | features | rate | tokens | silent held out | never fired | FVU"
    lines += ["", f"| {columns} | after a refit |", "|---|---|" + "---:|" * 7]
    for name, row in record.get("headline", {}).items():
        if missing := _missing(row):
            lines.append(f"| {name} | {missing} | | | | | | | |")
        elif isinstance(row, dict) and "fvu" in row:
            lines.append(_arm_row(name, row))
    cpu = json.loads(_BRIDGED.read_text())["rows"][0]
    lines.append(f"\nThe bridge on the CPU: {cpu['dead_share']:.2%} silent, FVU {cpu['fvu']:.4f}.")
    return "\n".join(lines)


def _checked(check: dict[str, Any]) -> str:
    """A line: whether kernels and tests passed, and what failed."""
    kernels = (
        "passed" if check.get("kernels passed") is True else "failed or not checked to the end"
    )
    status = check["tests"]["exit"] if "tests" in check else None
    said = {None: "not run", 0: "passed"}.get(status, f"failed ({status})")
    line = f"kernels: {kernels}; tests: {said}"
    failed = [
        name
        for name, row in check.items()
        if isinstance(row, dict) and ("error" in row or row.get("outcome") == "failed")
    ]
    return f"{line}; failed: {'; '.join(failed)}" if failed else line


def _missing(row: Any) -> str | None:
    """Why a result is not there; None if it is."""
    if not isinstance(row, dict):
        return None
    if "error" in row:
        return f"failed: {row['error']}"
    return f"left out: {row['left out']}" if "left out" in row else None


def _arm_row(name: str, row: dict[str, Any]) -> str:
    silent = list(row["silent_held_out"].values())[-1]
    refitted = f"{row['after_refit']['fvu']:.4f}" if "after_refit" in row else ""
    return (
        f"| {name} | {row['backend']} | {row['d_sae']:,} | {row['lr']:g} | {row['tokens']:,} | "
        f"{silent:.2%} | {row['never_fired_in_training']:.2%} | {row['fvu']:.4f} | {refitted} |"
    )


def _speed_row(row: dict[str, Any]) -> str:
    where = f"| {row['name']} | {row['d_sae']:,} | {row['batch']:,} |"
    if "tokens_per_second" not in row:
        return f"{where} out of memory | |"
    return f"{where} {row['tokens_per_second']:,.0f} | {row['peak_bytes'] / 1e9:.1f} |"


def command(record: dict[str, Any]) -> str:
    """The call whose parts the record holds."""
    arms = record.get("headline", {})
    there = {
        "A": "check" in record or "api" in record,
        "B": "bridge" in arms or bool({"harvest", "speed"} & set(record)),
        "C": any(" at " in name for name in arms),
    }
    return " ".join(["bash benchmarks/gpu/run.sh", *(part for part in there if there[part])])


def file_name(facts: dict[str, Any]) -> str:
    """A name for the record of this card, day and code."""
    slug = re.sub(r"[^a-z0-9]+", "-", facts["card"].lower()).strip("-")
    return f"{slug}-{facts['date'].split()[0]}-{facts['code'][:7]}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folders", metavar="OUT", nargs="+", type=Path)
    folders = parser.parse_args().folders
    try:
        record = merged(folders)
        record["commit"] = commit(record["facts"]["code"])
    except RecordError as error:
        raise SystemExit(str(error)) from error
    record["command"] = command(record)
    print(tables(record))
    path = RECORDS / file_name(record["facts"])
    done = "replaced the earlier record of that day and code:" if path.exists() else "written to"
    RECORDS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{done} {path.relative_to(stage.ROOT)}")


if __name__ == "__main__":
    main()
