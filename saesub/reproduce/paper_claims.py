"""The paper's claims, the bounds within which they hold, and the verdict on a measured value."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache

from saesub.errors import SaesubError, near_names
from saesub.paths import data_file

HOLDS = "holds"
DIRECTION = "holds in direction"
FAILS = "does not hold"
UNTESTED = "not testable here"


@dataclass(frozen=True)
class Bounds:
    """A closed interval; an infinite end leaves its side unbounded."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def edges(self) -> list[float]:
        """The finite ends."""
        return [edge for edge in (self.low, self.high) if math.isfinite(edge)]


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


@cache
def load_claims() -> dict[str, Claim]:
    """The claims by id, in the paper's order."""
    with data_file("paper_claims.csv").open(encoding="utf-8", newline="") as file:
        return {row["id"]: _claim(row) for row in csv.DictReader(file)}


def _claim(row: dict[str, str]) -> Claim:
    def bounds(name: str) -> Bounds:
        return Bounds(float(row[f"{name}_low"] or "-inf"), float(row[f"{name}_high"] or "inf"))

    texts = {key: row[key] for key in ("id", "finding", "claim", "unit", "paper")}
    value = float(row["paper_value"]) if row["paper_value"] else None
    return Claim(**texts, paper_value=value, holds=bounds("holds"), direction=bounds("direction"))


def find(claim_id: str) -> Claim:
    """The claim of that id; a `SaesubError` with near names if there is none."""
    known = load_claims()
    if claim_id not in known:
        raise SaesubError(
            f"no claim {claim_id!r} in the paper's list; {near_names(claim_id, known)}"
        )
    return known[claim_id]


def verdict(claim: Claim, value: float | None) -> str:
    """HOLDS, DIRECTION or FAILS; UNTESTED without a value, for NaN, or without bounds."""
    testable = claim.holds.edges or claim.direction.edges
    if value is None or math.isnan(value) or not testable:
        return UNTESTED
    if value in claim.holds:
        return HOLDS
    return DIRECTION if value in claim.direction else FAILS


def doubt(claim: Claim, value: float | None, interval: tuple[float, float] | None) -> str:
    """A phrase that names the other verdicts within the interval; empty if there are none."""
    judged = verdict(claim, value)
    if interval is None or judged == UNTESTED:
        return ""
    low, high = interval
    inside = [e for e in claim.holds.edges + claim.direction.edges if low <= e <= high]
    reached = dict.fromkeys(verdict(claim, probe) for probe in (low, *inside, high))
    others = [other for other in reached if other != judged]
    return f"interval reaches into “{' / '.join(others)}”" if others else ""
