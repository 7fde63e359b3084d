"""A script for tests/test_tutorial.py: SAELens' evaluation of a saved SAE, saesub out of reach.

Usage: evals_without_saesub.py SAE_FOLDER MODEL_FOLDER TEXTS TOKENS; TEXTS is a JSON list. It prints
a JSON object of the metrics, and writes to TOKENS which tokens they were measured on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore, run_evals
from sae_lens.evals import get_eval_everything_config
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from without_saesub import hooked  # which hides saesub

BATCHES, PROMPTS, CONTEXT = 2, 4, 64


@torch.no_grad()
def main(sae_folder: str, model_folder: str, texts: str, tokens_file: str) -> None:
    sae = SAE.load_from_disk(sae_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    hf_model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager"
    )
    model = hooked(hf_model, tokenizer)
    dataset = Dataset.from_dict({"text": json.loads(Path(texts).read_text())})
    store = ActivationsStore.from_sae(model, sae, dataset, context_size=CONTEXT, streaming=False)
    given, seen = store.get_batch_tokens, []

    def noted(*arguments: Any) -> Tensor:
        seen.append(given(*arguments))
        return seen[-1]

    store.get_batch_tokens = noted
    config = get_eval_everything_config(PROMPTS, BATCHES, BATCHES)
    metrics, of_features = run_evals(sae, store, model, ActivationScaler(), config)
    save_file({"tokens": torch.cat(seen)}, tokens_file)
    found = {"class": type(sae).__name__, "metadata": sae.cfg.metadata.to_dict()}
    found["dead"] = of_features["feature_density"].count(0)
    print(json.dumps(found | metrics))


if __name__ == "__main__":
    main(*sys.argv[1:])
