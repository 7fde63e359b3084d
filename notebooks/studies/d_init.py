"""Dead features by the dimension of the initial subspace, over layers, sites and two models.

    python notebooks/studies/d_init.py

Writes data/results/studies/d_init.json; takes half an hour on two cores.
"""

from trials import Trial, run

SITES = ("attn_out", "mlp_out", "resid_post")
SHARES = (0.1, 0.2, 0.3, 0.4, 0.55)
STARTS = (("random", "auto"), ("flat", "auto"), ("whitened_data", "auto"))


def sweep(layer: int, site: str, d: int, **settings: object) -> list[Trial]:
    """The initialisations to compare at one hook point; flat ones at fixed shares of its width."""
    hook = f"blocks.{layer}.hook_{site}"
    starts = STARTS + tuple(("flat", round(share * d)) for share in SHARES)
    return [Trial(hook, start, d_init, **settings) for start, d_init in starts]  # pyright: ignore


if __name__ == "__main__":
    places = [(layer, site) for layer in (12, 4, 20) for site in SITES]
    first = [trial for place in places for trial in sweep(*place, 576)]
    again = [trial for site in SITES for trial in sweep(12, site, 576, seed=1)]
    run("d_init", first + again)
    # Not its residual stream: its values are too large for float16, the store's type.
    other = [(9, "attn_out"), (9, "mlp_out"), (14, "attn_out")]
    run("d_init", [t for place in other for t in sweep(*place, 640, model="gemma3-270m")])
