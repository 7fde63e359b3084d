"""Verdicts at and around every bound, the table, and the files the scorecard is made of."""

from __future__ import annotations

import math

import pytest

from saesub.errors import SaesubError
from saesub.reproduce import claims, paper_claims
from saesub.reproduce.claims import Measurement


@pytest.mark.parametrize("claim", paper_claims.load_claims().values(), ids=lambda c: c.id)
def test_every_claim_is_consistent(claim):
    assert claim.finding == claim.id.split(".")[0]
    assert claim.claim
    if claim.paper_value is not None and claim.holds.edges:
        assert paper_claims.verdict(claim, claim.paper_value) == "holds"
    for edge in claim.holds.edges:
        assert paper_claims.verdict(claim, edge) == "holds", "the intervals are closed"
    for edge in claim.direction.edges:
        assert paper_claims.verdict(claim, edge) in ("holds", "holds in direction")


@pytest.mark.parametrize(
    ("claim", "value", "expected"),
    [
        ("F1.attn_rank", 0.515, "holds"),
        ("F1.attn_rank", 0.70, "holds"),
        ("F1.attn_rank", 0.44, "holds in direction"),
        ("F1.attn_rank", 0.75, "holds in direction"),
        ("F1.attn_rank", 0.81, "does not hold"),
        ("F1.mlp_rank", 0.69, "does not hold"),
        ("F6.asi_dead", 0.0, "holds"),
        ("F6.asi_dead", 0.051, "does not hold"),
        ("F5.correlation", -0.2, "holds in direction"),
        ("F5.correlation", 0.1, "does not hold"),
        ("F12.quality", 1.0, "not testable here"),
        ("F6.asi_dead", None, "not testable here"),
        ("F6.asi_dead", math.nan, "not testable here"),
    ],
)
def test_verdicts(claim, value, expected):
    assert paper_claims.verdict(paper_claims.find(claim), value) == expected


def test_all_findings_of_the_paper_are_there():
    assert [f"F{i}" for i in range(1, 13)] == list(
        dict.fromkeys(c.finding for c in paper_claims.load_claims().values())
    )


def test_an_unknown_claim_gets_near_names():
    with pytest.raises(SaesubError, match=r"F1\.attn_rank"):
        claims.compare([Measurement("F1.atn_rank", 0.5)], "01")


def test_repeated_claims_and_backward_intervals_are_refused():
    with pytest.raises(SaesubError, match="twice"):
        claims.compare([Measurement("F6.fvu", 0.1), Measurement("F6.fvu", 0.2)], "05")
    with pytest.raises(SaesubError, match="backwards"):
        claims.compare([Measurement("F6.fvu", 0.1, (0.2, 0.1))], "05")


@pytest.mark.parametrize(
    ("interval", "doubt"), [((0.5, 0.6), ""), ((0.5, 0.72), "direction"), ((0.5, 0.9), "does not")]
)
def test_an_interval_across_a_bound_is_noted(interval, doubt):
    note = claims.compare([Measurement("F1.attn_rank", 0.55, interval)], "01").rows[0]["note"]
    assert (doubt in note) if doubt else note == ""


def test_an_interval_around_the_whole_holding_range_is_noted():
    row = claims.compare([Measurement("F2.gap", 0.05, (0.01, 0.5))], "01").rows[0]
    assert row["verdict"] == "holds in direction"
    assert "“holds”" in row["note"]


def test_the_table_shows_figures_verdict_and_symbol_and_escapes_html():
    measurement = Measurement("F1.attn_rank", 0.515, (0.49, 0.54), "<30 layers>", "a & b")
    table = claims.compare([measurement], "01")
    shown = table._repr_html_()
    for part in ("≈ 60 %", "51.5 %", "49.0 %", "✔ holds", "&lt;30 layers&gt;", "a &amp; b"):
        assert part in shown
    assert "<30" not in shown
    assert "51.5 % [49.0 %, 54.0 %]" in str(table)


def test_markdown_says_where_an_interval_reaches_into_another_verdict():
    certain, doubtful = (
        Measurement("F6.fvu", -0.1, (-0.2, -0.05)),
        Measurement("F10.better_dead", 0.0, (-1, 1)),
    )
    lines = claims.compare([certain, doubtful], "05").markdown().splitlines()
    assert "reaches into" not in lines[2]
    assert "✔ holds (interval reaches into “holds in direction / does not hold”)" in lines[3]


def test_compare_writes_for_the_scorecard_and_collect_reads_it_back(tmp_path, monkeypatch):
    monkeypatch.setenv("SAESUB_RESULTS", str(tmp_path / "new"))
    claims.compare([Measurement("F1.attn_rank", 0.515, (0.49, 0.54))], "01_low/rank")
    claims.compare([Measurement("F6.asi_dead", math.nan)], "05")
    assert [p.name for p in sorted((tmp_path / "new").iterdir())] == [
        "claims_01_low_rank.json",
        "claims_05.json",
    ]
    rows = claims.collect(tmp_path / "new")
    assert [(r["id"], r["value"]) for r in rows] == [("F1.attn_rank", 0.515), ("F6.asi_dead", None)]
    assert rows[0]["notebook"] == "01_low/rank"


def test_nothing_is_written_without_a_results_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("SAESUB_RESULTS", raising=False)
    monkeypatch.chdir(tmp_path)
    claims.compare([Measurement("F6.fvu", 0.0)], "05")
    assert list(tmp_path.iterdir()) == []


def test_scorecard_lists_every_claim_measured_or_not():
    rows = claims.compare([Measurement("F6.fvu", -0.01)], "05").rows
    table = claims.scorecard(rows)
    assert [r["id"] for r in table.rows] == list(paper_claims.load_claims())
    assert table.counts()["holds"] == 1
    assert table.counts()["not testable here"] == len(table.rows) - 1
    assert claims.scorecard(rows, whole=False).rows == rows


def test_damaged_and_missing_results_are_explained(tmp_path):
    with pytest.raises(SaesubError, match="no folder"):
        claims.collect(tmp_path / "none")
    (tmp_path / "claims_01.json").write_text("[{", encoding="utf-8")
    with pytest.raises(SaesubError, match="damaged"):
        claims.collect(tmp_path)
