"""One TopK SAE on several processes, each with the whole of it and a part of every batch.

Each process sends the gradients, four bytes for each weight in a step. torch's
DistributedDataParallel would weigh processes alike, however many tokens each has. For dictionaries
too large for this, use `saesub.training.distributed.feature_parallel`.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import TopKTrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from saesub.arguments import batch_of
from saesub.topk.step import WholeDictionary
from saesub.training.distributed.processes import Processes
from saesub.training.distributed.trainer import Batches, MultiProcessTrainer, sae_with
from saesub.training.trainer import OptimizerName


class _SummedGradients(WholeDictionary):
    """In a step, `weight` is this process's share of the batch's tokens."""

    weight = 1.0

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def clip_gradients(self, sae: TopKTrainingSAE) -> None:
        """Turn gradients of this process's mean loss into those of the batch's, and clip these."""
        for parameter in sae.parameters():
            gradient: Any = parameter.grad
            gradient = gradient.T if parameter is sae.W_enc else gradient
            self.processes.sum_(gradient.mul_(self.weight))
        super().clip_gradients(sae)


class DataParallelSAETrainer(MultiProcessTrainer):
    """`SubspaceSAETrainer` on several processes; the weights are those of one with all tokens.

    Each gradient is the mean over the tokens of all processes, however many each of them has, and
    AuxK's dead features are those that fired in no process.

    Args:
        processes: from `saesub.training.distributed.join`.
        cfg: as `SAETrainer` takes it; `train_batch_size_samples` is that of all processes together.
        sae: the whole SAE; the weights of the first process are taken.
        batches: called with a step's number, gives this process's tokens (n_here, d_in) of that
            step and the following; n_here may differ between processes and steps, and be 0.
        optimizer, dead_window_tokens: as `SubspaceSAETrainer` takes them.

    Raises:
        SaesubError: the SAE is not a plain TopK SAE, the processes were given different settings, a
            damaged state, a step without a token, or what `SubspaceSAETrainer` raises.
    """

    def __init__(
        self,
        processes: Processes,
        cfg: SAETrainerConfig,
        sae: TopKTrainingSAE,
        batches: Batches,
        *,
        optimizer: OptimizerName = "sparse_adam",
        dead_window_tokens: int | None = None,
    ) -> None:
        super().__init__(
            processes,
            cfg,
            sae,
            batches,
            optimizer=optimizer,
            backend="torch",
            dead_window_tokens=dead_window_tokens,
        )

    def _agree(self) -> None:
        self.dictionary = self._gradients = _SummedGradients(self.processes)
        self.n_features = self.sae.cfg.d_sae
        self.processes.check_same("d_sae", self.n_features)
        for parameter in self.sae.parameters():
            lying = parameter.data.T if parameter is self.sae.W_enc else parameter.data
            self.processes.broadcast_(lying)

    def _as_part(self, rows: Tensor) -> Tensor:
        return rows

    def _total(self, here: float) -> float:
        return here  # every process holds every feature

    def gather(self) -> TopKTrainingSAE | None:
        """The SAE, on the CPU of the first process; None elsewhere."""
        return None if self.processes.index else sae_with(self.sae, self.sae.state_dict())

    def step(self, batch: Tensor) -> TrainStepOutput:
        """One step on this process's tokens (n_here, d_in) of the batch; collective."""
        batch = batch_of(batch)
        n = int(self.processes.sum_(torch.tensor(len(batch))))
        self._require_tokens(n)
        self._n_elsewhere = n - len(batch)
        self._gradients.weight = len(batch) / n
        return super().step(batch)

    def _train_step(self, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        self.n_training_samples += self._n_elsewhere
        if len(sae_in) == 0:  # no mean can be differentiated: take a token of weight 0
            sae_in = sae_in.new_zeros(1, sae_in.shape[1])
        output = super()._train_step(sae, sae_in)
        for name, loss in output.losses.items():
            output.losses[name] = self.processes.sum_(loss.detach() * self._gradients.weight)
        output.loss = torch.stack(list(output.losses.values())).sum()
        return output

    def _count_firing(self, counts: Tensor, n_tokens: int) -> None:
        """Count in all processes; called when AuxK has taken the features dead before the step."""
        weight = self._gradients.weight
        counts = self.processes.sum_(counts * (weight > 0))
        super()._count_firing(counts, self._n_elsewhere + n_tokens * (weight > 0))
