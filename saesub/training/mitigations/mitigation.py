"""What a mitigation against dead features can do to a training run.

`saesub.training.mitigations` has the known.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from saesub.errors import SaesubError


class Mitigation:
    """Something done about dead features while an SAE trains, beside whatever else is done.

    Subclasses are frozen dataclasses of their settings. What they do follows from these and from
    what the trainer saves (`n_training_samples`, the optimizer, `mitigation_state`), so that a resumed
    run goes on as an uninterrupted one would. `trainer` is a `saesub.SubspaceSAETrainer`.

    Attributes:
        loss_name: name of the loss that `extra_loss` returns, None if there is none. With a loss
            the step goes through autograd.
    """

    loss_name: ClassVar[str | None] = None

    def check(self, trainer: Any) -> None:
        """Raise SaesubError if the trainer's SAE or schedule cannot take this mitigation."""

    def around_step(self, trainer: Any) -> AbstractContextManager[None]:
        """Entered before every step and left after it, also where the step fails."""
        return nullcontext()

    def extra_loss(self, trainer: Any, output: TrainStepOutput) -> Tensor:
        """Added to the loss of the pass that gave `output`, where there is a `loss_name`."""
        raise NotImplementedError

    def after_step(self, trainer: Any, output: TrainStepOutput) -> None:
        """Called when the weights and firing counts of a step are up to date."""


def one_of_each(mitigations: Sequence[Mitigation]) -> tuple[Mitigation, ...]:
    """The mitigations as a tuple. Raises SaesubError for anything else, and for two of one kind."""
    if isinstance(mitigations, Mitigation) or not all(
        isinstance(r, Mitigation) for r in mitigations
    ):
        raise SaesubError(
            f"mitigations={mitigations!r} is not a sequence of mitigations: pass a list of objects such as "
            "[KAnnealing(k_start=64, share=0.5)]."
        )
    kinds = [type(mitigation).__name__ for mitigation in mitigations]
    if len(set(kinds)) < len(kinds):
        raise SaesubError(
            f"Two mitigations of one kind contradict each other: give one of each, not {kinds}."
        )
    return tuple(mitigations)


def need_parameters(mitigation: Mitigation, sae: Any, *names: str) -> None:
    """Raise SaesubError if the SAE lacks one of the parameters that a mitigation works on."""
    missing = [name for name in names if name not in dict(sae.named_parameters())]
    if missing:
        raise SaesubError(
            f"{type(mitigation).__name__} works on W_enc and b_enc, and an SAE of architecture "
            f"{sae.cfg.architecture()!r} has no {' and no '.join(missing)}: leave it out."
        )
