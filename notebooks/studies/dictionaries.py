"""Does the initialisation carry over to other sparse dictionaries, compared like for like?

    python notebooks/studies/dictionaries.py

Writes data/results/studies/dictionaries.json. At the attention output of layer 12:

- SAEs: BatchTopK, Matryoshka, ReLU with an L1 penalty, gated, JumpReLU;
- transcoders: TopK and with an L1 penalty from the heads' output z, and, with a penalty and a skip
  connection, from the attention's input at the same token;
- Lorsa, whose heads start in the value subspace of the model's own heads ("Lorsa", as the authors'
  library does since 2.0.0b4) or in the subspace of what these heads write ("Lorsa, output side").

In each kind "random" and "ASI" differ in the subspace alone: encoder and decoder (or the two sides
of a Lorsa head) are tied in both, both are centred, and both have their norm by the same rule.
Transcoders and Lorsa are trained untied too, transcoders then with the norms of their class.

As many features are active in each condition: 32 by construction, or by the coefficient of the
penalty, which is searched anew at every learning rate until 32 ± 5 % are active on the validation
part. Each condition has its own rate: the best by FVU on the validation part, with a rate on either
side of it. There, and at rates that fit as well (`Sweep.as_good`), it is trained with three seeds;
"ASI" also at such rates of "random".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import exp, log
from pathlib import Path
from typing import Any

import protocol
import torch
from protocol import Site, Trial, judged, recorded, row_of, run, schedule, set_start, site, trial_of
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.topk_sae import TopK
from torch import Tensor
from torch.nn.functional import normalize

import saesub
from saesub.evaluation.features import Firing
from saesub.evaluation.held_out import Judgement
from saesub.evaluation.protocol import Sweep, sweep_at_l0
from saesub.extras import lorsa, transcoders
from saesub.paths import cache_dir, made_once, source_digest
from saesub.topk.encode import encoder_of

NAME = "dictionaries"
LAYER = 12
WRITTEN = f"blocks.{LAYER}.hook_attn_out"
TOPK = {"k": 32, "aux_loss_coefficient": 0.0}
PENALTIES = {  # the first coefficient to try; it needs no care
    "ReLU": 4.0,
    "gated": 5.0,
    "JumpReLU": 0.7,
    "transcoder": 6.0,
    "skip transcoder": 0.35,
}
READS = {
    "TopK transcoder": f"blocks.{LAYER}.attn.hook_z",
    "transcoder": f"blocks.{LAYER}.attn.hook_z",
    "skip transcoder": f"blocks.{LAYER}.ln1.hook_normalized",
}
FIRST_RATE, MOST_RATES = 2e-3, 6
TOLERANCE, MOST_COEFFICIENTS = 0.05, 6
_POWER_OF_RATE = -0.5  # of the coefficient that leaves k active; a first guess
N_PAIRS = 24_000  # training tokens by which a transcoder's encoder is tied to its decoder
CONTEXT, N_CONTEXTS = 128, 1568  # of a Lorsa: tokens of a context, contexts in all
_BLOCK = 1024


@dataclass(frozen=True)
class Dictionary(Trial):
    """The settings of one dictionary.

    `coefficient` is that of the penalty, 0 where the number of active features is fixed. Of a Lorsa
    `n_train` and `n_judged` count all positions of its contexts, of which some are not judged.
    """

    hook_name: str = WRITTEN
    start: str = "random"
    d_sae: int = 2048
    n_train: int = 256_000
    n_judged: int = 64_000
    batch_size: int = 512
    kind: str = "BatchTopK"
    tied: bool = True
    coefficient: float = 0.0

    @property
    def condition(self) -> str:
        """What a notebook calls it."""
        name = {"random": "random", "subspace": "ASI"}[self.start]
        return name if self.tied else f"{name}, untied"

    @property
    def is_lorsa(self) -> bool:
        """Whether it is one of the kinds of Lorsa, which read whole contexts."""
        return self.kind.startswith("Lorsa")

    @property
    def hooks(self) -> set[str]:
        """Hook points whose stored activations the trial needs."""
        if self.is_lorsa:
            return set()
        return {self.hook_name} | ({READS[self.kind]} if self.kind in READS else set())


# --- SAEs ----------------------------------------------------------------------------------------


def settings_of(trial: Dictionary) -> tuple[str, dict[str, Any]]:
    """SAELens' name of an SAE's architecture, and its settings."""
    d, c = trial.d_sae, trial.coefficient
    warm_up = trial.n_train // trial.batch_size // 5
    l1 = {"l1_coefficient": c, "l1_warm_up_steps": warm_up}
    # SAELens' defaults for the thresholds would not rise far enough in so short a run.
    jump = {"jumprelu_init_threshold": 1.5, "jumprelu_bandwidth": 0.5}
    return {
        "BatchTopK": ("batchtopk", TOPK),
        "Matryoshka": (
            "matryoshka_batchtopk",
            TOPK | {"matryoshka_widths": [d // 16, d // 4, d]},
        ),
        "ReLU": ("standard", l1),
        "gated": ("gated", l1),
        "JumpReLU": ("jumprelu", {"l0_coefficient": c, "l0_warm_up_steps": warm_up} | jump),
    }[trial.kind]


def sae_of(trial: Dictionary, at: Site) -> Any:
    """An SAE at step 0."""
    torch.manual_seed(trial.seed)
    architecture, settings = settings_of(trial)
    sae_class, config_class = get_sae_training_class(architecture)
    shape: Any = {"d_in": at.spectrum.d, "d_sae": trial.d_sae, "decoder_init_norm": 1.0}
    config = config_class(**shape, normalize_activations="expected_average_only_in", **settings)
    sae: Any = sae_class(config)
    set_start(sae, trial, at)
    return sae


def sae_outcome(trial: Dictionary) -> dict[str, Any]:
    """Train and judge an SAE."""
    at = protocol.site_of(trial)
    sae = sae_of(trial, at)
    norm = norm_of(sae)
    protocol.train(trial, sae, at)
    return judged(trial, sae, at) | {"norm_at_start": norm}


def norm_of(sae: SAE[Any]) -> float:
    """Mean norm of the decoder rows."""
    return sae.W_dec.detach().norm(dim=1).mean().item()


# --- transcoders ---------------------------------------------------------------------------------


@dataclass
class TopKTranscoderConfig(transcoders.TrainingTranscoderConfig):
    """`TrainingTranscoderConfig` with k; SAELens has no TopK transcoder."""

    k: int = 32


class TopKTranscoder(transcoders.TrainingTranscoder):
    """A transcoder with the activation function of SAELens' TopK SAEs."""

    cfg: TopKTranscoderConfig

    def get_activation_fn(self) -> TopK:
        """ReLU of the k largest."""
        return TopK(self.cfg.k)


