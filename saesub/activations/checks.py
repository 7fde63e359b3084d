"""Checks that refuse activations or kept results that would give wrong numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesub.errors import SaesubError

_NONE = 2**62  # the number of the first tensor that is not finite, if there is none


def all_finite(x: Tensor) -> bool:
    """Whether `x` holds neither NaN nor infinity."""
    # The sum needs no copy of x, but may itself overflow.
    return bool(x.sum(dtype=torch.float32).isfinite()) or bool(x.isfinite().all())


def require_finite(
    x: Float[Tensor, "*n d"],
    what: str = "activations",
    advice: str = "leave them out, or load the model in another dtype",
) -> None:
    """Raise SaesubError, with the first bad row and column and the advice, if `x` holds a NaN or
    an infinity; `what` is a plural."""
    if all_finite(x):
        return
    rows = x.reshape(-1, x.shape[-1])
    first = int(rows.isfinite().logical_not_().view(torch.uint8).argmax())
    row, column = divmod(first, rows.shape[1])
    raise SaesubError(
        f"{what} hold NaN or infinite values, first {rows[row, column].item()} in row {row}, "
        f"column {column}: {advice}"
    )


class FiniteWatch:
    """Counts on their device the tensors that hold a NaN or an infinity, without waiting for it."""

    _seen: Int[Tensor, " 3"] | None = None  # how many, and the first and last of their numbers

    def note(self, x: Tensor, number: int) -> Bool[Tensor, ""]:
        """Whether `x` is finite; if it is not, it is counted under its number."""
        finite = x.isfinite().all()
        numbers = torch.where(finite, _NONE, number), torch.where(finite, -1, number)
        seen = torch.stack([(~finite).long(), *numbers])
        if self._seen is None:
            self._seen = seen
        else:
            how_many, first, last = self._seen.unbind()
            self._seen = torch.stack(
                [how_many + seen[0], first.minimum(seen[1]), last.maximum(seen[2])]
            )
        return finite

    def read(self) -> tuple[int, int, int] | None:
        """How many were not finite since the last reading, and the first and last of their numbers;
        None if all were finite. Waits for the device."""
        seen, self._seen = self._seen, None
        how_many, first, last = (0, 0, 0) if seen is None else seen.tolist()
        return (how_many, first, last) if how_many else None


SameText = Callable[[Mapping[str, str]], Mapping[str, str]]
"""From the settings of a kept result to what they must say of the text; see `ModelPass`."""


_NAMES = {"model", "corpus"}  # what they are called; hashes say what they are


def differing(kept: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """The names of the settings that are not the same in both, or ''."""
    deciding = {*kept, *wanted} - _NAMES
    return ", ".join(sorted(k for k in deciding if kept.get(k) != wanted.get(k)))
