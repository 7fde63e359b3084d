"""Dead features, counted in tokens, and why they died.

A feature is dead when it has not fired over a stated window of tokens. SAELens counts its window in
steps, so the same number means another thing at another batch size; here it is always tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from scipy.stats import mannwhitneyu
from torch import Tensor

from saesub.activations.blocks import blocks_of
from saesub.progress import bar
from saesub.topk.encode import encoder_of, flat_heads


@torch.no_grad()
def dead_features(
    sae: SAE[Any],
    activations: Tensor | Iterable[Tensor],
    *,
    n_tokens: int,
    progress: bool = True,
) -> Bool[Tensor, " d_sae"]:
    """Which features stay silent over `n_tokens` tokens of activations.

    Args:
        sae: any SAELens SAE or transcoder, in training or inference form.
        activations: (n, d_in), or an iterator of such blocks; the first `n_tokens` rows are used.
        n_tokens: the window. The paper's field uses 10M; a small run must say what it used.
        progress: show a bar, where it takes more than a second.

    Raises:
        SaesubError: fewer than `n_tokens` rows came.
    """
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
    settings = {"total": n_tokens, "unit": "tok", "desc": "dead features", "delay": 1}
    encode = encoder_of(sae)
    with flat_heads(sae), bar(progress=progress, **settings) as shown:
        for block in blocks_of(activations, n_tokens):
            fired |= times_fired(encode(block.to(sae.device))) > 0
            shown.update(len(block))
    return ~fired


def times_fired(feature_acts: Float[Tensor, "n d_sae"]) -> Int[Tensor, " d_sae"]:
    """On how many of the tokens each feature is active; dense or sparse activations."""
    if feature_acts.is_sparse:
        entries = feature_acts.coalesce()
        active = entries.indices()[-1][entries.values() != 0]
        return torch.bincount(active, minlength=feature_acts.shape[-1])
    return (feature_acts != 0).sum(0)


def overlap(directions: Float[Tensor, "n d"], basis: Float[Tensor, "d r"]) -> Float[Tensor, " n"]:
    """Share of each direction's squared norm that lies in the span of an orthonormal basis.

    A random direction in d dimensions has r / d on average: where the active subspace is small,
    an isotropic start points mostly outside it.
    """
    inside = (directions @ basis.to(directions)).square().sum(-1)
    return inside / directions.square().sum(-1)


@dataclass(frozen=True)
class Diagnosis:
    """Does where a feature started tell whether it lives?

    Attributes:
        overlap: (d_sae,) share of each initial direction inside the active subspace.
        dead: (d_sae,) bool.
        auc: probability that a random survivor started with more overlap than a random dead
            feature (area under the ROC curve; 0.5 says nothing). NaN if all live or all died.
        p_value: two-sided Mann-Whitney test of auc = 0.5.
    """

    overlap: Float[Tensor, " d_sae"]
    dead: Bool[Tensor, " d_sae"]
    auc: float
    p_value: float


def diagnose(
    initial_directions: Float[Tensor, "d_sae d"],
    dead: Bool[Tensor, " d_sae"],
    basis: Float[Tensor, "d r"],
) -> Diagnosis:
    """Relate each feature's initial direction to its fate.

    Args:
        initial_directions: encoder columns or decoder rows before training, (d_sae, d).
        dead: from `dead_features`, after training.
        basis: of the active subspace, `spectrum.basis(r)`.
    """
    inside = overlap(initial_directions.detach(), basis)
    alive_overlap, dead_overlap = inside[~dead].cpu(), inside[dead].cpu()
    if not len(alive_overlap) or not len(dead_overlap):
        return Diagnosis(inside, dead, float("nan"), float("nan"))
    test = mannwhitneyu(alive_overlap.numpy(), dead_overlap.numpy(), alternative="two-sided")
    auc = float(test.statistic) / (len(alive_overlap) * len(dead_overlap))
    return Diagnosis(inside, dead, auc, float(test.pvalue))
