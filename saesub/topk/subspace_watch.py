"""When the active subspace of a run is measured: early, ever more rarely, and when it has become
too small for the run's tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesub.topk.active_subspace import ActiveSubspace, Prices, active_subspace, second_moment

_TOKENS_PER_COORDINATE = 16  # for the second moment; of four, its directions fit these alone
_LATER = 4  # how many times as many searches pass before the next measurement
_TOO_DEAR = 2  # times what was expected of it ranking costs
_FIRST_GUESS = 1.5  # candidates for each of the k best, in all coordinates
_PAUSE = 64  # searches at least between a measurement and one that is made for that


class Found(NamedTuple):
    """What a search found.

    Attributes:
        features, pre: the k best features of each token, and their pre-activations.
        ranked: how many candidates of a token were ranked one by one, on average.
        by_the_whole: the share of tokens that were ranked by the product in all coordinates.
    """

    features: Int[Tensor, "n k"]
    pre: Float[Tensor, "n k"]
    ranked: float
    by_the_whole: float


class SubspaceWatch:
    """Measures the subspace on the first tokens of a run, again after 4, 16, 64, … times as many
    searches, and where ranking the candidates costs much more than was expected.

    A search finds the same in any subspace; only its time depends on it.

    Attributes:
        found: the subspace, or None where all coordinates are searched.
        prices: by which it is chosen.
        moved: how many rows of the encoder have to be rotated for each search.
    """

    def __init__(self, prices: Prices, moved: int) -> None:
        self.found: ActiveSubspace | None = None
        self.prices, self.moved = prices, moved
        self._searches, self._measured, self._due = 0, 0, 0
        self._k, self._n = 0, 0
        self._ranking: float | None = None  # of a token, in the last search by all coordinates
        self._moment: Tensor | None = None
        self._n_tokens = 0

    def is_repeated(self, n: int, k: int) -> bool:
        """Whether a search of n tokens for k features is one more of a batch: BatchTopK's, for its
        tokens with many active features. It is no occasion to measure."""
        if self._n > n and 0 < self._k < k:
            return True
        self._n, self._k = n, k
        return False

    def before_search(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        k: int,
        feature_scale: Float[Tensor, " d_sae"] | None,
    ) -> ActiveSubspace | None:
        """The subspace to search these tokens in."""
        self._searches += 1
        if self._searches < self._due:
            return self.found
        if self._moment is None or self._n_tokens < _TOKENS_PER_COORDINATE * x.shape[1]:
            moment = second_moment(x)
            self._moment = moment if self._moment is None else self._moment + moment
            self._n_tokens += len(x)
            return self.found
        # What is expected of the directions is counted on tokens that did not choose them.
        guess = _FIRST_GUESS * k * self.prices.candidate
        by_all = guess if self._ranking is None else self._ranking
        given = (x, W_enc, b_enc, k, feature_scale, self.prices, self.moved, by_all)
        self.found = active_subspace(self._moment, *given)
        self._moment, self._n_tokens = None, 0
        self._measured, self._due = self._searches, _LATER * self._searches
        return self.found

    def after_search(self, found: Found, d_sae: int) -> None:
        """Note what ranking the candidates cost."""
        ranking = found.ranked * self.prices.candidate
        ranking += found.by_the_whole * d_sae * self.prices.whole
        if self.found is None:
            self._ranking = ranking
        elif ranking > _TOO_DEAR * self.found.ranking:
            self._due = min(self._due, self._measured + _PAUSE)

    def is_on(self, W_enc: Float[Tensor, "d_in d_sae"]) -> bool:
        """Whether what was found is for weights of this width and device."""
        basis = None if self.found is None else self.found.basis
        return basis is None or (len(basis), basis.device) == (len(W_enc), W_enc.device)

    def state(self) -> dict[str, Tensor]:
        """What a run that continues needs, so that it searches as the one before."""
        numbers = [self._searches, self._measured, self._due, self._n_tokens, self.moved]
        kept = {"counts": torch.tensor(numbers, device="cpu")}
        kept["prices"] = torch.tensor(astuple(self.prices), dtype=torch.float64, device="cpu")
        if self._ranking is not None:
            kept["ranking"] = torch.tensor(self._ranking, dtype=torch.float64, device="cpu")
        if self._moment is not None:
            kept["moment"] = self._moment
        if self.found is not None:
            kept["basis"] = self.found.basis
            bounds = [self.found.candidates, self.found.ranking]
            kept["bounds"] = torch.tensor(bounds, dtype=torch.float64, device="cpu")
        return kept

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], device: torch.device) -> SubspaceWatch:
        """One that continues from a `state`, with weights on a device."""
        searches, measured, due, n_tokens, moved = map(int, state["counts"])
        watch = cls(Prices(*state["prices"].tolist()), moved)
        watch._searches, watch._measured, watch._due = searches, measured, due
        watch._n_tokens = n_tokens
        watch._moment = state.get("moment")
        watch._ranking = float(state["ranking"]) if "ranking" in state else None
        if "basis" in state:
            candidates, ranking = state["bounds"].tolist()
            watch.found = ActiveSubspace(state["basis"].to(device), int(candidates), ranking)
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
    """Search in the subspace of the watch; `encoder_k_and_scale` as in `before_search`."""
    W_enc, _, k, _ = encoder_k_and_scale
    if watch.is_repeated(len(x), k):
        found = search_in(watch.found)
    else:
        found = search_in(watch.before_search(x, *encoder_k_and_scale))
        watch.after_search(found, W_enc.shape[1])
    return found.features, found.pre
