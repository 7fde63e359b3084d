"""What is in the tail: the directions of a site that hold the last 1 % of its variance.

    python notebooks/studies/tail.py

Writes data/results/studies/tail.json, whose rows are of two kinds (`part`).

"loss": a site of SmolLM2-135M on held-out text (that of notebook 01), in four layers and in all
layers from 1 on at once, is replaced by what a condition leaves of it:

- "tail": the directions beyond the rank at 99 % are taken away, around the mean;
- "shrunk": all of it is drawn to the mean, so that as much variance goes;
- "active": as much variance is taken away along random directions of the *active* subspace, those
  up to the rank at 99 %;
- "mean": mean ablation, what the whole site is worth.

Special tokens and first positions stay as they are. `energy` is the share of the site's variance
on this text that goes. Of loss and divergence (nats a token, over those of the clean model) a row
has the mean and its 95 % interval over contexts: of all predictions; by decile of how often the
next token (`next 0` the rarest) or the token itself (`own`) is in the training text; of next tokens
that the context has had already (`repeated`) or not (`new`); by quarter of the context (`place`).
`rare` is the effect on the three lowest deciles of the next token by that on all, of the tail by
that of "active": above 1, the tail matters to rare tokens more than other variance does. `tokens`
says which tokens have much of their own deviation from the mean in the tail.

"features": TopK SAEs of 2,048 features at the attention output of layer 12, trained on 256,000
tokens (4,000 mean firings a feature) from random directions or in the active subspace, three seeds.
How much of a decoder direction lies in the tail, and how often the feature fires, as a rank
correlation over living features; and `fvu` of the SAE within both parts. A feature that fires
rarely moves little: from random directions it keeps the tail that it began with, and in the active
subspace it begins with none. So rare features live in the tail only if both starts say so.

Expected, written before the study ran:

1. The tail is empty for the loss if it costs less than "active" and than "shrunk" in three of the
   four layers; it matters if it costs at least twice as much as each. I expect it to cost more than
   its variance, between these two and more at MLP outputs, and less than 2 % of mean ablation.
2. Rare next tokens: `rare` above 1 with an interval that excludes it, at both sites in three of the
   four layers, says that the tail carries what predicts them. I expect no such thing.
3. Rare tokens: the rank correlation of how often a token is in the training text with the share of
   its deviation that lies in the tail is below -0.1, at both sites in three of the four layers.
4. Rare features: the rank correlation is below -0.1 for both starts and all seeds. I expect this
   from random directions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import chain, pairwise
from typing import Any

import numpy as np
import protocol
import torch
from function import loaded, split
from protocol import Trial, run
from scipy.stats import rankdata, spearmanr
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

import saesub
from saesub.activations.spectrum import Spectrum
from saesub.activations.tokens import kept_positions
from saesub.topk.encode import autoencoder_of

SITES = ("attn_out", "mlp_out")
LAYERS = (12, 20, 4, 28)
SAE_HOOK = "blocks.12.hook_attn_out"
CONTEXT_SIZE = 256
N_CONTEXTS, BATCH = 80, 4
N_SPECTRUM = 60_000
N_RESAMPLES = 2000
FIT: dict[str, Any] = {"d_sae": 2048, "n_train": 256_000, "n_judged": 64_000, "corpus": "wiki-en"}
CONDITIONS = ("tail", "shrunk", "active", "mean")
Replace = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part(Trial):
    """A trial of an SAE (`part` "features"), or a site of the language model (`part` "loss"), whose
    `hook_name` without "blocks.L." is the site in all layers from 1 on."""

    part: str = "features"

    @property
    def hooks(self) -> set[str]:
        """Hook points whose stored activations the row needs."""
        return {self.hook_name} if self.part == "features" else set()


# --- what a condition leaves of a site ------------------------------------------------------------


def replacements(spectrum: Spectrum, seed: int = 0) -> dict[str, Replace]:
    """For each condition, what it leaves of activations (n, d)."""
    r, mean = spectrum.rank_at(0.99), spectrum.mean.float()
    axes, variances = spectrum.eigenvectors.float(), spectrum.eigenvalues
    tail = (variances[r:].sum() / variances.sum()).item()
    directions, share = random_part(spectrum, r, tail, seed)
    beyond = axes[:, r:]
    return {
        "tail": lambda x: x - (x - mean) @ beyond @ beyond.T,
        "shrunk": lambda x: x - tail**0.5 * (x - mean),
        "active": lambda x: x - share * (x - mean) @ directions @ directions.T,
        "mean": lambda x: mean.expand_as(x),
    }


def random_part(spectrum: Spectrum, r: int, variance: float, seed: int) -> tuple[Tensor, float]:
    """Orthonormal random directions (d, k) in the span of the first r, as few as hold `variance`
    (a share of all of it), and what share of x along them to take away so that exactly so much
    goes."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
    variances = spectrum.eigenvalues
    held = (variances[:r, None] * turn**2).sum(0).cumsum(0) / variances.sum()
    k = int((held < variance).sum()) + 1
    directions = spectrum.eigenvectors[:, :r] @ turn[:, :k]
    return directions.float(), (variance / held[k - 1].item()) ** 0.5


