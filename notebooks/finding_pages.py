"""The pages of docs/findings, one for each finding, and what docs/findings.md shows of them.

The rows are the recorded claims, each with the commits of its bounds and of its record;
data/findings.csv has the titles, what the paper reports, what came out, the figure that shows most,
and what the README shows. A page names its figure in a comment, since the figures are drawn when
the book is made.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from saesub.reproduce import claims, claims_table, paper_claims

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "findings"
_OTHER_RATES = re.compile(  # than each condition's own best
    r"lowest rate that fits equally well|at equal FVU|(?:both|all) at the rate|one rate for all"
    r"|in proportion|fits only as well|at random's best rate|, rate [\d.]"
)


@dataclass(frozen=True)
class Finding:
    """A row of data/findings.csv; `paper` is empty for what goes beyond the paper, and so are the
    README's `quantity` and the claims `shown` there."""

    finding: str
    title: str
    paper: str
    said: str
    figure: str
    quantity: str
    shown: str

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
    """A line for each finding: its page, what came out, its verdict and its rows by verdict."""
    scored = claims.scorecard(rows).rows
    lines = ["| Finding | What came out | Verdict | Rows |", "|---" * 4 + "|"]
    for finding in known():
        link = f"[{finding.heading}](findings/{finding.page.name})"
        cells = (link, finding.said, _verdict(finding, scored), _tally(finding, scored))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: Sequence[dict]) -> str:
    """The README's table: for each finding of the paper one quantity, with the paper's value and
    the range of ours over all regimes with a verdict. Above it, how many have which verdict, and
    how many bounds came late. `rows` are those of `claim_rows`."""
    scored = claims.scorecard(rows).rows
    tested = [row for row in rows if row["verdict"] != paper_claims.UNTESTED]
    late = sum(row["bound_is_younger"] for row in tested)
    judged = Counter(found.verdict for found in claims.findings(scored))
    told = ", ".join(f"{name} {judged[name]}" for name in claims_table.VERDICTS if judged[name])
    lines = [
        f"Of the paper's {judged.total()} findings: {told}. Of all {len(tested)} rows with a "
        f"verdict, {late} have bounds that were set after their record; the pages mark them.",
        "",
        "| Finding | Quantity | Paper | Here (regimes) | Verdict, rows |",
        "|---" * 5 + "|",
    ]
    for finding in (of for of in known() if of.paper):
        shown = [[row for row in scored if row["id"] == name] for name in finding.shown.split()]
        paper = [of[0]["paper"] or "–" for of in shown]
        link = f"[{finding.heading}](docs/findings/{finding.page.name})"
        cells = [link, finding.quantity, "; ".join(paper), "; ".join(map(_range, shown))]
        cells.append(f"{_verdict(finding, scored)}: {_tally(finding, scored)}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(rows: Sequence[dict]) -> str:
    """The least and the largest value, and how many regimes they are of."""
    found = [row for row in rows if row["verdict"] != paper_claims.UNTESTED]
    if not found:
        return "not measured"
    values = [row["value"] for row in found]
    least = claims_table.number(found[0], min(values), with_unit=False)
    most = claims_table.number(found[0], max(values))
    return (f"{least} to " * (min(values) < max(values))) + f"{most} ({len(found)})"


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
    verdict = f"*Verdict:* {_verdict(finding, rows)} ({_tally(finding, rows)})."
    parts = [
        f"# {finding.heading}",
        paper,
        f"*Here:* {finding.said}",
        f"{verdict} [What this means](../findings.md#all-claims).{_seen_before(own)}",
        f"*Notebook:* {links}.",
        f"<!-- figure {finding.figure} -->",
        *(_claim(list(of)) for _, of in groupby(own, key=lambda row: row["id"])),
    ]
    return "\n\n".join(parts) + "\n"


def _seen_before(rows: Sequence[dict]) -> str:
    """How many rows are perhaps no prediction, by their bounds or by how rates are chosen."""
    late = sum(row["bound_is_younger"] for row in rows)
    others = sum(bool(_OTHER_RATES.search(row["regime"])) for row in rows)
    said = f" The bounds of {late} of {len(rows)} rows were set after their record." * bool(late)
    return said + (
        f" {others} of {len(rows)} rows take other rates than each condition's own best."
        * bool(others)
    )


def _claim(rows: Sequence[dict]) -> str:
    """A claim: what is measured, the paper's value, its two ranges, and a row for each regime."""
    claim, text = paper_claims.find(rows[0]["id"]), claims_table.markdown_text
    title, _, measure = claim.claim.removeprefix("Beyond the paper: ").partition(": ")
    paper = "*Beyond the paper.*"
    if not claim.beyond_paper:
        paper = f"The paper: {text(claim.paper or 'none given')}."
    ranges = [f"✔ {_bounds(rows[0], claim.holds)}"] * bool(claim.holds.edges)
    wider = claim.direction.edges and claim.direction != claim.holds
    ranges += [f"↗ {_bounds(rows[0], claim.direction)}"] * bool(wider)
    lines = [
        f"## {text(title[:1].upper() + title[1:])}",
        "",
        f"`{claim.id}`" + f": {text(measure)}" * bool(measure) + f". {paper}",
        "",
        f"Ranges: {', '.join(ranges) or 'none'}."
        + f" Notebook {rows[0]['notebook']}." * bool(rows[0]["notebook"]),
        "",
        "| Regime | Here | Verdict | Bound and record |",
        "|---" * 4 + "|",
    ]
    return "\n".join([*lines, *map(claims_table.regime_row, rows)])


def _bounds(row: dict, bounds: paper_claims.Bounds) -> str:
    low, high = (claims_table.number(row, end) for end in (bounds.low, bounds.high))
    if len(bounds.edges) == 2:
        return f"{claims_table.number(row, bounds.low, with_unit=False)} to {high}"
    return f"at least {low}" if math.isfinite(bounds.low) else f"at most {high}"


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
