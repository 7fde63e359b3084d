"""Linear layers by the libraries with which torch multiplies on a CPU, the faster one first."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Of tokens (*n, d_in), a weight (d_out, d_in) and a bias (d_out,) or None: (*n, d_out)."""
_ORDINARY = (Tensor, nn.Parameter)  # other classes multiply in their own ways


def linear_layers(weight: Tensor) -> list[Linear]:
    """Those to try for weights such as this one, the fastest first.

    In float32 torch calls MKL, which was slower than oneDNN on the AMD processor that was tried (a
    Zen 4). oneDNN rounds more, and more so in rows of some thousands of numbers: 2 to 10 times
    MKL's error was seen.
    """
    helps = bool(torch.backends.mkldnn.enabled) and _has_both() and _is_amd()
    return [by_onednn, F.linear] if helps and _is_ordinary(weight) else [F.linear]


def by_onednn(
    x: Float[Tensor, "*n d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
) -> Float[Tensor, "*n d_out"]:
    """`F.linear`, by oneDNN where no gradients are kept and all numbers are float32."""
    given = [x, weight] if bias is None else [x, weight, bias]
    # oneDNN would read a bias as if it were contiguous.
    readable = bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())
    if readable and x.numel() and not torch.is_grad_enabled() and all(map(_is_ordinary, given)):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _is_ordinary(x: Tensor) -> bool:
    stored = (x.dtype, x.layout, x.device.type) == (torch.float32, torch.strided, "cpu")
    return stored and type(x) in _ORDINARY


@cache
def _has_both() -> bool:
    here = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return here and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (cpuinfo.read_text() if cpuinfo.is_file() else platform.processor())