def sites_of(trial: Dictionary) -> tuple[Site, Site]:
    """What a transcoder reads and what it writes."""
    read, written = (
        site(trial.model, trial.corpus, hook_name, trial.n_stored)
        for hook_name in (READS[trial.kind], trial.hook_name)
    )
    return read, written


def transcoder_of(trial: Dictionary, read: Site, written: Site) -> Any:
    """A transcoder at step 0."""
    torch.manual_seed(trial.seed)
    transcoder_class, config_class = {
        "TopK transcoder": (TopKTranscoder, TopKTranscoderConfig),
        "transcoder": (transcoders.TrainingTranscoder, transcoders.TrainingTranscoderConfig),
        "skip transcoder": (
            transcoders.TrainingSkipTranscoder,
            transcoders.TrainingSkipTranscoderConfig,
        ),
    }[trial.kind]
    fixed: dict[str, Any] = {"k": trial.k} if trial.kind == "TopK transcoder" else {}
    config = config_class(
        d_in=read.spectrum.d,
        d_out=written.spectrum.d,
        d_sae=trial.d_sae,
        l1_coefficient=trial.coefficient,
        l1_warm_up_steps=trial.n_train // trial.batch_size // 5,
        **fixed,
    )
    transcoder = transcoder_class(config)
    spaces = {"spectrum": written.spectrum, "input_spectrum": read.spectrum}
    if trial.condition == "random, untied":  # SAELens' own, centred
        saesub.center_biases(transcoder, **spaces)
        return transcoder
    pairs: dict[str, Any] = {}  # without pairs both sides are drawn for themselves
    if trial.tied:
        pairs = {
            "activations": written.store.rows(0, min(N_PAIRS, trial.n_train)),
            "input_activations": read.store.rows(0, min(N_PAIRS, trial.n_train)),
        }
    d_init = trial.d_init if trial.start == "subspace" else written.spectrum.d
    saesub.initialize_in_subspace(transcoder, d_init=d_init, seed=trial.seed, **spaces, **pairs)
    return transcoder


