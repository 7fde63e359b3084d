"""The end-to-end benchmark runs, and refuses what is no training of an SAE."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from tiny_model import tiny_gpt2, tiny_texts, tiny_tokenizer

from saesub.evaluation.held_out import judge

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
STEPS, BATCH, HELD_OUT = 30, 256, 512


def _script(name: str) -> dict:
    """The names of a script of the benchmarks, which imports others beside it."""
    path = BENCHMARKS / name
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        return runpy.run_path(str(path))


@pytest.fixture(scope="module")
def benchmark() -> dict:
    return _script("end_to_end.py")


@pytest.fixture(scope="module")
def report() -> dict:
    return _script("report_end_to_end.py")


@pytest.fixture(scope="module")
def whole() -> dict:
    return _script("contenders/whole.py")


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


def _write(folder: Path, d_sae: int, steps: int, **runs: dict) -> None:
    recipe = {"batch": 2048, "threads": 2, "held_out": 4096}
    record = {
        "settings": recipe | {"model": "tiny", "d_sae": d_sae, "steps": steps},
        "machine": {"processor": "EPYC", "cores": 2},
        "runs": [{"contender": name.replace("_", "-"), **run} for name, run in runs.items()],
    }
    (folder / "end-to-end").mkdir(exist_ok=True, parents=True)
    (folder / "end-to-end" / f"tiny-d{d_sae}-s{steps}.json").write_text(json.dumps(record))


def _timed(seconds: float, n_saes: int = 1, **parts: float) -> dict:
    saes = [{"fvu": 0.25, "dead_share": 0.125}] * n_saes
    parts = {"start": 1.0, "training": seconds - 1} | parts
    return {"parts": parts, "seconds": seconds, "same_tokens": saes, "peak_bytes": 2e9}


def test_the_report_shows_parts_and_what_each_is_compared_with(tmp_path, report):
    assert report["end_to_end"](tmp_path) == report["in_a_line"](tmp_path) == ""
    assert report["end_to_end_figure"](tmp_path) is None
    _write(tmp_path, 64, 2, saesub=_timed(10), saesub_two=_timed(20, 2), sae_lens=_timed(30))
    assert report["in_a_line"](tmp_path) == (
        "Text to a judged SAE (64 features, 4,096 tokens; EPYC; one run each): 3 × as fast as "
        "SAELens' runner."
    )
    failed = {"error": "KeyError: 'x'"}
    two = {"saesub_two": _timed(20, 2), "sae_lens_two": _timed(50, 2)}
    _write(tmp_path, 128, 2, sae_lens=_timed(40), saesub=_timed(10), sparsify=failed, **two)
    assert report["in_a_line"](tmp_path) == (
        "Text to a judged SAE (128 features, 4,096 tokens; EPYC; one run each): 4 × as fast as "
        "SAELens' runner, 2.5 × for two SAEs from one harvest. In smaller runs at least 3 ×."
    )
    lines = report["end_to_end"](tmp_path).splitlines()
    assert "of 128 features on 4,096 tokens of tiny" in lines[8]
    assert lines[12:17] == [
        "| sae-lens | 1.0 | – | – | – | 39.0 | – | 40 | 1× | 0.250 | 12.5% | 2.0 GB |",
        "| sae-lens-two | 1.0 | – | – | – | 49.0 | – | 50 | 1× | 0.250, 0.250 | 12.5%, 12.5% |"
        " 2.0 GB |",
        "| sparsify | | | | | | | failed | | | | |",
        "| saesub | 1.0 | – | – | – | 9.0 | – | 10 | 4× | 0.250 | 12.5% | 2.0 GB |",
        "| saesub-two | 1.0 | – | – | – | 19.0 | – | 20 | 2.5× | 0.250, 0.250 | 12.5%, 12.5% |"
        " 2.0 GB |",
    ]
    assert "noise" not in lines[-1]  # no harvest was timed
    again = {"saesub": _timed(10, activations=4.0), "saesub_two": _timed(20, 2, activations=5.0)}
    _write(tmp_path, 64, 2, sae_lens=_timed(30), **again)
    assert "by up to 25% in a cell" in report["end_to_end"](tmp_path)
    (panel,) = report["end_to_end_figure"](tmp_path).axes  # the number of tokens does not vary
    assert panel.get_xlabel() == "features (d_sae)"
    named = {text.get_text() for text in panel.texts}  # those that were run at both sizes
    assert named == {"sae-lens", "saesub", "saesub-two"}
    assert len(panel.lines) == len(named)


def test_the_clock_gives_each_second_to_one_part(whole, monkeypatch):
    times = iter([12.0, 15.0, 25.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    clock = whole["Clock"](10.0)
    clock.lap("load")
    clock.lap("training", of_which={"activations": 4.0})
    assert clock.parts == {"start": 2, "load": 3, "activations": 4, "training": 6}


def test_the_shared_judge_is_saesubs(whole):
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=64, k=4, decoder_init_norm=1.0))
    x = torch.randn(3000, 8) + 5

    def rebuild(block):
        features = sae.encode(block)
        return sae.decode(features), features.any(0).nonzero()

    found = whole["judge"]([x[:500], x[500:]], rebuild, 64)
    expected = judge(sae, x, n_tokens=3000, progress=False)
    dead = float((expected.counts == 0).float().mean())
    assert 0 < dead < 1
    assert found == pytest.approx({"fvu": expected.fvu, "dead_share": dead, "n_tokens": 3000})