# --- losses by kind of token ----------------------------------------------------------------------


def deciles(counts: np.ndarray) -> np.ndarray:
    """(n,) 0 for the tenth with the lowest counts, to 9; equal counts are in one decile."""
    middle = rankdata(counts, method="average") - 0.5
    return np.minimum(10 * middle / len(counts), 9).astype(int)


def repeated(tokens: Tensor) -> Tensor:
    """(contexts, pos) whether the next token is in the context up to here; false at the end."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for context, marks in zip(tokens.tolist(), found, strict=True):
        seen: set[int] = set()
        for at, (token, following) in enumerate(pairwise(context)):
            seen.add(token)
            marks[at] = following in seen
    return found


def kinds(tokens: Tensor, at: Tensor, counts: Tensor) -> dict[str, np.ndarray]:
    """For each kind of prediction, which of those made `at` (contexts, pos) are of it, (n,) bool.

    Args:
        counts: (vocabulary,) how often each token is in the training text.
    """
    following = tokens.roll(-1, 1)
    by_next = deciles(counts[following[at]].numpy())
    by_own = deciles(counts[tokens[at]].numpy())
    again = repeated(tokens)[at].numpy()
    place = (4 * at.nonzero()[:, 1] // tokens.shape[1]).numpy()
    found = {"all": np.ones(len(again), dtype=bool), "new": ~again, "repeated": again}
    found |= {f"next {i}": by_next == i for i in range(10)}
    found |= {f"own {i}": by_own == i for i in range(10)}
    return found | {f"place {i}": place == i for i in range(4)}


class Resampled:
    """Means and their 95 % intervals over contexts, all on the same resamples.

    Args:
        context: (n,) of each value its context.
    """

    def __init__(self, context: np.ndarray, n: int = N_RESAMPLES) -> None:
        self._context, self._n = context, int(context.max()) + 1
        draws = np.random.default_rng(0).multinomial(self._n, [1 / self._n] * self._n, n)
        self._weights = np.concatenate([np.ones((1, self._n)), draws])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(1 + resamples,) of the values and of each resample."""
        return self._weights @ np.bincount(self._context, values, self._n)

    def ratio(self, above: np.ndarray, below: np.ndarray) -> np.ndarray:
        """Σ above / Σ below, of the values and of each resample; NaN where below is zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.sums(above) / self.sums(below)


def interval(values: np.ndarray) -> list[float]:
    """The value of the data, which comes first, and the 95 % interval of the resamples."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return [round(float(x), 6) for x in (values[0], low, high)]


def by_kind(
    found: Mapping[str, np.ndarray], of: Mapping[str, np.ndarray], resampled: Resampled
) -> dict[str, Any]:
    """The effects of each condition on each kind of prediction, and what the tail's are by others'.

    Args:
        found: (n,) effects in nats, by condition.
        of: (n,) bool, by kind.
    """
    effects = {
        condition: {k: interval(resampled.ratio(e * mask, mask)) for k, mask in of.items()}
        for condition, e in found.items()
    }
    low = sum(of[f"next {i}"] for i in range(3)) > 0

    def rare(condition: str) -> np.ndarray:
        return resampled.ratio(found[condition] * low, found[condition])

    by_others = {
        f"by {other}": interval(resampled.ratio(found["tail"], found[other]))
        for other in CONDITIONS[1:]
    }
    return {"effects": effects, "rare": interval(rare("tail") / rare("active"))} | by_others


