"""When each claim's bounds were set, and which records are older: `data/results/bounds.json`.

    python notebooks/bounds.py

`publish.py` runs it before it writes the pages. It reads git's history, which a run of the
notebooks does not have.
"""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from saesub.errors import SaesubError
from saesub.files import write_atomically
from saesub.reproduce.claims_table import SHORT

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = "data/paper_claims.csv"
SHOWN = "full"  # the profile whose records the pages show
EDGES = ("holds_low", "holds_high", "direction_low", "direction_high")


def write_bounds(root: Path) -> None:
    """Writes `bounds(root)` to the repository's `data/results/bounds.json`."""
    text = json.dumps(bounds(root), indent=1, ensure_ascii=False) + "\n"
    write_atomically(root / "data" / "results" / "bounds.json", text)


def bounds(root: Path) -> dict[str, dict]:
    """What the history of the repository `root` says of bounds and records.

    `claims` has, by claim id, the `commit` that set its measure, unit and bounds, and its `date`.
    The measure is the claim's text after its title; a title can be reworded, but not moved to or
    from those beyond the paper. A claim whose row is not committed is left out. `older_records`
    has, by such a commit, the records whose commits lack it. `runs` has the commit of each
    notebook's recorded run, and `first_runs` by claim id that of the first run that gave it a
    value: who runs a notebook again has seen it. Commits are cut to `SHORT` digits.

    Raises `SaesubError` if git has no history there, or a shortened one.
    """
    if _git(root, "rev-parse", "--is-shallow-repository") == "true":
        raise SaesubError(f"{root} has a shortened history; run `git fetch --unshallow` first")
    results = root / "data" / "results"
    run = results / SHOWN / "run.json"
    runs = _runs(root, json.loads(run.read_text())) if run.is_file() else {}
    files = [*sorted((results / "studies").glob("*.json")), *([run] if run.is_file() else [])]
    found = {commit for file in files for commit in _commits(json.loads(file.read_text()))}
    first_runs = _first_runs(root, run)
    records = sorted(found | set(runs.values()) | set(first_runs.values()))
    set_by = _set_by(root)
    commits = list(dict.fromkeys(set_by.values()))
    dates = {commit: _git(root, "show", "-s", "--format=%cI", commit) for commit in commits}
    return {
        "claims": {
            claim: {"commit": commit[:SHORT], "date": dates[commit]}
            for claim, commit in set_by.items()
        },
        "older_records": {
            commit[:SHORT]: [r[:SHORT] for r in records if not _precedes(root, commit, r)]
            for commit in commits
        },
        "runs": {name: commit[:SHORT] for name, commit in runs.items()},
        "first_runs": {claim: commit[:SHORT] for claim, commit in first_runs.items()},
    }


def _set_by(root: Path) -> dict[str, str]:
    """The latest commit that gave each claim the row that it has in the working tree."""
    now, head = _rows((root / CLAIMS).read_text(encoding="utf-8")), _rows_at(root, "HEAD")
    found: dict[str, str] = {}
    for commit in _git(root, "log", "--format=%H", "--", CLAIMS).splitlines():
        after, before = _rows_at(root, commit), _rows_at(root, f"{commit}^")
        for claim, row in now.items():
            if row == head.get(claim) == after.get(claim) != before.get(claim):
                found.setdefault(claim, commit)
    return {claim: found[claim] for claim in now if claim in found}


def _rows_at(root: Path, commit: str) -> dict[str, tuple]:
    """The claims at a commit; none if it does not exist or has none."""
    shown = _run(root, "show", f"{commit}:{CLAIMS}")
    return _rows(shown.stdout) if shown.returncode == 0 else {}


def _rows(text: str) -> dict[str, tuple]:
    """Each claim's measure, unit and bounds as numbers, by id."""
    return {
        row["id"]: (
            row["claim"].rsplit(": ", 1)[-1],
            row["claim"].startswith("Beyond the paper"),
            row["unit"],
            *(float(row[e]) if row[e] else None for e in EDGES),
        )
        for row in csv.DictReader(text.splitlines(keepends=True))
    }


def _runs(root: Path, record: dict[str, dict]) -> dict[str, str]:
    """The last commit before each notebook's recorded run began, if there is one."""
    found = {}
    for name, recorded in record.items():
        ended = datetime.strptime(recorded["run"][0], "%Y-%m-%d %H:%M UTC")
        began = ended.replace(tzinfo=timezone.utc) - timedelta(seconds=recorded["seconds"])
        before = f"--before={began.isoformat()}"
        if commit := _git(root, "rev-list", "-1", "--first-parent", before, "HEAD"):
            found[name] = commit
    return found


def _first_runs(root: Path, run: Path) -> dict[str, str]:
    """For each claim that a notebook measured itself, the last commit before the first recorded run
    that gave it a value."""
    at = run.relative_to(root).as_posix()
    commits = _git(root, "log", "--reverse", "--format=%H", "--", at).splitlines()
    texts = [_run(root, "show", f"{commit}:{at}").stdout for commit in commits]
    texts += [run.read_text()] if run.is_file() else []
    found: dict[str, str] = {}
    for record in (json.loads(text) for text in texts if text):
        new = {
            claim["id"]: name
            for name, recorded in record.items()
            for claim in recorded["claims"]
            if claim["value"] is not None and not claim.get("record") and claim["id"] not in found
        }
        before = _runs(root, {name: record[name] for name in set(new.values())})
        found |= {claim: before[name] for claim, name in new.items() if name in before}
    return found


def _commits(data: Any) -> Iterator[str]:
    """Every commit that a record names, wherever it does."""
    inside = data.values() if isinstance(data, dict) else data if isinstance(data, list) else []
    for value in inside:
        yield from _commits(value)
    if isinstance(data, dict):
        yield from filter(None, [data.get("commit"), data.get("record")])


def _precedes(root: Path, commit: str, record: str) -> bool:
    """Whether the record's commit has that commit in its history; not if git does not know it."""
    return _run(root, "merge-base", "--is-ancestor", commit, record).returncode == 0


def _git(root: Path, *arguments: str) -> str:
    done = _run(root, *arguments)
    if done.returncode:
        raise SaesubError(f"git found no history in {root}; run this in a checkout: {done.stderr}")
    return done.stdout.strip()


def _run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


if __name__ == "__main__":
    write_bounds(ROOT)
