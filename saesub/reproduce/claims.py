"""What a notebook measured beside the paper's claims: the table, its JSON, and the scorecard."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from saesub.errors import SaesubError
from saesub.files import write_atomically
from saesub.reproduce.claims_table import SHORT, SYMBOLS, VERDICTS, ClaimsTable
from saesub.reproduce.paper_claims import (
    DIRECTION,
    FAILS,
    HOLDS,
    MIXED,
    UNTESTED,
    doubt,
    find,
    known,
    load_claims,
    verdict,
)

_FROM_CLAIM = ("finding", "claim", "unit", "paper", "paper_value")
_TEXTS = ("id", "finding", "claim", "unit", "paper", "n", "note", "notebook")
_ADDED = {"regime": "", "record": "", "untested": "", "doubt": ""}  # older records lack these
_TOUR = "00"  # the notebook that shows a little of everything
_COMMIT = re.compile(rf"[0-9a-f]{{{SHORT},40}}")


@dataclass(frozen=True)
class Measurement:
    """A claim's value as measured here; `value=None` means that it cannot be tested here.

    Attributes:
        interval: the (low, high) range of the value.
        n: what it was measured over.
        regime: what the verdict is for: site, width, tokens and rate rule.
        record: the commit of the record that the value is from, if it is not this run's own.
        untested: why the value gets no verdict, such as too few data.
    """

    id: str
    value: float | None
    interval: tuple[float, float] | None = None
    n: str = ""
    note: str = ""
    regime: str = ""
    record: str = ""
    untested: str = ""


class FindingVerdict(NamedTuple):
    """The verdict on one finding of the paper, and how many rows of its claims have which."""

    finding: str
    verdict: str
    counts: dict[str, int]

    @property
    def tally(self) -> str:
        """The counts with the verdicts' symbols, such as "3 ✔, 1 ✘"."""
        return ", ".join(f"{n} {SYMBOLS[name]}" for name, n in self.counts.items())

    def __str__(self) -> str:
        return f"{self.finding}: {self.verdict}" + f" ({self.tally})" * bool(self.counts)


def _row(measured: Measurement, notebook: str) -> dict:
    value, interval = measured.value, measured.interval
    value = None if value is None or math.isnan(value) else float(value)
    if interval is not None:
        low, high = map(float, interval)
        if low > high:
            raise SaesubError(
                f"{measured.id}: the interval ({low}, {high}) runs backwards; give (low, high)"
            )
        interval = known((low, high))
    if measured.record and not _COMMIT.fullmatch(measured.record):
        raise SaesubError(
            f"{measured.id}: record {measured.record!r} is no commit; give at least {SHORT} of its "
            "hexadecimal digits"
        )
    row = asdict(measured) | {"value": value, "interval": interval and list(interval)}
    return _judged(row | {"notebook": notebook})


def _judged(row: dict) -> dict:
    """The row with its claim's texts, and the verdict and doubt that today's bounds give."""
    claim = find(row["id"])
    given = (claim, row["value"], row["interval"])
    return row | {
        **{key: getattr(claim, key) for key in _FROM_CLAIM},
        "verdict": UNTESTED if row["untested"] else verdict(*given),
        "doubt": row["untested"] or doubt(*given),
    }


def compare(measurements: Iterable[Measurement], notebook: str) -> ClaimsTable:
    """The table of `measurements`, also written as JSON to `$SAESUB_RESULTS` if that is set.

    Raises `SaesubError` for an unknown claim id, a claim measured twice in one regime, a backward
    interval, or a record that is no commit.
    """
    rows = [_row(measured, notebook) for measured in measurements]
    keys = [(row["id"], row["regime"]) for row in rows]
    if twice := sorted({" in ".join(filter(None, key)) for key in keys if keys.count(key) > 1}):
        raise SaesubError(
            f"measured twice in notebook {notebook}: {'; '.join(twice)}; keep one for each regime"
        )
    if folder := os.environ.get("SAESUB_RESULTS"):
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        name = re.sub(r"[^\w.-]+", "_", notebook)
        write_atomically(Path(folder) / f"claims_{name}.json", text)
    return ClaimsTable(rows)


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
    """Whether it has the keys and types that `compare` writes."""
    if not isinstance(row, dict) or row.get("verdict") not in list(VERDICTS):
        return False
    value, ends = row.get("value", ""), row.get("interval", "")
    if not (ends is None or (isinstance(ends, list) and len(ends) == 2)):
        return False
    numbers = [*([] if value is None else [value]), *(ends or [])]
    texts = [*(row.get(key) for key in _TEXTS), *(row.get(key, "") for key in _ADDED)]
    return all(isinstance(text, str) for text in texts) and all(
        type(number) in (int, float) for number in numbers
    )


def scorecard(rows: Iterable[dict], *, whole: bool = True) -> ClaimsTable:
    """All the paper's claims in order; those that nobody measured are `not testable here`.

    If not `whole`, as when some notebooks have not run yet, the unmeasured are left out. A claim
    has a row for each regime, from the last notebook that measured it there; those of the tour are
    left out, since later notebooks measure the same on more data. Verdicts follow from today's
    bounds. Raises `SaesubError` for an unknown id.
    """
    last: dict[tuple[str, str], dict] = {}
    counted = (row for row in rows if row["notebook"] != _TOUR)
    for row in sorted(counted, key=lambda row: row["notebook"]):
        row = _judged(_ADDED | row)
        last[row["id"], row["regime"]] = row
    by_id: dict[str, list[dict]] = {claim: [] for claim in load_claims()}
    for row in last.values():
        by_id[row["id"]].append(row)
    if whole:
        for claim, measured in by_id.items():
            measured += [] if measured else [_row(Measurement(claim, None), "")]
    return ClaimsTable([row for measured in by_id.values() for row in measured])


def findings(rows: Iterable[dict]) -> list[FindingVerdict]:
    """The verdict on each of the paper's findings, F1 to F12, from the rows of a scorecard.

    All tested rows hold: the finding holds. All hold at least in direction: it holds in direction.
    None holds: it does not hold. Without a tested row it is not testable here, else mixed. Claims
    beyond the paper do not count. Raises `SaesubError` for an unknown id.
    """
    of_paper = [claim for claim in load_claims().values() if not claim.beyond_paper]
    given: dict[str, list[str]] = {claim.finding: [] for claim in of_paper}
    for row in rows:
        claim = find(row["id"])
        if not claim.beyond_paper:
            given[claim.finding].append(row["verdict"])
    return [FindingVerdict(name, _whole(of), _counts(of)) for name, of in given.items()]


def _whole(verdicts: Sequence[str]) -> str:
    """The verdict on a finding whose rows have these."""
    tested = set(verdicts) - {UNTESTED}
    if not tested:
        return UNTESTED
    for agreed in (HOLDS, FAILS):
        if tested == {agreed}:
            return agreed
    return DIRECTION if tested <= {HOLDS, DIRECTION} else MIXED


def _counts(verdicts: Sequence[str]) -> dict[str, int]:
    return {name: n for name in VERDICTS if (n := verdicts.count(name))}
