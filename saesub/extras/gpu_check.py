"""`saesub check-gpu`: whether the Triton kernels are right on this card, and how fast a step is.

Results are compared with float64 and with torch's operators on the card itself. Where every check
of the kernels passes, `backend="auto"` takes them on this card from then on.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from saesub.extras.gpu_rows import (
    CheckError,
    LeftOutError,
    Problem,
    Size,
    check_adam,
    check_decode,
    check_norms,
    check_search,
    check_shadow,
)
from saesub.topk import triton_backend
from saesub.topk.backend import RowBackend
from saesub.topk.gpu_record import triton_version
from saesub.topk.optim import OptimizerName
from saesub.training.native_step import Backend
from saesub.training.trainer import SubspaceSAETrainer

Kind = Literal["topk", "batchtopk"]
About = Literal["kernels", "torch"]
Outcome = Literal["passed", "failed", "left out"]
_Waiting = tuple[str, About, Callable[[], str]]  # name and function of a check
OPTIMIZERS: tuple[OptimizerName, ...] = ("adam", "sparse_adam")
_LR, _STEPS = 1e-3, 8
# A search that takes another feature for one as good changes that feature's weights.
_MOST_OTHER_WEIGHTS, _MOST_LOSS_DIFFERENCE = 0.01, 1e-3
_FAR_TABLES, _FAR_REST = 6, 6 * 10**9  # weights and moments of both sides; bytes for what else is


# Wide enough for AuxK, too, to be searched in few bits.
_STEP, _ON_CPU = Size(2048, 576, 32_768, 32), Size(256, 64, 1024, 8)
_FAR = Size(64, 4096, 1024, 32, offset=2**19)


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        about: "kernels", or "torch" for its operators.
        detail: in words: the largest difference, what was wrong, or why it was left out.
    """

    name: str
    about: About
    outcome: Outcome
    detail: str
    seconds: float


@dataclass(frozen=True)
class Sizes:
    """The problems of all checks: those of the methods, of a whole step, and the one whose tables
    hold more than 2^31 numbers."""

    methods: tuple[Size, ...] = (
        Size(7, 5, 40, 3),
        Size(33, 80, 300, 12),
        Size(2000, 576, 16_384, 32),
        Size(500, 4608, 8192, 64),
    )
    step: Size = _STEP
    on_cpu: Size = _ON_CPU
    far: Size = _FAR


