"""A file with the running totals of a pass over several hook points."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from saesub.activations.checks import SameText, differing
from saesub.activations.spectrum import SpectrumAccumulator
from saesub.errors import SaesubError
from saesub.files import Form, damaged, read_checksummed, write_checksummed

_FORM = Form(
    format="saesub-spectra-state-3",
    key="progress",
    what="checkpoint of spectra",
    missing="none was kept",
    damaged="delete it and measure again",
)


def save_totals(
    path: Path,
    totals: Mapping[str, SpectrumAccumulator],
    n_contexts: int,
    settings: Mapping[str, str],
) -> None:
    """Write the totals of the first `n_contexts` contexts, by hook point.

    Raises SaesubError where the file cannot be written.
    """
    tensors = {
        f"{name} {part}": tensor
        for name, total in totals.items()
        for part, tensor in total.state().items()
    }
    write_checksummed(path, _FORM, tensors, json.dumps([dict(settings), n_contexts, list(totals)]))


def load_totals(
    path: Path, settings: Mapping[str, str], same_text: SameText
) -> tuple[dict[str, SpectrumAccumulator], int]:
    """What `save_totals` wrote: the totals and the number of contexts; ({}, 0) without a file.

    Raises SaesubError for a damaged file, or one of a pass with other settings or another text.
    """
    if not path.exists():
        return {}, 0
    tensors, progress = read_checksummed(path, _FORM)
    try:
        kept, n_contexts, names = json.loads(progress)
        states: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for key, tensor in tensors.items():
            name, part = key.rsplit(" ", 1)
            states[name][part] = tensor
        totals = {name: SpectrumAccumulator.from_state(state) for name, state in states.items()}
        other = differing(kept, {**settings, **same_text(kept)})
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, _FORM, error) from error
    if other:
        raise SaesubError(
            f"{path} was kept by a pass that differs in {other}: name another checkpoint, or "
            "delete that one"
        )
    return totals, n_contexts
