"""Whether the CUDA path is right on this card, and where its time goes.

python benchmarks/gpu/check.py kernels    # the checks of `saesub check-gpu`
python benchmarks/gpu/check.py steps      # ceilings, steps at 2^20 features, a profile
python benchmarks/gpu/check.py profiles   # the kernels' steps at each width, a profile
python benchmarks/gpu/check.py tests      # the tests that run on CUDA, without conftest.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import repeat
from tempfile import TemporaryFile
from typing import Any

import speed
import stage
import torch

D_SAE = 4096 if stage.REHEARSAL else 2**20
STEPS = 2 if stage.REHEARSAL else 20
SIDE = 256 if stage.REHEARSAL else 8192
_COPY_BYTES = 2**20 if stage.REHEARSAL else 8 * 2**30
_LONGEST = 15
PROFILE = "profile.txt"
_REHEARSED = "left out: rehearsal, the CPU's backend"
_ALL_TESTS = ("test_cuda_search.py", "test_step_graph.py", "test_shadow.py", "test_backend.py")
_TESTS = _ALL_TESTS[:1] if stage.REHEARSAL else _ALL_TESTS
_MOST_OUTPUT = 6000
_PROCESSES = 1 if stage.REHEARSAL else 8


def ceilings(device: str) -> dict[str, float]:
    """GB/s of a copy, bytes read and written, and TFLOP/s of a product of two square matrices."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source))
    found = {"copy GB/s": 2 * _COPY_BYTES / seconds / 1e9}
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        found[f"{name} TFLOP/s"] = 2 * SIDE**3 / _seconds(lambda a=a, b=b: a @ b) / 1e12
    return found


def _seconds(do: Callable[[], object]) -> float:
    """Of one call, by the timing of the speed table."""
    per_second = speed.timed(lambda _: do(), repeat(torch.empty(0)), 1)
    return 1 / per_second["tokens_per_second"]


def kernels(results: stage.Results, device: str) -> None:
    """Every check of `saesub check-gpu`, each kept as soon as it is known."""
    from saesub.extras import gpu_check

    results.add("kernels passed", False)  # until all of them have

    def keep(check: gpu_check.Check) -> None:
        results.add(check.name, asdict(check))
        print(f"{check.outcome:8} {check.name}: {check.detail} ({check.seconds} s)", flush=True)

    given: dict[str, Any] = {}
    if stage.REHEARSAL:
        from saesub.topk import cpu

        small = gpu_check.Size(7, 5, 40, 3)
        sizes = gpu_check.Sizes((small,), small, small, small)
        given = {"backend": cpu.BACKEND, "named": "auto", "sizes": sizes}
    found = gpu_check.run_checks(torch.device(device), tell=keep, **given)
    passed = gpu_check.kernels_passed(found)
    results.add("kernels passed", _REHEARSED if passed and stage.REHEARSAL else passed)
    failed = [check.name for check in found if check.outcome == "failed"]
    if failed or not passed:
        results.failed.append("kernels")
        print(f"kernels: FAILED: {', '.join(failed) or 'too few of their checks ran'}", flush=True)
    else:
        print(f"kernels: {_REHEARSED if stage.REHEARSAL else 'passed'}", flush=True)


def steps(results: stage.Results, device: str) -> None:
    """Ceilings, then steps of each backend and optimizer, the first of them profiled."""
    (stage.OUT / PROFILE).unlink(missing_ok=True)
    results.attempt("ceilings", lambda: ceilings(device))
    for backend in speed.BACKENDS:
        for optimizer in speed.OPTIMIZERS:
            _profile(results, D_SAE, backend, optimizer, device)


def profiles(results: stage.Results, device: str) -> None:
    """Steps at each width, profiled; not by torch's operators."""
    for d_sae in speed.WIDTHS:
        for backend in speed.BACKENDS[: 1 if stage.REHEARSAL else 2]:
            for optimizer in speed.OPTIMIZERS:
                _profile(results, d_sae, backend, optimizer, device)


def _profile(results: stage.Results, d_sae: int, backend: str, optimizer: str, device: str) -> None:
    name = f"{STEPS} steps at {d_sae} features, {backend} {optimizer}"
    results.attempt(name, lambda: _profiled(d_sae, backend, optimizer, device))


def _profiled(d_sae: int, backend: str, optimizer: str, device: str) -> dict[str, Any]:
    """Figures and the loss of steps; the longest kernels go to `$OUT/profile.txt`."""
    step = speed.saesub_step(d_sae, speed.BATCH, backend, optimizer, device)
    source = speed.batches(speed.BATCH, device)
    found = speed.timed(step, source, speed.BATCH)
    activities = [torch.profiler.ProfilerActivity.CPU]
    by = "cpu_time_total"
    if device == "cuda":
        activities, by = [*activities, torch.profiler.ProfilerActivity.CUDA], "device_time_total"
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(max(1, STEPS - speed.BEFORE - speed.TIMED)):
            step(next(source))
        if device == "cuda":
            torch.cuda.synchronize()
    table = profile.key_averages().table(sort_by=by, row_limit=_LONGEST, max_name_column_width=60)
    with (stage.OUT / PROFILE).open("a") as file:
        file.write(f"{d_sae} features, batch {speed.BATCH}, {backend}, {optimizer}\n{table}\n")
    return found


def tests(results: stage.Results, device: str) -> None:
    """How many of the tests passed; what failed is in the log."""
    results.add("tests", {"exit": "not ended"})
    files = [stage.ROOT / "tests" / name for name in _TESTS]
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-n", str(_PROCESSES), "--dist", "worksteal"] if _PROCESSES > 1 else []
    command += ["--tb=short", *(str(file) for file in files if file.is_file())]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    with TemporaryFile("w+") as said:
        where: dict[str, Any] = {"stdout": said, "stderr": subprocess.STDOUT, "cwd": stage.ROOT}
        try:
            limit = stage.seconds(60) - 8
            status = subprocess.run(command, env=environment, timeout=limit, **where).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
        said.seek(0)
        text = said.read()
    print(text[-_MOST_OUTPUT:], flush=True)
    last = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed)", line)]
    results.add("tests", {"exit": status, "said": last[-1:] or text[-500:]})
    if status != 0:
        results.failed.append("tests")


def main() -> None:
    parts = {"kernels": kernels, "steps": steps, "profiles": profiles, "tests": tests}
    part = stage.part(__doc__, parts)
    device, results = stage.device(), stage.Results("check", [PROFILE])
    results.attempt(f"part {part}", lambda: parts[part](results, device))
    raise SystemExit(results.status)


if __name__ == "__main__":
    main()
