"""What an attention layer read and wrote on whole contexts, for Lorsa to learn from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesub.activations.checks import all_finite
from saesub.activations.tokens import kept_positions
from saesub.errors import SaesubError
from saesub.extras.lorsa.attention import check_layer, read_and_written
from saesub.loading.models import Model, load_model
from saesub.progress import bar


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
    check_layer(bridge, layer)
    shape = (*tokens.shape, bridge.cfg.d_model)
    x, y = torch.empty(shape, dtype=torch.float16), torch.empty(shape, dtype=torch.float16)
    starts = range(0, len(tokens), batch_size)
    for start in bar(starts, unit="batch", desc="activations", progress=progress):
        rows = slice(start, start + batch_size)
        batch = tokens[rows].to(bridge.cfg.device)
        x[rows], y[rows] = read_and_written(bridge, batch, layer)
    if not (all_finite(x) and all_finite(y)):
        raise SaesubError(f"layer {layer} reads or writes NaN, or values beyond float16's range")
    return AttentionSequences(x, y, kept_positions(bridge, tokens, skip_first))
