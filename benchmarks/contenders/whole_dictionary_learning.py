"""dictionary_learning from text to a judged SAE: its `ActivationBuffer`, `trainSAE`, `evaluate`.

The buffer takes texts one by one, cuts each at the length of a context and pads it, so that its
contexts are single documents. nnsight 0.3 does not load these models, so it is given live ones.
"""

from __future__ import annotations

from functools import reduce
from itertools import islice
from typing import Any

import torch
import whole
from dictionary_learning import ActivationBuffer
from dictionary_learning.evaluation import evaluate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from nnsight import LanguageModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

WARM_UP = 10  # steps; by default 1,000, which is more than the job has
CONTEXTS = 80  # of the buffer; by default 30,000, which is more tokens than the job has
BATCH_SIZE = 32  # texts of one forward pass; by default 512


def main() -> None:
    args = whole.job()
    clock = whole.Clock(args.started)
    tokenizer = AutoTokenizer.from_pretrained(args.weights)
    live = AutoModelForCausalLM.from_pretrained(args.weights, dtype=torch.float32)
    model = LanguageModel(live, tokenizer=tokenizer)
    train, held_out = (whole.documents(args, name) for name in ("train", "held_out"))
    clock.lap("load")
    trainers: list[TopKTrainer] = []

    def kept(**settings: Any) -> TopKTrainer:  # `trainSAE` gives back no trainer
        trainers.append(TopKTrainer(**settings))
        return trainers[-1]

    batches = whole.Timed(buffer(model, train, args))
    trainSAE(
        islice(batches, args.steps),
        [config(args) | {"trainer": kept}],
        args.steps,
        device="cpu",
        save_dir=args.out,
    )
    clock.lap("training", of_which={"activations": batches.seconds})
    ae = trainers[0].ae
    n_batches = args.held_out // args.batch
    blocks = (x for x in buffer(model, held_out, args))
    found = evaluate(ae, blocks, n_batches=n_batches)
    judged = {
        "fvu": 1 - found["frac_variance_explained"],
        "dead_share": 1 - found["frac_alive"],
        "n_tokens": n_batches * args.batch,
    }
    clock.lap("judging")

    def rebuild(x: Tensor) -> tuple[Tensor, Tensor]:
        rebuilt, features = ae(x, output_features=True)
        return rebuilt, features.any(0).nonzero()

    whole.finish(args, clock, "dictionary-learning", batches.n_tokens, [judged], [rebuild])


def config(args: Any) -> dict[str, Any]:
    """Its defaults but for the job."""
    return {
        "steps": args.steps,
        "activation_dim": args.d_in,
        "dict_size": args.d_sae,
        "k": args.k,
        "layer": args.layer,
        "lm_name": args.model,
        "lr": args.lr,
        "warmup_steps": WARM_UP,
        "device": "cpu",
        "seed": 0,
    }


def buffer(model: LanguageModel, texts: list[str], args: Any) -> ActivationBuffer:
    """Batches (batch, d_in) of the activations of texts, each cut after one context."""
    return ActivationBuffer(
        iter(texts),
        model,
        reduce(getattr, args.site.split("."), model.model.layers[args.layer]),
        d_submodule=args.d_in,
        n_ctxs=CONTEXTS,
        ctx_len=args.context,
        refresh_batch_size=BATCH_SIZE,
        out_batch_size=args.batch,
    )


if __name__ == "__main__":
    main()
