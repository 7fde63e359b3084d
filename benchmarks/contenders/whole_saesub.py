"""saesub from text to a judged SAE: one harvest, its spectrum, an SAE for each initialisation."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import whole
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor

import saesub
from saesub.activations.collect import harvest, stream_activations
from saesub.evaluation.held_out import judge
from saesub.training.trainer import SubspaceSAETrainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--initialisations", nargs="+", choices=("random", "asi"), default=["asi"])
    args = whole.job(parser)
    clock = whole.Clock(args.started)
    model = saesub.load_model(args.model)
    train, held_out = (whole.documents(args, name) for name in ("train", "held_out"))
    hook, settings = f"blocks.{args.layer}.hook_attn_out", {"context_size": args.context}
    clock.lap("load")
    n_tokens = args.steps * args.batch
    store = harvest(
        model, train, [hook], args.out, n_tokens=n_tokens, dtype=torch.float32, **settings
    )[hook]
    clock.lap("activations")
    spectrum = saesub.Spectrum.from_activations(store.rows(0, n_tokens), {"hook_name": hook})
    clock.lap("initialisation")
    saes, n_trained, judged = [], 0, []
    for name in args.initialisations:
        sae = initialised(args, spectrum, name)
        clock.lap("initialisation")
        batches = whole.Timed(
            store.batches(args.batch, seed=0, stop=args.steps + whole.NORM_BATCHES)
        )
        SubspaceSAETrainer(recipe(args), sae, batches).fit()
        sae.save_inference_model(args.out)
        n_trained += batches.n_tokens - whole.NORM_BATCHES * args.batch
        saes.append(sae)
        clock.lap("training", of_which={"activations": batches.seconds})
    n = args.held_out
    blocks = [x[hook] for x in stream_activations(model, held_out, [hook], n_tokens=n, **settings)]
    for sae in saes:
        said = judge(sae, blocks, n_tokens=n)
        dead_share = float((said.counts == 0).float().mean())
        judged.append({"fvu": said.fvu, "dead_share": dead_share, "n_tokens": said.n_tokens})
    clock.lap("judging")
    whole.finish(args, clock, "saesub", n_trained, judged, [rebuilder(sae) for sae in saes])


def initialised(args: argparse.Namespace, spectrum: Any, name: str) -> TopKTrainingSAE:
    """In the active subspace, or at random with the same biases and a norm that is fitted too."""
    torch.manual_seed(0)
    cfg = TopKTrainingSAEConfig(
        d_in=args.d_in,
        d_sae=args.d_sae,
        k=args.k,
        normalize_activations="expected_average_only_in",
    )
    sae = TopKTrainingSAE(cfg)
    if name == "asi":
        saesub.initialize_in_subspace(sae, spectrum)
    else:
        saesub.center_biases(sae, spectrum)
        saesub.fit_norm(sae, spectrum)
    return sae


def recipe(args: argparse.Namespace) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=args.steps * args.batch,
        train_batch_size_samples=args.batch,
        lr=args.lr,
        n_batches_for_norm_estimate=whole.NORM_BATCHES,
    )


def rebuilder(sae: Any) -> whole.Rebuild:
    def rebuild(x: Tensor) -> tuple[Tensor, Tensor]:
        features = sae.encode(x)
        return sae.decode(features), features.any(0).nonzero()

    return rebuild


if __name__ == "__main__":
    main()
