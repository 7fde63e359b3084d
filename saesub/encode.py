"""Feature activations for judging an SAE: SAELens' own, or by the sparse step's search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import TopKSAE, TopKTrainingSAE
from torch import Tensor

from saesub.sparse_ops import select_topk
from saesub.topk_step import feature_scale, row_backend, sparse_activations

Encode = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_sae"]]


@torch.no_grad()
def encoder_of(sae: Any) -> Encode:
    """What gives an SAE's `encode(x)`, without gradients, for as long as its weights stay the same.

    Of a TopK SAE on a CPU with a C++ compiler the activations are sparse COO tensors, found by the
    8-bit search without the product of all tokens and features; ties may fall otherwise. The search
    is left where someone listens to a hook point of the SAE, to whom all pre-activations belong.
    """
    backend = row_backend(sae.W_enc.device)
    hooked = any(hook.fwd_hooks for hook in sae.hook_dict.values())
    topk = type(sae) in (TopKSAE, TopKTrainingSAE)
    if backend is None or hooked or not topk or sae.W_enc.dtype != torch.float32:
        return torch.no_grad()(sae.encode)
    W_enc, scale = sae.W_enc.detach().T.contiguous().T, feature_scale(sae)
    k, b_enc, search = int(sae.cfg.k), sae.b_enc.detach(), backend.search

    @torch.no_grad()
    def encode(x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        sae_in = sae.process_sae_in(x).contiguous()
        selected = select_topk(sae_in, W_enc, b_enc, k, scale, search=search)
        ranked = selected.pre if scale is None else selected.pre * scale[selected.features]
        return sparse_activations(selected, ranked.relu(), len(x))

    return encode
