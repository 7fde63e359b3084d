"""Lorsa: one attention layer as many sparse heads of rank one (low-rank sparse attention).

He et al. 2025, "Towards Understanding the Nature of Attention with Low-Rank Sparse Decomposition"
(arXiv 2504.20938). Head i reads w_v (d_model,), moves what it read along the attention pattern of
its group's query-key circuit, z_i = Σ_s pattern[t, s] (w_v · x_s) + b_v, and writes z_i w_o. Only
the k heads that write most at a token, by z_i ‖w_o‖, are kept there, and only while z_i > 0.
Ranking by what a head writes is the default of the authors' library (llamascopium), and its TopK
keeps the same heads wherever at least k are positive; their first code kept the largest
|z_i| ‖w_o‖ instead. The query-key circuits start as the model's own, and are trained with the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.training.optim import get_lr_scheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from saesub.contexts import kept_positions
from saesub.errors import SaesubError
from saesub.models import Model, load_model, model_name
from saesub.optim import SparseAdam
from saesub.sparse_ops import Selected, decode_at, top_k
from saesub.spectrum import Spectrum
from saesub.subspace import choose_d_init
from saesub.topk_step import MAX_NORM
from saesub.training import OptimizerName

_FORMAT = "saesub-lorsa-1"
_FEATURE_AXIS = {"W_V": 0, "b_V": 0, "W_O": 0}
_CALIBRATION_CONTEXTS = 16
_HISTORY_POINTS = 40
_CHECK_TOKENS = 32
_CHECK_ERROR = {torch.float32: 1e-3}  # relative
_CHECK_ERROR_HALF = 0.02  # a model in bfloat16 is within 0.01 of its weights' own output


@dataclass(frozen=True)
class LorsaConfig:
    """The shape of a Lorsa.

    Attributes:
        d_model: width of what it reads and writes.
        n_heads: number of rank-one heads, the dictionary's size; a multiple of `n_qk`.
        n_qk: number of query-key circuits; consecutive heads, n_heads / n_qk of them, share one.
        k: most heads active at a token.
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
                "circuit serves the same number of heads"
            )
        if not 1 <= self.k <= self.n_heads:
            raise SaesubError(f"k must lie in 1..{self.n_heads} (n_heads), not {self.k}")

    @property
    def d_qk(self) -> int:
        """Width of a query or key."""
        return 2 * len(self.frequencies)


class ActiveHeads(NamedTuple):
    """The k selected heads of every token, unordered, and their z; z is 0 where z was not positive,
    and the head then silent."""

    heads: Int[Tensor, "batch pos k"]
    z: Float[Tensor, "batch pos k"]


