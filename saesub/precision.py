"""What devices have and do: float64, autocast, and work that goes on while the program does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

_WAITING = {"cuda"}  # types of devices that work on while the program goes on


def reading_waits(x: Tensor) -> bool:
    """Whether to read a number of `x` is to wait until its device has done all its work."""
    return x.device.type in _WAITING


def where_float64(x: Tensor) -> Tensor:
    """`x`, moved to the CPU if its device has no float64."""
    return x.cpu() if x.device.type == "mps" else x


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within it, also as a decorator, products are in the dtype of their tensors: an autocast
    around the caller would round statistics to bfloat16, and a kept result with them."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
