"""Do the 8-bit searches lose features? Their top k beside the float64 one, on real activations.

    python benchmarks/recall.py            # writes results/recall.json, a minute or two

A lost feature is one of the float64 top k that a search does not return although its score is
more than float32's rounding above the k-th. The dictionaries are a random one and one of tied
features drawn from the activations themselves, whose scores lie closer together.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone

import torch
from environments import FOLDER
from run import commit, machine

import saesub
from saesub.topk import cpu, int8_search
from saesub.topk.ops import dense_search

LAYER, N_TOKENS, D_SAE, K = 12, 8192, 36_864, 32
BLOCK = 1024  # tokens whose float64 scores are held at a time: 300 MB
ROUNDING = 1e-6  # of the largest score a token could have
SEARCHES = {"native": cpu.BACKEND.search, "torch": int8_search.search}


def main() -> None:
    model = saesub.load_model("smollm2-135m")
    corpus = saesub.load_corpus("wiki-en")
    hooks = [f"blocks.{LAYER}.hook_{site}" for site in ("attn_out", "mlp_out", "resid_post")]
    blocks = list(saesub.stream_activations(model, corpus, hooks, n_tokens=N_TOKENS))
    rows = []
    for hook in hooks:
        x = torch.cat([block[hook] for block in blocks])
        for name, W_enc in dictionaries(x).items():
            for search, counts in lost(x, W_enc).items():
                rows.append({"hook": hook, "dictionary": name, "search": search, **counts})
                print(rows[-1], flush=True)
    record = {
        "settings": {"n_tokens": N_TOKENS, "d_sae": D_SAE, "k": K},
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": rows,
    }
    (FOLDER / "results" / "recall.json").write_text(json.dumps(record, indent=1) + "\n")


def dictionaries(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Encoders (d_in, D_SAE) with unit columns, feature-major in memory."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(D_SAE, x.shape[1], generator=generator)
    centred = x - x.mean(0)
    chosen = torch.randint(len(x), (D_SAE,), generator=generator)
    noise = torch.randn(D_SAE, x.shape[1], generator=generator) * 0.1 * centred.std()
    made = {"random": random, "from activations": centred[chosen] + noise}
    return {name: torch.nn.functional.normalize(rows, dim=1).T for name, rows in made.items()}


def lost(x: torch.Tensor, W_enc: torch.Tensor) -> dict[str, dict[str, int]]:
    """How many of the n * k entries each search loses, and in how many tokens."""
    b_enc = torch.zeros(D_SAE)
    counts = {name: torch.zeros(len(x), dtype=torch.int64) for name in SEARCHES}
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK]
        features, scores = dense_search(rows.double(), W_enc.double(), b_enc.double(), K)
        above = scores - scores.amin(1, keepdim=True) > ROUNDING * rows.norm(dim=1, keepdim=True)
        for name, search in SEARCHES.items():
            found, _ = search(rows, W_enc, b_enc, K)
            missed = ~(features[:, :, None] == found[:, None, :]).any(2)
            counts[name][start : start + BLOCK] = (missed & above).sum(1)
    return {
        name: {"entries": len(x) * K, "lost": int(c.sum()), "tokens": int((c > 0).sum())}
        for name, c in counts.items()
    }


if __name__ == "__main__":
    main()
