"""What a remedy against dead features can do to a training run.

`saesub.training.mitigations` has the known.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from saesub.errors import SaesubError


class Remedy:
    """Something done about dead features while an SAE trains, beside whatever else is done.

    Subclasses are frozen dataclasses of their settings. What they do follows from these and from
    what the trainer saves (`n_training_samples`, the optimizer, `remedy_state`), so that a resumed
    run goes on as an uninterrupted one would. `trainer` is a `saesub.SubspaceSAETrainer`.

    Attributes:
        loss_name: name of the loss that `extra_loss` returns, None if there is none. With a loss
            the step goes through autograd.
    """

    loss_name: ClassVar[str | None] = None

    def check(self, trainer: Any) -> None:
        """Raise SaesubError if the trainer's SAE or schedule cannot take this remedy."""

    def around_step(self, trainer: Any) -> AbstractContextManager[None]:
        """Entered before every step and left after it, also where the step fails."""
        return nullcontext()

    def extra_loss(self, trainer: Any, output: TrainStepOutput) -> Tensor:
        """Added to the loss of the pass that gave `output`, where there is a `loss_name`."""
        raise NotImplementedError

    def after_step(self, trainer: Any, output: TrainStepOutput) -> None:
        """Called when the weights and firing counts of a step are up to date."""


def one_of_each(remedies: Sequence[Remedy]) -> tuple[Remedy, ...]:
    """The remedies as a tuple. Raises SaesubError for anything else, and for two of one kind."""
    if isinstance(remedies, Remedy) or not all(isinstance(r, Remedy) for r in remedies):
        raise SaesubError(
            f"remedies={remedies!r} is not a sequence of remedies: pass a list of objects such as "
            "[KAnnealing(k_start=64, share=0.5)]."
        )
    kinds = [type(remedy).__name__ for remedy in remedies]
    if len(set(kinds)) < len(kinds):
        raise SaesubError(
            f"Two remedies of one kind contradict each other: give one of each, not {kinds}."
        )
    return tuple(remedies)


def need_parameters(remedy: Remedy, sae: Any, *names: str) -> None:
    """Raise SaesubError if the SAE lacks one of the parameters that a remedy works on."""
    missing = [name for name in names if name not in dict(sae.named_parameters())]
    if missing:
        raise SaesubError(
            f"{type(remedy).__name__} works on W_enc and b_enc, and an SAE of architecture "
            f"{sae.cfg.architecture()!r} has no {' and no '.join(missing)}: leave it out."
        )