def tail_by_token(
    share: np.ndarray, size: np.ndarray, counts: np.ndarray, resampled: Resampled
) -> dict[str, Any]:
    """How the share (n,) of a token's squared deviation `size` (n,) that lies in the tail goes with
    the token's count in the training text (n,): rank correlations, and by decile the mean share and
    the shares of all of the tail and of all of the variance."""
    of = deciles(counts)

    def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = (rankdata(v) / len(v) - 0.5 for v in (a, b))
        n, sa, sb = (resampled.sums(v) for v in (np.ones_like(a), a, b))
        saa, sbb, sab = (resampled.sums(v) for v in (a * a, b * b, a * b))
        return (sab - sa * sb / n) / np.sqrt((saa - sa**2 / n) * (sbb - sb**2 / n))

    by_count, by_size = correlation(counts, share), correlation(size, share)
    size_count = correlation(counts, size)
    partial = (by_count - by_size * size_count) / np.sqrt((1 - by_size**2) * (1 - size_count**2))
    return {
        "count": interval(by_count),
        "size": interval(by_size),
        "count_at_equal_size": interval(partial),
        "share": [round(float(share[of == i].mean()), 6) for i in range(10)],
        "of_tail": [
            round(float((share * size)[of == i].sum() / (share * size).sum()), 6) for i in range(10)
        ],
        "of_all": [round(float(size[of == i].sum() / size.sum()), 6) for i in range(10)],
        "mean_share": round(float(share.mean()), 6),
    }


# --- the language model ---------------------------------------------------------------------------


@cache
def spectra(model: str, corpus: str) -> dict[str, Spectrum]:
    """Of both sites in all layers, from one pass, which the cache keeps."""
    hooks = [f"blocks.{i}.hook_{s}" for i in range(1, loaded(model).cfg.n_layers) for s in SITES]
    text, _ = split(corpus)
    return saesub.measure_spectra(
        loaded(model), text, hooks, n_tokens=N_SPECTRUM, context_size=CONTEXT_SIZE, cache=True
    )


@cache
def token_counts(model: str, corpus: str) -> Tensor:
    """(vocabulary,) how often each token is in the training documents."""
    bridge = loaded(model)
    counts = torch.zeros(bridge.cfg.d_vocab, dtype=torch.int64)
    texts = split(corpus)[0]["text"]
    for at in range(0, len(texts), 256):
        ids = bridge.tokenizer(list(texts[at : at + 256]), add_special_tokens=False).input_ids
        counts += torch.bincount(torch.tensor([*chain(*ids)]), minlength=len(counts))
    return counts


@torch.no_grad()
def passes(
    bridge: TransformerBridge, tokens: Tensor, by_hook: Mapping[str, Mapping[str, Replace]]
) -> Iterator[dict[str, Any]]:
    """For each batch of contexts: `at`, where predictions are counted; the clean model's `loss`
    (n,) there, and its activations `x` (m, d) at ordinary text, at the first hook point; and for
    each condition the `loss` and the `divergence` (n,) and what is `gone`, in squared length."""
    first = next(iter(by_hook))
    for batch in tokens.split(BATCH):
        kept = kept_positions(bridge, batch, 1)
        at = kept.clone()
        at[:, -1] = False
        following = batch.roll(-1, 1)[at]
        heard: list[Tensor] = []
        listening: list[Any] = [(first, partial(_heard, kept, heard))]
        clean = bridge.run_with_hooks(batch, fwd_hooks=listening)[at].log_softmax(-1)
        own = -clean.gather(1, following[:, None])[:, 0]
        found: dict[str, Any] = {"at": at, "clean": own, "x": heard[0]}
        for condition in CONDITIONS:
            gone: list[float] = []
            hooks: list[Any] = [
                (name, partial(_spliced, of[condition], kept, gone)) for name, of in by_hook.items()
            ]
            logits = bridge.run_with_hooks(batch, fwd_hooks=hooks)[at]
            found[condition] = {
                "loss": cross_entropy(logits, following, reduction="none"),
                "divergence": kl_div(
                    logits.log_softmax(-1), clean, log_target=True, reduction="none"
                ).sum(-1),
                "gone": sum(gone),
            }
        yield found


