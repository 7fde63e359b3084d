"""The parts of a TopK step in which every rank has a slice of the features.

All ranks call these functions together, on the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import TopKTrainingSAE
from torch import Tensor
from torch.nn import functional as F

from saesub.topk.backend import RowBackend
from saesub.topk.ops import Search, Selected, decode_at, encode_at, row_products, select_topk
from saesub.training.distributed.processes import Ranks


def best_of_all(ranks: Ranks, scores: Float[Tensor, "n m"], k: int) -> Bool[Tensor, "n m"]:
    """Which of this rank's scores are among the k largest of all ranks', row by row.

    Every rank gives its m <= k largest, fewer than k only if it has no more. Exactly k are chosen
    over all ranks; of equal ones, those of the lower rank.
    """
    n, m = scores.shape
    padded = F.pad(scores, (0, k - m), value=-torch.inf)
    everyones = torch.stack(ranks.gather(padded), 1).flatten(1)
    # Stable, so that every rank comes to the same choice.
    best = everyones.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = torch.zeros_like(everyones, dtype=torch.bool).scatter_(1, best, True)
    return chosen.view(n, ranks.world, k)[:, ranks.rank, :m]


def select_over_ranks(
    ranks: Ranks,
    sae: TopKTrainingSAE,
    x: Float[Tensor, "n d_in"],
    scale: Float[Tensor, " d_here"] | None,
    k: int,
    *,
    among: Bool[Tensor, " d_here"] | None = None,
    search: Search | None = None,
) -> Selected:
    """This rank's entries among each token's k best features of all ranks; with `among`, of these.

    `x` has the input bias taken off; `scale` and `search` are as in `ops.select_topk`.
    """
    W_enc, b_enc = sae.W_enc, sae.b_enc
    numbers = torch.arange(len(b_enc), device=b_enc.device)
    if among is not None:
        numbers = numbers[among]
        W_enc, b_enc = W_enc.T.index_select(0, numbers).T, b_enc[numbers]
        scale = None if scale is None else scale[numbers]
    k_here = min(k, len(numbers))
    if k_here:
        found = select_topk(x, W_enc, b_enc, k_here, scale, search=search)
        features, pre = found.features.view(-1, k_here), found.pre.view(-1, k_here)
    else:
        features, pre = numbers.expand(len(x), 0), x[:, :0]
    mine = best_of_all(ranks, pre if scale is None else pre * scale[features], k)
    offsets = F.pad(mine.sum(1).cumsum(0), (1, 0))
    return Selected(numbers[features[mine]], offsets, pre[mine], sae.cfg.d_sae)


@dataclass(frozen=True)
class Part:
    """A term of the loss: the reconstruction by all ranks, and what goes back to this rank's part.

    Attributes:
        values: what the entries of `selected` are decoded with.
        g_out, g_pre: gradients with respect to `x_hat` and to `selected.pre`.
    """

    selected: Selected
    values: Float[Tensor, " m"]
    x_hat: Float[Tensor, "n d_in"]
    g_out: Float[Tensor, "n d_in"]
    g_pre: Float[Tensor, " m"]
    loss: Float[Tensor, ""]


def decode_over_ranks(
    ranks: Ranks,
    sae: TopKTrainingSAE,
    selected: Selected,
    target: Float[Tensor, "n d_in"],
    weight: float,
    *,
    auxiliary: bool = False,
) -> Part:
    """Reconstruct `target` from all ranks' entries, the loss being `weight * sum of error²`.

    Values are rectified and `b_dec` is added, except in AuxK's `auxiliary` term, as in SAELens.
    """
    values = selected.pre if auxiliary else selected.pre.relu()
    x_hat = ranks.sum_(decode_at(selected, values, sae.W_dec))
    if not auxiliary:
        x_hat += sae.b_dec
    error = x_hat - target
    g_out = error * (2 * weight)
    g_pre = row_products(g_out, selected, sae.W_dec)
    if not auxiliary:
        g_pre = g_pre * (values > 0)
    return Part(selected, values, x_hat, g_out, g_pre, weight * error.square().sum())


@dataclass(frozen=True)
class Entries:
    """The entries of all parts, those of a second one as if of a second copy of the batch."""

    selected: Selected
    values: Float[Tensor, " m"]
    g_pre: Float[Tensor, " m"]
    x: Float[Tensor, "n d_in"]
    g_out: Float[Tensor, "n d_in"]

    @classmethod
    def of(cls, parts: list[Part], x: Float[Tensor, "n d_in"]) -> Entries:
        """Of parts that were selected by the same `x`."""
        counts = torch.cat([part.selected.offsets.diff() for part in parts])
        selected = Selected(
            torch.cat([part.selected.features for part in parts]),
            F.pad(counts.cumsum(0), (1, 0)),
            torch.cat([part.selected.pre for part in parts]),
            parts[0].selected.d_sae,
        )
        values, g_pre, g_out = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("values", "g_pre", "g_out")
        )
        return cls(selected, values, g_pre, x.repeat(len(parts), 1), g_out)

    def row_gradients(self, rows: RowBackend) -> Any:
        """As the loops of a device want them."""
        s = self.selected
        return rows.row_gradients(
            s.features, s.tokens, self.values, self.g_pre, self.x, self.g_out, s.d_sae
        )

    @torch.enable_grad()
    def set_gradients(self, sae: TopKTrainingSAE) -> None:
        """Of this rank's encoder, decoder and encoder bias, as torch's optimizers want them."""
        encode_at(self.selected, self.x, None, sae.W_enc, sae.b_enc).backward(self.g_pre)
        decode_at(self.selected, self.values, sae.W_dec).backward(self.g_out)
