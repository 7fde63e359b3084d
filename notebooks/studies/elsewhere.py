"""The rank of attention outputs in models that are not decoder-only language models.

    python notebooks/studies/elsewhere.py [MODEL ...]

Writes data/results/studies/elsewhere.json: six stacks, each with its trained weights and with
untrained ones, freshly initialised by the model's own rule. A row is one stack with one set of
weights, measured on two halves of its data, which differ in their source; its `sites` have the
exact sum of the two, by layer and kind of site. Ranks are shares of the width, of the variance
without the massive tokens; `with_massive` counts these too.

At outputs of a projection W, two controls say what the projection does and what its input: the
rank at 99 % after a Gaussian W of the same shape (`gaussian`), and after one with W's own singular
values in random directions (`turned`), both of the covariance of W's input, beside W itself
(`projected`); means over three draws.

Fracast has no attention: its `attn_out` is the projection of a convolution over time, and its `z`
what that projection reads. The vision transformer scales each coordinate before it adds an output
to the residual stream; `attn_scaled` and `mlp_scaled` are after that.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from protocol import run
from torch import Tensor, nn

import saesub
from saesub.activations.spectrum import Spectrum
from saesub.extras import samples, speech
from saesub.extras.encoders import load_encoder
from saesub.extras.torch_modules import (
    Batch,
    Site,
    block_sites,
    measure_module_spectra,
    text_batches,
)

PER_DIMENSION = 20  # tokens of text or protein
N_VIEWS = 4  # of a picture
N_DRAWS = 3
MASSIVE = "massive_tokens"
PROJECTED = {"attn_out": "z", "cross_out": "cross_z"}  # what the projection reads


@dataclass(frozen=True)
class Stack:
    """The settings of a row; `seed` None is the trained weights."""

    model: str
    part: str = "encoder"
    seed: int | None = None

    corpus, n_stored = "", 0
    hooks = frozenset[str]()  # no stored activations are needed


STACKS = (
    Stack("all-minilm-l6-v2"),
    Stack("whisper-base"),
    Stack("whisper-base", "decoder"),
    Stack("dinov2-small-saliency"),
    Stack("antiberty"),
    Stack("fracast-0"),
)


def halves(stack: Stack, model: Any, belongs: Any) -> tuple[list[Batch], list[Batch]]:
    """The data of a stack in two parts of different sources."""
    if stack.model == "dinov2-small-saliency":
        pictures = list(samples.load_pictures().values())
        first, second = (samples.picture_batches(pictures[i::2], N_VIEWS) for i in range(2))
    elif stack.model == "antiberty":
        data = samples.load_antibodies()
        reads = [source.startswith("reads") for source in data["source"]]
        parts = (data.select([i for i, r in enumerate(reads) if r == n]) for n in range(2))
        n = PER_DIMENSION * model.config.hidden_size // 2
        first, second = (
            text_batches(belongs, part.shuffle(seed=0), n_tokens=n, context_size=160)
            for part in parts
        )
    elif stack.model == "fracast-0":
        data = samples.load_series()
        parts = (("sea", "co2"), ("glucose", "sunspots"))
        first, second = (samples.series_batches({n: data[n] for n in part}) for part in parts)
    else:
        return _of_text_or_speech(stack, model, belongs)
    return list(first), list(second)


def _of_text_or_speech(stack: Stack, model: Any, belongs: Any) -> tuple[list[Batch], list[Batch]]:
    """As in notebook 10: speech for Whisper's encoder, else Wikipedia, which Whisper's decoder
    reads while it attends to the speech."""
    windows = []
    if stack.model == "whisper-base":
        windows = list(speech.speech_batches(belongs, speech.load_recordings()))
        if stack.part == "encoder":
            return windows[:2], windows[2:]
    corpus = saesub.load_corpus("wiki-en")
    middle, n = len(corpus) // 2, PER_DIMENSION * model.config.hidden_size // 2
    found = []
    for part in (range(middle), range(middle, len(corpus))):
        text = text_batches(
            getattr(belongs, "tokenizer", belongs), corpus.select(part), n_tokens=n, batch_size=8
        )
        found.append(list(speech.decoder_batches(model, windows, text) if windows else text))
    return found[0], found[1]


def untrained(model: Any, seed: int) -> nn.Module:
    """A model of the same shape with weights as its own code draws them."""
    torch.manual_seed(seed)
    config = getattr(model, "config", None)
    fresh = type(model)() if config is None else type(model)(config)
    return fresh.eval().requires_grad_(False)


def sites_of(stack: Stack, model: nn.Module) -> dict[tuple[int, str], Site]:
    """The kinds of site in every block."""
    sites = block_sites(model, stack.part)
    if stack.model == "dinov2-small-saliency":
        for layer, kind in list(sites):
            if kind == "resid_post":
                for number, scaled in enumerate(("attn_scaled", "mlp_scaled"), 1):
                    block = sites[layer, kind].module
                    sites[layer, scaled] = Site(f"{block}.layer_scale{number}", "output")
    return sites


def forward(stack: Stack, model: Any) -> Any:
    """The part of the model that is run."""
    if stack.model != "whisper-base":
        return model
    return model.model.encoder if stack.part == "encoder" else model.model


def rank(eigenvalues: Tensor) -> float:
    """The rank at 99 % of variance as a share of the width."""
    total = eigenvalues.clamp(min=0).sort(descending=True).values.cumsum(0)
    return (int((total < 0.99 * total[-1]).sum()) + 1) / len(total)


def controls(weight: Tensor, z: Spectrum) -> dict[str, float]:
    """Ranks of `weight` (d, d_in) times z, and of matrices beside it."""

    def after(matrix: Tensor) -> float:
        return rank(torch.linalg.eigvalsh(matrix @ z.covariance @ matrix.T))

    weight, generator = weight.double(), torch.Generator().manual_seed(0)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    gaussian, turned = [], []
    for _ in range(N_DRAWS):
        draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        gaussian.append(after(draw))
        directions = torch.randn(right.T.shape, generator=generator, dtype=torch.float64)
        turned.append(after((left * values) @ torch.linalg.qr(directions).Q.T))
    return {
        "projected": after(weight),
        "gaussian": sum(gaussian) / N_DRAWS,
        "turned": sum(turned) / N_DRAWS,
    }


def described(first: Spectrum, second: Spectrum) -> dict[str, Any]:
    """What a row says of one site."""
    whole = first + second
    d, energy = whole.d, whole.eigenvalues.sum()
    return {
        "n": whole.n_tokens,
        "d": d,
        "massive": int(whole.metadata.get(MASSIVE, 0)),
        "rank": whole.rank_at(0.99) / d,
        "first": first.rank_at(0.99) / d,
        "second": second.rank_at(0.99) / d,
        "effective": whole.effective_rank("variance") / d,
        "effective_of_singular_values": whole.effective_rank("singular_values") / d,
        "top": whole.variance_in(1),
        "without_top": rank(whole.eigenvalues[1:]) * (d - 1) / d,
        "offset": (whole.mean.norm() / energy.sqrt()).item(),
    }


def outcome(stack: Stack) -> dict[str, Any]:
    """Measure one stack."""
    warnings.filterwarnings("ignore", message=".*massive activations")
    model, belongs = load_encoder(stack.model, device="cpu")
    if stack.seed is not None:
        model = untrained(model, stack.seed)
    sites, parts = sites_of(stack, model), halves(stack, model, belongs)
    run_model = forward(stack, model)

    def measured(of: dict[Any, Site], keep_massive: bool) -> list[dict[Any, Spectrum]]:
        return [
            measure_module_spectra(
                model, part, of, forward=run_model, keep_massive=keep_massive, progress=False
            )
            for part in parts
        ]

    halved = measured(sites, keep_massive=False)
    found = {key: tuple(half[key] for half in halved) for key in sites}
    massive = {key for key, pair in found.items() if any(s.metadata.get(MASSIVE) for s in pair)}
    every = measured({k: sites[k] for k in massive}, keep_massive=True) if massive else []
    rows = []
    for key, (first, second) in found.items():
        layer, kind = key
        row = {"layer": layer, "kind": kind} | described(first, second)
        row["with_massive"] = row["rank"]
        if key in massive:
            whole = every[0][key] + every[1][key]
            row["with_massive"] = whole.rank_at(0.99) / whole.d
        if kind in PROJECTED:
            one, other = found[layer, PROJECTED[kind]]
            weight = model.get_submodule(sites[key].module).get_parameter("weight")
            row |= controls(weight, one + other)
        rows.append(row)
    condition = "trained" if stack.seed is None else "untrained"
    return asdict(stack) | {"condition": condition, "sites": rows}


if __name__ == "__main__":
    chosen = [s for s in STACKS if s.model in sys.argv[1:] or not sys.argv[1:]]
    run("elsewhere", chosen, outcome)
    run("elsewhere", [replace(stack, seed=0) for stack in chosen], outcome)
