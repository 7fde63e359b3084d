"""Checks of what users pass to public functions: counts, and batches of activations."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from saesub.errors import SaesubError

if TYPE_CHECKING:
    from torch import Tensor


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """`value` as an int: Python's and NumPy's integers, and floats that are whole, such as 2e5.

    Raises SaesubError for anything else, and below `least`.

    >>> whole_number(2e5, "n_tokens")
    200000
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or value != value // 1 or value < least:
        raise SaesubError(f"{name} must be a whole number of at least {least}, not {value!r}.")
    return int(value) if isinstance(value, Integral) else int(float(value))


def require_sae(given: Any) -> None:
    """Raise SaesubError for what is none of SAELens' SAEs."""
    from sae_lens import SAE

    if not isinstance(given, SAE):
        raise SaesubError(
            f"An SAE must be one of SAELens' classes, not {type(given).__name__}: load a saved one "
            "with sae_lens.SAE.load_from_disk(path)."
        )


def matrix_of(given: Any, what: str) -> Tensor:
    """`batch_of` where one tensor is all there is, and blocks of it would be too few."""
    return batch_of(given, what, "give one tensor; torch.cat(list(blocks)) joins several")


def batch_of(
    given: Any,
    what: str = "a batch of activations",
    advice: str = "give one tensor for each batch, such as (x for x, _ in loader)",
) -> Tensor:
    """The tensor of a batch: itself, a NumPy array's, or the only one of a list or tuple.

    A `DataLoader` over a `TensorDataset` gives lists of one tensor. Raises SaesubError for anything
    else, for numbers that are not floating point, and on the meta device, where there are none.
    """
    import numpy as np
    import torch

    if isinstance(given, (list, tuple)) and len(given) == 1:
        given = given[0]
    if isinstance(given, np.ndarray) and given.dtype.kind in "biu":
        raise SaesubError(
            f"{what} must hold floating-point numbers, not {given.dtype}: give x.astype('float32')."
        )
    if isinstance(given, np.ndarray) and given.dtype.kind == "f":
        native = given.dtype.newbyteorder("=")
        given = torch.from_numpy(np.ascontiguousarray(given, dtype=native))
    if not isinstance(given, torch.Tensor):
        length = f" of {len(given)}" if isinstance(given, (list, tuple)) else ""
        raise SaesubError(
            f"{what} must be a tensor of floating-point numbers, not a {type(given).__name__}"
            f"{length}: {advice}."
        )
    if not given.is_floating_point():
        raise SaesubError(
            f"{what} must hold floating-point numbers, not {given.dtype}: give x.float()."
        )
    if given.layout is not torch.strided:
        raise SaesubError(f"{what} must be a dense tensor, not {given.layout}: give x.to_dense().")
    if given.is_meta:
        raise SaesubError(f"{what} on the meta device hold no values: load the weights.")
    return given
