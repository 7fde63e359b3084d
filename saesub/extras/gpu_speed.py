"""The speed table of `saesub check-gpu`, and what it prints."""

from __future__ import annotations

import gc
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from saesub.errors import SaesubError
from saesub.extras.gpu_check import OPTIMIZERS, Check, kernels_passed, run_checks, trainer_of
from saesub.files import write_atomically
from saesub.topk.gpu_record import conditions, note_failed, note_passed, triton_version
from saesub.topk.optim import OptimizerName
from saesub.training.native_step import Backend

D_IN, K, BATCH = 576, 32, 4096
WIDTHS = (16_384, 131_072)
WARM_UP, TIMED = 8, 10  # steps; among the first is the recording of a graph


@dataclass(frozen=True)
class Speed:
    """How fast one kind of step is.

    Attributes:
        tokens_per_second, peak_gb: None where the step did not run.
        failure: why it did not.
    """

    d_sae: int
    backend: Backend
    optimizer: OptimizerName
    tokens_per_second: float | None
    peak_gb: float | None
    failure: str | None


def check_gpu(json_file: str | None) -> int:
    """Run the checks and the table on the current GPU and print them; 0 if no check failed, else 1.

    Args:
        json_file: where to write the same as JSON, if anywhere.

    Raises:
        SaesubError: no CUDA device, or a folder that cannot be written.
    """
    if not torch.cuda.is_available():
        raise SaesubError(
            "torch finds no CUDA device here, so there is nothing to check: run check-gpu on a "
            "machine with an NVIDIA GPU, its driver and a torch built for CUDA."
        )
    if json_file and not Path(json_file).absolute().parent.is_dir():
        raise SaesubError(f"no folder for {json_file}: make it first, or name another file.")
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"checking {torch.cuda.get_device_name(device)}: a few minutes", file=sys.stderr)
    checks = run_checks(device, tell=_tell)
    passed = kernels_passed(checks)
    backends: tuple[Backend, ...] = ("triton", "torch") if passed else ("torch",)
    report = machine(device) | {"checks": [asdict(check) for check in checks]}
    report["speed"] = [asdict(row) for row in speed_table(device, backends, tell=_tell_speed)]
    print(in_words(report))
    if json_file:
        _write(Path(json_file), report)
    if passed:
        note_passed(device, report)
        print("\nThe kernels passed: backend='auto' takes them on this card from now on.")
    else:
        note_failed(device)
        print("\nThe kernels did not pass: backend='auto' takes torch's operators on this card.")
    return 1 if any(check.outcome == "failed" for check in checks) else 0


def machine(device: torch.device) -> dict[str, Any]:
    """The card, its driver, and the versions that matter."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version() or "not installed",
        "python": platform.python_version(),
        "kernels": conditions(device)["kernels"][:12],
        "date": date.today().isoformat(),
    }


def speed_table(
    device: torch.device,
    backends: tuple[Backend, ...],
    widths: tuple[int, ...] = WIDTHS,
    tell: Callable[[Speed], None] = lambda row: None,
) -> list[Speed]:
    """A row for each width, backend and optimizer; what does not run says so in its row."""
    rows = []
    for d_sae, backend, optimizer in product(widths, backends, OPTIMIZERS):
        rows.append(_row(device, d_sae, backend, optimizer))
        tell(rows[-1])
    return rows


def in_words(report: dict[str, Any]) -> str:
    """The report as the text that ends `saesub check-gpu`."""
    checks, keys = report["checks"], ("card", "capability", "memory_gb", "driver", "cuda")
    keys += ("torch", "triton", "python", "kernels", "date")
    lines = ["", "What to report", *(f"  {key:<12}{report[key]}" for key in keys)]
    lines += ["", f"  {len(checks)} checks"]
    for c in checks:
        lines.append(f"  {c['outcome']:<10}{c['name']}: {c['detail']}")
    lines += ["", f"  d_in {D_IN}, k {K}, {BATCH:,} tokens a step"]
    lines.append(
        f"  {'features':>9}  {'backend':<8}{'optimizer':<12}{'tokens/s':>11}{'peak GB':>9}"
    )
    for s in report["speed"]:
        named = f"  {s['d_sae']:>9,}  {s['backend']:<8}{s['optimizer']:<12}"
        measured = s["failure"] or f"{s['tokens_per_second']:>11,.0f}{s['peak_gb']:>9.2f}"
        lines.append(named + measured)
    return "\n".join(lines)


def _row(device: torch.device, d_sae: int, backend: Backend, optimizer: OptimizerName) -> Speed:
    try:
        rate, peak = _timed(device, d_sae, backend, optimizer)
        return Speed(d_sae, backend, optimizer, rate, peak, None)
    except Exception as error:  # memory, or a kernel: the other rows go on
        reason = "out of memory" if _is_memory(error) else f"{type(error).__name__}: {error}"[:200]
    return Speed(d_sae, backend, optimizer, None, None, reason)


def _is_memory(error: BaseException | None) -> bool:
    """Whether torch ran out of memory, also where the trainer said so in a sentence."""
    return isinstance(error, torch.OutOfMemoryError) or (
        error is not None and _is_memory(error.__cause__)
    )


def _timed(
    device: torch.device, d_sae: int, backend: Backend, optimizer: OptimizerName
) -> tuple[float, float]:
    """Tokens a second, and the most GB (10^9 bytes) that tensors took."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    config = TopKTrainingSAEConfig(d_in=D_IN, d_sae=d_sae, k=K, device=str(device))
    trainer = trainer_of(TopKTrainingSAE(config), backend, optimizer, BATCH)
    batches = _batches(device)
    for batch in islice(batches, WARM_UP):
        trainer.step(batch)
        trainer.n_training_steps += 1
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for batch in islice(batches, TIMED):
        trainer.step(batch)
        trainer.n_training_steps += 1
    end.record()
    end.synchronize()
    seconds = start.elapsed_time(end) / 1e3
    return TIMED * BATCH / seconds, torch.cuda.max_memory_allocated(device) / 1e9


def _batches(device: torch.device) -> Iterator[Tensor]:
    """A few batches over and over, so that making them is not timed."""
    generator = torch.Generator(device).manual_seed(0)
    made = [torch.randn(BATCH, D_IN, generator=generator, device=device) for _ in range(4)]
    while True:
        yield from made


def _driver() -> str:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
        return told.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        write_atomically(path, json.dumps(report, indent=1))
    except OSError as error:
        raise SaesubError(
            f"{path} cannot be written ({error.strerror or error}): name another file."
        ) from error


def _tell(check: Check) -> None:
    print(f"  {check.outcome:<10}{check.name} ({check.seconds:.1f} s)", file=sys.stderr, flush=True)


def _tell_speed(row: Speed) -> None:
    rate = row.failure or f"{row.tokens_per_second:,.0f} tokens/s"
    named = f"{row.d_sae:,} features, {row.backend}, {row.optimizer}"
    print(f"  timed     {named}: {rate}", file=sys.stderr, flush=True)
