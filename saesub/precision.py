"""The precision of products: float64 where a device has it, and float32 whatever autocast says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


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
