"""Verdicts at and around every bound, the table, and the files the scorecard is made of."""

from __future__ import annotations

import html
import json
import math

import pytest

from saesub.errors import SaesubError
from saesub.reproduce import claims, claims_table, paper_claims
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
    if claim.direction.edges:
        assert claim.side == claim.direction, "what holds also has the claim's direction"


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


NONE = (-math.inf, math.inf)


def _claim(holds=NONE, direction=NONE):
    """A claim of these bounds."""
    bounds = {"holds": paper_claims.Bounds(*holds), "direction": paper_claims.Bounds(*direction)}
    return paper_claims.Claim("F6.made_up", "F6", "", "", "", "", None, **bounds)


RATIO = _claim(holds=(-math.inf, 0.1), direction=(-math.inf, 1))
RANK = _claim(holds=(0.45, 0.70), direction=(-math.inf, 0.80))
WITHIN = _claim(holds=(0.8, 1))


@pytest.mark.parametrize(
    ("claim", "value", "interval", "expected"),
    [
        (RATIO, 0.05, None, "holds"),
        (RATIO, 0.05, (0.01, 0.09), "holds"),
        (RATIO, 0.05, (0.01, 0.99), "holds"),
        (RATIO, 0.05, (0.01, 1), "mixed"),
        (RATIO, 0.05, (0.01, 1.2), "mixed"),
        (RATIO, 0.05, (-math.inf, 0.2), "holds"),
        (RATIO, 0.05, (0.01, math.inf), "mixed"),
        (RATIO, 0.1, None, "holds"),
        (RATIO, 0.5, (0.3, 0.9), "holds in direction"),
        (RATIO, 0.5, (0.05, 0.9), "holds in direction"),
        (RATIO, 0.5, (0.3, 1.1), "mixed"),
        (RATIO, 1, None, "holds in direction"),
        (RATIO, 1, (1, 1), "mixed"),
        (RATIO, 1.1, (0.3, 1.5), "does not hold"),
        (RATIO, 1.1, (1.05, 1.5), "does not hold"),
        (RATIO, 0.05, (math.nan, 2), "holds"),
        (RATIO, math.nan, (0.01, 0.09), "not testable here"),
        (RATIO, None, (0.01, 0.09), "not testable here"),
        (RANK, 0.50, (0.40, 0.75), "holds"),
        (RANK, 0.44, (0.30, 0.79), "holds in direction"),
        (RANK, 0.75, (0.60, 0.81), "mixed"),
        (RANK, 0.81, (0.60, 0.90), "does not hold"),
        (WITHIN, 0.9, (0.8, 1), "holds"),
        (WITHIN, 0.9, (0.79, 1), "mixed"),
        (WITHIN, 0.79, None, "does not hold"),
        (_claim(), 0.9, (0.8, 1), "not testable here"),
    ],
)
def test_a_verdict_takes_the_interval_into_account(claim, value, interval, expected):
    assert paper_claims.verdict(claim, value, interval) == expected


def test_holding_counts_as_the_claims_direction():
    claim = _claim(holds=(0.1, 0.4), direction=(0.2, math.inf))
    assert claim.side == paper_claims.Bounds(0.1, math.inf)
    assert paper_claims.verdict(claim, 0.15, (0.12, 0.3)) == "holds"


def test_all_findings_of_the_paper_are_there():
    of_paper = [c for c in paper_claims.load_claims().values() if not c.beyond_paper]
    names = [f"F{i}" for i in range(1, 13)]
    assert names == list(dict.fromkeys(c.finding for c in of_paper))
    assert names == [found.finding for found in claims.findings([])]


def test_an_unknown_claim_gets_near_names():
    with pytest.raises(SaesubError, match=r"F1\.attn_rank"):
        claims.compare([Measurement("F1.atn_rank", 0.5)], "01")


def test_repeated_claims_and_backward_intervals_are_refused():
    with pytest.raises(SaesubError, match=r"twice in notebook 05: F6\.fvu; keep"):
        claims.compare([Measurement("F6.fvu", 0.1), Measurement("F6.fvu", 0.2)], "05")
    in_one = [Measurement("F6.fvu", 0.1, regime="layer 12"), Measurement("F6.fvu", 0.1)]
    with pytest.raises(SaesubError, match=r"twice in notebook 05: F6\.fvu in layer 12; keep"):
        claims.compare([*in_one, in_one[0]], "05")
    with pytest.raises(SaesubError, match="backwards"):
        claims.compare([Measurement("F6.fvu", 0.1, (0.2, 0.1))], "05")


@pytest.mark.parametrize("record", ["abc1234", "main", "0123456789abcdefg"])
def test_a_record_that_is_no_commit_is_refused(record):
    with pytest.raises(SaesubError, match="no commit"):
        claims.compare([Measurement("F6.fvu", 0.1, record=record)], "05")


