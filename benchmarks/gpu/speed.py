"""Tokens a second and peak memory of whole training steps, on the card, activations included.

    python benchmarks/gpu/speed.py ours        # saesub and SAELens
    python benchmarks/gpu/speed.py sparsify    # a process of its own: its loop holds its memory

Five steps before ten timed ones, by CUDA events. What does not fit is recorded as such.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any

import harvest
import saelens_dense
import stage
import torch
from sae_lens import SAETrainer
from torch import Tensor

import saesub
from saesub.topk import triton_backend

D_IN, K = 576, 32
WIDTHS = (1024, 4096) if stage.REHEARSAL else (2**14, 2**17, 2**20)
BATCH, LARGE_BATCH = (256, 512) if stage.REHEARSAL else (4096, 16_384)
BEFORE, TIMED = (1, 2) if stage.REHEARSAL else (5, 10)
BACKENDS = ("torch",) if stage.REHEARSAL else ("triton", "triton in 8 bits", "torch")
OPTIMIZERS = ("adam", "sparse_adam")
_END_SECONDS = 5.0
Step = Callable[[Tensor], object]


def rows(n: int, device: str) -> tuple[Tensor, str]:
    """`n` activations (n, 576) float32 on the device, and what they are: of text where an earlier
    stage kept some, else random ones with a falling spectrum."""
    kept = harvest.kept_rows(n)
    if kept is not None and len(kept) == n:
        return kept.to(device), "activations of text"
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, D_IN, generator=generator, device=device)
    return x * (1 + torch.arange(D_IN, device=device)).rsqrt() + 0.1, "random"


def batches(batch: int, device: str) -> Iterator[Tensor]:
    """Batches from a few that lie on the device, without end."""
    x, _ = rows(min(BEFORE + TIMED, 8) * batch, device)
    return cycle(list(x.split(batch)))


def timed(step: Step, source: Iterator[Tensor], batch: int) -> dict[str, Any]:
    """Tokens a second and peak bytes of `TIMED` steps."""
    for _ in range(BEFORE):
        step(next(source))
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(TIMED):
            step(next(source))
        return {"tokens_per_second": TIMED * batch / (time.perf_counter() - start)}
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(TIMED):
        step(next(source))
    ended.record()
    torch.cuda.synchronize()
    ms = begun.elapsed_time(ended) / TIMED
    peak = torch.cuda.max_memory_allocated()
    return {"ms": ms, "tokens_per_second": 1000 * batch / ms, "peak_bytes": peak}


def saesub_step(d_sae: int, batch: int, backend: str, optimizer: str, device: str) -> Step:
    """saesub's trainer on SAELens' default TopK SAE, AuxK on."""
    triton_backend.BACKEND.eight_bits = backend.endswith("8 bits")
    given: dict[str, Any] = {"optimizer": optimizer, "backend": backend.split()[0]}
    trainer = saesub.SubspaceSAETrainer(
        _config(batch, device), _untrained(d_sae, device), iter(()), **given
    )
    return saelens_dense.stepper(trainer)


def saelens_step(d_sae: int, batch: int, device: str) -> Step:
    """SAELens' own trainer on the same SAE."""
    trainer = SAETrainer(_config(batch, device), _untrained(d_sae, device), iter(()))
    return saelens_dense.stepper(trainer)


def sparsify_step(d_sae: int, batch: int, device: str) -> Step:
    """sparsify's whole loop, with torch's Adam."""
    if not stage.REHEARSAL:  # the contender's script would switch its kernels off
        import sparsify  # noqa: F401
    import sparsify_

    class OnCard(sparsify_.Replay):
        def __init__(self, d_in: int) -> None:
            super().__init__(d_in)
            self.now = self.now.to(device)

    OnCard.device = torch.device(device)
    sparsify_.Replay = OnCard
    return sparsify_.make(D_IN, d_sae, K, batch, 0)


def _config(batch: int, device: str) -> Any:
    return replace(saelens_dense.trainer_config(batch), device=device)


def _untrained(d_sae: int, device: str) -> Any:
    return saelens_dense.untrained(D_IN, d_sae, K, 0, device=device)


def measured(make: Callable[[], Step], batch: int, device: str) -> dict[str, Any]:
    """A step's figures; where it does not fit, that it does not."""
    try:
        return timed(make(), batches(batch, device), batch)
    except (torch.OutOfMemoryError, saesub.SaesubError) as error:
        if "memory" not in str(error):
            raise
        return {"out of memory": str(error)[:300]}


def ours(results: stage.Results, device: str, clock: stage.Clock) -> None:
    """saesub in all its ways, SAELens at each width; the default batch first."""
    for batch in (BATCH, LARGE_BATCH):
        for d_sae in WIDTHS:
            for backend in BACKENDS if batch == BATCH else BACKENDS[:2]:
                for optimizer in OPTIMIZERS:
                    make = _bound(saesub_step, d_sae, batch, backend, optimizer, device)
                    name = f"saesub {backend} {optimizer}"
                    _attempt(results, clock, name, d_sae, batch, make, device)
            if batch == BATCH:
                make = _bound(saelens_step, d_sae, batch, device)
                _attempt(results, clock, "sae-lens", d_sae, batch, make, device)


def peer(results: stage.Results, device: str, clock: stage.Clock) -> None:
    """sparsify at each width."""
    for d_sae in WIDTHS:
        make = _bound(sparsify_step, d_sae, BATCH, device)
        _attempt(results, clock, "sparsify", d_sae, BATCH, make, device)


def _bound(make: Callable[..., Step], *given: Any) -> Callable[[], Step]:
    return lambda: make(*given)


def _attempt(
    results: stage.Results,
    clock: stage.Clock,
    name: str,
    d_sae: int,
    batch: int,
    make: Callable[[], Step],
    device: str,
) -> None:
    key = f"{name}, {d_sae} features, batch {batch}"
    if clock.left < 0:
        results.add(key, {"left out": "no time"})
        return
    about = {"name": name, "d_in": D_IN, "d_sae": d_sae, "k": K, "batch": batch}
    results.attempt(key, lambda: about | measured(make, batch, device))


def main() -> None:
    parts = {"ours": ours, "sparsify": peer}
    part = stage.part(__doc__, parts)
    device, results = stage.device(), stage.Results("speed")
    clock = stage.Clock(stage.seconds(60) - _END_SECONDS)
    results.add("activations", rows(64, device)[1])
    parts[part](results, device, clock)
    raise SystemExit(results.status)


if __name__ == "__main__":
    main()
