"""How many features a training run revives: whether a mitigation against dead features acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput

from saesub.errors import SaesubError
from saesub.training.mitigations.mitigation import Mitigation

_ONCE, _SILENT, _REVIVED = "revival.once", "revival.silent", "revival.revived"


@dataclass(frozen=True)
class RevivalCount(Mitigation):
    """Counts features that were silent for a whole dead window and fire again; changes nothing.

    A feature that a mitigation has changed counts once it fires by itself, on a training token.
    Features revive in plain training as well, since some are merely rare: compare with that.

    Raises SaesubError, when a trainer is made, if it is not the first of its mitigations: those
    before it would have changed the count of silent tokens.
    """

    def check(self, trainer: Any) -> None:
        """Raise SaesubError if another mitigation acts before."""
        if trainer.mitigations[0] is not self:
            raise SaesubError("RevivalCount sees what others leave: make it the first mitigation.")

    @torch.no_grad()
    def after_step(self, trainer: Any, output: TrainStepOutput) -> None:
        """Note who is silent, and who of the silent has fired in this step."""
        kept, dead, fired = (
            trainer.mitigation_state,
            trainer.dead_neurons,
            trainer.tokens_since_fired == 0,
        )
        if _ONCE not in kept:
            kept |= {name: torch.zeros_like(dead) for name in (_ONCE, _SILENT, _REVIVED)}
        kept[_REVIVED] |= kept[_SILENT] & fired
        kept[_SILENT] = (kept[_SILENT] & ~fired) | dead
        kept[_ONCE] |= dead

    def may_change_weights(self, trainer: Any) -> bool:
        """No: it only looks."""
        return False

    def found(self, trainer: Any) -> dict[str, int]:
        """Numbers of features that were silent for a window (`silent_once`), of those that fired
        later (`revived`), and of these that have fired in the last window too (`stayed`)."""
        kept = trainer.mitigation_state
        if _ONCE not in kept:
            return {"silent_once": 0, "revived": 0, "stayed": 0}
        return {
            "silent_once": int(kept[_ONCE].sum()),
            "revived": int(kept[_REVIVED].sum()),
            "stayed": int((kept[_REVIVED] & ~trainer.dead_neurons).sum()),
        }
