"""A time-series model without attention: the encoder of Fracast-0, in plain torch.

Every stage mixes time by one causal convolution for each channel, projects the result, and applies
a gated MLP, in post-norm residual blocks (github.com/ztxtech/fracast-0). All stages share their
weights and differ in the convolution's dilation, which doubles from 1, and in a scale and shift of
their input that depends on it. Here each stage has a copy of the weights, so that a hook reads one
stage.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor, nn

CONTEXT = 2048
"""Values that the model reads at once."""
_WIDTH, _N_STAGES, _KERNEL, _N_PERIODS = 64, 10, 3, 4
_SIGNIFICANCE = 0.05


class Stage(nn.Module):
    """One dilation: convolution over time (`mix`), its projection (`pw`), and the MLP's `down`."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.to_gb = nn.Linear(8, 2 * _WIDTH)
        self.mix = nn.Conv1d(_WIDTH, _WIDTH, _KERNEL, dilation=dilation, groups=_WIDTH)
        self.pw = nn.Linear(_WIDTH, _WIDTH)
        self.up = nn.Linear(_WIDTH, 2 * 96)
        self.down = nn.Linear(96, _WIDTH)
        self.norm1 = nn.RMSNorm(_WIDTH)
        self.norm2 = nn.RMSNorm(_WIDTH)

    def forward(self, x: Float[Tensor, "n pos 64"]) -> Float[Tensor, "n pos 64"]:
        angle = math.pi * math.log2(self.dilation) / 2 ** torch.arange(4, device=x.device)
        scale, shift = self.to_gb(torch.cat([angle.sin(), angle.cos()])).chunk(2)
        x = x * (1 + scale) + shift
        past = nn.functional.pad(x.transpose(1, 2), ((_KERNEL - 1) * self.dilation, 0))
        x = self.norm1(x + self.pw(self.mix(past).transpose(1, 2)))
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.norm2(x + self.down(nn.functional.silu(gate) * value))


class Fracast(nn.Module):
    """Series as states: (n, 2048) values to (n, 2048, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(2 + 5, _WIDTH)
        self.periods = nn.Linear(2 * _N_PERIODS, _WIDTH)
        self.stages = nn.ModuleList(Stage(2**i) for i in range(_N_STAGES))
        self.norm = nn.RMSNorm(_WIDTH)

    @classmethod
    def from_file(cls, path: Path) -> Fracast:
        """The encoder of a released file; its forecasting head is left out."""
        given = {name: v for name, v in load_file(path).items() if name.startswith("core.")}
        state: dict[str, Tensor] = {}
        for name, value in given.items():
            name = name.removeprefix("core.").replace("periodic.proj", "periods")
            name = name.replace("dw_", "mix.").replace("ffn.", "").replace("scale.", "block.")
            for i in range(_N_STAGES if name.startswith("block.") else 1):
                state[name.replace("block.", f"stages.{i}.")] = value
        model = cls()
        model.load_state_dict(state)
        return model

    def forward(
        self, values: Float[Tensor, "n pos"], observed: Bool[Tensor, "n pos"]
    ) -> Float[Tensor, "n pos 64"]:
        """The last states. Series are scaled to [0, 1] over what is observed, the latest value at
        the end."""
        values = torch.where(observed, values, 0)
        age = torch.arange(1 - values.shape[1], 1, device=values.device) / values.shape[1]
        past = -age
        recency = [
            age,
            -past.log1p() / math.log(2),
            *((-rate * past).exp() for rate in (0.5, 2, 8)),
        ]
        features = [values, observed.float(), *(r.expand_as(values) for r in recency)]
        x = self.in_proj(torch.stack(features, dim=-1)) + self.periods(phases(values, observed))
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)


def phases(
    values: Float[Tensor, "n pos"], observed: Bool[Tensor, "n pos"]
) -> Float[Tensor, "n pos 8"]:
    """Sine and cosine of each position within the four strongest periods; zero for those missing.

    A period is a local maximum of the periodogram that white noise would reach in one series of
    twenty (the largest share of n equal bins, corrected for their number).
    """
    n_pos = values.shape[1]
    mean = (values * observed).sum(1, keepdim=True) / observed.sum(1, keepdim=True).clamp(min=1)
    filled = torch.where(observed, values, mean)
    power = torch.fft.rfft(filled - filled.mean(1, keepdim=True)).abs().square()[:, 1:]
    share = power / power.sum(1, keepdim=True).clamp(min=1e-12)
    n_bins = share.shape[1]
    peak = torch.zeros_like(share, dtype=torch.bool)
    peak[:, 1:-1] = (share[:, 1:-1] > share[:, :-2]) & (share[:, 1:-1] > share[:, 2:])
    peak &= share >= math.log(n_bins / _SIGNIFICANCE) / n_bins
    strength, bins = torch.where(peak, share, -1).topk(_N_PERIODS, dim=1)
    period = (n_pos / (bins + 1)).round()
    position = torch.arange(n_pos, device=values.device)[None, :, None]
    angle = 2 * math.pi * position / period[:, None]
    pair = torch.stack([angle.sin(), angle.cos()], dim=-1) * (strength > 0)[:, None, :, None]
    return pair.flatten(2)
