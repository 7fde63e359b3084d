"""How a Lorsa is calibrated, trained and evaluated on what an attention layer read and wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from jaxtyping import Bool
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from saesub.arguments import whole_number
from saesub.errors import SaesubError
from saesub.evaluation.reconstruction import unexplained
from saesub.extras.lorsa.attention import AttentionSequences
from saesub.extras.lorsa.model import Lorsa
from saesub.progress import bar
from saesub.topk.optim import OptimizerName
from saesub.training.trainer import SubspaceSAETrainer

_CALIBRATION_CONTEXTS = 16


@torch.no_grad()
def calibrate_lorsa(lorsa: Lorsa, data: AttentionSequences) -> None:
    """Centre a fresh Lorsa and set its scale, in place, by the first contexts of `data`.

    The output bias becomes the mean output, each b_V takes the mean out of its head's z, and
    directions are scaled so that what the heads write has the variance of the outputs, reading and
    writing vectors being equally long on average. Calibrate every initialisation that you compare,
    so that they differ in their directions alone.

    Raises SaesubError for another width, outputs that do not vary, or heads that write nothing or
    values that are not finite.
    """
    _check_width(lorsa, data)
    mean, variance = data.mean_and_variance()
    before = {name: weights.clone() for name, weights in lorsa.state_dict().items()}
    lorsa.b_O.copy_(mean)
    x, _, kept = next(data.batches(_CALIBRATION_CONTEXTS))
    device = lorsa.W_V.device
    lorsa.b_V.sub_(lorsa.pre_activations(x.to(device))[kept].mean(0))
    written = lorsa(x.to(device))[0][kept] - lorsa.b_O
    scale = (variance / written.square().sum(-1).mean()) ** 0.5
    lengths = [w.norm(dim=-1).mean() for w in (lorsa.W_V, lorsa.W_O)]
    for_output = (scale * lengths[0] / lengths[1]) ** 0.5
    if not bool(for_output > 0) or not bool(for_output.isfinite()):
        lorsa.load_state_dict(before)
        raise SaesubError(
            "The heads of this Lorsa write nothing, or values that are not finite, at the first "
            "contexts: initialise it, with Lorsa.from_attention, before it is calibrated."
        )
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

    The steps are those of `SubspaceSAETrainer`. The rate rises over the first tenth of them and
    falls to zero over the last fifth; every epoch takes the contexts in a new order.

    Args:
        lorsa: from `Lorsa.from_attention`, calibrated.
        data: on the CPU; batches go to the Lorsa's device.
        batch_size: contexts in a step.
        optimizer: as `SubspaceSAETrainer` takes it; with "sparse_adam" a head moves only in steps
            where it is active.
        seed: of the order of contexts.

    Returns:
        One dict (tokens, fvu) per recorded point: kept tokens trained on, and the training error
        averaged since the last point.

    Raises:
        SaesubError: another width, counts out of range, fewer contexts than a batch, an unknown
            optimizer, weights in float16 or bfloat16, a batch without a kept position, NaN or Inf
            in the data, or a loss that is no longer finite.
    """
    _check_width(lorsa, data)
    n, positions = data.kept.shape
    epochs, seed = whole_number(epochs, "epochs"), whole_number(seed, "seed", 0)
    batch_size = whole_number(batch_size, "batch_size")
    if batch_size > n:
        raise SaesubError(f"There are {n} contexts: pass a batch_size in 1..{n}, not {batch_size}.")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator) for _ in range(epochs)]
    steps = [rows for o in orders for rows in o.split(batch_size) if len(rows) == batch_size]
    size = batch_size * positions
    recipe = SAETrainerConfig(
        total_training_samples=len(steps) * size,
        train_batch_size_samples=size,
        lr=lr,
        lr_warm_up_steps=len(steps) // 10,
        lr_decay_steps=len(steps) // 5,
        device=str(lorsa.W_V.device),
    )
    variance = data.mean_and_variance()[1]
    batches = (_side_by_side(data.x[rows], data.y[rows], data.kept[rows]) for rows in steps)
    trained = _TrainedOnSequences(lorsa, positions, variance)
    trainer = SubspaceSAETrainer(recipe, trained, batches, optimizer=optimizer)
    for batch in bar(batches, total=len(steps), unit="step", desc="Lorsa", progress=progress):
        trainer.step(batch)
        trainer.n_training_steps += 1
    tokens = torch.stack([data.kept[rows].sum() for rows in steps]).cumsum(0).tolist()
    return [
        {"tokens": tokens[int(point["tokens"]) // size - 1], "fvu": point["mse"] / variance}
        for point in trainer.history
    ]


def _side_by_side(x: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    """(batch * pos, 2 d_model + 1): one tensor of vectors, which is what the trainer takes."""
    return torch.cat([x, y, kept[..., None].to(x)], dim=-1).flatten(0, 1)


class _TrainedOnSequences(nn.Module):
    """What `SubspaceSAETrainer` asks of an SAE, for a Lorsa on batches of `_side_by_side`."""

    def __init__(self, lorsa: Lorsa, positions: int, variance: float) -> None:
        super().__init__()
        self.lorsa, self.positions, self.variance = lorsa, positions, variance
        self.cfg = SimpleNamespace(d_in=2 * lorsa.cfg.d_model + 1, d_sae=lorsa.cfg.n_heads)
        self.device, self.dtype = lorsa.W_V.device, lorsa.W_V.dtype

    @property
    def W_dec(self) -> Tensor:  # noqa: N802 - the trainer advises by it when a GPU's memory is full
        return self.lorsa.W_O

    def get_coefficients(self) -> dict[str, float]:
        return {}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        width = self.lorsa.cfg.d_model
        x, y, kept = step_input.sae_in.unflatten(0, (-1, self.positions)).split(
            [width, width, 1], dim=-1
        )
        kept = kept.squeeze(-1).bool()
        if not bool(kept.any()):
            raise SaesubError(
                "A batch came in which no position is kept, so it has no error to train on: give "
                "longer contexts, or a larger batch_size."
            )
        output, active = self.lorsa(x)
        y, output, heads = (t[kept] for t in (y, output, active.dense(self.cfg.d_sae)))
        mse = (output - y).square().sum(-1).mean()
        loss = mse / self.variance
        if not loss.isfinite():
            step = step_input.n_training_steps + 1
            raise SaesubError(f"the loss is {loss.item()} at step {step}: pass a smaller lr.")
        return TrainStepOutput(
            sae_in=y,
            sae_out=output,
            feature_acts=heads,
            hidden_pre=heads,  # SAELens' trainer passes it on and never reads it
            loss=loss,
            losses={"mse_loss": mse},
        )


@dataclass(frozen=True, eq=False)
class LorsaReport:
    """How well a Lorsa replaces its layer on `n_tokens` tokens that it was not trained on.

    Attributes:
        fvu: Σ‖y − ŷ‖² / Σ‖y − mean(y)‖² over the tokens.
        l0: mean number of heads active at a token.
        dead: (n_heads,) bool: not active at any of these tokens, which are thus the window.
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
    """Error, active heads and dead heads over every kept token of `held_out`.

    Raises SaesubError for another width, a batch_size below 1, or outputs that do not vary.
    """
    _check_width(lorsa, held_out)
    dead = torch.ones(lorsa.cfg.n_heads, dtype=torch.bool, device=lorsa.W_V.device)

    def judged() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in held_out.batches(whole_number(batch_size, "batch_size")):
            x, y, kept = (t.to(dead.device) for t in batch)
            output, active = lorsa(x)
            heads = active.dense(lorsa.cfg.n_heads)[kept]
            dead.logical_and_((heads == 0).all(0))
            yield y[kept].float(), output[kept], heads

    fit = unexplained(judged())
    return LorsaReport(fit.fvu, fit.l0, dead, fit.n_tokens)


def _check_width(lorsa: Lorsa, data: AttentionSequences) -> None:
    if data.x.shape[-1] != lorsa.cfg.d_model or data.y.shape != data.x.shape:
        raise SaesubError(
            f"this Lorsa reads and writes {lorsa.cfg.d_model} dimensions, the sequences hold "
            f"{tuple(data.x.shape)} and {tuple(data.y.shape)}: take them from the same model."
        )
