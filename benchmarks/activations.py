"""Real activations to time on: the attention output of SmolLM2-135M's layer 12, scaled.

python benchmarks/activations.py OUT.npy --tokens 32768
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch

from saesub.activations.collect import stream_activations

MODEL, CORPUS, HOOK = "smollm2-135m", "wiki-en", "blocks.12.hook_attn_out"


def write_activations(path: Path, n_tokens: int) -> None:
    """Write (n_tokens, d_in) float32, not centred, scaled to a mean norm of sqrt(d_in)."""
    rows = [part[HOOK] for part in stream_activations(MODEL, CORPUS, [HOOK], n_tokens=n_tokens)]
    x = torch.cat(rows).float().cpu()
    x *= x.shape[1] ** 0.5 / x.norm(dim=1).mean()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, x.numpy())
    os.replace(partial, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=32768)
    args = parser.parse_args()
    write_activations(args.out, args.tokens)
