"""All that is said of an SAE on held-out activations, from one encoding of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from saesub.arguments import whole_number
from saesub.evaluation.features import Firing
from saesub.evaluation.passes import Activations, all_tokens, encoded
from saesub.evaluation.reconstruction import Fit, require_autoencoder
from saesub.topk.encode import autoencoder_of

_FIRST_WINDOW = 8192  # tokens; the windows double from here


class Judgement(NamedTuple):
    """How an SAE fits `n_tokens` tokens, and how often its features fire on them.

    `fvu` and `l0` are those of `saesub.reconstruction`. `counts` (d_sae,) int64 says on how many
    tokens each feature fires: 0 means dead over them. `silent` is the share of features that have
    not fired after 8,192, 16,384, ... and `n_tokens` tokens. Where it still falls, features are
    rare, not dead.
    """

    fvu: float
    l0: float
    n_tokens: int
    counts: Int[Tensor, " d_sae"]
    silent: dict[int, float]


@torch.no_grad()
def judge(
    sae: SAE[Any],
    activations: Activations,
    *,
    n_tokens: int | None = None,
    progress: bool = True,
) -> Judgement:
    """FVU, L0, firing counts and the share of silent features, from one encoding of each block.

    The figures are those of `saesub.reconstruction`, `saesub.dead_features` and
    `saesub.evaluation.features.feature_density` on the same activations.

    Args:
        sae: any SAELens SAE, in training or inference form.
        activations: (n, d_in), a store, or an iterable of blocks of rows, on any device; the first
            `n_tokens` rows are used.
        n_tokens: the longest window; by default all of a matrix or a store; blocks need it.
        progress: show a bar, if it takes more than a second.

    Raises:
        SaesubError: fewer than `n_tokens` rows came, and what `saesub.reconstruction` refuses.
    """
    require_autoencoder(sae)
    n_tokens = all_tokens(activations) if n_tokens is None else n_tokens
    read, n_tokens = autoencoder_of(sae), whole_number(n_tokens, "n_tokens")
    fit, firing = Fit(), Firing(sae.cfg.d_sae, sae.device, _windows(n_tokens))
    blocks = encoded(sae, activations, read, n_tokens, progress=progress)
    for x, (features, rebuilt) in blocks:
        fit.add(x, rebuilt, firing.add(features))
    fvu, l0, n = fit.result()
    return Judgement(fvu, l0, n, firing.counts, firing.silent())


def _windows(n_tokens: int) -> list[int]:
    """8,192, 16,384, ... below `n_tokens`, and that.

    >>> _windows(20_000)
    [8192, 16384, 20000]
    """
    windows = [_FIRST_WINDOW]
    while windows[-1] < n_tokens:
        windows.append(2 * windows[-1])
    return [*windows[:-1], n_tokens]
