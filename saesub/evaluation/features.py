"""What trained features are like: how often they fire, how alike they are, across seeds too."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saesub.activations.checks import require_finite
from saesub.arguments import batch_of, whole_number
from saesub.errors import SaesubError
from saesub.evaluation.passes import Activations, encoded
from saesub.topk.encode import encoder_of, times_fired


def feature_density(
    sae: SAE[Any],
    activations: Activations,
    *,
    n_tokens: int,
    progress: bool = True,
) -> Float[Tensor, " d_sae"]:
    """Share of `n_tokens` tokens on which each feature fires; 0 means dead over them.

    Takes and raises what `saesub.dead_features` does.
    """
    encode, n_tokens = encoder_of(sae), whole_number(n_tokens, "n_tokens")
    firing = Firing(sae.cfg.d_sae, sae.device)
    for _, features in encoded(sae, activations, encode, n_tokens, progress=progress):
        firing.add(features)
    return firing.counts.float() / n_tokens  # in half precision a rare feature's would be 0


class Firing:
    """How often each feature fires, summed on a device without waiting for it.

    Args:
        d_sae, device: of the SAE.
        marks: rising numbers of tokens after which the silent features are counted.

    Attributes:
        counts: (d_sae,) int64, on how many tokens each fired so far.
    """

    counts: Int[Tensor, " d_sae"]

    def __init__(self, d_sae: int, device: torch.device, marks: Sequence[int] = ()) -> None:
        self.counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._marks, self._n = marks, 0
        self._silent: list[Tensor] = []

    def add(self, features: Float[Tensor, "n d_sae"]) -> Int[Tensor, " d_sae"]:
        """Count the features of the next n tokens, dense or sparse; how often each fired there."""
        end = self._n + len(features)
        for mark in self._marks[len(self._silent) :]:
            if mark > end:
                break
            until = self.counts + times_fired(_first_rows(features, mark - self._n))
            self._silent.append((until == 0).sum())
        fired = times_fired(features)
        self.counts += fired
        self._n = end
        return fired

    def silent(self) -> dict[int, float]:
        """Share of the features that did not fire up to each mark that was reached."""
        if not self._silent:
            return {}
        shares = (torch.stack(self._silent).double() / len(self.counts)).tolist()
        return dict(zip(self._marks, shares, strict=False))


def _first_rows(features: Float[Tensor, "n d_sae"], n: int) -> Float[Tensor, "m d_sae"]:
    """Features of the first n tokens; of sparse ones all tokens, the others' set to 0."""
    if not features.is_sparse:
        return features[:n]
    entries = features.coalesce()
    where = entries.indices()
    values = entries.values() * (where[0] < n)  # a selection of them would wait for a GPU
    return torch.sparse_coo_tensor(
        where, values, features.shape, is_coalesced=True, check_invariants=False
    )


def unit_rows(directions: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Float32 unit vectors; NaN, with a warning, for zero directions. Raises SaesubError for NaN or
    infinite ones."""
    require_finite(directions, "directions", "leave them out")
    wide = directions.detach().to(torch.promote_types(directions.dtype, torch.float32))
    largest = wide.abs().amax(1, keepdim=True)  # whose square may be out of range
    scaled = (wide / largest).float()
    if n_zero := int((largest == 0).sum()):
        warnings.warn(
            f"{n_zero} of {len(directions)} directions are zero, so what is measured of them is "
            "NaN: leave those features out",
            stacklevel=4,
        )
    return scaled / scaled.norm(dim=1, keepdim=True)


class Matching(NamedTuple):
    """A one-to-one matching: features `of_a` and `of_b` are partners, with this cosine (pairs,)."""

    of_a: Int[Tensor, " pairs"]
    of_b: Int[Tensor, " pairs"]
    cosine: Float[Tensor, " pairs"]


@torch.no_grad()
def match_features(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"]) -> Matching:
    """Match the features of two SAEs one to one, so that the sum of cosines is the largest.

    This is the Hungarian assignment by which Paulo & Belrose (2025, arXiv 2501.16615) compare
    seeds. Give the decoder rows of living features only; the surplus of the larger side stays
    unmatched. It holds all n_a × n_b cosines and takes seconds at 5,000 features; the time grows
    with their cube. A zero direction has no cosine: NaN, with a warning.

    Raises:
        SaesubError: an empty side, directions of different widths, or NaN or infinite ones.
    """
    a, b = batch_of(a, "directions"), batch_of(b, "directions")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise SaesubError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be matched: give two non-empty "
            "sets of directions of one width"
        )
    cosines = unit_rows(a) @ unit_rows(b.to(a.device)).T
    pairs = linear_sum_assignment(cosines.nan_to_num(0).cpu().numpy(), maximize=True)
    of_a, of_b = (torch.from_numpy(index).to(a.device) for index in pairs)
    return Matching(of_a, of_b, cosines[of_a, of_b])
