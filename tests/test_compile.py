"""Every Triton kernel compiles for an H100 without spills; no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import gpu_compile
import pytest
from gpu_compile import Entry, Usage

from saesub.topk import maxima

ROOT = Path(__file__).resolve().parent.parent
KERNELS = """import triton
@triton.jit
def _helper(x): return x
@triton.jit
def launched(x): _helper(x)
@triton.autotune(configs=[], key=[])
@triton.jit
def tuned(x): return x
def plain(x): return x
"""


def test_every_launched_kernel_has_an_entry():
    assert {entry.kernel for entry in gpu_compile.entries(90)} == gpu_compile.launched()


def test_kernels_that_others_call_are_not_launched(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(KERNELS)
    monkeypatch.setattr(gpu_compile, "FOLDER", tmp_path)
    assert gpu_compile.launched() == {"a.launched", "a.tuned"}


def test_a_kernel_without_an_entry_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.py").write_text(KERNELS)
    monkeypatch.setattr(gpu_compile, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu_compile, "entries", lambda capability: (Entry("a.launched", {}, {}),))
    monkeypatch.setattr(gpu_compile, "compiled", lambda *given: Usage(32, 0, 0, 1024))
    assert gpu_compile.report([90]) == ["a.tuned has no entry in benchmarks/gpu_compile.py"]
    assert "sm_90" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("usage", "capability", "fault"),
    [
        (Usage(255, 0, 0, 232_448), 90, None),
        (Usage(255, 8, 8, 0), 90, "spills 16 bytes a thread"),
        (
            Usage(255, 8, 0, 232_449),
            90,
            "spills 8 bytes a thread, wants 232,449 bytes of shared memory of 232,448",
        ),
        (Usage(255, 0, 0, 232_449), 90, "wants 232,449 bytes of shared memory of 232,448"),
        (Usage(255, 0, 0, 147_480), 86, "wants 147,480 bytes of shared memory of 101,376"),
    ],
)
def test_what_does_not_fit_is_a_fault(usage, capability, fault):
    assert gpu_compile.fault(usage, capability) == fault


def test_faults_on_other_cards_than_an_h100_are_reported_alone(monkeypatch, capsys):
    monkeypatch.setattr(gpu_compile, "compiled", lambda *given: Usage(255, 64, 0, 0))
    assert gpu_compile.report([80, 120]) == []
    assert "spills 64 bytes" in capsys.readouterr().out
    assert len(gpu_compile.report([90])) == len(gpu_compile.entries(90))


@pytest.mark.parametrize(
    ("capabilities", "n_wrong", "said"),
    [
        ([80, 90], 0, "all kernels fit"),
        ([90], 2, "not all kernels fit"),
        ([80], 0, "not asked for"),
    ],
)
def test_the_last_line_says_whether_all_fit_an_h100(capabilities, n_wrong, said):
    line = gpu_compile.closing(capabilities, n_wrong)
    assert line == f"sm_90: {said}; others are reported only"


@pytest.mark.parametrize(("capability", "bits"), [(80, {"fp16"}), (90, {"fp16", "fp8e4nv"})])
def test_a_card_compiles_the_tiles_and_types_that_it_launches(capability, bits):
    entries = gpu_compile.entries(capability)
    products = [e for e in entries if e.kernel.endswith("group_maxima")]
    tiles = {(t.tokens, t.features) for t in maxima.tiles_for(divmod(capability, 10))}
    assert {(e.constants["BM"], e.constants["BN"]) for e in products} == tiles
    assert {e.name.split("(")[1].split(",")[0] for e in products} == bits
    assert len({entry.name for entry in entries}) == len(entries)


def test_without_triton_the_script_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gpu_compile.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        gpu_compile.main([])
    assert "Triton is not installed: pip install triton" in capsys.readouterr().err


@pytest.mark.parametrize("types", [{"*fp32": "x"}, {"*fp32": "x y z"}])
def test_an_entry_with_other_arguments_than_its_kernel_is_refused(types):
    with pytest.raises(ValueError, match="its entry has other arguments"):
        gpu_compile._signature(["x", "y"], types, {})


def test_pointers_and_marked_numbers_are_aligned():
    types = {"*fp32": "a", "i32:16": "b", "i32": "c", "tensordesc<bf16[128, 64]>": "e"}
    signature, aligned = gpu_compile._signature(list("abcde"), types, {"d": 4})
    assert [signature[name] for name in "abcd"] == ["*fp32", "i32", "i32", "constexpr"]
    assert signature["e"] == "tensordesc<bf16[128, 64]>"
    assert set(aligned) == {(0,), (1,)}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_kernel_compiles_for_an_h100_without_spills(tmp_path):
    """In a process of its own: one in which Triton interprets compiles nothing."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path),  # compiled anew
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_compile.py"), "--targets", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(": fits\n") == len(gpu_compile.entries(90))
    assert done.stdout.endswith("sm_90: all kernels fit; others are reported only\n")
