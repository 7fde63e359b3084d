"""Activations in blocks of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from saesub.errors import SaesubError

_TOKENS_PER_BLOCK = 1024  # bounds the (tokens, d_sae) block of feature activations


def blocks_of(activations: Tensor | Iterable[Tensor], n_tokens: int) -> Iterator[Tensor]:
    """The first `n_tokens` rows in blocks of bounded size.

    Raises:
        SaesubError: fewer rows came, or `n_tokens` is below 1.
    """
    if n_tokens < 1:
        raise SaesubError(f"n_tokens must be at least 1, not {n_tokens}.")
    left = n_tokens
    for given in [activations] if isinstance(activations, Tensor) else activations:
        for block in given[:left].split(_TOKENS_PER_BLOCK):
            yield block
            left -= len(block)
        if left == 0:
            return
    raise SaesubError(
        f"Only {n_tokens - left} of {n_tokens} tokens of activations came: "
        "pass more activations or a smaller n_tokens."
    )
