"""How a pass by autograd finds an SAE's entries: in their active subspace, if that pays."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from saesub.topk import int8_search, subspace_search
from saesub.topk.active_subspace import ActiveSubspace
from saesub.topk.ops import Search
from saesub.topk.packed_encoder import can_search, search_all
from saesub.topk.prices import TORCH_PRICES, native_prices
from saesub.topk.step import row_backend, search_of
from saesub.topk.subspace_watch import Found, search_watched, watch_of


def search_for(sae: Any, *, in_subspace: bool) -> Search:
    """The search of a `SparseTopKTrainingSAE`, by its `search_name`."""
    # On CUDA by torch operators: what the kernels' search misses there has not been measured.
    compiled = sae.search_name != "torch" and sae.W_enc.dtype == torch.float32
    on_cpu = sae.W_enc.device.type == "cpu"
    rows = row_backend(sae.W_enc.device) if compiled and on_cpu else None
    plain = search_of(rows, sae.search_name == "exact_search")
    if sae.search_name == "exact_search" or not in_subspace or sae.W_enc.dtype != torch.float32:
        return plain
    return partial(_search, sae, plain, compiled=rows is not None)


def _search(
    sae, plain, x, W_enc, b_enc, k, feature_scale=None, *, compiled
) -> tuple[Tensor, Tensor]:
    d_sae = W_enc.shape[1]
    # Torch's 8-bit product is as fast by all coordinates: the rotation takes what is saved.
    in_float32 = subspace_search.pays(len(x), d_sae, k) and not int8_search.pays(x, d_sae, k)
    pays = can_search(d_sae, k) if compiled else in_float32
    if W_enc.shape != sae.W_enc.shape or not pays:  # of AuxK's features, say
        return plain(x, W_enc, b_enc, k, feature_scale)
    about = (x, W_enc, b_enc, k, feature_scale)

    def search_in(subspace: ActiveSubspace | None) -> Found:
        if compiled:
            return search_all(*about, subspace)
        if subspace is None:
            features, pre = plain(*about)
            return Found(features, pre, 0, 0)  # the product is in the price
        return subspace_search.search(*about, subspace)

    prices = native_prices() if compiled else TORCH_PRICES
    return search_watched(watch_of(sae, prices), search_in, *about)
