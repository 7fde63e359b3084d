"""The table of speeds in docs/ is the one that the committed records make."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from saesub.reproduce.report import processor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))
report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
sys.path.remove(str(ROOT / "benchmarks"))


def _name(record: Path) -> str:
    return record.relative_to(RESULTS).as_posix()


def test_the_pages_show_the_committed_records():
    shown = {"docs/speed.md": report["page_block"], "README.md": report["readme_block"]}
    for name, made in shown.items():
        page, block = (ROOT / name).read_text(), made(RESULTS)
        assert "SparseAdam" in block
        assert block in page
        assert report["with_block"](page, block) == page
    assert (RESULTS / "README.md").read_text().endswith(report["markdown_table"](RESULTS))


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("b*-d*.json")), ids=_name)
def test_every_record_says_how_it_was_made(path):
    record = json.loads(path.read_text())
    assert set(record["settings"]) == {"batch", "d_sae", "warm_up", "steps", "threads"}
    assert {"processor", "cores"} <= set(record["machine"])
    for run in record["runs"]:
        assert run["command"].startswith("python benchmarks/contenders/")
        assert run["commit"]
        assert run["date"]
        assert ("error" in run) != (len(run.get("seconds", [])) > 0)


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("one-thread/b*.json")), ids=_name)
def test_a_record_of_one_thread_has_its_match_of_two(path):
    one, two = (json.loads(p.read_text()) for p in (path, path.parent.parent / path.name))
    assert one["machine"] == two["machine"]
    assert one["settings"] == two["settings"] | {"threads": 1}


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


def test_a_pass_is_compared_with_its_products(tmp_path):
    seconds = {"bare": [6.0, 6.0], "plain": [5.0, 4.0], "products": [4.0, 4.0]}
    seconds["plain by MKL"] = [5.0, 6.0]
    seconds |= {"harvest": [6.0, 6.0], "spectra": [6.0, 6.0]}
    record = {
        "settings": {"layer": 12, "rounds": 2, "threads": 2},
        "machine": {"processor": "EPYC", "instructions": "AVX2"},
        "rows": [{"hooks": "attention output", "seconds": seconds}],
    }
    (tmp_path / "passes.json").write_text(json.dumps(record))
    assert report["_passes"](tmp_path).startswith(
        "The pass to the attention output of layer 12, without the bridge, takes as long as its "
        "matrix products alone in float32 times 1.12 [1.00, 1.25], and through the bridge 1.50 "
        "[1.50, 1.50]; the bridge's time is that without it times 1.35 [1.20, 1.50] (AVX2). On AMD "
        "processors saesub leaves linear layers to oneDNN: with torch's own, by MKL, as the "
        "products alone are here, the pass takes 1.25 [1.00, 1.50] times as long.\n\n"
    )


def test_what_the_subspace_loses_is_told(tmp_path):
    assert report["_subspace_recall"](tmp_path) == ""
    row = {"search": "compiled", "rank": 192, "recall": 0.99998}
    rows = [row, row | {"rank": 256, "recall": 1.0}, row | {"search": "torch", "recall": 0.9999}]
    settings = {"k": 32, "tokens": 614_400, "d_sae": 36_864, "entries": 131_072}
    record = {"settings": settings, "rows": rows}
    (tmp_path / "subspace_recall.json").write_text(json.dumps(record))
    said = report["_subspace_recall"](tmp_path)
    assert "compiled 0.999980 to 1.000000 (ranks 192 to 256); torch 0.999900 to 0.999900" in said
    assert said.endswith("One entry of the 131,072 is 8e-06.")


def test_how_far_training_in_the_subspace_is_from_exact_is_told(tmp_path):
    assert report["_subspace_curves"](tmp_path) == ""
    curves = {"exact": [[10, 2.0], [20, 1.0]]}
    curves |= {
        "in the subspace": [[10, 2.0], [20, 0.99]],
        "all coordinates": [[10, 2.002], [20, 1]],
    }
    settings = {"d_sae": 8192, "batch": 1024, "steps": 2000, "site": "mlp_out", "start": "random"}
    record = {"settings": settings, "ranks": [480, 544], "curves": curves}
    (tmp_path / "subspace_curves.json").write_text(json.dumps(record))
    said = report["_subspace_curves"](tmp_path)
    assert "at mlp_out, from a random start, of" in said
    assert "ranks 480 to 544) is never more than 1.00% from" in said
    assert said.endswith("never more than 0.10%. These two differ by at most 0.01 of the loss.")


def test_a_float16_store_is_compared_where_it_differs_most(tmp_path):
    def row(off: float) -> dict:
        saes = {
            "float32": [{"fvu": 0.5, "dead_share": 0.25}, {"fvu": 0.52, "dead_share": 0.2}],
            "float16": [{"fvu": 0.5, "dead_share": 0.25}, {"fvu": 0.52 - off, "dead_share": 0.3}],
        }
        rank = {"float32": 300, "float16": 301}
        return {"eigenvalues": off, "rank": rank, "basis_outside": off / 10, "saes": saes}

    settings = {"n_tokens": 2000, "d_sae": 4608, "steps": 120, "batch": 512}
    record = {"settings": settings, "rows": [row(0.001), row(0.003)]}
    assert report["_half_precision"](tmp_path) == ""
    (tmp_path / "half_precision.json").write_text(json.dumps(record))
    said = report["_half_precision"](tmp_path)
    assert "differs by more than 0.003 of itself, that rank is 301 and 300, 301 and 300" in said
    assert "at most 0.0003 of one's active subspace" in said
    assert "at most 0.003 in FVU and 0.1 in the share" in said
    assert said.endswith("two seeds by up to 0.02 and 0.05.")


EPYC = {"processor": "EPYC", "cores": 2, "memory_gb": 25, "system": "Linux"}


def _write(folder, d_sae, *runs, warm_up=2, machine=EPYC):
    settings = {"batch": 2048, "d_sae": d_sae, "steps": 1, "threads": 2, "warm_up": warm_up}
    record = {
        "settings": settings,
        "machine": machine,
        "runs": [{"round": 0} | run for run in runs],
    }
    folder.mkdir(exist_ok=True)
    (folder / f"b2048-d{d_sae}.json").write_text(json.dumps(record))


def _timed(contender, seconds, gigabytes=1, **more):
    measured = {"seconds": [seconds], "peak_bytes": gigabytes * 1e9, "d_in": 100}
    return {"contender": contender} | measured | more


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("RuntimeError: [...] DefaultCPUAllocator: can't allocate memory: 8", "no memory"),
        ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8 GiB", "no memory"),
        ("MemoryError", "no memory"),
        ("KeyError: 'memory_bytes'", "failed"),
    ],
)
def test_what_did_not_fit_is_told_from_what_failed_otherwise(tmp_path, error, told):
    """In the table, of a contender whose every round failed."""
    fallen = [{"contender": name, "error": error} for name in ("sparsify", "llamascopium")]
    well = [_timed("sae-lens", 1.0), _timed("llamascopium", 2.0, round=1)]
    _write(tmp_path, 4608, *fallen, *well)
    assert report["_times"](tmp_path, 2048).splitlines()[-3:] == [
        "| sae-lens | ? | 1.00 s (1×) |",
        "| llamascopium | ? | 2.00 s |",
        f"| sparsify | ? | {told} |",
    ]
    assert ("*No memory*" in report["_conditions"](tmp_path)) == (told == "no memory")


def test_the_widest_is_one_that_was_trained(tmp_path):
    _write(tmp_path / "none", 10, {"contender": "sparsify", "error": "x"})
    assert report["_widest"](tmp_path / "none") == ""
    _write(tmp_path, 1_000_000, _timed("sparsify", 4.0, 3), _timed("sae-lens", 2.0, 4))
    _write(tmp_path, 2_000_000, _timed("encoder-product", 1.0))
    assert report["_widest"](tmp_path) == (
        "At d_sae 1,000,000, 2,048 tokens per step: sae-lens 1,024 tokens per second, 4.0 GB; "
        "sparsify 512 tokens per second, 3.0 GB. "
        "Of each, 2.4 GB are the weights and Adam's two averages of them."
    )


def test_cells_of_fewer_rounds_are_named(tmp_path):
    _write(tmp_path, 10, _timed("sparsify", 1.0), _timed("sparsify", 1.0, round=1))
    assert report["_rounds"](tmp_path) == "2 rounds"
    _write(tmp_path, 20, _timed("sparsify", 1.0))
    assert report["_rounds"](tmp_path) == "2 rounds (1 at 2,048 × 20)"


def test_a_failure_is_told_by_its_exception_and_not_by_what_closed_after_it(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    last_word = runpy.run_path(str(ROOT / "benchmarks" / "run.py"))["_last_word"]
    lines = [
        "Traceback (most recent call last):",
        "torch.OutOfMemoryError: no room",
        "  0%|          | 1/9 [00:28<1155:52:14, 28.41s/it]",
        "Exception ignored in: <function tqdm.__del__ at 0x7f>",
    ]
    assert last_word("\n".join(lines)) == lines[1]
    assert last_word("one\nSegmentation fault\n") == "Segmentation fault"
    assert last_word("") == "no message"


@pytest.mark.parametrize(
    ("cpuinfo", "told"),
    [
        (
            "model name\t: EPYC\ncpu family\t: 25\nmodel\t\t: 17\n\n"
            "model name\t: other\ncpu family\t: 1\nmodel\t\t: 2\n",
            "EPYC (family 25, model 17)",
        ),
        ("processor\t: 0\nmodel name\t: Cortex: A76\n", "Cortex: A76"),
        ("processor\t: 0\n", "unknown processor"),
    ],
)
def test_records_tell_a_processors_generation(monkeypatch, cpuinfo, told):
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr("platform.processor", lambda: "")
    assert processor() == told


def test_one_thread_is_compared_with_all_at_the_same_cell(tmp_path):
    _write(tmp_path, 4608, _timed("saesub-torch-adam", 9.0))
    _write(tmp_path, 36_864, _timed("saesub-torch-adam", 2.0))
    _write(tmp_path / "one-thread", 36_864, _timed("saesub-torch-adam", 3.0))
    told = "2,048 tokens at d_sae 36,864: saesub-torch-adam 1.50."
    assert report["_one_thread"](tmp_path).endswith(told)

    trained = tmp_path / "trained"
    _write(trained, 36_864, _timed("saesub-torch-adam", 2.0), warm_up=300)
    _write(trained / "one-thread", 36_864, _timed("saesub-torch-adam", 3.5), warm_up=300)
    later = "After 300 steps of training, a step of 2,048 tokens at d_sae 36,864: saesub-torch-adam"
    assert report["_one_thread"](tmp_path).endswith(f"{told} {later} 1.75.")


def test_a_trained_step_is_compared_with_one_at_the_start(tmp_path):
    _write(tmp_path, 36_864, _timed("saesub-torch-adam", 2.0))
    assert report["_trained"](tmp_path) == ""
    _write(tmp_path / "trained", 36_864, _timed("saesub-torch-adam", 2.5), warm_up=300)
    assert report["_trained"](tmp_path) == (
        "Times as long after 300 steps of training as at the start, a step of 2,048 tokens at "
        "d_sae 36,864: saesub-torch-adam 1.25."
    )


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="getrusage says no better here")
def test_a_contenders_peak_memory_is_not_its_parents():
    held = bytearray(2 * 10**9)
    held[::4096] = b"x" * len(held[::4096])  # resident
    said = subprocess.run(
        [sys.executable, "-c", "import harness; print(harness.peak_bytes())"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "benchmarks" / "contenders")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 10**7 < int(said.stdout) < len(held) / 2


def test_a_record_is_of_one_machine_whatever_older_records_say_of_it(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    make = runpy.run_path(str(ROOT / "benchmarks" / "run.py"))["Record"]
    old = {"processor": "EPYC", "cores": 2}
    now, path = old | {"instructions": ["AVX2"]}, tmp_path / "new" / "b1-d2.json"
    make(path, {"batch": 1}, old).put("sparsify", 0, {"error": "no memory"})
    record = make(path, {"batch": 1}, now)
    assert not record.has("sparsify")
    record.put("sparsify", 0, {"seconds": [1.0]})
    again = make(path, {"batch": 1}, now)
    assert again.has("sparsify")
    assert not again.has("sparsify", 1)
    assert len(json.loads(path.read_text())["runs"]) == 1
    others = [old | {"cores": 4}, now | {"held_to": "avx2"}]
    for settings, about in [({"batch": 2}, now), *(({"batch": 1}, other) for other in others)]:
        with pytest.raises(SystemExit, match="pass other --results"):
            make(path, settings, about)
    held = tmp_path / "held.json"
    make(held, {}, others[1]).put("sparsify", 0, {})
    with pytest.raises(SystemExit, match="pass other --results"):
        make(held, {}, now)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", ["AVX2", "AVX-512", "AVX-512 VNNI"]),
        ("flags\t\t: fpu avx2 avx_vnni", ["AVX2", "AVX VNNI"]),
        ("Features\t: fp asimd asimddp", ["NEON", "NEON dot products"]),
        ("vendor_id\t: x", []),
    ],
)
def test_records_name_the_instruction_sets(monkeypatch, line, named):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    run = runpy.run_path(str(ROOT / "benchmarks" / "run.py"))
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: f"processor\t: 0\n{line}\n")
    assert run["instructions"]() == named


def test_what_was_not_held_is_no_record_of_it(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    run = runpy.run_path(str(ROOT / "benchmarks" / "run.py"))
    for used, told in [("AVX2", None), ("AVX512", "torch used AVX512 though held to avx2")]:
        outcome = {"seconds": [1.0], "cpu_capability": used}
        monkeypatch.setitem(run["process"].__globals__, "_outcome", lambda *_, o=outcome: o)
        contender = run["CONTENDERS"][0]
        found = run["process"](contender, Path("python"), [], 2, "avx2")
        assert found.get("error") == told


def test_each_kind_of_processor_has_a_table_of_its_own(tmp_path):
    held = EPYC | {"instructions": ["AVX2", "AVX-512 VNNI"], "held_to": "avx2"}
    fast = [_timed("sae-lens", 8.0), _timed("saesub-native-sparse_adam", 1.0)]
    more = [_timed("saesub-saelens-adam", 3.0), _timed("saesub-native-adam", 2.0)]
    slow = [_timed("sae-lens", 8.0), _timed("saesub-native-sparse_adam", 2.0)]
    _write(tmp_path, 10, *fast)
    assert report["_held_back"](tmp_path) == report["once_trained"](tmp_path) == ""
    _write(tmp_path / "avx2", 10, *slow, machine=held)
    _write(tmp_path / "in-saelens", 10, *fast, *more)
    _write(tmp_path / "in-saelens", 20, *fast, *more)
    block = report["page_block"](tmp_path)
    first, second = (line for line in block.splitlines() if line.startswith("Seconds per step"))
    assert first.endswith("on EPYC, AVX-512 VNNI:")
    assert second.endswith("on EPYC, held to AVX2:")
    assert "| saesub-native-sparse_adam | ? | 1.00 s (8×) |" in block
    assert "| saesub-native-sparse_adam | ? | 2.00 s (4×) |" in block
    asi = [_timed(f"saesub-native-{name}-asi", s) for name, s in (("adam", 4), ("sparse_adam", 2))]
    _write(tmp_path / "trained", 10, _timed("sae-lens", 8.0), *asi)
    _write(tmp_path / "trained" / "avx2", 10, _timed("sae-lens", 16.0), *asi, machine=held)
    assert report["once_trained"](tmp_path) == (
        "A step of `SubspaceSAETrainer` at d_sae 10, 2 steps after ASI, is 2 × (Adam) and 4 × "
        "(SparseAdam) as fast as SAELens' (EPYC, AVX-512 VNNI, 2 threads); held to AVX2 4 × (Adam) "
        "and 8 × (SparseAdam)."
    )
    assert report["kind"]({"instructions": ["AVX2"]}) == "no AVX-512 VNNI"


@pytest.mark.parametrize(
    ("changed", "dirty"),
    [("benchmarks/results/a.json", False), ("saesub/a.py", True), ("benchmarks/run.py", True)],
)
def test_a_commit_is_dirty_where_code_differs_from_it(monkeypatch, tmp_path, changed, dirty):
    """Records that the same run writes are no other code."""
    for name in ("benchmarks/results/a.json", "saesub/a.py", "benchmarks/run.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init"], ["add", "."], [*identity, "commit", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    run = runpy.run_path(str(ROOT / "benchmarks" / "run.py"))
    monkeypatch.setitem(run["commit"].__globals__, "FOLDER", tmp_path / "benchmarks")
    clean = run["commit"]()
    (tmp_path / changed).write_text("2")
    assert run["commit"]() == clean + "-dirty" * dirty
    assert len(clean) == 40
