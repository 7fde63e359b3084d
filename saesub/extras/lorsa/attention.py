"""One attention layer of a model: its parts, if it is a plain rotary attention, and what it reads
and writes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saesub.errors import SaesubError
from saesub.loading.models import model_name


def check_layer(bridge: TransformerBridge, layer: int) -> None:
    """Raises SaesubError for a layer that the model lacks."""
    if not 0 <= layer < bridge.cfg.n_layers:
        last = bridge.cfg.n_layers - 1
        raise SaesubError(f"{model_name(bridge)} has layers 0..{last}, not {layer}")


def rotary_attention(bridge: TransformerBridge, layer: int) -> tuple[Any, tuple[float, ...]]:
    """A layer's attention, and the frequencies of its rotary embedding.

    Raises SaesubError where the layer's positions are of another kind, or its window slides.
    """
    check_layer(bridge, layer)
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


@torch.no_grad()
def read_and_written(
    bridge: TransformerBridge, tokens: Int[Tensor, "batch pos"], layer: int
) -> tuple[Tensor, Tensor]:
    """What the layer's projections read (after its norm), and what the layer adds to the stream."""
    names = [f"blocks.{layer}.attn.hook_in", f"blocks.{layer}.hook_attn_out"]
    stop = layer + 1 if layer + 1 < bridge.cfg.n_layers else None
    _, cache = bridge.run_with_cache(tokens, names_filter=names, stop_at_layer=stop)
    return cache[names[0]], cache[names[1]]
