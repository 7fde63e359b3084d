"""What the measures of this folder read: activations block by block, activations of tokens.

Also the checks that a model, a hook point and what is judged there belong together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.checks import FiniteWatch, require_finite
from saesub.activations.forward_pass import capture, hook_points, vectors
from saesub.activations.store import ActivationStore
from saesub.arguments import batch_of, require_sae, whole_number
from saesub.errors import SaesubError
from saesub.loading.models import context_tokens, model_name, same_model
from saesub.precision import reading_waits
from saesub.progress import bar

Read = TypeVar("Read")
Activations = Tensor | ActivationStore | Iterable[Tensor]
"""(n, d_in), a store, or an iterable of such blocks."""

TOKENS_PER_BLOCK = 1024  # bounds the (tokens, d_sae) block of features
_PADDED = 3  # equal special tokens at an end of a context; packed text has at most two
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_SCALED = ("expected_average_only_in", "covariance_whitening")
"""What `normalize_activations` says while SAELens' trainer scales the input outside of the SAE."""


@torch.no_grad()
def encoded(
    sae: SAE[Any],
    activations: Activations,
    read: Callable[[Tensor], Read],
    n_tokens: int | None = None,
    *,
    progress: bool = True,
) -> Iterator[tuple[Float[Tensor, "n d_in"], Read]]:
    """The first `n_tokens` activations, or all, in blocks on the SAE's device, with what `read`
    makes of each: `encoder_of(sae)` or `autoencoder_of(sae)`.

    Warns of an SAE whose input scaling is not folded in: it must be given scaled activations.
    Activations on a GPU are searched for NaN and Inf there, and the error comes after the last
    block: a result is one only once the iterator has ended.

    Raises:
        SaesubError: fewer than `n_tokens` came, `n_tokens` is no whole number of at least 1, or
            activations are of another kind or width or hold NaN or Inf.
    """
    if n_tokens is not None:
        n_tokens = whole_number(n_tokens, "n_tokens")
    if sae.cfg.normalize_activations in _SCALED:
        warnings.warn(
            f"{_not_folded(sae)}: give activations scaled as its trainer scales them, or the "
            "numbers mean nothing",
            stacklevel=2,
        )
    n, watch = 0, FiniteWatch()
    with bar(total=n_tokens, unit="tok", desc="encoding", delay=1, progress=progress) as shown:
        for block in blocks_of(activations):
            block = block if n_tokens is None else block[: n_tokens - n]
            if reading_waits(block):
                watch.note(block, n)
            else:
                counted = f"activations, counted from token {n:,}," if n else "activations"
                require_finite(block, counted)
            block = block.to(sae.device)
            try:
                found = read(block)
            except SaesubError:
                _require_none(watch)  # the features are not finite either
                raise
            yield block.flatten(1), found
            n += len(block)
            shown.update(len(block))
            if n == n_tokens:
                break
    _require_none(watch)
    if n_tokens is not None and n < n_tokens:
        raise SaesubError(
            f"Only {n} of {n_tokens} tokens of activations came: "
            "pass more activations or a smaller n_tokens."
        )


def _require_none(watch: FiniteWatch) -> None:
    if (bad := watch.read()) is not None:
        raise SaesubError(
            f"activations hold NaN or infinite values, first among the {TOKENS_PER_BLOCK:,} tokens "
            f"from number {bad[1]:,} on: leave them out, or load the model in another dtype"
        )


def all_tokens(activations: Activations) -> int:
    """How many tokens a matrix or a store holds. Raises SaesubError for blocks, of which nobody
    knows before."""
    _check_kind(activations)
    if isinstance(activations, ActivationStore):
        return activations.n_tokens
    if not getattr(activations, "ndim", 0):
        raise SaesubError(
            "how many tokens the blocks of activations hold is not known before: pass n_tokens"
        )
    return len(activations)  # pyright: ignore[reportArgumentType]


def blocks_of(activations: Activations) -> Iterator[Tensor]:
    """Non-empty blocks of at most `TOKENS_PER_BLOCK` rows, detached. Raises SaesubError for what is
    no tensor, array, store or iterable of tensors."""
    _check_kind(activations)
    if isinstance(activations, ActivationStore):
        n, store = activations.n_tokens, activations
        starts = range(0, n, TOKENS_PER_BLOCK)
        activations = (store.rows(at, min(at + TOKENS_PER_BLOCK, n)) for at in starts)
    whole = isinstance(activations, (Tensor, np.ndarray))
    for given in [activations] if whole else activations:
        part = torch.atleast_1d(batch_of(given, "activations").detach())
        yield from (block for block in part.split(TOKENS_PER_BLOCK) if len(block))


