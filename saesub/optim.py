"""Optimizers for sparse dictionaries: Adam that leaves alone the features that got no gradient.

With plain Adam a feature that fired once keeps moving for hundreds of steps on stale momentum,
without any gradient to correct it; rare features are pushed away from the data and die (paper,
finding on SparseAdam). The mitigation is the paper authors' masked Adam: moments decay at every step,
parameters move only where the gradient is non-zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim.adam import adam

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

# Below this share of rows with gradient, updating them alone beats torch's fused Adam over all.
_LAZY_BELOW = 0.2


def parameter_groups(sae: nn.Module) -> list[dict[str, Any]]:
    """One optimizer group per parameter of an SAELens dictionary, marked with its feature axis."""
    return [
        {"params": [parameter], "feature_axis": FEATURE_AXIS.get(name)}
        for name, parameter in sae.named_parameters()
    ]


def moments(optimizer: torch.optim.Adam, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
    """(step, exp_avg, exp_avg_sq) of a parameter, as torch's Adam keeps them; zeros at first.

    The moments lie in memory as the parameter does.
    """
    state = optimizer.state[parameter]
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    for name in ("exp_avg", "exp_avg_sq"):
        kept = state.get(name)
        if kept is None or kept.stride() != parameter.stride():
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if kept is not None:
                state[name].copy_(kept)
    return state["step"], state["exp_avg"], state["exp_avg_sq"]


class SparseAdam(torch.optim.Adam):
    """Adam in which a feature moves only in steps where it has a gradient.

    Moments of every entry decay at every step, as in Adam; a feature (a row along the group's
    `feature_axis`) whose whole gradient is zero keeps its parameters. This is the masked Adam of
    arXiv 2508.16929, not `torch.optim.SparseAdam`, which takes sparse gradients only and leaves
    the moments of untouched rows undecayed.

    Where few features have a gradient only their rows are touched: the decay that a row's moments
    missed is applied when it next moves. `state[parameter]["moved"]` (d_sae,) holds the step up to
    which each row's moments are decayed.

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
        self.defaults["feature_axis"] = None
        for group in self.param_groups:
            group.setdefault("feature_axis", None)
        self._step_supports_amp_scaling = False  # torch's fused Adam would unscale, `step` does not

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        """One update from the parameters' gradients."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["feature_axis"] is None:
                    self._move_all(parameter, group)
                else:
                    self._move_features(parameter, group)
        return loss

    def moved(self, parameter: nn.Parameter, axis: int) -> Int[Tensor, " d_sae"]:
        """The step up to which the moments of each row are decayed."""
        state = self.state[parameter]
        if "moved" not in state:  # new, or of an Adam whose moments are all up to date
            shape, steps = (parameter.shape[axis],), int(state.get("step", 0))
            state["moved"] = torch.full(shape, steps, dtype=torch.int64, device=parameter.device)
        return state["moved"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would round the row counters to the parameters' type."""
        axes = [group["feature_axis"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            kept = state_dict["state"].get(number, {})
            if "moved" in kept:
                self.state[parameter]["moved"] = kept["moved"].to(parameter.device, copy=True)
        for group, axis in zip(self.param_groups, axes, strict=True):
            group["feature_axis"] = axis

    def _move_features(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        axis = group["feature_axis"]
        moves = _rows_with_gradient(_rows(parameter.grad, axis))  # pyright: ignore
        if int(moves.sum()) < _LAZY_BELOW * len(moves):
            return self._move_rows(parameter, group, moves.nonzero().squeeze(1))
        self._settle(parameter, group)
        rows, still = _rows(parameter, axis), (~moves).nonzero().squeeze(1)
        kept = rows.index_select(0, still)
        self._move_all(parameter, group)
        rows.index_copy_(0, still, kept)
        self.moved(parameter, axis).fill_(int(self.state[parameter]["step"]))

    def _move_all(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """torch's fused Adam, on the rows as they lie: it copies what is not contiguous."""
        step, *averages = moments(self, parameter)
        grad = parameter.grad
        if grad.stride() != parameter.stride():  # pyright: ignore
            grad = torch.empty_like(parameter).copy_(grad)  # pyright: ignore
        tensors = [parameter, grad, *averages]
        as_they_lie = [[_rows(t, group["feature_axis"] or 0)] for t in tensors]  # pyright: ignore
        beta1, beta2 = group["betas"]
        adam(
            *as_they_lie,
            max_exp_avg_sqs=[],
            state_steps=[step],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )

    def _move_rows(self, parameter: nn.Parameter, group: dict[str, Any], index: Tensor) -> None:
        """The update of the rows `index` alone, with the decay that their moments have missed."""
        step, *averages = moments(self, parameter)
        axis, betas = group["feature_axis"], group["betas"]
        moved = self.moved(parameter, axis)
        step += 1
        missed = step - moved[index]
        grad = _rows(parameter.grad, axis).index_select(0, index)  # pyright: ignore
        updated = []
        for average, power, beta in zip(averages, (grad, grad.square()), betas, strict=True):
            kept = _rows(average, axis).index_select(0, index) * _decay(beta, missed, grad)
            updated.append(kept.add_(power, alpha=1 - beta))
            _rows(average, axis).index_copy_(0, index, updated[-1])
        t = step.item()
        root = updated[1].sqrt() / (1 - betas[1] ** t) ** 0.5 + group["eps"]
        rate = group["lr"] / (1 - betas[0] ** t)
        _rows(parameter, axis).index_add_(0, index, updated[0] / root, alpha=-rate)
        moved[index] = int(t)

    def _settle(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Apply the decay that rows have missed, so that torch's Adam may go over all of them."""
        step, *averages = moments(self, parameter)
        axis = group["feature_axis"]
        missed = int(step) - self.moved(parameter, axis)
        if bool(missed.any()):
            for average, beta in zip(averages, group["betas"], strict=True):
                _rows(average, axis).mul_(_decay(beta, missed, _rows(average, axis)))


def _rows(tensor: Tensor, axis: int) -> Tensor:
    """A view with one row per feature, contiguous if features lie together in memory."""
    return tensor.detach().movedim(axis, 0)


def _decay(beta: float, missed: Tensor, like: Tensor) -> Tensor:
    """beta to the steps missed, shaped to multiply rows."""
    decay = torch.pow(beta, missed.cpu().double())  # not every device has float64
    return decay.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def _rows_with_gradient(rows: Tensor) -> Tensor:
    if rows.ndim == 1:
        return rows != 0
    # Not "> 0": a row of NaN has a gradient, and must show.
    return torch.linalg.vector_norm(rows, torch.inf, tuple(range(1, rows.ndim))) != 0
