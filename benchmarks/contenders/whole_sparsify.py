"""EleutherAI's sparsify from text to a judged SAE: `chunk_and_tokenize`, then its `Trainer`.

Its trainer runs the whole model, logits included, whatever the hook point. It has no evaluation of
its own, so the shared judge stands in, on activations of a model that is stopped at the hook point.
"""

from __future__ import annotations

import os

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels need a GPU

from collections.abc import Iterator
from typing import Any

import torch
import whole
from datasets import Dataset
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from sparsify.data import chunk_and_tokenize
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

WARM_UP = 10  # steps; by default 1,000, which is more than the job has
CONTEXTS = 16  # of one forward pass in judging


class StopError(Exception):
    """Ends a forward pass at the hook point."""


def main() -> None:
    args = whole.job()
    clock = whole.Clock(args.started)
    model = AutoModelForCausalLM.from_pretrained(args.weights, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.weights)
    train, held_out = (whole.documents(args, name) for name in ("train", "held_out"))
    clock.lap("load")
    contexts = chunked(train, tokenizer, args).select(
        range(args.steps * args.batch // args.context)
    )
    clock.lap("activations")
    trainer = Trainer(config(args), contexts, model)
    forward, training = watch(model, site(model, args))
    trainer.fit()
    clock.lap("training", of_which={"activations": forward.seconds - training.seconds})
    (sae,) = trainer.saes.values()
    n_trained = trainer.global_step * args.batch

    def rebuild(x: Tensor) -> tuple[Tensor, Tensor]:
        values, features, _ = sae.encode(x)
        return sae.decode(values, features), features[values > 0]

    blocks = activations(model, chunked(held_out, tokenizer, args), args)
    judged = [whole.judge(blocks, rebuild, args.d_sae)]
    clock.lap("judging")
    whole.finish(args, clock, "eai-sparsify", n_trained, judged, [rebuild])


def chunked(texts: list[str], tokenizer: Any, args: Any) -> Dataset:
    """Contexts (context,), as `chunk_and_tokenize` makes them."""
    dataset = Dataset.from_dict({"text": texts})
    return chunk_and_tokenize(dataset, tokenizer, max_seq_len=args.context)


def config(args: Any) -> TrainConfig:
    """Its defaults but for the job, with Adam in place of signum."""
    return TrainConfig(
        SparseCoderConfig(num_latents=args.d_sae, k=args.k),
        batch_size=args.batch // args.context,
        optimizer="adam",
        lr=args.lr,
        lr_warmup_steps=WARM_UP,
        hookpoints=[place(args)],
        log_to_wandb=False,
        save_dir=args.out,
    )


def site(model: Any, args: Any) -> Any:
    return model.base_model.get_submodule(place(args))


def place(args: Any) -> str:
    return f"layers.{args.layer}.{args.site}"


def watch(model: Any, module: Any) -> tuple[whole.Timed, whole.Timed]:
    """Time the model's forward pass, and within it the hook in which the trainer trains."""
    forward = whole.Timed(model.forward)
    training, register = whole.Timed(None), module.register_forward_hook

    def registered(hook: Any) -> Any:
        training._inner = hook
        return register(lambda *given: training(*given))

    model.forward, module.register_forward_hook = forward, registered
    return forward, training


def activations(model: Any, contexts: Dataset, args: Any) -> Iterator[Tensor]:
    """Blocks (tokens, d_in) of the job's held-out tokens."""
    found: list[Tensor] = []

    def stop(module: Any, inputs: Any, outputs: Any) -> None:
        found.append(outputs.flatten(0, 1))
        raise StopError

    handle = torch.nn.Module.register_forward_hook(site(model, args), stop)
    ids = contexts.select(range(args.held_out // args.context))["input_ids"][:]
    for part in torch.as_tensor(ids).split(CONTEXTS):
        try:
            model(part)
        except StopError:
            yield found.pop()
    handle.remove()


if __name__ == "__main__":
    main()
