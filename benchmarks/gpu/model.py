"""SmolLM2-135M as far as the attention output of layer 12, as a plain model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import container
import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

LAYER = 12
HOOK = f"blocks.{LAYER}.hook_attn_out"
MOST_ERROR = 1e-4  # of one position's activations by the package, relative
_CONFIG: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYER + 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 9.999999747378752e-06,
    "rope_parameters": {"rope_theta": 100_000.0, "rope_type": "default"},
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


class AttentionOutput(nn.Module):
    """Token numbers (contexts, pos) to attention outputs of layer 12 (contexts, pos, 576), float32.

    The embeddings are those of the tokens in the load's texts alone; a token's number is its row
    there.
    """

    def __init__(self, path: Path, device: torch.device | str) -> None:
        super().__init__()
        weights = {name: torch.from_numpy(w) for name, w in container.read(path).items()}
        rows = len(weights["embed_tokens.weight"])
        self.model: Any = LlamaModel(LlamaConfig(vocab_size=rows, **_CONFIG))
        last = self.model.layers[LAYER]
        last.mlp = last.post_attention_layernorm = self.model.norm = nn.Identity()  # never read
        self.model.load_state_dict(weights)
        self.model.to(device).eval().requires_grad_(False)
        self._found: Tensor | None = None
        last.self_attn.o_proj.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._found = output

    @torch.inference_mode()
    def forward(self, tokens: Tensor) -> Tensor:
        self.model(tokens, use_cache=False)
        found, self._found = self._found, None
        assert found is not None
        return found


def largest_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest ‖difference‖ / ‖expected‖ of any position."""
    difference = np.linalg.norm(found - expected, axis=-1)
    return float((difference / np.linalg.norm(expected, axis=-1)).max())
