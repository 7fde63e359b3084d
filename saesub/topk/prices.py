"""What the parts of a search cost on this machine, beside a float32 product; for choosing a rank.

Only how large a subspace is chosen depends on them, not what is found. They are rounded from
profiles of the step at d_in 576 and 36,864 features (docs/speed.md).
"""

from __future__ import annotations

from saesub.topk.active_subspace import Prices
from saesub.topk.cpu_library import instructions

_EIGHT_BITS = {"avx512vnni": 0.3, "avxvnni": 0.3, "neon": 0.3, "avx2": 0.4}
_ROTATED, _CANDIDATE = 0.6, 50.0
_TORCH_IN_8_BITS = 0.3  # of the product alone; what comes after it does not shrink with the rank


def native_prices() -> Prices:
    """Of the compiled search."""
    eight_bits = _EIGHT_BITS[instructions()]
    return Prices(eight_bits, eight_bits, _ROTATED, _CANDIDATE)


def torch_prices(eight_bits: bool) -> Prices:
    """Of the search by torch operators, in float32 or in 8 bits."""
    product = _TORCH_IN_8_BITS if eight_bits else 1.0
    return Prices(product, product, 1.0, _CANDIDATE)
