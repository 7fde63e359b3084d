"""The dimension of the starting subspace, over layers and sites.

    python notebooks/studies/d_init.py

Writes data/results/studies/d_init.json; half an hour of two cores.
"""

from trials import Trial, run

SITES = ("attn_out", "mlp_out", "resid_post")
SHARES = (0.1, 0.2, 0.35, 0.55)
LAYERS = (12, 4, 20)

if __name__ == "__main__":
    hooks = [f"blocks.{layer}.hook_{site}" for layer in LAYERS for site in SITES]
    starts = [("random", "auto"), ("flat", "auto"), ("whitened_data", "auto")]
    starts += [("flat", round(share * 576)) for share in SHARES]
    run("d_init", [Trial(hook, start, d_init) for hook in hooks for start, d_init in starts])
