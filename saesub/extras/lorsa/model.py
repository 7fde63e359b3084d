"""Lorsa: one attention layer as many sparse heads of rank one (low-rank sparse attention).

He et al. 2025, "Towards Understanding the Nature of Attention with Low-Rank Sparse Decomposition"
(arXiv 2504.20938). Head i reads w_v (d_model,), moves what it read along the attention pattern of
its group's query-key circuit, z_i = Σ_s pattern[t, s] (w_v · x_s) + b_v, and writes z_i w_o. Only
the k heads that write most at a token, by z_i ‖w_o‖, are kept there, and only while z_i > 0. The
authors' library (llamascopium) selects heads by the same size; their first code kept the largest
|z_i| ‖w_o‖ instead. The query-key circuits are the model's own at first and are trained with the
rest.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from saesub.errors import SaesubError
from saesub.extras.lorsa.attention import WHAT_FITS, read_and_written, rotary_attention
from saesub.files import Form, damaged, read_checksummed, write_checksummed
from saesub.loading.models import Model, load_model, model_name
from saesub.topk.ops import Selected, decode_at, top_k

_FORM = Form(
    format="saesub-lorsa-1",
    key="cfg",
    what="Lorsa",
    missing="train one and save it there first",
    damaged="train it again",
)
_CHECK_TOKENS = 32


@dataclass(frozen=True)
class LorsaConfig:
    """The shape of a Lorsa.

    Attributes:
        d_model: width of what it reads and writes.
        n_heads: number of rank-one heads, the dictionary's size; a multiple of `n_qk`.
        n_qk: number of query-key circuits; each serves n_heads / n_qk consecutive heads.
        k: largest number of heads active at a token.
        frequencies: of the rotary embedding, radians a position, one for each of the d_qk / 2
            planes (i, i + d_qk / 2).
        layer, model: whose attention it replaces, for the record.
        seed: of the random read and write directions.

    Raises SaesubError for k outside 1..n_heads, or n_heads that n_qk does not divide.
    """

    d_model: int
    n_heads: int
    n_qk: int
    k: int
    frequencies: tuple[float, ...]
    layer: int
    model: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_qk < 1 or self.n_heads < 1 or self.n_heads % self.n_qk:
            raise SaesubError(
                f"n_heads={self.n_heads} must be a multiple of n_qk={self.n_qk}: every query-key "
                "circuit serves the same number of heads."
            )
        if not 1 <= self.k <= self.n_heads:
            raise SaesubError(f"k must lie in 1..{self.n_heads} (n_heads), not {self.k}.")

    @property
    def d_qk(self) -> int:
        """Width of a query or key."""
        return 2 * len(self.frequencies)


class ActiveHeads(NamedTuple):
    """The k selected heads of every token, in no order, and their z, which is 0 for a head that is
    selected but not active."""

    heads: Int[Tensor, "batch pos k"]
    z: Float[Tensor, "batch pos k"]

    def dense(self, n_heads: int) -> Float[Tensor, "batch pos n_heads"]:
        """z of all heads, 0 where a head is not active; not differentiable."""
        z = self.z.detach()
        return z.new_zeros(*z.shape[:2], n_heads).scatter_(-1, self.heads, z)


class Lorsa(nn.Module):
    """Low-rank sparse attention in float32; the module's docstring says what it computes.

    Parameters: W_Q, W_K (n_qk, d_model, d_qk), b_Q, b_K (n_qk, d_qk); W_V, W_O (n_heads, d_model),
    b_V (n_heads,), b_O (d_model,). A new Lorsa reads and writes along random unit vectors.
    """

    def __init__(self, cfg: LorsaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        generator = torch.Generator().manual_seed(cfg.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32)

        self.W_V = nn.Parameter(F.normalize(normal(cfg.n_heads, cfg.d_model), dim=-1))
        self.W_O = nn.Parameter(F.normalize(normal(cfg.n_heads, cfg.d_model), dim=-1))
        self.W_Q = nn.Parameter(normal(cfg.n_qk, cfg.d_model, cfg.d_qk) / cfg.d_model**0.5)
        self.W_K = nn.Parameter(normal(cfg.n_qk, cfg.d_model, cfg.d_qk) / cfg.d_model**0.5)
        self.b_Q = nn.Parameter(torch.zeros(cfg.n_qk, cfg.d_qk, dtype=torch.float32))
        self.b_K = nn.Parameter(torch.zeros(cfg.n_qk, cfg.d_qk, dtype=torch.float32))
        self.b_V = nn.Parameter(torch.zeros(cfg.n_heads, dtype=torch.float32))
        self.b_O = nn.Parameter(torch.zeros(cfg.d_model, dtype=torch.float32))

    @classmethod
    def from_attention(
        cls,
        model: Model,
        layer: int,
        *,
        n_heads: int,
        k: int,
        n_qk: int | None = None,
        seed: int = 0,
    ) -> Lorsa:
        """A Lorsa with the layer's own query-key circuits and random read and write directions.

        `n_qk` is the model's number of query heads, or a multiple, which repeats each of them.

        Raises:
            SaesubError: the model has no such layer, `k`, `n_heads` or `n_qk` do not fit, or Lorsa
                cannot compute this kind of attention (no rotary embedding or a partial one, a
                sliding window, normalised queries, and so on).
        """
        own = dense_lorsa(model, layer)
        n_qk = own.cfg.n_qk if n_qk is None else n_qk
        if n_qk < 1 or n_qk % own.cfg.n_qk:
            raise SaesubError(
                f"n_qk={n_qk} must be a multiple of the {own.cfg.n_qk} query heads of the model."
            )
        cfg = replace(own.cfg, n_heads=n_heads, n_qk=n_qk, k=k, seed=seed)
        lorsa = cls(cfg).to(own.W_Q.device)
        kept = {
            name: getattr(own, name).repeat_interleave(n_qk // own.cfg.n_qk, 0)
            for name in ("W_Q", "W_K", "b_Q", "b_K")
        }
        lorsa.load_state_dict(kept | {"b_O": own.b_O}, strict=False)
        return lorsa

    def pre_activations(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos n_heads"]:
        """z of every head, before the selection.

        `x` is what the attention layer reads at all positions of each context, from the first on.
        Raises SaesubError for another shape.
        """
        if x.ndim != 3 or x.shape[-1] != self.cfg.d_model:
            raise SaesubError(
                f"Lorsa reads whole contexts (batch, pos, {self.cfg.d_model}), not a tensor of "
                f"shape {tuple(x.shape)}: pass x of attention_sequences."
            )
        x = x.to(self.W_V)
        q, k = (
            self._rotated(torch.einsum("bpd,hde->bhpe", x, W) + b[:, None])
            for W, b in ((self.W_Q, self.b_Q), (self.W_K, self.b_K))
        )
        v = (x @ self.W_V.T).unflatten(-1, (self.cfg.n_qk, -1)).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return z.transpose(1, 2).flatten(2) + self.b_V  # each token's attention sums to one

    def encode(self, x: Float[Tensor, "batch pos d_model"]) -> ActiveHeads:
        """The heads that write at each token."""
        z = self.pre_activations(x)
        writes = (z * self.W_O.norm(dim=-1)).detach()
        heads = top_k(writes.flatten(0, 1), self.cfg.k).view(*z.shape[:2], -1)
        return ActiveHeads(heads, z.gather(-1, heads).relu())

    def decode(self, active: ActiveHeads) -> Float[Tensor, "batch pos d_model"]:
        """What those heads write, plus the output bias."""
        heads, z = active.heads.flatten(0, 1), active.z.flatten(0, 1)
        selected = Selected.equally(heads, z.detach(), self.cfg.n_heads)
        return decode_at(selected, z.flatten(), self.W_O, self.b_O).view(*active.z.shape[:2], -1)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> tuple[Float[Tensor, "batch pos d_model"], ActiveHeads]:
        """The attention layer's output, and the heads behind it. Raises as `pre_activations`."""
        active = self.encode(x)
        return self.decode(active), active

    def _rotated(self, q: Float[Tensor, "batch n_qk pos d_qk"]) -> Tensor:
        frequencies = torch.tensor(self.cfg.frequencies, dtype=torch.float32, device=q.device)
        angles = torch.outer(torch.arange(q.shape[2], device=q.device), frequencies)
        cos, sin = angles.cos(), angles.sin()
        a, b = q.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and config to one safetensors file, never a half-written one. Raises
        SaesubError where the disk is full or cannot be written."""
        write_checksummed(path, _FORM, self.state_dict(), json.dumps(asdict(self.cfg)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Lorsa:
        """Read what `save` wrote, on the CPU. Raises SaesubError for a missing, foreign or damaged
        file."""
        tensors, text = read_checksummed(path, _FORM)
        try:
            settings = json.loads(text)
            lorsa = cls(LorsaConfig(**settings | {"frequencies": tuple(settings["frequencies"])}))
            lorsa.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise damaged(path, _FORM, error) from error
        return lorsa


@torch.no_grad()
def dense_lorsa(model: Model, layer: int) -> Lorsa:
    """The attention layer itself as a Lorsa: one head for each dimension of each of its heads.

    `pre_activations` is then the layer's hook_z, and the sum over all heads, `pre_activations(x) @
    W_O + b_O`, is the layer's output; a few tokens are run to check this. `forward` is not the
    layer's output, since it leaves out negative z.

    Raises:
        SaesubError: as `Lorsa.from_attention`.
    """
    bridge = load_model(model)
    attention, frequencies = rotary_attention(bridge, layer)
    n_qk, d_head, d_model = attention.W_O.shape
    n_heads = n_qk * d_head
    cfg = LorsaConfig(d_model, n_heads, n_qk, n_heads, frequencies, layer, model_name(bridge))
    lorsa = Lorsa(cfg).to(bridge.cfg.device)
    for name, parameter in lorsa.named_parameters():
        own = getattr(attention, name)
        if own is None:  # a layer without this bias: it is 0 in the Lorsa
            continue
        if name[2:] in ("K", "V"):  # several query heads share a key and a value head
            own = own.repeat_interleave(n_qk // len(own), 0)
        parameter.copy_((own.transpose(1, 2) if name == "W_V" else own).reshape(parameter.shape))
    ids = torch.arange(_CHECK_TOKENS, device=bridge.cfg.device) + bridge.cfg.d_vocab // 2
    tokens = ids[None] % bridge.cfg.d_vocab
    x, y = read_and_written(bridge, tokens, layer)
    error = (lorsa.pre_activations(x) @ lorsa.W_O + lorsa.b_O - y).norm() / y.float().norm()
    # A model in bfloat16 is within 0.01 of its weights' own output.
    if not error < (1e-3 if y.dtype in (torch.float32, torch.float64) else 0.02):
        raise SaesubError(
            f"layer {layer} of {cfg.model} is no plain rotary attention, for the output computed "
            f"from its weights is {error:.1%} off (it may normalise queries, cap scores, gate "
            f"heads or rotate in another way): {WHAT_FITS}."
        )
    return lorsa
