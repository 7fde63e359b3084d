"""Active Subspace Initialization: dictionary features that start where the activations live.

arXiv 2508.16929, section on ASI: take the top `d_init` principal directions U of the centred
activations, draw every decoder row at random inside span(U), tie the encoder to the decoder, and
give both the norm at which the untrained SAE reconstructs best. Architecture, loss and training
stay as they are. Other ways to draw the rows are in `saesub.init.directions`, the norm in
`saesub.init.norm`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from saesub.activations.spectrum import Spectrum, require_spectrum
from saesub.arguments import matrix_of, whole_number
from saesub.errors import SaesubError, near_names
from saesub.init.biases import (
    check_fits,
    note_source,
    seen_by,
    set_biases,
    unchanged_on_error,
    without_mean,
)
from saesub.init.directions import (
    FROM_DATA,
    Directions,
    check_directions,
    directions_at,
    draw_tokens,
    equal_variance,
    random_directions,
    reading_directions,
)
from saesub.init.norm import (
    Pairs,
    check_draws,
    check_same_scale,
    counted,
    sample_of,
    scale_in_training,
    set_best_norm,
)
from saesub.precision import without_autocast

Norm = Literal["fit", "keep"]


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
        norm: of every decoder row, and of the encoder's columns (on average where directions are
            whitened); None where SAELens' norms were kept.
        norm_from: what the norm was fitted to: "activations", the "spectrum", or None.
    """

    d_init: int
    d: int
    variance_share: float
    directions: str
    input_d_init: int | None
    seed: int
    n_tokens: int
    norm: float | None
    norm_from: str | None


@torch.no_grad()
@without_autocast()
def initialize_in_subspace(
    sae: SAE[Any],
    spectrum: Spectrum,
    d_init: int | float | str = "auto",
    *,
    directions: Directions = "flat",
    norm: Norm = "fit",
    activations: Float[Tensor, "tokens d"] | None = None,
    input_spectrum: Spectrum | None = None,
    input_activations: Float[Tensor, "tokens d_in"] | None = None,
    seed: int = 0,
) -> SubspaceInit:
    """Draw a dictionary's features anew inside the active subspace, in place.

    The encoder becomes the transpose of the decoder; where directions are whitened, its columns
    have other norms. Rows and columns get the one norm at which the untrained SAE reconstructs
    best, as `fit_norm` finds it. Biases are centred as by `center_biases`.

    A transcoder's encoder reads another space, and its directions lie in the active subspace of
    that space. Given pairs of activations, they are the directions that best predict, by least
    squares, what is written along each decoder row: this is the tie of an autoencoder. Without
    pairs they are drawn independently, and the norms stay what SAELens made them. Pairs are better:
    see notebook 08.

    Args:
        sae: any SAELens training SAE, or a transcoder of any kind.
        spectrum: of the activations that are reconstructed, shape (d,).
        d_init: an integer from 1 to d; a share of the variance, strictly between 0 and 1; or
            "auto". For flat directions see `choose_d_init`; for the others "auto" is d, since they
            follow the spectrum anyway.
        directions: "flat" (the paper's), "spectrum", "data" or "whitened_data", see
            `saesub.init.directions`.
        norm: "fit", or "keep" for the norms that SAELens gave (`decoder_init_norm`, 0.1 by default,
            at which many features of a TopK SAE die).
        activations: (tokens, d) at the spectrum's hook point, unscaled. Directions from data need
            at least d_sae of them, best of all documents: features that start at a few documents
            fire nowhere else. The norm is fitted to 4,096 of them, evenly spaced; without
            activations, to draws that have the spectrum's mean, covariance and mean norm. For a
            transcoder: what it writes, (tokens, d_out).
        input_spectrum: of the activations that a transcoder reads; refused for an autoencoder.
        input_activations: (tokens, d_in), what a transcoder reads at the same tokens.
        seed: of the random directions.

    Raises:
        SaesubError: the spectrum or the activations have another width, `d_init` is out of range,
            directions or norm are unknown, activations are missing or not finite, have another
            scale than the spectrum or are nearly all the same, a token to start at has no direction
            in the subspace, the SAE whitens its input, has no bias or hooks,
            was trained before or is made for inference, its weights are not finite or coarser than
            float32, or a transcoder lacks its input spectrum. The SAE is then left as it was.

    Example:
        >>> spectrum = saesub.measure_spectrum(model, "wiki-en", hook_name, n_tokens=200_000)
        >>> saesub.initialize_in_subspace(sae, spectrum)  # doctest: +SKIP
    """
    check_fits(sae, spectrum, input_spectrum)
    seed = whole_number(seed, "seed", 0)
    if activations is not None:
        activations = matrix_of(activations, "activations")
    if input_activations is not None:
        input_activations = matrix_of(input_activations, "input_activations")
    if norm not in get_args(Norm):
        raise SaesubError(f"Unknown norm {norm!r}: {near_names(str(norm), get_args(Norm))}")
    _check_pairs(directions, spectrum, input_spectrum, activations, input_activations)
    check_directions(directions, spectrum, sae.cfg.d_sae, activations)
    for given, known in ((activations, spectrum), (input_activations, input_spectrum)):
        if given is not None and known is not None:
            check_same_scale(given, known)
    if sae.cfg.normalize_activations == "layer_norm":
        if input_spectrum is None:
            spectrum, activations = _without_means(sae, spectrum, activations)
        else:
            found = _without_means(sae, input_spectrum, input_activations)
            input_spectrum, input_activations = found
    written = _Space(spectrum, _rank(spectrum, d_init, directions), activations)
    read = None
    if input_spectrum is not None:
        rank = _rank(input_spectrum, d_init, directions)
        read = _Space(input_spectrum, rank, input_activations)
    drawn = _draw(written, read, directions, sae.cfg.d_sae, seed)
    fits = norm == "fit" and (read is None or read.activations is not None)
    if fits and activations is None:
        check_draws(sae, spectrum)
    with unchanged_on_error(sae):
        _set_directions(sae, drawn, keep_norms=not fits)
        set_biases(sae, spectrum, input_spectrum)
        found = set_best_norm(sae, _pairs(sae, written, read, seed)) if fits else None

    note_source(sae, spectrum, input_spectrum)
    source = "spectrum" if activations is None else "activations"
    report = SubspaceInit(
        d_init=written.rank,
        d=spectrum.d,
        variance_share=float(spectrum.variance_in(written.rank)),
        directions=directions,
        input_d_init=None if read is None else read.rank,
        seed=seed,
        n_tokens=spectrum.n_tokens,
        norm=found,
        norm_from=source if fits else None,
    )
    sae.cfg.metadata.subspace_init = asdict(report)
    return report


