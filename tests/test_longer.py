"""The recipe beside rivals that train longer, on a record of a few rows."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from saesub.errors import SaesubError
from saesub.reproduce import studies
from saesub.reproduce.longer import trained_longer


def _row(condition: str, n_read: int, lr: float, seed: int, fvu: float, **more: float) -> dict:
    about = {"condition": condition, "n_read": n_read, "lr": lr, "seed": seed, "fvu": fvu}
    n_train = 100 if condition == "recipe" else 300
    return about | {"n_train": n_train, "dead_share": 0.25, "validation_fvu": fvu + 0.01} | more


def rows() -> list[dict]:
    """Of a study in which the recipe has an FVU of 0.2."""
    found = [_row("recipe", 100, 0.003, seed, 0.2) for seed in range(3)]
    for n_read, best in ((100, 0.16), (300, 0.125)):
        found += [_row("random", n_read, lr, 0, 0.3) for lr in (0.001, 0.004)]
        found += [_row("random", n_read, 0.002, seed, best) for seed in range(3)]
        before = {"fvu_unrefitted": 0.4, "validation_fvu_unrefitted": 0.41}
        found += [_row("ASI + refit", n_read, lr, 0, 0.3, **before) for lr in (0.001, 0.004)]
        # Before its refit it fits best at the same rate.
        before = {"fvu_unrefitted": 0.25, "validation_fvu_unrefitted": 0.26}
        found += [_row("ASI + refit", n_read, 0.002, seed, 0.1, **before) for seed in range(3)]
    return found


def _given(monkeypatch, rows: list[dict]) -> None:
    study = SimpleNamespace(rows=pd.DataFrame(rows))
    monkeypatch.setattr(studies, "recorded", lambda name: study)


def test_each_rival_stands_at_its_best_rate_with_the_recipe_against_it(monkeypatch):
    _given(monkeypatch, rows())
    found = trained_longer().set_index(["tokens", "condition"])
    assert found.loc["same", "random"]["fvu"] == pytest.approx(0.16)
    assert found.loc["same", "random"]["change"] == pytest.approx(0.25)
    assert found.loc["new", "random"]["change"] == pytest.approx(0.6)
    assert found["lr"].unique().tolist() == [0.002]
    assert found["interior"].all()
    assert found["seeds"].unique().tolist() == [3]
    assert found["fvu"].is_monotonic_increasing
    assert found.loc["new", "ASI"]["fvu"] == pytest.approx(0.25)
    assert not found.loc["new", "ASI"]["refitted"]
    assert found.loc["new", "ASI + refit"]["refitted"]
    assert found.loc["new", "ASI + refit"]["fvu"] == pytest.approx(0.1)


def test_half_a_record_is_refused(monkeypatch):
    half = [row for row in rows() if not (row["condition"] == "random" and row["seed"] == 2)]
    _given(monkeypatch, half)
    with pytest.raises(SaesubError, match=r"longer.py to its end"):
        trained_longer()
