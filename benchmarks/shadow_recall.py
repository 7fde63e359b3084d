"""Does the search of the GPU step lose features? Its arithmetic on the CPU, on trained weights.

    python benchmarks/shadow_recall.py     # writes results/shadow_recall.json, some ten minutes

`saesub.topk.shadow` searches by a copy of the encoder in 16 or 8 bits. Here the same numbers are
computed by torch operators: tokens and encoder rows rounded to few bits, float32 products, the
largest of each group of features rounded to bfloat16, the best groups opened, their members ranked.
A feature is lost if it is one of the float32 top k and not among the candidates. Dictionaries are
trained, and the tokens are others than those of the training.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone

import torch
from environments import FOLDER
from run import commit, machine
from sae_lens import TopKTrainingSAE
from torch import Tensor
from training import K, trained

import saesub
from saesub.topk.maxima import MEMBERS, STRIDE, maxima_by_torch
from saesub.topk.ops import dense_search
from saesub.topk.shadow import few_bits, width_of

HOOK, D_SAE, BATCH, STEPS = "blocks.12.hook_attn_out", 36_864, 2048, 300
N_JUDGED, BLOCK = 8192, 512
TYPES = {"16 bits": torch.float16, "8 bits": torch.float8_e4m3fn}


def main() -> None:
    store = activations()
    train, held_out = store.split(N_JUDGED)
    x = held_out.rows(0, N_JUDGED)
    rows = []
    for start in ("random", "subspace"):
        for optimizer in ("adam", "sparse_adam"):
            trainer = trained(train, start, "topk", D_SAE, BATCH, STEPS, optimizer=optimizer)
            for name, dtype in TYPES.items():
                row = {"start": start, "optimizer": optimizer, "search": name}
                rows.append(row | recall(trainer.sae, x, dtype))
                print(rows[-1], flush=True)
    record = {
        "settings": {"hook_name": HOOK, "d_sae": D_SAE, "k": K, "tokens": BATCH * STEPS},
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": rows,
    }
    (FOLDER / "results" / "shadow_recall.json").write_text(json.dumps(record, indent=1) + "\n")


def activations() -> saesub.ActivationStore:
    model, corpus = saesub.load_model("smollm2-135m"), saesub.load_corpus("wiki-en")
    n_tokens = BATCH * STEPS // 5 + N_JUDGED  # five epochs
    return saesub.harvest(model, corpus, [HOOK], "runs/shadow-recall", n_tokens=n_tokens)[HOOK]


@torch.no_grad()
def recall(sae: TopKTrainingSAE, x: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """The share of the float32 top k that are among the candidates, and of tokens that lose one."""
    norms, found, whole = sae.W_dec.norm(dim=1), [], []
    for part in (x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x).split(BLOCK):
        best, _ = dense_search(part, sae.W_enc, sae.b_enc, K, norms)
        chosen = candidates(part, sae.W_enc.T * norms[:, None], sae.b_enc * norms, dtype)
        hit = (best[:, :, None] == chosen[:, None, :]).any(2)
        found.append(hit.float().mean(1))
        whole.append(hit.all(1))
    return {
        "recall": torch.cat(found).mean().item(),
        "tokens that lose one": 1 - torch.cat(whole).float().mean().item(),
    }


def candidates(x: Tensor, rows: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, width) the features that the search ranks in float32; rows hold the decoder's norms."""
    width = width_of(K, dtype)
    tokens, scale = few_bits(x, dtype)
    weights, factor = few_bits(rows.flatten()[None], dtype)
    weights = weights.view_as(rows)
    bias = bias * factor
    groups = maxima_by_torch(tokens, weights, bias, scale).bfloat16().topk(width, dim=1).indices
    member = torch.arange(MEMBERS) * STRIDE
    ids = groups[..., None] // STRIDE * STRIDE * MEMBERS + groups[..., None] % STRIDE + member
    of_groups = ids.flatten(1)
    scores = tokens.float() @ weights.float().T + bias * scale[:, None]
    scores = torch.nn.functional.pad(scores, (0, STRIDE * MEMBERS), value=-torch.inf)
    best = scores.gather(1, of_groups).topk(width, dim=1).indices
    return of_groups.gather(1, best)


if __name__ == "__main__":
    main()
