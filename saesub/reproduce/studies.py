"""Records of studies: runs of hours, made once and committed, from which notebooks draw figures.

A study is a script in `notebooks/studies/`; its record in `data/results/studies/` has one row for
each SAE, and the command, the commit, the date and the machine of every run that added rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saesub.errors import SaesubError, needs_extra
from saesub.paths import data_file

if TYPE_CHECKING:
    import pandas as pd

_STARTS = {"random": "random", "subspace": "ASI", "whitened_data": "whitened start"}


@dataclass(frozen=True)
class Study:
    """The rows of a record, and where they come from; prints its source.

    Attributes:
        rows: one SAE each; `condition` names the initialisation and the optimizer.
        runs: command, commit and machine of each run.
    """

    name: str
    rows: pd.DataFrame
    runs: list[dict[str, Any]]

    @property
    def commit(self) -> str:
        """The commit of the code that made the oldest of the rows, short."""
        return self.runs[min(self.rows["run"])]["commit"][:9]

    def __str__(self) -> str:
        lines = [f"data/results/studies/{self.name}.json: {len(self.rows)} SAEs"]
        for number, run in enumerate(self.runs):
            date, _, processor = run["run"][:3]
            n = int((self.rows["run"] == number).sum())
            lines.append(f"  {n} by {run['command']} at {run['commit'][:9]}, {date}, {processor}")
        return "\n".join(lines)


def recorded(name: str) -> Study:
    """The record of the study `notebooks/studies/<name>.py`.

    Raises SaesubError if there is none, or it is damaged.
    """
    with needs_extra("saesub.reproduce.studies"):
        import pandas as pd
    try:
        record = json.loads(data_file(f"results/studies/{name}.json").read_text(encoding="utf-8"))
        rows = pd.DataFrame(record["rows"])
        rows["condition"] = [_condition(row) for row in record["rows"]]
        return Study(name, rows, record["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SaesubError(
            f"there is no whole record of the study {name!r} ({error}): run "
            f"python notebooks/studies/{name}.py"
        ) from error


def _condition(row: dict[str, Any]) -> str:
    """
    >>> _condition({"start": "subspace", "optimizer": "sparse_adam"})
    'ASI + SparseAdam'
    """
    if "condition" in row:
        return row["condition"]
    parts = [_STARTS.get(row["start"], row["start"])]
    if row["optimizer"] == "sparse_adam":
        parts.append("SparseAdam")
    if row.get("beta1", 0.9) == 0:
        parts.append("no momentum")
    return " + ".join(parts)
