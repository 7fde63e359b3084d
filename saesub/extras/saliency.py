"""The decoder that turns a vision transformer's patches into a map of what in a picture matters."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SaliencyDecoder(nn.Module):
    """Three upsampling convolutions over the patches, and one value in [0, 1] for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        for i, (n_in, n_out) in enumerate([(384, 256), (256, 128), (128, 64)], 1):
            setattr(self, f"upconv{i}", nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1))
            setattr(self, f"bn{i}", nn.BatchNorm2d(n_out))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, states: Float[Tensor, "n pos 384"]) -> Float[Tensor, "n size size"]:
        """Maps of n square pictures, from the model's last hidden states, class token first."""
        patches = states[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        x = patches.transpose(1, 2).unflatten(2, (side, side))
        for i in (1, 2, 3):
            x = getattr(self, f"bn{i}")(getattr(self, f"upconv{i}")(x)).relu()
        x = nn.functional.interpolate(
            self.final_conv(x), size=(14 * side, 14 * side), mode="bilinear", align_corners=False
        )
        return torch.sigmoid(x[:, 0])
