"""Dictionary features that start where the activations live.

Active Subspace Initialization (arXiv 2508.16929, section on ASI): take the top `d_init` principal
directions U of the centred activations, draw every decoder row at random inside span(U), and tie
the encoder to the decoder. Architecture, loss and training stay as they are. Other ways to draw the
rows are in `saesub.directions`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from saesub.directions import (
    FROM_DATA,
    Directions,
    check_directions,
    directions_at,
    draw_tokens,
    equal_variance,
    random_directions,
    reading_directions,
)
from saesub.errors import SaesubError
from saesub.spectrum import Spectrum

_ENCODER_BIASES = ("b_enc", "b_gate", "b_mag")


@dataclass(frozen=True)
class SubspaceInit:
    """What `initialize_in_subspace` did; also written to `sae.cfg.metadata.subspace_init`.

    Attributes:
        d_init: dimension of the subspace the decoder rows were drawn in.
        d: width of the space (`d_in`, or `d_out` of a transcoder).
        variance_share: share of the activations' variance inside the subspace.
        directions: the rule by which rows were drawn in it.
        input_d_init: the same as `d_init` for a transcoder's encoder, None for an autoencoder.
        seed: of the random draw.
        n_tokens: tokens behind the spectrum.
    """

    d_init: int
    d: int
    variance_share: float
    directions: str
    input_d_init: int | None
    seed: int
    n_tokens: int


@torch.no_grad()
def initialize_in_subspace(
    sae: SAE[Any],
    spectrum: Spectrum,
    d_init: int | float | str = "auto",
    *,
    directions: Directions = "flat",
    activations: Float[Tensor, "tokens d"] | None = None,
    input_spectrum: Spectrum | None = None,
    input_activations: Float[Tensor, "tokens d_in"] | None = None,
    seed: int = 0,
) -> SubspaceInit:
    """Re-draw a dictionary's features inside the active subspace, in place.

    Row norms of the decoder stay what SAELens made them; the encoder becomes the decoder's
    transpose, but for its columns' norms where directions are whitened; biases are centred as by
    `center_biases`.

    A transcoder's encoder reads another space, and keeps its columns' norms. Its directions lie in
    the active subspace of that space: given pairs of activations they are those that best predict,
    by least squares, what is written along each decoder row, which is the tie of an autoencoder;
    else they are drawn by themselves. Pairs are better: see notebook 08.

    Args:
        sae: any SAELens training SAE, or a transcoder of any kind.
        spectrum: of the activations that are reconstructed, shape (d,).
        d_init: an integer from 1 to d; a share of the variance, strictly between 0 and 1;
            or "auto": see `choose_d_init` for flat directions, d for the others, which follow the
            spectrum by themselves.
        directions: "flat" (the paper's), "spectrum", "data" or "whitened_data", see
            `saesub.directions`.
        activations: (tokens, d) at the spectrum's hook point, at least d_sae tokens, for directions
            from data; for a transcoder, what it writes, (tokens, d_out), for any directions.
        input_spectrum: of the activations that a transcoder reads; refused for an autoencoder.
        input_activations: what a transcoder reads at the same tokens.
        seed: of the random directions.

    Raises:
        SaesubError: the spectrum is of another width, `d_init` is out of range, the directions are
            unknown or lack their activations, the SAE whitens its input, or a transcoder lacks its
            input spectrum.

    Example:
        >>> spectrum = saesub.measure_spectrum(model, "wiki-en", hook_name, n_tokens=200_000)
        >>> saesub.initialize_in_subspace(sae, spectrum)  # doctest: +SKIP
    """
    is_transcoder = hasattr(sae.cfg, "d_out")
    _check_fits(sae, spectrum, input_spectrum, is_transcoder)
    rank = _rank(spectrum, d_init, directions)
    input_rank = _rank(input_spectrum, d_init, directions) if input_spectrum else None
    _check_pairs(directions, spectrum, input_spectrum, activations, input_activations)
    pairs = None
    if directions not in FROM_DATA and activations is not None and input_activations is not None:
        pairs, activations = (input_activations, activations), None
    check_directions(directions, spectrum, sae.cfg.d_sae, activations)

    draw = _Draw(directions, sae.cfg.d_sae, seed)
    tokens = draw.tokens(spectrum, rank, activations)
    rows = draw.rows(spectrum, rank, activations, tokens)
    read, decoder = spectrum, rows.to(sae.W_dec) * sae.W_dec.norm(dim=-1, keepdim=True)
    encoder = decoder
    if input_spectrum is not None and input_rank is not None:
        read = input_spectrum
        if pairs:
            rows = reading_directions(rows, read, input_rank, *pairs)
        else:
            rows = draw.rows(read, input_rank, input_activations, tokens)
        encoder = rows.to(sae.W_enc) * sae.W_enc.norm(dim=0).unsqueeze(-1)
    if directions == "whitened_data":
        encoder = encoder * equal_variance(rows, read.covariance).to(encoder)
    sae.W_dec.copy_(decoder)
    if "W_enc" in dict(sae.named_parameters()):  # matching pursuit has no encoder of its own
        sae.W_enc.copy_(encoder.T)
    center_biases(sae, spectrum, input_spectrum=input_spectrum)

    report = SubspaceInit(
        rank,
        spectrum.d,
        float(spectrum.variance_in(rank)),
        directions,
        input_rank,
        seed,
        spectrum.n_tokens,
    )
    sae.cfg.metadata.subspace_init = asdict(report)
    return report


@torch.no_grad()
def center_biases(
    sae: SAE[Any], spectrum: Spectrum, *, input_spectrum: Spectrum | None = None
) -> None:
    """Set the decoder bias to the mean activation, and let the encoder see centred inputs.

    A baseline that is to be compared with `initialize_in_subspace` gets this and nothing else, so
    that the two differ in their directions alone. Where the encoder does not subtract the decoder
    bias itself (`apply_b_dec_to_input=False`, transcoders), its own bias takes the mean out.
    An SAE that rescales its input gets the mean in that scale, √d / E‖x‖: exact for
    `expected_average_only_in`, an approximation for `layer_norm` and `constant_norm_rescale`,
    which scale each token by itself.

    The spectrum's hook point and model are noted in `sae.cfg.metadata`, where it names none yet.

    Raises:
        SaesubError: as `initialize_in_subspace`.
    """
    is_transcoder = hasattr(sae.cfg, "d_out")
    _check_fits(sae, spectrum, input_spectrum, is_transcoder)
    _note_source(sae, spectrum, input_spectrum)
    scaled = sae.cfg.normalize_activations != "none"
    sae.b_dec.copy_(_mean_in_scale(spectrum, scaled and not is_transcoder))
    read = input_spectrum if is_transcoder else spectrum
    assert read is not None  # _check_fits has seen to it
    seen_by_encoder = _mean_in_scale(read, scaled).to(sae.W_enc)
    subtracts_b_dec = sae.cfg.apply_b_dec_to_input and not is_transcoder
    for name, bias in sae.named_parameters():
        if name in _ENCODER_BIASES:
            bias.copy_(
                torch.zeros_like(bias) if subtracts_b_dec else -(seen_by_encoder @ sae.W_enc)
            )


def choose_d_init(spectrum: Spectrum, d_init: int | float | str = "auto") -> int:
    """The dimension that `d_init` means for this spectrum.

    "auto" is half the effective rank of the singular values: near the least dead of a sweep at
    attention, MLP and most residual sites (`notebooks/studies/d_init.py`; not at an early residual
    stream, where a random start is better). A larger subspace points features to where little
    happens, a smaller one crowds them. Singular values, not variances: one or two massive
    directions of a residual stream hold nearly all of its variance.

    Raises:
        SaesubError: `d_init` is no whole number in 1…d, no share in (0, 1), and not "auto".
    """
    if d_init == "auto":
        return max(1, round(spectrum.effective_rank("singular_values") / 2))
    if isinstance(d_init, float) and 0 < d_init < 1:
        return spectrum.rank_at(d_init)
    whole = isinstance(d_init, Integral) and not isinstance(d_init, bool)
    if whole and 1 <= d_init <= spectrum.d:  # pyright: ignore[reportOperatorIssue]
        return int(d_init)
    raise SaesubError(
        f"d_init={d_init!r} is out of range: pass a whole number from 1 to {spectrum.d}, "
        'a share of variance strictly between 0 and 1, or "auto".'
    )


class _Draw:
    """One seeded draw of directions, for the one or two spaces of a dictionary."""

    def __init__(self, directions: Directions, n: int, seed: int) -> None:
        self._directions: Directions = directions
        self._n = n
        self._generator = torch.Generator().manual_seed(seed)

    def tokens(self, spectrum: Spectrum, rank: int, activations: Tensor | None) -> Tensor | None:
        if activations is None:
            return None
        return draw_tokens(spectrum, rank, self._directions, self._n, self._generator, activations)

    def rows(
        self, spectrum: Spectrum, rank: int, activations: Tensor | None, tokens: Tensor | None
    ) -> Float[Tensor, "d_sae d"]:
        if activations is None or tokens is None:
            return random_directions(spectrum, rank, self._directions, self._n, self._generator)
        chosen = activations[tokens.to(activations.device)]
        return directions_at(spectrum, rank, self._directions, chosen)


def _rank(spectrum: Spectrum, d_init: int | float | str, directions: Directions) -> int:
    whole = d_init == "auto" and directions != "flat"
    rank = spectrum.d if whole else choose_d_init(spectrum, d_init)
    spectrum.variance_in(rank)  # refuses constant activations
    return rank


def _check_pairs(
    directions: str,
    spectrum: Spectrum,
    input_spectrum: Spectrum | None,
    written: Tensor | None,
    read: Tensor | None,
) -> None:
    """A transcoder's activations come in pairs, where they are asked for or given."""
    if input_spectrum is None:
        if read is not None:
            raise SaesubError("input_activations are for a transcoder, which reads another space.")
        return
    if written is None and read is None and directions not in FROM_DATA:
        return
    shapes = [None if t is None else tuple(t.shape) for t in (written, read)]
    n = None if written is None else len(written)
    if n is None or shapes != [(n, spectrum.d), (n, input_spectrum.d)]:
        raise SaesubError(
            f"directions={directions!r} of a transcoder start at pairs: pass activations, what it "
            f"writes, (n, {spectrum.d}), and input_activations, what it reads at the same tokens, "
            f"(n, {input_spectrum.d}), not tensors of shapes {shapes[0]} and {shapes[1]}."
        )


def _note_source(sae: SAE[Any], spectrum: Spectrum, input_spectrum: Spectrum | None) -> None:
    """SAELens splices an SAE in at `hook_name`; a transcoder writes at `hook_name_out`."""
    read = (input_spectrum or spectrum).metadata
    known = {"hook_name": read.get("hook_name"), "model_name": read.get("model")}
    if input_spectrum is not None:
        known["hook_name_out"] = spectrum.metadata.get("hook_name")
    for name, value in known.items():
        if value is not None and sae.cfg.metadata[name] is None:
            sae.cfg.metadata[name] = value


def _mean_in_scale(spectrum: Spectrum, scaled: bool) -> Float[Tensor, " d"]:
    return spectrum.mean * (spectrum.d**0.5 / spectrum.mean_norm if scaled else 1.0)


def _check_fits(
    sae: SAE[Any], spectrum: Spectrum, input_spectrum: Spectrum | None, is_transcoder: bool
) -> None:
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
        raise SaesubError("input_spectrum is for transcoders; an autoencoder reads what it writes.")
    pairs = [("spectrum", spectrum, sae.W_dec.shape[1])]
    if input_spectrum is not None:
        pairs.append(("input_spectrum", input_spectrum, sae.W_enc.shape[0]))
    for name, given, width in pairs:
        if given.d != width:
            raise SaesubError(
                f"{name} is {given.d} wide but the SAE needs {width}: "
                "measure it at the hook point that the SAE is trained on."
            )
