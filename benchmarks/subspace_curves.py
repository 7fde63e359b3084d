"""Whether an SAE trains alike with the search in the active subspace, without it, and exactly.

    python benchmarks/subspace_curves.py   # writes results/subspace_curves.json, some 10 minutes

An SAE is trained on the same batches by each search, at the site and with the start at which most
would be lost without the bound on what the subspace leaves out. A run would search all coordinates
here, since they cost less.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from typing import Any
from unittest import mock

from environments import FOLDER
from run import commit, machine
from tqdm.auto import tqdm
from training import trained

import saesub
from saesub.topk import subspace_watch
from saesub.topk.active_subspace import ActiveSubspace, active_subspace

D_SAE, BATCH, STEPS = 8192, 1024, 2000
SITE, START = "blocks.12.hook_mlp_out", "random"  # where a subspace loses most
N_TOKENS = 122_880
WAYS = {
    "in the subspace": {},
    "all coordinates": {"in_subspace": False},
    "exact": {"search": "exact_search", "in_subspace": False},
}


def main() -> None:
    given = ("smollm2-135m", "wiki-en", [SITE], "runs/subspace-curves")
    store = saesub.harvest(*given, n_tokens=N_TOKENS)[SITE]
    curves, ranks = {}, []
    for name, search in tqdm(WAYS.items()):
        with always_in_subspace() if name == "in the subspace" else nullcontext() as chosen:
            trainer = trained(store, START, "topk", D_SAE, BATCH, STEPS, **search)
        curves[name] = [[row["tokens"], row["mse"]] for row in trainer.history]
        ranks += chosen or []
    record = {
        "settings": {"d_sae": D_SAE, "batch": BATCH, "steps": STEPS, "site": SITE, "start": START},
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ranks": ranks,
        "curves": curves,
    }
    path = FOLDER / "results" / "subspace_curves.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


@contextmanager
def always_in_subspace() -> Iterator[list[int]]:
    """Within it, searches are in the subspace of least cost, as if one by all coordinates had
    infinite cost; gives the ranks of those that were chosen."""
    ranks = []

    def chosen(*given: Any) -> ActiveSubspace:
        found = active_subspace(*given[:-1], float("inf"))
        assert found is not None, "this run would show nothing"
        ranks.append(found.rank)
        return found

    with mock.patch.object(subspace_watch, "active_subspace", chosen):
        yield ranks


if __name__ == "__main__":
    main()
