"""An encoder in 8 bits, of all coordinates or of an active subspace, and the search by it.

The copy is made, searched and kept up to date by the compiled functions (cpu_search.h).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from saesub.topk.active_subspace import ActiveSubspace, rest_of
from saesub.topk.backend import check
from saesub.topk.cpu_library import (
    COORDINATES,
    DEVIATIONS,
    FEATURES_PER_TILE,
    call,
    empty,
    instructions,
    n_steps,
    offset,
    threads,
)
from saesub.topk.ops import LEAST_FEATURES_PER_K, dense_search, top_k
from saesub.topk.subspace_watch import Found

_TABLE = 5  # numbers that a score and its bounds are made of, for each feature
_FEW_TOKENS = 64  # with more, torch's product is faster, which first copies the encoder


class Packing(ctypes.Structure):
    """The struct of cpu_search.h."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("basis", "basis_scale", "norms", "weights", "table")
        ),
        *((name, ctypes.c_int64) for name in ("d", "read", "d_sae")),
        ("basis_error", ctypes.c_double),
    ]


class Basis:
    """The directions of a subspace in 8 bits, by which rows of the encoder are rotated.

    What is read of a token is exact for the rounded directions: `w @ rounded @ (token's
    coordinates)` is the product of the row's and the token's projections on their span.
    """

    def __init__(self, basis: Float[Tensor, "d_in rank"]) -> None:
        scale = basis.abs().amax(0) / n_steps()
        whole = (basis / scale).round()
        rounded = (whole * scale).double()
        gram = rounded.T @ rounded
        self._gram = gram.float()
        self._coordinates = torch.linalg.solve(gram, rounded.T).T.float().contiguous()
        self.rank = rank = basis.shape[1]
        off = gram - torch.eye(rank, dtype=gram.dtype, device=gram.device)
        self.error = DEVIATIONS * 2**0.5 * float(off.norm()) / rank
        padded = -(-rank // FEATURES_PER_TILE) * FEATURES_PER_TILE
        self.scale = F.pad(scale, (0, padded - rank))
        self.tiles = _tiles(whole.T, padded)

    def read(self, x: Float[Tensor, "n d_in"]) -> tuple[Tensor, Tensor]:
        """(n, rank) what is read of tokens, and (n,) the norm of the rest."""
        read = x @ self._coordinates
        inside = ((read @ self._gram) * read).sum(1)
        return read, rest_of(torch.linalg.vector_norm(x, dim=1).square_(), inside)


def _tiles(rows: Float[Tensor, "n d"], padded: int) -> Tensor:
    """Whole numbers as the compiled products read them: 64 rows side by side, 4 columns of each."""
    n, d = rows.shape
    width = -(-d // COORDINATES) * COORDINATES
    whole = F.pad(rows, (0, width - d, 0, padded - n)) + offset()
    # A negative number has no byte of its own in torch: signed ones are taken for what they are.
    bytes_ = whole.to(torch.uint8) if offset() else whole.to(torch.int8).view(torch.uint8)
    tiles = bytes_.view(-1, FEATURES_PER_TILE, width // 4, 4)
    return tiles.transpose(1, 2).contiguous()


@dataclass
class PackedEncoder:
    """The copy of an encoder (d_in, d_sae) that lies feature-major in memory.

    Attributes:
        norms: (d_sae,) by which features are ranked, or None; the caller keeps them up to date.
        subspace: what is read of tokens and rows; None for all coordinates.
        weights, table: the copy; the struct `Packing` of cpu_search.h says what lies where.
    """

    d_in: int
    d_sae: int
    norms: Float[Tensor, " d_sae"] | None
    subspace: ActiveSubspace | None

    def __post_init__(self) -> None:
        read = self.d_in if self.subspace is None else self.subspace.rank
        padded = -(-self.d_sae // FEATURES_PER_TILE) * FEATURES_PER_TILE
        width = -(-read // COORDINATES) * COORDINATES
        self.weights, self.table = empty(padded * width, dtype=torch.uint8), empty(_TABLE, padded)
        self._basis = None if self.subspace is None else Basis(self.subspace.basis)

    @property
    def n_tiles(self) -> int:
        """Tiles of features in the copy."""
        return self.table.shape[1] // FEATURES_PER_TILE

    def packing(self) -> Packing:
        """The struct that the compiled functions take; it has the addresses of the tensors here."""
        basis, read = self._basis, self.d_in
        kept, error = [None, None], 0.0
        if basis is not None:
            kept, error, read = [basis.tiles, basis.scale], basis.error, basis.rank
        tensors = (*kept, self.norms, self.weights, self.table)
        places = (None if t is None else t.data_ptr() for t in tensors)
        return Packing(*places, self.d_in, read, self.d_sae, error)

    def pack(
        self,
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        W_dec: Float[Tensor, "d_sae d_out"] | None = None,
        tiles: tuple[int, int] | None = None,
    ) -> None:
        """Copy all rows, or those of so many tiles of features from one on; with `W_dec` the norms
        of its rows become `norms`."""
        self._check(W_enc, b_enc)
        d_out, norms = (0, None) if W_dec is None else (W_dec.shape[1], self.norms)
        given = [W_enc.T, b_enc, W_dec, d_out, norms, *(tiles or (0, self.n_tiles))]
        call("pack", self.packing(), *given, threads())

    def search(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        k: int,
    ) -> Found:
        """`ops.dense_search` of the weights that the copy is of.

        Bounds on the rounding error, and on what the subspace leaves out, leave some tens of
        candidates a token, which are then ranked in float32. The bounds are four standard
        deviations of the rounding error wide on either side, for errors without direction. Tokens
        whose rounding error has one (a massive coordinate takes the range for itself) or that have
        too many candidates are ranked by the whole product.
        """
        self._check(W_enc, b_enc, x)
        if not bool(self.table[:, : self.d_sae].isfinite().all()):  # shows NaN and Inf as they are
            return Found(*dense_search(x, W_enc, b_enc, k, self.norms), 0, 1)
        read, rest = (x, None) if self._basis is None else self._basis.read(x)
        n = len(x)
        features, pre = empty(n, k, dtype=torch.int64), empty(n, k)
        failed, ranked = empty(n, dtype=torch.bool), empty(n, dtype=torch.int32)
        given = [self.packing(), x, read, rest, W_enc.T, b_enc, n, k]
        call("search", *given, features, pre, failed, ranked, threads())
        if bool(failed.any()):
            ranked[failed] = 0
            features[failed], pre[failed] = self._by_the_whole(x[failed], W_enc, b_enc, k)
        shares = (float(t.sum()) / max(1, n) for t in (ranked, failed))
        return Found(features, pre, *shares)

    def _check(self, W_enc: Tensor, b_enc: Tensor, x: Tensor | None = None) -> None:
        """Refuse what the compiled functions would misread."""
        wanted = [(W_enc.T, (self.d_sae, self.d_in)), (b_enc, (self.d_sae,))]
        wanted += [(self.norms, (self.d_sae,))]
        wanted += [] if x is None else [(x, (len(x), self.d_in))]
        check("cpu", *wanted)

    def _by_the_whole(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        if len(x) > _FEW_TOKENS:
            return dense_search(x, W_enc, b_enc, k, self.norms)
        scores = empty(len(x), self.d_sae)
        call("scores", x, W_enc.T, b_enc, len(x), self.d_in, self.d_sae, scores, threads())
        ranks = scores if self.norms is None else scores * self.norms
        features = top_k(ranks, k).sort(1).values
        return features, scores.gather(1, features)


def search_all(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    feature_scale: Float[Tensor, " d_sae"] | None,
    subspace: ActiveSubspace | None = None,
) -> Found:
    """The search of an encoder of which no copy is kept."""
    if not can_search(W_enc.shape[1], k):
        return Found(*dense_search(x, W_enc, b_enc, k, feature_scale), 0, 1)
    d_in, d_sae = W_enc.shape
    encoder = PackedEncoder(d_in, d_sae, feature_scale, subspace)
    encoder.pack(W_enc, b_enc)
    return encoder.search(x, W_enc, b_enc, k)


def can_search(d_sae: int, k: int) -> bool:
    """Whether the processor multiplies in 8 bits, and there are features enough to gain by it."""
    return d_sae >= LEAST_FEATURES_PER_K * k and bool(instructions())
