"""What a step of a TopK SAE on several GPUs holds and sends, by arithmetic, before one is rented.

Bytes follow from the shapes of tensors; seconds from the rates that the caller gives, and no more
is claimed of them: they take every device to work at those rates, one thing after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saesub.topk.ops import TOKENS_PER_BLOCK
from saesub.training.trainer import OptimizerName

Mode = Literal["features", "data"]
_FLOAT, _INT = 4, 8


@dataclass(frozen=True)
class Job:
    """A TopK SAE in float32, and how it is trained.

    Attributes:
        k: active features of a token.
        batch: tokens in a step, over all processes.
        mode: "features" for `saesub.training.distributed.feature_parallel`, "data" for
            `saesub.training.distributed.data_parallel`.
        auxk: whether so many features are dead that AuxK takes d_in / 2 of each token.
    """

    d_in: int
    d_sae: int
    k: int
    batch: int
    processes: int
    optimizer: OptimizerName = "sparse_adam"
    mode: Mode = "features"
    auxk: bool = False

    @property
    def features_here(self) -> int:
        """Features that the fullest process holds."""
        return self.d_sae if self.mode == "data" else -(-self.d_sae // self.processes)

    @property
    def rows_here(self) -> int:
        """Rows of the batch that a process works on."""
        return -(-self.batch // self.processes) if self.mode == "data" else self.batch

    @property
    def weights_here(self) -> int:
        """Weights that the fullest process holds."""
        return self.features_here * (2 * self.d_in + 1) + self.d_in


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: products of float32, bytes of its memory, bytes sent."""

    flops: float
    memory: float
    link: float


def memory(job: Job) -> dict[str, int]:
    """Bytes that the fullest process holds, in the step made of torch operators, without AuxK.

    What torch's allocator and libraries take is not counted; `batch` is ten tensors of the size of
    the batch, as in `saesub.topk.eligibility`.
    """
    counts = _INT + 2 * _FLOAT  # tokens and passes since a feature fired, and how often it did
    if job.optimizer == "sparse_adam":
        counts += 3 * _INT  # when each of its three rows was last moved
    weights = _FLOAT * job.weights_here
    return {
        "parameters": weights,
        "moments": 2 * weights,
        "counts": counts * job.features_here,
        "gradients": weights,
        "encoder scaled by decoder norms": _FLOAT * job.d_in * job.features_here,
        "scores": _FLOAT * min(job.rows_here, TOKENS_PER_BLOCK) * job.features_here,
        "batch": 10 * _FLOAT * job.rows_here * job.d_in,
    }


def traffic(job: Job) -> dict[str, int]:
    """Bytes that a process sends in a step, rows being dealt out evenly.

    In a ring, which gloo and NCCL use, each of p processes sends (p - 1) s bytes to gather s bytes
    of each, and 2 (p - 1) / p · S to sum S bytes.
    """
    others, n, d = job.processes - 1, job.batch, job.d_in
    own_rows = -(-n // job.processes)

    def total(size: int) -> int:
        return 2 * others * size // job.processes

    if job.mode == "data":
        firing = _INT * job.features_here
        return {"gradients": total(_FLOAT * job.weights_here), "firing": total(firing)}
    auxk = {
        "AuxK's scores": others * _FLOAT * n * (d // 2),
        "AuxK's reconstructions": total(_FLOAT * n * d),
    }
    return {
        "rows": others * _FLOAT * own_rows * d,
        "scores": others * _FLOAT * n * job.k,
        "reconstructions": total(_FLOAT * n * d),
        "norm and bias": total(_INT * (d + 1)),
    } | (auxk if job.auxk else {})


def seconds(job: Job, rates: Rates) -> dict[str, float]:
    """Of a step, by part; an estimate, its sum the more so.

    The encoder's product is 2 · rows · d_in · features operations. Memory is read or written once
    for each pass over: the encoder, for every block of tokens, and to scale it; the scores, thrice;
    the gradients, five times; weights and moments in the optimizer's update, seven times in all, of
    all features with Adam, of at most batch · k with SparseAdam. AuxK's own work is left out.
    """
    encoder = _FLOAT * job.d_in * job.features_here
    blocks = -(-job.rows_here // TOKENS_PER_BLOCK)
    scores = _FLOAT * job.rows_here * job.features_here
    moved = _FLOAT * job.weights_here
    if job.optimizer == "sparse_adam":
        moved = min(moved, _FLOAT * 2 * job.d_in * job.batch * job.k)
    passes = (blocks + 3) * encoder + 3 * scores + 5 * _FLOAT * job.weights_here + 7 * moved
    return {
        "encoder": 2 * job.rows_here * job.d_in * job.features_here / rates.flops,
        "memory": passes / rates.memory,
        "traffic": sum(traffic(job).values()) / rates.link,
    }
