"""Are the features of subspace initialisation as good as those of random initialisation?

    python notebooks/studies/quality.py

Writes data/results/studies/quality.json, whose rows are of several kinds (`part`).

- "quality": random and subspace initialisation under Adam and SparseAdam at the attention output in
  the middle of the model, each at its own best rate of cure.json (0.001 where that has none), three
  seeds. `moved`: the cosine of living features to where they began, also of the third of them that
  fires least. `coherence`: how alike the eight held-out contexts are in which a feature peaks.
- "untrained": the coherence of both initialisations before training, the least that can be.
- "probing": what one, five and twenty features of these SAEs say about a text.
- "half", "pair": an SAE for each half of the training documents, with seeds and spectra of their
  own, and how many features of one SAE the other has as well.
- "ablation": what it costs the language model to lose the attention output of every third layer.
- "costly": SAEs at the two layers where it costs most, besides the middle, at rates of their own.
- "loss": cross-entropy and divergence of the language model with the reconstructions in place.

All SAEs have 4,096 features. Held-out text is that of the last stored tokens, which no SAE was
trained on. Trained SAEs are kept in the folder `studies` of saesub's cache.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import protocol
import torch
from protocol import SMALL, Site, Trial, row_of, run, site_of, sweep, train, trial_of
from sae_lens import TopKSAE, TopKSAEConfig, TopKTrainingSAE
from torch import Tensor

import saesub
from saesub.activations.tokens import kept_positions
from saesub.evaluation import probing
from saesub.evaluation.features import feature_density, match_features
from saesub.evaluation.language_model_loss import sae_losses
from saesub.evaluation.passes import site_activations
from saesub.evaluation.protocol import sweep_of
from saesub.extras.coherence import Peaks, coherence, embed, snippet_spans, snippet_texts
from saesub.paths import library_versions, made_once, source_digest
from saesub.topk.encode import encoder_of

MIDDLE_LAYER = 12
MIDDLE = f"blocks.{MIDDLE_LAYER}.hook_attn_out"
LAYERS = range(0, 30, 3)
N_COSTLY = 2
N_SNIPPETS, N_AROUND = 8, 16
STRIDE = 8  # positions of a document that share a snippet
CONTEXT_SIZE = 256  # of the stored activations
N_FOR_COST, N_FOR_LOSS = 16, 80  # contexts of 256 tokens
SHARED = 0.7  # least cosine of a feature that two SAEs share
MOVED = 0.9  # a cosine to the beginning that is below it
FEW = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
N_TEXTS = 200  # of each class of a probe
NAMES = {"random": "random", "subspace": "ASI"}


@dataclass(frozen=True)
class Part(Trial):
    """A trial, what is measured of it (`part`), and the half of the training tokens that it sees:
    the first, the second, or (0) all."""

    part: str = "quality"
    half: int = 0

    @property
    def n_stored(self) -> int:
        """With a half, twice as many training and held-out tokens."""
        return super().n_stored + (self.n_train + self.n_judged if self.half else 0)


# --- trained SAEs, and the text behind held-out activations ---------------------------------------


def seen_by(trial: Part) -> Site:
    """The activations of a trial; of the second half, without those of the first."""
    return _second_half(trial) if trial.half == 2 else site_of(trial)


@cache
def _second_half(trial: Part) -> Site:
    whole = site_of(trial).store
    store = whole.split(whole.n_tokens - trial.n_train)[1]
    return Site(store, saesub.Spectrum.from_activations(store.rows(0, protocol.N_SPECTRUM)), None)


def trained(trial: Part) -> TopKTrainingSAE:
    """The SAE of a trial, trained once."""
    settings = {name: value for name, value in asdict(trial).items() if name != "part"}
    code = [source_digest("activations/", "init/", "topk/", "training/"), library_versions()]
    steps = (protocol.set_start, protocol.untrained, protocol.schedule, train)
    code += [inspect.getsource(step) for step in steps]

    def make(folder: Path) -> None:
        at = seen_by(trial)
        sae = protocol.untrained(trial, at)
        train(trial, sae, at)
        sae.cfg.metadata.hook_name = trial.hook_name
        sae.save_model(folder)

    return TopKTrainingSAE.load_from_disk(made_once(_kept_in([settings, code]), make))


def _kept_in(key: Any) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return saesub.cache_dir() / "studies" / name


def untrained(trial: Part) -> TopKTrainingSAE:
    """The SAE of a trial at step 0, made to read activations as they are."""
    at = seen_by(trial)
    sae = protocol.untrained(trial, at)
    sae.fold_activation_norm_scaling_factor(at.spectrum.d**0.5 / at.spectrum.mean_norm)
    return sae


class Text(NamedTuple):
    """The text of the held-out rows: contexts, and of each row its context and its snippet."""

    tokens: Tensor
    context: Tensor
    snippet: Tensor
    vectors: Tensor


@cache
def held_out_text() -> Text:
    """The contexts behind the last `n_judged` rows, and a vector for each of their snippets."""
    trial = Part(MIDDLE, "random", **SMALL)
    sizes = [trial.n_stored, trial.n_judged, CONTEXT_SIZE, N_AROUND, STRIDE]
    code = source_digest("activations/", "loading/models.py", "extras/coherence.py")
    key = [trial.model, trial.corpus, sizes, code, library_versions()]
    made = made_once(_kept_in(key), lambda folder: _write_text(trial, folder / "text.npz"))
    with np.load(made / "text.npz") as arrays:
        return Text(*(torch.from_numpy(arrays[name]) for name in Text._fields))


def _write_text(trial: Part, path: Path) -> None:
    model = saesub.load_model(trial.model)
    n_contexts = -(-trial.n_stored // (CONTEXT_SIZE - 16))  # more than needed
    tokens = saesub.pack_contexts(
        model, trial.corpus, n_contexts=n_contexts, context_size=CONTEXT_SIZE
    )
    place = kept_positions(model, tokens, 1).nonzero()[: trial.n_stored]
    assert len(place) == trial.n_stored
    place = place[-trial.n_judged :]
    first, last = place[0, 0].item(), place[-1, 0].item()
    _check_text(model, site_of(trial), tokens, place)
    tokens = tokens[first : last + 1]
    spans, numbers = snippet_spans(model, tokens, n_around=N_AROUND, stride=STRIDE)
    context, position = place[:, 0] - first, place[:, 1]
    vectors = embed(snippet_texts(model, tokens, spans)).half()
    arrays = Text(tokens, context, numbers[context, position], vectors)
    np.savez(path, **{name: value.numpy() for name, value in arrays._asdict().items()})


def _check_text(model: Any, at: Site, tokens: Tensor, place: Tensor) -> None:
    """Refuse a text whose activations in its middle context are not those stored."""
    context = place[len(place) // 2, 0]
    rows = (place[:, 0] == context).nonzero().flatten()
    x = site_activations(model, tokens[context : context + 1], MIDDLE)[0, place[rows, 1]]
    start = at.store.n_tokens - len(place)
    stored = at.store.rows(start + int(rows[0]), start + int(rows[-1]) + 1)
    least = torch.cosine_similarity(x, stored, dim=1).min().item()
    if least < 0.999:
        raise RuntimeError(f"the stored rows are not of this text: cosine {least:.3f}")


# --- what is measured -----------------------------------------------------------------------------


def by_density(counts: Tensor, values: Tensor) -> dict[int, tuple[int, float]]:
    """Number of features and mean value, by the power of two of how often features fire."""
    powers = counts.double().log2().floor().int()
    of = {int(p): values[powers == p].double() for p in powers.unique()}
    return {power: (len(v), v.mean().item()) for power, v in of.items()}


def coherence_of(sae: TopKTrainingSAE, at: Site) -> dict[str, Any]:
    """Coherence of all features that fire in enough contexts, above that of exchanged snippets."""
    text, encode = held_out_text(), encoder_of(sae)
    peaks, counts = Peaks(sae.cfg.d_sae, N_SNIPPETS), torch.zeros(sae.cfg.d_sae).long()
    start, n = at.store.n_tokens - len(text.context), int(text.context[-1]) + 1
    ends = torch.searchsorted(text.context, torch.arange(0, n + 8, 8)).tolist()
    for first, stop in pairwise(ends):
        features = encode(at.store.rows(start + first, start + stop)).to_dense()
        counts += (features != 0).sum(0)
        peaks.add(features, text.context[first:stop], text.snippet[first:stop])
    found = coherence(text.vectors, peaks.places())
    scored = ~found.by_feature.isnan()
    return {
        "features": int(scored.sum()),
        "living": int((counts > 0).sum()),
        "coherence": found.by_feature.nanmean().item(),
        "shuffled": found.shuffled.nanmean().item(),
        "coherence_by_density": by_density(counts[scored], found.by_feature[scored]),
    }


def moved(cosines: Tensor) -> dict[str, Any]:
    """How far features are from where they began."""
    return {
        "features": len(cosines),
        "below": (cosines < MOVED).double().mean().item(),
        "cosines": cosines.double().quantile(FEW).tolist(),
    }


def fitted(trial: Part) -> tuple[dict[str, Any], TopKTrainingSAE, Tensor]:
    """The usual row of a trial, its SAE, and how often each feature fires on held-out tokens."""
    at, sae = seen_by(trial), trained(trial)
    start = at.store.n_tokens - trial.n_judged
    validation = at.blocks(start - protocol.N_VALIDATION, start)
    chosen_on = saesub.reconstruction(sae, validation, progress=False)
    blocks = at.blocks(start, at.store.n_tokens)
    found = saesub.judge(sae, blocks, n_tokens=trial.n_judged, progress=False)
    return row_of(trial, at.store.epochs, chosen_on, found), sae, found.counts


def quality(trial: Part) -> dict[str, Any]:
    """Dead features and FVU, coherence, and how far features have moved."""
    row, sae, counts = fitted(trial)
    at = seen_by(trial)
    begun = protocol.untrained(trial, at).W_dec.detach()
    cosines = torch.cosine_similarity(begun, sae.W_dec.detach(), dim=1)
    living = counts > 0
    rare = living & (counts <= counts[living].double().quantile(1 / 3))
    about = {"moved": moved(cosines[living]), "moved_rarest": moved(cosines[rare])}
    return row | about | coherence_of(sae, at)


def before_training(trial: Part) -> dict[str, Any]:
    """Coherence at step 0."""
    return asdict(trial) | coherence_of(untrained(trial), seen_by(trial))


def pair(trial: Part) -> dict[str, Any]:
    """The features that the SAEs of both halves have, and by density in the first.

    `cosines` are the quantiles of the matched cosines in steps of a hundredth; `untrained` says
    how many features the two initialisations share.
    """
    first, second = trial, replace(trial, half=2, seed=trial.seed + 3)
    rows, counts = [], []
    for of_half in (first, second):
        at, sae = seen_by(of_half), trained(of_half)
        start, n = at.store.n_tokens - trial.n_judged, trial.n_judged
        blocks = at.blocks(start, at.store.n_tokens)
        fires = (feature_density(sae, blocks, n_tokens=n, progress=False) * n).round()
        rows.append(sae.W_dec.detach()[fires > 0])
        counts.append(fires[fires > 0])
    found = match_features(*rows)
    shared = (found.cosine >= SHARED).double()
    starts = [protocol.untrained(t, seen_by(t)).W_dec.detach() for t in (first, second)]
    by_chance = match_features(*starts).cosine
    return asdict(trial) | {
        "living": [len(r) for r in rows],
        "matched": len(shared),
        "shared": int(shared.sum()),
        "shared_by_density": by_density(counts[0][found.of_a], shared),
        "cosines": found.cosine.double().quantile(torch.linspace(0, 1, 101).double()).tolist(),
        "untrained": {
            "shared": int((by_chance >= SHARED).sum()),
            "mean_cosine": by_chance.mean().item(),
        },
    }


def ablation(trial: Part) -> dict[str, Any]:
    """Cross-entropy and divergence after zero and mean ablation of some attention outputs."""
    model, tokens = saesub.load_model(trial.model), held_out_text().tokens[1 : 1 + N_FOR_COST]
    costs = {}
    for layer in LAYERS:
        of_layer = Part(f"blocks.{layer}.hook_attn_out", "random", **SMALL)
        loss = sae_losses(model, [_mean_at(of_layer)], tokens)[0]
        costs[layer] = {
            "clean": loss.clean,
            "zero": loss.zero_ablated - loss.clean,
            "mean": loss.with_sae - loss.clean,
            "zero_kl": loss.kl_zero_ablated,
            "mean_kl": loss.kl_with_sae,
        }
    return asdict(trial) | {"n_tokens": tokens.numel(), "costs": costs}


def _mean_at(trial: Part) -> TopKSAE:
    """An SAE that reconstructs every activation as their mean."""
    spectrum = site_of(trial).spectrum
    sae = TopKSAE(TopKSAEConfig(d_in=spectrum.d, d_sae=1, k=1))
    sae.cfg.metadata.hook_name = trial.hook_name
    for parameter in sae.parameters():
        parameter.data.zero_()
    sae.b_dec.data.copy_(spectrum.mean)
    return sae


def loss(trial: Part) -> dict[str, Any]:
    """What the language model loses with the reconstructions of all seeds at a hook point."""
    given = [t for t in chosen(trial.hook_name, trial.d_sae) if t.optimizer == "adam"]
    tokens = held_out_text().tokens[-N_FOR_LOSS - 1 : -1]  # the last may not be stored whole
    saes = [trained(t) for t in given]
    losses = sae_losses(saesub.load_model(trial.model), saes, tokens)
    rows = [
        {"condition": NAMES[t.start], "lr": t.lr, "seed": t.seed}
        | found._asdict()
        | {"recovered": found.recovered, "kl_recovered": found.kl_recovered}
        for t, found in zip(given, losses, strict=True)
    ]
    return asdict(trial) | {"n_tokens": tokens.numel(), "losses": rows}


def probes(trial: Part) -> dict[str, Any]:
    """Accuracy of sparse probes on the features of all SAEs and on activations (`k` 0: all)."""
    saes: dict[str, TopKTrainingSAE] = {}
    for t in chosen(trial.hook_name, trial.d_sae):
        saes[f"{named(t)}, {t.seed}"] = trained(t)
    for start, name in NAMES.items():
        saes[f"{name}, untrained, 0"] = untrained(Part(MIDDLE, start, **SMALL))
    model = saesub.load_model(trial.model)
    features: dict[str, dict[str, Tensor]] = {}
    for label, texts in classes().items():
        given = probing.mean_features(
            model, texts[:N_TEXTS], MIDDLE, saes, max_tokens=48, progress=False
        )
        for name, values in given.items():
            features.setdefault(name, {})[label] = values
    rows = []
    for name, values in features.items():
        raw = name == probing.RAW
        found = probing.probe_tasks(values, TASKS, (1, 5, 20, None) if raw else (1, 5, 20))
        condition, _, seed = ("activations, 0" if raw else name).rpartition(", ")
        found = found.assign(condition=condition, seed=int(seed))
        rows += found.to_dict("records")
    return asdict(trial) | {"n_texts": N_TEXTS, "accuracies": rows}


TASKS = {
    "French or Spanish": ("French", "Spanish"),
    "English or French": ("English", "French"),
    "code or documentation": ("code", "documentation"),
    "recipe or encyclopedia": ("recipe", "English"),
    "place or person": ("place", "person"),
}
_PLACE = re.compile(
    r"\bis (a|an|the)\b.*\b(city|town|village|island|river|country|capital|mountain|lake)\b"
)
_PERSON = re.compile(
    r"\bwas (a|an|the)\b.*\b(king|queen|emperor|poet|writer|philosopher|painter|composer"
    r"|scientist|mathematician|politician|general|explorer|singer|inventor)\b"
)


def classes() -> dict[str, list[str]]:
    """Texts by what they are: corpora, and summaries by what their first sentence says, which is
    left out."""
    names = {"English": "wiki-en", "French": "wiki-fr", "Spanish": "wiki-es"}
    names |= {"recipe": "recipes-en", "documentation": "science-docs", "code": "code-python"}
    texts = {label: list(saesub.load_corpus(name)["text"]) for label, name in names.items()}
    # From the middle, past licence and docstring.
    texts["code"] = [text[len(text) // 2 :] for text in texts["code"]]
    split = [re.split(r"(?<=[.!?]) ", text, maxsplit=1) for text in texts["English"]]
    whole = [(s[0], s[1]) for s in split if len(s) == 2 and len(s[1]) > 200]
    place, person = _PLACE.search, _PERSON.search
    texts["place"] = [rest for first, rest in whole if place(first) and not person(first)]
    texts["person"] = [rest for first, rest in whole if person(first) and not place(first)]
    return texts


# --- the study ------------------------------------------------------------------------------------


def named(trial: Trial) -> str:
    """A condition's name."""
    return NAMES[trial.start] + " + SparseAdam" * (trial.optimizer == "sparse_adam")


