"""The records of the studies: every row says which run made it, and no trial is there twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

STUDIES = Path(__file__).resolve().parent.parent / "data" / "results" / "studies"
OUTCOME = ("epochs", "dead_share", "fvu", "run", "window", "dead_in_training", "history")
OUTCOME += ("factor", "fvu_at_start", "fvu_scaled")


@pytest.mark.parametrize("name", ["starts", "d_init", "tried", "wide", "long", "million", "scaled"])
def test_a_record_is_whole(name):
    record = json.loads((STUDIES / f"{name}.json").read_text())
    assert {row["run"] for row in record["rows"]} == set(range(len(record["runs"])))
    assert all(record[key] == record["runs"][-1][key] for key in ("command", "commit", "run"))
    trials = [tuple(v for k, v in row.items() if k not in OUTCOME) for row in record["rows"]]
    assert len(set(trials)) == len(trials)
    # Above 1 is worse than the mean: a start that overshoots, hardly trained.
    assert all(0 <= row["dead_share"] < 1 and 0 < row["fvu"] < 2 for row in record["rows"])
