"""Resampling: dead features get new weights from inputs that the SAE reconstructs badly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from saesub.arguments import whole_number
from saesub.errors import SaesubError
from saesub.precision import where_float64
from saesub.topk.optim import FEATURE_AXIS
from saesub.training.mitigations.mitigation import Mitigation, need_parameters

if TYPE_CHECKING:  # the trainer imports what a mitigation is
    from saesub.training.trainer import SubspaceSAETrainer

_NORMS = "resampling.alive_norms"


@dataclass(frozen=True)
class Resampling(Mitigation):
    """Dead features get new weights from inputs that the SAE reconstructs badly.

    Bricken et al. 2023, "Towards Monosemanticity", appendix on neuron resampling: a dead feature's
    decoder row becomes the direction of an input drawn with probability proportional to its squared
    loss, its encoder the same direction at `encoder_norm` times the mean norm of the living, its
    bias 0, its Adam moments 0. The source leaves four things open; here:

    - The input's direction is taken from the decoder bias, as the encoder sees it. Where the
      encoder does not subtract that bias (`apply_b_dec_to_input=False`), its own bias does.
    - The decoder row gets the mean norm of the living (1 in the source, where all are 1).
    - Inputs come from the training batches, an equal part of the dead at each of `n_batches`
      successive steps. No input is drawn twice, or two features would stay equal forever; if there
      are more dead features than inputs with a loss and a direction, the rest stay dead until the
      next resampling.
    - A gated SAE's r_mag becomes 0 and a JumpReLU threshold its initial value.

    Args:
        every_tokens: resample after every so many tokens, up to the share `until` of the run.
        at_tokens: token counts to resample at, instead of `every_tokens`.
        encoder_norm: of a resampled feature, in mean norms of the living.
        n_batches: how many training batches one resampling draws from.
        seed: of the draws.

    Raises:
        SaesubError: neither or both of `every_tokens` and `at_tokens`, or settings out of range;
            and, when a trainer is made, an SAE without an encoder of its own, a schedule that ends
            before a feature can be dead or resamples again before the last one is over, or more
            batches than the dead window has; and, in training, a loss that is NaN or infinite.
    """

    every_tokens: int | None = None
    until: float = 0.5
    at_tokens: tuple[int, ...] = ()
    encoder_norm: float = 0.2
    n_batches: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        given = self.at_tokens
        if not isinstance(given, Iterable):
            raise SaesubError(f"at_tokens={given!r} must be a tuple of token counts.")
        numbers = {"at_tokens": tuple(sorted(whole_number(n, "at_tokens") for n in given))}
        numbers |= {"n_batches": whole_number(self.n_batches, "n_batches")}
        numbers |= {"seed": whole_number(self.seed, "seed", 0)}
        if self.every_tokens is not None:
            numbers |= {"every_tokens": whole_number(self.every_tokens, "every_tokens")}
        for name, value in numbers.items():
            object.__setattr__(self, name, value)
        if (self.every_tokens is None) == (not self.at_tokens):
            raise SaesubError(
                "Resampling needs to know when: pass either every_tokens=… or at_tokens=(…), "
                f"not {'both' if self.at_tokens else 'neither'}."
            )
        reals = isinstance(self.until, Real) and isinstance(self.encoder_norm, Real)
        if not (reals and 0 < self.until <= 1 and 0 < self.encoder_norm < float("inf")):
            raise SaesubError(
                f"{self} is out of range: encoder_norm must be above 0 and finite, until in (0, 1]."
            )

    def times(self, total_tokens: int) -> tuple[int, ...]:
        """The token counts at which resampling begins, in a run of `total_tokens`."""
        if self.every_tokens is None:
            return self.at_tokens
        return tuple(
            range(self.every_tokens, int(self.until * total_tokens) + 1, self.every_tokens)
        )

    def check(self, trainer: SubspaceSAETrainer) -> None:
        """Raise SaesubError if the SAE lacks an encoder or the schedule cannot work."""
        need_parameters(self, trainer.sae, "W_enc")
        cfg, window = trainer.cfg, trainer.dead_window_tokens
        times, spread = self.times(cfg.total_training_samples), self._spread(trainer)
        if not any(
            window <= time + spread and time <= cfg.total_training_samples for time in times
        ):
            raise SaesubError(
                f"{self} would never resample: no feature counts as dead before {window:,} tokens, "
                f"and the run ends at {cfg.total_training_samples:,}. Resample between the two, "
                "pass a smaller dead_window_tokens, or train longer."
            )
        if spread > window:
            raise SaesubError(
                f"{self} takes longer than the dead window of {window:,} tokens, so that features "
                f"it has just resampled would count as dead again: pass n_batches of at most "
                f"{window // cfg.train_batch_size_samples}, or a longer dead_window_tokens."
            )
        if any(b - a < spread for a, b in pairwise(times)):
            raise SaesubError(
                f"{self} would begin again before the last resampling is over: leave at least "
                f"n_batches = {self.n_batches} batches, {spread:,} tokens, between them."
            )

    @torch.no_grad()
    def after_step(self, trainer: SubspaceSAETrainer, output: TrainStepOutput) -> None:
        """Resample this batch's part of the dead features, if the step is part of a resampling."""
        done, now = self._parts(trainer)
        if now <= done:
            return
        dead = trainer.dead_neurons
        if done == 0 or _NORMS not in trainer.mitigation_state:
            trainer.mitigation_state[_NORMS] = _mean_norms(trainer.sae, ~dead)
        if not bool(dead.any()):
            return
        rng = np.random.default_rng([self.seed, trainer.n_training_samples])
        rows = dead.nonzero().squeeze(1)
        n_now = -(-len(rows) * (now - done) // (self.n_batches - done))
        directions = _directions(trainer.sae, output.sae_in)
        tokens = _draw_by_squared_loss(output, directions.any(-1), n_now, rng)
        chosen = torch.from_numpy(rng.permutation(len(rows))[: len(tokens)]).to(rows.device)
        self._restart(trainer, rows[chosen], directions[tokens])

    def may_change_weights(self, trainer: SubspaceSAETrainer) -> bool:
        """Whether the last step was part of a resampling; asks no device."""
        done, now = self._parts(trainer)
        return now > done

    def _spread(self, trainer: SubspaceSAETrainer) -> int:
        return self.n_batches * trainer.cfg.train_batch_size_samples

    def _parts(self, trainer: SubspaceSAETrainer) -> tuple[int, int]:
        """How many of a resampling's `n_batches` parts were due before the last step, and are now.

        They are due by tokens, whatever size batches have; (0, 0) outside of a resampling.
        """
        size = trainer.cfg.train_batch_size_samples
        for time in reversed(self.times(trainer.cfg.total_training_samples)):
            seen = (trainer.tokens_before, trainer.n_training_samples)
            done, now = (min(self.n_batches, max(0, (n - time) // size + 1)) for n in seen)
            if now:
                return done, now
        return 0, 0

    def _restart(
        self,
        trainer: SubspaceSAETrainer,
        rows: Int[Tensor, " m"],
        directions: Float[Tensor, "m d_in"],
    ) -> None:
        sae, (encoder, decoder) = trainer.sae, trainer.mitigation_state[_NORMS]
        columns = directions.T * (self.encoder_norm * encoder).to(directions)
        sae.W_dec[rows] = directions * decoder.to(directions)
        sae.W_enc[:, rows] = columns
        fresh = {"threshold": getattr(sae.cfg, "jumprelu_init_threshold", 0.0)}
        b_in = None if sae.cfg.apply_b_dec_to_input else -(sae.b_dec @ columns)
        for name, parameter in sae.named_parameters():
            if name.startswith("b_") and name in FEATURE_AXIS and b_in is not None:
                parameter[rows] = b_in
            elif name in FEATURE_AXIS and parameter.ndim == 1:
                parameter[rows] = fresh.get(name, 0.0)
        _forget_moments(trainer.optimizer, sae, rows)
        trainer.tokens_since_fired[rows] = 0
        trainer.n_forward_passes_since_fired[rows] = 0


def _directions(sae: Any, inputs: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    """Unit vectors from the decoder bias to the inputs; 0 for an input that is the bias."""
    seen = sae.process_sae_in(inputs)  # less b_dec where apply_b_dec_to_input
    if not sae.cfg.apply_b_dec_to_input:
        seen = seen - sae.b_dec
    return torch.nn.functional.normalize(seen, dim=-1)


def _mean_norms(sae: Any, alive: Tensor) -> Float[Tensor, " 2"]:
    """Mean norm of the living features' encoder and decoder weights; of all, if none lives."""
    norms = torch.stack([sae.W_enc.norm(dim=0), sae.W_dec.norm(dim=1)])
    return (norms[:, alive] if bool(alive.any()) else norms).mean(1)


def _draw_by_squared_loss(
    output: TrainStepOutput, may_be_drawn: Bool[Tensor, " n"], n: int, rng: np.random.Generator
) -> Int[Tensor, " m"]:
    """At most `n` distinct tokens, each drawn with probability proportional to its loss squared."""
    x, x_hat = (where_float64(t).double() for t in (output.sae_in, output.sae_out))
    loss = ((x - x_hat).square().sum(-1).cpu() * may_be_drawn.cpu()).numpy()
    if not np.isfinite(loss).all():
        raise SaesubError(
            "Resampling draws inputs by their loss, which is NaN or infinite for some: train with "
            "a smaller lr, or without autocast in float16."
        )
    weights = (loss / (loss.max() or 1.0)) ** 2  # below the largest, none overflows
    share = weights / (weights.sum() or 1.0)
    m = min(n, int(np.count_nonzero(share)))
    drawn = rng.choice(len(share), m, replace=False, p=share) if m else np.zeros(0, dtype=np.int64)
    return torch.from_numpy(drawn).to(output.sae_in.device)


def _forget_moments(optimizer: torch.optim.Adam, sae: Any, rows: Int[Tensor, " m"]) -> None:
    for name, parameter in sae.named_parameters():
        kept = optimizer.state.get(parameter, {})
        if name in FEATURE_AXIS and "exp_avg" in kept:
            for moment in ("exp_avg", "exp_avg_sq"):
                kept[moment].index_fill_(FEATURE_AXIS[name], rows, 0.0)
            if "moved" in kept:  # there is nothing left that could still have to decay
                kept["moved"][rows] = int(kept["step"])
