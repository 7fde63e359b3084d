"""What trained features are like: how often they fire, how alike they are, how far seeds agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.blocks import blocks_of
from saesub.activations.forward_pass import hook_points
from saesub.errors import SaesubError
from saesub.evaluation.dead_features import times_fired
from saesub.topk.encode import encoder_of, flat_heads

_ROWS_PER_BLOCK = 1024  # bounds the (rows, d_sae) block of cosines


@torch.no_grad()
def feature_density(
    sae: SAE[Any], activations: Tensor | Iterable[Tensor], *, n_tokens: int
) -> Float[Tensor, " d_sae"]:
    """Share of `n_tokens` tokens on which each feature fires; 0 is a feature dead over them.

    Args:
        sae: any SAELens SAE or transcoder, in training or inference form.
        activations: (n, d_in), or an iterator of such blocks; the first `n_tokens` rows are used.

    Raises:
        SaesubError: fewer than `n_tokens` rows came.
    """
    counts = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=sae.device)
    encode = encoder_of(sae)
    with flat_heads(sae):
        for block in blocks_of(activations, n_tokens):
            counts += times_fired(encode(block.to(sae.device)))
    return counts / n_tokens


@torch.no_grad()
def nearest_cosine(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The largest cosine of each row to any other row; near 1 is a feature learned twice.

    SAEBench reports it in its core evaluation. Raises SaesubError if there are fewer than two rows.
    """
    if len(rows) < 2:
        raise SaesubError(f"a nearest neighbour needs at least 2 rows, not {len(rows)}")
    unit = normalize(rows.detach().float(), dim=-1)
    nearest = []
    for start in range(0, len(unit), _ROWS_PER_BLOCK):
        cosines = unit[start : start + _ROWS_PER_BLOCK] @ unit.T
        cosines.diagonal(start).fill_(-torch.inf)  # a row is not its own neighbour
        nearest.append(cosines.amax(1))
    return torch.cat(nearest)


class Matching(NamedTuple):
    """A one-to-one matching: rows `of_a` and `of_b` are partners, `cosine` is theirs, (pairs,)."""

    of_a: Int[Tensor, " pairs"]
    of_b: Int[Tensor, " pairs"]
    cosine: Float[Tensor, " pairs"]


@torch.no_grad()
def match_features(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"]) -> Matching:
    """Partners the features of two SAEs, so that the summed cosine is the largest possible.

    The Hungarian assignment by which Paulo & Belrose (2025, arXiv 2501.16615) compare seeds; give
    the decoder rows of living features only. Where one side has more, some of it stay single. It
    holds all n_a × n_b cosines and takes seconds at 5,000 features, growing with their cube.

    Raises:
        SaesubError: an empty side, or rows of different widths.
    """
    if a.shape[-1] != b.shape[-1] or not len(a) or not len(b):
        raise SaesubError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be matched: give two non-empty "
            "sets of rows of one width"
        )
    unit_a, unit_b = (normalize(rows.detach().float(), dim=-1) for rows in (a, b))
    cosines = unit_a @ unit_b.T
    pairs = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    of_a, of_b = (torch.from_numpy(index).to(a.device) for index in pairs)
    return Matching(of_a, of_b, cosines[of_a, of_b])


@torch.no_grad()
def site_activations(
    model: TransformerBridge, tokens: Int[Tensor, "batch pos"], hook_name: str
) -> Float[Tensor, "batch pos d"]:
    """Activations at one hook point for given tokens, heads concatenated; every position."""
    hook_points(model, [hook_name])
    _, cache = model.run_with_cache(
        tokens.to(model.cfg.device),
        names_filter=[hook_name],
        stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(hook_name),
    )
    return cache[hook_name].flatten(2)
