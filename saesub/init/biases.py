"""Biases that centre: a decoder bias at the mean (or another centre), an encoder that sees it taken
off.

The first kind of feature death is an offset: activations far from zero make every pre-activation
alike. Both initialisations that are compared get the same biases.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from saesub.activations.checks import all_finite, require_finite
from saesub.activations.spectrum import Spectrum, require_spectrum
from saesub.arguments import matrix_of, require_sae
from saesub.errors import SaesubError
from saesub.loading.models import same_model
from saesub.precision import where_float64, without_autocast
from saesub.topk.eligibility import check_weights

# What SAELens and this package write into an SAE's metadata in training.
_OF_TRAINING = ("l0", "num_dead_features", "activations_scaled_by")
ENCODER_BIASES = ("b_enc", "b_gate", "b_mag")
_ROWS_PER_BLOCK = 8192
_MAX_STEPS = 1000


@torch.no_grad()
@without_autocast()
def center_biases(
    sae: SAE[Any], spectrum: Spectrum, *, input_spectrum: Spectrum | None = None
) -> None:
    """Set the decoder bias to the mean activation, and let the encoder see centred inputs.

    Weights stay as they are. Where the encoder does not subtract the decoder bias itself
    (`apply_b_dec_to_input=False`, transcoders), its own bias takes the mean out. An SAE that
    rescales its input gets the mean in that scale, √d / E‖x‖: exact for `expected_average_only_in`,
    an approximation for `layer_norm` and `constant_norm_rescale`, which scale each token by itself.
    What a layer norm takes off each token, its mean over dimensions, is off the mean as well.

    The spectrum's hook point and model are noted in `sae.cfg.metadata`, where it names none yet.

    Args:
        sae: any SAELens training SAE, or a transcoder of any kind.
        spectrum: of the activations that are reconstructed.
        input_spectrum: of the activations that a transcoder reads; refused for an autoencoder.

    Raises:
        SaesubError: a spectrum of another width or not finite, an SAE that whitens its input, has
            no bias, was trained before or is made for inference, a transcoder without its input
            spectrum, or an autoencoder with one.
    """
    check_fits(sae, spectrum, input_spectrum)
    with unchanged_on_error(sae):
        set_biases(sae, spectrum, input_spectrum)
    note_source(sae, spectrum, input_spectrum)


@contextmanager
def unchanged_on_error(sae: SAE[Any]) -> Iterator[None]:
    """Leave the SAE's parameters as they were if the block raises, or if it makes one of them NaN
    or infinite, which raises SaesubError."""
    before = {name: value.detach().clone() for name, value in sae.named_parameters()}
    try:
        yield
        for name, value in sae.named_parameters():
            if not all_finite(value):
                raise SaesubError(
                    f"{name} became NaN or infinite: these activations are too large, or vary too "
                    "little, for this initialisation; scale them, or pass directions='flat'."
                )
    except BaseException:
        for name, value in sae.named_parameters():
            value.data.copy_(before[name])
        raise


def set_biases(sae: SAE[Any], spectrum: Spectrum, input_spectrum: Spectrum | None) -> None:
    """`center_biases` without its other checks and its notes."""
    _check_bias(sae)
    read = seen_by(sae, input_spectrum or spectrum)
    if input_spectrum is None:
        sae.b_dec.copy_(read.mean * input_scale(sae, read))
    else:
        sae.b_dec.copy_(spectrum.mean)
    _center_encoder(sae, (read.mean * input_scale(sae, read)).to(sae.W_enc))


@torch.no_grad()
@without_autocast()
def center_at(
    sae: SAE[Any], center: Float[Tensor, " d_in"], *, mean_norm: float | None = None
) -> None:
    """`center_biases` at any centre, such as `geometric_median`, for the weights as they are now.

    Args:
        sae: any SAELens training SAE.
        center: in the scale of the activations.
        mean_norm: mean L2 norm of the activations (`Spectrum.mean_norm`), asked for where the SAE
            rescales its input: the bias lives in that scale, √d_in / mean_norm.

    Raises:
        SaesubError: a centre of another width or not finite, a transcoder, an SAE that whitens its
            input (which centres it), has a layer norm or no bias, or a missing `mean_norm`.
    """
    check_autoencoder(sae, "center_at")
    if sae.cfg.normalize_activations == "layer_norm":
        raise SaesubError(
            "The mean norm does not tell by what a layer norm divides, so center_at cannot scale "
            "the centre: use center_biases."
        )
    check_new(sae)
    _check_bias(sae)
    center = matrix_of(center, "center")
    if center.shape != (sae.cfg.d_in,):
        raise SaesubError(
            f"center_at needs a centre ({sae.cfg.d_in},), not of shape {tuple(center.shape)}: take "
            "it of activations at the hook point that the SAE is trained on."
        )
    require_finite(center[None])
    scaled = sae.cfg.normalize_activations != "none"
    if mean_norm is not None and not (mean_norm > 0 and isfinite(mean_norm)):
        raise SaesubError(f"mean_norm must be above 0 and finite, not {mean_norm!r}.")
    if scaled and mean_norm is None:
        raise SaesubError(
            "This SAE rescales its input "
            f"(normalize_activations={sae.cfg.normalize_activations!r}), and its bias with it: "
            "pass the activations' mean norm as mean_norm=spectrum.mean_norm."
        )
    scale = sae.cfg.d_in**0.5 / mean_norm if scaled and mean_norm is not None else 1.0
    with unchanged_on_error(sae):
        sae.b_dec.copy_(center.to(sae.b_dec) * scale)
        _center_encoder(sae, sae.b_dec)


@torch.no_grad()
def geometric_median(x: Float[Tensor, "n d"], *, tolerance: float = 1e-7) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the rows of `x`.

    Weiszfeld's iteration with the step of Vardi & Zhang (2000, "The multivariate L1-median") where
    it meets a row, in float64, from the mean. It ends when the unit vectors towards all rows sum up
    to no more than `tolerance` times their number. Where it ends, or where its steps become shorter
    than `tolerance` times the mean distance, the nearest row is tried by their condition for being
    the median, since the iteration only creeps up on such a row.

    Raises:
        SaesubError: `x` is empty, not of shape (n, d), or not finite; or the iteration has not
            settled after 1,000 steps, as where two far groups have nearly the same size.
    """
    x = matrix_of(x, "x")
    if x.ndim != 2 or not len(x):
        raise SaesubError(f"A median needs activations (n, d), n at least 1, not {tuple(x.shape)}.")
    require_finite(x)
    dtype, home = torch.promote_types(x.dtype, torch.float32), x.device
    x = where_float64(x)
    median = x.mean(0, dtype=torch.float64)
    for _ in range(_MAX_STEPS):
        pull, weight, n_here, distance, nearest = _pulls(x, median)
        strength = pull.norm()
        if strength <= n_here:
            return median.to(home, dtype)  # the rows here hold it against all others
        step = (1 - n_here / strength) * pull / weight
        median, settled = median + step, strength - n_here <= tolerance * len(x)
        if settled or step.norm() <= tolerance * distance / len(x):
            pull, _, n_here, _, _ = _pulls(x, x[nearest].double())
            if settled or pull.norm() <= n_here:
                return (x[nearest] if pull.norm() <= n_here else median).to(home, dtype)
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


