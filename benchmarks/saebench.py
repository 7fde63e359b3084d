"""SAEBench on an SAE that was trained and saved here: three of its evaluations, offline.

SAEBench pins older versions than the lock, so it runs in an environment of its own, made of the
lock and of its source without what it pins:

    python -m venv build/saebench
    build/saebench/bin/pip install torch==2.13.0
    build/saebench/bin/pip install -r requirements.lock tabulate
    build/saebench/bin/pip install --no-deps -e . sae-bench==0.6.0
    JAXTYPING_DISABLE=1 build/saebench/bin/python benchmarks/saebench.py

Writes results/saebench.json, in about half an hour. The loaded SAE is SAELens' own, read from
disk; the model, the contexts and the texts of the probe are handed to SAEBench's functions, which
would fetch theirs from a hub. Beside its figures stand those that saesub measures.
"""

from __future__ import annotations

import copy
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig
from sae_bench.evals.meta_structure.main import run_eval_single_sae
from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens import SAE, ActivationsStore, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

import saesub
from saesub.evaluation.probing import mean_features, probe_tasks
from saesub.reproduce.report import run_facts

HOOK, CONTEXT, BATCH = "blocks.12.hook_attn_out", 128, 8
N_TOKENS, N_TRAIN, D_SAE, K = 30_000, 90_000, 4096, 32
N_TEXTS, K_PROBE = 200, 5
RESULT = Path(__file__).with_name("results") / "saebench.json"


def trained(model: Any, folder: Path) -> None:
    """A TopK SAE with a start in the subspace, trained for three epochs, saved to `folder`."""
    store = saesub.harvest(model, "wiki-en", [HOOK], folder / "store", n_tokens=N_TOKENS)[HOOK]
    metadata = {"hook_name": HOOK, "model": "smollm2-135m"}
    spectrum = saesub.Spectrum.from_activations(store.rows(0, N_TOKENS), metadata)
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=spectrum.d, d_sae=D_SAE, k=K))
    saesub.initialize_in_subspace(sae, spectrum)
    cfg = SAETrainerConfig(
        total_training_samples=N_TRAIN, train_batch_size_samples=1024, lr=2e-3, device="cpu"
    )
    saesub.SubspaceSAETrainer(cfg, sae, store.batches(1024, seed=0)).fit().save_model(folder)


def core(model: Any, sae: SAE[Any], tokens: torch.Tensor) -> dict[str, Any]:
    """SAEBench's core metrics, and what saesub says of the same tokens."""
    sae = copy.deepcopy(sae)
    sae.cfg.metadata.prepend_bos = False  # SAELens' store asks, though the tokens have decided it
    contexts = ActivationsStore.from_sae(
        model,
        sae,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        context_size=CONTEXT,
        store_batch_size_prompts=BATCH,
        streaming=False,
    )
    n_batches = len(tokens) // BATCH
    config = CoreEvalConfig(
        batch_size_prompts=BATCH,
        n_eval_reconstruction_batches=n_batches,
        n_eval_sparsity_variance_batches=n_batches,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    metrics, _ = run_evals(sae, contexts, model, config)
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    ours = saesub.reconstruction(sae, cache[HOOK].flatten(0, 1).split(1024))
    return {"saebench": metrics, "saesub": {"fvu": ours.fvu, "l0": ours.l0}}


def meta_structure(sae: SAE[Any]) -> dict[str, Any]:
    """How well a small SAE of the decoder's rows explains them; SAEBench's defaults."""
    config = MetaStructureEvalConfig(autocast=False)
    result = run_eval_single_sae("saesub", "saved", sae, config, "cpu")
    found = result.eval_result_metrics.meta_structure
    return {
        "decoder_fraction_variance_explained": found.decoder_fraction_variance_explained,
        "final_reconstruction_mse": found.final_reconstruction_mse,
        "train_steps": config.train_steps,
    }


def sparse_probing(model: Any, sae: SAE[Any]) -> dict[str, Any]:
    """Accuracy of a probe on a few features that tells articles from recipes."""
    texts = {
        name: saesub.load_corpus(name, n_documents=N_TEXTS)["text"]
        for name in ("wiki-en", "recipes-en")
    }
    features = {
        name: mean_features(model, list(given), HOOK, {"sae": sae})["sae"]
        for name, given in texts.items()
    }
    test = N_TEXTS // 4
    halves = [slice(0, N_TEXTS - test), slice(N_TEXTS - test, N_TEXTS)]
    given = [{name: rows[half] for name, rows in features.items()} for half in halves]
    _, accuracy = train_probe_on_activations(*given, select_top_k=K_PROBE)
    ours = probe_tasks(features, {"corpus": ("wiki-en", "recipes-en")}, [K_PROBE])
    return {"k": K_PROBE, "saebench": accuracy, "saesub": float(ours["accuracy"].iloc[0])}


def main() -> None:
    model = saesub.load_model("smollm2-135m", device="cpu")
    corpus = saesub.load_corpus("wiki-en")
    last = corpus.select(range(len(corpus) - 300, len(corpus)))  # training does not reach them
    tokens = saesub.pack_contexts(model, last, n_contexts=4 * BATCH, context_size=CONTEXT)
    with tempfile.TemporaryDirectory() as place:
        trained(model, Path(place))
        sae: SAE[Any] = SAE.load_from_disk(place)
    load_and_format_sae("saesub", sae, "cpu")  # SAEBench's own preparation
    record = {
        "command": "JAXTYPING_DISABLE=1 python benchmarks/saebench.py",
        "run": run_facts(),
        "sae-bench": version("sae-bench"),
        "sae": sae.cfg.metadata.to_dict() | {"architecture": sae.cfg.architecture()},
        "core": core(model, sae, tokens),
        "meta_structure": meta_structure(sae),
        "sparse_probing": sparse_probing(model, sae),
    }
    RESULT.write_text(json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
