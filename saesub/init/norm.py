"""How long features start: one norm for decoder rows and encoder columns.

With SAELens' default (`decoder_init_norm=0.1`) an untrained SAE writes next to nothing, and most
features of a TopK SAE die before the others have grown. With unit rows a wide dictionary writes too
much, since many features near a token each answer in full. The authors of arXiv 2508.16929 search
one norm for both sides, by the least reconstruction error of the untrained SAE. With rows and
columns times c the SAE writes c² times as much wherever its activations grow with its encoder, so
the best c is the root of a least-squares factor, and one pass over some thousand tokens finds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import exp, isfinite, log, sqrt
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE, BatchTopKTrainingSAE
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from saesub.activations.checks import require_finite
from saesub.activations.spectrum import Spectrum, massive
from saesub.arguments import matrix_of, whole_number
from saesub.errors import SaesubError
from saesub.init.biases import (
    ENCODER_BIASES,
    check_autoencoder,
    check_fits,
    input_scale,
    unchanged_on_error,
)
from saesub.precision import where_float64, without_autocast
from saesub.topk.eligibility import is_hooked
from saesub.topk.encode import autoencoder_of, flat_heads

_TOKENS = 4096
TOKENS_PER_BLOCK = 1024  # bounds the (tokens, d_sae) block of features
_LEAST, _MOST, _GRID = 1e-3, 1e3, 19  # norms tried where no factor gives the best
_TOKENS_OF_SEARCH = 1024
_MOST_SPREAD = 1.5  # of the logarithm of tokens' lengths
_MOST_OFFSET = 2.0  # of the mean, in standard deviations, at which E‖x‖ still tells the spread
_FEWEST = 100  # tokens, to compare their mean norm with the spectrum's
_OTHER_SCALE = 2.0  # times the spectrum's mean norm
_SAMPLE_SEED = 2**32  # added, so that draws are independent of directions of the same seed


class Pairs(NamedTuple):
    """What an SAE reads and what it is to write at the same tokens, in the scale of training."""

    read: Float[Tensor, "n d_in"]
    written: Float[Tensor, "n d_out"]


@torch.no_grad()
@without_autocast()
def fit_norm(
    sae: SAE[Any],
    spectrum: Spectrum,
    *,
    activations: Float[Tensor, "n d_in"] | None = None,
    seed: int = 0,
) -> float:
    """Give all decoder rows one norm, and encoder columns as much, at which the untrained SAE
    reconstructs best; returns the norm.

    `initialize_in_subspace` calls it; call it, after `center_biases`, on a baseline that is to be
    compared. Directions stay. Each encoder column keeps its length relative to its decoder row, so
    that a tied SAE stays tied. A JumpReLU's thresholds stay, and so its norm is searched for.
    A matching pursuit SAE keeps the unit norm that SAELens prescribes.

    Args:
        sae: any SAELens training SAE.
        spectrum: of the activations that it is trained on.
        activations: (n, d_in) at the same hook point, unscaled, of which 4,096 are used, evenly
            spaced, without massive ones where the spectrum leaves them out. Without activations as
            many are drawn, with the spectrum's mean, covariance and mean norm.
        seed: of that draw.

    Raises:
        SaesubError: a spectrum or activations of another width, activations that are not finite,
            all zero or of another scale than the spectrum, a transcoder, an SAE that whitens its
            input, has hooks, writes nothing, was trained before or is made for inference. The SAE
            is then left as it was.
    """
    check_autoencoder(sae, "fit_norm")
    check_fits(sae, spectrum)
    seed = whole_number(seed, "seed", 0)
    if activations is not None:
        activations = matrix_of(activations, "activations")
        check_activations(sae, activations, "fit_norm")
        check_same_scale(activations, spectrum)
    else:
        check_draws(sae, spectrum)
    x = sample_of(spectrum, activations, seed)
    scaled = x[counted(spectrum, x)] * scale_in_training(sae, spectrum)
    with unchanged_on_error(sae):
        return set_best_norm(sae, Pairs(scaled, scaled))


def sample_of(
    spectrum: Spectrum, activations: Float[Tensor, "n d"] | None, seed: int
) -> Float[Tensor, "n d"]:
    """`_TOKENS` of the activations, evenly spaced, or as many draws from the spectrum; float32.

    The draws have the mean, the covariance and the mean norm of the spectrum: each deviation from
    the mean is a Gaussian draw times a log-normal length of mean square 1. Without these lengths
    the norm of a BatchTopK SAE would come out too large, since in real text a few long tokens take
    most of the batch's active entries.
    """
    if activations is not None:
        if not activations.any():
            raise SaesubError(
                "The activations are all zero: measure more text, or another hook point."
            )
        return _evenly(activations, _TOKENS).float()
    generator = torch.Generator().manual_seed(_SAMPLE_SEED + seed)
    coordinates = torch.randn(_TOKENS, spectrum.d, generator=generator, dtype=torch.float32)
    lengths = torch.randn(_TOKENS, 1, generator=generator, dtype=torch.float32)
    deviations = (
        coordinates * spectrum.eigenvalues.sqrt().float()
    ) @ spectrum.eigenvectors.T.float()
    mean = spectrum.mean.float()

    def drawn(spread: float) -> Float[Tensor, "n d"]:
        return mean + deviations * (spread * lengths - spread**2).exp()

    def too_long(spread: float) -> float:
        return drawn(spread).norm(dim=-1).mean().item() - spectrum.mean_norm

    if too_long(0.0) <= 0:
        return drawn(0.0)
    if too_long(_MOST_SPREAD) >= 0:
        return drawn(_MOST_SPREAD)
    spread: Any = brentq(too_long, 0.0, _MOST_SPREAD, xtol=1e-3)
    return drawn(spread)


def counted(spectrum: Spectrum, x: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
    """Which tokens the spectrum would count: not massive ones, unless it has kept them.

    A BatchTopK SAE would give them most of its active entries, and its norm would be theirs.
    """
    return torch.full_like(x[:, 0], spectrum.keeps_massive, dtype=torch.bool) | ~massive(x)


def check_draws(sae: SAE[Any], spectrum: Spectrum) -> None:
    """Refuse draws from the spectrum where they cannot tell the norm. Raises SaesubError.

    A BatchTopK SAE shares its active entries over the tokens of a batch by their lengths. Where the
    mean is far larger than the deviations, the mean norm says nothing about these lengths.
    """
    deviation = spectrum.eigenvalues.sum().sqrt()
    if isinstance(sae, BatchTopKTrainingSAE) and spectrum.mean.norm() > _MOST_OFFSET * deviation:
        raise SaesubError(
            "The mean of these activations is so large that the spectrum does not tell the norm of "
            "a BatchTopK SAE: pass activations=, some thousand tokens of the same hook point."
        )


def _evenly(x: Tensor, n: int) -> Tensor:
    """At most `n` rows, evenly spaced from the first to the last."""
    return x[torch.linspace(0, len(x) - 1, min(n, len(x))).long().to(x.device)]


def scale_in_training(sae: SAE[Any], spectrum: Spectrum) -> float:
    """What SAELens' trainer, and not the SAE itself, multiplies activations by."""
    by_trainer = sae.cfg.normalize_activations == "expected_average_only_in"
    return input_scale(sae, spectrum) if by_trainer else 1.0


