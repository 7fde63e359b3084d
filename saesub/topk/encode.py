"""Feature activations for judging an SAE: SAELens' own, or by the sparse step's search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, TopKSAE, TopKTrainingSAE
from torch import Tensor

from saesub.topk.eligibility import is_hooked
from saesub.topk.ops import select_topk
from saesub.topk.step import feature_scale, row_backend, search_of, sparse_activations

Encode = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_sae"]]


@torch.no_grad()
def encoder_of(sae: Any) -> Encode:
    """What gives an SAE's `encode(x)`, without gradients, for as long as its weights stay the same.

    Of a TopK SAE on a CPU the activations are sparse COO tensors, found by `saesub.topk.cpu.search`
    or, without a C++ compiler, `saesub.topk.int8_search.search`: of features within rounding of one
    another these may take another, and the bounds that they search by are statistical.
    """
    if not _suits_search(sae):
        return torch.no_grad()(sae.encode)
    search = search_of(row_backend(sae.W_enc.device), exact=False)
    W_enc, scale = sae.W_enc.detach().T.contiguous().T, feature_scale(sae)
    k, b_enc = int(sae.cfg.k), sae.b_enc.detach()

    @torch.no_grad()
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


@contextmanager
def flat_heads(sae: SAE[Any]) -> Iterator[None]:
    """Let a loaded hook_z SAE take concatenated heads, (n, heads × d_head), inside the block."""
    reshapes = sae.hook_z_reshaping_mode
    if reshapes:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if reshapes:
            sae.turn_on_forward_pass_hook_z_reshaping()
