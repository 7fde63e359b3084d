"""What a harvest and a pass for spectra cost beyond the model's own forward pass.

    python benchmarks/passes.py            # writes results/passes.json, about five minutes

The bare pass runs the model on contexts that are already packed, up to the last hook point, and
keeps nothing. The others are the whole calls: text read and tokenised, statistics taken or a store
written. Each round runs all three in turn; a ratio is the median over rounds of those within one.
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
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

import saesub
from saesub.activations.tokens import kept_positions

LAYER, CONTEXT_SIZE, BATCH_SIZE, ROUNDS = 12, 256, 16, 7
N_BATCHES = 3
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
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": rows,
    }
    (FOLDER / "results" / "passes.json").write_text(json.dumps(record, indent=1) + "\n")


def compare(model: TransformerBridge, corpus: Any, hooks: list[str]) -> dict[str, Any]:
    """Seconds of each kind of pass by round, and the medians of their ratios to the bare one."""
    contexts = saesub.pack_contexts(
        model, corpus, n_contexts=N_BATCHES * BATCH_SIZE, context_size=CONTEXT_SIZE
    )
    # Exactly the rows of these contexts; separators are left out by what they are.
    n_tokens = int(kept_positions(model, contexts, skip_first=1).sum())
    shared = {"n_tokens": n_tokens, "context_size": CONTEXT_SIZE, "batch_size": BATCH_SIZE}
    kinds: dict[str, Callable[[], object]] = {
        "bare": partial(bare_pass, model, contexts, hooks),
        "harvest": partial(harvest_anew, model, corpus, hooks, shared),
        "spectra": partial(saesub.measure_spectra, model, corpus, hooks, progress=False, **shared),
    }
    kinds["bare"]()  # warms up
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, run in kinds.items():
            start = time.perf_counter()
            run()
            seconds[kind].append(time.perf_counter() - start)
        print(hooks[-1], {kind: round(times[-1], 2) for kind, times in seconds.items()}, flush=True)
    return {"seconds": seconds, "ratios": ratios(seconds)}


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median over rounds of each kind's time by the bare pass's."""
    bare = seconds["bare"]
    return {
        kind: statistics.median(a / b for a, b in zip(times, bare, strict=True))
        for kind, times in seconds.items()
        if kind != "bare"
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


def harvest_anew(
    model: TransformerBridge, corpus: Any, hooks: list[str], shared: dict[str, int]
) -> None:
    """A harvest into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        saesub.harvest(model, corpus, hooks, folder, progress=False, **shared)


if __name__ == "__main__":
    main()
