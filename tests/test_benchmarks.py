"""The README's table of speeds is the one that the committed records make."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))


def test_the_readme_shows_the_committed_records():
    readme = (ROOT / "README.md").read_text()
    block = report["readme_block"](RESULTS)
    assert "saesub-native-adam" in block
    assert report["with_block"](readme, block) == readme
    assert (RESULTS / "README.md").read_text().endswith(report["markdown_table"](RESULTS))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("b*-d*.json")), ids=lambda p: p.stem)
def test_every_record_says_how_it_was_made(path):
    record = json.loads(path.read_text())
    assert {"processor", "cores"} <= set(record["machine"])
    for run in record["runs"]:
        assert run["command"].startswith("python benchmarks/contenders/")
        assert run["commit"]
        assert run["date"]
        assert ("error" in run) != (len(run.get("seconds", [])) > 0)


def test_the_recorded_recall_is_what_the_benchmarks_readme_says():
    record = json.loads((RESULTS / "recall.json").read_text())
    assert {row["hook"].split("_", 1)[1] for row in record["rows"]} == {
        "attn_out",
        "mlp_out",
        "resid_post",
    }
    assert {row["search"] for row in record["rows"]} == {"native", "torch"}
    assert all(row["entries"] > 100_000 and row["lost"] == 0 for row in record["rows"])


def test_a_passes_ratios_are_those_within_each_round():
    seconds = {"bare": [1.0, 2.0, 4.0], "harvest": [2.0, 2.0, 6.0]}
    assert report["_ratios"](seconds, "harvest") == "1.50 [1.00, 2.00]"


def test_what_did_not_fit_is_told_from_what_failed_otherwise(tmp_path):
    errors = {
        "sparsify": "RuntimeError: [...] can't allocate memory: 8",
        "llamascopium": "KeyError",
    }
    runs = [{"contender": name, "round": 0, "error": error} for name, error in errors.items()]
    runs.append(
        {"contender": "sae-lens", "round": 0, "seconds": [1.0], "peak_bytes": {"absolute": 1}}
    )
    record = {"settings": {"batch": 2048, "d_sae": 4608}, "runs": runs}
    (tmp_path / "b2048-d4608.json").write_text(json.dumps(record))
    lines = report["_times"](tmp_path, 2048).splitlines()
    assert lines[-3:] == [
        "| sae-lens | ? | 1.00 s (1×) |",
        "| llamascopium | ? | failed |",
        "| sparsify | ? | no memory |",
    ]


def test_one_thread_is_compared_with_all_at_the_same_cell(tmp_path):
    def record(folder, d_sae, seconds):
        runs = [{"contender": "saesub-torch-adam", "round": 0, "seconds": seconds}]
        settings = {"batch": 2048, "d_sae": d_sae}
        folder.mkdir(exist_ok=True)
        path = folder / f"b2048-d{d_sae}.json"
        path.write_text(json.dumps({"settings": settings, "runs": runs}))

    record(tmp_path, 4608, [9.0])
    record(tmp_path, 36_864, [1.0, 2.0, 9.0])
    record(tmp_path / "one-thread", 36_864, [3.0])
    told = "2,048 tokens at d_sae 36,864: saesub-torch-adam 1.50."
    assert report["_one_thread"](tmp_path).endswith(told)