def set_best_norm(sae: SAE[Any], pairs: Pairs) -> float:
    """`fit_norm` on pairs in the scale of training, for an SAE or transcoder that may be changed.

    Raises SaesubError for an SAE that writes nothing of what it is to write, or not finite.
    """
    check_unhooked(sae)
    set_unit_norms(sae)
    if not has_encoder(sae):
        return 1.0  # SAELens' matching pursuit divides by no norm and prescribes this one
    if hasattr(sae, "threshold"):
        norm = _searched_norm(sae, Pairs(*(_evenly(part, _TOKENS_OF_SEARCH) for part in pairs)))
    else:
        norm = sqrt(encoder_factor(sae, pairs))
    scale_features(sae, norm)
    # For trainers whose processes hold a slice of the features: the norm depends on their number.
    sae.cfg.metadata.norm_fitted_to_d_sae = sae.cfg.d_sae
    return norm


def set_unit_norms(sae: SAE[Any]) -> None:
    """Give decoder rows norm 1 and scale each encoder column alike. Raises SaesubError for a row
    that is zero."""
    lengths = sae.W_dec.norm(dim=-1)
    if not bool((lengths > 0).all()):
        raise SaesubError(
            f"{int((lengths == 0).sum())} decoder rows are zero and have no direction to give a "
            "norm: set the directions first, with initialize_in_subspace."
        )
    scale_features(sae, 1 / lengths)


def check_unhooked(sae: SAE[Any]) -> None:
    """Refuse an SAE whose hooks would take part in what is fitted. Raises SaesubError."""
    if is_hooked(sae):
        raise SaesubError(
            "The SAE has hooks, and its norm would be fitted to what they make of it: remove them "
            "with sae.reset_hooks()."
        )


