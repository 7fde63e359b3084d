"""An SAE trained here is SAELens': it loads, runs and is spliced in where saesub is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from transformer_lens.model_bridge import TransformerBridge

import saesub
from saesub.loading.models import _converted
from saesub.loading.registry import packaged

pytestmark = pytest.mark.model
HOOK = "blocks.4.hook_attn_out"
TEXT = (
    "The river rises in the hills above the old town and runs west for ninety miles to the sea. "
    "Its valley was settled early, and the bridges that cross it are among the oldest in the land."
)


@pytest.fixture(scope="module")
def trained(
    model: TransformerBridge, corpus: Dataset, activations: torch.Tensor
) -> TopKTrainingSAE:
    """60 steps at real attention outputs, from a start in the subspace."""
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=1024, k=16))
    spectrum = saesub.measure_spectrum(model, corpus, HOOK, n_tokens=4000, progress=False)
    saesub.initialize_in_subspace(sae, spectrum)
    cfg = SAETrainerConfig(
        total_training_samples=60 * 256, train_batch_size_samples=256, lr=1e-3, device="cpu"
    )
    batches = (activations[torch.randperm(4000)[:256]] for _ in range(60))
    return saesub.SubspaceSAETrainer(cfg, sae, batches).fit()


@pytest.fixture(scope="module")
def found(trained: TopKTrainingSAE, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that cannot import saesub finds in the saved SAE."""
    folder = tmp_path_factory.mktemp("saved")
    trained.save_model(folder)
    script = Path(__file__).with_name("without_saesub.py")
    command = [
        sys.executable,
        str(script),
        str(folder),
        str(_converted(packaged()["smollm2-135m"])),
    ]
    done = subprocess.run([*command, TEXT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_metadata_are_read_back(trained: TopKTrainingSAE, found: dict[str, Any]) -> None:
    assert found["class"] == "TopKSAE"
    assert found["metadata"] == trained.cfg.metadata.to_dict()
    assert found["metadata"]["hook_name"] == HOOK
    assert found["metadata"]["subspace_init"]["d_init"] < 576
    assert found["metadata"]["optimizer"] == "sparse_adam"


@pytest.mark.parametrize("model_class", ["bridge", "hooked"])
def test_it_is_spliced_into_saelens_models(
    model: TransformerBridge, trained: TopKTrainingSAE, found: dict[str, Any], model_class: str
) -> None:
    """Reconstruction and logits are those of the file's tensors by hand; L0 is that seen here."""
    assert model.tokenizer is not None
    tokens = model.tokenizer(TEXT, return_tensors="pt").input_ids[:, :64]
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    features = trained.encode(cache[HOOK]).to_dense()
    l0 = (features != 0).sum(-1).float().mean().item()
    there = found[model_class]
    assert there["l0"] == pytest.approx(l0, abs=0.05)
    assert there["reconstruction"] < 1e-4
    assert there["logits"] < 1e-2
    assert there["change"] > 1
    assert there["with_error_term"] < 1e-2
    assert there["after"] == 0
    assert found["models_apart"] < 1e-2
