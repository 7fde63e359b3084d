"""The pages of findings and the README's summary: their verdicts, rows, ranges, and sentences."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import nbformat
import numpy as np
import pytest
from scipy.stats import spearmanr

from saesub.evaluation import protocol
from saesub.reproduce import claims, claims_table, paper_claims, studies

ROOT = Path(__file__).resolve().parent.parent
publish = runpy.run_path(str(ROOT / "notebooks" / "publish.py"))
RECORDS = publish["read_records"]()
FULL = RECORDS["full"]
ROWS = [row for recorded in FULL.values() for row in recorded["claims"]]
BOUNDS = json.loads(publish["BOUNDS_FILE"].read_text())
FINDINGS = publish["FINDING_PAGES"]


def _measured(*given, notebook="05", regime="", n="here"):
    """Rows of claims with these values."""
    measured = [claims.Measurement(claim, value, n=n, regime=regime) for claim, value in given]
    return claims.compare(measured, notebook).rows


def _summary(rows):
    return FINDINGS["summary"]([row | {"bound_is_younger": False} for row in rows]).splitlines()


def _line(rows, finding):
    """The cells of a finding's line, the summary being made of these rows alone."""
    (line,) = (line for line in _summary(rows) if line.startswith(f"| [{finding} ·"))
    return line.removeprefix("| ").removesuffix(" |").split(" | ")[1:]


def _page(name, rows, bounds):
    record = {"05_x": {"claims": rows}}
    (text,) = (t for path, t in FINDINGS["texts"](record, bounds).items() if path.stem == name)
    return text


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.2], "✔ holds: 1 ✔"),
        ([0.2, 0.001], "✔ holds: 2 ✔"),
        ([0.2, 0.05], "↗ holds in direction: 1 ✔, 1 ↗"),
        ([0.2, 0.5], "≈ mixed: 1 ✔, 1 ✘"),
        ([0.1], "↗ holds in direction: 1 ↗"),
        ([-0.1, 0.5], "✘ does not hold: 2 ✘"),
        ([], "– not testable here: "),
    ],
)
def test_a_findings_verdict_is_that_of_its_recorded_claims(values, told):
    rows = _measured(*zip(["F4.z_rank_gap", "F4.identity"], values, strict=False))
    of_finding = [
        c for c in paper_claims.load_claims().values() if c.finding == "F4" and not c.beyond_paper
    ]
    unmeasured = f"{len(of_finding) - len(values)} –"
    *_, verdict = _line(rows, "F4")
    assert verdict == (f"{told}, " if values else told) + unmeasured


def test_the_summary_has_the_range_over_regimes_and_the_page_a_row_for_each():
    dead = ("F6.baseline_dead", "F6.asi_dead")
    rows = _measured(*zip(dead, (0.1, 0.005), strict=True), regime="layer 12, <narrow|>")
    rows += _measured(*zip(dead, (0.5, 0.25), strict=True), regime="layer 12, wide")
    quantity, paper, here, verdict = _line(rows, "F6")
    assert quantity == "share dead with ASI; divided by that with random directions"
    assert paper == "< 1 %; ≈ 0.0115"
    assert here == "0.50 to 25.0 % (2); not measured"
    assert verdict.startswith("≈ mixed: 2 ✔, 1 ↗, 1 ✘, ")
    page = _page("F6", rows, BOUNDS)
    assert (
        "| layer 12, &lt;narrow\\|&gt;<br><small>here</small> | 0.50 % | ✔ holds | <small>" in page
    )
    assert "| layer 12, wide<br><small>here</small> | 25.0 % | ✘ does not hold | <small>" in page


def test_the_summary_leaves_out_what_has_no_verdict():
    rows = _measured(("F5.correlation", -0.5), regime="one")
    untested = claims.Measurement("F5.correlation", -0.9, regime="other", untested="too few layers")
    assert _line(rows + claims.compare([untested], "04").rows, "F5")[2] == "-0.5 (1)"
    assert _line([], "F5")[2:] == ["not measured", "– not testable here: 7 –"]


def test_a_page_says_what_is_measured_and_within_which_ranges():
    values = {"F6.asi_dead": 0.5, "F2.gap": 0.15, "F10.auxk": -0.1, "F1.mlp_rank": 1}
    rows = _measured(*values.items())
    told = {
        "F6": "`F6.asi_dead`: share dead. The paper: &lt; 1 %.\n\nRanges: ✔ at most 1.0 %, ↗",
        "F2": "The paper: 21.4 points.\n\nRanges: ✔ 10.0 to 40.0 points, ↗ at least 0.0 ",
        "F10": "The paper: below.\n\nRanges: ✔ at most 0.0 points. Notebook 05.",
        "F1": "Ranges: ✔ 80.0 to 100.0 %, ↗ at least 70.0 %. Notebook 05.",
        "F7": "`F7.auto`",
    }
    for name, text in told.items():
        assert text in _page(name, rows, BOUNDS)
    assert "*Beyond the paper.*" in _page("F7", rows, BOUNDS).split("`F7.auto`")[1]


