"""Why is the attention output low-rank? Four causes, training, and weight decay's mark.

    python notebooks/studies/low_rank.py

Writes data/results/studies/low_rank.json, with a row for each model, state and layer, of two kinds
(`part`). Nothing but one pass for the covariance of z, the concatenated output of the heads, needs
the model: the rest is algebra on that covariance and on the weights.

"factors": the output is a sum over heads of z_h W_h. Write the covariance of z as L K L, where L
has the square roots of the heads' own covariances and K their correlations, and W_h = U Σ Vᵀ. Four
things can lower the rank of the sum, and each can be taken away alone:

- `spectrum`: z_h has uneven variances. Away: z_h is white.
- `correlation`: heads are correlated. Away in two steps: between groups of queries, then within
  them, where heads read the same values.
- `anisotropy`: W_h has unequal singular values. Away: they are equal, between the same singular
  vectors (the polar factor).
- `overlap`: heads write into the same directions. Away in two steps: to subspaces of random
  directions, drawn for each head alone, which overlap by chance; and to orthogonal ones, which do
  not overlap (only where all heads fit into the width).

In every combination each head keeps the variance that it writes, so that unequal heads are the
background and no cause. A cause's share of the fall from the rank of orthogonal, white, flat and
uncorrelated heads to that of the model is its effect averaged over all orders of putting the four
in (Shapley); the steps of a cause split its share exactly. `interactions` are the same average of
second differences: below zero where two causes together lower the rank by more than their sum.
`inputs_turned` is another control: the inner basis between z_h and W_h turned at random, in the
same way for the heads of a group, so that the strong directions of z_h no longer meet the strong
inputs of W_h.

What this can tell apart: the singular values of W_O as a whole come from those of each W_h, from
the sizes of heads and from their overlap; here these three are apart. What it cannot: overlap of
*strong* directions needs both unequal singular values and shared directions, and is their
interaction; which weights training would have found under another W_O; and whether heads overlap
because a low rank serves the model, or the reverse.

"weights": L2 on two factors of a product is a nuclear norm on the product (arXiv 2410.23819). Where
the loss with decay is stationary, W_Vᵀ W_V = Σ_h W_h W_hᵀ over the heads h of a group, which share
W_V, for W_V R and R⁻¹ W_h are the same model. `distance` is the norm of the difference of these two
by the sum of their norms, at equal traces; `cosine` that of their parts without trace. Control: the
inner basis turned at random, which leaves both spectra. `tightness` is the nuclear norm of the
product by the product of the factors' norms, 1 if they are balanced. For queries and keys, rotary
positions leave only one number a pair of dimensions free, and for the gated MLP one a neuron (up
against down), so there only norms of pairs and neurons can be balanced, and are compared with
shuffled ones. AdamW decays otherwise than L2 does, biases and RMSNorm's gains are left where they
are, and the packaged weights have four bits, whose noise hides a part of any balance.

Expected, written before the study ran:

1. Overlap's share is at least 1.5 times anisotropy's, or the reverse; the smaller of the two is
   *the* cause in no sense if so. Between 1/1.5 and 1.5 (or an interval over layers that holds 1)
   both are causes. From notebook 02 I expect overlap to be larger, and more than half of it to be
   overlap by chance, which no trained alignment makes: then the final version of the paper is right
   that heads overlap, and wrong if it means that training makes them.
2. The spectrum of z_h has the largest share of the four.
3. Untrained: anisotropy's share is below a third of the trained one, and correlation's is larger
   than the trained one, because attention averages evenly.
4. Weight decay's mark is there if the cosine exceeds that of every turned copy in nine groups of
   ten, and is at least 0.2 on average; it matters to the rank if turning the inputs raises the rank
   by at least 1 % of d on average over layers. I expect the first and not the second.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations, product
from math import factorial
from typing import Any

import torch
from datasets import Dataset
from protocol import run
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import saesub

N_TOKENS = 20_000
N_DRAWS = 3  # of subspaces, which differ little
N_TURNS = 5
_LEAST = 1e-9  # of a head's largest variance; less is rounding, and no direction to whiten
LEVELS = {  # of each cause, from without it to the model's own
    "spectrum": ("white", "own"),
    "correlation": ("none", "in groups", "own"),
    "anisotropy": ("flat", "own"),
    "overlap": ("orthogonal", "random", "own"),
}
CONDITIONS = {
    "trained": "trained",
    "0.02": "fresh weights, 0.02",
    "0.0417": "fresh weights, 1/√d",  # of SmolLM2, which was initialised so
}
Levels = Mapping[str, Sequence[str]]
Value = Callable[[tuple[str, ...]], float]


@dataclass(frozen=True)
class Part:
    """The settings of a row; `state` is "trained", or the standard deviation of fresh weights."""

    part: str
    layer: int
    state: str = "trained"
    model: str = "smollm2-135m"
    corpus: str = "wiki-en"

    n_stored = 0
    hooks = frozenset[str]()  # no stored activations are needed


# --- the four causes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """What the heads of a layer write, in parts.

    Attributes:
        roots: (heads, d_head, d_head) square roots of the covariances of z_h.
        correlations: (heads · d_head, heads · d_head), with the identity on the diagonal blocks.
        inputs, sigma, outputs: (heads, d_head, r), (heads, r), (heads, r, d), W_h = U Σ Vᵀ.
        n_groups: of queries; heads of a group follow one another.
    """

    roots: Tensor
    correlations: Tensor
    inputs: Tensor
    sigma: Tensor
    outputs: Tensor
    n_groups: int

    @property
    def d(self) -> int:
        """The width of the output."""
        return self.outputs.shape[2]

    @property
    def fit(self) -> bool:
        """Whether the heads can write into orthogonal subspaces."""
        return self.sigma.numel() <= self.d

    @classmethod
    def of(cls, covariance: Tensor, W_O: Tensor, n_groups: int) -> Heads:
        """From the covariance of z (heads · d_head, heads · d_head), W_O (heads, d_head, d)."""
        n, width, _ = W_O.shape
        own = torch.stack([covariance[i : i + width, i : i + width] for i in _starts(n, width)])
        variances, axes = torch.linalg.eigh(own)
        variances = variances.clamp(min=0)
        roots = (axes * variances.sqrt()[:, None]) @ axes.mT
        kept = variances > _LEAST * variances[:, -1:]
        inverse = torch.where(kept, variances.clamp(min=1e-300).rsqrt(), 0.0)
        whiten = torch.block_diag(*((axes * inverse[:, None]) @ axes.mT))
        correlations = whiten @ covariance @ whiten
        for i in _starts(n, width):
            correlations[i : i + width, i : i + width] = torch.eye(width)
        inputs, sigma, outputs = torch.linalg.svd(W_O, full_matrices=False)
        return cls(roots, correlations, inputs, sigma, outputs, n_groups)

    def written(self, spectrum: str, correlation: str, anisotropy: str) -> Tensor:
        """(heads · r, heads · r) covariance of what the heads write, each in coordinates of its
        own; each head writes as much variance as it does in the model."""
        full = self.roots @ self.inputs * self.sigma[:, None]
        roots = self.roots if spectrum == "own" else torch.eye(self.roots.shape[1]).to(full)
        sigma = self.sigma if anisotropy == "own" else torch.ones_like(self.sigma)
        parts = roots @ self.inputs * sigma[:, None]
        parts = parts * (full.norm(dim=(1, 2)) / parts.norm(dim=(1, 2)))[:, None, None]
        mixed = torch.block_diag(*parts)
        return mixed.T @ (self.correlations * self._kept(correlation)) @ mixed

    def _kept(self, correlation: str) -> Tensor:
        """Which blocks of the correlations a level keeps, as a mask of their entries."""
        n, width = self.roots.shape[:2]
        blocks = {"none": n, "in groups": self.n_groups, "own": 1}[correlation]
        ones = torch.ones(n * width // blocks, n * width // blocks).to(self.roots)
        return torch.block_diag(*[ones] * blocks)

    def turned(self, generator: torch.Generator) -> Heads:
        """With the inner basis of each group turned at random."""
        n, width = self.roots.shape[:2]
        turns = rotations(self.n_groups, width, width, generator)
        turns = turns.repeat_interleave(n // self.n_groups, dim=0)
        return replace(self, inputs=turns @ self.inputs)


def _starts(n_heads: int, width: int) -> range:
    return range(0, n_heads * width, width)


def rotations(n: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(n, rows, columns) with orthonormal columns, uniform; float64."""
    normal = torch.randn(n, rows, columns, generator=generator, dtype=torch.float64)
    found, upper = torch.linalg.qr(normal)
    return found * upper.diagonal(dim1=1, dim2=2).sign()[:, None]  # else not uniform


