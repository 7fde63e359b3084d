"""The paper's claims beside what was measured here: a verdict for each, as a table and as JSON."""

from __future__ import annotations

import csv
import html
import json
import math
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from saesub.errors import SaesubError, near_names
from saesub.files import write_atomically
from saesub.paths import data_file

HOLDS, DIRECTION, FAILS, UNTESTED = (
    "holds",
    "holds in direction",
    "does not hold",
    "not testable here",
)
# Okabe-Ito colours darkened for text, each with its own symbol.
_LOOK = {
    HOLDS: ("✔", "#005f8f"),
    DIRECTION: ("↗", "#8a5a00"),
    FAILS: ("✘", "#b33c00"),
    UNTESTED: ("–", "#666666"),
}


@dataclass(frozen=True)
class Bounds:
    """A closed interval; None leaves a side unbounded."""

    low: float | None
    high: float | None

    def __contains__(self, value: float) -> bool:
        below = self.low is not None and value < self.low
        return not below and (self.high is None or value <= self.high)

    @property
    def edges(self) -> list[float]:
        """The bounds that are given."""
        return [edge for edge in (self.low, self.high) if edge is not None]


@dataclass(frozen=True)
class Claim:
    """One row of `data/paper_claims.csv`."""

    id: str
    finding: str
    claim: str
    unit: str
    paper: str
    paper_value: float | None
    holds: Bounds
    direction: Bounds


@dataclass(frozen=True)
class Measurement:
    """A claim's value as measured here; `value=None` says it cannot be tested here.

    `interval` is the (low, high) range of the value, `n` what it was measured over.
    """

    id: str
    value: float | None
    interval: tuple[float, float] | None = None
    n: str = ""
    note: str = ""


@cache
def load_claims() -> dict[str, Claim]:
    """The claims by id, in the paper's order."""
    with data_file("paper_claims.csv").open(encoding="utf-8", newline="") as file:
        return {row["id"]: _claim(row) for row in csv.DictReader(file)}


def _claim(row: dict[str, str]) -> Claim:
    def number(column: str) -> float | None:
        return float(row[column]) if row[column] else None

    return Claim(
        **{key: row[key] for key in ("id", "finding", "claim", "unit", "paper")},
        paper_value=number("paper_value"),
        holds=Bounds(number("holds_low"), number("holds_high")),
        direction=Bounds(number("direction_low"), number("direction_high")),
    )


def find(claim_id: str) -> Claim:
    """The claim of that id; a `SaesubError` with near names if there is none."""
    known = load_claims()
    if claim_id not in known:
        raise SaesubError(
            f"no claim {claim_id!r} in the paper's list; {near_names(claim_id, known)}"
        )
    return known[claim_id]


def verdict(claim: Claim | str, value: float | None) -> str:
    """`holds`, `holds in direction`, `does not hold`, or `not testable here`.

    Not testable are a missing or NaN value and a claim without bounds.
    """
    claim = find(claim) if isinstance(claim, str) else claim
    testable = claim.holds.edges or claim.direction.edges
    if value is None or math.isnan(value) or not testable:
        return UNTESTED
    if value in claim.holds:
        return HOLDS
    return DIRECTION if value in claim.direction else FAILS


def _row(measurement: Measurement) -> dict:
    claim = find(measurement.id)
    row = asdict(measurement) | {
        key: getattr(claim, key) for key in ("finding", "claim", "unit", "paper", "paper_value")
    }
    row["value"] = _finite(measurement.value)
    row["verdict"] = verdict(claim, measurement.value)
    row["interval"] = _interval(measurement)
    row["note"] = "; ".join(filter(None, [measurement.note, _doubt(claim, row)]))
    return row


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _interval(measurement: Measurement) -> list[float] | None:
    if measurement.interval is None or any(map(math.isnan, measurement.interval)):
        return None
    low, high = map(float, measurement.interval)
    if low > high:
        raise SaesubError(
            f"{measurement.id}: the interval ({low}, {high}) runs backwards; give (low, high)"
        )
    return [low, high]


def _doubt(claim: Claim, row: dict) -> str:
    """Says so where the interval crosses a bound and would have been judged otherwise there."""
    if row["interval"] is None or row["verdict"] == UNTESTED:
        return ""
    low, high = row["interval"]
    inside = [e for e in claim.holds.edges + claim.direction.edges if low <= e <= high]
    reached = dict.fromkeys(verdict(claim, probe) for probe in (low, *inside, high))
    others = [v for v in reached if v != row["verdict"]]
    return f"interval reaches into “{' / '.join(others)}”" if others else ""