def _without_means(
    sae: SAE[Any], spectrum: Spectrum, activations: Tensor | None
) -> tuple[Spectrum, Tensor | None]:
    """What a layer norm leaves of both, but for lengths."""
    return seen_by(sae, spectrum), None if activations is None else without_mean(activations)


class _Space(NamedTuple):
    """What is known of the activations at one side of a dictionary."""

    spectrum: Spectrum
    rank: int
    activations: Float[Tensor, "tokens d"] | None


class _Drawn(NamedTuple):
    """Unit decoder rows; unit encoder columns, as rows; factors on the columns; whether the columns
    are the rows."""

    rows: Float[Tensor, "d_sae d"]
    columns: Float[Tensor, "d_sae d_in"]
    factors: Float[Tensor, "d_sae 1"] | float
    tied: bool


def _draw(
    written: _Space, read: _Space | None, directions: Directions, n: int, seed: int
) -> _Drawn:
    """The directions of `n` features, by a rule, for the one or two spaces of a dictionary."""
    generator = torch.Generator().manual_seed(seed)
    tokens = None
    if directions in FROM_DATA and written.activations is not None:
        tokens = draw_tokens(*written[:2], directions, n, generator, written.activations)

    def draw(space: _Space) -> Float[Tensor, "n d"]:
        if tokens is None or space.activations is None:
            return random_directions(*space[:2], directions, n, generator)
        chosen = space.activations[tokens.to(space.activations.device)]
        return directions_at(*space[:2], directions, chosen)

    rows = columns = draw(written)
    if read is not None and tokens is None and read.activations is not None:
        assert written.activations is not None  # they come in pairs
        columns = reading_directions(rows, *read[:2], read.activations, written.activations)
    elif read is not None:
        columns = draw(read)
    factors = 1.0
    if directions == "whitened_data":
        factors = equal_variance(columns, (read or written).spectrum.covariance)
    return _Drawn(rows, columns, factors, tied=read is None)


def _set_directions(sae: SAE[Any], drawn: _Drawn, *, keep_norms: bool) -> None:
    decoder, encoder = drawn.rows.to(sae.W_dec), (drawn.columns * drawn.factors).to(sae.W_enc)
    if keep_norms:
        lengths = sae.W_dec.norm(dim=-1, keepdim=True)
        encoder = encoder * (lengths if drawn.tied else sae.W_enc.norm(dim=0).unsqueeze(-1))
        decoder = decoder * lengths
    sae.W_dec.copy_(decoder)
    if "W_enc" in dict(sae.named_parameters()):  # matching pursuit has no encoder of its own
        sae.W_enc.copy_(encoder.T)


def _pairs(sae: SAE[Any], written: _Space, read: _Space | None, seed: int) -> Pairs:
    """What the norm is fitted to, in the scale of training."""
    y = sample_of(written.spectrum, written.activations, seed)
    kept = counted(written.spectrum, y)
    if read is None:
        scaled = y[kept] * scale_in_training(sae, written.spectrum)
        return Pairs(scaled, scaled)
    x = sample_of(read.spectrum, read.activations, seed)
    kept &= counted(read.spectrum, x)
    return Pairs(x[kept] * scale_in_training(sae, read.spectrum), y[kept])


def choose_d_init(spectrum: Spectrum, d_init: int | float | str = "auto") -> int:
    """The dimension that `d_init` means for this spectrum.

    "auto" is half the effective rank of the singular values. In a sweep over sizes at attention
    outputs it left the fewest or nearly the fewest dead features
    (`notebooks/studies/subspace_size.py`). In a larger subspace features point to where little
    happens; in a smaller one they crowd. It takes singular values, not variances, because one or
    two massive directions of a residual stream hold nearly all of its variance.

    Raises:
        SaesubError: `d_init` is not a whole number in 1…d, a share in (0, 1) or "auto".
    """
    require_spectrum(spectrum)
    if d_init == "auto":
        return max(1, round(spectrum.effective_rank("singular_values") / 2))
    if isinstance(d_init, Real) and not isinstance(d_init, bool):
        number = float(d_init)
        if 0 < number < 1:
            return spectrum.rank_at(number)
        # 1.0 could be meant as the whole variance.
        whole = isinstance(d_init, Integral) or number > 1
        if whole and number == number // 1 and 1 <= number <= spectrum.d:
            return int(number)
    raise SaesubError(
        f"d_init={d_init!r} is out of range: pass a whole number from 1 to {spectrum.d}, "
        'a share of variance strictly between 0 and 1, or "auto".'
    )


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
            raise SaesubError("input_activations are for transcoders: leave them out.")
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
