"""The first layers of the packaged model: what a pass over the later ones has no need of."""

from __future__ import annotations

from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from saesub.loading.models import _converted, load_model
from saesub.loading.registry import packaged


def first_layers(n: int) -> TransformerBridge:
    """SmolLM2-135M without the layers after the first `n`."""
    folder = _converted(packaged()["smollm2-135m"])
    hf_model = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=n)
    return load_model((hf_model, AutoTokenizer.from_pretrained(folder)), device="cpu")
