"""Known remedies against dead features, each to be combined with the others and with any start.

`Resampling`, `GhostGradients` and `KAnnealing` are given to `SubspaceSAETrainer(remedies=[...])`.
The others are settings of the SAE or the trainer: AuxK is SAELens' `aux_loss_coefficient`,
whitening its `normalize_activations="covariance_whitening"`, masked Adam
`optimizer="sparse_adam"`. What is done before training is in `saesub.starts` and
`saesub.subspace`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from sae_lens import BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saesub.errors import SaesubError
from saesub.remedy import Remedy, need_parameters
from saesub.resampling import Resampling
from saesub.training import SubspaceSAETrainer

__all__ = ["GhostGradients", "KAnnealing", "Resampling"]

_GHOST_ENTRIES = 2**23  # pre-activations of dead features held at a time


@dataclass(frozen=True)
class GhostGradients(Remedy):
    """Dead features learn to reconstruct what the living leave over.

    Jermyn & Templeton 2024, "Ghost Grads" (Anthropic, Circuits Updates, January 2024): in a second
    pass the dead features alone reconstruct the residual x - x̂, with exp in place of the activation
    function. Each token's output is scaled to half its residual's norm, and the squared error to
    the size of the ordinary one. Both scales, the residual and the decoder bias count as constants,
    so gradients reach the dead features' weights and nothing else.

    exp is taken of the plain pre-activations, whatever the SAE makes of them (TopK, thresholds,
    `rescale_acts_by_decoder_norm`). It costs two products of tokens × dead features × d_in,
    forward, and their backward passes, block by block. AuxK asks dead features for the same
    residual in another way: both together are two losses, not a contradiction.

    Raises:
        SaesubError: when a trainer is made: an SAE without W_enc and b_enc (gated, matching
            pursuit), or one that rescales each token by itself, so that its features live in
            another space than its residual.
    """

    loss_name: ClassVar[str | None] = "ghost_gradient_loss"

    def check(self, trainer: SubspaceSAETrainer) -> None:
        """Raise SaesubError if the SAE has no single pre-activation, or rescales by token."""
        need_parameters(self, trainer.sae, "W_enc", "b_enc")
        scaling = trainer.sae.cfg.normalize_activations
        if scaling in ("constant_norm_rescale", "layer_norm"):
            raise SaesubError(
                f"GhostGradients cannot take normalize_activations={scaling!r}: features and "
                "residual would be in different spaces. Use 'expected_average_only_in' or 'none'."
            )

    def extra_loss(self, trainer: SubspaceSAETrainer, output: TrainStepOutput) -> Float[Tensor, ""]:
        """The ghost loss: equal in size to the mean squared error, 0 while no feature is dead."""
        sae, rows = trainer.sae, trainer.dead_neurons.nonzero().squeeze(1)
        if not len(rows):
            return sae.b_dec.new_zeros(())
        x = output.sae_in.to(sae.dtype)
        residual = (x - output.sae_out).detach()
        centred = x - sae.b_dec.detach() if sae.cfg.apply_b_dec_to_input else x
        W_enc, b_enc = sae.W_enc.index_select(1, rows), sae.b_enc.index_select(0, rows)
        W_dec = sae.W_dec.index_select(0, rows)
        size = max(1, _GHOST_ENTRIES // len(rows))
        errors = [
            checkpoint(_ghost_error, *block, W_enc, b_enc, W_dec, use_reentrant=False)
            for block in zip(centred.split(size), residual.split(size), strict=True)
        ]
        total = torch.stack(errors).sum() / len(x)  # pyright: ignore[reportArgumentType]
        tiny = torch.finfo(total.dtype).tiny
        return total * (output.losses["mse_loss"].detach() / total.detach().clamp_min(tiny))


@dataclass(frozen=True)
class KAnnealing(Remedy):
    """k falls linearly from `k_start` to the SAE's own k over the first `share` of the steps.

    More features take part while directions are still random. k is `k_start` at the first step and
    the SAE's own from step `share * n_steps` on, rounded to a whole number for TopK; outside of
    steps (in checkpoints, evaluation and the finished SAE) it is always the SAE's own. A BatchTopK
    SAE's threshold follows its activations slowly: leave it some hundred steps at the final k.

    Args:
        k_start: from the SAE's k to d_sae; a whole number, for BatchTopK any.
        share: of the training steps, in (0, 1].

    Raises:
        SaesubError: `share` out of range; and, when a trainer is made, an SAE without a k, or
            `k_start` outside k..d_sae.
    """

    k_start: float
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SaesubError(f"share={self.share} of the training steps must lie in (0, 1].")

    def check(self, trainer: SubspaceSAETrainer) -> None:
        """Raise SaesubError if the SAE has no k, or `k_start` lies outside k..d_sae."""
        cfg = trainer.sae.cfg
        if not hasattr(cfg, "k") or not hasattr(trainer.sae.activation_fn, "k"):
            raise SaesubError(
                f"KAnnealing needs an SAE with a k, which {cfg.architecture()!r} has not: use a "
                "TopK or BatchTopK SAE, or leave it out."
            )
        if not cfg.k <= self.k_start <= cfg.d_sae:
            raise SaesubError(
                f"k_start={self.k_start} must lie in {cfg.k}..{cfg.d_sae}, from the SAE's k to its "
                "d_sae: k falls during annealing."
            )
        if _whole_k(cfg) and self.k_start != int(self.k_start):
            raise SaesubError(f"k_start={self.k_start} must be a whole number for a TopK SAE.")

    def k_at(self, step: int, n_steps: int, k: float) -> float:
        """k at a step, counted from 0, of `n_steps` that end at `k`; not yet rounded."""
        falling = max(1, round(self.share * n_steps))
        return self.k_start + (k - self.k_start) * min(1.0, step / falling)

    @contextmanager
    def around_step(self, trainer: SubspaceSAETrainer) -> Iterator[None]:
        """Let the SAE's config and activation function have this step's k until it is over."""
        sae, cfg = trainer.sae, trainer.cfg
        final, step = sae.cfg.k, trainer.n_training_samples // cfg.train_batch_size_samples
        k = self.k_at(step, cfg.total_training_steps, final)
        sae.cfg.k = sae.activation_fn.k = round(k) if _whole_k(sae.cfg) else k
        try:
            yield
        finally:
            sae.cfg.k = sae.activation_fn.k = final


def _whole_k(cfg: Any) -> bool:
    return not isinstance(cfg, BatchTopKTrainingSAEConfig)


def _ghost_error(
    centred: Float[Tensor, "n d_in"],
    residual: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in m"],
    b_enc: Float[Tensor, " m"],
    W_dec: Float[Tensor, "m d_in"],
) -> Float[Tensor, ""]:
    """Summed squared error of the dead features' output, scaled to half the residual's norm."""
    pre = centred @ W_enc + b_enc
    # A factor on a token's activations is lost in the scale below, so exp need not overflow.
    out = (pre - pre.detach().amax(-1, keepdim=True)).exp() @ W_dec
    norms = out.detach().norm(dim=-1, keepdim=True).clamp_min(torch.finfo(out.dtype).tiny)
    scale = residual.norm(dim=-1, keepdim=True) / (2 * norms)
    return (scale * out - residual).square().sum()
