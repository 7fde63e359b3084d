"""The plan of a run: settings that can be kept, and words where batches do not keep to them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from saesub.arguments import whole_number
from saesub.errors import SaesubError, near_names

if TYPE_CHECKING:  # the trainer imports this module
    from saesub.training.trainer import SubspaceSAETrainer

_FROM_1 = (
    *("total_training_samples", "train_batch_size_samples", "n_restart_cycles"),
    *("feature_sampling_window", "n_batches_for_norm_estimate"),
)
_FROM_0 = ("lr_warm_up_steps", "lr_decay_steps", "dead_feature_window", "n_checkpoints")
_LEAST = dict.fromkeys(_FROM_1, 1) | dict.fromkeys(_FROM_0, 0)
# What SAELens' estimates raise where there is no token, or no norm to divide by.
NO_SCALE = (ZeroDivisionError, torch.linalg.LinAlgError)  # pyright: ignore
_ABOUT = 0.1  # by how much a batch may differ in size without a word
_SCHEDULES = ("constant", "cosineannealing", "cosineannealingwarmrestarts")


def completed(cfg: SAETrainerConfig) -> SAETrainerConfig:
    """With a final learning rate, counts as ints, and Python's numbers in place of NumPy's.

    Settings out of a table are NumPy's, which no weights-only reading of a checkpoint takes.

    Raises SaesubError for counts that are not whole or too small, rates that are not above 0 and
    finite, and a schedule that SAELens cannot make.
    """
    if not isinstance(cfg, SAETrainerConfig):
        raise SaesubError(
            f"cfg must be a SAETrainerConfig, not a {type(cfg).__name__}: of SAELens' runner "
            "config take cfg.to_sae_trainer_config()."
        )
    plain = {k: v.item() for k, v in vars(cfg).items() if isinstance(v, np.generic)}
    plain |= {name: whole_number(getattr(cfg, name), name, least) for name, least in _LEAST.items()}
    cfg = replace(cfg, **plain)
    _require(cfg.lr, "lr", "above 0 and finite", lambda rate: rate > 0)
    if cfg.lr_end is None:
        cfg = replace(cfg, lr_end=cfg.lr / 10)  # as SAELens' runner
    _require(cfg.lr_end, "lr_end", "at least 0 and finite", lambda rate: rate >= 0)
    for name in ("adam_beta1", "adam_beta2"):
        _require(getattr(cfg, name), name, "at least 0 and below 1", lambda beta: 0 <= beta < 1)
    _check_schedule(cfg)
    try:
        torch.empty(0, device=cfg.device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SaesubError(
            f"cfg.device={cfg.device!r} is not here: give 'cpu' or a device you have."
        ) from error
    return cfg


def _require(value: Any, name: str, what: str, fits: Callable[[Any], bool]) -> None:
    if not (isinstance(value, Real) and isfinite(value) and fits(value)):
        raise SaesubError(f"{name} must be a number {what}, not {value!r}.")


def _check_schedule(cfg: SAETrainerConfig) -> None:
    """Refuse what SAELens makes no schedule of, and warn where phases do not fit into the run."""
    name, lr_end = str(cfg.lr_scheduler_name).lower(), cfg.lr_end
    if name not in _SCHEDULES:
        known = near_names(name, _SCHEDULES)
        raise SaesubError(f"Unknown lr_scheduler_name {cfg.lr_scheduler_name!r}: {known}")
    steps, warm_up, decay = cfg.total_training_steps, cfg.lr_warm_up_steps, cfg.lr_decay_steps
    between = steps - warm_up - decay
    if name != "constant" and between < cfg.n_restart_cycles:
        raise SaesubError(
            f"{between} of the run's {steps} steps lie between warm-up and decay, too few for a "
            f"schedule {name!r} of {cfg.n_restart_cycles} cycles: shorten them, or train longer."
        )
    if name != "constant" and decay and not 0 < lr_end <= cfg.lr:  # pyright: ignore
        raise SaesubError(
            f"lr_end={lr_end} must lie above 0 and not above lr={cfg.lr}: the decay starts there."
        )
    if between < 0:
        warnings.warn(
            f"lr_warm_up_steps={warm_up} and lr_decay_steps={decay} are more than the {steps} "
            "steps of the run: one cuts the other short, and the learning rate jumps or "
            f"never comes to lr={cfg.lr}; shorten them, or train longer.",
            stacklevel=4,
        )


def lacks_scale(trainer: SubspaceSAETrainer) -> bool:
    """Whether the trainer is to scale or whiten activations and does not know how yet."""
    scaler = trainer.activation_scaler
    scaling = getattr(trainer.sae.cfg, "normalize_activations", "none")  # a Lorsa has none
    by_norm = scaling == "expected_average_only_in" and scaler.scaling_factor is None
    return by_norm or (scaling == "covariance_whitening" and scaler.whitening is None)


def for_scale(trainer: SubspaceSAETrainer, batch: Tensor) -> Tensor:
    """A batch that SAELens reads for the scale: checked, and at least float32, since norms in
    float16 overflow. Raises SaesubError as `check_batch`."""
    trainer.check_batch(batch)
    return batch.to(torch.promote_types(batch.dtype, torch.float32))


class PlanWatch:
    """Says, each once, where a trainer's batches or rate are not those of its plan."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._was_small = False  # whether the batch before was smaller than configured

    def before_step(self, trainer: SubspaceSAETrainer) -> None:
        """Warn of a step past the end of the plan, one at rate 0, or one without the scale that
        `fit` estimates."""
        cfg, seen = trainer.cfg, trainer.n_training_samples
        if lacks_scale(trainer):
            self._say(
                "unscaled",
                "Activations are not scaled as the SAE's normalize_activations says, since fit "
                "estimates the scale: call fit, or trainer.activation_scaler.estimate_… before.",
            )
        if seen >= cfg.total_training_samples:
            self._say(
                "past",
                f"The run is past its {cfg.total_training_samples:,} tokens, and its learning rate "
                "schedule is over: set total_training_samples to what you train on.",
            )
        elif all(float(group["lr"]) == 0 for group in trainer.optimizer.param_groups):
            self._say(
                "at rate 0",
                f"The learning rate is 0 after {seen:,} of {cfg.total_training_samples:,} tokens, "
                f"and nothing is learnt: the schedule has {cfg.total_training_steps} whole steps "
                f"of {cfg.train_batch_size_samples:,}, so make total_training_samples a multiple "
                "of that.",
            )

    def after_step(self, trainer: SubspaceSAETrainer) -> None:
        """Warn of batches of another size; one smaller batch is the last of a loader's epoch.

        A stream without its special tokens gives some per cent less: a tenth is not spoken of.
        """
        size = trainer.cfg.train_batch_size_samples
        came = trainer.n_training_samples - trainer.tokens_before
        small, large = came < (1 - _ABOUT) * size, came > (1 + _ABOUT) * size
        if large or (small and self._was_small):
            self._say(
                "another size",
                f"A batch of {came:,} tokens came, and train_batch_size_samples is {size:,}: steps "
                "of schedules and windows are counted as so many tokens, and Adam moves the "
                "weights once for each batch; set it to the size of your batches.",
            )
        self._was_small = small

    def _say(self, kind: str, what: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(what, stacklevel=4)


def require_iterator(data_provider: Any) -> None:
    """Raises SaesubError for what `next` cannot be called on."""
    if not isinstance(data_provider, Iterator):
        raise SaesubError(
            f"data_provider must be an iterator of batches, not {type(data_provider).__name__}:"
            " of a store pass store.batches(batch_size, seed=0), of a list iter(...)."
        )


def ended(trainer: Any, came: int) -> SaesubError:
    """The error for a data provider that gave `came` batches and no more."""
    cfg = trainer.cfg
    return SaesubError(
        f"data_provider ended after {came:,} batches, when {trainer.n_training_samples:,} of "
        f"{cfg.total_training_samples:,} tokens were trained on (an SAE that scales or whitens "
        f"its input reads n_batches_for_norm_estimate={cfg.n_batches_for_norm_estimate:,} before): "
        "give one that goes on, such as store.batches(batch_size, seed=0) or "
        "itertools.cycle(batches)."
    )


def zero_scale(cfg: SAETrainerConfig) -> str:
    """The message for activations by which no input can be scaled or whitened."""
    return (
        f"The first {cfg.n_batches_for_norm_estimate:,} batches are empty or all zero, and the SAE "
        "scales or whitens its input by them: leave them out."
    )
