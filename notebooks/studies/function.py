"""How many directions of a site does the language model need?

    python notebooks/studies/function.py

Writes data/results/studies/function.json. A site is cut down to its first r principal directions
(and its mean), and the model's cross-entropy is measured on held-out text:

- in all layers from 1 on at once, at 20,480 tokens;
- in one layer at a time, eight layers, at 6,144 tokens and fewer r.

Layer 0 is left out: of the layers that notebook 09 measured, to lose its attention output costs
most, and we expected it to decide the sum. The directions are from nine documents in ten, the
tokens from the others, and both are those of notebook 01. A row has the summed loss of every
context for each condition: "clean", "zero" (zero ablation), "0" (mean ablation), or r. A context of
256 tokens holds parts of two to five documents, and shares at most the first and the last of them
with its neighbours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from datasets import Dataset
from protocol import run
from transformer_lens.model_bridge import TransformerBridge

import saesub
from saesub.activations.spectrum import Spectrum

SITES = ("attn_out", "mlp_out")
LAYERS = (1, 4, 8, 12, 16, 20, 24, 28)
AT_ONCE = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 544)
ALONE = (4, 16, 64, 128, 256, 384, 512)
CONTEXT_SIZE = 256
N_SPECTRUM = 60_000


@dataclass(frozen=True)
class Cut:
    """The settings of a row; `layer` None is all layers from 1 on at once."""

    site: str
    layer: int | None
    n_contexts: int
    model: str = "smollm2-135m"
    corpus: str = "wiki-en"

    n_stored = 0
    hooks = frozenset[str]()  # no stored activations are needed

    @property
    def layers(self) -> range:
        """The layers that are cut down."""
        if self.layer is not None:
            return range(self.layer, self.layer + 1)
        return range(1, loaded(self.model).cfg.n_layers)


@cache
def loaded(model: str) -> TransformerBridge:
    """The language model, once in each process."""
    return saesub.load_model(model)


def split(corpus: str) -> tuple[Dataset, Dataset]:
    """Documents for spectra, and those held out."""
    documents = saesub.load_corpus(corpus).shuffle(seed=0, keep_in_memory=True)
    at = 9 * len(documents) // 10
    return documents.select(range(at)), documents.select(range(at, len(documents)))


@cache
def spectra(model: str, corpus: str) -> dict[str, Spectrum]:
    """Of both sites in all layers, from one pass, which the cache keeps."""
    n_layers = loaded(model).cfg.n_layers
    hooks = [f"blocks.{i}.hook_{site}" for i in range(1, n_layers) for site in SITES]
    text, _ = split(corpus)
    return saesub.measure_spectra(loaded(model), text, hooks, n_tokens=N_SPECTRUM, cache=True)


def outcome(cut: Cut) -> dict[str, Any]:
    """The losses of one row."""
    _, unseen = split(cut.corpus)
    tokens = saesub.pack_contexts(
        loaded(cut.model), unseen, n_contexts=cut.n_contexts, context_size=CONTEXT_SIZE
    )
    found = saesub.subspace_loss_recovered(
        loaded(cut.model),
        tokens,
        [f"blocks.{layer}.hook_{cut.site}" for layer in cut.layers],
        spectra(cut.model, cut.corpus),
        AT_ONCE if cut.layer is None else ALONE,
        progress=False,
    )
    return asdict(cut) | {
        "condition": "all layers at once" if cut.layer is None else f"layer {cut.layer}",
        "n_layers": len(cut.layers),
        "n_spectrum": N_SPECTRUM,
        "d": found.d,
        "n_predicted": found.n_predicted.tolist(),
        "loss_sums": {str(c): sums.round(4).tolist() for c, sums in found.loss_sums.items()},
    }


if __name__ == "__main__":
    spectra(Cut.model, Cut.corpus)
    at_once = [Cut(site, None, 80) for site in SITES]
    run("function", [*at_once, *(Cut(s, i, 24) for i in LAYERS for s in SITES)], outcome)
