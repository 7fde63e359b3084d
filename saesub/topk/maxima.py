"""The product of tokens and encoder rows in few bits, of which only groups' maxima are kept.

So the (n_tokens, d_sae) scores are never written. The kernel is `group_maxima` of
triton_search_kernels.py; its tiles are chosen for the card, and the groups do not depend on them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from saesub.errors import SaesubError
from saesub.topk.triton_launch import kernels

MEMBERS, STRIDE = 8, 256  # features of a group, and how far they lie apart
KERNELS = "triton_search_kernels"
_TIMED_TOKENS, _TIMED_ROWS = 2048, 65_536


@dataclass(frozen=True)
class Tiles:
    """How the product is cut: tokens, features and numbers of a tile, and Triton's settings."""

    tokens: int
    features: int
    numbers: int
    warps: int
    stages: int
    flatten: bool


_HOPPER = [
    Tiles(128, 256, 64, 8, 4, True),
    Tiles(128, 256, 64, 8, 4, False),
    Tiles(128, 128, 64, 4, 3, True),
    Tiles(128, 128, 64, 8, 4, True),
]
_OTHERS = [
    Tiles(128, 128, 32, 8, 2, False),
    Tiles(128, 64, 64, 8, 2, False),
    Tiles(64, 128, 64, 8, 2, False),
]
_INTERPRETED = Tiles(16, 16, 16, 4, 1, False)


def group_maxima(
    tokens: Tensor, rows: Tensor, bias: Tensor, scale: Tensor, tiles: Tiles
) -> Float[Tensor, "n groups"]:
    """The largest score of every group of features, bfloat16, by the kernel of that name."""
    descriptor = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
    n, d_sae = len(tokens), len(rows)
    maxima = torch.empty(n, n_groups(d_sae), dtype=torch.bfloat16, device=rows.device)
    described = [
        descriptor.from_tensor(tokens, [tiles.tokens, tiles.numbers]),
        descriptor.from_tensor(rows, [tiles.features, tiles.numbers]),
    ]
    constants = {
        "WIDTH": rows.shape[1],
        "BM": tiles.tokens,
        "BN": tiles.features,
        "BK": tiles.numbers,
        "STRIDE": STRIDE,
        "MEMBERS": MEMBERS,
        "FLATTEN": tiles.flatten,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    programs = -(-n // tiles.tokens) * (maxima.shape[1] // tiles.features)
    with torch.cuda.device_of(rows):
        kernel = kernels(KERNELS).group_maxima[(programs,)]
        kernel(*described, bias, scale, maxima, n, d_sae, **constants)
    return maxima


def tiles_for(capability: tuple[int, int]) -> list[Tiles]:
    """Tiles that fit a card of this compute capability."""
    return _HOPPER if capability == (9, 0) else _OTHERS


@cache
def tiles_of(device: torch.device, width: int, dtype: torch.dtype) -> Tiles:
    """The fastest tiles for rows of this width on this card, timed once on random numbers.

    Raises SaesubError if none run there, or none give the maxima of torch's operators.
    """
    if device.type != "cuda":
        return _INTERPRETED
    rows = torch.randn(_TIMED_ROWS, width, dtype=torch.float32, device=device).to(dtype)
    tokens = rows[:_TIMED_TOKENS].contiguous()
    bias = torch.randn(len(rows), dtype=torch.float32, device=device)
    scale = torch.ones(len(tokens), dtype=torch.float32, device=device)
    given = (tokens, rows, bias, scale)
    choices = tiles_for(torch.cuda.get_device_capability(device))
    seconds = {tiles: _seconds(*given, tiles) for tiles in choices}
    fastest = min(choices, key=lambda tiles: seconds[tiles])
    if seconds[fastest] == float("inf"):
        raise SaesubError(
            f"The search's kernel does not run on {torch.cuda.get_device_name(device)} in {dtype}: "
            "pass backend='torch', and report what saesub check-gpu prints."
        )
    return fastest


def _seconds(tokens: Tensor, rows: Tensor, bias: Tensor, scale: Tensor, tiles: Tiles) -> float:
    """How long a product takes, the least of five; infinite where the card refuses the tiles, or
    gives other numbers by them than torch."""
    times, few = [], slice(0, 64)
    try:
        with torch.cuda.device_of(rows):
            for _ in range(5):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                maxima = group_maxima(tokens, rows, bias, scale, tiles)
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
        expected = maxima_by_torch(tokens[few], rows, bias, scale[few])
        right = torch.allclose(maxima[few].float(), expected, rtol=2**-6, atol=0.1)
        return min(times) if right else float("inf")
    except Exception:  # Triton's own kinds: too little shared memory, an operator it lacks
        return float("inf")


def maxima_by_torch(
    tokens: Tensor, rows: Tensor, bias: Tensor, scale: Tensor
) -> Float[Tensor, "n groups"]:
    """What `group_maxima` gives, by torch operators and in float32."""
    scores = tokens.float() @ rows.float().T + bias * scale[:, None]
    missing = n_groups(len(rows)) * MEMBERS - len(rows)
    padded = F.pad(scores, (0, missing), value=-torch.inf)
    return padded.view(len(tokens), -1, MEMBERS, STRIDE).amax(2).flatten(1)


def n_groups(d_sae: int) -> int:
    """How many groups there are; the last may have fewer members, or none."""
    return -(-d_sae // (STRIDE * MEMBERS)) * STRIDE