def ranks(covariance: Tensor, d: int) -> tuple[float, float]:
    """Rank at 99 % of the variance and effective rank (of singular values), as shares of d."""
    variances = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    held = variances.cumsum(0)
    rank = int((held < 0.99 * held[-1] * (1 - 1e-12)).sum()) + 1
    return rank / d, effective_rank(variances.sqrt()) / d


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the values (n,), normalised; a count, 1 to n."""
    return torch.special.entr(values / values.sum()).sum().exp().item()


def cells(heads: Heads, n_draws: int, seed: int) -> dict[tuple[str, ...], list[list[float]]]:
    """The two ranks for each combination of levels; for random subspaces one pair a draw."""
    generator = torch.Generator().manual_seed(seed)
    n, r, d = heads.outputs.shape
    drawn = [rotations(n, d, r, generator).mT.reshape(n * r, d) for _ in range(n_draws)]
    frames = {"random": drawn, "own": [heads.outputs.reshape(n * r, d)]}
    found: dict[tuple[str, ...], list[list[float]]] = {}
    for levels in product(*list(LEVELS.values())[:3]):
        written = heads.written(*levels)
        if heads.fit:
            found[(*levels, "orthogonal")] = [list(ranks(written, d))]
        for name, of_level in frames.items():
            found[(*levels, name)] = [list(ranks(V.T @ written @ V, d)) for V in of_level]
    return found


def shares(value: Value, levels: Levels) -> dict[str, list[float]]:
    """Of each cause and each of its steps, the effect on `value` averaged over all orders in which
    the causes are put in, each from its first level to its last."""
    effects: dict[str, list[float]] = {}
    for name, own in levels.items():
        others = [other for other in levels if other != name]
        steps = [0.0] * (len(own) - 1)
        for present in _subsets(others):
            weight = _weight(len(present), len(levels))
            at = [value(_chosen(levels, {*present}, {name: level})) for level in own]
            for i in range(len(steps)):
                steps[i] += weight * (at[i + 1] - at[i])
        effects[name] = steps
    return effects


def interaction(value: Value, levels: Levels, a: str, b: str) -> float:
    """How much more `value` changes by both causes than by each alone, averaged over the orders of
    the others (Shapley's interaction)."""
    others = [other for other in levels if other not in (a, b)]
    total = 0.0
    for present in _subsets(others):
        both, first, second, neither = (
            value(_chosen(levels, {*present, *more}, {})) for more in ((a, b), (a,), (b,), ())
        )
        total += _weight(len(present), len(levels) - 1) * (both - first - second + neither)
    return total


def _subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    return [part for size in range(len(names) + 1) for part in combinations(names, size)]


def _weight(n_present: int, n: int) -> float:
    """The share of the orders of n causes in which a cause comes after these `n_present`."""
    return factorial(n_present) * factorial(n - n_present - 1) / factorial(n)


def _chosen(levels: Levels, present: set[str], given: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(
        given.get(name) or own[-1 if name in present else 0] for name, own in levels.items()
    )


def explained(heads: Heads, n_draws: int = N_DRAWS, seed: int = 0) -> dict[str, Any]:
    """Ranks of all combinations, and what each cause takes from them, for both kinds of rank."""
    found = cells(heads, n_draws, seed)
    levels = LEVELS if heads.fit else LEVELS | {"overlap": ("random", "own")}
    row: dict[str, Any] = {"d": heads.d, "levels": {k: list(v) for k, v in levels.items()}}
    generator = torch.Generator().manual_seed(seed + 1)
    frame = heads.outputs.flatten(0, 1)
    full = ("own", "own", "own")
    turned = [
        ranks(frame.T @ heads.turned(generator).written(*full) @ frame, heads.d)
        for _ in range(n_draws)
    ]
    for kind, name in enumerate(("rank", "effective_rank")):
        by_draw = [
            {key: of[draw % len(of)][kind] for key, of in found.items()} for draw in range(n_draws)
        ]
        values: list[Value] = [table.__getitem__ for table in by_draw]
        of_causes = [shares(value, levels) for value in values]
        row[name] = {
            "cells": {
                " / ".join(k): spread([pair[kind] for pair in of])[0] for k, of in found.items()
            },
            "shares": {
                cause: [spread([of[cause][i] for of in of_causes]) for i in range(len(steps))]
                for cause, steps in of_causes[0].items()
            },
            "interactions": {
                f"{a} × {b}": spread([interaction(value, levels, a, b) for value in values])
                for a, b in combinations(levels, 2)
            },
            "inputs_turned": spread([pair[kind] for pair in turned]),
        }
    return row


def spread(values: Sequence[float]) -> list[float]:
    """Mean, least and greatest."""
    return [round(x, 6) for x in (sum(values) / len(values), min(values), max(values))]


def spreads(found: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The same of each number of several draws."""
    return {name: spread([of[name] for of in found]) for name in found[0]}


# --- weight decay's mark --------------------------------------------------------------------------


def balance(first: Tensor, second: Tensor, n_draws: int, generator: torch.Generator) -> dict:
    """How far two factors of a product, (d, r) and (r, m), are balanced, and turned copies of it.

    `product` is the effective rank of the product by r; `turned` has the same numbers for random
    inner bases, which leave the spectra of both factors as they are, as mean, least and greatest.
    """
    left, right = (torch.linalg.qr(factor).R for factor in (first, second.T))  # (r, r), as large
    turns = rotations(n_draws, left.shape[1], left.shape[1], generator)
    return _balance(left, right) | {
        "turned": spreads([_balance(left @ turn, right) for turn in turns])
    }


def _balance(left: Tensor, right: Tensor) -> dict[str, float]:
    a, b = left.T @ left, right.T @ right
    ratio = (a.trace() / b.trace()).item()
    a, b = a / a.trace(), b / b.trace()
    even = torch.eye(len(a)).to(a) / len(a)
    values = torch.linalg.svdvals(left @ right.T)
    return {
        "distance": ((a - b).norm() / (a.norm() + b.norm())).item(),
        "cosine": torch.cosine_similarity((a - even).flatten(), (b - even).flatten(), 0).item(),
        "tightness": (values.sum() / (left.norm() * right.norm())).item(),
        "product": effective_rank(values) / len(values),
        "size": ratio,
    }


def norm_balance(
    first: Tensor, second: Tensor, n_draws: int, generator: torch.Generator
) -> dict[str, Any]:
    """How far the squared norms (n,) of corresponding parts of two factors agree, at equal sums;
    `shuffled` has the same for random correspondences."""
    orders = [torch.randperm(len(first), generator=generator) for _ in range(n_draws)]
    found = [_norm_balance(first, second[order]) for order in orders]
    return _norm_balance(first, second) | {"shuffled": spreads(found)}


def _norm_balance(first: Tensor, second: Tensor) -> dict[str, float]:
    a, b = first / first.sum(), second / second.sum()
    pair = torch.stack([a.log(), b.log()])
    return {
        "distance": ((a - b).abs().sum() / 2).item(),
        "correlation": torch.corrcoef(pair)[0, 1].item(),
        "size": (first.sum() / second.sum()).item(),
    }


def marks(bridge: TransformerBridge, layer: int, n_draws: int = N_TURNS) -> dict[str, Any]:
    """Weight decay's mark on a layer's products: of values and outputs by group, of queries and
    keys by group, of the MLP."""
    attn, mlp = bridge.blocks[layer].attn, bridge.blocks[layer].mlp
    weights = (attn.W_V, attn.W_O, attn.W_K, attn.W_Q, mlp.W_in, mlp.W_out)
    V, O, K, Q, up, down = (w.detach().double() for w in weights)  # noqa: E741
    generator = torch.Generator().manual_seed(layer)
    n_groups, n_heads = len(V), len(O)
    groups = torch.arange(n_heads).view(n_groups, -1)
    noise = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in (V, O)]
    half = K.shape[2] // 2

    def of_pairs(W: Tensor) -> Tensor:
        """(d_head / 2,) squared norms of the dimensions that rotary positions turn together."""
        squares = (W**2).sum(dim=tuple(range(W.ndim - 1)))
        return squares[:half] + squares[half:]

    return {
        "values_outputs": [
            balance(V[g], torch.cat([*O[of]], dim=1), n_draws, generator)
            for g, of in enumerate(groups)
        ],
        "gaussian": [
            balance(noise[0][g], torch.cat([*noise[1][of]], dim=1), 1, generator)
            for g, of in enumerate(groups)
        ],
        "keys_queries": [
            norm_balance(of_pairs(K[g]), of_pairs(Q[of]), n_draws, generator)
            for g, of in enumerate(groups)
        ],
        "mlp": norm_balance((up**2).sum(0), (down**2).sum(1), n_draws, generator)
        | {"product": _mlp_products(up, down, n_draws, generator)},
    }


def _mlp_products(
    up: Tensor, down: Tensor, n_draws: int, generator: torch.Generator
) -> dict[str, Any]:
    """The effective rank of up · down by d, and with the neurons of one shuffled."""
    orders = [torch.randperm(len(down), generator=generator) for _ in range(n_draws)]
    own, *shuffled = (
        effective_rank(torch.linalg.svdvals(up @ W)) / len(up)
        for W in (down, *(down[order] for order in orders))
    )
    return {"own": own, "shuffled": spread(shuffled)}


# --- the study ------------------------------------------------------------------------------------


@cache
def loaded(model: str, state: str) -> TransformerBridge:
    """The language model, or one of its architecture with fresh weights; once in each process."""
    trained = saesub.load_model(model)
    return trained if state == "trained" else fresh(trained, float(state))


def fresh(trained: TransformerBridge, std: float) -> TransformerBridge:
    """A model of the same architecture and tokenizer with weights drawn with seed 0."""
    config = copy.deepcopy(trained.original_model.config)
    config.initializer_range = std
    config.name_or_path = trained.cfg.model_name  # so that it has the same special tokens
    torch.manual_seed(0)
    return saesub.load_model((type(trained.original_model)(config), trained.tokenizer))


def text(corpus: str) -> Dataset:
    """Nine documents in ten, those of notebooks 01 and 02."""
    documents = saesub.load_corpus(corpus).shuffle(seed=0, keep_in_memory=True)
    return documents.select(range(9 * len(documents) // 10))


@cache
def spectra(model: str, state: str, corpus: str) -> dict[str, saesub.Spectrum]:
    """Of z in all layers, from one pass, which the cache keeps."""
    bridge = loaded(model, state)
    hooks = [f"blocks.{i}.attn.hook_z" for i in range(bridge.cfg.n_layers)]
    return saesub.measure_spectra(bridge, text(corpus), hooks, n_tokens=N_TOKENS, cache=True)


def outcome(part: Part) -> dict[str, Any]:
    """The numbers of one row."""
    bridge = loaded(part.model, part.state)
    row = asdict(part) | {"condition": CONDITIONS[part.state]}
    if part.part == "weights":
        return row | marks(bridge, part.layer)
    z = spectra(part.model, part.state, part.corpus)[f"blocks.{part.layer}.attn.hook_z"]
    W_O = bridge.blocks[part.layer].attn.W_O.detach().double()
    heads = Heads.of(z.covariance, W_O, bridge.cfg.n_key_value_heads or bridge.cfg.n_heads)
    rank = {"rank_z": z.rank_at(0.99) / z.d, "n_tokens": z.n_tokens}
    return row | rank | explained(heads, seed=part.layer)


def parts(model: str, states: Sequence[str], layers: Sequence[int]) -> list[Part]:
    """The rows of a model."""
    kinds = ("factors", "weights")
    spread_out = sorted(layers, key=lambda i: i % 3)  # an interrupted run has all depths
    return [Part(kind, i, state, model) for state in states for kind in kinds for i in spread_out]


if __name__ == "__main__":
    for name, states, layers in (
        ("smollm2-135m", ("trained", "0.02", "0.0417"), range(30)),
        ("gemma3-270m", ("trained", "0.02"), range(18)),
        ("qwen2.5-coder-0.5b", ("trained",), range(0, 24, 2)),
    ):
        for state in states:
            spectra(name, state, Part.corpus)
            run("low_rank", parts(name, (state,), layers), outcome)
            loaded.cache_clear()
            spectra.cache_clear()
