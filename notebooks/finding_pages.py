"""The pages of docs/findings, one for each finding, and what docs/findings.md shows of them.

The rows are the recorded claims, each with the commits of its bounds and of its record;
data/findings.csv has the titles, what the paper reports, and the figure that shows most. A page
names its figure in a comment, since the figures are drawn when the book is made.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from saesub.reproduce import claims, claims_table, paper_claims

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "findings"


@dataclass(frozen=True)
class Finding:
    """A row of data/findings.csv; `paper` is empty for what goes beyond the paper."""

    finding: str
    title: str
    paper: str
    figure: str

    @property
    def page(self) -> Path:
        """Where its page is."""
        return FOLDER / f"{self.finding}.md"

    @property
    def heading(self) -> str:
        """Its name and title."""
        return f"{self.finding} · {self.title}"


def known() -> list[Finding]:
    """All findings, the paper's first."""
    with (ROOT / "data" / "findings.csv").open(encoding="utf-8", newline="") as file:
        return [Finding(**row) for row in csv.DictReader(file)]


def texts(records: dict, bounds: dict) -> dict[Path, str]:
    """The text of every finding's page. `bounds` is what `bounds.py` found."""
    rows = claim_rows(records, bounds)
    return {finding.page: _text(finding, rows, records) for finding in known()}


def verdicts(rows: Iterable[dict]) -> str:
    """A line for each finding: its page, its verdict and its rows by verdict."""
    scored = claims.scorecard(rows).rows
    lines = ["| Finding | Verdict | Rows |", "|---" * 3 + "|"]
    for finding in known():
        link = f"[{finding.heading}](findings/{finding.page.name})"
        lines.append(f"| {link} | {_verdict(finding, scored)} | {_tally(finding, scored)} |")
    return "\n".join(lines)


def claim_rows(records: dict, bounds: dict) -> list[dict]:
    """Every claim in every regime, with the commits of its bounds and of its record.

    A row without a record's commit has that of its notebook's run.
    """
    rows = [
        row | _record(row, bounds["runs"].get(name, ""), bounds)
        for name, recorded in records.items()
        for row in recorded["claims"]
    ]
    return [_with_bound(row, bounds) for row in claims.scorecard(rows).rows]


def _text(finding: Finding, rows: list[dict], records: dict) -> str:
    own = [row for row in rows if row["finding"] == finding.finding]
    names = {name.split("_")[0]: name for name in records}
    measured_in = dict.fromkeys(row["notebook"] for row in own if row["notebook"])
    links = ", ".join(f"[{n}](../../notebooks/{names[n]}.ipynb)" for n in measured_in)
    paper = f"*The paper:* {finding.paper}" if finding.paper else "*Beyond the paper.*"
    parts = [
        f"# {finding.heading}",
        paper,
        f"*Here:* {_verdict(finding, rows)} ({_tally(finding, rows)}). *Notebook:* {links}.",
        f"<!-- figure {finding.figure} -->",
        claims_table.ClaimsTable(own).markdown(),
        "[What the verdicts mean, and all findings](../findings.md)",
    ]
    return "\n\n".join(parts) + "\n"


def _verdict(finding: Finding, rows: list[dict]) -> str:
    """The finding's verdict with its symbol; what is not the paper's has none as a whole."""
    if not finding.paper:
        return "each claim by itself"
    of = {found.finding: found.verdict for found in claims.findings(rows)}[finding.finding]
    return f"{claims_table.SYMBOLS[of]} {of}"


def _tally(finding: Finding, rows: list[dict]) -> str:
    """How many of its rows have which verdict. Beside a finding of the paper, ours do not count."""
    of = [
        row["verdict"]
        for row in rows
        if row["finding"] == finding.finding
        and not (finding.paper and paper_claims.find(row["id"]).beyond_paper)
    ]
    counts = {name: of.count(name) for name in claims_table.VERDICTS if name in of}
    return ", ".join(f"{n} {claims_table.SYMBOLS[name]}" for name, n in counts.items())


def _record(row: dict, run: str, bounds: dict) -> dict:
    """The commit of the row's record, and that at which its value was first seen. For a row of the
    notebook's own run, whose commit is `run`, that is the first run that measured the claim."""
    if row.get("record"):
        return {"record": row["record"], "seen": row["record"]}
    return {"record": run, "seen": bounds["first_runs"].get(row["id"], run)}


def _with_bound(row: dict, bounds: dict) -> dict:
    """The row with the commit of its bounds, and whether that is younger than its record."""
    if row["id"] not in bounds["claims"]:
        return row | {"bound": "not committed", "bound_is_younger": bool(row["record"])}
    commit = bounds["claims"][row["id"]]["commit"]
    seen = row.get("seen", "")[: claims_table.SHORT]
    younger = seen in bounds["older_records"][commit]
    return row | {"bound": commit, "bound_is_younger": younger}
