"""Adam for sparse dictionaries: a feature without a gradient does not move.

With plain Adam, a feature that fired once keeps moving for hundreds of steps on stale momentum,
and no gradient corrects it. Rare features drift away from the data and die (paper, section on
SparseAdam). The paper's masked Adam prevents this: moments decay at every step, and parameters
move only where the gradient is non-zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from saesub.errors import SaesubError
from saesub.precision import reading_waits, where_float64

OptimizerName = Literal["adam", "sparse_adam"]

# Which axis of each parameter of an SAELens dictionary or a Lorsa counts features. Parameters not
# named here (b_dec, W_skip, W_Q) have no such axis: they get a gradient and move at every step.
FEATURE_AXIS = {
    "W_enc": 1,
    "W_dec": 0,
    "b_enc": 0,
    "b_gate": 0,
    "b_mag": 0,
    "r_mag": 0,
    "threshold": 0,
    "W_V": 0,
    "b_V": 0,
    "W_O": 0,
}

# If fewer features than this share have a gradient, updating them alone is faster than torch's
# fused Adam over all.
_LAZY_BELOW = 0.2


def make_optimizer(
    name: str, module: nn.Module, *, lr: float, betas: tuple[float, float]
) -> torch.optim.Adam:
    """torch's Adam or `SparseAdam` over all parameters. Raises SaesubError for another name."""
    if name == "sparse_adam":
        return SparseAdam(parameter_groups(module), lr=lr, betas=betas)
    if name == "adam":
        adam = torch.optim.Adam(module.parameters(), lr=lr, betas=betas, fused=True)
        adam.register_step_pre_hook(align_moments)
        adam.register_state_dict_post_hook(_leave_fused_out)
        adam.register_load_state_dict_post_hook(_fuse)
        return adam
    raise SaesubError(f"Unknown optimizer {name!r}: pass 'adam' or 'sparse_adam'.")


def align_moments(optimizer: Any, *_: Any) -> None:
    """Give moments their parameter's strides: on a CPU torch's fused Adam takes it for granted,
    and pairs the wrong entries otherwise."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if "exp_avg" in optimizer.state.get(parameter, {}):
                moments(optimizer, parameter)


def _leave_fused_out(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    for group in state["param_groups"]:
        group["fused"] = None  # who loads it may not align moments


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["fused"] = True


@contextmanager
def found_inf(optimizer: torch.optim.Optimizer, found: Tensor | None) -> Iterator[None]:
    """Let a step of torch's fused Adam or of `SparseAdam` change nothing where `found`, a scalar on
    the device, is not 0. As torch's GradScaler asks for it."""
    if found is None:
        yield
        return
    optimizer.found_inf, optimizer.grad_scale = found, None  # pyright: ignore
    try:
        yield
    finally:
        del optimizer.found_inf, optimizer.grad_scale  # pyright: ignore


_OWN_HOOKS = {align_moments}


def has_foreign_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether someone else asked to be called before or after each of an optimizer's steps."""
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    of_all = _global_optimizer_pre_hooks or _global_optimizer_post_hooks
    return bool(after or of_all) or not set(before.values()) <= _OWN_HOOKS


def parameter_groups(sae: nn.Module) -> list[dict[str, Any]]:
    """One optimizer group per parameter of a dictionary, also one that lies inside another module,
    marked with its feature axis."""
    return [
        {"params": [parameter], "feature_axis": FEATURE_AXIS.get(name.rpartition(".")[2])}
        for name, parameter in sae.named_parameters()
    ]


