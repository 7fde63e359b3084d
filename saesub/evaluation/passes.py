"""What the measures of this folder read: activations block by block, activations of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.checks import require_finite
from saesub.activations.forward_pass import capture, hook_points
from saesub.errors import SaesubError
from saesub.progress import bar

Read = TypeVar("Read")

_TOKENS_PER_BLOCK = 1024  # bounds the (tokens, d_sae) block of features


@torch.no_grad()
def encoded(
    sae: SAE[Any],
    activations: Tensor | Iterable[Tensor],
    read: Callable[[Tensor], Read],
    n_tokens: int | None = None,
    *,
    progress: bool = True,
) -> Iterator[tuple[Float[Tensor, "n d_in"], Read]]:
    """The first `n_tokens` activations, or all, in blocks on the SAE's device, with what `read`
    makes of each: `encoder_of(sae)` or `autoencoder_of(sae)`.

    Raises:
        SaesubError: fewer than `n_tokens` came, `n_tokens` is below 1, or activations have
            another width or hold NaN or Inf.
    """
    if n_tokens is not None and n_tokens < 1:
        raise SaesubError(f"n_tokens must be at least 1, not {n_tokens}.")
    n = 0
    given = [activations] if isinstance(activations, Tensor) else activations
    with bar(total=n_tokens, unit="tok", desc="encoding", delay=1, progress=progress) as shown:
        for block in (block for part in given for block in part.split(_TOKENS_PER_BLOCK)):
            block = block if n_tokens is None else block[: n_tokens - n]
            require_finite(block)
            found = read(block)
            yield block.flatten(1).to(sae.device), found
            n += len(block)
            shown.update(len(block))
            if n == n_tokens:
                return
    if n_tokens is not None:
        raise SaesubError(
            f"Only {n} of {n_tokens} tokens of activations came: "
            "pass more activations or a smaller n_tokens."
        )


def site_activations(
    model: TransformerBridge, tokens: Int[Tensor, "batch pos"], hook_name: str
) -> Float[Tensor, "batch pos d"]:
    """Activations at every position of one hook point, heads concatenated.

    Raises SaesubError for an unknown hook point.
    """
    found: dict[str, Tensor] = {}
    points = hook_points(model, [hook_name])
    capture(model, tokens.to(model.cfg.device), points, found.__setitem__)
    return found[hook_name].flatten(2)


def check_contexts(tokens: Tensor, batch_size: int) -> None:
    """Refuse tokens that are not (contexts, pos), or leave nothing to read. Raises SaesubError."""
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2 or batch_size < 1:
        raise SaesubError(
            f"tokens of shape {tuple(tokens.shape)} cannot be read in batches of {batch_size}: "
            "give contexts of at least 2 positions, (contexts, pos), and a batch_size of at least 1"
        )
