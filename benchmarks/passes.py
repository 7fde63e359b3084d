"""What a pass costs: through the bridge, without it, its matrix products alone, and whole calls.

    python benchmarks/passes.py            # writes results/passes.json, some seven minutes

The bare passes run the model on contexts that are already packed, up to the last hook point, and
keep nothing: "bare" through the bridge, "plain" through the plain model within it, also with
torch's own linear layers. "products" are the same pass's matrix products in float32 and nothing
else: those of all its linear layers, and those of attention for the half of all pairs of tokens
that is causal. "harvest" and "spectra" are whole calls: text read and tokenised, statistics taken
or a store written. Each round runs all kinds in turn; a ratio is the median over rounds of those
within one.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
from environments import FOLDER
from run import commit, machine
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

import saesub
from saesub.activations.forward_pass import capture, hook_points
from saesub.activations.linear import Linear, linear_layers
from saesub.activations.plain_model import PlainModel
from saesub.activations.tokens import kept_positions

LAYER, CONTEXT_SIZE, BATCH_SIZE, ROUNDS = 12, 256, 16, 5
N_BATCHES = 2
SITES = {
    "attention output": [f"blocks.{LAYER}.hook_attn_out"],
    "three sites": [
        f"blocks.{LAYER}.hook_{site}" for site in ("attn_out", "mlp_out", "resid_post")
    ],
}


def main() -> None:
    model, corpus = saesub.load_model("smollm2-135m"), saesub.load_corpus("wiki-en")
    rows = [{"hooks": name, **compare(model, corpus, hooks)} for name, hooks in SITES.items()]
    record = {
        "settings": {
            "layer": LAYER,
            "n_contexts": N_BATCHES * BATCH_SIZE,
            "context_size": CONTEXT_SIZE,
            "batch_size": BATCH_SIZE,
            "rounds": ROUNDS,
            "threads": torch.get_num_threads(),
        },
        "machine": machine() | {"instructions": torch.backends.cpu.get_cpu_capability()},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": rows,
    }
    (FOLDER / "results" / "passes.json").write_text(json.dumps(record, indent=1) + "\n")


def compare(model: TransformerBridge, corpus: Any, hooks: list[str]) -> dict[str, Any]:
    """Seconds of each kind of pass by round, and the medians of their ratios to two of them."""
    contexts = saesub.pack_contexts(
        model, corpus, n_contexts=N_BATCHES * BATCH_SIZE, context_size=CONTEXT_SIZE
    )
    # Exactly the rows of these contexts; separators are left out by what they are.
    n_tokens = int(kept_positions(model, contexts, skip_first=1).sum())
    shared = {"n_tokens": n_tokens, "context_size": CONTEXT_SIZE, "batch_size": BATCH_SIZE}
    fastest = linear_layers(next(model.original_model.parameters()))[0]
    kinds: dict[str, Callable[[], object]] = {
        "bare": partial(bare_pass, model, contexts, hooks),
        "plain": partial(plain_pass, model, contexts, hooks, fastest),
        "plain by MKL": partial(plain_pass, model, contexts, hooks, F.linear),
        "products": products(model, contexts, hooks),
        "harvest": partial(harvest_anew, model, corpus, hooks, shared),
        "spectra": partial(saesub.measure_spectra, model, corpus, hooks, progress=False, **shared),
    }
    for kind in ("bare", "plain", "plain by MKL", "products"):
        kinds[kind]()  # warms up
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, run in kinds.items():
            start = time.perf_counter()
            run()
            seconds[kind].append(time.perf_counter() - start)
        print(hooks[-1], {kind: round(times[-1], 2) for kind, times in seconds.items()}, flush=True)
    of_products = ratios(seconds, "products")
    return {"seconds": seconds, "ratios": ratios(seconds, "bare"), "of_products": of_products}


def ratios(seconds: dict[str, list[float]], one: str) -> dict[str, float]:
    """Median over rounds of each kind's time by that of `one`."""
    return {
        kind: statistics.median(a / b for a, b in zip(times, seconds[one], strict=True))
        for kind, times in seconds.items()
        if kind != one
    }


def bare_pass(model: TransformerBridge, contexts: torch.Tensor, hooks: list[str]) -> None:
    """The model's forward pass, cut off at the last of the hook points."""

    def stop(tensor: torch.Tensor, hook: HookPoint) -> None:
        raise StopAtLayerException(tensor)

    point = model.hook_dict[hooks[-1]]
    point.add_hook(stop)
    with torch.no_grad():
        for batch in contexts.split(BATCH_SIZE):
            model(batch, return_type=None)
    point.remove_hooks("fwd")


def plain_pass(
    model: TransformerBridge, contexts: torch.Tensor, hooks: list[str], linear: Linear
) -> None:
    """The plain model's forward pass, made anew for each batch as in a harvest."""
    points = hook_points(model, hooks)
    for batch in contexts.split(BATCH_SIZE):
        capture(PlainModel(model, points, linear), batch, points, lambda *_: None)


def products(
    model: TransformerBridge, contexts: torch.Tensor, hooks: list[str]
) -> Callable[[], None]:
    """A function that does the matrix products of such a pass, into memory that it uses again."""
    points, weights = hook_points(model, hooks), list[torch.Tensor]()
    plain = PlainModel(model, points)
    for part in plain.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda part, *_: weights.append(part.weight.detach()))
    capture(plain, contexts[:1], points, lambda *_: None)
    n_rows, (n_heads, d_head) = BATCH_SIZE * CONTEXT_SIZE, (model.cfg.n_heads, model.cfg.d_head)
    ins = {d: torch.randn(n_rows, d) for d in {w.shape[1] for w in weights}}
    outs = {d: torch.empty(n_rows, d) for d in {w.shape[0] for w in weights}}
    queries = torch.randn(BATCH_SIZE * n_heads, CONTEXT_SIZE, d_head)
    keys = torch.randn(BATCH_SIZE * n_heads, CONTEXT_SIZE // 2, d_head)
    scores, mixed = queries @ keys.mT, torch.empty_like(queries)

    def multiply() -> None:
        for _ in contexts.split(BATCH_SIZE):
            for weight in weights:
                torch.mm(ins[weight.shape[1]], weight.T, out=outs[weight.shape[0]])
            for _ in range(LAYER + 1):
                torch.bmm(queries, keys.mT, out=scores)
                torch.bmm(scores, keys, out=mixed)

    return multiply


def harvest_anew(
    model: TransformerBridge, corpus: Any, hooks: list[str], shared: dict[str, int]
) -> None:
    """A harvest into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        saesub.harvest(model, corpus, hooks, folder, progress=False, **shared)


if __name__ == "__main__":
    main()