def moments(optimizer: torch.optim.Adam, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
    """(step, exp_avg, exp_avg_sq) of a parameter, as torch's Adam keeps them; zeros at first.

    The moments have the parameter's strides.
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


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """How many updates the most often updated parameter has had."""
    return max((int(kept.get("step", 0)) for kept in optimizer.state.values()), default=0)


class SparseAdam(torch.optim.Adam):
    """Adam in which a feature moves only in steps where it has a gradient.

    The moments of every entry decay at every step, as in Adam. A feature (a row along the group's
    `feature_axis`) whose whole gradient is zero keeps its parameters. This is the masked Adam of
    arXiv 2508.16929. `torch.optim.SparseAdam` differs: it takes sparse gradients only, and moments
    of rows without a gradient do not decay.

    Where few features have a gradient, only their rows are touched: a row's moments catch up on
    the decay they missed when the row next moves. `state[parameter]["moved"]` (d_sae,) holds the
    step up to which each row's moments are decayed; without it, all are up to date. On CUDA all
    rows are updated at every step, since to know which have a gradient is to wait for the device.

    Args:
        params: groups made by `parameter_groups`. A group whose `feature_axis` is None, or a plain
            list of parameters, is updated as by Adam.
        lr, betas, eps: as in `torch.optim.Adam`. There is no weight decay: it would move every row.

    Raises:
        SaesubError: in `step`, a group with `weight_decay`, `amsgrad` or `maximize`.
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
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            _check_group(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def moved(self, parameter: nn.Parameter, axis: int) -> Int[Tensor, " d_sae"]:
        """The step up to which the moments of each row are decayed."""
        state = self.state[parameter]
        if "moved" not in state:  # new, or of an Adam whose moments are all up to date
            moved = torch.zeros(parameter.shape[axis], dtype=torch.int64, device=parameter.device)
            state["moved"] = moved + state["step"].to(moved) if "step" in state else moved
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

    def _update(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        axis = group["feature_axis"]
        step, *averages = moments(self, parameter)
        # Views with one row per feature, contiguous if features lie together in memory.
        rows = [t.detach().movedim(axis or 0, 0) for t in (parameter, grad, *averages)]
        if axis is None:
            return _fused_adam(rows, step, group, getattr(self, "found_inf", None))
        if reading_waits(parameter):
            moved = self.state[parameter].pop("moved", None)
            return _update_masked(rows, moved, step, group)
        moved, moves = self.moved(parameter, axis), _rows_with_gradient(rows[1])
        if int(moves.sum()) < _LAZY_BELOW * len(moves):
            return _update_rows(rows, moves.nonzero().squeeze(1), moved, step, group)
        missed = int(step) - moved
        if bool(missed.any()):
            _catch_up(rows, missed, group)
        still = (~moves).nonzero().squeeze(1)
        kept = rows[0].index_select(0, still)
        _fused_adam(rows, step, group)
        rows[0].index_copy_(0, still, kept)
        moved.fill_(int(step))


def _check_group(group: dict[str, Any]) -> None:
    for name in ("weight_decay", "amsgrad", "maximize"):
        if group[name]:
            raise SaesubError(
                f"SparseAdam has no {name}, which a group of it asks for: switch it off, or take "
                "torch's Adam."
            )


def _fused_adam(
    rows: list[Tensor], step: Tensor, group: dict[str, Any], found: Tensor | None = None
) -> None:
    """torch's fused Adam on (parameter, gradient, moments), without a copy where they match."""
    parameter, grad, average, square = rows
    if grad.stride() != parameter.stride():
        grad = torch.empty_like(parameter).copy_(grad)
    adam(
        [parameter],
        [grad],
        [average],
        [square],
        max_exp_avg_sqs=[],
        state_steps=[step],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
        found_inf=found,
    )


def _update_masked(
    rows: list[Tensor], moved: Tensor | None, step: Tensor, group: dict[str, Any]
) -> None:
    """Update all rows and put those without a gradient back: operators of fixed shapes only.

    Afterwards the moments of all rows are up to date.
    """
    if moved is not None:
        _catch_up(rows, step.to(moved.dtype) - moved, group)
    parameter, kept = rows[0], rows[0].clone()
    moves = _rows_with_gradient(rows[1]).view(-1, *[1] * (parameter.ndim - 1))
    _fused_adam(rows, step, group)
    torch.where(moves, parameter, kept, out=parameter)


def _catch_up(rows: list[Tensor], missed: Tensor, group: dict[str, Any]) -> None:
    """Decay the moments of each row by the steps they have missed."""
    for average, beta in zip(rows[2:], group["betas"], strict=True):
        average.mul_(_decay(beta, missed, average))


def _update_rows(
    rows: list[Tensor], index: Tensor, moved: Tensor, step: Tensor, group: dict[str, Any]
) -> None:
    """Update the rows `index` alone, after the decay that their moments have missed."""
    parameter, gradient, *averages = rows
    step += 1
    missed, grad, betas = step - moved[index], gradient.index_select(0, index), group["betas"]
    updated = []
    for average, power, beta in zip(averages, (grad, grad.square()), betas, strict=True):
        kept = average.index_select(0, index) * _decay(beta, missed, grad)
        updated.append(kept.add_(power, alpha=1 - beta))
        average.index_copy_(0, index, updated[-1])
    t = step.item()
    root = updated[1].sqrt() / (1 - betas[1] ** t) ** 0.5 + group["eps"]
    parameter.index_add_(0, index, updated[0] / root, alpha=-group["lr"] / (1 - betas[0] ** t))
    moved[index] = int(t)


def _decay(beta: float, missed: Tensor, like: Tensor) -> Tensor:
    """beta to the power of the steps missed, shaped to multiply rows."""
    decay = torch.pow(beta, where_float64(missed).double())
    return decay.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def _rows_with_gradient(rows: Tensor) -> Bool[Tensor, " d_sae"]:
    if rows.ndim == 1:
        return rows != 0
    # Not "> 0": a row of NaN has a gradient, and must show.
    return torch.linalg.vector_norm(rows, torch.inf, tuple(range(1, rows.ndim))) != 0
