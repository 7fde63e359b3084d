"""Optimizers for sparse dictionaries: Adam that leaves alone the features that got no gradient.

With plain Adam a feature that fired once keeps moving for hundreds of steps on stale momentum,
without any gradient to correct it; rare features are pushed away from the data and die (paper,
finding on SparseAdam). The remedy is the paper authors' masked Adam: moments decay at every step,
parameters move only where the gradient is non-zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Which axis of each SAELens parameter counts features. Parameters not named here (b_dec, W_skip)
# have no such axis: they get a gradient at every step and move at every step.
FEATURE_AXIS = {
    "W_enc": 1,
    "W_dec": 0,
    "b_enc": 0,
    "b_gate": 0,
    "b_mag": 0,
    "r_mag": 0,
    "threshold": 0,
}


def parameter_groups(sae: nn.Module) -> list[dict[str, Any]]:
    """One optimizer group per parameter of an SAELens dictionary, marked with its feature axis."""
    return [
        {"params": [parameter], "feature_axis": FEATURE_AXIS.get(name)}
        for name, parameter in sae.named_parameters()
    ]


class SparseAdam(torch.optim.Adam):
    """Adam in which a feature moves only in steps where it has a gradient.

    Moments of every entry decay at every step, as in Adam; a feature (a row along the group's
    `feature_axis`) whose whole gradient is zero keeps its parameters. This is the masked Adam of
    arXiv 2508.16929, not `torch.optim.SparseAdam`, which takes sparse gradients only and leaves
    the moments of untouched rows undecayed.

    Args:
        params: groups made by `parameter_groups`; a group whose `feature_axis` is None, or a plain
            list of parameters, is updated as by Adam.
        lr, betas, eps: as in `torch.optim.Adam`. There is no weight decay: it would move every row.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        for group in self.param_groups:
            group.setdefault("feature_axis", None)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        """One update. Rows without gradient are put back as they were after torch's fused Adam."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        still = [row for group in self.param_groups for row in _still_rows(group)]
        super().step()
        for parameter, axis, index, kept in still:
            parameter.index_copy_(axis, index, kept)
        return loss


def _still_rows(group: dict[str, Any]) -> list[tuple[Tensor, int, Tensor, Tensor]]:
    """(parameter, axis, index, values) of the rows of a group whose gradient is zero."""
    axis = group["feature_axis"]
    if axis is None:
        return []
    rows = []
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        moved = _rows_with_gradient(parameter.grad, axis)
        index = (~moved).nonzero().squeeze(1)
        rows.append((parameter, axis, index, parameter.index_select(axis, index)))
    return rows


def _rows_with_gradient(grad: Tensor, axis: int) -> Tensor:
    others = [dim for dim in range(grad.ndim) if dim != axis]
    return grad.abs().amax(others) > 0 if others else grad != 0
