"""What a notebook measured beside the paper's claims: the table, its JSON, and the scorecard."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from saesub.errors import SaesubError
from saesub.files import write_atomically
from saesub.reproduce.claims_table import VERDICTS, ClaimsTable
from saesub.reproduce.paper_claims import doubt, find, load_claims, verdict

_FROM_CLAIM = ("finding", "claim", "unit", "paper", "paper_value")
_TEXTS = ("id", "finding", "claim", "unit", "paper", "n", "note", "notebook")


@dataclass(frozen=True)
class Measurement:
    """A claim's value as measured here; `value=None` means that it cannot be tested here.

    `interval` is the (low, high) range of the value, `n` what it was measured over.
    """

    id: str
    value: float | None
    interval: tuple[float, float] | None = None
    n: str = ""
    note: str = ""


def _row(measured: Measurement, notebook: str) -> dict:
    claim = find(measured.id)
    value, interval = measured.value, measured.interval
    value = None if value is None or math.isnan(value) else float(value)
    if interval is not None:
        low, high = map(float, interval)
        if low > high:
            raise SaesubError(
                f"{claim.id}: the interval ({low}, {high}) runs backwards; give (low, high)"
            )
        interval = None if math.isnan(low) or math.isnan(high) else (low, high)
    notes = filter(None, [measured.note, doubt(claim, value, interval)])
    return asdict(measured) | {
        "value": value,
        "interval": interval and list(interval),
        "note": "; ".join(notes),
        **{key: getattr(claim, key) for key in _FROM_CLAIM},
        "verdict": verdict(claim, value),
        "notebook": notebook,
    }


def compare(measurements: Iterable[Measurement], notebook: str) -> ClaimsTable:
    """The table of `measurements`, also written as JSON to `$SAESUB_RESULTS` if that is set.

    Raises `SaesubError` for an unknown or repeated claim id, or a backward interval.
    """
    rows = [_row(measured, notebook) for measured in measurements]
    ids = [row["id"] for row in rows]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise SaesubError(
            f"measured twice in notebook {notebook}: {', '.join(twice)}; keep one each"
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
    return all(isinstance(row.get(key), str) for key in _TEXTS) and all(
        type(number) in (int, float) for number in numbers
    )


def scorecard(rows: Iterable[dict], *, whole: bool = True) -> ClaimsTable:
    """All the paper's claims in order; those that nobody measured are `not testable here`.

    If not `whole`, as when some notebooks have not run yet, the unmeasured are left out. Where two
    notebooks measured one claim, each has its row. Raises `SaesubError` for an unknown id.
    """
    by_id: dict[str, list[dict]] = {}
    for row in rows:
        by_id.setdefault(find(row["id"]).id, []).append(row)
    if whole:
        for claim in load_claims():
            by_id.setdefault(claim, [_row(Measurement(claim, None), "")])
    return ClaimsTable([row for claim in load_claims() for row in by_id.get(claim, [])])
