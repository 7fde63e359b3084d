"""The best decoder for the features that an SAE has, by least squares, once it is trained.

Which features are active at a token is the encoder's matter. How well they then rebuild the token
is, for a given encoder, a least-squares problem in the decoder rows, and training of some thousand
firings a feature leaves it unsolved. `refit_decoder` solves it over the training tokens, with
conjugate gradients. Every feature fires where it fired before, so that deaths stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from saesub.activations.checks import require_finite
from saesub.arguments import batch_of, whole_number
from saesub.errors import SaesubError
from saesub.init.norm import check_unhooked
from saesub.precision import without_autocast
from saesub.topk.eligibility import check_memory
from saesub.topk.encode import encoder_of
from saesub.topk.ops import Selected, decode_at, sum_rows_by_feature

_TOKENS_PER_BLOCK = 4096
_RIDGE = 10.0  # firings as strong as the penalty on a row's distance from where training left it
_LEAST_FIRINGS = 100  # of a feature, on average
_FOLDED_AT_END = ("expected_average_only_in", "covariance_whitening")
_NOT_LINEAR = {
    "matching_pursuit": "its decoder is its encoder",
    "matryoshka_batchtopk": "its decoder rebuilds with each of several parts of the features",
}


@dataclass(frozen=True)
class DecoderRefit:
    """What `refit_decoder` did; also written to `sae.cfg.metadata.decoder_refit`.

    Attributes:
        n_tokens: tokens that were fitted to.
        iterations: steps of conjugate gradients.
        error_before: mean squared error of a token, summed over its dimensions, before.
        error_after: the same after.
    """

    n_tokens: int
    iterations: int
    error_before: float
    error_after: float


@torch.no_grad()
@without_autocast()
def refit_decoder(
    sae: SAE[Any],
    batches: Float[Tensor, "n d_in"] | Iterable[Float[Tensor, "n d_in"]],
    *,
    iterations: int = 10,
    progress: bool = True,
) -> DecoderRefit:
    """Replace the decoder rows of a trained SAE by those that rebuild `batches` best, in place.

    Minimises, over the decoder rows alone, the squared error of all tokens plus a ridge penalty on
    each row's distance from where it is, which weighs as much as ten average firings of the
    feature. A feature that fires rarely moves little, and one that never fires not at all.
    Features, their values and the bias stay. Call it after training: an optimizer's moments would
    belong to other weights.

    Where a TopK SAE ranks features by the norms of their rows, these are folded into the encoder
    first, as SAELens does on saving, and `rescale_acts_by_decoder_norm` is then False.

    The active entries of all tokens are kept in memory, about 60 bytes each at the peak: 250,000
    tokens with 32 active features take 0.5 GB. It takes longer than the training itself on a CPU:
    1.6 times as long at 4,096 features (`notebooks/studies/rivals.py cost`). In that time two more
    passes over the tokens lowered the FVU more, at the one place where it was tried
    (`notebooks/studies/longer.py`), so train as long as you want to first.

    Args:
        sae: any SAELens SAE whose reconstruction is its features times `W_dec`, plus `b_dec`. A
            BatchTopK SAE in training form shares its active features among 4,096 tokens here; to
            fit it to its threshold, load it as it was saved.
        batches: activations of the SAE's hook point, (n, d_in), or an iterable of such blocks,
            unscaled, read once: all the training tokens, or enough that each feature fires 1,000
            times. With few tokens the decoder would fit their noise.
        iterations: of conjugate gradients.
        progress: whether to show a bar.

    Raises:
        SaesubError: a transcoder, a matching pursuit, Matryoshka or temporal SAE, one that scales
            each token or has not yet folded a scale into its weights, has hooks, is coarser than
            float32, or whose weights share memory or were loaded in inference mode; no activations,
            such as are not finite or of another width, fewer than 100 firings of a feature on
            average, or activations that the SAE rebuilds worse than their mean would. The SAE is
            then left as it was.

    Example:
        >>> saesub.refit_decoder(sae, store.rows(0, 250_000).split(4096))  # doctest: +SKIP
    """
    _check(sae)
    iterations = whole_number(iterations, "iterations", 1)
    folds = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    rows = F.normalize(sae.W_dec, dim=-1) if folds else sae.W_dec
    codes, right, squares, firings, error, variation = _read(sae, rows, batches, progress)
    n = sum(len(active.offsets) - 1 for active in codes)
    _check_fit(firings, n, error, variation)
    damping = (_RIDGE * squares / firings.clamp(min=1)).unsqueeze(-1)
    step, fall = _solve(codes, right, squares.unsqueeze(-1), damping, iterations, progress)
    require_finite(step, "The refitted decoder rows", "scale the activations down")
    if folds:
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False  # pyright: ignore[reportAttributeAccessIssue]
    sae.W_dec.add_(step)
    report = DecoderRefit(n, iterations, error / n, (error - fall) / n)
    sae.cfg.metadata.decoder_refit = asdict(report)
    return report


def _check(sae: Any) -> None:
    encoder_of(sae)  # refuses what is no SAE, or not finite
    kind = sae.cfg.metadata.training_architecture or sae.cfg.architecture()
    if hasattr(sae.cfg, "d_out") or kind in _NOT_LINEAR:
        why = _NOT_LINEAR.get(kind, "a transcoder rebuilds what it does not read")
        raise SaesubError(
            f"refit_decoder cannot take a {kind} SAE, since {why}: leave its decoder as trained."
        )
    if (scaling := sae.cfg.normalize_activations) in _FOLDED_AT_END:
        raise SaesubError(
            f"The SAE's weights do not take activations as they come, but with {scaling!r}, which "
            "a trainer folds into them at its end: pass the SAE that its fit() returns."
        )
    if scaling != "none":
        raise SaesubError(
            f"refit_decoder cannot take an SAE that scales each token ({scaling!r}): leave its "
            "decoder as trained."
        )
    if sae.dtype not in (torch.float32, torch.float64):
        raise SaesubError(
            f"The SAE's weights are {sae.dtype}, too coarse for least squares: convert it by "
            "sae.to(dtype=torch.float32), and back afterwards."
        )
    check_unhooked(sae)
    check_memory(sae)


def _check_fit(firings: Tensor, n: int, error: float, variation: float) -> None:
    """Refuse what would be fitted to noise, or to activations of another place."""
    if error > variation:
        raise SaesubError(
            "The SAE rebuilds these activations worse than their mean would, so they are not what "
            "it was trained on: pass activations of its own hook point, model and scale."
        )
    if (mean := firings.double().mean().item()) < _LEAST_FIRINGS:
        wanted = (
            f"at least {ceil(11 * n * _LEAST_FIRINGS / (10 * mean)):,} tokens" if mean else "others"
        )
        raise SaesubError(
            f"A feature fires {mean:,.1f} times on average in these {n:,} activations, and the "
            f"decoder would fit their noise: pass {wanted}."
        )


def _read(
    sae: SAE[Any], rows: Tensor, batches: Tensor | Iterable[Tensor], progress: bool
) -> tuple[list[Selected], Tensor, Tensor, Tensor, float, float]:
    """Active entries of all tokens; of each feature the errors at its firings times its values,
    summed, (d_sae, d), the sum of its squared values and the number of its firings, (d_sae,); the
    squared error of all tokens, and their squared distance from their mean."""
    encode, codes, error = encoder_of(sae), [], 0.0
    right, squares = torch.zeros_like(sae.W_dec), sae.W_dec.new_zeros(sae.cfg.d_sae)
    firings = torch.zeros_like(squares, dtype=torch.int64)
    total, length, n = torch.zeros_like(sae.b_dec, dtype=torch.float64), 0.0, 0
    with tqdm(desc="encoding", unit="tok", unit_scale=True, disable=not progress) as bar:
        for batch in _batches(batches):
            for x in batch.split(_TOKENS_PER_BLOCK):
                require_finite(x, f"activations, counted from token {n:,}," if n else "activations")
                x = x.to(sae.W_dec)
                active = _active(encode(x))
                missing = x - decode_at(active, active.pre, rows, sae.b_dec)
                right += sum_rows_by_feature(active.pre, active, missing)
                squares.index_add_(0, active.features, active.pre.square())
                fired = active.features[active.pre != 0]  # an AbsTopK feature also below 0
                firings += torch.bincount(fired, minlength=sae.cfg.d_sae)
                error += missing.double().square().sum().item()
                from_bias = (x - sae.b_dec).double()  # near the mean, so that nothing cancels
                total += from_bias.sum(0)
                length += from_bias.square().sum().item()
                n += len(x)
                codes.append(active)
                bar.update(len(x))
    if not n:
        raise SaesubError("There are no activations to refit the decoder to: pass some batches.")
    variation = length - total.square().sum().item() / n
    return codes, right, squares, firings, error, variation


def _batches(given: Any) -> Iterable[Float[Tensor, "n d_in"]]:
    """The blocks that are given, or the one matrix, with heads concatenated. Raises SaesubError."""
    if not isinstance(given, Iterable):
        raise SaesubError(
            f"batches must be activations or an iterable of them, not {type(given).__name__}: pass "
            "the training tokens, (n, d_in)."
        )
    whole = isinstance(given, (Tensor, np.ndarray))
    for block in [given] if whole else given:
        block = batch_of(block)
        if block.ndim < 2:
            raise SaesubError(
                f"Activations are a row for each token, (n, d_in), not of shape "
                f"{tuple(block.shape)}: pass x.unsqueeze(0) for a single token."
            )
        if len(block):
            yield block.detach().flatten(1)


def _active(features: Tensor) -> Selected:
    """The entries of features (n, d_sae), dense or sparse, that are not zero."""
    entries = (features if features.is_sparse else features.to_sparse()).coalesce()
    tokens, which = entries.indices()
    counts = torch.bincount(tokens, minlength=len(features))
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return Selected(which, offsets, entries.values(), features.shape[1])


def _solve(
    codes: list[Selected],
    right: Float[Tensor, "d_sae d"],
    squares: Float[Tensor, "d_sae 1"],
    damping: Float[Tensor, "d_sae 1"],
    iterations: int,
    progress: bool,
) -> tuple[Float[Tensor, "d_sae d"], float]:
    """The rows Δ of (AᵀA + damping) Δ = right, with A the values of all tokens, and by how much
    the squared error then falls.

    Conjugate gradients for all columns at once, with the diagonal as preconditioner. Features that
    never fire have no equation, and their rows stay zero.
    """
    inverse = torch.where(squares > 0, 1 / (squares + damping), 0)
    solution, residual = torch.zeros_like(right), right.clone()
    direction = inverse * residual
    slope = (residual * direction).sum(0)
    for _ in tqdm(range(iterations), desc="decoder", disable=not progress):
        image = damping * direction
        for active in codes:
            written = decode_at(active, active.pre, direction)
            image += sum_rows_by_feature(active.pre, active, written)
        length = _ratio(slope, (direction * image).sum(0))
        solution += length * direction
        residual -= length * image
        scaled = inverse * residual
        slope, before = (residual * scaled).sum(0), slope
        direction = scaled + _ratio(slope, before) * direction
    # The error falls by 2 rightᵀΔ - Δᵀ AᵀA Δ, and AᵀA Δ = right - residual - damping Δ.
    fall = (solution * (right + residual + damping * solution)).double().sum().item()
    return solution, fall


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """0 where a column is solved already."""
    return torch.where(below > 0, above / below, 0)
