"""The fused step of a TopK SAE: forward, backward, clipping and Adam by the loops of a backend.

It replaces SAELens' `_train_step` where it equals it; `why_not` says why it does not.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from saesub.errors import SaesubError, near_names
from saesub.topk.backend import RowBackend
from saesub.topk.eligibility import PARAMETERS, lay_out_by_feature, other_pass, why_dense
from saesub.topk.optim import SparseAdam, has_foreign_hooks
from saesub.topk.sae import SparseTopKTrainingSAE
from saesub.topk.step import SparseStepOutput, row_backend, row_step
from saesub.topk.step_graph import StepGraph

if TYPE_CHECKING:  # the trainer imports this module
    from torch import Tensor

    from saesub.topk.backend import Shadow
    from saesub.training.trainer import SubspaceSAETrainer

Backend = Literal["auto", "exact_search", "torch", "triton", "dense"]
_CLIP = torch.nn.utils.clip_grad_norm_
# Settings of torch's Adam that the fused step does not know, and must find switched off.
_UNKNOWN_SETTINGS = ("weight_decay", "amsgrad", "maximize", "differentiable")


class NativeStep:
    """When and how a trainer takes the fused step; `backend` is as in `SubspaceSAETrainer`.

    Attributes:
        fused: whether the last step was the fused one.
        equal_steps: whether the optimizer has updated all parameters equally often, as far as is
            known without asking the device. Parameters that were frozen for a while lag behind, and
            a backend knows one number of steps only.

    Raises:
        SaesubError: an unknown backend, or "triton" where Triton does not run.
    """

    def __init__(self, backend: Backend, sae: Any) -> None:
        if backend not in get_args(Backend):
            raise SaesubError(
                f"Unknown backend {backend!r}: {near_names(backend, get_args(Backend))}"
            )
        if backend == "triton" and row_backend(sae.W_enc.device, triton=True) is None:
            if not torch.cuda.is_available():
                raise SaesubError(
                    "backend='triton' needs a GPU, and torch finds no CUDA device here: leave the "
                    "backend out, which takes the fastest step of the CPU."
                )
            raise SaesubError(
                "backend='triton' needs the SAE on a CUDA device of compute capability 8.0 or more "
                "and a Triton that runs there: move it with sae.to('cuda'), install triton, or "
                "pass backend='torch'."
            )
        self.backend = backend
        self.fused = False
        self.equal_steps = True
        self._shadow: Shadow | None = None
        self._graph: StepGraph | None = None
        self._said: set[str] = set()

    def invalidate(self) -> None:
        """Forget what was kept of the weights, which others have changed."""
        self._shadow = None

    def end(self) -> None:
        """Give back what is kept on the device for further steps."""
        self._shadow = self._graph = None

    def rows(self, trainer: SubspaceSAETrainer) -> RowBackend | None:
        """The backend of the next step; None if SAELens' step and autograd take it.

        Where a backend would be there, one warning says why it is not taken.
        """
        found = self._rows(trainer)
        self.fused = found is not None
        return found

    def _rows(self, trainer: SubspaceSAETrainer) -> RowBackend | None:
        sae = trainer.sae
        if not all(parameter.requires_grad for parameter in sae.parameters()):
            self.equal_steps = False
        if not isinstance(sae, SparseTopKTrainingSAE) or sae.search_name == "torch":
            return None  # asked for
        if not isinstance(trainer.autocast_if_enabled, nullcontext) or why_dense(sae):
            return None  # the SAE's pass says so
        rows = row_backend(sae.W_enc.device, triton=self.backend == "triton")
        reason = None if rows is None else self.why_not(trainer, rows)
        if reason is None:
            return rows
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(
                "torch's autograd and optimizer take the sparse step, more slowly than the "
                f"compiled one: {reason}.",
                stacklevel=5,
            )
        return None

    def why_not(self, trainer: SubspaceSAETrainer, rows: RowBackend) -> str | None:
        """Why the fused step would not equal SAELens' step of this trainer; None if it would."""
        sae = trainer.sae
        if not all(parameter.requires_grad for parameter in sae.parameters()):
            return "some of the weights are frozen"
        if not self._equal_steps(trainer.optimizer, sae):
            return "the optimizer has updated some of the weights more often than others"
        if sae.W_enc.dtype != torch.float32:
            return f"the weights are in {sae.W_enc.dtype}"
        if torch.nn.utils.clip_grad_norm_ is not _CLIP:
            return "torch's clip_grad_norm_ was replaced"
        losses = [type(m).__name__ for m in trainer.mitigations if m.loss_name]
        if losses:
            return f"{' and '.join(losses)} adds to the loss"
        found = other_pass(sae) or _about_parameters(sae)
        found = found or _about_optimizer(trainer.optimizer, sae)
        if found is None and rows.skips_nan and not _is_fused(trainer.optimizer):
            return "the optimizer is not fused, and could not leave out a batch that is not finite"
        return found

    def _equal_steps(self, optimizer: torch.optim.Optimizer, sae: Any) -> bool:
        if sae.W_enc.device.type != "cpu":
            return self.equal_steps  # reading them there would wait for the device
        kept = [optimizer.state.get(p, {}) for p in (sae.W_enc, sae.W_dec, sae.b_enc)]
        return len({float(state.get("step", 0)) for state in kept}) == 1

    def take(
        self, trainer: SubspaceSAETrainer, rows: RowBackend, sae_in: Tensor
    ) -> SparseStepOutput:
        """Forward, backward, clipping and the optimizer's update."""
        sae = trainer.sae
        lay_out_by_feature(sae)  # the weights may have been replaced since the last step
        # Before a whole window none can be dead, and the device need not be asked.
        may_be_dead = sae.cfg.aux_loss_coefficient and trainer.has_seen_window
        dead = trainer.dead_neurons if may_be_dead else None
        exact = sae.search_name == "exact_search"
        if exact:
            self._shadow = None
        else:
            self._shadow = rows.shadow(sae, self._shadow, in_subspace=sae.in_subspace)
        if sae.W_enc.device.type == "cuda":
            self._graph = self._graph or StepGraph()
        return row_step(
            rows,
            sae,
            trainer.optimizer,
            sae_in,
            dead,
            exact_search=exact,
            dictionary=trainer.dictionary,
            shadow=self._shadow,
            graph=self._graph,
        )


def _about_parameters(sae: Any) -> str | None:
    for parameter in sae.parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return "a parameter has hooks"
        if parameter.grad is not None:
            return "gradients were left in the parameters"
    return None


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups)


def _about_optimizer(optimizer: torch.optim.Optimizer, sae: Any) -> str | None:
    groups, step = optimizer.param_groups, vars(optimizer).get("step")
    if type(optimizer) not in (SparseAdam, torch.optim.Adam):
        return f"the optimizer is {type(optimizer).__name__}"
    if has_foreign_hooks(optimizer) or not (
        step is None or getattr(step, "_wrapped_by_lr_sched", False)
    ):
        return "the optimizer has hooks, or a step of its own"
    given = [parameter for group in groups for parameter in group["params"]]
    if {id(p) for p in given} != {id(getattr(sae, name)) for name in PARAMETERS}:
        return "the optimizer has other parameters than the SAE"
    for name in _UNKNOWN_SETTINGS:
        if any(group.get(name) for group in groups):
            return f"the optimizer has {name}"
    settings = {(float(g["lr"]), tuple(map(float, g["betas"])), float(g["eps"])) for g in groups}
    return None if len(settings) == 1 else "groups of the optimizer have different settings"
