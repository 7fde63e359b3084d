"""One TopK SAE on several ranks, each with the whole of it and a part of every batch.

The gradients travel, four bytes for each weight in a step; torch's DistributedDataParallel would
weigh ranks alike, however many rows each has. For dictionaries too large for that, or for one
device, see `saesub.training.distributed.feature_parallel`.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import TopKTrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from saesub.topk.step import MAX_NORM, autograd_pass
from saesub.training.distributed.processes import Ranks
from saesub.training.distributed.trainer import Batches, RanksTrainer, whole_sae
from saesub.training.trainer import OptimizerName


class DataParallelSAETrainer(RanksTrainer):
    """`SubspaceSAETrainer` on several ranks; the weights are those of one process with all rows.

    Each gradient is the mean over the rows of all ranks, however many each of them has, and AuxK's
    dead features are those that fired on no rank.

    Args:
        ranks: from `saesub.training.distributed.join`.
        cfg: as `SAETrainer` takes it; `train_batch_size_samples` is that of all ranks together.
        sae: the whole SAE; the weights of rank 0 are taken.
        batches: called with a step's number, gives this rank's rows (n_here, d_in) of that step
            and the following; n_here may differ between ranks and steps, and be 0.
        optimizer, dead_window_tokens: as `SubspaceSAETrainer` takes them.

    Raises:
        SaesubError: the SAE is not a plain TopK SAE, the ranks were given different settings, a
            damaged state, a step without a row, or what `SubspaceSAETrainer` raises.
    """

    def __init__(
        self,
        ranks: Ranks,
        cfg: SAETrainerConfig,
        sae: TopKTrainingSAE,
        batches: Batches,
        *,
        optimizer: OptimizerName = "sparse_adam",
        dead_window_tokens: int | None = None,
    ) -> None:
        super().__init__(
            ranks,
            cfg,
            sae,
            batches,
            optimizer=optimizer,
            backend="torch",
            dead_window_tokens=dead_window_tokens,
        )

    def _share_start(self) -> None:
        self.n_features = self.sae.cfg.d_sae
        self.ranks.check_same("d_sae", self.n_features)
        for parameter in self.sae.parameters():
            lying = parameter.data.T if parameter is self.sae.W_enc else parameter.data
            self.ranks.broadcast_(lying)

    def _as_part(self, rows: Tensor) -> Tensor:
        return rows

    def _total(self, here: float) -> float:
        return here  # every rank holds every feature

    def gather(self) -> TopKTrainingSAE | None:
        """The SAE on the CPU of rank 0, to be saved as any SAELens SAE; None elsewhere."""
        return None if self.ranks.rank else whole_sae(self.sae, self.sae.state_dict())

    def step(self, batch: Tensor) -> TrainStepOutput:
        """One step on this rank's rows (n_here, d_in) of the batch; collective."""
        n = int(self.ranks.sum_(torch.tensor(len(batch))))
        self._require_rows(n)
        self._n_in_batch = n
        self.n_training_samples += n - len(batch)
        return super().step(batch)

    def _train_step(self, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        sae.train()
        n_here, weight = len(sae_in), len(sae_in) / self._n_in_batch
        if n_here == 0:  # a row of weight 0: without rows there is no mean to differentiate
            sae_in = sae_in.new_zeros(1, sae_in.shape[1])
        found = autograd_pass(sae, sae_in, self.dead_for_auxk(sae))
        # Only now, AuxK having taken the features dead before the step; `step` adds the rows here.
        self.tokens_since_fired += self._n_in_batch - n_here
        output, fired = found.output, found.selected.times_fired()
        (output.loss * weight).backward()
        self._sum_over_ranks(sae, output, weight)
        self._count_firing(self.ranks.sum_(fired * (weight > 0)), self._n_in_batch)
        torch.nn.utils.clip_grad_norm_(sae.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        return output

    @torch.no_grad()
    def _sum_over_ranks(self, sae: Any, output: TrainStepOutput, weight: float) -> None:
        """Turn this rank's gradients and losses into those of the whole batch."""
        for parameter in sae.parameters():
            gradient = parameter.grad
            self.ranks.sum_(gradient.T if parameter is sae.W_enc else gradient)
        for name, loss in output.losses.items():
            output.losses[name] = self.ranks.sum_(loss.detach() * weight)  # pyright: ignore
        output.loss = sum(output.losses.values(), torch.zeros_like(output.loss))  # pyright: ignore
