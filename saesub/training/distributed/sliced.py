"""A TopK dictionary of which each process holds a slice of the features.

All processes call these functions together, on the same tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from sae_lens import TopKTrainingSAE
from torch import Tensor
from torch.nn import functional as F

from saesub.topk.backend import Decoded, RowBackend
from saesub.topk.ops import Search, Selected, decode_at, row_products, select_topk
from saesub.topk.step import MAX_NORM, WholeDictionary
from saesub.training.distributed.processes import Processes


def select_over_processes(
    processes: Processes,
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_here"],
    b_enc: Float[Tensor, " d_here"],
    k: int,
    scale: Float[Tensor, " d_here"] | None = None,
    search: Search | None = None,
) -> Selected:
    """This process's entries among each token's k best features of all processes.

    The arguments are those of `ops.select_topk`; a process may have fewer than k features, or none.
    Exactly k are chosen over all processes; of equal scores, those of the lower process.
    """
    n, d_here = len(x), len(b_enc)
    k_here = min(k, d_here)
    features, pre = torch.zeros(n, 0, dtype=torch.int64, device=x.device), x[:, :0]
    if k_here:
        found = select_topk(x, W_enc, b_enc, k_here, scale, search=search)
        features, pre = found.features.view(n, k_here), found.pre.view(n, k_here)
    scores = pre if scale is None else pre * scale[features]
    padded = F.pad(scores, (0, k - k_here), value=-torch.inf)
    all_scores = torch.stack(processes.gather(padded), 1).flatten(1)
    # A stable sort gives every process the same choice.
    best = all_scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = torch.zeros_like(all_scores, dtype=torch.bool).scatter_(1, best, True)
    here = chosen.view(n, processes.count, k)[:, processes.index, :k_here]
    offsets = F.pad(here.sum(1).cumsum(0), (1, 0))
    return Selected(features[here], offsets, pre[here], d_here)


class SlicedDictionary(WholeDictionary):
    """`WholeDictionary` for a process that holds a slice of the features."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def select(self, *arguments: Any, search: Search) -> Selected:
        """`select_over_processes`."""
        return select_over_processes(self.processes, *arguments, search=search)

    def sum(self, here: Tensor) -> Tensor:
        """The sum over processes. Each process differentiates its own part of it."""
        return _Sum.apply(here, self.processes)  # pyright: ignore

    def shared(self, parameter: Tensor) -> Tensor:
        """`parameter`, its gradient being the sum over processes, made in float64."""
        return _Shared.apply(parameter, self.processes)  # pyright: ignore

    def decode(self, backend: RowBackend, *arguments: Any) -> Decoded:
        """As `RowBackend.decode`, by torch operators: a backend decodes and differentiates in one
        pass, and the sum over processes lies between."""
        selected, values, W_dec, b_dec, target, weight = arguments
        x_hat = self.sum(decode_at(selected, values, W_dec))
        if b_dec is not None:
            x_hat += b_dec
        error = x_hat - target
        g_out = error * (2 * weight)
        g_pre = row_products(g_out, selected, W_dec) * (values != 0)
        return Decoded(x_hat, g_out, g_pre, g_out.sum(0), error.square().sum())

    def clip_gradients(self, sae: TopKTrainingSAE) -> None:
        """Clip by the norm over all processes; `b_dec`, which all have, counts once."""
        gradients: Any = {name: p.grad for name, p in sae.named_parameters()}
        own = (gradients["W_enc"].T, gradients["W_dec"], gradients["b_enc"])
        here = torch.stack([_squared_norm(gradient) for gradient in own]).sum()
        norm = (self.sum(here) + _squared_norm(gradients["b_dec"])).sqrt()
        torch.nn.utils.clip_grads_with_norm_(sae.parameters(), MAX_NORM, norm)


def _squared_norm(gradient: Tensor) -> Tensor:
    """Summed in float64 by blocks, since torch copies to float64 what it is given."""
    norms = [torch.linalg.vector_norm(rows, dtype=torch.float64) for rows in gradient.split(1024)]
    return torch.stack(norms).square().sum()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, here: Tensor, processes: Processes) -> Tensor:
        return processes.sum_(here.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None  # every process has the whole loss, and so the whole gradient


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.processes.sum_(grads[0].double()).to(grads[0].dtype), None
