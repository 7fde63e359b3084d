"""The choice of the code that makes a training step: SAELens' own, torch operators or a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from saesub.errors import SaesubError, near_names
from saesub.topk.backend import RowBackend
from saesub.topk.eligibility import lay_out_by_feature, takes_sparse_step
from saesub.topk.ops import Search
from saesub.topk.step import autograd_pass, row_backend, row_step, search_of

if TYPE_CHECKING:  # the trainer imports this module
    from saesub.training.trainer import SubspaceSAETrainer

Backend = Literal["auto", "exact_search", "torch", "triton", "dense"]


class StepChoice:
    """Which step an SAE takes, and how it searches; `backend` is as in `SubspaceSAETrainer`.

    Attributes:
        exact: whether the search is the whole product.
        equal_steps: whether the optimizer has updated all parameters equally often. Parameters
            that were frozen for a while lag behind, and a backend knows one number of steps only.

    Raises:
        SaesubError: an unknown backend, or "triton" where Triton does not run.
    """

    def __init__(self, backend: Backend, sae: Any) -> None:
        if backend not in get_args(Backend):
            raise SaesubError(
                f"Unknown backend {backend!r}: {near_names(backend, get_args(Backend))}"
            )
        if backend == "triton" and row_backend(sae.W_enc.device, triton=True) is None:
            raise SaesubError(
                "backend='triton' needs the SAE on a CUDA device and a Triton that runs there: "
                "move it with sae.to('cuda'), install triton, or pass backend='torch'."
            )
        self.backend = backend
        self.exact = backend == "exact_search"
        self.equal_steps = True

    def is_sparse(self, sae: Any, cfg: SAETrainerConfig) -> bool:
        """Whether the SAE takes the sparse step, by whichever code."""
        return self.backend != "dense" and takes_sparse_step(sae, cfg)

    def take(self, trainer: SubspaceSAETrainer, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        """Forward, backward, clipping and the optimizer's update."""
        sparse = self.is_sparse(sae, trainer.cfg)
        if sparse:
            lay_out_by_feature(sae)  # the weights may have been replaced since the last step
        adds_loss = any(mitigation.loss_name for mitigation in trainer.mitigations)
        rows = self.row_backend(sae) if sparse and not adds_loss else None
        if rows is None:
            return self._by_autograd(trainer, sae, sae_in, sparse)
        return row_step(
            rows,
            sae,
            trainer.optimizer,
            sae_in,
            trainer.dead_for_auxk(sae),
            exact_search=self.exact,
            dictionary=trainer.dictionary,
        ).output

    def _by_autograd(
        self, trainer: SubspaceSAETrainer, sae: Any, sae_in: Tensor, sparse: bool
    ) -> TrainStepOutput:
        if sparse:
            dead, search, dictionary = (
                trainer.dead_for_auxk(sae),
                self.search(sae),
                trainer.dictionary,
            )
            found = autograd_pass(sae, sae_in, dead, search=search, dictionary=dictionary)
            output = found.output
        else:
            step_input = TrainStepInput(
                sae_in=sae_in,
                dead_neuron_mask=trainer.dead_neurons,
                coefficients=trainer.get_coefficients(),
                n_training_steps=trainer.n_training_steps,
                is_logging_step=trainer._is_logging_step(),
            )
            with trainer.autocast_if_enabled:
                output = sae.training_forward_pass(step_input=step_input)
        for mitigation in trainer.mitigations:
            if mitigation.loss_name:
                output.losses[mitigation.loss_name] = mitigation.extra_loss(trainer, output)
                output.loss = output.loss + output.losses[mitigation.loss_name]
        output.loss.backward()
        trainer.dictionary.clip_gradients(sae)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return output

    def row_backend(self, sae: Any) -> RowBackend | None:
        """What makes a whole sparse step; None if torch's autograd must."""
        if not all(parameter.requires_grad for parameter in sae.parameters()):
            self.equal_steps = False
        return self._compiled(sae) if self.equal_steps else None

    def search(self, sae: Any) -> Search:
        """How a sparse step by autograd finds its entries."""
        # On CUDA by the whole product: what a search misses there has not been measured.
        rows = self._compiled(sae) if sae.W_enc.device.type == "cpu" else None
        return search_of(rows, self.exact)

    def _compiled(self, sae: Any) -> RowBackend | None:
        if self.backend == "torch" or sae.W_enc.dtype != torch.float32:
            return None
        return row_backend(sae.W_enc.device, triton=self.backend == "triton")
