"""The paper's claims, the bounds within which they hold, and the verdict on a measured value."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from saesub.errors import SaesubError, near_names
from saesub.paths import data_file

HOLDS = "holds"
DIRECTION = "holds in direction"
MIXED = "mixed"
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
    """One row of `data/paper_claims.csv`; `shown_in` is how tables write its values: "%" for a
    share, "points" for a difference of two, empty for a plain number."""

    id: str
    finding: str
    claim: str
    unit: str
    shown_in: str
    paper: str
    paper_value: float | None
    holds: Bounds
    direction: Bounds

    @property
    def beyond_paper(self) -> bool:
        """Whether it is ours, so that it says nothing about the paper's finding."""
        return self.claim.startswith("Beyond the paper")

    @property
    def side(self) -> Bounds:
        """The values on the claim's side: `direction` with `holds`; `holds` without `direction`."""
        holds, direction = self.holds, self.direction
        if not direction.edges:
            return holds
        return Bounds(min(holds.low, direction.low), max(holds.high, direction.high))


@cache
def load_claims() -> dict[str, Claim]:
    """The claims by id, in the paper's order."""
    with data_file("paper_claims.csv").open(encoding="utf-8", newline="") as file:
        return {row["id"]: _claim(row) for row in csv.DictReader(file)}


def _claim(row: dict[str, str]) -> Claim:
    def bounds(name: str) -> Bounds:
        return Bounds(float(row[f"{name}_low"] or "-inf"), float(row[f"{name}_high"] or "inf"))

    texts = {key: row[key] for key in ("id", "finding", "claim", "unit", "shown_in", "paper")}
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


def verdict(claim: Claim, value: float | None, interval: tuple[float, float] | None = None) -> str:
    """HOLDS, DIRECTION, MIXED or FAILS; UNTESTED without a value, for NaN, or without bounds.

    FAILS where the value is not on the claim's side; MIXED where it is but the (low, high) interval
    is not. An interval with a NaN end counts as none.
    """
    testable = claim.holds.edges or claim.direction.edges
    if value is None or math.isnan(value) or not testable:
        return UNTESTED
    if value not in claim.side:
        return FAILS
    interval = known(interval)
    if interval and not _is_on_side(claim, interval):
        return MIXED
    return HOLDS if value in claim.holds else DIRECTION


def known(interval: Sequence[float] | None) -> tuple[float, float] | None:
    """The interval's (low, high); None without one, and where an end is NaN."""
    if interval is None or any(map(math.isnan, interval)):
        return None
    low, high = interval
    return low, high


def _is_on_side(claim: Claim, interval: tuple[float, float]) -> bool:
    """Whether the interval supports the claim from end to end.

    An edge of `direction` is no effect, and an interval that touches it does not exclude that.
    """
    low, high = interval
    touched = claim.direction.edges and any(low <= edge <= high for edge in claim.side.edges)
    return low in claim.side and high in claim.side and not touched


def doubt(claim: Claim, value: float | None, interval: tuple[float, float] | None) -> str:
    """A phrase that says what else the interval allows; empty if that is nothing.

    It names the verdicts of the interval's values, where these are not all the value's own, and
    says of a direction alone that it has no interval.
    """
    judged, interval = verdict(claim, value, interval), known(interval)
    if interval is None or judged == UNTESTED:
        return "without an interval" if judged == DIRECTION else ""
    if judged == MIXED:
        return "the interval does not lie wholly on the claim's side"
    low, high = interval
    inside = [e for e in claim.holds.edges + claim.direction.edges if low <= e <= high]
    reached = dict.fromkeys(verdict(claim, probe) for probe in (low, *inside, high))
    others = [other for other in reached if other != judged]
    return f"interval reaches into “{' / '.join(others)}”" if others else ""