def chosen(hook_name: str, d_sae: int) -> list[Part]:
    """The trained SAEs of all documents at the rates that were chosen: those of several seeds."""
    rows = [r for r in protocol.recorded("quality") if r["part"] in ("quality", "costly")]
    given = [trial_of(r, Part) for r in rows]
    trials = [t for t in given if (t.hook_name, t.d_sae) == (hook_name, d_sae)]
    several = {replace(t, seed=0) for t in trials if t.seed == 1}
    kept = [t for t in trials if replace(t, seed=0) in several]
    return sorted(kept, key=lambda t: (t.optimizer, t.start, t.seed))


def best_rate(condition: Trial) -> float:
    """The condition's best rate in cure.json, or 0.001 if it is not there."""
    wanted = Trial(**{f.name: getattr(condition, f.name) for f in fields(Trial)})
    rows = [
        row
        for row in protocol.recorded("cure")
        if replace(trial_of(row), lr=0.0, seed=0) == replace(wanted, lr=0.0, seed=0)
    ]
    if not rows:
        print(f"cure.json has no rate for {named(condition)}, {condition.d_sae} features: 0.001")
        return 1e-3
    sweep = sweep_of(rows)
    return sweep.rates[sweep.best]


def costly_layers() -> list[int]:
    """The layers besides the middle at which zero ablation adds most to the cross-entropy."""
    (row,) = (r for r in protocol.recorded("quality") if r["part"] == "ablation")
    added = {int(layer): cost["zero"] for layer, cost in row["costs"].items()}
    added.pop(MIDDLE_LAYER)
    return sorted(added, key=lambda layer: -added[layer])[:N_COSTLY]


