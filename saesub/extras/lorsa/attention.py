"""An attention layer of a model: its parts, and what it reads and writes on whole contexts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.checks import all_finite
from saesub.activations.tokens import kept_positions
from saesub.arguments import whole_number
from saesub.errors import SaesubError
from saesub.evaluation.passes import contexts_of
from saesub.loading.models import Model, in_eval_mode, load_model, model_name
from saesub.progress import bar

WHAT_FITS = "choose a layer with full rotary attention, as in the Llama and Qwen2 families"


def rotary_attention(bridge: TransformerBridge, layer: int) -> tuple[Any, tuple[float, ...]]:
    """A layer's attention, and the frequencies of its rotary embedding.

    Raises SaesubError for a layer that the model lacks, one whose positions are encoded in another
    way, or one that attends within a sliding window.
    """
    layer = check_layer(bridge, layer)
    attention: Any = bridge.blocks[layer].attn
    rotary: Any = getattr(bridge, "rotary_emb", None)
    frequencies = () if rotary is None else rotary.original_component.inv_freq.tolist()
    if rotary is None:
        reason = "has no rotary embedding"
    elif 2 * len(frequencies) != (d_head := attention.W_O.shape[1]):
        reason = f"rotates {2 * len(frequencies)} of the {d_head} dimensions of its heads"
    elif _has_window(bridge.original_model.config, layer):
        reason = "attends within a sliding window"
    else:
        return attention, tuple(frequencies)
    raise SaesubError(
        f"layer {layer} of {model_name(bridge)} {reason}, which Lorsa cannot do: {WHAT_FITS}."
    )


def check_layer(bridge: TransformerBridge, layer: int) -> int:
    """The layer. Raises SaesubError for one that the model lacks."""
    layer = whole_number(layer, "layer", 0)
    if not layer < bridge.cfg.n_layers:
        last = bridge.cfg.n_layers - 1
        raise SaesubError(f"{model_name(bridge)} has layers 0..{last}, not {layer}: choose one.")
    return layer


def _has_window(config: Any, layer: int) -> bool:
    kinds = getattr(config, "layer_types", None)
    windowed = kinds is None or kinds[layer] == "sliding_attention"
    return windowed and bool(getattr(config, "sliding_window", None))


@torch.no_grad()
def read_and_written(
    bridge: TransformerBridge, tokens: Int[Tensor, "batch pos"], layer: int
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]]:
    """What the layer's projections read (after its norm), and what the layer adds to the stream."""
    names = [f"blocks.{layer}.attn.hook_in", f"blocks.{layer}.hook_attn_out"]
    with in_eval_mode(bridge):
        _, cache = bridge.run_with_cache(tokens, names_filter=names, stop_at_layer=layer + 1)
    return cache[names[0]], cache[names[1]]


@dataclass(frozen=True, eq=False)
class AttentionSequences:
    """What an attention layer read and wrote on whole contexts.

    Attributes:
        x, y: (n_ctx, pos, d_model) float16, on the CPU.
        kept: (n_ctx, pos) bool: the positions whose output is trained on and evaluated, as
            `saesub.measure_spectrum` keeps them. The heads attend to the others too.
    """

    x: Float[Tensor, "n_ctx pos d_model"]
    y: Float[Tensor, "n_ctx pos d_model"]
    kept: Bool[Tensor, "n_ctx pos"]

    @property
    def n_tokens(self) -> int:
        """Number of kept positions."""
        return int(self.kept.sum())

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x, y, kept) of `size` contexts at a time, in order. Raises SaesubError for size < 1."""
        size = whole_number(size, "batch_size")
        yield from zip(*(t.split(size) for t in (self.x, self.y, self.kept)), strict=True)

    def mean_and_variance(self) -> tuple[Float[Tensor, " d_model"], float]:
        """Mean of the kept outputs, and their mean squared distance from it.

        Raises SaesubError if the outputs do not vary.
        """
        variances, mean = torch.var_mean(self.y[self.kept].float(), dim=0, correction=0)
        variance = variances.sum().item()
        if not variance > 0:
            raise SaesubError("the attention outputs do not vary: give more contexts.")
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

    Raises SaesubError for tokens of another shape, a layer that the model lacks, a batch_size below
    1, or values that float16 cannot hold.
    """
    bridge = load_model(model)
    layer, tokens = check_layer(bridge, layer), contexts_of(bridge, tokens)
    batch_size = whole_number(batch_size, "batch_size")
    x, y = torch.empty((2, *tokens.shape, bridge.cfg.d_model), dtype=torch.float16)
    kept = kept_positions(bridge, tokens, skip_first).cpu()
    firsts = range(0, len(tokens), batch_size)
    for first in bar(firsts, unit="batch", desc="activations", progress=progress):
        part = slice(first, first + batch_size)
        x[part], y[part] = read_and_written(bridge, tokens[part], layer)
    if not (all_finite(x) and all_finite(y)):
        raise SaesubError(
            f"layer {layer} reads or writes NaN, or values beyond float16's range: choose another."
        )
    return AttentionSequences(x, y, kept)