@pytest.mark.parametrize(
    ("regime", "other"),
    [
        ("4,096 features, each at its own best rate: 0.002", False),
        ("Adam at its best rate", False),
        ("each at the lowest rate that fits equally well: 0.001", True),
        ("8,192 features, Adam, at equal FVU", True),
        ("L0 32, both at the rate 0.004", True),
        ("at random's best rate", True),
    ],
)
def test_a_page_counts_the_rows_at_other_rates_and_those_bounded_late(regime, other):
    rows = _measured(("F6.fvu", -0.1), regime=regime) + _measured(("F6.fvu", -0.2), regime="plain")
    bounds = BOUNDS | {"runs": {"05_x": "a" * 9}, "first_runs": {}}
    page = _page("F6", rows, bounds)
    n = len(re.findall(r"^\| .*<small>bound", page, re.M))
    assert (f" 1 of {n} rows take other rates than each condition's own best." in page) == other
    commit = bounds["claims"]["F6.fvu"]["commit"]
    assert "were set after their record" not in page
    older = bounds["older_records"] | {commit: ["a" * 9]}
    page = _page("F6", rows, bounds | {"older_records": older})
    same = [row for row in claims.scorecard(rows).rows if row["finding"] == "F6"]
    of_commit = [r for r in same if bounds["claims"].get(r["id"], {}).get("commit") == commit]
    measured = [row for row in of_commit if row["value"] is not None]
    assert f" The bounds of {len(measured)} of {n} rows were set after their record." in page


def test_a_share_is_in_per_cent_and_a_difference_of_two_in_points():
    shown = {"": [], "%": [], "points": []}
    for claim in paper_claims.load_claims().values():
        shown[claim.shown_in].append(claim.id)
        assert bool(claim.shown_in) == claim.unit.startswith("share")
    (row,) = _measured(("F10.auxk", -0.036))
    assert claims_table.number(row, -0.036) == "-3.6 points"
    assert claims_table.number(row, -0.00001) == "0.00 points"
    (row,) = _measured(("B3.worst", 0.03))  # a ratio minus 1
    assert claims_table.number(row, 0.03) == "3.0 %"
    (row,) = _measured(("F6.fvu", -0.0035))
    assert claims_table.number(row, -0.0035) == "-0.0035"
    assert len(shown["points"]) == 20


def test_what_goes_beyond_the_paper_is_no_verdict_on_the_papers_finding():
    *_, verdict = _line(_measured(("F7.smooth", 0.1), ("F7.auto", 0.5)), "F7")
    assert "✘" not in verdict


def test_findings_are_counted_by_verdict_above_their_table():
    rows = _measured(("F4.z_rank_gap", 0.2), ("F9.best", 0.5), ("F5.correlation", -0.2))
    assert _summary(rows)[0] == (
        "Of the paper's 12 findings: holds 1, holds in direction 1, does not hold 1, "
        "not testable here 9. Of all 3 rows with a verdict, 0 have bounds that were set after "
        "their record; the pages mark them."
    )
    lines = FINDINGS["verdicts"](rows).splitlines()
    assert len(lines) == 2 + 12 + 5
    assert re.match(
        r"\| \[F9 · .*\]\(findings/F9.md\) \| .* \| ✘ does not hold \| 1 ✘, ", lines[2 + 8]
    )
    judged = {found.finding: found for found in claims.findings(claims.scorecard(ROWS).rows)}
    for line in FINDINGS["verdicts"](ROWS).splitlines()[2 : 2 + 12]:
        name, tally = line.removeprefix("| [").split(" ")[0], line.split(" | ")[3]
        assert tally.removesuffix(" |") == judged[name].tally


def test_every_finding_has_its_page_with_all_of_its_rows():
    texts = publish["finding_pages"](RECORDS)
    assert {path.stem for path in texts} == {c.finding for c in paper_claims.load_claims().values()}
    assert set(texts) == set(FINDINGS["FOLDER"].glob("*.md"))
    shown = "".join(texts.values())
    rows = re.findall(r"^\| .*<small>bound", shown, re.M)
    assert len(rows) == len(claims.scorecard(ROWS).rows)
    told = "run `python notebooks/publish.py --pages`"
    assert all(path.read_text() == text for path, text in texts.items()), told


def test_a_findings_figure_is_one_that_its_notebook_shows():
    for finding in FINDINGS["known"]():
        name, number = finding.figure.rsplit("-", 1)
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        outputs = [out for c in notebook.cells if c.cell_type == "code" for out in c.outputs]
        assert sum("image/png" in out.get("data", {}) for out in outputs) >= int(number)
        notebooks = {row["notebook"] for row in ROWS if row["finding"] == finding.finding}
        assert name.split("_")[0] in notebooks


