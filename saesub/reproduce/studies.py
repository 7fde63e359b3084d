"""Records of studies: runs of hours, made once and committed, from which notebooks draw figures.

A study is a script in `notebooks/studies/`; its record in `data/results/studies/` has one row for
each trial, mostly an SAE, and the command, the commit, the date and the machine of every run that
added rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saesub.errors import SaesubError, needs_extra
from saesub.evaluation import protocol
from saesub.evaluation.protocol import Sweep
from saesub.paths import data_file

if TYPE_CHECKING:
    import pandas as pd

_STARTS = {"random": "random", "subspace": "ASI", "whitened_data": "whitened start"}


@dataclass(frozen=True)
class Study:
    """The rows of a record, and where they come from; prints its source.

    Attributes:
        rows: one trial each; `condition` names the initialisation and the optimizer of an SAE.
        runs: command, commit and machine of each run.
    """

    name: str
    rows: pd.DataFrame
    runs: list[dict[str, Any]]

    @property
    def commit(self) -> str:
        """The commit of the code that made the oldest of the rows, short."""
        return self.commit_of(self.rows)

    def commit_of(self, rows: pd.DataFrame) -> str:
        """The same, of some of the rows."""
        return self.runs[int(rows["run"].min())]["commit"][:9]

    def __str__(self) -> str:
        lines = [f"data/results/studies/{self.name}.json: {len(self.rows)} rows"]
        for number, run in enumerate(self.runs):
            date, _, processor = run["run"][:3]
            n = int((self.rows["run"] == number).sum())
            lines.append(f"  {n} by {run['command']} at {run['commit'][:9]}, {date}, {processor}")
        return "\n".join(lines)


def recorded(name: str) -> Study:
    """The record `data/results/studies/<name>.json` of a study in `notebooks/studies`.

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
            f"there is no whole record {name}.json of a study ({error}): run the script of "
            "notebooks/studies whose first lines name it"
        ) from error


def on_gpu() -> list[dict[str, Any]]:
    """What `benchmarks/gpu` recorded on cards; the oldest first.

    Raises SaesubError if there is no record.
    """
    paths = sorted(data_file("results/gpu").glob("*.json"))
    if not paths:
        raise SaesubError("data/results/gpu holds no record: run the kit in benchmarks/gpu")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(found, key=lambda record: record["facts"]["date"])


def trained_on_gpu() -> pd.DataFrame:
    """The SAEs of `on_gpu`, a row each.

    Columns: name, condition, card, commit, start, optimizer, d_sae, lr, tokens, firings (of a
    feature in training, on average), window (held-out tokens), dead_share (silent in it), fvu,
    refitted_fvu.

    Raises SaesubError if there is no record.
    """
    with needs_extra("saesub.reproduce.studies"):
        import pandas as pd
    rows = []
    for record in on_gpu():
        about = {"card": record["facts"]["card"], "commit": record["commit"][:9]}
        for name, row in record.get("headline", {}).items():
            if not (isinstance(row, dict) and "fvu" in row):
                continue  # of the activations, or an SAE that there was no time for
            window, dead = list(row["silent_held_out"].items())[-1]
            kept = {key: row[key] for key in ("start", "optimizer", "d_sae", "lr", "tokens", "fvu")}
            kept |= {"firings": row["mean_fires_in_training"], "window": int(window)}
            kept |= {"dead_share": dead, "refitted_fvu": row.get("after_refit", {}).get("fvu")}
            condition = "recipe" if name.startswith("recipe") else _condition(row)
            rows.append({"name": name, "condition": condition} | about | kept)
    return pd.DataFrame(rows)


def sweep_of(rows: pd.DataFrame) -> Sweep:
    """The rows of one condition at several rates, as a sweep of the means over seeds."""
    return protocol.sweep_of(rows.to_dict("records"))


def with_best(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """The rows with two columns: whether the learning rate is the `best` of its group's, by the FVU
    of the validation part as a mean over seeds, and whether it fits `as_good` as the best.

    Args:
        rows: of a study.
        by: the columns that make a group, such as condition and d_sae.

    Raises SaesubError as `saesub.evaluation.protocol.sweep_of` does.
    """
    groups = list(zip(*(rows[column] for column in by), strict=True))
    of: dict[tuple, list[dict]] = {}
    for group, row in zip(groups, rows.to_dict("records"), strict=True):
        of.setdefault(group, []).append(row)
    sweeps = {group: protocol.sweep_of(several) for group, several in of.items()}
    chosen = list(zip(rows["lr"], (sweeps[group] for group in groups), strict=True))
    return rows.assign(
        best=[lr == sweep.rates[sweep.best] for lr, sweep in chosen],
        as_good=[lr in {sweep.rates[i] for i in sweep.as_good} for lr, sweep in chosen],
    )


def joined(first: Study, *others: Study) -> pd.DataFrame:
    """The rows of several studies at the place, width and number of tokens of the first's first.

    Of a condition that several have at the same rate and seed, the row of the last study is taken.
    `study` names where a row comes from.
    """
    import pandas as pd

    same, regime = ["hook_name", "d_sae", "n_train", "model", "corpus"], first.rows.iloc[0]
    rows = pd.concat([s.rows.assign(study=s.name) for s in (first, *others)], ignore_index=True)
    rows = pd.DataFrame(rows[(rows[same] == regime[same]).all(axis=1)])
    return rows.drop_duplicates(["condition", "lr", "seed"], keep="last", ignore_index=True)


def over_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Each condition at each rate, as means over seeds, for `plots.mitigation_panels`.

    Columns: condition, lr, dead_share, fvu, and whether the rate is the condition's `best`. Raises
    SaesubError as `with_best` does.
    """
    import pandas as pd

    by_rate = with_best(rows, ["condition"]).groupby(["condition", "lr"], sort=False)
    means = pd.DataFrame(by_rate[["dead_share", "fvu", "best"]].mean())
    return means.astype({"best": bool}).reset_index()


def _condition(row: dict[str, Any]) -> str:
    """
    >>> _condition({"start": "subspace", "optimizer": "sparse_adam"})
    'ASI + SparseAdam'
    >>> _condition({"start": "random", "optimizer": "adam", "beta1": 0.5})
    'random + β₁ = 0.5'
    """
    if "condition" in row:
        return row["condition"]
    parts: list[str] = [_STARTS.get(row["start"]) or row["start"]]
    if row["optimizer"] == "sparse_adam":
        parts.append("SparseAdam")
    if (beta1 := row.get("beta1", 0.9)) != 0.9:
        parts.append(f"β₁ = {beta1:g}" if beta1 else "no momentum")
    return " + ".join(parts)
