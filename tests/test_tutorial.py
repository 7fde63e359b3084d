"""The training run of SAELens' tutorial with this package's two lines, evaluated by SAELens alone.

The settings are those of SAELens' `tutorials/training_a_sparse_autoencoder.ipynb`, for a smaller
dictionary and fewer tokens of a packaged model and corpus.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens.model_bridge import TransformerBridge

import saesub
from saesub.loading.models import _converted, context_tokens
from saesub.loading.registry import packaged

pytestmark = [pytest.mark.model, pytest.mark.slow]

HOOK, K = "blocks.0.hook_mlp_out", 16
STEPS, BATCH, CONTEXT, D_SAE = 80, 256, 64, 1152  # there 30_000, 4096, 512 and 16384
COMMON = {
    "d_in": 576,
    "d_sae": D_SAE,
    "apply_b_dec_to_input": False,
    "normalize_activations": "expected_average_only_in",
}


def tutorial_config(sae: Any, folder: Path) -> LanguageModelSAERunnerConfig[Any]:
    """Scaled down, with a rate for so few steps (there 5e-5), and no wandb."""
    return LanguageModelSAERunnerConfig(
        model_name="smollm2-135m",
        hook_name=HOOK,
        dataset_path="wiki-en",
        is_dataset_tokenized=False,
        streaming=True,
        sae=sae,
        lr=1e-3,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        lr_decay_steps=STEPS // 5,
        train_batch_size_tokens=BATCH,
        context_size=CONTEXT,
        n_batches_in_buffer=8,
        n_batches_for_norm_estimate=20,
        training_tokens=STEPS * BATCH,
        store_batch_size_prompts=16,
        feature_sampling_window=1000,
        dead_feature_window=1000,
        dead_feature_threshold=1e-4,
        logger=LoggingConfig(log_to_wandb=False),
        device="cpu",
        seed=42,
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=str(folder),
        dtype="float32",
        verbose=False,
    )


class Run(NamedTuple):
    """The SAE, what SAELens' evaluation found where saesub cannot be imported, and on which tokens:
    those of losses, then those of reconstruction."""

    sae: Any
    found: dict[str, Any]
    tokens: tuple[Tensor, Tensor]


@pytest.fixture(scope="module", params=["standard", "topk"])
def run(
    request: pytest.FixtureRequest,
    model: TransformerBridge,
    corpus: Dataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if request.param == "standard":
        settings = StandardTrainingSAEConfig(**COMMON, l1_coefficient=5, l1_warm_up_steps=4)
        sae: Any = StandardTrainingSAE(settings)
    else:
        settings = TopKTrainingSAEConfig(**COMMON, k=K)
        sae = saesub.SparseTopKTrainingSAE(settings)
    training, held_out = corpus.select(range(9000)), corpus.select(range(9000, 9200))
    spectrum = saesub.measure_spectrum(model, training, HOOK, n_tokens=6000, progress=False)
    saesub.initialize_in_subspace(sae, spectrum)
    sae = LanguageModelSAETrainingRunner(
        tutorial_config(settings, folder / "sae"),
        override_dataset=training,
        override_model=model,
        override_sae=sae,
    ).run()
    texts, tokens = folder / "texts.json", folder / "tokens.safetensors"
    texts.write_text(json.dumps(held_out["text"][:]))
    script = Path(__file__).with_name("evals_without_saesub.py")
    model_folder = _converted(packaged()["smollm2-135m"])
    command = [sys.executable, script, folder / "sae", model_folder, texts, tokens]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    of_losses, of_features = load_file(tokens)["tokens"].chunk(2)
    return Run(sae, json.loads(done.stdout.splitlines()[-1]), (of_losses, of_features))


def test_it_is_a_plain_sae_that_tells_how_it_started(run: Run) -> None:
    architecture = run.sae.cfg.architecture()
    assert run.found["class"] == {"standard": "StandardSAE", "topk": "TopKSAE"}[architecture]
    assert run.found["metadata"]["hook_name"] == HOOK
    assert 0 < run.found["metadata"]["subspace_init"]["d_init"] < 576


def test_saelens_measures_a_good_reconstruction_and_that_of_saesub(
    run: Run, model: TransformerBridge
) -> None:
    tokens = run.tokens[1]
    special = torch.tensor(context_tokens(model).special_ids)
    x = model.run_with_cache(tokens, names_filter=HOOK)[1][HOOK][~torch.isin(tokens, special)]
    found = saesub.reconstruction(run.sae, x, progress=False)
    measured = run.found["reconstruction_quality"]["explained_variance"]
    assert measured == pytest.approx(1 - found.fvu, abs=1e-3)
    assert measured > 0.5
    l0 = run.found["sparsity"]["l0"]
    assert l0 == pytest.approx(found.l0, rel=1e-3)
    if run.sae.cfg.architecture() == "topk":
        assert l0 == K
    dead = saesub.dead_features(run.sae, x, n_tokens=len(x), progress=False)
    assert run.found["dead"] == pytest.approx(int(dead.sum()), abs=3)
    assert run.found["dead"] < 0.5 * D_SAE


@torch.no_grad()
def test_saelens_measures_a_loss_far_below_ablation_and_that_by_hand(
    run: Run, model: TransformerBridge
) -> None:
    losses = run.found["model_performance_preservation"]
    assert 0.6 < losses["ce_loss_score"] < 1
    tokens = run.tokens[0]
    kept = ~torch.isin(tokens, torch.tensor(context_tokens(model).special_ids))

    def put_in(x: Tensor, hook: Any) -> Tensor:
        return torch.where(kept[..., None], run.sae.decode(run.sae.encode(x)), x)

    logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, put_in)])[:, :-1][kept[:, :-1]]
    by_hand = cross_entropy(logits, tokens[:, 1:][kept[:, :-1]]).item()
    assert losses["ce_loss_with_sae"] == pytest.approx(by_hand, abs=1e-2)
    # sae_loss starts contexts with the separator that this model was trained with.
    found = saesub.sae_loss(model, run.sae, tokens)
    assert losses["ce_loss_score"] == pytest.approx(found.recovered, abs=0.05)