def run_checks(
    device: torch.device,
    *,
    backend: RowBackend = triton_backend.BACKEND,
    named: Backend = "triton",
    sizes: Sizes | None = None,
    tell: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """All checks, in a minute or two; one that fails does not stop the others.

    Args:
        device: where everything is computed.
        backend: what is checked, which trainers take by the name `named`.
        tell: called after each check.
    """
    sizes = sizes or Sizes()
    checks = [_outcome("the kernels run", "kernels", partial(_kernels_run, device, backend))]
    tell(checks[0])
    on_cpu = partial(_as_on_cpu, device, sizes.on_cpu)
    waiting: list[_Waiting] = [("torch's step equals the CPU's", "torch", on_cpu)]
    if checks[0].outcome == "passed":
        waiting += _of_kernels(device, backend, named, sizes)
    for name, about, run in waiting:
        checks.append(_outcome(name, about, run))
        tell(checks[-1])
    return checks


def kernels_passed(checks: list[Check]) -> bool:
    """Whether the kernels were checked and none of their checks failed."""
    of_kernels = [check.outcome for check in checks if check.about == "kernels"]
    return "failed" not in of_kernels and of_kernels.count("passed") > 1


def _of_kernels(
    device: torch.device, backend: RowBackend, named: Backend, sizes: Sizes
) -> list[_Waiting]:
    """(name, about, function) of every check of the kernels."""
    methods = {
        "search": check_search,
        "search in few bits": check_shadow,
        "decode": check_decode,
        "norms": check_norms,
        "Adam": partial(check_adam, lazy=False),
        "SparseAdam": partial(check_adam, lazy=True),
    }
    found: list[_Waiting] = [
        (f"{name}, {size}", "kernels", partial(_method, check, backend, size, device))
        for size in sizes.methods
        for name, check in methods.items()
    ]
    kinds: tuple[Kind, ...] = ("topk", "batchtopk")
    for kind in kinds:
        for optimizer in OPTIMIZERS:
            run = partial(_steps_agree, device, named, kind, optimizer, sizes.step)
            found.append((f"steps of {kind} by {optimizer}", "kernels", run))
    found.append(("no step waits", "kernels", partial(_does_not_wait, device, named, sizes.step)))
    for name, check in methods.items():
        run = partial(_beyond_int32, check, backend, sizes.far, device)
        found.append((f"{name}, {sizes.far}", "kernels", run))
    return found


def _outcome(name: str, about: About, run: Callable[[], str]) -> Check:
    start, outcome = time.perf_counter(), "passed"
    try:
        detail = run()
    except LeftOutError as error:
        outcome, detail = "left out", str(error)
    except CheckError as error:
        outcome, detail = "failed", str(error)
    except Exception as error:  # a compiler, a kernel, memory: anything that a card brings up
        outcome, detail = "failed", f"{type(error).__name__}: {str(error).strip()[-300:]}"
    return Check(name, about, outcome, detail, round(time.perf_counter() - start, 2))  # pyright: ignore


def _kernels_run(device: torch.device, backend: RowBackend) -> str:
    if backend is not triton_backend.BACKEND:
        return f"{type(backend).__name__}"
    if triton_version() is None:
        raise LeftOutError("Triton is not installed; torch's operators take every step")
    if (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) < triton_backend.LEAST_CAPABILITY
    ):
        least = ".".join(map(str, triton_backend.LEAST_CAPABILITY))
        raise LeftOutError(f"Triton needs compute capability {least}; torch's operators step in")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        works = triton_backend.available()
    if not works:
        raise CheckError(" ".join(str(w.message) for w in heard) or "Triton does not run here")
    return f"Triton {triton_version()}"


def _method(
    check: Callable[[RowBackend, Problem], str],
    backend: RowBackend,
    size: Size,
    device: torch.device,
) -> str:
    return check(backend, Problem(size, device))


def _beyond_int32(
    check: Callable[[RowBackend, Problem], str],
    backend: RowBackend,
    size: Size,
    device: torch.device,
) -> str:
    """`_method` on features whose index into a table does not fit in 32 bits."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        needed = _FAR_TABLES * 4 * size.d * size.d_sae + _FAR_REST
        free = torch.cuda.mem_get_info(device)[0]
        if free < needed:
            has = f"{free / 1e9:.0f} GB are free and {needed / 1e9:.0f} GB are needed"
            raise LeftOutError(f"{has}: indices beyond 2^31 were not tried")
    return _method(check, backend, size, device)


def _sae(kind: Kind, size: Size, device: torch.device) -> TopKTrainingSAE:
    """A small random SAE, the same on every machine, with AuxK on."""
    shape = {"d_in": size.d, "d_sae": size.d_sae, "k": size.k, "decoder_init_norm": 0.5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "topk":
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shape))
        else:
            sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape))
        sae.b_enc.data.normal_(0, 0.1)
    sae.cfg.device = str(device)
    return sae.to(device)


def trainer_of(
    sae: TopKTrainingSAE, named: Backend, optimizer: OptimizerName, n: int
) -> SubspaceSAETrainer:
    """A trainer for which a feature is dead after one silent batch of n tokens."""
    device = sae.W_enc.device
    cfg = SAETrainerConfig(
        total_training_samples=100 * n,
        train_batch_size_samples=n,
        device=str(device),
        lr=_LR,
        lr_end=_LR,
    )
    given: dict[str, Any] = {"optimizer": optimizer, "backend": named, "dead_window_tokens": n}
    return SubspaceSAETrainer(cfg, sae, iter(()), **given)


def _batches(size: Size, device: torch.device) -> Iterator[Tensor]:
    """Inputs of which a few directions hold most of the variance."""
    problem = Problem(size, device)
    scale = (1 + torch.arange(size.d, device=device)).rsqrt()
    while True:
        yield problem.normal(size.n, size.d) * scale + 0.1


def _take(trainer: SubspaceSAETrainer, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The two losses of one step."""
    losses = trainer.step(batch).losses
    trainer.n_training_steps += 1
    return losses["mse_loss"].detach(), losses["auxiliary_reconstruction_loss"].detach()


