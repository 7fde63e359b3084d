"""Compare initialisations at three sites, three widths, two or three seeds and two optimizers.

    python notebooks/studies/starts.py

Writes data/results/studies/starts.json; takes a few hours on one core. In its first run,
d_init="auto" meant another dimension, so the flat initialisations of that run have this number as
`d_init`. Six flat initialisations of today's "auto" at 8,192 features come from d_init.json, as
`runs` says.
"""

from trials import Trial, run

SITES = [f"blocks.12.hook_{site}" for site in ("attn_out", "mlp_out", "resid_post")]
STARTS = ["random", "flat", "whitened_data"]

WIDTHS = [
    Trial(site, start, d_sae=d_sae, seed=seed)
    for seed in range(3)
    for site in (SITES if seed < 2 else SITES[:1])
    for d_sae in (2048, 8192, 16384)
    for start in STARTS
]
RATES = [Trial(site, start, lr=1e-3) for site in SITES for start in STARTS]
RULES = [Trial(SITES[0], start) for start in ("spectrum", "data")]
SPARSE = [Trial(site, start, optimizer="sparse_adam") for site in SITES for start in STARTS]
# The store holds 340,000 training tokens, so these see each nearly three times.
LONG = [
    Trial(site, start, n_train=960_000, seed=seed)
    for seed in range(2)
    for site in SITES
    for start in STARTS
]

if __name__ == "__main__":
    run("starts", [*WIDTHS, *RATES, *RULES, *SPARSE, *LONG])