@pytest.mark.parametrize(
    ("claim", "value", "interval", "doubt"),
    [
        ("F1.attn_rank", 0.55, (0.5, 0.6), ""),
        ("F1.attn_rank", 0.55, None, ""),
        ("F1.attn_rank", 0.55, (0.5, 0.72), "interval reaches into “holds in direction”"),
        ("F1.attn_rank", 0.55, (0.5, 0.9), "the interval does not lie wholly on the claim's side"),
        ("F1.attn_rank", 0.85, (0.75, 0.9), "interval reaches into “holds in direction”"),
        ("F2.gap", 0.05, (0.01, 0.5), "interval reaches into “holds”"),
        ("F2.gap", 0.05, None, "without an interval"),
        ("F12.quality", 0.05, (0.01, 0.5), ""),
    ],
)
def test_what_else_an_interval_allows_is_said(claim, value, interval, doubt):
    table = claims.compare([Measurement(claim, value, interval, note="one layer")], "01")
    (row,) = table.rows
    assert (row["note"], row["doubt"]) == ("one layer", doubt)
    shown = "; ".join(filter(None, ["one layer", doubt]))
    assert html.escape(shown) in table._repr_html_()
    assert (f"({doubt})" in table.markdown()) == bool(doubt)


def test_too_few_data_leave_the_value_without_a_verdict():
    reason = "150 mean firings a feature, a verdict needs 200"
    table = claims.compare([Measurement("F6.asi_dead", 0.004, (0.001, 0.2), untested=reason)], "05")
    assert table.rows[0]["verdict"] == "not testable here"
    for shown in (table._repr_html_(), " ".join(str(table).split()), table.markdown()):
        assert "0.40 % [0.10, 20.0]" in shown
        assert "not testable here" in shown
        assert reason in shown
    assert claims.scorecard(table.rows, whole=False).rows == table.rows


def test_one_claim_has_a_row_for_each_regime():
    narrow, wide = "8,192 <features> | k 32", "32,768 features"
    table = claims.compare(
        [
            Measurement("F6.asi_dead", 0.004, regime=narrow),
            Measurement("F6.asi_dead", 0.2, regime=wide, record="0123456789abcdef"),
        ],
        "05",
    )
    assert [(row["regime"], row["verdict"]) for row in table.rows] == [
        (narrow, "holds"),
        (wide, "does not hold"),
    ]
    assert narrow in str(table)
    shown = table._repr_html_()
    assert "<small>8,192 &lt;features&gt; | k 32</small>" in shown
    assert "<small>record 012345678</small>" in shown
    _, _, first, second = table.markdown().splitlines()
    assert "| 0.40 %<br><small>8,192 &lt;features&gt; \\| k 32</small> |" in first
    assert "does not hold<br><small>record 012345678</small> |" in second
    assert claims.scorecard(table.rows, whole=False).rows == table.rows


def test_a_table_shows_the_commit_of_the_bounds_and_whether_the_record_is_older():
    (row,) = claims.compare([Measurement("F6.fvu", -0.1, record="0123456789")], "05").rows
    row |= {"bound": "abcdef012"}
    for younger, end in [(False, ""), (True, "; bound set after the record")]:
        table = claims_table.ClaimsTable([row | {"bound_is_younger": younger}])
        told = f"bound abcdef012, record 012345678{end}"
        assert f"<small>{told}</small>" in table._repr_html_()
        assert f"<small>{told}</small>" in table.markdown()
        assert f"· {told}" in str(table)


def test_the_table_shows_figures_verdict_and_symbol_and_escapes_html():
    measurement = Measurement("F1.attn_rank", 0.515, (0.49, 0.54), "<30 layers>", "a & b")
    table = claims.compare([measurement], "01")
    shown = table._repr_html_()
    assert "<small>&lt;30 layers&gt;</small>" in table.markdown()
    assert "<small>a &amp; b</small>" in table.markdown()
    for part in ("≈ 60 %", "51.5 % [49.0, 54.0]", "✔ holds", "&lt;30 layers&gt;", "a &amp; b"):
        assert part in shown
    assert "<30" not in shown
    assert "51.5 % [49.0, 54.0]" in str(table)


def test_a_note_breaks_no_table_and_makes_no_link():
    note = "one |\ntwo [three](https://example.org)"
    lines = claims.compare([Measurement("F1.attn_rank", 0.5, note=note)], "01").markdown()
    assert lines.splitlines()[2].count("one \\| two [three]\\(https://example.org)") == 1
    assert len(lines.splitlines()) == 3


def test_markdown_says_where_an_interval_leaves_the_claim_open():
    certain, doubtful = (
        Measurement("F6.fvu", -0.1, (-0.2, -0.05)),
        Measurement("F10.better_dead", 0.0, (-1, 1)),
    )
    lines = claims.compare([certain, doubtful], "05").markdown().splitlines()
    assert "reaches into" not in lines[2]
    assert "≈ mixed (the interval does not lie wholly on the claim's side)" in lines[3]


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


