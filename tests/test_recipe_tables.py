"""The table of docs/recipe.md, on records of a few rows."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import test_longer

from saesub.errors import SaesubError
from saesub.reproduce import studies
from saesub.reproduce.in_regimes import LONG, claimed, in_regimes

TABLES = Path(__file__).resolve().parent.parent / "notebooks" / "recipe_tables.py"


def _row(n_train: int, condition: str, lr: float, fvu: float, **more: float) -> dict:
    regime = {"model": "m", "corpus": "c", "hook_name": "blocks.1.hook_mlp_out", "d_sae": 2048}
    about = {"condition": condition, "lr": lr, "fvu": fvu, "validation_fvu": fvu + 0.01}
    sizes = {"k": 32, "n_train": n_train, "window": 64, "seed": 0}
    return regime | sizes | {"dead_share": 0.0} | about | more


RECORDS = {
    "recipe": [
        _row(100, "recipe", 0.002, 0.3, fvu_unrefitted=0.5, dead_share=0.0012),
        # Its half and its double are no part of the table.
        _row(100, "recipe", 0.001, 0.1, fvu_unrefitted=0.1),
        _row(100, "recipe", 0.004, 0.35, fvu_unrefitted=0.4),
        *(_row(200, "recipe", lr, 0.44, fvu_unrefitted=0.46) for lr in (0.002, 0.004, 0.001)),
    ],
    "baselines": [
        _row(100, "random", 0.004, 0.45),
        _row(100, "ASI", 0.002, 0.4),
        *(
            _row(200, "random", lr, fvu, dead_share=0.02)
            for lr, fvu in ((0.001, 0.42), (0.0005, 1), (0.002, 1))
        ),
        # The validation part chooses.
        _row(200, "ASI", 0.002, 0.4, validation_fvu=0.6, dead_share=0.01),
    ],
    "refitted": [
        _row(100, f"{condition} + refit", lr, fvu)
        for condition, least in (("ASI", 0.24), ("random", 0.25))
        for lr, fvu in ((0.004, 0.5), (0.008, least), (0.016, 0.5))
    ],
}


def _record(monkeypatch, **records) -> None:
    def recorded(name):
        if name not in records:
            raise SaesubError("there is no whole record of the study: run it")
        return SimpleNamespace(rows=pd.DataFrame(records[name]))

    monkeypatch.setattr(studies, "recorded", recorded)


def _tables(monkeypatch, **records) -> dict[str, str]:
    _record(monkeypatch, longer=test_longer.rows(), **records)
    return runpy.run_path(str(TABLES))["tables"]()


def test_the_recipe_stands_beside_the_baseline_that_fits_best(monkeypatch):
    made = _tables(monkeypatch, **RECORDS)
    first, second = made["recipe"].splitlines()[2:]
    assert first == (
        "| m | c | 1.hook_mlp_out | 2,048 | 100 | ASI, 0.002 | 0.4000 | 0.2400 (ASI, 0.008) | "
        "0.5000 | 0.3000 | 0.12% |"
    )
    assert "| random, 0.001 | 0.4200 |  | 0.4600 | 0.4400 | 0.00% |" in second
    assert made["recipe-summary"].splitlines() == [
        "In all 2 regimes:",
        "",
        "- The recipe's FVU is lower than the best baseline's in 1 of 2 (-25.0% to +4.8%, median "
        "-10.1%), and before its refit in 0 of 2 (+9.5% to +25.0%, median +17.3%).",
        "- Where the baselines have a refit of their own, it is lower than the best one's in 0 of "
        "1 (+25.0% to +25.0%, median +25.0%).",
        "- Beside the ranges that were set before ([B3](findings/B3.md)): – not testable here: "
        "hardly a dead feature · ↗ holds in direction: a lower FVU in nine regimes of ten; never a "
        "much higher one · ✘ does not hold: a rate near the best of a sweep.",
        "- It is at most 200.0% above the lowest of three rates, the recipe's, its half and its "
        "double. The double fits best in 0 regimes, the half in 1.",
        "- Where a feature fires 3 times in training, the recipe's FVU is lower in 0 of 1 (+4.8% "
        "to +4.8%, median +4.8%), and at most 0.00% of the features are dead. Of the baseline "
        "that fits best it is up to 2.00%; of the baseline that loses fewest, each at its own "
        "best rate, up to 1.00%.",
        "- Where a feature fires 1 times in training, the recipe's FVU is lower in 1 of 1 "
        "(-25.0% to -25.0%, median -25.0%), and at most 0.12% of the features are dead. Of the "
        "baseline that fits best it is up to 0.00%; of the baseline that loses fewest, each at "
        "its own best rate, up to 0.00%.",
        "",
        "A dead feature fires at none of 64 held-out tokens. No baseline has AuxK.",
    ]


def test_what_a_longer_training_brings_stands_beside_the_refit(monkeypatch):
    told = _tables(monkeypatch, **RECORDS)["recipe-longer"]
    best = "above that of the best of them (random; interval"
    assert f"on the same tokens, its FVU is 25.0% {best} 25.0% to 25.0%)" in told
    assert f"on 3 times as many, its FVU is 60.0% {best} 60.0% to 60.0%)" in told
    assert told.count("longer training, changes its FVU by -60.0%") == 2


def test_without_refitted_baselines_nothing_is_said_of_them(monkeypatch):
    made = _tables(monkeypatch, recipe=RECORDS["recipe"], baselines=RECORDS["baselines"])
    assert "have a refit" not in made["recipe-summary"]


def test_the_untouched_model_stands_apart(monkeypatch):
    other = {"model": "qwen2.5-coder-0.5b"}
    more = {name: [row | other for row in RECORDS[name]] for name in ("recipe", "baselines")}
    made = _tables(monkeypatch, **{name: RECORDS[name] + more[name] for name in more})
    first, _, second, *_ = made["recipe-summary"].split("\n\n")
    assert first == "In all 4 regimes:"
    assert second == "In the 2 regimes of the model on which nothing was trained before:"
    assert made["recipe-line"] == (
        "[`recommend`](docs/recipe.md): TopK settings without a sweep, up to 512,000 tokens and "
        "8,192 features. On an unseen model its FVU is below the best of three swept "
        "baselines' (no AuxK) in 1 of 2 regimes, and in 0 before the decoder's refit. At one site "
        "the best rival, trained 3 times as long without a refit, fits better."
    )


def test_the_claims_are_of_the_worst_regime_and_the_dead_of_the_longer_ones():
    of = pd.DataFrame(
        {
            "firings": [LONG, LONG, 1000],
            "dead_share": [0.0005, 0.0002, 0.5],
            "fvu": [0.1, 0.3, 0.201],
            "baseline_fvu": [0.2, 0.4, 0.2],
            "above_least": [0.0, 0.04, 0.02],
        }
    )
    found = claimed(of)
    assert found == pytest.approx(
        {"B3.dead": 0.0005, "B3.wins": 2 / 3, "B3.worst": 0.005, "B3.rate": 0.04}
    )
    met = runpy.run_path(str(TABLES))["_met"]
    beside = "Beside the ranges that were set before ([B3](findings/B3.md)): "
    assert met(of) == (
        f"{beside}✔ holds: hardly a dead feature; never a much higher one; a rate near the best of "
        "a sweep · ↗ holds in direction: a lower FVU in nine regimes of ten."
    )
    assert met(of.iloc[:2]) == (
        f"{beside}✔ holds: hardly a dead feature; a lower FVU in nine regimes of ten; never a much "
        "higher one; a rate near the best of a sweep."
    )


def test_a_row_has_what_the_claims_need(monkeypatch):
    _record(monkeypatch, **RECORDS)
    first, second = in_regimes().to_dict("records")
    assert (first["lr"], first["fvu"], first["seeds"], first["lower_in"]) == (0.002, 0.3, 1, 1)
    assert (first["above_least"], first["least_at"]) == (pytest.approx(2), 0.5)
    assert first["against_refitted"] == pytest.approx(0.25)
    assert (second["baseline_dead"], second["fewest_dead"]) == (0.02, 0.01)
    assert (first["firings"], first["dead_share"]) == (100 * 32 // 2048, 0.0012)
    assert (first["baseline"], second["baseline"]) == ("ASI", "random")
    assert not first["interior"]  # one rate is its own edge
    one = RECORDS["baselines"][2:-1]
    _record(monkeypatch, recipe=RECORDS["recipe"][3:], baselines=one)
    assert in_regimes()["interior"].all()


@pytest.mark.parametrize("left", [slice(0, 3), slice(0, 5), slice(1, 6)])
def test_a_refit_counts_where_all_baselines_are_swept_with_it_to_a_rate_inside(monkeypatch, left):
    _record(monkeypatch, **RECORDS | {"refitted": RECORDS["refitted"][left]})
    assert "against_refitted" not in in_regimes()


def test_half_a_record_is_refused(monkeypatch):
    _record(monkeypatch, recipe=RECORDS["recipe"], baselines=RECORDS["baselines"][:2])
    with pytest.raises(SaesubError, match=r"no whole record of the recipe.*recipe.py baselines"):
        in_regimes()
    for whole in (RECORDS["recipe"][:2], RECORDS["recipe"][:3]):  # two rates, one regime of two
        _record(monkeypatch, recipe=whole, baselines=RECORDS["baselines"])
        with pytest.raises(SaesubError, match="no whole record of the recipe"):
            in_regimes()


def test_seeds_are_averaged_and_paired_and_the_first_one_chooses(monkeypatch):
    more = [
        _row(100, "recipe", 0.002, fvu, seed=i, fvu_unrefitted=1) for i, fvu in ((1, 0.6), (2, 0.3))
    ]
    others = [_row(100, "ASI", 0.002, fvu, seed=i) for i, fvu in ((1, 0.5), (2, 0.45))]
    # A condition that fits better with another seed is not chosen by it.
    others += [_row(100, "random", 0.004, 0.1, seed=1)]
    baselines = RECORDS["baselines"] + others
    _record(monkeypatch, recipe=RECORDS["recipe"] + more, baselines=baselines)
    first = in_regimes().iloc[0]
    assert (first["baseline"], first["seeds"], first["lower_in"]) == ("ASI", 3, 2)
    assert first["fvu"] == pytest.approx(0.4)
    assert first["baseline_fvu"] == pytest.approx(0.45)
    assert first["above_least"] == pytest.approx(2)
