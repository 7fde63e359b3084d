"""The dimension of the starting subspace, over layers, sites and models.

    python notebooks/studies/d_init.py

Writes data/results/studies/d_init.json; an hour or two of one core.
"""

from trials import Trial, run

SITES = ("attn_out", "mlp_out", "resid_post")
SHARES = (0.1, 0.2, 0.35, 0.55)
MODELS = {"smollm2-135m": (576, (4, 12, 20)), "gemma3-270m": (640, (8,))}

if __name__ == "__main__":
    trials = []
    for model, (d, layers) in MODELS.items():
        for hook in [f"blocks.{layer}.hook_{site}" for layer in layers for site in SITES]:
            trials += [Trial(hook, "random", model=model)]
            trials += [Trial(hook, "flat", round(share * d), model=model) for share in SHARES]
    run("d_init", trials)
