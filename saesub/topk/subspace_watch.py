"""When the active subspace of a run is measured, and whether what was found still holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
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
        moved: how many rows of the encoder have to be rotated for each search.
    """

    def __init__(self, prices: Prices, moved: int) -> None:
        self.found: ActiveSubspace | None = None
        self.prices, self.moved = prices, moved
        self._searches, self._due = 0, 0
        self._k: int | None = None
        self._moment: Tensor | None = None
        self._n_tokens = 0

    def before_search(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        k: int,
        feature_scale: Float[Tensor, " d_sae"] | None,
    ) -> ActiveSubspace | None:
        """The subspace to search these tokens in."""
        self._k = k if self._k is None else self._k
        if k != self._k:  # BatchTopK searches again for tokens with many active features
            return self.found
        self._searches += 1
        if self._searches < self._due:
            return self.found
        moment = second_moment(x)
        self._moment = moment if self._moment is None else self._moment + moment
        self._n_tokens += len(x)
        if self._n_tokens >= _TOKENS_PER_COORDINATE * len(moment):
            given = (x, W_enc, b_enc, k, feature_scale, self.prices, self.moved)
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

    def state(self) -> dict[str, Tensor]:
        """What a run that continues needs, so that it searches as the one before."""
        numbers = [self._searches, self._due, self._n_tokens, self.moved]
        kept = {"counts": torch.tensor(numbers, device="cpu")}
        kept["prices"] = torch.tensor(astuple(self.prices), dtype=torch.float64, device="cpu")
        if self._moment is not None:
            kept["moment"] = self._moment
        if self.found is not None:
            kept["basis"] = self.found.basis
            bounds = [self.found.cosine, self.found.candidates]
            kept["bounds"] = torch.tensor(bounds, dtype=torch.float64, device="cpu")
        return kept

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], device: torch.device) -> SubspaceWatch:
        """One that continues from a `state`, with weights on a device."""
        searches, due, n_tokens, moved = map(int, state["counts"])
        watch = cls(Prices(*state["prices"].tolist()), moved)
        watch._searches, watch._due, watch._n_tokens = searches, due, n_tokens
        watch._moment = state.get("moment")
        if "basis" in state:
            cosine, candidates = state["bounds"].tolist()
            watch.found = ActiveSubspace(state["basis"].to(device), cosine, int(candidates))
        return watch


_WATCHES: WeakKeyDictionary[Any, SubspaceWatch] = WeakKeyDictionary()


def watch_of(sae: Any, prices: Prices) -> SubspaceWatch:
    """The watch of an SAE's searches; a new one if the SAE or its device, or the prices, are."""
    watch = _WATCHES.get(sae)
    if watch is None or watch.prices != prices or not watch.is_on(sae.W_enc):
        watch = _WATCHES[sae] = SubspaceWatch(prices, sae.W_enc.shape[1])
    return watch


def state_of_search(sae: Any) -> dict[str, Tensor]:
    """The state of an SAE's watch, for a checkpoint; empty where there is none."""
    return _WATCHES[sae].state() if sae in _WATCHES else {}


def restore_search(sae: Any, state: Mapping[str, Tensor]) -> None:
    """Give an SAE the watch of a checkpoint, or none."""
    _WATCHES.pop(sae, None)
    if state:
        _WATCHES[sae] = SubspaceWatch.from_state(state, sae.W_enc.device)


def search_watched(
    watch: SubspaceWatch,
    search_in: Callable[[ActiveSubspace | None], Found],
    x: Float[Tensor, "n d_in"],
    *encoder_k_and_scale: Any,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Search in the subspace of the watch; again in one measured on these tokens if the bounds did
    not hold; and by all coordinates if they do not hold then either."""
    for _ in range(2):
        subspace = watch.before_search(x, *encoder_k_and_scale)
        found = search_in(subspace)
        if subspace is None or watch.after_search(found.exceeded):
            return found.features, found.pre
    found = search_in(None)
    return found.features, found.pre
