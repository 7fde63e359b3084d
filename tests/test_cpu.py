"""The compiled CPU functions: how they are built, threads, refusals.

Their search is in test_search.py, what they share with the Triton kernels in test_backend.py.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saesub.errors import SaesubError
from saesub.topk import cpu, cpu_library
from saesub.topk.backend import AdamSettings
from saesub.topk.ops import dense_search, select_topk

has_compiler = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(not has_compiler, reason="no C++ compiler here")


def test_it_is_built_where_it_can_be():
    """Else every other test here would be skipped without a word."""
    assert cpu_library.library() is not None
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and "avx512_vnni" in cpuinfo.read_text():
        assert bool(cpu_library.instructions())


def _problem(n: int, d: int, d_sae: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return make(n, d), make(d_sae, d).T / d**0.5, make(d_sae) / 4, make(d_sae, d) / d**0.5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, W, b: (x.double(), W, b), TypeError, "float32 tensor on cpu is wanted"),
        (lambda x, W, b: (x, W.contiguous(), b), TypeError, "strides"),
        (lambda x, W, b: (x, W, b[:-1]), ValueError, r"\(1023,\) where \(1024,\)"),
        (lambda x, W, b: (x, W[:-1], b), ValueError, "is wanted"),
    ],
)
def test_tensors_that_the_compiled_code_would_misread_are_refused(change, error, message):
    x, W_enc, b_enc, _ = _problem(10, 16, 1024, 0)
    with pytest.raises(error, match=message):
        cpu.BACKEND.search(*change(x, W_enc, b_enc), 8)


def test_the_users_default_dtype_does_not_matter():
    x, W_enc, b_enc, _ = _problem(10, 16, 1024, 0)
    expected = cpu.BACKEND.search(x, W_enc, b_enc, 8)
    torch.set_default_dtype(torch.float64)
    try:
        found = cpu.BACKEND.search(x, W_enc, b_enc, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[1], expected[1])


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    x, W_enc, b_enc, W_dec = _problem(500, 48, 1024, 0)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        selected = select_topk(x, W_enc, b_enc, 8, search=cpu.BACKEND.search)
        values = selected.pre.relu()
        decoded = cpu.BACKEND.decode(selected, values, W_dec, None, x, 1.0)
        rows = cpu.BACKEND.row_gradients(
            selected.features, selected.tokens, values, decoded.g_pre, x, decoded.g_out, 1024
        )
        weights = [W_enc.T.clone(), W_dec.clone(), b_enc.clone()]
        tensors = [t for w in weights for t in (w, torch.zeros_like(w), torch.zeros_like(w))]
        first_step, unclipped = torch.ones(2)
        rows.adam(AdamSettings(1e-2, 0.9, 0.99, 1e-8), first_step, unclipped, *tensors, moved=None)
        found = [selected.features, selected.pre, decoded.g_bias, decoded.g_pre]
        results.append([*found, *rows.norms(W_enc), *tensors])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_compiler_with_arguments_is_understood(monkeypatch, tmp_path):
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", f"env {has_compiler} -g0")
    cpu_library.library.cache_clear()
    try:
        assert cpu_library.library() is not None
        assert len(list(tmp_path.glob("native/*/*.so"))) == 1
    finally:
        monkeypatch.undo()
        cpu_library.library.cache_clear()


def test_an_instruction_set_that_it_cannot_be_held_to_is_refused(monkeypatch):
    monkeypatch.setenv("SAESUB_NATIVE_ISA", "avx")
    cpu_library.library.cache_clear()
    try:
        with pytest.raises(SaesubError, match="set it to avx2, or unset it"):
            cpu_library.library()
    finally:
        monkeypatch.undo()
        cpu_library.library.cache_clear()


CHECK = Path(__file__).with_name("cpu_search_check.cpp")
FLAGS = cpu_library._flags()


def _check(tmp_path, compiler: list[str], *target: str) -> Path:
    """The program that checks the search by itself, built for a target."""
    flags = [f for f in FLAGS if not f.startswith(("-march", "-mcpu")) and f not in _OF_A_LIBRARY]
    command = [*compiler, *flags, *target, str(CHECK), "-o", str(tmp_path / "check")]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return tmp_path / "check"


_OF_A_LIBRARY = ("-shared", "-fPIC")
# What AVX-VNNI does, by AVX-512's names.
_256_BITS = ("-mavx512vnni", "-mavx512vl", "-D__AVXVNNI__")
_TARGETS = {
    "native": (None, ["-march=native"]),
    "avx2": ("avx2", ["-march=x86-64-v3"]),
    "avxvnni": (
        "avx512_vnni",
        ["-march=x86-64-v3", *_256_BITS, "-D_mm256_dpbusd_avx_epi32=_mm256_dpbusd_epi32"],
    ),
}


def _has(flag: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and flag in cpuinfo.read_text().split()


@pytest.mark.parametrize("name", _TARGETS)
def test_every_way_to_multiply_in_8_bits_finds_what_the_whole_product_finds(tmp_path, name):
    flag, target = _TARGETS[name]
    if flag and not _has(flag):
        pytest.skip(f"this processor has no {flag}")
    told = subprocess.run(_check(tmp_path, [has_compiler], *target), capture_output=True, text=True)
    if name == "native" and not cpu_library.instructions():
        assert told.returncode == 2
    else:
        assert told.returncode == 0, told.stdout
        expected = cpu_library.instructions() if name == "native" else name
        assert told.stdout.startswith(f"{expected}:")


def test_it_is_built_for_arm_where_a_compiler_for_it_is_there(tmp_path):
    """And runs where there is an emulator; `ziglang` from the package index brings a compiler."""
    zig = importlib.util.find_spec("ziglang")
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"]
    if zig is None:
        gcc = shutil.which("aarch64-linux-gnu-g++")
        if gcc is None:
            pytest.skip("no compiler for ARM here")
        compiler = [gcc, "-static"]
    program = _check(tmp_path, compiler, "-mcpu=cortex-a76" if zig is None else "-mcpu=cortex_a76")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator:
        told = subprocess.run([emulator, program], capture_output=True, text=True)
        assert (told.returncode, told.stdout[:5]) == (0, "neon:"), told.stdout


@pytest.mark.skipif(not _has("avx2"), reason="this processor has no AVX2")
def test_a_library_held_to_avx2_searches_by_it(monkeypatch):
    monkeypatch.setenv("SAESUB_NATIVE_ISA", "avx2")
    cpu_library.library.cache_clear()
    try:
        assert cpu_library.instructions() == "avx2"
        x, W_enc, b_enc, _ = _problem(300, 48, 2048, 0)
        found, expected = (f(x, W_enc, b_enc, 8) for f in (cpu.BACKEND.search, dense_search))
        assert torch.equal(found[0].sort(1).values, expected[0].sort(1).values)
    finally:
        monkeypatch.undo()
        cpu_library.library.cache_clear()


def test_without_a_compiler_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("SAESUB_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")  # a compiler that fails
    cpu_library.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Install a C\\+\\+ compiler"):
            assert cpu_library.library() is None
        monkeypatch.setenv("SAESUB_NATIVE", "0")
        cpu_library.library.cache_clear()
        assert cpu_library.library() is None
    finally:
        monkeypatch.undo()
        cpu_library.library.cache_clear()
