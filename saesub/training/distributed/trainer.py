"""What both trainers on several processes share: checks, totals, and the state of a run."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import TopKTrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor, nn

from saesub.errors import SaesubError
from saesub.topk.eligibility import lay_out_by_feature, other_pass, why_dense
from saesub.topk.encode import times_fired
from saesub.topk.optim import FEATURE_AXIS, SparseAdam, moments, steps_taken
from saesub.topk.sae import SparseTopKTrainingSAE
from saesub.topk.sae_search import search_for
from saesub.topk.step import autograd_pass
from saesub.training.distributed.checkpoint import newest_state, read_state, write_state
from saesub.training.distributed.processes import Processes
from saesub.training.plan import require_iterator
from saesub.training.schedule import follow_schedule
from saesub.training.trainer import Backend, OptimizerName, SubspaceSAETrainer

Batches = Callable[[int], Iterator[Tensor]]
_COUNTS = ("tokens_since_fired", "n_forward_passes_since_fired", "act_freq_scores")
_PROGRESS = ("n_training_samples", "n_frac_active_samples")


class MultiProcessTrainer(SubspaceSAETrainer):
    """A `SubspaceSAETrainer` of a TopK SAE in one of several processes, which train together.

    With `cfg.checkpoint_path` the state is written there `cfg.n_checkpoints` times, evenly, the
    newest replacing the one before, and once more at the end if `cfg.save_final_checkpoint`. A
    trainer made with a state there continues from it, on any number of processes.

    `fit` and all that follows it is collective: every process calls it.
    """

    n_features: int  # over all processes
    leaves_out_bad_batches = False  # one process would leave its own out alone

    def __init__(
        self,
        processes: Processes,
        cfg: SAETrainerConfig,
        sae: TopKTrainingSAE,
        batches: Batches,
        *,
        optimizer: OptimizerName = "sparse_adam",
        backend: Backend = "auto",
        dead_window_tokens: int | None = None,
    ) -> None:
        check_suits(sae)
        _check_settings(sae, cfg)
        super().__init__(
            cfg,
            sae,
            iter(()),
            optimizer=optimizer,
            backend="torch" if backend == "dense" else backend,
            dead_window_tokens=dead_window_tokens,
        )
        self.processes = processes
        self._agree()
        processes.check_same("set of settings", self.settings())
        if cfg.checkpoint_path is not None:
            newest = newest_state(processes, Path(cfg.checkpoint_path))
            if newest is not None:
                self._resume(newest)
        if not callable(batches):
            raise SaesubError(
                "batches must be a function of a step's number that gives the batches from there "
                f"on, not {type(batches).__name__}."
            )
        self.data_provider = batches(self.n_training_steps)
        require_iterator(self.data_provider)

    @abstractmethod
    def _agree(self) -> None:
        """Set `n_features`, and take from the first process what must be equal in all."""

    @abstractmethod
    def _as_part(self, rows: Tensor) -> Tensor:
        """A tensor with a row for each feature here, as torch.distributed.checkpoint takes it."""

    @abstractmethod
    def _total(self, here: float) -> float:
        """A sum over all features, from that over the features here."""

    @abstractmethod
    def gather(self) -> TopKTrainingSAE | None:
        """The whole SAE, on the CPU of the first process; None elsewhere."""

    def _dead_share(self) -> float:
        """Over the features of all processes; collective."""
        return self._total(int(self.dead_neurons.sum())) / self.n_features

    def _train_step(self, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        _check_pass(sae, self.cfg)
        if self.native_step.rows(self) is not None:
            return super()._train_step(sae, sae_in)
        sae.train()
        lay_out_by_feature(sae)
        dead = self.dead_neurons if sae.cfg.aux_loss_coefficient else None
        # In all coordinates: no state of several processes has what a subspace is measured by.
        search, dictionary = search_for(sae, in_subspace=False), self.dictionary
        output = autograd_pass(sae, sae_in, dead, search=search, dictionary=dictionary)
        output.loss.backward()
        dictionary.clip_gradients(sae)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._count_firing(times_fired(output.feature_acts), len(sae_in))
        self._advance_schedules()
        return self._as_asked(output)

    def _update_pbar(
        self, step_output: TrainStepOutput, pbar: Any, update_interval: int = 10
    ) -> None:
        """Only the first process keeps its bar; SAELens opens one in every process."""
        if self.processes.index:
            pbar.leave = False
            pbar.close()
        else:
            super()._update_pbar(step_output, pbar, update_interval)

    def set_final_sae_metadata(self) -> None:
        """As `SubspaceSAETrainer`'s, over the features of all processes; collective."""
        super().set_final_sae_metadata()
        for name in ("l0", "num_dead_features"):
            here = getattr(self.sae.cfg.metadata, name, None)
            if here is not None:
                setattr(self.sae.cfg.metadata, name, self._total(here))

    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """Write the state, under the name that `write_state` gives it; collective."""
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if base is None:
            return
        progress = {name: getattr(self, name) for name in _PROGRESS} | {
            "steps": steps_taken(self.optimizer),  # SAELens saves before it counts the step
            "lr": [group["lr"] for group in self.optimizer.param_groups],
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "batch_size": self.cfg.train_batch_size_samples,
            "history": self.history,
            "since_record": self.recorder.since.tolist(),
        }
        tokens = self.n_training_samples
        settings = self.settings()
        write_state(self.processes, Path(base), tokens, self._tensors(), settings, progress)

    def _resume(self, path: Path) -> None:
        progress = read_state(self.processes, path, self._tensors(), self.settings())
        for name in _PROGRESS:
            setattr(self, name, progress[name])
        self.n_training_steps = progress["steps"]
        for parameter in self.sae.parameters():
            moments(self.optimizer, parameter)[0].fill_(progress["steps"])
        for group, lr in zip(self.optimizer.param_groups, progress["lr"], strict=True):
            group["lr"] = lr
        follow_schedule(self, progress["lr_scheduler"], progress["batch_size"])
        self.recorder.points = progress["history"]
        self.recorder.since.copy_(torch.tensor(progress["since_record"], dtype=torch.float64))
        self.checkpoint_thresholds = [
            t for t in self.checkpoint_thresholds if t >= self.n_training_samples
        ]

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"d_sae": self.n_features}

    def _tensors(self) -> dict[str, Tensor]:
        """Views of all that a run changes: weights, their moments, counts of firing."""
        lay_out_by_feature(self.sae)  # its rows are contiguous then
        found: dict[str, Tensor] = {name: self._as_part(getattr(self, name)) for name in _COUNTS}
        for name, parameter in self.sae.named_parameters():
            axis = FEATURE_AXIS.get(name)
            for key, tensor in self._with_moments(name, parameter).items():
                found[key] = tensor if axis is None else self._as_part(tensor.movedim(axis, 0))
            if axis is not None and isinstance(self.optimizer, SparseAdam):
                found[f"{name}.moved"] = self._as_part(self.optimizer.moved(parameter, axis))
        return found

    def _with_moments(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        _, average, square = moments(self.optimizer, parameter)
        return {name: parameter.data, f"{name}.exp_avg": average, f"{name}.exp_avg_sq": square}

    def _require_tokens(self, n: int) -> None:
        if n == 0:
            raise SaesubError(
                f"No process has a token in step {self.n_training_steps}: give one to at least one "
                "of them."
            )


def check_suits(sae: Any) -> None:
    """Raises SaesubError for an SAE that several processes do not train."""
    if type(sae) not in (TopKTrainingSAE, SparseTopKTrainingSAE):
        raise SaesubError(
            f"Several processes train SAELens' TopKTrainingSAE alone, not {type(sae).__name__}: "
            "train it in one process."
        )
    if sae.cfg.normalize_activations != "none":
        raise SaesubError(
            "Several processes train an SAE with normalize_activations='none': scale the "
            "activations before you pass them."
        )


def _check_pass(sae: Any, cfg: SAETrainerConfig) -> None:
    reason = "cfg.autocast is on" if cfg.autocast else other_pass(sae) or why_dense(sae)
    if reason is not None:
        raise SaesubError(
            f"Several processes train by the sparse step alone, and it does not suit ({reason}): "
            "train it in one process."
        )


def _check_settings(sae: Any, cfg: SAETrainerConfig) -> None:
    _check_pass(sae, cfg)
    if not all(parameter.requires_grad for parameter in sae.parameters()):
        raise SaesubError("Several processes train all of an SAE's parameters: unfreeze them.")
    if cfg.logger.log_to_wandb:
        raise SaesubError(
            "Several processes do not log to Weights & Biases: switch logger.log_to_wandb off and "
            "log the trainer's history."
        )


def sae_with(sae: TopKTrainingSAE, weights: Mapping[str, Any]) -> TopKTrainingSAE:
    """A copy on the CPU with the settings and metadata of `sae`, and these weights."""
    cfg = replace(copy.deepcopy(sae.cfg), d_sae=len(weights["b_enc"]), device="cpu")
    made = TopKTrainingSAE(cfg)
    made.load_state_dict(weights)
    return made