def _rows(*verdicts, claim="F4.z_rank_gap"):
    (row,) = claims.compare([Measurement(claim, 0.2)], "02").rows
    return [row | {"verdict": verdict} for verdict in verdicts]


@pytest.mark.parametrize(
    ("verdicts", "expected", "tally"),
    [
        (["holds", "holds"], "holds", "2 ✔"),
        (["holds", "not testable here"], "holds", "1 ✔, 1 –"),
        (["holds in direction"], "holds in direction", "1 ↗"),
        (["holds in direction", "holds"], "holds in direction", "1 ✔, 1 ↗"),
        (["does not hold", "does not hold"], "does not hold", "2 ✘"),
        (["does not hold", "not testable here"], "does not hold", "1 ✘, 1 –"),
        (["does not hold", "holds"], "mixed", "1 ✔, 1 ✘"),
        (["does not hold", "holds in direction"], "mixed", "1 ↗, 1 ✘"),
        (["mixed"], "mixed", "1 ≈"),
        (["mixed", "does not hold"], "mixed", "1 ≈, 1 ✘"),
        (["mixed", "holds"], "mixed", "1 ✔, 1 ≈"),
        (["not testable here"], "not testable here", "1 –"),
        ([], "not testable here", ""),
    ],
)
def test_a_finding_has_one_verdict(verdicts, expected, tally):
    found = claims.findings(_rows(*verdicts))
    assert [of.finding for of in found] == [f"F{i}" for i in range(1, 13)]
    assert (found[3].verdict, found[3].tally) == (expected, tally)
    assert {of.verdict for of in found if of.finding != "F4"} == {"not testable here"}
    assert str(found[3]) == f"F4: {expected}" + f" ({tally})" * bool(tally)


def test_what_goes_beyond_the_paper_does_not_count_in_a_finding():
    rows = _rows("holds", claim="F7.half") + _rows("does not hold", claim="F7.auto")
    assert claims.findings(rows)[6] == ("F7", "holds", {"holds": 1})
    assert not paper_claims.find("F3.families").beyond_paper


def test_the_last_notebook_of_a_regime_is_shown_and_every_regime_has_a_row():
    early, late = (
        claims.compare([Measurement("F6.fvu", value, regime="wide")], notebook).rows
        for value, notebook in [(0.1, "05"), (-0.1, "06")]
    )
    other = claims.compare([Measurement("F6.fvu", 0.2, regime="narrow")], "05").rows
    shown = claims.scorecard([*late, *early, *other], whole=False).rows
    assert [(r["regime"], r["notebook"], r["verdict"]) for r in shown] == [
        ("wide", "06", "holds"),
        ("narrow", "05", "does not hold"),
    ]


def test_the_tour_does_not_count_in_the_scorecard():
    tour = claims.compare([Measurement("F6.fvu", 0.1, regime="few layers")], "00").rows
    later = claims.compare([Measurement("F6.fvu", -0.1, regime="all layers")], "05").rows
    shown = claims.scorecard([*tour, *later], whole=False).rows
    assert [row["notebook"] for row in shown] == ["05"]
    assert not claims.scorecard(tour, whole=False).rows


def test_the_scorecard_judges_by_todays_bounds_and_texts():
    (row,) = claims.compare([Measurement("F6.fvu", 0.1)], "05").rows
    old = row | {"verdict": "holds", "claim": "an older text", "doubt": "an older doubt"}
    assert claims.scorecard([old], whole=False).rows == [row]


def test_records_without_the_later_keys_are_read(tmp_path):
    (row,) = claims.compare([Measurement("F6.fvu", -0.1, (-0.2, -0.05), "3 seeds", "so")], "5").rows
    later = ("regime", "record", "untested", "doubt")
    old = {key: value for key, value in row.items() if key not in later}
    (tmp_path / "claims_5.json").write_text(json.dumps([old]), encoding="utf-8")
    assert claims.collect(tmp_path) == [old]
    assert claims.scorecard([old], whole=False).rows == [row]
    assert claims_table.html_row(old) == claims_table.html_row(row)
    (tmp_path / "claims_5.json").write_text(json.dumps([row | {"regime": 3}]), encoding="utf-8")
    with pytest.raises(SaesubError, match="damaged"):
        claims.collect(tmp_path)


def test_damaged_and_missing_results_are_explained(tmp_path):
    with pytest.raises(SaesubError, match="no folder"):
        claims.collect(tmp_path / "none")
    (tmp_path / "claims_01.json").write_text("[{", encoding="utf-8")
    with pytest.raises(SaesubError, match="damaged"):
        claims.collect(tmp_path)