class ClaimsTable:
    """Rows of claim, paper's figure, value here and verdict; shows itself as HTML or text.

    Raises `SaesubError` for a verdict that is none.
    """

    def __init__(self, rows: Sequence[dict]) -> None:
        self.rows = list(rows)
        if bad := [row["verdict"] for row in rows if row["verdict"] not in _LOOK]:
            raise SaesubError(f"no verdict {bad[0]!r}; {near_names(bad[0], _LOOK)}")

    def counts(self) -> dict[str, int]:
        """How many rows have each verdict."""
        return {v: sum(row["verdict"] == v for row in self.rows) for v in _LOOK}

    def __str__(self) -> str:
        totals = [f"{s} {n} {v}" for v, (s, _) in _LOOK.items() if (n := self.counts()[v])]
        return "\n".join(["   ".join(totals), *map(_text_row, self.rows)])

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{h}</th>" for h in _HEAD)
        body = "".join(map(_html_row, self.rows))
        return (
            "<div style='overflow-x:auto'><table class='saesub-claims'>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def markdown(self) -> str:
        """The same as a Markdown table, one line a claim, for a README."""
        head = (*_HEAD, "Notebook")
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in self.rows:
            symbol, _ = _LOOK[row["verdict"]]
            cells = (
                f"**{row['id']}** {row['claim']}",
                row["paper"] or "none given",
                _here(row),
                " ".join(filter(None, [symbol, row["verdict"], _bracketed_doubt(row)])),
                row["notebook"],
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(lines)


def _bracketed_doubt(row: dict) -> str:
    doubt = _doubt(find(row["id"]), row)
    return f"({doubt})" if doubt else ""


def _text_row(row: dict) -> str:
    figures = f"paper {row['paper'] or 'none given'} · here {_here(row)}"
    detail = " · ".join(filter(None, [figures, row["n"], row["note"]]))
    lines = [f"\n{_LOOK[row['verdict']][0]} {row['id']}: {row['verdict']}"]
    for text in (row["claim"], detail):
        lines += textwrap.wrap(text, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


_ROW_TEXTS = ("id", "finding", "claim", "unit", "paper", "n", "note", "notebook")
_HEAD = ("Claim", "Paper", "Here", "Verdict")


def _html_row(row: dict) -> str:
    symbol, colour = _LOOK[row["verdict"]]
    here = "<br>".join(filter(None, [html.escape(_here(row)), _small(row["n"])]))
    cells = (
        f"<b>{html.escape(row['id'])}</b><br>{html.escape(row['claim'])}",
        html.escape(row["paper"] or "none given"),
        here,
        f"<b style='color:{colour}'>{symbol} {row['verdict']}</b><br>{_small(row['note'])}",
    )
    style = "text-align:left;vertical-align:top;white-space:normal"
    return "<tr>" + "".join(f"<td style='{style}'>{c}</td>" for c in cells) + "</tr>"


def _small(text: str) -> str:
    return f"<small>{html.escape(text)}</small>" if text else ""


def _here(row: dict) -> str:
    if row["value"] is None:
        return "not measured"
    show = _percent if row["unit"].startswith("share") else _plain
    text = show(row["value"])
    if row["interval"]:
        text += f" [{show(row['interval'][0])}, {show(row['interval'][1])}]"
    return text


def _percent(value: float) -> str:
    digits = 1 if abs(value) >= 0.01 or value == 0 else 2
    return f"{100 * value:.{digits}f} %"


def _plain(value: float) -> str:
    return f"{value:.3g}"


def compare(measurements: Iterable[Measurement], notebook: str) -> ClaimsTable:
    """The table of `measurements`, also left as JSON in `$SAESUB_RESULTS` when that is set.

    Raises `SaesubError` for an unknown or repeated claim id, or a backward interval.
    """
    rows = [_row(m) | {"notebook": notebook} for m in measurements]
    ids = [row["id"] for row in rows]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise SaesubError(
            f"measured twice in notebook {notebook}: {', '.join(twice)}; keep one each"
        )
    if folder := os.environ.get("SAESUB_RESULTS"):
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        write_atomically(Path(folder) / f"claims_{_safe(notebook)}.json", text)
    return ClaimsTable(rows)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def collect(folder: str | Path) -> list[dict]:
    """The rows of every `claims_<notebook>.json` in `folder`, in the notebooks' order.

    Raises `SaesubError` if the folder is missing or a file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SaesubError(
            f"no folder {folder}; run `saesub reproduce` first or name its results folder"
        )
    rows: list[dict] = []
    for path in sorted(folder.glob("claims_*.json")):
        try:
            found = json.loads(path.read_bytes())
            if not (isinstance(found, list) and all(map(_is_row, found))):
                raise ValueError("it holds something else than rows of claims")
            rows += found
        except (ValueError, RecursionError) as error:
            raise SaesubError(
                f"{path} is damaged ({error}); delete it and run its notebook again"
            ) from error
    return rows


def _is_row(row: object) -> bool:
    """Whether it is shaped as `compare` made it."""
    if not isinstance(row, dict) or row.get("verdict") not in list(_LOOK):
        return False
    texts = [row.get(key) for key in _ROW_TEXTS]
    value, edges = row.get("value", ""), row.get("interval", "")
    if not (edges is None or (isinstance(edges, list) and len(edges) == 2)):
        return False
    numbers = [*([] if value is None else [value]), *(edges or [])]
    return all(isinstance(t, str) for t in texts) and all(type(n) in (int, float) for n in numbers)


def scorecard(rows: Iterable[dict], *, whole: bool = True) -> ClaimsTable:
    """All the paper's claims in order; those nobody measured are `not testable here`.

    If not `whole`, as when some notebooks have yet to run, the unmeasured are left out. Where two
    notebooks measured one claim, each has its row. Raises `SaesubError` for an unknown id.
    """
    by_id: dict[str, list[dict]] = {}
    for row in rows:
        by_id.setdefault(find(row["id"]).id, []).append(row)
    for claim in load_claims() if whole else ():
        by_id.setdefault(claim, [_row(Measurement(claim, None)) | {"notebook": ""}])
    return ClaimsTable([row for claim in load_claims() for row in by_id.get(claim, [])])