def test_the_pages_of_findings_show_the_commits_of_bounds_and_records():
    rows = _measured(("F6.fvu", -0.1)) + [
        row | {"record": "b" * 40} for row in _measured(("F9.best", 0.001))
    ]
    bounds = {
        "claims": {"F6.fvu": {"commit": "c" * 9, "date": ""}},
        "older_records": {"c" * 9: ["a" * 9]},
        "runs": {"05_x": "a" * 9},
        "first_runs": {},
    }
    pages = [_page(name, rows, bounds) for name in ("F1", "F6", "F9")]
    claim = re.compile(r"^`(.*?)`.*?<small>(bound [^<]*)</small> \|$", re.M | re.DOTALL)
    told = dict(found for page in pages for found in claim.findall(page))
    assert told["F6.fvu"] == "bound ccccccccc, record aaaaaaaaa; bound set after the record"
    assert told["F9.best"] == ("bound not committed, record bbbbbbbbb; bound set after the record")
    assert told["F1.attn_rank"] == "bound not committed"
    bounds["older_records"]["c" * 9] = []
    page = _page("F6", rows, bounds)
    assert "<small>bound ccccccccc, record aaaaaaaaa</small>" in page
    # Another run does not make the bound older than the value.
    bounds["older_records"]["c" * 9] = ["d" * 9]
    bounds["first_runs"] = {"F6.fvu": "d" * 9}
    page = _page("F6", rows, bounds)
    assert "bound ccccccccc, record aaaaaaaaa; bound set after the record" in page


def test_a_gaussian_matrix_makes_most_of_the_fall_as_its_page_says():
    (note,) = {
        row["note"]
        for recorded in FULL.values()
        for row in recorded["claims"]
        if row["id"] == "F4.below_gaussian"
    }
    (share,) = re.findall(r"makes (\d+)% of the fall", note)
    assert 50 < int(share) < 100


def test_without_attention_outputs_no_order_is_seen_as_its_page_says():
    """No order of rank and dead features over layers, at the rate with three seeds."""
    rows = studies.recorded("sites").rows
    rows = rows[(rows["lr"] == rows["lr"].max()) & ~rows["hook_name"].str.endswith("attn_out")]
    means = rows.groupby("hook_name")[["rank", "dead_share"]].mean()
    layers = [of.to_numpy() for _, of in means.groupby(means.index.str.split(".").str[1])]
    assert [len(of) for of in layers] == [2] * 10
    found = protocol.bootstrap(lambda of: spearmanr(np.concatenate(of)).statistic, layers, n=500)
    assert found.low < 0 < found.high


def test_sparse_adam_alone_loses_under_1_percent_in_the_widest_dictionary_only():
    rows = publish["cure_rows"]()
    rows = rows[rows["best"] & (rows["condition"] == "random + SparseAdam")]
    dead = rows.groupby(["hook_name", "d_sae"])["dead_share"].mean()
    assert dead[publish["SHOWN_HOOK"], 8192] < 0.01 < dead[publish["SHOWN_HOOK"], 4096]


def _values(claim, *, regime=""):
    rows = claims.scorecard(ROWS).rows
    found = [row["value"] for row in rows if row["id"] == claim and regime in row["regime"]]
    assert found
    return found


def _judged(claim):
    return {row["verdict"] for row in claims.scorecard(ROWS).rows if row["id"] == claim}


def _below(claim, most, **where):
    return all(value < most for value in _values(claim, **where))


def _around(claim, middle):
    return min(_values(claim)) < middle < max(_values(claim))


def _note(claim, regime):
    (note,) = {row["note"] for row in ROWS if row["id"] == claim and regime in row["regime"]}
    return note


def _at_0001(note):
    """How many more features random directions leave dead than ASI, both at the rate 0.001."""
    asi, random = re.search(r"both at 0.001: ASI ([\d.]+)%, random ([\d.]+)%", note).groups()
    return abs(float(random) - float(asi)) / 100


def _includes_zero_with_refit():
    (row,) = (r for r in ROWS if r["id"] == "B2.fvu" and "recipe's refit" in r["regime"])
    return row["interval"][0] < 0 < row["interval"][1]


def _includes(claim, value):
    rows = [row for row in claims.scorecard(ROWS).rows if row["id"] == claim]
    return all(row["interval"][0] < value < row["interval"][1] for row in rows)