def transcoder_outcome(trial: Dictionary) -> dict[str, Any]:
    """Train and judge a transcoder."""
    read, written = sites_of(trial)
    transcoder = transcoder_of(trial, read, written)
    norm = norm_of(transcoder)
    trainer = saesub.SubspaceSAETrainer(
        schedule(trial),
        transcoder,
        iter(()),
        optimizer="adam",
        dead_window_tokens=trial.n_train // 4,
    )
    parts = [s.store.split(s.store.n_tokens - trial.n_train)[0] for s in (read, written)]
    saesub.train_together(
        {"trial": trainer},
        lambda step: transcoders.paired_batches(
            *parts, trial.batch_size, seed=trial.seed, start_step=step
        ),
    )

    def fit(start: int, stop: int) -> Any:
        pairs = zip(read.blocks(start, stop), written.blocks(start, stop), strict=True)
        return transcoders.transcoder_reconstruction(transcoder, pairs)

    n, start = written.store.n_tokens, written.store.n_tokens - trial.n_judged
    found, encode = fit(start, n), encoder_of(transcoder)
    blocks = (part for block in read.blocks(start, n) for part in block.split(_BLOCK))
    firing = fired((encode(part) for part in blocks), trial.d_sae, trial.n_judged)
    judgement = Judgement(found.fvu, found.l0, n - start, firing.counts, firing.silent())
    validation = fit(start - protocol.N_VALIDATION, start)
    row = row_of(trial, written.store.epochs, validation, judgement)
    return row | {"norm_at_start": norm}


def fired(blocks: Iterable[Tensor], d_sae: int, n_tokens: int) -> Firing:
    """Firing of features on `n_tokens` tokens, with the windows of `saesub.judge`."""
    windows = [2**power for power in range(13, 64) if 2**power < n_tokens]
    firing = Firing(d_sae, torch.device("cpu"), [*windows, n_tokens])
    for features in blocks:
        firing.add(features)
    return firing


# --- Lorsa ---------------------------------------------------------------------------------------


@cache
def sequences(model: str, corpus: str, n_contexts: int) -> lorsa.AttentionSequences:
    """What the layer reads and writes on whole contexts, from the cache."""
    name = f"{model} {corpus} {LAYER} {n_contexts} x {CONTEXT}"

    def make(folder: Path) -> None:
        bridge = saesub.load_model(model)
        tokens = saesub.pack_contexts(bridge, corpus, n_contexts=n_contexts, context_size=CONTEXT)
        made = lorsa.attention_sequences(bridge, tokens, LAYER)
        torch.save({"x": made.x, "y": made.y, "kept": made.kept}, folder / "sequences.pt")

    code = source_digest("activations/", "extras/lorsa/attention.py", "loading/")[:12]
    place = made_once(cache_dir() / "studies" / f"{name} {code}".replace(" ", "-"), make)
    return lorsa.AttentionSequences(**torch.load(place / "sequences.pt", mmap=True))


def parts_of(trial: Dictionary) -> tuple[lorsa.AttentionSequences, ...]:
    """Contexts to train on, to choose a rate by, and to be judged on."""
    n_train, n_judged = trial.n_train // CONTEXT, trial.n_judged // CONTEXT
    whole = sequences(trial.model, trial.corpus, N_CONTEXTS)
    sizes = [n_train, N_CONTEXTS - n_train - n_judged, n_judged]
    parts = zip(*(t.split(sizes) for t in (whole.x, whole.y, whole.kept)), strict=True)
    return tuple(lorsa.AttentionSequences(*part) for part in parts)


