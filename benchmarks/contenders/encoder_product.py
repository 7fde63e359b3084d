"""No trainer: the encoder's float32 product alone, a floor under every step that makes it whole."""

from __future__ import annotations

import harness
import torch
from torch import Tensor

CHUNK = 512  # tokens


def make(d_in: int, d_sae: int, k: int, batch: int, seed: int) -> harness.Step:
    """The pre-activations of x (batch, d_in), chunk by chunk into one buffer (CHUNK, d_sae)."""
    torch.manual_seed(seed)
    W_enc = torch.randn(d_in, d_sae) / d_in**0.5
    b_enc = torch.zeros(d_sae)
    buffer = torch.empty(min(CHUNK, batch), d_sae)

    def step(x: Tensor) -> None:
        for chunk in x.split(CHUNK):
            torch.addmm(b_enc, chunk, W_enc, out=buffer[: len(chunk)])

    return step


if __name__ == "__main__":
    harness.main("encoder-product", make)
