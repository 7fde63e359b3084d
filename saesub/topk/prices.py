"""What the parts of a search cost on this machine, beside a float32 product; for choosing a rank.

Only how large a subspace is chosen depends on them, not what is found. They are rounded from
profiles of the step at d_in 576 and 36,864 features, on one processor (Zen 4) and held to AVX2.
"""

from __future__ import annotations

from saesub.topk.active_subspace import Prices
from saesub.topk.cpu_library import DEVIATIONS, instructions, n_steps

_EIGHT_BITS = {"avx512vnni": 0.11, "avxvnni": 0.28, "neon": 0.28, "avx2": 0.28}
_ROTATED = {"avx512vnni": 0.18, "avxvnni": 0.25, "neon": 0.25, "avx2": 0.33}
# A step is the largest of some hundred coordinates, about 3.2 standard deviations, through the
# number of steps. One error is the token's, two are the row's (it was rotated by rounded numbers);
# against an exact score the bound on their sum counts √2 times.
_ROUNDING = DEVIATIONS * (1 + 2**0.5) * 2**0.5 * 3.2 / 12**0.5
TORCH_PRICES = Prices(product=1.0, rotated=1.0, candidate=50.0, whole=2.0, equally=True)
"""Of the search by torch operators, in float32."""


def native_prices() -> Prices:
    """Of the compiled search; AVX-VNNI's and NEON's are taken to be AVX2's."""
    name = instructions()
    rounding = _ROUNDING / n_steps()
    return Prices(_EIGHT_BITS[name], _ROTATED[name], candidate=12.0, whole=2.0, rounding=rounding)