@cache
def loaded(name: str) -> Any:
    """The model, once in a process."""
    return saesub.load_model(name)


def lorsa_of(trial: Dictionary) -> lorsa.Lorsa:
    """A Lorsa with the model's own query-key circuits, not calibrated yet.

    "Lorsa": every head reads a random direction, of the value subspace of the model's head whose
    circuit it has ("ASI") or of the whole space ("random"), and writes what that head makes of it.
    "Lorsa, output side": it writes a random direction, of the active subspace of that head's output
    or of the whole space, and reads what the head computes along it. Untied: both are random.
    """
    model = loaded(trial.model)
    made = lorsa.Lorsa.from_attention(model, LAYER, n_heads=trial.d_sae, k=trial.k, seed=trial.seed)
    if not trial.tied:
        return made
    if trial.kind == "Lorsa":
        set_reading_side(made, lorsa.dense_lorsa(model, LAYER), trial)
        return made
    z = z_spectrum(trial.model, trial.corpus, trial.n_train)
    inside = trial.start == "subspace"
    d_init = trial.d_init if inside else made.cfg.d_model
    lorsa.initialize_lorsa(made, model, z, d_init, per_head=inside, seed=trial.seed)
    return made


@torch.no_grad()
def set_reading_side(made: lorsa.Lorsa, own: lorsa.Lorsa, trial: Dictionary) -> None:
    """Draw what heads read, and let them write what the model's head makes of it; unit vectors."""
    generator = torch.Generator().manual_seed(trial.seed)
    n_heads, size = own.cfg.n_qk, made.cfg.n_heads // own.cfg.n_qk
    values, outputs = (w.detach().unflatten(0, (n_heads, -1)).cpu() for w in (own.W_V, own.W_O))
    for head, (W_V, W_O) in enumerate(zip(values, outputs, strict=True)):  # (d_head, d_model) each
        rows = slice(head * size, (head + 1) * size)
        basis = torch.eye(W_V.shape[1])
        if trial.start == "subspace":
            basis = torch.linalg.qr(W_V.T).Q
        w_v = normalize(torch.randn(size, basis.shape[1], generator=generator), dim=-1) @ basis.T
        made.W_V[rows] = w_v
        made.W_O[rows] = normalize(w_v @ W_V.T @ W_O, dim=-1)


@cache
def z_spectrum(model: str, corpus: str, n_train: int) -> saesub.Spectrum:
    """The spectrum of the heads' output z on the training contexts."""
    whole, own = sequences(model, corpus, N_CONTEXTS), lorsa.dense_lorsa(loaded(model), LAYER)
    total = saesub.SpectrumAccumulator(own.cfg.n_heads)
    n = n_train // CONTEXT
    with torch.no_grad():
        for x, kept in zip(whole.x[:n].split(16), whole.kept[:n].split(16), strict=True):
            total.update(own.pre_activations(x)[kept])
    return total.finish()


def lorsa_outcome(trial: Dictionary) -> dict[str, Any]:
    """Train and judge a Lorsa; `batch_size` counts the positions of whole contexts."""
    train, validation, held_out = parts_of(trial)
    made = lorsa_of(trial)
    lorsa.calibrate_lorsa(made, train)
    norm = made.W_O.detach().norm(dim=1).mean().item()
    lorsa.train_lorsa(
        made,
        train,
        batch_size=trial.batch_size // CONTEXT,
        lr=trial.lr,
        optimizer="adam",
        seed=trial.seed,
        progress=False,
    )
    found = lorsa.evaluate_lorsa(made, held_out)
    with torch.no_grad():
        blocks = (
            made.encode(x).dense(made.cfg.n_heads)[kept] for x, _, kept in held_out.batches(4)
        )
        firing = fired(blocks, trial.d_sae, found.n_tokens)
    judgement = Judgement(found.fvu, found.l0, found.n_tokens, firing.counts, firing.silent())
    return row_of(trial, 1.0, lorsa.evaluate_lorsa(made, validation), judgement) | {
        "norm_at_start": norm,
        "trained_on": train.n_tokens,
    }