HOLDS, DIRECTION, FAILS = paper_claims.HOLDS, paper_claims.DIRECTION, paper_claims.FAILS
BEST = "each at its own best rate"
SAID = {
    "F1": lambda: [
        all(0.4 < value < 0.6 for value in _values("F1.attn_rank")),
        min(_values("F1.mlp_rank") + _values("F1.resid_rank")) > 0.7,
        min(_values("F1.attn_below_mlp") + _values("F1.attn_below_resid")) > 0.9,
    ],
    "F2": lambda: [
        min(_values("F2.gap")) > 0,
        _below("F2.attn_components", 0.747 / 2),
        _below("F2.mlp_components", 0.961 / 1.5),
        max(_values("F2.attn_components")) > 2 * min(_values("F2.attn_components")),
    ],
    "F3": lambda: [
        _values("F3.families", regime="before any post-norm") == [0],
        _values("F3.families", regime="after any post-norm") == [1],
        _judged("F3.spread") == {HOLDS},
        _note("F3.families", "before any post-norm").count("100% in") == 2,
    ],
    "F4": lambda: [
        _values("F4.z_above_out") == [1],
        _values("F4.below_gaussian") == [1],
        _below("F4.below_same_sigma", 0.6),
        min(_values("F4.heads_overlap")) > 0.5,
    ],
    "F5": lambda: [
        _below("F5.correlation", 0),
        min(_values("F5.mixed")) > 0,
        min(_values("F5.impose")) > 0,
        _judged("F5.within") == {paper_claims.UNTESTED},
    ],
    "F6": lambda: [
        _below("F6.reduction", 1),
        sum(value >= 0.01 for value in _values("F6.asi_dead", regime=BEST)) == 4,
        _below("F6.reduction", 0.1, regime="8,192 features, Adam, at equal FVU"),
        _below("F6.reduction", 0.1, regime="8,192 features, Adam, each at the lowest"),
        _below("F6.fvu", 0),
        _at_0001(_note("F6.reduction", "layer 0")) < 0.02,
    ],
    "F7": lambda: [
        _judged("F7.smooth") == {HOLDS},
        _judged("F7.edge") == {FAILS},
        _below("F7.half", 0.5),
        _judged("F7.auto") == {HOLDS},
    ],
    "F8": lambda: [
        _around("F8.width", 0),
        _below("F8.asi_fvu", 0),
        HOLDS not in _judged("F8.asi_gains"),
    ],
    "F9": lambda: [
        _below("F9.sparse_adam_random", 1),
        _below("F9.best", 0.01),
        _below("F9.momentum", 1),
        HOLDS not in _judged("F9.momentum"),
    ],
    "F10": lambda: [
        _below("F10.resampling", 0),
        _below("F10.auxk", 0, regime="the coefficient 1/32"),
        min(_values("F10.auxk", regime="leave the fewest dead")) > 0,
        _around("F10.sparse_adam", 0),
        min(_values("F10.sparse_adam", regime="8,192 features")) > 0,
        "AuxK +" in _note("F10.adds", "leave the fewest dead"),
        min(_values("F10.adds")) > 0.5,
    ],
    "F11": lambda: [
        _below("F11.batchtopk", 1),
        _below("F11.matryoshka", 1),
        _below("F11.lorsa", 1),
        _around("F11.jumprelu", 1),
        _around("F11.topk_transcoder", 1),
        _includes("F11.relu", 1),
        _includes("F11.transcoder", 1),
    ],
    "F12": lambda: [
        _judged("F12.behaviour") == {HOLDS},
        _below("F12.coherence", 0),
        _below("F12.stable", 1),
        _judged("F12.quality") == {paper_claims.UNTESTED},
    ],
    "B1": lambda: [
        min(_values("B1.offset")) > 2 * max(_values("B1.subspace")),
        _below("B1.both", 0),
    ],
    "B2": lambda: [
        min(_values("B2.fvu")) < 0,
        _includes_zero_with_refit(),
        min(_values("B2.longer_new") + _values("B2.longer_same")) > 0,
    ],
    "B3": lambda: [
        _values("B3.wins", regime="Qwen") == [1],
        0.9 < _values("B3.wins", regime="three models")[0] < 1,
        sum(_judged(f"B3.{of}") == {HOLDS, DIRECTION} for of in ("dead", "worst", "rate")) == 3,
    ],
    "B4": lambda: [
        min(_values("B4.overlap")) > 2,
        min(_values("B4.chance")) > 0.5,
        _below("B4.untrained", 0.5),
        _below("B4.tail", 1),
    ],
    "B5": lambda: [0.8 < _values("B5.forecast")[0] < 1],
}


@pytest.mark.parametrize("finding", FINDINGS["known"](), ids=lambda finding: finding.finding)
def test_what_a_page_says_that_came_out_is_what_the_records_have(finding):
    """data/findings.csv has these sentences; a new record that speaks against one fails here."""
    assert all(SAID[finding.finding]())
    assert finding.said
