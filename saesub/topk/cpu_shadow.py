"""A TopK SAE's encoder in 8 bits, which the compiled row update keeps up to date."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesub.topk.active_subspace import ActiveSubspace
from saesub.topk.packed_encoder import PackedEncoder, can_search, search_all
from saesub.topk.subspace_watch import Found, SubspaceWatch, search_watched

_REFRESHES = 64  # steps in which every row is copied once more


class CpuShadow:
    """The copy, the subspace that it is of, and the search by it.

    Weights that others change are seen by torch's count of changes; those changed through `.data`,
    which leaves no trace, by one number of each row, and any within `_REFRESHES` steps.

    Args:
        W_enc, W_dec, b_enc: of a TopK SAE, (d_in, d_sae), feature-major in memory, (d_sae, d_out)
            and (d_sae,).
        scaled: whether features are ranked by pre-activation times decoder norm.
        watch: says in which subspace to search; None for all coordinates.

    Attributes:
        norms: (d_sae,) decoder norms, or None where features are ranked without them.
    """

    waits = True  # a step may read numbers: they are here

    def __init__(
        self,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        *,
        scaled: bool,
        watch: SubspaceWatch | None,
    ) -> None:
        self._d_in, self._d_sae = W_enc.shape
        self.norms = W_dec.new_empty(len(W_dec)) if scaled else None
        self._watch = watch
        self._encoder = PackedEncoder(self._d_in, self._d_sae, self.norms, None)
        self._pack(W_enc, W_dec, b_enc)

    def fits(self, W_enc: Tensor, scaled: bool, watch: SubspaceWatch | None) -> bool:
        """Whether it is of an encoder of this shape, ranked and searched like this."""
        same = W_enc.shape == (self._d_in, self._d_sae) and scaled == (self.norms is not None)
        return same and watch is self._watch

    @torch.no_grad()
    def keep_up(self, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor) -> None:
        """Before a step: copy all rows again if others have changed the weights, else the next
        few."""
        changed = self._key != _key_of(W_enc, W_dec, b_enc)
        if changed or not torch.equal(self._probe, _probe(W_enc, W_dec, b_enc)):
            return self._pack(W_enc, W_dec, b_enc)
        n_tiles = self._encoder.n_tiles
        first = self._at % n_tiles
        count = min(-(-n_tiles // _REFRESHES), n_tiles - first)
        of_norms = None if self.norms is None else W_dec
        self._encoder.pack(W_enc, b_enc, of_norms, (first, count))
        self._at = first + count

    def written(self, sae: Any) -> None:
        """Note that the row update has changed these weights, and the copy with them."""
        self._note(sae.W_enc, sae.W_dec, sae.b_enc)

    def given(self, moved: int) -> list[Any]:
        """What the row update takes, which moves so many rows."""
        if self._watch is not None:
            self._watch.moved = moved
        return [self._encoder.packing(), self.norms]

    @torch.no_grad()
    def _pack(self, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor) -> None:
        self._encoder.pack(W_enc, b_enc, None if self.norms is None else W_dec)
        self._at = 0
        self._note(W_enc, W_dec, b_enc)

    def _note(self, *weights: Tensor) -> None:
        self._key, self._probe = _key_of(*weights), _probe(*weights)

    def _is_of(self, W_enc: Tensor, b_enc: Tensor) -> bool:
        """Whether the copy is of these weights, and not of some of their rows."""
        here = (W_enc.data_ptr(), b_enc.data_ptr(), *W_enc.shape)
        return here == (self._key[0], self._key[4], self._d_in, self._d_sae)

    @torch.no_grad()
    def search(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        k: int,
        feature_scale: Float[Tensor, " d_sae"] | None = None,
    ) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
        """`ops.dense_search`; `feature_scale` is `norms`. Other weights than those that the copy
        is of are searched by `search_all`."""
        if not (self._is_of(W_enc, b_enc) and can_search(W_enc.shape[1], k)):
            found = search_all(x, W_enc, b_enc, k, feature_scale)
            return found.features, found.pre

        def search_in(subspace: ActiveSubspace | None) -> Found:
            if subspace is not self._encoder.subspace:
                self._encoder = PackedEncoder(self._d_in, self._d_sae, self.norms, subspace)
                self._encoder.pack(W_enc, b_enc)
            return self._encoder.search(x, W_enc, b_enc, k)

        if self._watch is None:
            found = search_in(None)
            return found.features, found.pre
        return search_watched(self._watch, search_in, x, W_enc, b_enc, k, feature_scale)


def _key_of(*weights: Tensor) -> tuple[int, ...]:
    """What changes with the weights, but for changes through `.data`."""
    return tuple(n for w in weights for n in (w.data_ptr(), w._version))


def _probe(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor) -> Float[Tensor, "3 d_sae"]:
    """One number of each row, of all columns alike, and all biases."""
    rows = torch.arange(len(b_enc), device=b_enc.device)
    encoder, decoder = W_enc[rows % len(W_enc), rows], W_dec[rows, rows % W_dec.shape[1]]
    return torch.stack([encoder, decoder, b_enc]).detach()
