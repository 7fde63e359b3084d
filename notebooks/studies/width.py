"""Width: dead features and FVU of narrow dictionaries, trained in proportion, on one text.

    python notebooks/studies/width.py

Writes data/results/studies/width.json. 2,048 and 4,096 features at the attention output in the
middle of the model, four conditions, each at learning rates of its own at its width, and all at one
rate with three seeds; cure.json has 8,192. At every width a feature fires 4,000 times on average in
training. All widths are judged on the same held-out tokens, those of cure.json, so that FVUs of
different widths can be compared. Of a row's windows, `silent`, the one of about 1,000 firings
decides what is dead: 65,536 tokens at 2,048 features, 131,072 at 4,096.

Two controls: 2,048 features trained on as many tokens as 8,192 are, to tell the width from the
length; and 4,096 without Adam's momentum, judged on these tokens, twice those of cure.json.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cure import MIDDLE
from protocol import Trial, run, sweep

ONE_RATE = 2e-3  # the best for random initialisation under Adam with 4,096 and with 8,192 features


@dataclass(frozen=True)
class Narrow(Trial):
    """A trial on the first tokens of the store that the default trial uses."""

    @property
    def n_stored(self) -> int:
        """As many as the default trial needs."""
        return Trial(self.hook_name, self.start).n_stored


CONDITIONS = [
    Narrow(MIDDLE, start, optimizer, d_sae=d_sae, n_train=125 * d_sae)
    for d_sae in (2048, 4096)
    for optimizer in ("adam", "sparse_adam")
    for start in ("random", "subspace")
]

LONG = [Narrow(MIDDLE, start, d_sae=2048) for start in ("random", "subspace")]
STILL = Narrow(MIDDLE, "random", d_sae=4096, n_train=125 * 4096, beta1=0.0)

if __name__ == "__main__":
    sweep("width", [*CONDITIONS, *LONG])
    at_one_rate = [*CONDITIONS, *LONG, STILL]
    run("width", [replace(c, lr=ONE_RATE, seed=seed) for c in at_one_rate for seed in range(3)])
