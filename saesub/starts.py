"""What else can be done before training: another centre for the decoder bias, a scaled encoder.

Both combine with every way to draw directions, which are in `saesub.subspace`.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from saesub.dead import blocks_of
from saesub.encode import encoder_of
from saesub.errors import SaesubError

_ENCODER_BIASES = ("b_enc", "b_gate", "b_mag")
_ROWS_PER_BLOCK = 8192
_MAX_STEPS = 1000


@torch.no_grad()
def geometric_median(x: Float[Tensor, "n d"], *, tolerance: float = 1e-7) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the rows of `x`.

    Weiszfeld's iteration with the step of Vardi & Zhang (2000, "The multivariate L1-median") where
    it meets a row, in float64, from the mean. It ends when a step is shorter than `tolerance` times
    the mean distance; a row next to where it ends is then tried by their condition for being the
    median, since the iteration only creeps up on such a row.

    Raises:
        SaesubError: `x` is empty, not of shape (n, d), or not finite; or the iteration has not
            settled after 1,000 steps.
    """
    if x.ndim != 2 or not len(x):
        raise SaesubError(f"A median needs activations (n, d), n at least 1, not {tuple(x.shape)}.")
    if not x.sum(dtype=torch.float64).isfinite():
        raise SaesubError("activations hold NaN or infinite values")
    dtype = torch.promote_types(x.dtype, torch.float32)
    median = x.mean(0, dtype=torch.float64)
    for _ in range(_MAX_STEPS):
        pull, weight, n_here, distance, nearest = _pulls(x, median)
        strength = pull.norm()
        if strength <= n_here:
            return median.to(dtype)  # the rows here hold it against all others
        step = (1 - n_here / strength) * pull / weight
        median = median + step
        if step.norm() <= tolerance * distance / len(x):
            pull, _, n_here, _, _ = _pulls(x, x[nearest].double())
            return (x[nearest] if pull.norm() <= n_here else median).to(dtype)
    raise SaesubError(
        f"The geometric median has not settled after {_MAX_STEPS} steps: pass a larger tolerance "
        f"than {tolerance:g}."
    )


def _pulls(
    x: Float[Tensor, "n d"], point: Float[Tensor, " d"]
) -> tuple[Float[Tensor, " d"], Tensor, int, Tensor, Tensor]:
    """What the rows do to a point: sum of unit vectors towards the rows elsewhere, sum of their
    inverse distances, number of rows at the point itself, sum of distances, and the nearest row."""
    pull, distances = torch.zeros_like(point), []
    for block in x.split(_ROWS_PER_BLOCK):
        towards = block.double() - point
        distances.append(towards.norm(dim=1))
        pull += (1 / distances[-1]).where(distances[-1] > 0, 0.0) @ towards
    distance = torch.cat(distances)
    away = distance[distance > 0]
    return pull, (1 / away).sum(), len(x) - len(away), distance.sum(), distance.argmin()


@torch.no_grad()
def center_at(
    sae: SAE[Any], center: Float[Tensor, " d_in"], *, mean_norm: float | None = None
) -> None:
    """Set the decoder bias to `center`, and let the encoder see inputs centred there.

    As `saesub.center_biases`, which takes the mean; this takes any centre, such as
    `geometric_median`. Where the encoder does not subtract the decoder bias itself
    (`apply_b_dec_to_input=False`) its own bias does, for the encoder weights as they are now: call
    it after the directions are set.

    Args:
        sae: any SAELens training SAE.
        center: in the scale of the activations.
        mean_norm: mean L2 norm of the activations (`Spectrum.mean_norm`), asked for where the SAE
            rescales its input: the bias lives in that scale, √d_in / mean_norm. Exact for
            `expected_average_only_in`, else an approximation, as in `center_biases`.

    Raises:
        SaesubError: a centre of another width or not finite, a transcoder, an SAE that whitens its
            input (which centres it), or a missing `mean_norm`.
    """
    _check_autoencoder(sae, "center_at")
    _check_activations(sae, center, "center_at", ndim=1)
    scaled = sae.cfg.normalize_activations != "none"
    if scaled and mean_norm is None:
        raise SaesubError(
            "This SAE rescales its input "
            f"(normalize_activations={sae.cfg.normalize_activations!r}), and its bias with it: "
            "pass the activations' mean norm as mean_norm=spectrum.mean_norm."
        )
    scale = sae.cfg.d_in**0.5 / mean_norm if scaled and mean_norm is not None else 1.0
    sae.b_dec.copy_(center.to(sae.b_dec) * scale)
    for name, bias in sae.named_parameters():
        if name in _ENCODER_BIASES:
            subtracted = bool(sae.cfg.apply_b_dec_to_input)
            bias.copy_(torch.zeros_like(bias) if subtracted else -(sae.b_dec @ sae.W_enc))