def _steps_agree(
    device: torch.device, named: Backend, kind: Kind, optimizer: OptimizerName, size: Size
) -> str:
    """Losses and weights of a few steps, against the same steps by torch's operators."""
    ours = trainer_of(_sae(kind, size, device), named, optimizer, size.n)
    theirs = trainer_of(copy.deepcopy(ours.sae), "torch", optimizer, size.n)
    if ours.native_step.rows(ours) is None:
        raise CheckError("the trainer does not take the fused step")
    return _agree(ours, theirs, size)


def _as_on_cpu(device: torch.device, size: Size) -> str:
    """The steps by torch's operators on the device, against the same ones on the CPU."""
    places = device, torch.device("cpu")
    ours, theirs = (trainer_of(_sae("topk", size, d), "torch", "adam", size.n) for d in places)
    return _agree(ours, theirs, size)


def _agree(ours: SubspaceSAETrainer, theirs: SubspaceSAETrainer, size: Size) -> str:
    worst, revived = 0.0, False
    first, second = ours.sae.W_enc.device, theirs.sae.W_enc.device
    for step, batch in zip(range(_STEPS), _batches(size, first), strict=False):
        for trainer in (ours, theirs):  # a recorded step takes the rate and the batch of each
            trainer.optimizer.param_groups[0]["lr"] = _LR / (1 + step % 3)
        batch = batch[: size.n // 2] if step == _STEPS - 2 else batch
        pairs = zip(_take(ours, batch), _take(theirs, batch.to(second)), strict=True)
        for at, (a, b) in enumerate(pairs):
            a, b = float(a), float(b)
            revived |= at == 1 and b > 0
            difference = abs(a - b) / abs(b) if b else abs(a)
            if not difference <= _MOST_LOSS_DIFFERENCE:
                which = ("loss", "AuxK loss")[at]
                raise CheckError(f"the {which} is {a:.6g} where torch's operators have {b:.6g}")
            worst = max(worst, difference)
    if not revived:
        raise CheckError("no feature was dead, so AuxK was not tried")
    for (name, a), b in zip(ours.sae.named_parameters(), theirs.sae.parameters(), strict=True):
        other = float(((a - b.to(first)).abs() > _LR / 10).double().mean())
        if not other <= _MOST_OTHER_WEIGHTS or not bool(a.isfinite().all()):
            raise CheckError(f"{other:.1%} of {name} differ after {_STEPS} steps")
    return f"losses within {worst:.0e}"


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _does_not_wait(device: torch.device, named: Backend, size: Size) -> str:
    """Three steps of either optimizer, in which torch refuses to wait for the GPU."""
    if device.type != "cuda":
        raise LeftOutError("only a GPU is waited for")
    for optimizer in OPTIMIZERS:
        trainer = trainer_of(_sae("topk", size, device), named, optimizer, size.n)
        batches = _batches(size, device)
        for _, batch in zip(range(3), batches, strict=False):
            _take(trainer, batch)
        after = [next(batches) for _ in range(3)]
        with _waiting_is_an_error():
            for batch in after:
                _take(trainer, batch)
    return "neither with Adam nor with SparseAdam"
