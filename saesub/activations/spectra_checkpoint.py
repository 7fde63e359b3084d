"""The running totals of a pass over several hook points, kept in a file."""

from __future__ import annotations

import json
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from saesub.activations.spectrum import SpectrumAccumulator
from saesub.errors import SaesubError
from saesub.files import Form, damaged, read_checksummed, write_checksummed

_FORM = Form(
    format="saesub-spectra-state-1",
    key="progress",
    what="checkpoint of spectra",
    missing="none was kept",
    damaged="delete it and measure again",
)


class SpectraState:
    """An accumulator for each hook point, and how many batches they have had.

    Args:
        path: where the state is kept, or None for nowhere.
    """

    def __init__(self, path: Path | None) -> None:
        self.totals: dict[str, SpectrumAccumulator] = {}
        self.n_batches = 0
        self._path = path
        self._settings: dict[str, str] = {}

    def receive(self, name: str, x: Float[Tensor, "n d"]) -> None:
        """Add rows of one hook point; raises as `SpectrumAccumulator.update` does."""
        if name not in self.totals:
            self.totals[name] = SpectrumAccumulator(x.shape[1])
        self.totals[name].update(x)

    def save(self) -> None:
        """Keep the state, if it has a path. Raises SaesubError where it cannot be written."""
        if self._path is None:
            return
        tensors = {
            f"{name} {part}": tensor
            for name, total in self.totals.items()
            for part, tensor in total.state().items()
        }
        progress = json.dumps([self._settings, self.n_batches, list(self.totals)])
        write_checksummed(self._path, _FORM, tensors, progress)

    def load(self, settings: dict[str, str]) -> None:
        """Take up the kept state, if there is one, of a pass of these settings.

        Raises SaesubError for a damaged state, or one of other settings.
        """
        self._settings = settings
        if self._path is None or not self._path.exists():
            return
        tensors, progress = read_checksummed(self._path, _FORM)
        try:
            kept, self.n_batches, names = json.loads(progress)
            for name in names:
                parts = {part: tensors[f"{name} {part}"] for part in SpectrumAccumulator.PARTS}
                self.totals[name] = SpectrumAccumulator.from_state(parts)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(self._path, _FORM, error) from error
        differing = sorted(k for k in settings | kept if kept.get(k) != settings.get(k))
        if differing:
            raise SaesubError(
                f"{self._path} was kept by a pass with another {', '.join(differing)}: name "
                "another checkpoint, or delete that one"
            )