def seen_by(sae: SAE[Any], spectrum: Spectrum) -> Spectrum:
    """The spectrum of what an SAE reads but for its scale: a layer norm takes each token's mean
    over dimensions off, which leaves no variance along that direction."""
    if sae.cfg.normalize_activations != "layer_norm":
        return spectrum
    mean, covariance = without_mean(spectrum.mean), without_mean(spectrum.covariance)
    covariance = without_mean(covariance.T)
    before, after = (
        m.square().sum() + c.trace()
        for m, c in ((spectrum.mean, spectrum.covariance), (mean, covariance))
    )
    norm = spectrum.mean_norm * (after / before).clamp(min=0).sqrt().nan_to_num().item()
    return replace(spectrum, mean=mean, covariance=covariance, mean_norm=norm)


def without_mean(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Each row without its mean."""
    return x - x.mean(-1, keepdim=True)


def input_scale(sae: SAE[Any], spectrum: Spectrum) -> float:
    """What an SAE multiplies its input by, on average, before it encodes: √d / E‖x‖, or 1."""
    if sae.cfg.normalize_activations == "none":
        return 1.0
    if not spectrum.mean_norm > 0:
        raise SaesubError(
            "The spectrum's activations are all zero: measure more text, or another site."
        )
    return spectrum.d**0.5 / spectrum.mean_norm


def check_fits(sae: SAE[Any], spectrum: Spectrum, input_spectrum: Spectrum | None = None) -> bool:
    """Whether the SAE is a transcoder. Raises SaesubError where the spectra are not the SAE's."""
    require_sae(sae)
    require_spectrum(spectrum)
    if input_spectrum is not None:
        require_spectrum(input_spectrum, "input_spectrum")
    is_transcoder = hasattr(sae.cfg, "d_out")
    if sae.cfg.normalize_activations == "covariance_whitening":
        raise SaesubError(
            "This SAE whitens its input (normalize_activations='covariance_whitening'), and the "
            "whitening is estimated after initialisation: in whitened space every direction is "
            "equally active, so a basis from raw activations would be wrong. "
            "Use normalize_activations='none' or 'expected_average_only_in'."
        )
    if is_transcoder and input_spectrum is None:
        raise SaesubError(
            "A transcoder reads one space and writes another: pass the spectrum of what it reads "
            "as input_spectrum=…."
        )
    if not is_transcoder and input_spectrum is not None:
        raise SaesubError("input_spectrum is for transcoders: leave it out.")
    check_new(sae)
    pairs = [("spectrum", spectrum, sae.W_dec.shape[1])]
    if input_spectrum is not None:
        pairs.append(("input_spectrum", input_spectrum, sae.W_enc.shape[0]))
    for name, given, width in pairs:
        if given.d != width:
            raise SaesubError(
                f"{name} is {given.d} wide but the SAE needs {width}: "
                "measure it at the hook point that the SAE is trained on."
            )
        numbers = (given.mean, given.covariance, torch.tensor(given.mean_norm))
        if not all(map(all_finite, numbers)):
            raise SaesubError(f"{name} holds NaN or infinite values: measure it again.")
    _check_source(sae, spectrum, input_spectrum)
    return is_transcoder


def check_new(sae: SAE[Any]) -> None:
    """Refuse an SAE whose weights are to be used, not drawn, or could not be trained from. Raises
    SaesubError."""
    if not hasattr(sae, "training_forward_pass") and not hasattr(sae.cfg, "d_out"):
        raise SaesubError(
            f"{type(sae).__name__} is made for inference, and its weights would be lost: "
            "initialise one of SAELens' training classes."
        )
    known = [name for name in _OF_TRAINING if sae.cfg.metadata[name] is not None]
    if known:
        raise SaesubError(
            f"This SAE was trained (its metadata says {' and '.join(known)}), and its weights "
            "would be lost: make a new one to initialise."
        )
    check_weights(sae)


def check_autoencoder(sae: SAE[Any], name: str) -> None:
    """Refuse a transcoder and an SAE that whitens its input. Raises SaesubError."""
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


def _check_bias(sae: SAE[Any]) -> None:
    """Refuse an SAE of which SAELens uses no bias. Raises SaesubError."""
    if sae.cfg.architecture() == "matching_pursuit" and not sae.cfg.apply_b_dec_to_input:
        raise SaesubError(
            "A matching pursuit SAE with apply_b_dec_to_input=False adds its decoder bias nowhere, "
            "so that it cannot be centred: make it with apply_b_dec_to_input=True."
        )


def _center_encoder(sae: SAE[Any], seen: Float[Tensor, " d_in"]) -> None:
    """Let pre-activations be 0 where the input is `seen`, given in the scale that is encoded."""
    subtracts_b_dec = sae.cfg.apply_b_dec_to_input and not hasattr(sae.cfg, "d_out")
    for name, bias in sae.named_parameters():
        if name in ENCODER_BIASES:
            # A gated SAE's magnitudes have encoder columns of their own length.
            length = sae.get_parameter("r_mag").exp() if name == "b_mag" else 1.0
            bias.copy_(torch.zeros_like(bias) if subtracts_b_dec else -(seen @ sae.W_enc) * length)


def note_source(sae: SAE[Any], spectrum: Spectrum, input_spectrum: Spectrum | None) -> None:
    """SAELens splices an SAE in at `hook_name`; a transcoder writes at `hook_name_out`."""
    for name, value in _source(spectrum, input_spectrum).items():
        if sae.cfg.metadata[name] is None:
            sae.cfg.metadata[name] = value


def _source(spectrum: Spectrum, input_spectrum: Spectrum | None) -> dict[str, str]:
    """What spectra say of hook points and model, by the names that SAELens has for it."""
    read = (input_spectrum or spectrum).metadata
    known = {"hook_name": read.get("hook_name"), "model_name": read.get("model")}
    if input_spectrum is not None:
        known["hook_name_out"] = spectrum.metadata.get("hook_name")
    return {name: value for name, value in known.items() if value is not None}


def _check_source(sae: SAE[Any], spectrum: Spectrum, input_spectrum: Spectrum | None) -> None:
    """Warn where the SAE's metadata names another hook point or model; one may have two names."""
    for name, value in _source(spectrum, input_spectrum).items():
        own = sae.cfg.metadata[name]
        same = own == value or (name == "model_name" and own and same_model(own, value))
        if own is not None and not same:
            warnings.warn(
                f"The spectrum is of {name} {value!r}, and the SAE's metadata says {own!r}: if "
                "they are not two names for one, measure the spectrum where the SAE is trained.",
                stacklevel=4,
            )
