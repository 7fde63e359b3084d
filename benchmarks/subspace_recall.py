"""Whether the search in the active subspace loses features, on trained weights.

    python benchmarks/subspace_recall.py   # writes results/subspace_recall.json, some 20 minutes

For three sites, two initialisations and two architectures an SAE is trained by the compiled step.
Its search then runs on tokens that it was not trained on, by the compiled functions and by torch
operators, each in the subspace of least cost, also where all coordinates cost less and a run would
search these. A feature is lost if it is one of the float32 top k and the search does not return it.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from itertools import product

import torch
from environments import FOLDER
from run import commit, machine
from sae_lens import TopKTrainingSAE
from training import KINDS, K, trained

import saesub
from saesub.topk.ops import dense_search
from saesub.topk.packed_encoder import search_all
from saesub.topk.prices import TORCH_PRICES, native_prices
from saesub.topk.subspace_search import search as search_by_torch
from saesub.topk.subspace_watch import Found, SubspaceWatch

SITES = [f"blocks.12.hook_{site}" for site in ("attn_out", "mlp_out", "resid_post")]
D_SAE, BATCH, STEPS = 36_864, 2048, 300
N_JUDGED, N_SEARCHED = 16_384, 4096
_NOTHING = (torch.empty(0, dtype=torch.long), torch.empty(0))


def main() -> None:
    n_tokens = BATCH * STEPS // 5 + N_JUDGED  # five epochs
    given = ("smollm2-135m", "wiki-en", SITES, "runs/subspace-recall")
    stores = saesub.harvest(*given, n_tokens=n_tokens)
    rows = []
    for site, start, kind in product(SITES, ("random", "subspace"), KINDS):
        train, held_out = stores[site].split(N_JUDGED)
        trainer = trained(train, start, kind, D_SAE, BATCH, STEPS)
        about = {"site": site, "start": start, "architecture": kind}
        for row in recall(trainer.sae, held_out.rows(0, N_JUDGED)):
            rows.append(about | row)
            print(rows[-1], flush=True)
    record = {
        "settings": {"d_sae": D_SAE, "k": K, "tokens": BATCH * STEPS, "entries": N_SEARCHED * K},
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": rows,
    }
    (FOLDER / "results" / "subspace_recall.json").write_text(json.dumps(record, indent=1) + "\n")


@torch.no_grad()
def recall(sae: TopKTrainingSAE, x: torch.Tensor) -> list[dict]:
    """For each search, the share of the float32 top k that it returns; BatchTopK's are those of
    each token."""
    x = (x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x).contiguous()
    W_enc, b_enc = sae.W_enc.T.contiguous().T, sae.b_enc.detach().contiguous()
    scale = sae.W_dec.norm(dim=1)
    searches = {
        "compiled": (search_all, native_prices(), D_SAE // 2),  # as SparseAdam moves after ASI
        "torch": (search_by_torch, TORCH_PRICES, D_SAE),
    }
    rows = []
    for name, (search, prices, moved) in searches.items():
        watch = SubspaceWatch(prices, moved)
        # As if a search of all coordinates had infinite cost: some subspace is always found.
        watch.after_search(Found(*_NOTHING, ranked=float("inf"), by_the_whole=0.0), D_SAE)
        for part in x[:-N_SEARCHED].split(BATCH):
            watch.before_search(part.contiguous(), W_enc, b_enc, K, scale)
        assert watch.found is not None
        found = []
        for part in x[-N_SEARCHED:].split(512):
            best, _ = dense_search(part, W_enc, b_enc, K, scale)
            result = search(part, W_enc, b_enc, K, scale, watch.found)
            found.append((best[:, :, None] == result.features[:, None, :]).any(2).float().mean())
        share = torch.stack(found).mean().item()
        rows.append({"search": name, "rank": watch.found.rank, "recall": share})
    return rows


if __name__ == "__main__":
    main()
