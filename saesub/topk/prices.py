"""What the parts of a search cost on this machine, beside a float32 product; for choosing a rank.

Only how large a subspace is chosen depends on them, not what is found. They are rounded from
profiles of the step at d_in 576 and 36,864 features (docs/speed.md).
"""

from __future__ import annotations

from saesub.topk.active_subspace import Prices
from saesub.topk.cpu_library import instructions

_EIGHT_BITS = {"avx512vnni": 0.18, "avxvnni": 0.25, "neon": 0.25, "avx2": 0.25}
_ROTATED = {"avx512vnni": 0.18, "avxvnni": 0.25, "neon": 0.25, "avx2": 0.33}
TORCH_PRICES = Prices(product=1.0, rotated=1.0, candidate=50.0, whole=2.0, equally=True)
"""Of the search by torch operators, in float32."""


def native_prices() -> Prices:
    """Of the compiled search; AVX-VNNI's and NEON's are taken to be AVX2's."""
    name = instructions()
    return Prices(_EIGHT_BITS[name], _ROTATED[name], candidate=16.0, whole=2.0)