def encoder_factor(sae: SAE[Any], pairs: Pairs, scale: float = 1.0) -> float:
    """The factor on what the SAE's features write that brings it nearest to what they should."""
    encode_and_decode = autoencoder_of(sae)
    blocks = (part.split(TOKENS_PER_BLOCK) for part in pairs)

    def target_and_written() -> Iterator[tuple[Tensor, Tensor]]:
        for read, target in zip(*blocks, strict=True):
            x, y = ((part * scale).to(sae.W_dec) for part in (read, target))
            features, rebuilt = encode_and_decode(x)
            with flat_heads(sae):
                sae.process_sae_in(x)  # notes each token's own scale, by which decoding divides
                silent = sae.decode(features * 0)
            y, rebuilt, silent = (where_float64(t).double() for t in (y, rebuilt, silent))
            yield y - silent, rebuilt - silent

    return least_squares_factor(target_and_written())


def least_squares_factor(blocks: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The factor on the second tensors that brings them nearest to the first.

    Args:
        blocks: pairs (n, d_out) of what an SAE's features are to write and what they do write.

    Raises:
        SaesubError: the features write nothing of it, or values that are not finite.
    """
    overlap = energy = 0.0
    for target, written in blocks:
        target, written = where_float64(target), where_float64(written).double()
        overlap += (target * written).sum().item()
        energy += written.square().sum().item()
    if not isfinite(energy):
        raise SaesubError(
            "The SAE's reconstructions of these activations are not finite: check its weights, or "
            "pass norm='keep'."
        )
    if not overlap > 0:
        raise SaesubError(
            "The SAE's features reconstruct nothing of these activations, so no factor fits: set "
            "its directions first, with initialize_in_subspace."
        )
    return overlap / energy


def _searched_norm(sae: SAE[Any], pairs: Pairs) -> float:
    """The best norm of an SAE with unit rows and thresholds of its own: a grid, then between."""
    now = 1.0

    def error(log_norm: float) -> float:
        nonlocal now
        scale_features(sae, exp(log_norm) / now)
        now = exp(log_norm)
        blocks = (part.split(TOKENS_PER_BLOCK) for part in pairs)
        with flat_heads(sae):
            return sum(
                (sae.decode(sae.encode(x.to(sae.W_dec))) - y.to(sae.W_dec)).square().sum().item()
                for x, y in zip(*blocks, strict=True)
            )

    grid = torch.linspace(log(_LEAST), log(_MOST), _GRID).tolist()
    errors = [error(value) for value in grid]
    best = min(range(_GRID), key=errors.__getitem__)
    between = grid[max(0, best - 1)], grid[min(_GRID - 1, best + 1)]
    found: Any = minimize_scalar(error, bounds=between, method="bounded", options={"xatol": 1e-3})
    scale_features(sae, 1 / now)
    if not found.fun < errors[0]:  # at the least norm the features write nothing
        raise SaesubError(
            "No norm lets the SAE's features reconstruct anything of these activations: its "
            "thresholds may be too high for them; scale the activations, or pass norm='keep'."
        )
    return exp(found.x)


def scale_features(sae: SAE[Any], factor: float | Float[Tensor, " d_sae"]) -> None:
    """Multiply decoder rows, encoder columns and encoder biases, each feature's by its factor."""
    sae.W_dec.mul_(factor.unsqueeze(-1) if isinstance(factor, Tensor) else factor)
    scale_encoder_columns(sae, factor)


def scale_encoder_columns(sae: SAE[Any], factor: float | Float[Tensor, " d_sae"]) -> None:
    for name, parameter in sae.named_parameters():
        if name in ("W_enc", *ENCODER_BIASES):
            parameter.mul_(factor)


def check_activations(sae: SAE[Any], given: Tensor, name: str) -> None:
    """Refuse activations of another width, none, all zero, or not finite. Raises SaesubError."""
    if given.ndim != 2 or not given.numel() or given.shape[-1] != sae.cfg.d_in:
        raise SaesubError(
            f"{name} needs activations (n, d_in), n at least 1, {sae.cfg.d_in} wide, not of shape "
            f"{tuple(given.shape)}: measure them at the hook point that the SAE is trained on."
        )
    require_finite(given)


def check_same_scale(given: Float[Tensor, "n d"], spectrum: Spectrum) -> None:
    """Refuse activations that were scaled, or are of another place than the spectrum, by their mean
    norm; a few tokens tell nothing. Raises SaesubError."""
    x = _evenly(given, _TOKENS).float()
    norms = x[counted(spectrum, x)].norm(dim=-1)
    if len(norms) < _FEWEST or not spectrum.mean_norm > 0 or not given.any():
        return  # zeros are refused by those who draw from them
    ratio = norms.mean().item() / spectrum.mean_norm
    if not 1 / _OTHER_SCALE < ratio < _OTHER_SCALE:
        raise SaesubError(
            f"The activations are {ratio:.3g} times as long as those of the spectrum, on average: "
            "pass them unscaled, from the spectrum's hook point and model."
        )


def has_encoder(sae: SAE[Any]) -> bool:
    return "W_enc" in dict(sae.named_parameters())
