"""Width: dead features and FVU of narrow and wide dictionaries, each trained in proportion.

    python notebooks/studies/width.py

Writes data/results/studies/width.json. 2,048 and 32,768 features at the attention output in the
middle of the model (4,096 and 8,192 are in cure.json), four conditions, each at learning rates of
its own at its width. A feature fires 4,000 times on average in training and 1,000 times in the
window that decides: 256,000 and 64,000 tokens at 2,048 features, 4,096,000 and 1,024,000 at 32,768.
The widest has one seed, and takes hours on two cores.
"""

from cure import MIDDLE, four
from protocol import sweep

NARROW = four(MIDDLE, d_sae=2048, n_train=256_000, n_judged=64_000)
WIDE = four(MIDDLE, d_sae=32_768, n_train=4_096_000, n_judged=1_024_000)

if __name__ == "__main__":
    sweep("width", NARROW)
    sweep("width", WIDE, (2.5e-4, 5e-4, 1e-3), n_seeds=1)
