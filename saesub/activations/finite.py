"""Where activations hold a NaN or an infinity."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saesub.errors import SaesubError


def require_finite(x: Float[Tensor, "n d"]) -> None:
    """Raises SaesubError, with the first row and column, if `x` holds a NaN or an infinity."""
    if x.sum(dtype=torch.float32).isfinite():  # needs no copy of x
        return
    bad = x.isfinite().logical_not_()
    if bad.any():  # the sum alone may have overflowed
        row = int(bad.any(1).nonzero()[0])
        column = int(bad[row].nonzero()[0])
        raise SaesubError(
            f"activations hold NaN or infinite values, first {x[row, column].item()} in row {row}, "
            f"column {column}"
        )
