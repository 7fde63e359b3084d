"""Linear layers by the faster of the two libraries with which torch multiplies on a CPU."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def linear(
    x: Float[Tensor, "*n d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
) -> Float[Tensor, "*n d_out"]:
    """`F.linear` to float32's rounding, without gradients. For float32 numbers torch calls MKL,
    which takes about a fifth longer than oneDNN on an AMD processor: there oneDNN is called."""
    given = [x, weight] if bias is None else [x, weight, bias]
    fits = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given)
    if fits and type(x) is Tensor and x.numel() and prefers_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def prefers_onednn() -> bool:
    """Whether oneDNN is here, not switched off, and the faster one."""
    return bool(torch.backends.mkldnn.enabled) and _has_both() and _is_amd()


@cache
def _has_both() -> bool:
    here = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return here and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (cpuinfo.read_text() if cpuinfo.is_file() else platform.processor())