class Lorsa(nn.Module):
    """Low-rank sparse attention in float32; the module's docstring says what it computes.

    Parameters: W_Q, W_K (n_qk, d_model, d_qk), b_Q, b_K (n_qk, d_qk); W_V, W_O (n_heads, d_model),
    b_V (n_heads,), b_O (d_model,). Read and write directions start as random unit vectors.
    """

    def __init__(self, cfg: LorsaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        generator = torch.Generator().manual_seed(cfg.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.W_V = nn.Parameter(F.normalize(normal(cfg.n_heads, cfg.d_model), dim=-1))
        self.W_O = nn.Parameter(F.normalize(normal(cfg.n_heads, cfg.d_model), dim=-1))
        self.W_Q = nn.Parameter(normal(cfg.n_qk, cfg.d_model, cfg.d_qk) / cfg.d_model**0.5)
        self.W_K = nn.Parameter(normal(cfg.n_qk, cfg.d_model, cfg.d_qk) / cfg.d_model**0.5)
        self.b_Q = nn.Parameter(torch.zeros(cfg.n_qk, cfg.d_qk))
        self.b_K = nn.Parameter(torch.zeros(cfg.n_qk, cfg.d_qk))
        self.b_V = nn.Parameter(torch.zeros(cfg.n_heads))
        self.b_O = nn.Parameter(torch.zeros(cfg.d_model))

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
            SaesubError: the model has no such layer, `k`, `n_heads` or `n_qk` do not fit, or the
                attention is of a kind that Lorsa does not compute: no rotary embedding or a partial
                one, a sliding window, normalised queries, and so on.
        """
        own = dense_lorsa(model, layer)
        n_qk = own.cfg.n_qk if n_qk is None else n_qk
        if n_qk < 1 or n_qk % own.cfg.n_qk:
            raise SaesubError(
                f"n_qk={n_qk} must be a multiple of the {own.cfg.n_qk} query heads of the model"
            )
        cfg = replace(own.cfg, n_heads=n_heads, n_qk=n_qk, k=k, seed=seed)
        lorsa = cls(cfg).to(own.W_Q.device)
        with torch.no_grad():
            for name in ("W_Q", "W_K", "b_Q", "b_K"):
                circuits = getattr(own, name).repeat_interleave(n_qk // own.cfg.n_qk, 0)
                getattr(lorsa, name).copy_(circuits)
            lorsa.b_O.copy_(own.b_O)
        return lorsa

    def pre_activations(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos n_heads"]:
        """z of every head, before any is left out. `x` is what the attention layer reads, one
        context a row from its first position on. Raises SaesubError for another shape."""
        if x.ndim != 3 or x.shape[-1] != self.cfg.d_model:
            raise SaesubError(
                f"Lorsa reads whole contexts (batch, pos, {self.cfg.d_model}), not a tensor of "
                f"shape {tuple(x.shape)}"
            )
        x = x.to(self.W_V)
        q, k = (
            self._rotated(torch.einsum("bpd,hde->bhpe", x, W) + b[:, None])
            for W, b in ((self.W_Q, self.b_Q), (self.W_K, self.b_K))
        )
        v = (x @ self.W_V.T).unflatten(-1, (self.cfg.n_qk, -1)).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return z.transpose(1, 2).flatten(2) + self.b_V  # a pattern's rows sum to one

    def encode(self, x: Float[Tensor, "batch pos d_model"]) -> ActiveHeads:
        """The heads that write at each token."""
        z = self.pre_activations(x)
        writes = (z * self.W_O.norm(dim=-1)).detach()
        heads = top_k(writes.flatten(0, 1), self.cfg.k).view(*z.shape[:2], -1)
        return ActiveHeads(heads, z.gather(-1, heads).relu())

    def decode(self, active: ActiveHeads) -> Float[Tensor, "batch pos d_model"]:
        """What those heads write, and the output bias."""
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
        frequencies = torch.tensor(self.cfg.frequencies, device=q.device)
        angles = torch.outer(torch.arange(q.shape[2], device=q.device), frequencies)
        cos, sin = angles.cos(), angles.sin()
        a, b = q.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and config to one safetensors file, under a temporary name first."""
        path = Path(path)
        tensors = {name: t.cpu().contiguous() for name, t in self.state_dict().items()}
        cfg = json.dumps(asdict(self.cfg))
        header = {"format": _FORMAT, "cfg": cfg, "sha256": _digest(tensors, cfg)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(to_safetensors(tensors, header))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Lorsa:
        """Read what `save` wrote, on the CPU. Raises SaesubError for a missing, foreign or damaged
        file."""
        if not Path(path).is_file():
            raise SaesubError(f"no Lorsa at {path}: train one and save it there first")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            intact = header["sha256"] == _digest(tensors, header["cfg"])
            settings = json.loads(header["cfg"])
            cfg = LorsaConfig(**settings | {"frequencies": tuple(settings["frequencies"])})
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SaesubError(f"{path} is damaged or not a saesub Lorsa: {error}") from error
        if not intact or header.get("format") != _FORMAT:
            raise SaesubError(f"{path} is damaged: its checksum does not match; train it again")
        lorsa = cls(cfg)
        lorsa.load_state_dict(tensors)
        return lorsa


def _digest(tensors: dict[str, Tensor], cfg: str) -> str:
    digest = hashlib.sha256(cfg.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def dense_lorsa(model: Model, layer: int) -> Lorsa:
    """The attention layer itself as a Lorsa: one head for each dimension of each of its heads.

    The sum over all of its heads, `pre_activations(x) @ W_O + b_O`, is the layer's output (which is
    checked here on a few tokens), and `pre_activations` is its hook_z. `forward` is not, for it
    leaves negative z out.

    Raises:
        SaesubError: as `Lorsa.from_attention`.
    """
    bridge = load_model(model)
    attention, frequencies = _attention(bridge, layer)
    n_heads, d_head, d_model = attention.W_O.shape
    share = n_heads // len(attention.W_K)  # query heads that share a key and a value head
    dense = (n_heads * d_head, d_model)
    cfg = LorsaConfig(d_model, dense[0], n_heads, dense[0], frequencies, layer, model_name(bridge))
    lorsa = Lorsa(cfg).to(bridge.cfg.device)
    weights = {
        "W_Q": attention.W_Q,
        "W_K": attention.W_K.repeat_interleave(share, 0),
        "W_V": attention.W_V.repeat_interleave(share, 0).transpose(1, 2).reshape(dense),
        "W_O": attention.W_O.reshape(dense),
    }
    for name, shared in (("b_Q", 1), ("b_K", share), ("b_V", share), ("b_O", 1)):
        bias = getattr(attention, name)
        if bias is not None:
            own_shape = getattr(lorsa, name).shape
            weights[name] = bias.repeat_interleave(shared, 0).reshape(own_shape)
    for name, values in weights.items():
        getattr(lorsa, name).copy_(values)
    _check_same(lorsa, bridge)
    return lorsa


def _attention(bridge: TransformerBridge, layer: int) -> tuple[Any, tuple[float, ...]]:
    """A layer's attention, and the frequencies of its rotary embedding."""
    _check_layer(bridge, layer)
    name = model_name(bridge)
    rotary: Any = getattr(bridge, "rotary_emb", None)
    if rotary is None:
        raise SaesubError(
            f"{name} has no rotary embedding, the only positions that Lorsa knows: choose a model "
            "of the Llama or Qwen2 family"
        )
    attention: Any = bridge.blocks[layer].attn
    frequencies = rotary.original_component.inv_freq
    d_head = attention.W_O.shape[1]
    if 2 * len(frequencies) != d_head:
        raise SaesubError(
            f"{name} rotates {2 * len(frequencies)} of the {d_head} dimensions of its heads; Lorsa "
            "rotates all of them: choose a model of the Llama or Qwen2 family"
        )
    if _slides(bridge.original_model.config, layer):
        raise SaesubError(
            f"layer {layer} of {name} attends within a sliding window, which Lorsa does not: "
            "choose a layer with full attention"
        )
    return attention, tuple(frequencies.tolist())


def _slides(config: Any, layer: int) -> bool:
    """Whether a layer's attention is windowed; a few tokens would not show it."""
    kinds = getattr(config, "layer_types", None)
    windowed = kinds is None or kinds[layer] == "sliding_attention"
    return windowed and bool(getattr(config, "sliding_window", None))


def _check_layer(bridge: TransformerBridge, layer: int) -> None:
    if not 0 <= layer < bridge.cfg.n_layers:
        last = bridge.cfg.n_layers - 1
        raise SaesubError(f"{model_name(bridge)} has layers 0..{last}, not {layer}")


def _check_same(dense: Lorsa, bridge: TransformerBridge) -> None:
    """Raises SaesubError unless `dense` computes what the model's layer does, on a few tokens."""
    tokens = torch.arange(_CHECK_TOKENS, device=bridge.cfg.device)[None] + bridge.cfg.d_vocab // 2
    x, y = _read_and_written(bridge, tokens, dense.cfg.layer)
    error = (dense.pre_activations(x) @ dense.W_O + dense.b_O - y).norm() / y.float().norm()
    if not error < _CHECK_ERROR.get(y.dtype, _CHECK_ERROR_HALF):
        raise SaesubError(
            f"layer {dense.cfg.layer} of {dense.cfg.model} is no plain rotary attention: computed "
            f"from its weights its output is {error:.1%} off, so it does more (normalises queries, "
            "caps scores, gates heads, or rotates in another way); choose a model of the Llama or "
            "Qwen2 family"
        )


@torch.no_grad()
def _read_and_written(
    bridge: TransformerBridge, tokens: Int[Tensor, "batch pos"], layer: int
) -> tuple[Tensor, Tensor]:
    """What the layer's projections read (after its norm), and what the layer adds to the stream."""
    names = [f"blocks.{layer}.attn.hook_in", f"blocks.{layer}.hook_attn_out"]
    stop = layer + 1 if layer + 1 < bridge.cfg.n_layers else None
    _, cache = bridge.run_with_cache(tokens, names_filter=names, stop_at_layer=stop)
    return cache[names[0]], cache[names[1]]


@torch.no_grad()
def initialize_lorsa(
    lorsa: Lorsa,
    model: Model,
    z_spectrum: Spectrum,
    d_init: int | float | str = "auto",
    *,
    per_head: bool = True,
    seed: int = 0,
) -> tuple[int, ...]:
    """Re-draw the rank-one heads inside the active subspace, in place; returns its dimension for
    each query-key circuit.

    Every w_o is a random unit vector in the subspace, and w_v = W_V W_O w_o with the weights of the
    model's head h whose circuit it shares: z is then the part of that head's own output along w_o,
    as the pre-activation of a tied autoencoder is (the tie is that of the authors' library).

    Args:
        lorsa: from `Lorsa.from_attention` on this model.
        z_spectrum: of the layer's `hook_z`, heads concatenated, (n_query_heads * d_head,). What the
            heads write is linear in z, so it holds the spectrum of every head's output, and of
            their sum.
        d_init: as for `choose_d_init`, of the space it is taken in.
        per_head: the principal directions of z_h W_O, head h's own output, at most d_head of them;
            else those of the whole attention output, for all heads alike. There `d_init=d_model`
            leaves w_o isotropic and keeps the tie: a baseline that differs in the subspace alone.
        seed: of the random directions.

    Raises:
        SaesubError: the spectrum is of another width, or `d_init` is out of range.
    """
    own = dense_lorsa(model, lorsa.cfg.layer)
    if z_spectrum.d != own.cfg.n_heads:
        raise SaesubError(
            f"z_spectrum is {z_spectrum.d} wide but the heads of layer {own.cfg.layer} are "
            f"{own.cfg.n_heads} together: measure it at blocks.{own.cfg.layer}.attn.hook_z"
        )
    generator = torch.Generator().manual_seed(seed)
    W_V, W_O = (w.unflatten(0, (own.cfg.n_qk, -1)).cpu() for w in (own.W_V, own.W_O))
    z_heads = torch.arange(z_spectrum.d).view(own.cfg.n_qk, -1)
    if per_head:
        bases = [_output_basis(z_spectrum, z, w, d_init) for z, w in zip(z_heads, W_O, strict=True)]
    else:
        bases = [_output_basis(z_spectrum, z_heads.flatten(), W_O.flatten(0, 1), d_init)]
        bases *= own.cfg.n_qk
    repeats, size = lorsa.cfg.n_qk // own.cfg.n_qk, lorsa.cfg.n_heads // lorsa.cfg.n_qk
    ranks = tuple(basis.shape[1] for basis in bases for _ in range(repeats))
    for circuit, rank in enumerate(ranks):
        head, rows = circuit // repeats, slice(circuit * size, (circuit + 1) * size)
        coordinates = F.normalize(torch.randn(size, rank, generator=generator), dim=-1)
        w_o = coordinates @ bases[head].T
        lorsa.W_O[rows] = w_o.to(lorsa.W_O)
        lorsa.W_V[rows] = (w_o @ W_O[head].T @ W_V[head]).to(lorsa.W_V)
    return ranks


def _output_basis(
    z: Spectrum, columns: Int[Tensor, " n"], W_O: Float[Tensor, "n d"], d_init: int | float | str
) -> Float[Tensor, "d r"]:
    """Principal directions of z[columns] @ W_O, `d_init` of them, from the statistics of z."""
    # In an orthonormal basis of W_O's row space, so that a rank is counted within that space.
    Q, R = torch.linalg.qr(W_O.double().T)
    output = Spectrum(
        z.n_tokens,
        R @ z.mean[columns],
        R @ z.covariance[columns][:, columns] @ R.T,
        mean_norm=float("nan"),  # not to be had from moments, and not used here
    )
    return Q.float() @ output.basis(choose_d_init(output, d_init))


@dataclass(frozen=True, eq=False)
class AttentionSequences:
    """What an attention layer read and wrote, with its contexts whole.

    Attributes:
        x, y: (n_ctx, pos, d_model) float16, on the CPU.
        kept: (n_ctx, pos) bool: the positions whose output is learnt and judged, as
            `saesub.measure_spectrum` keeps them. The others are still attended to.
    """

    x: Float[Tensor, "n_ctx pos d_model"]
    y: Float[Tensor, "n_ctx pos d_model"]
    kept: Bool[Tensor, "n_ctx pos"]

    @property
    def n_tokens(self) -> int:
        """Number of kept positions."""
        return int(self.kept.sum())

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x, y, kept) of `size` contexts at a time, in order."""
        yield from zip(*(t.split(size) for t in (self.x, self.y, self.kept)), strict=True)

    def mean_and_variance(self) -> tuple[Float[Tensor, " d_model"], float]:
        """Mean of the kept outputs, and their mean squared distance from it. Raises SaesubError if
        they do not vary."""
        variances, mean = torch.var_mean(self.y[self.kept].float(), dim=0, correction=0)
        variance = variances.sum().item()
        if not variance > 0:
            raise SaesubError("the attention outputs do not vary: give more contexts")
        return mean, variance


def attention_sequences(
    model: Model,
    tokens: Int[Tensor, "n_ctx pos"],
    layer: int,
    *,
    batch_size: int = 8,
    skip_first: int = 1,
    progress: bool = True,
) -> AttentionSequences:
    """Input and output of a layer's attention on contexts from `saesub.pack_contexts`.

    Raises SaesubError for a layer the model lacks, or values that float16 does not hold.
    """
    bridge = load_model(model)
    _check_layer(bridge, layer)
    shape = (*tokens.shape, bridge.cfg.d_model)
    x, y = torch.empty(shape, dtype=torch.float16), torch.empty(shape, dtype=torch.float16)
    starts = range(0, len(tokens), batch_size)
    for start in tqdm(starts, unit="batch", desc="activations", disable=not progress):
        rows = slice(start, start + batch_size)
        batch = tokens[rows].to(bridge.cfg.device)
        x[rows], y[rows] = _read_and_written(bridge, batch, layer)
    if not (x.isfinite().all() and y.isfinite().all()):
        raise SaesubError(f"layer {layer} reads or writes NaN, or values beyond float16's range")
    return AttentionSequences(x, y, kept_positions(bridge, tokens, skip_first))


@torch.no_grad()
def calibrate_lorsa(lorsa: Lorsa, data: AttentionSequences) -> None:
    """Centre a fresh Lorsa and set its scale, in place, by the first contexts of `data`.

    The output bias becomes the mean output, each b_V takes the mean out of its head's z, and
    directions are scaled so that what the heads write has the variance of the outputs, reading and
    writing vectors being equally long on average. To be done alike with every start that is
    compared, so that starts differ in their directions alone.
    """
    _check_width(lorsa, data)
    mean, variance = data.mean_and_variance()
    lorsa.b_O.copy_(mean)
    x, _, kept = next(data.batches(_CALIBRATION_CONTEXTS))
    device = lorsa.W_V.device
    lorsa.b_V.sub_(lorsa.pre_activations(x.to(device))[kept].mean(0))
    written = lorsa(x.to(device))[0][kept] - lorsa.b_O
    scale = (variance / written.square().sum(-1).mean()) ** 0.5
    lengths = [w.norm(dim=-1).mean() for w in (lorsa.W_V, lorsa.W_O)]
    for_output = (scale * lengths[0] / lengths[1]) ** 0.5
    lorsa.W_O.mul_(for_output)
    lorsa.W_V.mul_(scale / for_output)
    lorsa.b_V.mul_(scale / for_output)


def train_lorsa(
    lorsa: Lorsa,
    data: AttentionSequences,
    *,
    epochs: int = 1,
    batch_size: int = 4,
    lr: float = 1e-3,
    optimizer: OptimizerName = "sparse_adam",
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train in place on the squared error at kept positions, over their variance.

    The rate rises over the first tenth of the steps and falls to zero over the last fifth;
    gradients are clipped at norm 1 as in SAELens; every epoch is a new order of the contexts.

    Args:
        lorsa: from `Lorsa.from_attention`, calibrated.
        data: on the CPU; batches go to the Lorsa's device.
        batch_size: contexts in a step.
        optimizer: "sparse_adam" (`saesub.optim.SparseAdam`: a head moves only when it is active)
            or "adam".
        seed: of the order of contexts.

    Returns:
        One dict (tokens, fvu) per recorded point: kept tokens trained on, and the training error
        averaged since the last point.

    Raises:
        SaesubError: another width, fewer contexts than a batch, an unknown optimizer, or a loss
            that is no longer finite.
    """
    _check_width(lorsa, data)
    n = len(data.x)
    if epochs < 1 or not 1 <= batch_size <= n:
        raise SaesubError(f"epochs must be at least 1, batch_size in 1..{n} (contexts)")
    generator = torch.Generator().manual_seed(seed)
    whole = n // batch_size * batch_size
    orders = [torch.randperm(n, generator=generator)[:whole] for _ in range(epochs)]
    steps = torch.cat(orders).split(batch_size)
    variance = data.mean_and_variance()[1]
    adam = _make_optimizer(optimizer, lorsa, lr)
    schedule = get_lr_scheduler(
        "constant",
        optimizer=adam,
        training_steps=len(steps),
        lr=lr,
        warm_up_steps=len(steps) // 10,
        decay_steps=len(steps) // 5,
        lr_end=lr,
        num_cycles=1,
    )
    history: list[dict[str, float]] = []
    since, tokens = [], 0
    record_every = max(1, len(steps) // _HISTORY_POINTS)
    for step, rows in enumerate(tqdm(steps, unit="step", desc="Lorsa", disable=not progress), 1):
        x, y, kept = (t[rows].to(lorsa.W_V.device) for t in (data.x, data.y, data.kept))
        loss = (lorsa(x)[0] - y)[kept].square().sum(-1).mean() / variance
        if not loss.isfinite():
            raise SaesubError(f"the loss is {loss.item()} at step {step}: pass a smaller lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lorsa.parameters(), MAX_NORM)
        adam.step()
        adam.zero_grad()
        schedule.step()
        since.append(loss.detach())
        tokens += int(kept.sum())
        if step % record_every == 0:
            history.append({"tokens": tokens, "fvu": torch.stack(since).mean().item()})
            since = []
    return history


def _make_optimizer(name: str, lorsa: Lorsa, lr: float) -> torch.optim.Adam:
    if name == "adam":
        return torch.optim.Adam(lorsa.parameters(), lr=lr)
    if name != "sparse_adam":
        raise SaesubError(f"Unknown optimizer {name!r}: known {', '.join(get_args(OptimizerName))}")
    groups = [
        {"params": [parameter], "feature_axis": _FEATURE_AXIS.get(name)}
        for name, parameter in lorsa.named_parameters()
    ]
    return SparseAdam(groups, lr=lr)


@dataclass(frozen=True, eq=False)
class LorsaReport:
    """How well a Lorsa stands for its layer on `n_tokens` tokens it was not trained on.

    Attributes:
        fvu: Σ‖y − ŷ‖² / Σ‖y − mean(y)‖² over the tokens.
        l0: mean number of heads active at a token.
        dead: (n_heads,) bool: never active in these tokens, which are thus the window.
        n_tokens: kept tokens.
    """

    fvu: float
    l0: float
    dead: Bool[Tensor, " n_heads"]
    n_tokens: int

    @property
    def dead_share(self) -> float:
        """Share of heads that are dead."""
        return float(self.dead.float().mean())


@torch.no_grad()
def evaluate_lorsa(
    lorsa: Lorsa, held_out: AttentionSequences, *, batch_size: int = 4
) -> LorsaReport:
    """Error, active heads and dead heads over every kept token of `held_out`. Raises SaesubError
    for another width."""
    _check_width(lorsa, held_out)
    device = lorsa.W_V.device
    error, active, fired = 0.0, 0, torch.zeros(lorsa.cfg.n_heads, dtype=torch.bool, device=device)
    for x, y, kept in held_out.batches(batch_size):
        output, (heads, z) = lorsa(x.to(device))
        error += float((output - y.to(device))[kept].double().square().sum())
        writing = heads[kept][z[kept] > 0]
        active += len(writing)
        fired[writing] = True
    n = held_out.n_tokens
    fvu = error / (n * held_out.mean_and_variance()[1])
    return LorsaReport(fvu, active / n, ~fired, n)


def _check_width(lorsa: Lorsa, data: AttentionSequences) -> None:
    if data.x.shape[-1] != lorsa.cfg.d_model or data.y.shape != data.x.shape:
        raise SaesubError(
            f"this Lorsa reads and writes {lorsa.cfg.d_model} dimensions, the sequences hold "
            f"{tuple(data.x.shape)} and {tuple(data.y.shape)}: take them from the same model"
        )
