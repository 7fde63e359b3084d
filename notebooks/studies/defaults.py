"""Train every SAELens architecture at its own defaults, with and without the two lines.

    python notebooks/studies/defaults.py

Writes data/results/studies/defaults.json; takes about 90 minutes on one core. Run it again and it
continues where it stopped. SAELens' own trainer trains every SAE. Every architecture that SAELens
registers for training has its default config (but for the widths of a Matryoshka SAE, which have no
default; TopK with k 32 as well), 4,096 features, Adam with SAELens' own settings, at the attention
output of layer 3 of SmolLM2-135M: 200 steps of 1,024 tokens, judged over 60,000 tokens of other
documents. Conditions:

- "random, kept": SAELens' own initialisation, biases centred.
- "random, fitted": the same after `saesub.fit_norm`.
- "subspace, kept": `initialize_in_subspace(sae, spectrum, norm="keep")`.
- "subspace, fitted": the two lines, `initialize_in_subspace(sae, spectrum)`.

Matching pursuit is left out: SAELens prescribes unit norm there, so the conditions of one
initialisation are the same, and its default of d_in iterations per token takes hours.
"""

from __future__ import annotations

import json
import subprocess
import warnings
from itertools import product

import torch
from protocol import RESULTS, record_text
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from tqdm.auto import tqdm

import saesub
from saesub.files import write_atomically
from saesub.reproduce.report import run_facts

MODEL, HOOK, CORPUS = "smollm2-135m", "blocks.3.hook_attn_out", "wiki-en"
D_SAE, BATCH, STEPS, HELD_OUT, N_SPECTRUM = 4096, 1024, 200, 60_000, 200_000
ARCHITECTURES = {
    "topk": {},
    "topk, k 32": {"k": 32},
    "batchtopk": {},
    "abstopk": {},
    "matryoshka_batchtopk": {"matryoshka_widths": [D_SAE // 4, D_SAE]},
    "standard": {},
    "gated": {},
    "jumprelu": {},
}
CONDITIONS = ("random, kept", "random, fitted", "subspace, kept", "subspace, fitted")
RATES, SEEDS = (1e-3,), (0,)


def initialised(architecture: str, condition: str, seed: int, spectrum: saesub.Spectrum):
    """An SAE of a condition, and the norm that was fitted, if any."""
    sae_class, cfg_class = SAE_TRAINING_CLASS_REGISTRY[architecture.split(",")[0]]
    torch.manual_seed(seed)
    sae = sae_class(cfg_class(d_in=spectrum.d, d_sae=D_SAE, **ARCHITECTURES[architecture]))
    where, norm = condition.split(", ")
    if where == "subspace":
        rule = "fit" if norm == "fitted" else "keep"
        return sae, saesub.initialize_in_subspace(sae, spectrum, norm=rule, seed=seed).norm
    saesub.center_biases(sae, spectrum)
    return sae, saesub.fit_norm(sae, spectrum, seed=seed) if norm == "fitted" else None


def outcome(architecture: str, condition: str, lr: float, seed: int, data: tuple) -> dict:
    """Train one SAE; dead share over all held-out tokens, FVU and L0."""
    train, held_out, spectrum = data
    sae, norm = initialised(architecture, condition, seed, spectrum)
    cfg = SAETrainerConfig(
        total_training_samples=BATCH * STEPS,
        train_batch_size_samples=BATCH,
        lr=lr,
        lr_end=lr / 10,  # as SAELens' runner sets it
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SAETrainer(cfg, sae, train.batches(BATCH, seed=seed)).fit()
    sae.eval()
    x = held_out.rows(0, HELD_OUT)
    dead = saesub.dead_features(sae, x, n_tokens=HELD_OUT, progress=False)
    judged = saesub.reconstruction(sae, x[:16_384].split(1024))
    return {
        **{"architecture": architecture, "condition": condition, "lr": lr, "seed": seed},
        **{"norm": norm, "dead_share": dead.float().mean().item()},
        **{"fvu": judged.fvu, "l0": judged.l0, "commit": commit()},
    }


def commit() -> str:
    """The commit that this code is of."""
    return subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()


def main() -> None:
    """Add to the record the rows that it lacks."""
    torch.set_num_threads(1)
    path = RESULTS / "defaults.json"
    record = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    keys = ("architecture", "condition", "lr", "seed")
    done = {tuple(row[key] for key in keys) for row in record["rows"]}
    trials = [
        (architecture, condition, lr, seed)
        for seed, lr, where in product(SEEDS, RATES, ("subspace", "random"))
        for architecture, condition in product(ARCHITECTURES, CONDITIONS)
        if condition.startswith(where)
    ]
    n_tokens = max(BATCH * STEPS, N_SPECTRUM) + HELD_OUT
    store = saesub.harvest(MODEL, CORPUS, [HOOK], n_tokens=n_tokens)[HOOK]
    train, held_out = store.split(HELD_OUT)
    spectrum = saesub.Spectrum.from_activations(train.rows(0, N_SPECTRUM))
    record |= {
        "command": "python notebooks/studies/defaults.py",
        "commit": commit(),
        "run": run_facts(),
        "settings": {
            "model": MODEL,
            "hook_name": HOOK,
            "corpus": CORPUS,
            "d_sae": D_SAE,
            "batch": BATCH,
            "steps": STEPS,
            "held_out_tokens": HELD_OUT,
        },
    }
    for trial in tqdm([t for t in trials if t not in done], unit="SAE"):
        record["rows"].append(outcome(*trial, (train, held_out, spectrum)))
        write_atomically(path, record_text(record))


if __name__ == "__main__":
    main()