def _heard(kept: Tensor, to: list[Tensor], x: Tensor, hook: HookPoint) -> None:
    to.append(x[kept])


def _spliced(
    replace: Replace, kept: Tensor, gone: list[float], x: Tensor, hook: HookPoint
) -> Tensor:
    replaced = x.clone()
    replaced[kept] = replace(x[kept])
    gone.append(((replaced - x) ** 2).sum().item())
    return replaced


def losses(part: Part) -> dict[str, Any]:
    """A row of `part` "loss"."""
    bridge, n_layers = loaded(part.model), loaded(part.model).cfg.n_layers
    everywhere = not part.hook_name.startswith("blocks.")
    hooks = [f"blocks.{i}.{part.hook_name}" for i in range(1, n_layers)]
    hooks = hooks if everywhere else [part.hook_name]
    of = spectra(part.model, part.corpus)
    tokens = saesub.pack_contexts(
        bridge, split(part.corpus)[1], n_contexts=N_CONTEXTS, context_size=CONTEXT_SIZE
    )
    by_hook = {hook: replacements(of[hook], seed) for seed, hook in enumerate(hooks)}
    batches = list(passes(bridge, tokens, by_hook))
    at = torch.cat([batch["at"] for batch in batches])
    resampled = Resampled(at.nonzero()[:, 0].numpy())
    kinds_of = kinds(tokens, at, token_counts(part.model, part.corpus))
    clean = torch.cat([batch["clean"] for batch in batches]).double().numpy()
    row: dict[str, Any] = {
        "clean": {k: interval(resampled.ratio(clean * m, m)) for k, m in kinds_of.items()},
        "n": {k: int(m.sum()) for k, m in kinds_of.items()},
    }
    for name in ("loss", "divergence"):
        values = {
            c: torch.cat([batch[c][name] for batch in batches]).double().numpy() for c in CONDITIONS
        }
        base = clean if name == "loss" else 0.0
        row[name] = by_kind({c: v - base for c, v in values.items()}, kinds_of, resampled)
    gone = {c: sum(batch[c]["gone"] for batch in batches) for c in CONDITIONS}
    row["energy"] = {c: g / gone["mean"] for c, g in gone.items()}
    row["ranks"] = [of[hook].rank_at(0.99) / of[hook].d for hook in hooks]
    if not everywhere:
        row["tokens"] = tails(part, tokens, torch.cat([batch["x"] for batch in batches]))
    return row | {"n_contexts": len(tokens), "n_spectrum": N_SPECTRUM}


def tails(part: Part, tokens: Tensor, x: Tensor) -> dict[str, Any]:
    """Which tokens of the text, of activations x (n, d), have much of their deviation in the tail,
    and how often they are in the training text; `most` and `least` are of at least eight
    occurrences here, with their mean share in the tail and their count."""
    bridge, counts = loaded(part.model), token_counts(part.model, part.corpus)
    spectrum = spectra(part.model, part.corpus)[part.hook_name]
    kept = kept_positions(bridge, tokens, 1)
    x = x.double() - spectrum.mean
    size = (x**2).sum(1)
    beyond = spectrum.eigenvectors[:, spectrum.rank_at(0.99) :]
    share = ((x @ beyond) ** 2).sum(1) / size
    own = tokens[kept]
    ids, index, n = own.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, index, share) / n
    order = [i for i in mean.argsort(descending=True).tolist() if n[i] >= 8]

    def named(i: int) -> list[Any]:
        return [
            bridge.tokenizer.decode([int(ids[i])]),
            round(mean[i].item(), 6),
            int(counts[ids[i]]),
        ]

    resampled = Resampled(kept.nonzero()[:, 0].numpy())
    found = tail_by_token(share.numpy(), size.numpy(), counts[own].numpy(), resampled)
    return found | {
        "most": [named(i) for i in order[:20]],
        "least": [named(i) for i in order[-20:]],
    }


# --- features of SAEs -----------------------------------------------------------------------------


def in_tail(directions: Tensor, spectrum: Spectrum) -> Tensor:
    """(n,) the share of each direction (n, d) that lies beyond the rank at 99 %."""
    beyond = spectrum.eigenvectors[:, spectrum.rank_at(0.99) :]
    of = directions.double()
    return ((of @ beyond) ** 2).sum(1) / (of**2).sum(1)


