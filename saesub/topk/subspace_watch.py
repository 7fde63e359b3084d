"""When the active subspace of a run is measured, and whether what was found still holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from saesub.topk.active_subspace import ActiveSubspace, Prices, active_subspace, second_moment

_TOKENS_PER_COORDINATE = 4  # for the second moment
_LATER = 4  # how many times as many searches pass before the next measurement
_TOLERATED = 5e-4  # share of the best features that only luck has found


class Found(NamedTuple):
    """The k best features of each token, their pre-activations, and the share of them whose bound
    lies below the k-th best score: these were found by luck, and others may be lost."""

    features: Int[Tensor, "n k"]
    pre: Float[Tensor, "n k"]
    exceeded: float


class SubspaceWatch:
    """Measures the subspace on the first tokens of a run, and again after 4, 16, 64, … times as
    many searches, and wherever the bounds did not hold for too many of the best features.

    Attributes:
        found: the subspace, or None where all coordinates are searched.
        prices: by which it is chosen.
    """

    def __init__(self, prices: Prices) -> None:
        self.found: ActiveSubspace | None = None
        self.prices = prices
        self._searches, self._due = 0, 0
        self._moment: Tensor | None = None
        self._n_tokens = 0

    def before_search(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        k: int,
        feature_scale: Float[Tensor, " d_sae"] | None,
        moved: int,
    ) -> ActiveSubspace | None:
        """The subspace to search these tokens in; `moved`: rows to rotate for each search."""
        self._searches += 1
        if self._searches < self._due:
            return self.found
        moment = second_moment(x)
        self._moment = moment if self._moment is None else self._moment + moment
        self._n_tokens += len(x)
        if self._n_tokens >= _TOKENS_PER_COORDINATE * len(moment):
            given = (x, W_enc, b_enc, k, feature_scale, self.prices, moved)
            self.found = active_subspace(self._moment, *given)
            self._moment, self._n_tokens = None, 0
            self._due = _LATER * self._searches
        return self.found

    def is_on(self, W_enc: Float[Tensor, "d_in d_sae"]) -> bool:
        """Whether what was found is for weights of this width and device."""
        basis = None if self.found is None else self.found.basis
        return basis is None or (len(basis), basis.device) == (len(W_enc), W_enc.device)

    def after_search(self, exceeded: float) -> bool:
        """Whether the bounds held; if not, the next search measures again."""
        if exceeded <= _TOLERATED:
            return True
        self._due = self._searches
        return False


def search_watched(
    watch: SubspaceWatch,
    search_in: Callable[[ActiveSubspace | None], Found],
    x: Float[Tensor, "n d_in"],
    *encoder_k_and_scale: Any,
    moved: int,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Search in the subspace of the watch; again in one measured on these tokens if the bounds did
    not hold; and by all coordinates if they do not hold then either."""
    for _ in range(2):
        subspace = watch.before_search(x, *encoder_k_and_scale, moved)
        found = search_in(subspace)
        if subspace is None or watch.after_search(found.exceeded):
            return found.features, found.pre
    found = search_in(None)
    return found.features, found.pre
