"""Operators that wait for a GPU, refused where none may be: a GPU is not needed to see them.

A step must not read what the device computes, because the program then stops until all the work
before is done. `no_waiting()` refuses, on any device, the calls and operators that read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# The size of what they return depends on numbers on the device, or they return a Python number.
_OPERATORS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy"),
    *("masked_select", "_unique", "_unique2", "unique_consecutive", "unique_dim", "bincount"),
    *("_coalesce", "_linalg_check_errors", "_to_sparse", "to_sparse", "argwhere"),
}
_BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_"}
_MASKS = (torch.bool, torch.uint8)
# They read memory without an operator, or move it to where Python can read it.
_METHODS = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"),
    *("__array__", "is_nonzero"),
}
# With a device they copy numbers of Python's there, which waits as well.
_FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.asarray)


class WaitingError(AssertionError):
    """Something was called that waits for the device."""


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _OPERATORS:
            raise WaitingError(f"{func} waits for the device")
        if name in _BY_MASK and any(i is not None and i.dtype in _MASKS for i in args[1]):
            raise WaitingError(f"{func} by a mask waits for the device")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise WaitingError(f"{func} without an output_size waits for the device")
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _METHODS and args and isinstance(args[0], Tensor):
            raise WaitingError(f"Tensor.{name} waits for the device")
        if name == "to" and _to_cpu(*args[1:], **kwargs):
            raise WaitingError("Tensor.to the CPU waits for the device")
        if func in _FROM_PYTHON and kwargs.get("device") is not None:
            raise WaitingError(f"torch.{name} onto a device waits for it")
        return func(*args, **kwargs)


def _to_cpu(*given: Any, device: Any = None, non_blocking: bool = False, **_: Any) -> bool:
    """Whether `Tensor.to` is given the CPU by name; a device may be that of another tensor."""
    return not non_blocking and "cpu" in [given for given in (*given, device) if type(given) is str]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it, whatever waits for a GPU raises `WaitingError`, also on a CPU.

    Two things are not seen: a tensor that is moved to the device of another by `x.to(y)` or
    `copy_`, and a kernel's own wait.
    """
    with _Methods(), _Operators():
        yield