def _check_kind(activations: Any) -> None:
    blocks = isinstance(activations, Iterable) and not isinstance(activations, (str, bytes, dict))
    if not (blocks or isinstance(activations, ActivationStore)):
        raise SaesubError(
            "activations must be a tensor, an ActivationStore or an iterable of tensors, not "
            f"{type(activations).__name__}: of what harvest gives take one store, stores[hook_name]"
        )


def _not_folded(sae: SAE[Any]) -> str:
    return (
        "the SAE's input scaling is not folded into its weights "
        f"(normalize_activations={sae.cfg.normalize_activations!r})"
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
    return vectors(found[hook_name], tokens, hook_name)


def contexts_of(model: TransformerBridge, tokens: Tensor) -> Int[Tensor, "contexts pos"]:
    """`tokens` as int64 on the model's device. Raises SaesubError if they are not (contexts, pos)
    ids of the model's vocabulary, without padding, of at least 2 positions and no more than it
    takes."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in _INTEGERS or tokens.is_meta:
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise SaesubError(f"tokens must be a tensor of integer ids (contexts, pos), not {kind}.")
    if tokens.ndim != 2 or not len(tokens) or not 2 <= tokens.shape[1] <= model.cfg.n_ctx:
        raise SaesubError(
            f"tokens of shape {tuple(tokens.shape)} cannot be read: give contexts of at least 2 "
            f"positions and at most {model.cfg.n_ctx}, (contexts, pos)"
        )
    tokens = tokens.long()
    if tokens.min() < 0 or tokens.max() >= model.cfg.d_vocab:
        raise SaesubError(
            f"tokens hold ids {int(tokens.min())}..{int(tokens.max())}, and the model's vocabulary "
            f"is 0..{model.cfg.d_vocab - 1}: tokenise the text with the model's own tokenizer"
        )
    _check_unpadded(tokens, context_tokens(model).special_ids)
    return tokens.to(model.cfg.device)


def _check_unpadded(tokens: Int[Tensor, "contexts pos"], special_ids: Sequence[int]) -> None:
    """Refuse contexts that begin or end in the same special token several times."""
    specials = torch.tensor(special_ids, device=tokens.device)
    for end in (tokens[:, :_PADDED], tokens[:, -_PADDED:]):
        same = (end == end[:, :1]).all(1) & torch.isin(end[:, 0], specials)
        if end.shape[1] == _PADDED and same.any():
            raise SaesubError(
                f"context {int(same.nonzero()[0])} is padded, and the model would read the "
                "padding: cut contexts of one length with pack_contexts"
            )


def hook_of(sae: SAE[Any]) -> str:
    """The hook point that an SAE's metadata name. Raises SaesubError if they name none."""
    require_sae(sae)
    if not sae.cfg.metadata.hook_name:
        raise SaesubError(
            "the SAE does not say which hook point it reads: set sae.cfg.metadata.hook_name"
        )
    return sae.cfg.metadata.hook_name


def check_reads(sae: SAE[Any], model: TransformerBridge, hook_name: str) -> None:
    """Raise SaesubError for an SAE that does not read what the model gives at the hook point, by
    its metadata or because its input scaling is not folded in; warn of one of another model."""
    metadata = sae.cfg.metadata
    check_site("the SAE", metadata.hook_name, hook_name, model)
    check_model("the SAE", metadata.model_name, model_name(model))
    if metadata.hook_head_index is not None:
        raise SaesubError(
            f"the SAE reads head {metadata.hook_head_index} of {hook_name} alone, and the heads "
            "are read together here: give an SAE of all of them"
        )
    check_folded(sae)


def check_folded(sae: SAE[Any]) -> None:
    """Raise SaesubError for an SAE whose input scaling its trainer did outside of it."""
    if sae.cfg.normalize_activations in _SCALED:
        raise SaesubError(
            f"{_not_folded(sae)}, and the model gives activations as they are: take the SAE that "
            "its trainer's fit() returns, which has it folded in"
        )


def check_site(
    what: str, made_at: str | None, hook_name: str, model: TransformerBridge | None = None
) -> None:
    """Raise SaesubError if `what` is known to be of another hook point; a model may have several
    names for one."""
    points = {} if model is None else model.hook_dict
    if made_at in (None, hook_name) or (
        hook_name in points and points.get(made_at) is points[hook_name]
    ):
        return
    raise SaesubError(f"{what} is of {made_at}, not of {hook_name}: give one made at {hook_name}")


def check_model(what: str, made_for: str | None, name: str) -> None:
    """Warn if `what` says that it is of another model than the one of this name."""
    if made_for is not None and not same_model(made_for, name):
        warnings.warn(
            f"{what} says that it is of the model {made_for}, and this is {name}: "
            "unless they are one and the same, the numbers mean nothing",
            stacklevel=4,
        )
