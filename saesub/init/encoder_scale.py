"""The length of the encoder alone, for an SAE whose decoder rows are to keep theirs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from saesub.arguments import matrix_of
from saesub.errors import SaesubError
from saesub.init.biases import check_autoencoder
from saesub.init.norm import (
    Pairs,
    check_activations,
    check_unhooked,
    encoder_factor,
    has_encoder,
    scale_encoder_columns,
)
from saesub.precision import without_autocast
from saesub.topk.eligibility import check_weights


@torch.no_grad()
@without_autocast()
def fit_encoder_scale(sae: SAE[Any], activations: Float[Tensor, "n d_in"]) -> float:
    """Scale the encoder alone so that the SAE as it is reconstructs best; returns the factor.

    `fit_norm` scales both sides; this is for an SAE whose decoder rows are to keep their length.
    Call it last, after directions and biases are set, and on a baseline as well.

    Args:
        sae: a SAELens training SAE whose activations grow with its encoder.
        activations: a few thousand tokens at the SAE's hook point, unscaled. Where the trainer
            scales its input (`expected_average_only_in`) they are scaled alike, √d_in / mean norm.

    Raises:
        SaesubError: activations of another shape, none, all zero or not finite; a transcoder, an
            SAE that whitens its input, has fixed thresholds (JumpReLU) or no encoder of its own; or
            reconstructions that are not finite, or have nothing of these activations.
    """
    check_autoencoder(sae, "fit_encoder_scale")
    check_weights(sae)
    check_unhooked(sae)
    activations = matrix_of(activations, "activations")
    check_activations(sae, activations, "fit_encoder_scale")
    _check_encoder(sae)
    if hasattr(sae, "threshold"):
        raise SaesubError(
            "fit_encoder_scale needs activations that grow with the encoder, and a JumpReLU's "
            "thresholds stay where they are: use scale_encoder with a factor of your own."
        )
    if not activations.any():
        raise SaesubError("The activations are all zero: measure more text, or another hook point.")
    scale = 1.0
    if sae.cfg.normalize_activations == "expected_average_only_in":
        dtype = torch.promote_types(activations.dtype, torch.float32)  # float16 norms may overflow
        scale = sae.cfg.d_in**0.5 / activations.norm(dim=-1, dtype=dtype).mean().item()
    factor = encoder_factor(sae, Pairs(activations, activations), scale)
    scale_encoder(sae, factor)
    return factor


@torch.no_grad()
def scale_encoder(sae: SAE[Any], factor: float) -> None:
    """Make every pre-activation `factor` times as large: encoder weights and biases, in place.

    Raises:
        SaesubError: `factor` is not above 0 and finite, or the SAE has no encoder of its own.
    """
    if not 0 < factor < float("inf"):
        raise SaesubError(f"factor={factor} must be above 0 and finite.")
    _check_encoder(sae)
    scale_encoder_columns(sae, factor)


def _check_encoder(sae: SAE[Any]) -> None:
    if not has_encoder(sae):
        raise SaesubError(
            f"An SAE of architecture {sae.cfg.architecture()!r} has no encoder to scale: "
            "leave scale_encoder out."
        )