@torch.no_grad()
def scale_encoder(sae: SAE[Any], factor: float) -> None:
    """Make every pre-activation `factor` times as large: encoder weights and biases, in place.

    Raises:
        SaesubError: `factor` is not above 0 and finite, or the SAE has no encoder of its own.
    """
    if not 0 < factor < float("inf"):
        raise SaesubError(f"factor={factor} must be above 0 and finite.")
    _check_encoder(sae)
    for name, parameter in sae.named_parameters():
        if name in ("W_enc", *_ENCODER_BIASES):
            parameter.mul_(factor)


@torch.no_grad()
def fit_encoder_scale(sae: SAE[Any], activations: Float[Tensor, "n d_in"]) -> float:
    """Scale the encoder so that the SAE as it is reconstructs best; returns the factor.

    In a wide dictionary, the more so inside a subspace, many features lie near any one token, and
    each of those that fire answers almost in full: the untrained sum overshoots. One number, by
    least squares over the whole dictionary, sets that right. A head start where a feature sees few
    tokens, and not a remedy for dead features, of which it can leave more (notebook 06). Call it
    last, after directions and biases are set; a baseline that a scaled start is compared with gets
    it as well.

    Args:
        sae: a SAELens training SAE whose activations grow with its encoder.
        activations: a few thousand tokens at the SAE's hook point, unscaled. Where the trainer
            scales its input (`expected_average_only_in`) they are scaled alike, √d_in / mean norm.

    Raises:
        SaesubError: activations of another shape, none, all zero or not finite; a transcoder, an
            SAE that whitens its input, has fixed thresholds (JumpReLU) or no encoder of its own; or
            reconstructions that are not finite, or have nothing of these activations.
    """
    _check_autoencoder(sae, "fit_encoder_scale")
    _check_activations(sae, activations, "fit_encoder_scale", ndim=2)
    _check_encoder(sae)
    if hasattr(sae, "threshold"):
        raise SaesubError(
            "fit_encoder_scale needs activations that grow with the encoder, and a JumpReLU's "
            "thresholds stay where they are: use scale_encoder with a factor of your own."
        )
    if not activations.any():
        raise SaesubError("Activations that are all zero have no scale to fit.")
    factor = _least_squares_factor(sae, activations)
    scale_encoder(sae, factor)
    return factor


def _least_squares_factor(sae: SAE[Any], activations: Float[Tensor, "n d_in"]) -> float:
    scale = 1.0
    if sae.cfg.normalize_activations == "expected_average_only_in":
        dtype = torch.promote_types(activations.dtype, torch.float32)  # float16 norms may overflow
        scale = sae.cfg.d_in**0.5 / activations.norm(dim=-1, dtype=dtype).mean().item()
    encode = encoder_of(sae)
    overlap = energy = 0.0
    for block in blocks_of(activations, len(activations)):
        x = (block * scale).to(sae.W_dec)
        reconstructed = sae.decode(encode(x))
        sae.process_sae_in(x)  # notes each token's own scale again, which decoding has used up
        silent = sae.run_time_activation_norm_fn_out(sae.b_dec.expand_as(x)).double()
        written = reconstructed.double() - silent
        overlap += ((x - silent) * written).sum().item()
        energy += written.square().sum().item()
    if not isfinite(energy):
        raise SaesubError("The SAE's reconstructions of these activations are not finite.")
    if not overlap > 0:
        raise SaesubError(
            "The SAE's features reconstruct nothing of these activations, so no factor fits: set "
            "its directions first, with initialize_in_subspace."
        )
    return overlap / energy


def _check_encoder(sae: SAE[Any]) -> None:
    if "W_enc" not in dict(sae.named_parameters()):
        raise SaesubError(
            f"An SAE of architecture {sae.cfg.architecture()!r} has no encoder to scale."
        )


def _check_autoencoder(sae: SAE[Any], name: str) -> None:
    if hasattr(sae.cfg, "d_out"):
        raise SaesubError(
            f"{name} is for autoencoders, and a transcoder reads one space and writes another: "
            "use center_biases and initialize_in_subspace with an input_spectrum."
        )
    if sae.cfg.normalize_activations == "covariance_whitening":
        raise SaesubError(
            f"{name} contradicts normalize_activations='covariance_whitening': the whitening is "
            "estimated when training starts, and centres its input. Use one of the two."
        )


def _check_activations(sae: SAE[Any], given: Tensor, name: str, ndim: int) -> None:
    """Finite, at least one, as wide as the SAE."""
    if given.ndim != ndim or not given.numel() or given.shape[-1] != sae.cfg.d_in:
        rows = "(n, d_in), n at least 1," if ndim == 2 else "(d_in,)"
        raise SaesubError(
            f"{name} needs activations {rows} {sae.cfg.d_in} wide, not of shape "
            f"{tuple(given.shape)}: measure them at the hook point that the SAE is trained on."
        )
    if not given.isfinite().all():
        raise SaesubError("activations hold NaN or infinite values")
