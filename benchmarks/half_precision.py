"""What a store of float16 changes, beside one of float32: in spectra and in trained SAEs.

    python benchmarks/half_precision.py    # writes results/half_precision.json, some minutes

Both stores hold the same activations, those in float16 rounded. Spectra are of all tokens but the
last, which are held out. Both SAEs of a seed begin with the same weights and see the same batches;
both are judged on the same float32 activations. Two float32 SAEs of other seeds say what a
difference is worth.
"""

from __future__ import annotations

import json
import tempfile
from datetime import datetime, timezone
from typing import Any

import torch
from environments import FOLDER
from run import commit, machine
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

import saesub
from saesub import ActivationStore

HOOKS = [f"blocks.12.hook_{site}" for site in ("attn_out", "mlp_out", "resid_post")]
N_TOKENS, HELD_OUT, D_SAE, K, BATCH, STEPS, SEEDS = 24_000, 4_000, 4_608, 32, 512, 120, (0, 1)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        asked = {"n_tokens": N_TOKENS, "dtype": torch.float32}
        stores = saesub.harvest("smollm2-135m", "wiki-en", HOOKS, folder, **asked)
        rows = [compare(hook, store.rows(0, N_TOKENS)) for hook, store in stores.items()]
    record = {
        "settings": {
            "model": "smollm2-135m",
            "n_tokens": N_TOKENS - HELD_OUT,
            "held_out": HELD_OUT,
            "d_sae": D_SAE,
            "k": K,
            "batch": BATCH,
            "steps": STEPS,
            "seeds": len(SEEDS),
        },
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": rows,
    }
    (FOLDER / "results" / "half_precision.json").write_text(json.dumps(record, indent=1) + "\n")


def compare(hook: str, x: torch.Tensor) -> dict[str, Any]:
    """Of one hook point: the spectra of both stores, and the SAEs trained on them."""
    held_out, kept = x[-HELD_OUT:], x[:-HELD_OUT]
    stores = {"float32": ActivationStore.of(kept, hook)}
    stores["float16"] = ActivationStore.of(kept.half(), hook)
    whole, half = (saesub.Spectrum.from_activations(s.rows(0, len(kept))) for s in stores.values())
    rank = whole.rank_at(0.99)
    values, halved = whole.eigenvalues[:rank], half.eigenvalues[:rank]
    shared = (whole.basis(rank).T @ half.basis(rank)).square().sum() / rank
    saes = {name: [outcome(store, held_out, s) for s in SEEDS] for name, store in stores.items()}
    return {
        "hook": hook,
        "eigenvalues": float(((halved - values) / values).abs().max()),
        "rank": {"float32": rank, "float16": half.rank_at(0.99)},
        "basis_outside": float(1 - shared),
        "saes": saes,
    }


def outcome(store: ActivationStore, held_out: torch.Tensor, seed: int) -> dict[str, float]:
    """FVU and the share of dead features on held-out tokens, of an SAE trained on the store."""
    torch.manual_seed(seed)
    scaled = "expected_average_only_in"
    settings = {"d_in": store.d_in, "d_sae": D_SAE, "k": K, "normalize_activations": scaled}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(**settings, aux_loss_coefficient=0.0))
    recipe = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=2e-3,
        lr_end=2e-4,
        lr_warm_up_steps=10,
        n_batches_for_norm_estimate=20,
        device="cpu",
    )
    batches = store.batches(BATCH, seed=seed)
    saesub.SubspaceSAETrainer(recipe, sae, batches).fit()
    judged = saesub.judge(sae, held_out, n_tokens=len(held_out), progress=False)
    dead = float((judged.counts == 0).float().mean())
    return {"fvu": judged.fvu, "dead_share": dead}


if __name__ == "__main__":
    main()