MEASURES = {
    "quality": quality,
    "untrained": before_training,
    "half": lambda trial: fitted(trial)[0],
    "costly": lambda trial: fitted(trial)[0],
    "pair": pair,
    "ablation": ablation,
    "loss": loss,
    "probing": probes,
}


def outcome(trial: Part) -> dict[str, Any]:
    """What the trial's part asks for."""
    return MEASURES[trial.part](trial)


def at_best_rates(conditions: Iterable[Part]) -> list[Part]:
    """The conditions at their own rates, with three seeds each."""
    tuned = [replace(c, lr=best_rate(c)) for c in conditions]
    return [replace(c, seed=c.seed + n) for n in range(3) for c in tuned]


def study() -> None:
    """All parts; those that need others after them."""
    starts, optimizers = ("random", "subspace"), ("adam", "sparse_adam")
    protocol.harvest(Part(f"blocks.{layer}.hook_attn_out", "random", **SMALL) for layer in LAYERS)
    held_out_text()  # here, with all cores
    conditions = [
        Part(MIDDLE, start, optimizer, **SMALL) for optimizer in optimizers for start in starts
    ]
    one = Part(MIDDLE, "none", lr=0.0, **SMALL)
    begun = [replace(one, start=start, part="untrained") for start in starts]
    run("quality", [replace(one, part="ablation"), *at_best_rates(conditions), *begun], outcome)
    hooks = [f"blocks.{layer}.hook_attn_out" for layer in costly_layers()]
    sweep(
        "quality",
        [Part(hook, start, part="costly", **SMALL) for hook in hooks for start in starts],
        outcome=outcome,
    )
    halves = [Part(MIDDLE, start, part="half", half=1, **SMALL) for start in starts]
    first = at_best_rates(halves)
    second = [replace(t, half=2, seed=t.seed + 3) for t in first]
    run("quality", [*first, *second], outcome)
    run(
        "quality",
        [
            *(Part(hook, "all", part="loss", lr=0.0, **SMALL) for hook in (MIDDLE, *hooks)),
            replace(one, part="probing"),
            *(replace(t, part="pair") for t in first),
        ],
        outcome,
    )


if __name__ == "__main__":
    study()
