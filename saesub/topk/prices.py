"""What the parts of a search cost on this machine, beside a float32 product; for choosing a rank.

Only how large a subspace is chosen depends on them, not what is found. They are rounded from
profiles of the step at d_in 576 and 36,864 features (docs/speed.md).
"""

from __future__ import annotations

from saesub.topk.active_subspace import Prices
from saesub.topk.cpu_library import instructions

_EIGHT_BITS = {"avx512vnni": 0.3, "avxvnni": 0.3, "neon": 0.3, "avx2": 0.4}
_ROTATED, _CANDIDATE = 0.6, 50.0
TORCH_PRICES = Prices(1.0, 1.0, _CANDIDATE)
"""Of the search by torch operators, in float32."""


def native_prices() -> Prices:
    """Of the compiled search."""
    return Prices(_EIGHT_BITS[instructions()], _ROTATED, _CANDIDATE)
