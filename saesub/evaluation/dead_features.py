"""Dead features, counted in tokens, and whether their initial directions tell why they died.

A feature is dead if it does not fire over a stated window of tokens. SAELens counts its window in
steps, so the same number means another window at another batch size.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from scipy.stats import mannwhitneyu
from torch import Tensor

from saesub.arguments import batch_of
from saesub.errors import SaesubError
from saesub.evaluation.features import feature_density, unit_rows
from saesub.evaluation.passes import Activations

_ROUNDING = 2e-3  # what half precision leaves of the products of orthonormal columns


def dead_features(
    sae: SAE[Any],
    activations: Activations,
    *,
    n_tokens: int,
    progress: bool = True,
) -> Bool[Tensor, " d_sae"]:
    """Which features do not fire over `n_tokens` tokens of activations.

    Args:
        sae: any SAELens SAE or transcoder, in training or inference form.
        activations: (n, d_in), a store, or an iterable of blocks of rows; the first `n_tokens` rows
            are used.
        n_tokens: the window. The field uses 10M; a small run must say what it used.
        progress: show a bar, if it takes more than a second.

    A BatchTopK SAE in training form shares out its features over each block of at most 1,024
    tokens.

    Raises:
        SaesubError: fewer than `n_tokens` rows came, activations have another width or hold NaN or
            Inf, or the SAE is one that `saesub.topk.encode.encoder_of` refuses.
    """
    return feature_density(sae, activations, n_tokens=n_tokens, progress=progress) == 0


@torch.no_grad()
def overlap(directions: Float[Tensor, "n d"], basis: Float[Tensor, "d r"]) -> Float[Tensor, " n"]:
    """Share of each direction's squared norm that lies in the span of an orthonormal basis.

    A random direction in d dimensions has r / d on average, so an isotropic initialisation points
    mostly outside a small active subspace. A zero direction has no share: NaN, with a warning.

    Raises SaesubError if directions and basis are not matrices of one width, or the basis is not
    orthonormal.
    """
    directions, basis = batch_of(directions, "directions"), batch_of(basis, "a basis")
    if directions.ndim != 2 or basis.ndim != 2 or directions.shape[1] != len(basis):
        raise SaesubError(
            f"directions are {directions.shape[-1]} wide and the basis is {len(basis)} wide: take "
            "both from the same site, as (n, d) and (d, r)"
        )
    unit, basis = unit_rows(directions), basis.to(directions.device, torch.float32)
    products = basis.T @ basis - torch.eye(basis.shape[1]).to(basis)
    if not (products.abs() < _ROUNDING).all():
        raise SaesubError("the basis is not orthonormal: give that of spectrum.basis(r)")
    return (unit @ basis).square().sum(1)


class OverlapTest(NamedTuple):
    """Whether a feature's initial direction tells if the feature lives.

    `overlap` (d_sae,) is the share of each initial direction inside the active subspace, `dead`
    (d_sae,) bool. `auc` is the probability that a random living feature had more overlap at
    initialisation than a random dead one (area under the ROC curve; 0.5 is chance); NaN, with a
    warning, if all live or all died, or an overlap is NaN. `p_value` is that of a two-sided
    Mann-Whitney test of auc = 0.5.
    """

    overlap: Float[Tensor, " d_sae"]
    dead: Bool[Tensor, " d_sae"]
    auc: float
    p_value: float


def overlap_test(
    initial_directions: Float[Tensor, "d_sae d"],
    dead: Bool[Tensor, " d_sae"],
    basis: Float[Tensor, "d r"],
) -> OverlapTest:
    """Test whether dead features had less overlap with the active subspace at initialisation.

    Args:
        initial_directions: encoder columns or decoder rows before training, (d_sae, d).
        dead: from `dead_features`, after training.
        basis: of the active subspace, `spectrum.basis(r)`.

    Raises:
        SaesubError: directions, `dead` and basis do not fit together, or `dead` is not boolean.
    """
    initial_directions = batch_of(initial_directions, "directions")
    if not isinstance(dead, Tensor) or dead.dtype != torch.bool:
        raise SaesubError("dead must be a boolean tensor, as saesub.dead_features gives it")
    if len(dead) != len(initial_directions):
        raise SaesubError(
            f"{len(initial_directions)} directions and {len(dead)} features do not belong to one "
            "SAE: give the directions of all its features, living and dead"
        )
    inside = overlap(initial_directions, basis)
    of_dead = dead.to(inside.device)
    living_overlap, dead_overlap = inside[~of_dead].cpu().numpy(), inside[of_dead].cpu().numpy()
    if not len(living_overlap) or not len(dead_overlap):
        warnings.warn(
            f"{len(dead_overlap)} of {len(dead)} features are dead, so there are no two groups to "
            "compare and auc is NaN",
            stacklevel=2,
        )
        return OverlapTest(inside, dead, float("nan"), float("nan"))
    test = mannwhitneyu(living_overlap, dead_overlap, alternative="two-sided")
    auc = float(test.statistic) / (len(living_overlap) * len(dead_overlap))
    return OverlapTest(inside, dead, auc, float(test.pvalue))
