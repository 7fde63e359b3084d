"""What trainers on several ranks share: equal settings everywhere, a state to resume from."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import TopKTrainingSAE
from sae_lens.config import SAETrainerConfig
from torch import Tensor, nn

from saesub.distributed import Ranks
from saesub.errors import SaesubError
from saesub.optim import FEATURE_AXIS, SparseAdam, moments
from saesub.shard_files import State, newest_state, write_state
from saesub.step_needs import takes_sparse_step
from saesub.training import Backend, OptimizerName, SubspaceSAETrainer

Batches = Callable[[int], Iterator[Tensor]]
_HISTORY = ("tokens", "mse", "dead_share")
_COUNTS = ("tokens_since_fired", "n_forward_passes_since_fired", "act_freq_scores")
_SAMPLES = ("n_training_samples", "n_frac_active_samples")


class RanksTrainer(SubspaceSAETrainer):
    """A `SubspaceSAETrainer` of a TopK SAE that is one of several, in step with the others.

    With `cfg.checkpoint_path` the state is written there `cfg.n_checkpoints` times, evenly, the
    newest replacing the one before, and once more at the end if `cfg.save_final_checkpoint`; a
    trainer made with a state there starts from it, on as many ranks as one likes.

    `fit` and all that follows it is collective: every rank calls it.
    """

    first_feature: int  # of those this rank holds
    n_features: int  # over all ranks

    def __init__(
        self,
        ranks: Ranks,
        cfg: SAETrainerConfig,
        sae: TopKTrainingSAE,
        batches: Batches,
        *,
        optimizer: OptimizerName,
        backend: Backend,
        dead_window_tokens: int | None,
    ) -> None:
        _check_suits(sae, cfg)
        super().__init__(
            cfg,
            sae,
            iter(()),
            optimizer=optimizer,
            backend=backend,
            dead_window_tokens=dead_window_tokens,
        )
        self.ranks = ranks
        ranks.check_same("set of settings", _settings(self))
        self._share_start()
        if cfg.checkpoint_path is not None:
            newest = newest_state(ranks, Path(cfg.checkpoint_path))
            if newest is not None:
                self._resume(State(newest))
        self.data_provider = batches(self.n_training_steps)

    @abstractmethod
    def _share_start(self) -> None:
        """Find `first_feature` and `n_features`, and take from rank 0 what must be equal."""

    @abstractmethod
    def _slice_to_save(self) -> slice:
        """Which of the features held here this rank writes down."""

    @abstractmethod
    def _total(self, here: float) -> float:
        """A sum over features, from that over the features held here."""

    @abstractmethod
    def gather(self) -> TopKTrainingSAE | None:
        """The whole SAE, on the CPU of rank 0, to be saved as any SAELens SAE; None elsewhere."""

    def dead_fraction(self) -> float:
        """Share of all ranks' features silent over the last `dead_window_tokens`; collective.

        Raises:
            SaesubError: less than one window has been trained on, so nothing can be said.
        """
        return self._total(super().dead_fraction() * len(self.tokens_since_fired)) / self.n_features

    def set_final_sae_metadata(self) -> None:
        """As `SubspaceSAETrainer`'s, over the features of all ranks; collective."""
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
        """Write the state, each rank its slice; collective. Its name is that of `shard_files`."""
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if base is None:
            return
        part = self._slice_to_save()
        rows = {name: t[part] for name, t in self._rows().items()}
        first = self.first_feature + part.start
        record = {
            "optimizer": self.optimizer_name,
            "steps": self.lr_scheduler.last_epoch,  # SAELens saves before it counts the step
            "lr": [group["lr"] for group in self.optimizer.param_groups],
            "lr_scheduler": self.lr_scheduler.state_dict(),
            **{name: getattr(self, name) for name in _SAMPLES},
        }
        tokens = self.n_training_samples
        write_state(self.ranks, Path(base), tokens, first, rows, self._whole(), record)

    def _resume(self, state: State) -> None:
        record = state.record
        if (state.n_features, record["optimizer"]) != (self.n_features, self.optimizer_name):
            raise SaesubError(
                f"{state.path} is of {state.n_features} features and {record['optimizer']}, this "
                f"run of {self.n_features} and {self.optimizer_name}: pass another checkpoint_path."
            )
        start, held = self.first_feature, len(self.tokens_since_fired)
        with torch.no_grad():
            for name, tensor in self._rows().items():
                tensor.copy_(state.rows(name, start, start + held))
            whole = state.whole()
            for name, tensor in self._whole().items():
                if not name.startswith("history."):
                    tensor.copy_(whole[name])
        steps = record["steps"]
        for parameter in self.sae.parameters():
            moments(self.optimizer, parameter)[0].fill_(steps)
        for group, lr in zip(self.optimizer.param_groups, record["lr"], strict=True):
            group["lr"] = lr
        self.lr_scheduler.load_state_dict(record["lr_scheduler"])
        for name in _SAMPLES:
            setattr(self, name, record[name])
        self.n_training_steps = steps
        self.checkpoint_thresholds = [
            t for t in self.checkpoint_thresholds if t >= self.n_training_samples
        ]
        kept = zip(*(whole[f"history.{name}"].tolist() for name in _HISTORY), strict=True)
        self.history = [dict(zip(_HISTORY, row, strict=True)) for row in kept]
        self._mse_since_record = list(whole["history.since"].to(self.cfg.device))

    def _rows(self) -> dict[str, Tensor]:
        """Views of all that has a row per feature, the weights' moments among it."""
        rows = {name: getattr(self, name) for name in _COUNTS}
        for name, parameter in self.sae.named_parameters():
            axis = FEATURE_AXIS.get(name)
            if axis is not None:
                for key, tensor in self._with_moments(name, parameter).items():
                    rows[key] = tensor.movedim(axis, 0)
                if isinstance(self.optimizer, SparseAdam):
                    rows[f"{name}.moved"] = self.optimizer.moved(parameter, axis)
        return rows

    def _whole(self) -> dict[str, Tensor]:
        """`b_dec` with its moments, and the history as tensors."""
        whole = self._with_moments("b_dec", self.sae.b_dec)
        for name in _HISTORY:
            column = [point[name] for point in self.history]
            whole[f"history.{name}"] = torch.tensor(column, dtype=torch.float64)
        whole["history.since"] = torch.tensor([float(m) for m in self._mse_since_record])
        return whole

    def _with_moments(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        _, average, square = moments(self.optimizer, parameter)
        data = parameter.data
        return {name: data, f"{name}.exp_avg": average, f"{name}.exp_avg_sq": square}


def _check_suits(sae: Any, cfg: SAETrainerConfig) -> None:
    if type(sae) is not TopKTrainingSAE:
        raise SaesubError(
            f"Only SAELens' TopKTrainingSAE trains on several ranks, not {type(sae).__name__}: "
            "train it in one process."
        )
    if sae.cfg.normalize_activations != "none" or not takes_sparse_step(sae, cfg):
        raise SaesubError(
            "Several ranks train an SAE in float32 or float64 with normalize_activations='none', "
            "autocast off and no hooks: scale the activations before they are handed over."
        )
    if not all(parameter.requires_grad for parameter in sae.parameters()):
        raise SaesubError("Several ranks train all of an SAE's parameters: unfreeze them.")


def _settings(trainer: SubspaceSAETrainer) -> dict[str, Any]:
    sae, cfg = trainer.sae.cfg, trainer.cfg
    of_sae = ("d_in", "k", "aux_loss_coefficient", "rescale_acts_by_decoder_norm", "dtype")
    of_run = ("total_training_samples", "lr", "lr_end", "lr_scheduler_name", "adam_beta1")
    of_run += ("adam_beta2", "lr_warm_up_steps", "lr_decay_steps", "n_checkpoints")
    return {
        **{name: getattr(sae, name) for name in of_sae},
        **{name: getattr(cfg, name) for name in of_run},
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "optimizer": trainer.optimizer_name,
        "dead_window_tokens": trainer.dead_window_tokens,
    }


def whole_sae(sae: TopKTrainingSAE, tensors: dict[str, Tensor]) -> TopKTrainingSAE:
    """An SAE on the CPU with the settings of `sae`, its metadata too, and these parameters."""
    cfg = replace(copy.deepcopy(sae.cfg), d_sae=len(tensors["b_enc"]), device="cpu")
    made = TopKTrainingSAE(cfg)
    made.load_state_dict(tensors)
    return made
