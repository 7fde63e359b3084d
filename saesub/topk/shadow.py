"""A TopK SAE's encoder in few bits, kept on the card, by which its best features are searched.

The product of tokens and encoder is most of a step's arithmetic. Here it is taken in 16 or 8 bits,
of a copy of the encoder that already holds the decoder's norms; the row update keeps it up to date.
One kernel multiplies and keeps the largest score of each group of features, so that the
(n_tokens, d_sae) scores are never written. The best groups are opened, their members ranked in few
bits, and the best of those ranked again in float32, by the weights themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from saesub.precision import reading_waits
from saesub.topk import cuda_search, maxima
from saesub.topk.backend import check
from saesub.topk.ops import Selected, top_k
from saesub.topk.triton_launch import block_of, kernels, launch, row_shapes

_MOST_SCORES = 2**28  # at once: groups' maxima are then 0.5 GB, or their members' scores 1 GB
_LEAST_TOKENS, _MOST_TOKENS = 2048, 16_384  # at once
_REFRESHES = 64  # steps in which every row is written once more
_GROUPS_PER_CHOSEN = 8  # with fewer groups the best are no small part of them
_MEMBERS_PER_PROGRAM, _MEMBERS_AT_ONCE = 64, 4
_ALIGNMENT = 16  # bytes, of a row
_LIMITS = {torch.float16: 60_000.0, torch.float8_e4m3fn: 448.0}  # largest number, or a little below
_HEADROOM = {torch.float16: 256.0, torch.float8_e4m3fn: 8.0}  # how much rows may grow meanwhile
_TOLERANCE = {torch.float16: 2**-6, torch.float8_e4m3fn: 0.25}  # of a token's largest score
_NORM_TOLERANCE, _COMPARED = 1e-3, 4  # of how many features of a token norms are compared


class EncoderShadow:
    """The copy, and the search by it.

    Args:
        W_enc, W_dec: of a TopK SAE, (d_in, d_sae), feature-major in memory, and (d_sae, d_out).
        scaled: whether features are ranked by pre-activation times decoder norm.
        products: as `ops.row_products`.
        eight_bits: float8 instead of float16; a card of compute capability 8.9 or more has it.

    Attributes:
        rows: (d_sae, width) encoder rows times decoder norms times `factor`, in float16 or float8;
            the width is d_in, rounded up.
        norms: (d_sae,) decoder norms, or None where features are ranked without them.
        factor: a power of two that uses the range of few bits well.
        stale: (1,) not 0 if a row has grown out of that range, or is not that of the weights.
    """

    waits = False  # a step may not read numbers: they would have to be waited for

    def __init__(
        self,
        W_enc: Float[Tensor, "d_in d_sae"],
        W_dec: Float[Tensor, "d_sae d_out"],
        *,
        scaled: bool,
        products: cuda_search.Products,
        eight_bits: bool = False,
    ) -> None:
        self._products = products
        self._shape = d_in, d_sae = W_enc.shape
        dtype = torch.float8_e4m3fn if eight_bits else torch.float16
        per_row = _ALIGNMENT // dtype.itemsize
        width, device = -(-d_in // per_row) * per_row, W_enc.device
        self.rows = torch.zeros(d_sae, width, dtype=dtype, device=device)
        self.norms = W_enc.new_ones(d_sae) if scaled else None
        self.stale = torch.zeros(1, dtype=torch.int32, device=device)
        self.rebuild(W_enc, W_dec)

    @torch.no_grad()
    def rebuild(self, W_enc: Tensor, W_dec: Tensor) -> None:
        """Write all rows. Waits for the device.

        Raises TypeError for weights that are not float32 or do not lie feature by feature.
        """
        (d_in, d_sae), d_out = W_enc.shape, W_dec.shape[1]
        check(W_enc.device.type, (W_enc.T, (d_sae, d_in)), (W_dec, (d_sae, d_out)))
        largest = torch.linalg.vector_norm(W_enc, torch.inf, 0)
        if self.norms is not None:
            largest = largest * W_dec.norm(dim=1)
        self.factor = float(few_bits(largest[None], self.rows.dtype)[1])
        self.stale.zero_()
        self._pending, self._W_dec = _Pending(), W_dec.detach()
        self._at = 0
        self._write(W_enc, W_dec, 0, len(self.rows))
        self._key = _key_of(W_enc, W_dec)

    def fits(self, W_enc: Tensor, scaled: bool) -> bool:
        """Whether it has the shape and the device of an encoder, and its kind of ranking."""
        same = self._shape == W_enc.shape and self.rows.device == W_enc.device
        return same and scaled == (self.norms is not None)

    def keep_up(self, W_enc: Tensor, W_dec: Tensor) -> None:
        """Before a step: write all rows if the weights were changed by others, else the next few.

        A change through `.data` leaves no trace in torch. The search sees one of many rows, and the
        first step that hears of it writes all; any other row is written again within `_REFRESHES`
        steps.
        """
        stale = self._pending.arrived()  # before it is asked for again, which forgets the answer
        self._pending.note(self.stale)
        stale |= self._pending.arrived()  # on a CPU it is there at once
        if stale or self._key != _key_of(W_enc, W_dec):
            return self.rebuild(W_enc, W_dec)
        left = len(self.rows) - self._at
        chunk = min(-(-len(self.rows) // _REFRESHES), left)
        self._write(W_enc, W_dec, self._at, chunk)
        self._at = 0 if chunk == left else self._at + chunk

    def written(self, sae: Any) -> None:
        """Note that the row update has changed these weights, and the rows with them."""
        self._key = _key_of(sae.W_enc, sae.W_dec)

    def given(self) -> list[Any]:
        """What the kernels of the row update take of a shadow."""
        return [self.rows, self.norms, self.stale, self.factor]

    def shape(self) -> dict[str, Any]:
        """The constants that they take."""
        return {"WIDTH": self.rows.shape[1], "LIMIT": _LIMITS[self.rows.dtype]}

    def _write(self, W_enc: Tensor, W_dec: Tensor, first: int, count: int) -> None:
        given = [first, W_enc.detach().T, W_dec.detach(), *self.given()]
        shapes = row_shapes(W_enc.shape[0], W_dec.shape[1])
        launch("write_shadow", count, *given, **shapes, **self.shape())

    @torch.no_grad()
    def search(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        k: int,
        feature_scale: Float[Tensor, " d_sae"] | None = None,
    ) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
        """`ops.dense_search`, block by block of tokens; `feature_scale` is `norms`.

        Features of bias -inf come last, and where there are fewer others than k, entries of
        pre-activation -inf fill up. Where there are few groups, or W_enc are other weights than the
        shadow's, `cuda_search.search` takes it.
        """
        width = width_of(k, self.rows.dtype)
        n_groups = min(maxima.n_groups(len(self.rows)), len(self.rows))
        own = W_enc.data_ptr() == self._key[0] and feature_scale is self.norms
        if not own or n_groups < _GROUPS_PER_CHOSEN * width:
            given = (x, W_enc, b_enc, k, feature_scale)
            return cuda_search.search(*given, products=self._products)
        bias = _scaled(b_enc, feature_scale) * self.factor
        features = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
        pre = x.new_empty(len(x), k)
        most = _MOST_SCORES // max(n_groups, maxima.MEMBERS * width)
        at_once = min(_MOST_TOKENS, max(_LEAST_TOKENS, most))
        for start in range(0, len(x), at_once):
            block = slice(start, start + at_once)
            found, few = self._candidates(x[block], bias, width)
            exact = self._products(x[block], Selected.equally(found, found, 0), W_enc.T)
            exact = torch.where(few == -torch.inf, few, exact.view_as(found) + b_enc[found])
            scores = _scaled(exact, None if feature_scale is None else feature_scale[found])
            best = scores.topk(k, dim=-1, sorted=False).indices
            features[block], pre[block] = found.gather(1, best), exact.gather(1, best)
            self._compare(features[block], few, scores)
        return features, pre

    def _candidates(
        self, x: Float[Tensor, "n d_in"], bias: Float[Tensor, " d_sae"], width: int
    ) -> tuple[Int[Tensor, "n width"], Float[Tensor, "n width"]]:
        """The `width` best features by products in few bits, and their scores; -inf of those that
        do not exist."""
        tokens, scale = few_bits(x, self.rows.dtype)
        tokens = F.pad(tokens, (0, self.rows.shape[1] - x.shape[1]))
        tiles = maxima.tiles_of(x.device, self.rows.shape[1], self.rows.dtype)
        largest = maxima.group_maxima(tokens, self.rows, bias, scale, tiles)
        groups = top_k(largest, width).int()
        n, per_token = len(x), width * maxima.MEMBERS
        scores, ids = x.new_empty(n, per_token), groups.new_empty(n, per_token)
        given = [tokens, self.rows, bias, scale, groups, scores, ids, len(self.rows)]
        constants = {
            "WIDTH": tokens.shape[1],
            "BLOCK": block_of(tokens.shape[1]),
            "STRIDE": maxima.STRIDE,
            "MEMBERS": maxima.MEMBERS,
            "GROUPS": width,
            "PER_PROGRAM": _MEMBERS_PER_PROGRAM,
            "ENTRIES": _MEMBERS_AT_ONCE,
        }
        programs = n * -(-per_token // _MEMBERS_PER_PROGRAM)
        with torch.cuda.device_of(x):
            kernels(maxima.KERNELS).member_scores[(programs,)](*given, **constants)
        values, best = scores.topk(width, dim=-1, sorted=False)
        return ids.gather(1, best).long(), values / (scale[:, None] * self.factor)

    def _compare(
        self, best: Int[Tensor, "n k"], few: Float[Tensor, "n width"], exact: Tensor
    ) -> None:
        """Note on the device whether scores in few bits, or norms of some of the best features, are
        not those of the weights: others have changed them through `.data`."""
        largest = exact.nan_to_num(0, 0, 0).abs().amax(1, keepdim=True)
        allowed = _TOLERANCE[self.rows.dtype] * largest
        stale = ((few - exact).abs() > allowed).any()
        if self.norms is not None:
            some = best[:, :_COMPARED].flatten()
            norms = self._W_dec.index_select(0, some).norm(dim=1)
            stale |= ((self.norms[some] - norms).abs() > _NORM_TOLERANCE * norms).any()
        self.stale |= stale


class _Pending:
    """A number on its way from the device, which nobody waits for."""

    def __init__(self) -> None:
        self._here: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def note(self, number: Tensor) -> None:
        """Ask for it, unless an earlier one is still on its way."""
        if not reading_waits(number):
            self._here = number
        elif self._event is None or self._event.query():
            with torch.cuda.device_of(number):
                self._here = torch.empty_like(number, device="cpu", pin_memory=True)
                self._here.copy_(number, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()

    def arrived(self) -> bool:
        """Whether one has come that is not 0."""
        if self._here is None or (self._event is not None and not self._event.query()):
            return False
        return bool(self._here)


def few_bits(
    x: Float[Tensor, "n d"], dtype: torch.dtype
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """Rows in float16 or float8, each multiplied by a power of two so that it uses the range with
    room to grow; and these powers."""
    largest = x.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    power = (_LIMITS[dtype] / _HEADROOM[dtype] / largest).log2().floor().clamp(-60, 60).exp2()
    return (x * power[:, None]).to(dtype), power


def _key_of(*weights: Tensor) -> tuple[int, ...]:
    """What changes with the weights, but for changes through `.data`."""
    return tuple(n for w in weights for n in (w.data_ptr(), w._version))


def _scaled(scores: Tensor, scale: Tensor | None) -> Tensor:
    """Scores times their features' scale; -inf stays, also where the scale is 0."""
    return scores if scale is None else torch.where(scores == -torch.inf, scores, scores * scale)


def width_of(k: int, dtype: torch.dtype) -> int:
    """How many groups are opened, and how many of their members are ranked in float32."""
    return 2 * k + 16 if dtype == torch.float8_e4m3fn else k + max(16, k // 2)