# --- the study -----------------------------------------------------------------------------------


def outcome(trial: Dictionary) -> dict[str, Any]:
    """Train and judge one dictionary."""
    kinds = dict.fromkeys(READS, transcoder_outcome)
    made = lorsa_outcome if trial.is_lorsa else kinds.get(trial.kind, sae_outcome)
    return made(trial) | {"condition": trial.condition}


Rows = dict[float, dict[str, Any]]  # coefficient -> row


def next_coefficient(l0: dict[float, float], k: int, power: float = -1.0) -> float | None:
    """The coefficient to try next, from those tried and how many features they leave active; None
    if one leaves k, or enough were tried. The number falls with a power of the coefficient, which
    the two nearest tell; `power` is for a single one.

    >>> next_coefficient({4.0: 64.0}, 32)
    8.0
    >>> next_coefficient({4.0: 64.0, 8.0: 33.0}, 32) is None
    True
    """
    best = _nearest(l0, k)[0]
    if abs(l0[best] / k - 1) <= TOLERANCE or len(l0) == MOST_COEFFICIENTS:
        return None
    coefficient = _solved(best, l0[best], k, _power(l0, k, power))
    return None if coefficient in l0 else coefficient


def _off(l0: float, k: int) -> float:
    return log(max(l0, 1e-3) / k)


def _nearest(l0: dict[float, float], k: int) -> list[float]:
    return sorted(l0, key=lambda c: abs(_off(l0[c], k)))


def _power(l0: dict[float, float], k: int, otherwise: float = -1.0) -> float:
    """With which power of the coefficient the number of active features falls, near k."""
    if len(l0) == 1:
        return otherwise
    a, b = _nearest(l0, k)[:2]
    return min(max((_off(l0[b], k) - _off(l0[a], k)) / log(b / a), -4.0), -0.3)


def _solved(coefficient: float, l0: float, k: int, power: float) -> float:
    """The coefficient that leaves k active, by a power law through one that was tried."""
    factor = exp(-_off(l0, k) / power)
    return float(f"{coefficient * min(max(factor, 1 / 3), 3):.5g}")


def first_coefficient(lr: float, tuned: dict[float, dict[float, float]], k: int) -> float:
    """The coefficient to try first at a rate: the one of the nearest rate that was tried, moved as
    between the two nearest. `tuned` is rate -> coefficient -> active features."""
    rates = sorted(tuned, key=lambda rate: abs(log(rate / lr)))
    solved = []
    for rate in rates[:2]:
        best = _nearest(tuned[rate], k)[0]
        solved.append(_solved(best, tuned[rate][best], k, _power(tuned[rate], k)))
    power = _POWER_OF_RATE
    if len(solved) > 1:
        power = min(max(log(solved[1] / solved[0]) / log(rates[1] / rates[0]), -2.0), 1.0)
    return float(f"{solved[0] * (lr / rates[0]) ** power:.5g}")


def nearest_to_k(rows: Rows, k: int) -> dict[str, Any]:
    """The row whose number of active features is nearest to k on the validation part."""
    return rows[_nearest(l0_of(rows), k)[0]]


def tried(seed: int = 0) -> dict[Dictionary, Rows]:
    """What is recorded of a seed: condition at a rate -> coefficient -> row."""
    found: dict[Dictionary, Rows] = {}
    for row in recorded(NAME):
        trial = trial_of(row, Dictionary)
        if trial.seed == seed:
            cell = replace(trial, coefficient=0.0)
            found.setdefault(cell, {})[trial.coefficient] = row
    return found


def next_trial(cell: Dictionary, found: dict[Dictionary, Rows]) -> Dictionary | None:
    """What to train next of a condition at a rate; None if nothing."""
    rows = found.get(cell, {})
    if cell.kind not in PENALTIES:
        return None if rows else cell
    tuned = {c.lr: l0_of(several) for c, several in found.items() if replace(c, lr=cell.lr) == cell}
    if not tuned:
        return replace(cell, coefficient=PENALTIES[cell.kind])
    if not rows:
        return replace(cell, coefficient=first_coefficient(cell.lr, tuned, cell.k))
    longest = max(tuned.values(), key=len)
    coefficient = next_coefficient(l0_of(rows), cell.k, _power(longest, cell.k))
    return None if coefficient is None else replace(cell, coefficient=coefficient)


