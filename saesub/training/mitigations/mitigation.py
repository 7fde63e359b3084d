"""What a mitigation against dead features can do to a training run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from saesub.errors import SaesubError


class Mitigation:
    """Something done about dead features while an SAE trains; any number of them combine.

    Subclasses are frozen dataclasses of their settings. What they do must depend on these and on
    what the trainer saves (`n_training_samples`, the optimizer, `mitigation_state`) alone: then a
    resumed run equals an uninterrupted one. `trainer` is a `saesub.SubspaceSAETrainer`.

    Attributes:
        loss_name: name of the loss that `extra_loss` returns, or None. With a loss, autograd
            makes the step.
    """

    loss_name: ClassVar[str | None] = None

    def check(self, trainer: Any) -> None:
        """Raise SaesubError if the trainer's SAE or schedule cannot take this mitigation."""

    def around_step(self, trainer: Any) -> AbstractContextManager[None]:
        """A context around every step; it is left also if the step fails."""
        return nullcontext()

    def extra_loss(self, trainer: Any, output: TrainStepOutput) -> Tensor:
        """What is added to the loss of the pass that gave `output`, if there is a `loss_name`."""
        raise NotImplementedError

    def after_step(self, trainer: Any, output: TrainStepOutput) -> None:
        """Called when the weights and firing counts of a step are up to date."""

    def may_change_weights(self, trainer: Any) -> bool:
        """Whether `around_step` or `after_step` may have written to the weights in the last step.

        A backend that keeps a copy of weights then makes it anew. One that overrides neither
        cannot; of any other it is taken for granted unless it says otherwise.
        """
        own = type(self)
        return (own.around_step, own.after_step) != (Mitigation.around_step, Mitigation.after_step)


def one_of_each(mitigations: Sequence[Mitigation]) -> tuple[Mitigation, ...]:
    """The mitigations as a tuple. Raises SaesubError for anything else, and for two of one kind."""
    several = isinstance(mitigations, Iterable)
    given = tuple(mitigations) if several else ()
    if not (several and all(isinstance(mitigation, Mitigation) for mitigation in given)):
        raise SaesubError(
            f"mitigations={mitigations!r} is not a sequence of mitigations: pass a list of objects "
            "such as [KAnnealing(k_start=64, share=0.5)]."
        )
    kinds = [type(mitigation).__name__ for mitigation in given]
    if len(set(kinds)) < len(kinds):
        raise SaesubError(
            f"Two mitigations of one kind contradict each other: give one of each, not {kinds}."
        )
    return given


def need_parameters(mitigation: Mitigation, sae: Any, *names: str) -> None:
    """Raise SaesubError for a transcoder, or if the SAE lacks a parameter that is worked on."""
    if hasattr(sae.cfg, "d_out"):
        raise SaesubError(
            f"{type(mitigation).__name__} reads a batch as what is reconstructed, and a "
            "transcoder's batch holds x and y: leave it out."
        )
    missing = [name for name in names if name not in dict(sae.named_parameters())]
    if missing:
        raise SaesubError(
            f"{type(mitigation).__name__} works on W_enc and b_enc, and an SAE of architecture "
            f"{sae.cfg.architecture()!r} has no {' and no '.join(missing)}: leave it out."
        )
