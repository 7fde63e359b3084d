"""Float64 on devices that have none: MPS."""

from __future__ import annotations

from torch import Tensor


def where_float64(x: Tensor) -> Tensor:
    """`x`, moved to the CPU if its device has no float64."""
    return x.cpu() if x.device.type == "mps" else x