def l0_of(rows: Rows) -> dict[float, float]:
    """Active features on the validation part at each coefficient."""
    return {c: row["validation_l0"] for c, row in rows.items()}


def tune(cells: Sequence[Dictionary]) -> dict[Dictionary, Rows]:
    """Train conditions at rates until each has k active features; returns all that is recorded."""
    while True:
        found = tried()
        left = [trial for cell in cells if (trial := next_trial(cell, found)) is not None]
        if not left:
            return found
        run(NAME, left, outcome)


def sweep_of(cells: Sequence[Dictionary], found: dict[Dictionary, Rows]) -> Sweep:
    """The rates of one condition, at k active features each."""
    return sweep_at_l0([row for cell in cells for row in found[cell].values()], cells[0].k)


def study(conditions: Sequence[Dictionary], n_seeds: int = 3) -> None:
    """Find the rates at which each condition fits best, or as well, and train it there with more
    seeds; "ASI" also at such rates of its baseline."""
    rates = {c: {FIRST_RATE} for c in conditions}
    while True:
        cells = {c: [replace(c, lr=lr) for lr in sorted(rates[c])] for c in conditions}
        found = tune([cell for several in cells.values() for cell in several])
        sweeps = {c: sweep_of(several, found) for c, several in cells.items()}
        more = {c: s.next_rate() for c, s in sweeps.items() if len(rates[c]) < MOST_RATES}
        more = {c: lr for c, lr in more.items() if lr is not None}
        if not more:
            break
        for c, lr in more.items():
            rates[c].add(lr)
    near: dict[Dictionary, set[float]] = {}
    while (found_near := {c: near_rates(c) for c in conditions}) != near:
        near = found_near
        rates = {c: near[c] | near[replace(c, start="random")] for c in conditions}
        compared = [replace(c, lr=lr) for c in conditions for lr in sorted(rates[c])]
        found = tune(compared)
        chosen = [trial_of(nearest_to_k(found[cell], cell.k), Dictionary) for cell in compared]
        run(NAME, [replace(c, seed=c.seed + n) for n in range(1, n_seeds) for c in chosen], outcome)


def near_rates(condition: Dictionary) -> set[float]:
    """The rates at which a condition fits as well as at its best, by the seeds that there are."""
    cells = ((trial_of(row, Dictionary), row) for row in recorded(NAME))
    at = {"lr": condition.lr, "seed": condition.seed, "coefficient": 0.0}
    own = [row for trial, row in cells if replace(trial, **at) == condition]
    return protocol.near_rates(own, lambda of: sweep_at_l0(of, condition.k))


def both(kind: str, **settings: Any) -> list[Dictionary]:
    """The two initialisations of a kind."""
    return [Dictionary(kind=kind, start=start, **settings) for start in ("random", "subspace")]


SAES = [c for kind in ("gated", "Matryoshka", "JumpReLU", "ReLU", "BatchTopK") for c in both(kind)]
TRANSCODERS = [c for kind in READS for c in both(kind)]
UNTIED = [c for kind in READS for c in both(kind, tied=False)]
OF_LORSA: dict[str, Any] = {
    "d_sae": 1152,
    "n_train": 1152 * CONTEXT,
    "n_judged": 288 * CONTEXT,
    "batch_size": 2 * CONTEXT,
}
HEADS = [
    *both("Lorsa", **OF_LORSA),
    *both("Lorsa, output side", **OF_LORSA),
    Dictionary(kind="Lorsa", tied=False, **OF_LORSA),
]

if __name__ == "__main__":
    sequences(HEADS[0].model, HEADS[0].corpus, N_CONTEXTS)  # once, on all cores
    study([*SAES, *TRANSCODERS])
    study(HEADS)
    study(UNTIED)
