"""Lorsa calibrated, trained and judged on what an attention layer read and wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool
from sae_lens.training.optim import get_lr_scheduler
from torch import Tensor

from saesub.errors import SaesubError
from saesub.extras.lorsa.model import Lorsa
from saesub.extras.lorsa.sequences import AttentionSequences
from saesub.optim import SparseAdam
from saesub.progress import bar
from saesub.topk.step import MAX_NORM
from saesub.training.trainer import OptimizerName

_FEATURE_AXIS = {"W_V": 0, "b_V": 0, "W_O": 0}
_CALIBRATION_CONTEXTS = 16
_HISTORY_POINTS = 40


@torch.no_grad()
def calibrate_lorsa(lorsa: Lorsa, data: AttentionSequences) -> None:
    """Centre a fresh Lorsa and set its scale, in place, by the first contexts of `data`.

    The output bias becomes the mean output, each b_V takes the mean out of its head's z, and
    directions are scaled so that what the heads write has the variance of the outputs, reading and
    writing vectors being equally long on average. To be done alike with every start that is
    compared, so that starts differ in their directions alone.
    """
    _check_width(lorsa, data)
    mean, variance = data.mean_and_variance()
    lorsa.b_O.copy_(mean)
    x, _, kept = next(data.batches(_CALIBRATION_CONTEXTS))
    device = lorsa.W_V.device
    lorsa.b_V.sub_(lorsa.pre_activations(x.to(device))[kept].mean(0))
    written = lorsa(x.to(device))[0][kept] - lorsa.b_O
    scale = (variance / written.square().sum(-1).mean()) ** 0.5
    lengths = [w.norm(dim=-1).mean() for w in (lorsa.W_V, lorsa.W_O)]
    for_output = (scale * lengths[0] / lengths[1]) ** 0.5
    lorsa.W_O.mul_(for_output)
    lorsa.W_V.mul_(scale / for_output)
    lorsa.b_V.mul_(scale / for_output)


def train_lorsa(
    lorsa: Lorsa,
    data: AttentionSequences,
    *,
    epochs: int = 1,
    batch_size: int = 4,
    lr: float = 1e-3,
    optimizer: OptimizerName = "sparse_adam",
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train in place on the squared error at kept positions, over their variance.

    The rate rises over the first tenth of the steps and falls to zero over the last fifth;
    gradients are clipped at norm 1 as in SAELens; every epoch is a new order of the contexts.

    Args:
        lorsa: from `Lorsa.from_attention`, calibrated.
        data: on the CPU; batches go to the Lorsa's device.
        batch_size: contexts in a step.
        optimizer: "sparse_adam" (`saesub.optim.SparseAdam`: a head moves only when it is active)
            or "adam".
        seed: of the order of contexts.

    Returns:
        One dict (tokens, fvu) per recorded point: kept tokens trained on, and the training error
        averaged since the last point.

    Raises:
        SaesubError: another width, fewer contexts than a batch, an unknown optimizer, or a loss
            that is no longer finite.
    """
    _check_width(lorsa, data)
    n = len(data.x)
    if epochs < 1 or not 1 <= batch_size <= n:
        raise SaesubError(f"epochs must be at least 1, batch_size in 1..{n} (contexts)")
    generator = torch.Generator().manual_seed(seed)
    whole = n // batch_size * batch_size
    orders = [torch.randperm(n, generator=generator)[:whole] for _ in range(epochs)]
    steps = torch.cat(orders).split(batch_size)
    variance = data.mean_and_variance()[1]
    adam = _make_optimizer(optimizer, lorsa, lr)
    schedule = get_lr_scheduler(
        "constant",
        optimizer=adam,
        training_steps=len(steps),
        lr=lr,
        warm_up_steps=len(steps) // 10,
        decay_steps=len(steps) // 5,
        lr_end=lr,
        num_cycles=1,
    )
    history: list[dict[str, float]] = []
    since, tokens = torch.zeros((), device=lorsa.W_V.device), 0
    record_every = max(1, len(steps) // _HISTORY_POINTS)
    for step, rows in enumerate(bar(steps, unit="step", desc="Lorsa", progress=progress), 1):
        x, y, kept = (t[rows].to(lorsa.W_V.device) for t in (data.x, data.y, data.kept))
        loss = (lorsa(x)[0] - y)[kept].square().sum(-1).mean() / variance
        if not loss.isfinite():
            raise SaesubError(f"the loss is {loss.item()} at step {step}: pass a smaller lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lorsa.parameters(), MAX_NORM)
        adam.step()
        adam.zero_grad()
        schedule.step()
        since += loss.detach()
        tokens += int(kept.sum())
        if step % record_every == 0:
            history.append({"tokens": tokens, "fvu": since.item() / record_every})
            since.zero_()
    return history


def _make_optimizer(name: str, lorsa: Lorsa, lr: float) -> torch.optim.Adam:
    if name == "adam":
        return torch.optim.Adam(lorsa.parameters(), lr=lr)
    if name != "sparse_adam":
        raise SaesubError(f"Unknown optimizer {name!r}: known {', '.join(get_args(OptimizerName))}")
    groups = [
        {"params": [parameter], "feature_axis": _FEATURE_AXIS.get(name)}
        for name, parameter in lorsa.named_parameters()
    ]
    return SparseAdam(groups, lr=lr)


@dataclass(frozen=True, eq=False)
class LorsaReport:
    """How well a Lorsa stands for its layer on `n_tokens` tokens it was not trained on.

    Attributes:
        fvu: Σ‖y − ŷ‖² / Σ‖y − mean(y)‖² over the tokens.
        l0: mean number of heads active at a token.
        dead: (n_heads,) bool: never active in these tokens, which are thus the window.
        n_tokens: kept tokens.
    """

    fvu: float
    l0: float
    dead: Bool[Tensor, " n_heads"]
    n_tokens: int

    @property
    def dead_share(self) -> float:
        """Share of heads that are dead."""
        return float(self.dead.float().mean())


@torch.no_grad()
def evaluate_lorsa(
    lorsa: Lorsa, held_out: AttentionSequences, *, batch_size: int = 4
) -> LorsaReport:
    """Error, active heads and dead heads over every kept token of `held_out`. Raises SaesubError
    for another width."""
    _check_width(lorsa, held_out)
    device = lorsa.W_V.device
    error, active, fired = 0.0, 0, torch.zeros(lorsa.cfg.n_heads, dtype=torch.bool, device=device)
    for x, y, kept in held_out.batches(batch_size):
        output, (heads, z) = lorsa(x.to(device))
        error += float((output - y.to(device))[kept].double().square().sum())
        writing = heads[kept][z[kept] > 0]
        active += len(writing)
        fired[writing] = True
    n = held_out.n_tokens
    fvu = error / (n * held_out.mean_and_variance()[1])
    return LorsaReport(fvu, active / n, ~fired, n)


def _check_width(lorsa: Lorsa, data: AttentionSequences) -> None:
    if data.x.shape[-1] != lorsa.cfg.d_model or data.y.shape != data.x.shape:
        raise SaesubError(
            f"this Lorsa reads and writes {lorsa.cfg.d_model} dimensions, the sequences hold "
            f"{tuple(data.x.shape)} and {tuple(data.y.shape)}: take them from the same model"
        )
