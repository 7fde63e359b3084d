"""SAELens from text to a judged SAE: `LanguageModelSAETrainingRunner`, then its `run_evals`.

`--fast` takes its sparse features, without decoder norms in the ranking, since with them this mode
fails on a CPU. `--runs 2` trains and judges two SAEs, one after the other.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
import whole
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saesub.loading.models import load_model

PROMPTS = 8  # contexts of one batch of the evaluation, which takes it as a dense tensor


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--runs", type=int, default=1)
    args = whole.job(parser)
    clock = whole.Clock(args.started)
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    model = load_model(args.model)
    train, held_out = (
        Dataset.from_dict({"text": whole.documents(args, name)}) for name in ("train", "held_out")
    )
    clock.lap("load")
    judged, rebuilds, n_trained = [], [], 0
    for run in range(args.runs):
        cfg = config(args, seed=run)
        runner = LanguageModelSAETrainingRunner(cfg, train, model)
        batches: Any = whole.Timed(runner.activations_store)
        runner.activations_store = batches
        sae = runner.run()
        clock.lap("training", of_which={"activations": batches.seconds})
        n_trained += batches.n_tokens - whole.NORM_BATCHES * args.batch
        judged.append(evaluated(sae, model, cfg, held_out, args))
        clock.lap("judging")
        rebuilds.append(rebuilder(sae))
    whole.finish(args, clock, "sae-lens", n_trained, judged, rebuilds)


def config(args: argparse.Namespace, seed: int) -> LanguageModelSAERunnerConfig[Any]:
    """The runner's defaults but for the job; it evaluates as it goes only for wandb's log."""
    sparse = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
    torch.manual_seed(seed)
    return LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(
            d_in=args.d_in,
            d_sae=args.d_sae,
            k=args.k,
            normalize_activations="expected_average_only_in",
            **(sparse if args.fast else {}),
        ),
        n_batches_for_norm_estimate=whole.NORM_BATCHES,
        hook_name=f"blocks.{args.layer}.hook_attn_out",
        is_dataset_tokenized=False,
        context_size=args.context,
        prepend_bos=args.bos is not None,
        sequence_separator_token=args.separator,
        training_tokens=args.steps * args.batch,
        train_batch_size_tokens=args.batch,
        lr=args.lr,
        seed=seed,
        checkpoint_path=None,
        output_path=args.out,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )


def evaluated(
    sae: Any,
    model: TransformerBridge,
    cfg: LanguageModelSAERunnerConfig[Any],
    held_out: Dataset,
    args: argparse.Namespace,
) -> dict[str, float]:
    """SAELens' own explained variance and densities over the held-out text."""
    wanted = EvalConfig(
        batch_size_prompts=PROMPTS,
        n_eval_sparsity_variance_batches=args.held_out // (PROMPTS * args.context),
        compute_variance_metrics=True,
        compute_sparsity_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    store = ActivationsStore.from_config(model, cfg, override_dataset=held_out)
    found, features = run_evals(sae, store, model, ActivationScaler(), wanted)
    density = torch.tensor(features["feature_density"])
    return {
        "fvu": 1 - found["reconstruction_quality"]["explained_variance"],
        "dead_share": float((density == 0).float().mean()),
        "n_tokens": wanted.n_eval_sparsity_variance_batches * PROMPTS * args.context,
    }


def rebuilder(sae: Any) -> whole.Rebuild:
    def rebuild(x: Tensor) -> tuple[Tensor, Tensor]:
        features = sae.encode(x)
        features = features.to_dense() if features.is_sparse else features
        return sae.decode(features), features.any(0).nonzero()

    return rebuild


if __name__ == "__main__":
    main()
