"""Ghost gradients: dead features learn from the residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saesub.errors import SaesubError
from saesub.training.mitigations.mitigation import Mitigation, need_parameters

if TYPE_CHECKING:  # the trainer imports what a mitigation is
    from saesub.training.trainer import SubspaceSAETrainer


_GHOST_ENTRIES = 2**23  # pre-activations of dead features held at a time


@dataclass(frozen=True)
class GhostGradients(Mitigation):
    """Dead features learn to reconstruct the residual of the others.

    Jermyn & Templeton 2024, "Ghost Grads" (Anthropic, Circuits Updates, January 2024): in a second
    pass the dead features alone reconstruct the residual x - x̂, with exp in place of the
    activation function. Each token's output is scaled to half its residual's norm, and the squared
    error to the size of the ordinary one. Both scales, the residual and the decoder bias count as
    constants, so gradients reach the dead features' weights and nothing else.

    exp is taken of the plain pre-activations, before TopK, thresholds and
    `rescale_acts_by_decoder_norm`. The cost is two products of tokens × dead features × d_in,
    forward, and their backward passes, block by block. AuxK asks dead features for the same
    residual in another way; the two losses can be used together.

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
