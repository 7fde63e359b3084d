"""A script for tests/test_ecosystem.py: a saved SAE in SAELens alone, saesub out of reach.

Usage: without_saesub.py SAE_FOLDER MODEL_FOLDER TEXT; prints a JSON object of what it found.
"""

from __future__ import annotations

import json
import sys

sys.modules["saesub"] = None  # any import of it now fails  # type: ignore[assignment]

import torch
from sae_lens import SAE, HookedSAETransformer, SAETransformerBridge
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import AutoModelForCausalLM, AutoTokenizer


def by_hand(folder: str, k: int, x: Tensor) -> Tensor:
    """(..., d_in) -> (..., d_in): a TopK SAE out of the file's tensors and no library's code.

    It ranks by activation times decoder norm (`rescale_acts_by_decoder_norm`, SAELens' default).
    """
    w = load_file(f"{folder}/sae_weights.safetensors")
    norms = w["W_dec"].norm(dim=-1)
    pre = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
    top = pre.relu().topk(k, dim=-1)
    features = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    return features / norms @ w["W_dec"] + w["b_dec"]


def hooked(hf_model: AutoModelForCausalLM, tokenizer: AutoTokenizer) -> HookedSAETransformer:
    """TransformerLens' older class, configured by hand: its table of models lacks this one."""
    c = hf_model.config
    cfg = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=512,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn=c.hidden_act,
        eps=c.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=c.head_dim,
        rotary_base=c.rope_parameters["rope_theta"],
        original_architecture="LlamaForCausalLM",
        default_prepend_bos=False,
        dtype=torch.float32,
        device="cpu",
    )
    model = HookedSAETransformer(cfg, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        convert_llama_weights(hf_model, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


def spliced(model, hook_name: str, sae: SAE, folder: str, tokens: Tensor) -> dict[str, float]:
    """Largest differences between the model with the SAE spliced in and the sum done by hand.

    `hook_name` is the model's own name for the SAE's hook point: SAETransformerBridge takes the
    usual one when an SAE is added, but `run_with_hooks` passes over it in silence.
    """
    replaced = []

    def replace(x, hook):
        replaced.append(by_hand(folder, sae.cfg.k, x))
        return replaced[0]

    expected = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, replace)])
    plain = model(tokens)
    with model.saes(saes=[sae]):
        logits, cache = model.run_with_cache(tokens)
    names = [n for n in cache if n.endswith("hook_sae_output")]
    features = next(cache[n] for n in cache if n.endswith("hook_sae_acts_post"))
    features = features.to_dense() if features.is_sparse else features
    with model.saes(saes=[sae], use_error_term=True):
        with_error = model(tokens)
    return {
        "reconstruction": (cache[names[0]] - replaced[0]).abs().max().item(),
        "logits": (logits - expected).abs().max().item(),
        "change": (logits - plain).abs().max().item(),
        "with_error_term": (with_error - plain).abs().max().item(),
        "after": (model(tokens) - plain).abs().max().item(),
        "l0": (features != 0).sum(-1).float().mean().item(),
    }


@torch.no_grad()
def main(sae_folder: str, model_folder: str, text: str) -> None:
    sae = SAE.load_from_disk(sae_folder)
    hf_model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :64]
    bridge = SAETransformerBridge.boot_transformers(
        model_folder, hf_model=hf_model, tokenizer=tokenizer, dtype=torch.float32
    )
    older = hooked(hf_model, tokenizer)
    found = {
        "class": type(sae).__name__,
        "metadata": sae.cfg.metadata.to_dict(),
        "bridge": spliced(bridge, "blocks.4.attn.hook_out", sae, sae_folder, tokens),
        "hooked": spliced(older, "blocks.4.hook_attn_out", sae, sae_folder, tokens),
        "models_apart": (older(tokens) - bridge(tokens)).abs().max().item(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
