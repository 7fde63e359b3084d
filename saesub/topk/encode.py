"""Features of given activations: by SAELens' own encoder, or faster by the sparse step's search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, TopKSAE, TopKTrainingSAE
from torch import Tensor

from saesub.errors import SaesubError
from saesub.topk.eligibility import is_hooked
from saesub.topk.ops import select_topk
from saesub.topk.step import feature_scale, row_backend, search_of, sparse_activations

Encode = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_sae"]]


def encoder_of(sae: Any) -> Encode:
    """The function from activations to features, without gradients; valid until weights change.

    It takes activations (n, d_in) on any device; a hook_z SAE also takes (n, heads, d_head). A TopK
    SAE on a CPU gives sparse COO tensors, found by `saesub.topk.cpu` or, without a C++ compiler,
    by `saesub.topk.int8_search`. These searches may choose another of two features
    that are equal within rounding, and their bounds are statistical.

    The function raises SaesubError for activations of another shape.
    """
    find = _searched(sae) if _suits_search(sae) else sae.encode

    @torch.no_grad()
    def encode(x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        if x.ndim < 2 or x.shape[1:].numel() != sae.cfg.d_in:
            raise SaesubError(
                f"The SAE reads activations of shape (n, {sae.cfg.d_in}), not {tuple(x.shape)}: "
                "give those of its own hook point, a row for each token."
            )
        with flat_heads(sae):
            return find(x.to(sae.device).flatten(1))

    return encode


@torch.no_grad()
def _searched(sae: Any) -> Encode:
    search = search_of(row_backend(sae.W_enc.device), exact=False)
    W_enc, scale = sae.W_enc.detach().T.contiguous().T, feature_scale(sae)
    k, b_enc = int(sae.cfg.k), sae.b_enc.detach()

    def encode(x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        sae_in = sae.process_sae_in(x).contiguous()
        selected = select_topk(sae_in, W_enc, b_enc, k, scale, search=search)
        ranked = selected.pre if scale is None else selected.pre * scale[selected.features]
        return sparse_activations(selected, ranked.relu(), len(x))

    return encode


def _suits_search(sae: Any) -> bool:
    if type(sae) not in (TopKSAE, TopKTrainingSAE) or is_hooked(sae):
        return False
    if sae.W_enc.device.type != "cpu":
        return False
    scale = feature_scale(sae)  # the search divides by it
    whole = scale is None or bool((scale > 0).all())
    return whole and sae.W_enc.dtype == torch.float32 and 0 < sae.cfg.k <= sae.cfg.d_sae


def times_fired(features: Float[Tensor, "n d_sae"]) -> Int[Tensor, " d_sae"]:
    """On how many of the n tokens each feature fires; features may be dense or sparse."""
    if features.is_sparse:
        entries = features.coalesce()
        fired = (entries.values() != 0).long()  # a selection of them would wait for a GPU
        return fired.new_zeros(features.shape[-1]).index_add_(0, entries.indices()[-1], fired)
    return (features != 0).sum(0)


@contextmanager
def flat_heads(sae: SAE[Any]) -> Iterator[None]:
    """Let a hook_z SAE read and write concatenated heads, (n, heads × d_head), inside the block."""
    names = ("reshape_fn_in", "reshape_fn_out", "d_head", "hook_z_reshaping_mode")
    before = {name: vars(sae).get(name) for name in names}
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        vars(sae).update(before)
