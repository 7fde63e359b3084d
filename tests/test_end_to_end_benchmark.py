"""The end-to-end benchmark runs, and refuses what is no training of an SAE."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import tiny_gpt2, tiny_texts, tiny_tokenizer

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
STEPS, BATCH, HELD_OUT = 30, 256, 512


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    """saesub, and SAELens' runner, on a tiny model and text."""
    folder = tmp_path_factory.mktemp("job")
    tiny_gpt2().save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts(900)))
    settings = {"steps": STEPS, "batch": BATCH, "held_out": HELD_OUT, "context": 64}
    settings |= {"widths": 256, "layer": 1, "k": 16, "threads": 1}
    command = [sys.executable, BENCHMARKS / "end_to_end.py", "--models", folder / "tiny"]
    command += ["--corpus", texts, "--results", folder / "results"]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", value]
    command += ["--only", "saesub-two", "sae-lens"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "results").glob("*.json")
    assert path.name == f"tiny-d256-s{STEPS}.json"
    return json.loads(path.read_text())


def test_both_do_the_whole_job(record):
    two, one = record["runs"]
    assert "error" not in two, two
    assert "error" not in one, one
    assert two["tokens_trained"] == 2 * STEPS * BATCH == 2 * one["tokens_trained"]
    assert [len(two["same_tokens"]), len(one["same_tokens"])] == [2, 1]
    for run in record["runs"]:
        assert run["seconds"] == pytest.approx(sum(run["parts"].values()))
        assert all(seconds > 0 for seconds in run["parts"].values())
        assert {"start", "load", "activations", "training", "judging"} <= set(run["parts"])
        assert "--started" not in run["command"]


def test_saesub_judges_the_tokens_that_judge_all(record):
    """So that its harvest and the prepared activations are of the same text, cut alike."""
    for own, shared in zip(
        record["runs"][0]["judged"], record["runs"][0]["same_tokens"], strict=True
    ):
        assert own == pytest.approx(shared, rel=1e-4)


@pytest.fixture(scope="module")
def benchmark() -> dict:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return runpy.run_path(str(BENCHMARKS / "end_to_end.py"))
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("fvus", "n_tokens", "told"),
    [
        ([0.3], 100, ""),
        ([0.3, 0.4], 200, ""),
        ([0.3, 0.4], 100, "trained on 100 tokens, not 100 for each SAE"),
        ([0.3], 90, "trained on 90 tokens, not 100 for each SAE"),
        ([0.3, 1.1], 200, "an FVU of 1.1 is not of a trained SAE"),
        ([float("nan")], 100, "an FVU of nan is not of a trained SAE"),
        ([0.0], 100, "an FVU of 0 is not of a trained SAE"),
    ],
)
def test_what_did_not_train_is_a_failure(benchmark, fvus, n_tokens, told):
    outcome = {"tokens_trained": n_tokens, "same_tokens": [{"fvu": fvu} for fvu in fvus]}
    assert benchmark["implausible"](outcome, 100) == told


def test_cells_are_the_combinations_of_what_was_named(benchmark):
    first, cells = benchmark["CELLS"][0], benchmark["_cells"]
    assert cells((None, [10, 20], None)) == [(first[0], 10, first[2]), (first[0], 20, first[2])]
