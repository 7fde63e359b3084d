"""The learning rate schedule of a run that continues from a checkpoint."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the trainer imports what imports this module
    from saesub.training.trainer import SubspaceSAETrainer

# The fields of torch's schedulers that say what a schedule is, beside those that say how far.
_SCHEDULE = {
    *("_milestones", "base_lrs", "start_factor", "end_factor", "total_iters"),
    *("T_max", "T_0", "T_mult", "eta_min"),
}


def follow_schedule(
    trainer: SubspaceSAETrainer, kept: dict[str, Any], kept_batch: int | None
) -> None:
    """Continue the schedule that a checkpoint kept, or the trainer's own where it is another.

    It continues from the same token: the checkpoint may be of batches of another size.

    Args:
        kept: the state of the schedule.
        kept_batch: the batch size of the checkpoint; None if it says nothing of its settings.
    """
    steps = trainer.n_training_samples // trainer.cfg.train_batch_size_samples
    same = _shape_of(kept) == _shape_of(trainer.lr_scheduler.state_dict())
    if same and kept["last_epoch"] == steps:
        trainer.lr_scheduler.load_state_dict(kept)
        return
    if kept_batch is None and not same:
        warnings.warn("The run continues with another learning rate schedule.", stacklevel=6)
    for scheduler in trainer.coefficient_schedulers.values():
        scheduler.load_state_dict({"current_step": steps})
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = trainer.cfg.lr
    trainer.lr_scheduler = trainer.new_schedule()
    with warnings.catch_warnings():  # torch would miss the optimizer's steps in between
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            trainer.lr_scheduler.step()


def _shape_of(schedule: dict[str, Any]) -> list[Any]:
    """What a schedule is, apart from how far it has come."""
    parts = [_shape_of(part) for part in schedule.get("_schedulers", [])]
    return [{name: schedule[name] for name in sorted(_SCHEDULE & schedule.keys())}, *parts]
