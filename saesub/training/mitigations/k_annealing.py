"""k annealing: more features fire in the first steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from sae_lens import BatchTopKTrainingSAEConfig

from saesub.errors import SaesubError
from saesub.training.mitigations.mitigation import Mitigation

if TYPE_CHECKING:  # the trainer imports what a mitigation is
    from saesub.training.trainer import SubspaceSAETrainer


@dataclass(frozen=True)
class KAnnealing(Mitigation):
    """k falls linearly from `k_start` to the SAE's own k over the first `share` of the steps.

    More features fire while directions are still random. k is `k_start` at the first step and the
    SAE's own from step `share * n_steps` on, rounded to a whole number for TopK. Outside of steps
    (in checkpoints, evaluation and the finished SAE) it is always the SAE's own. A BatchTopK SAE's
    threshold follows its activations slowly: leave it some hundred steps at the final k.

    Args:
        k_start: from the SAE's k to d_sae; a whole number, for BatchTopK any.
        share: of the training steps, in (0, 1].

    Raises:
        SaesubError: `share` out of range; and, when a trainer is made, an SAE without a k, or
            `k_start` outside k..d_sae.
    """

    k_start: float
    share: float

    def __post_init__(self) -> None:
        if not (isinstance(self.share, Real) and 0 < self.share <= 1):
            raise SaesubError(f"share={self.share!r} of the training steps must lie in (0, 1].")
        if not isinstance(self.k_start, Real):
            raise SaesubError(f"k_start={self.k_start!r} must be a number.")

    def check(self, trainer: SubspaceSAETrainer) -> None:
        """Raise SaesubError if the SAE has no k, or `k_start` lies outside k..d_sae."""
        cfg = trainer.sae.cfg
        if not hasattr(cfg, "k") or not hasattr(trainer.sae.activation_fn, "k"):
            raise SaesubError(
                f"KAnnealing needs an SAE with a k, which {cfg.architecture()!r} has not: use a "
                "TopK or BatchTopK SAE, or leave it out."
            )
        if not cfg.k <= self.k_start <= cfg.d_sae:
            raise SaesubError(
                f"k_start={self.k_start} must lie in {cfg.k}..{cfg.d_sae}, from the SAE's k to its "
                "d_sae: k falls during annealing."
            )
        if _whole_k(cfg) and self.k_start != int(self.k_start):
            raise SaesubError(f"k_start={self.k_start} must be a whole number for a TopK SAE.")

    def k_at(self, step: int, n_steps: int, k: float) -> float:
        """k at a step, counted from 0, of `n_steps` that end at `k`; not yet rounded."""
        falling = max(1, round(self.share * n_steps))
        return self.k_start + (k - self.k_start) * min(1.0, step / falling)

    @contextmanager
    def around_step(self, trainer: SubspaceSAETrainer) -> Iterator[None]:
        """Let the SAE's config and activation function have this step's k until it is over."""
        sae, cfg = trainer.sae, trainer.cfg
        final, step = sae.cfg.k, trainer.n_training_samples // cfg.train_batch_size_samples
        k = self.k_at(step, cfg.total_training_steps, final)
        sae.cfg.k = sae.activation_fn.k = round(k) if _whole_k(sae.cfg) else k
        try:
            yield
        finally:
            sae.cfg.k = sae.activation_fn.k = final

    def may_change_weights(self, trainer: SubspaceSAETrainer) -> bool:
        """No: k alone is changed."""
        return False


def _whole_k(cfg: Any) -> bool:
    return not isinstance(cfg, BatchTopKTrainingSAEConfig)