def rare_features(counts: Tensor, tail: Tensor, at_start: Tensor, cosine: Tensor) -> dict[str, Any]:
    """Over living features, the rank correlation of firings (n,) with the share in the tail (n,),
    with that at the start, and with the first at equal cosine to the start; and the mean share in
    the tail by decile of firings (0 the rarest)."""
    living = counts > 0
    n, now, before, kept = (v[living].numpy() for v in (counts, tail, at_start, cosine))
    ranks = np.stack([rankdata(v) for v in (n, now, kept)])
    a, b, c = np.corrcoef(ranks)[np.triu_indices(3, 1)]  # n·now, n·kept, now·kept
    of = deciles(n)
    return {
        "living": int(living.sum()),
        "rare": float(a),
        "rare_at_start": float(spearmanr(n, before).statistic) if before.std() > 1e-9 else None,
        "rare_at_equal_cosine": float((a - b * c) / ((1 - b**2) * (1 - c**2)) ** 0.5),
        "tail": [float(now[of == i].mean()) for i in range(10)],
        "cosine": [float(kept[of == i].mean()) for i in range(10)],
        "firings": [float(n[of == i].mean()) for i in range(10)],
        "mean_tail": float(now.mean()),
        "mean_tail_at_start": float(before.mean()),
    }


@torch.no_grad()
def fvu_of_parts(sae: Any, blocks: Iterator[Tensor], spectrum: Spectrum) -> dict[str, float]:
    """The SAE's FVU within the active subspace and within the tail."""
    r, axes = spectrum.rank_at(0.99), spectrum.eigenvectors.float()
    left, there = torch.zeros(2, spectrum.d, dtype=torch.float64)
    rebuild = autoencoder_of(sae)
    for x in blocks:
        left += (((x - rebuild(x)[1]) @ axes) ** 2).sum(0)
        there += (((x - spectrum.mean.float()) @ axes) ** 2).sum(0)
    return {
        "active": (left[:r].sum() / there[:r].sum()).item(),
        "tail": (left[r:].sum() / there[r:].sum()).item(),
    }


def features(part: Part) -> dict[str, Any]:
    """A row of `part` "features"."""
    at = protocol.site_of(part)
    sae = protocol.untrained(part, at)
    before = sae.W_dec.detach().clone()
    protocol.train(part, sae, at)
    start = at.store.n_tokens - part.n_judged
    found = saesub.judge(
        sae, at.blocks(start, at.store.n_tokens), n_tokens=part.n_judged, progress=False
    )
    after = sae.W_dec.detach()
    cosine = torch.cosine_similarity(before, after, dim=1)
    spectrum = at.spectrum
    return {
        "fvu": found.fvu,
        "window": found.n_tokens,
        "dead_share": found.silent[found.n_tokens],
        "epochs": at.store.epochs,
        "chance": 1 - spectrum.rank_at(0.99) / spectrum.d,
        "fvu_of_parts": fvu_of_parts(sae, at.blocks(start, at.store.n_tokens), spectrum),
    } | rare_features(found.counts, in_tail(after, spectrum), in_tail(before, spectrum), cosine)


def outcome(part: Part) -> dict[str, Any]:
    """The numbers of one row."""
    if part.part == "features":
        return asdict(part) | features(part)
    name = part.hook_name.split(".")
    condition = f"layer {name[1]}" if len(name) > 1 else "all layers at once"
    return asdict(part) | {"condition": condition} | losses(part)


def loss_parts(layers: Sequence[int] = LAYERS) -> list[Part]:
    """The rows of `part` "loss"."""
    hooks = [f"blocks.{i}.hook_{site}" for i in layers for site in SITES]
    hooks += [f"hook_{site}" for site in SITES]
    return [Part(hook, "", corpus="wiki-en", part="loss") for hook in hooks]


def feature_parts() -> list[Part]:
    """The rows of `part` "features"."""
    return [
        Part(SAE_HOOK, start, seed=seed, **FIT)
        for seed in range(3)
        for start in ("random", "subspace")
    ]


if __name__ == "__main__":
    run("tail", feature_parts(), outcome)
    spectra(Part.model, FIT["corpus"])
    run("tail", loss_parts(), outcome)
