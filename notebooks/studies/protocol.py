"""One SAE of a study by one protocol, and a record of many that can be continued.

Every study here is a list of `Trial`s. A trial's activations are shuffled by document and stored
once, and the last of them are held out: a validation part, which only chooses learning rates, and a
part for every number that is reported. The spectrum is of the first 200,000 tokens, which in a
short run are more than are trained on.
All SAEs have their bias at the mean and, unless the trial says otherwise, the norm at which they
reconstruct best before training (`saesub.fit_norm`), the random ones as well; the rate rises over
the first twentieth of the steps and falls to zero over the last fifth, unless the trial says
otherwise.

The record has one row per trial. `runs` has the command, the commit, the date and the machine of
every call, and each row names its call. Run a study again and it continues where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor
from tqdm.auto import tqdm

import saesub
from saesub.evaluation.held_out import Judgement
from saesub.evaluation.protocol import AS_GOOD, Sweep, mean_firings, sweep_of
from saesub.evaluation.reconstruction import Reconstruction
from saesub.files import write_atomically
from saesub.reproduce.report import run_facts

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "data" / "results" / "studies"
BATCH = 1024
N_VALIDATION = 32_768
N_SPECTRUM = 200_000  # training tokens behind a spectrum
N_FIRST = 16_384  # tokens on which untrained features are counted
N_MEDIAN = 32_768  # training tokens of which the median is taken
# 4,096 features in proportion: as often as the 8,192 of a trial's defaults do they fire in training
# and in the window.
SMALL: dict[str, Any] = {"d_sae": 4096, "n_train": 512_000, "n_judged": 128_000}
_BLOCK = 4096


@dataclass(frozen=True)
class Trial:
    """The settings of one SAE.

    `start` is "random", "subspace" (flat directions), "mixed" (the first half of the features
    random, the others in the subspace), or a rule of `saesub.init.directions` that starts from
    data. `norm` is "fit", or a number for `decoder_init_norm`. `spectrum_of` names another hook
    point, whose eigenvalues the activations are given by a fixed linear map; "" leaves them. Over
    the last `decay` of the steps the rate falls to zero.
    """

    hook_name: str
    start: str
    optimizer: str = "adam"
    lr: float = 1e-3
    d_sae: int = 8192
    seed: int = 0
    n_train: int = 1_024_000
    n_judged: int = 256_000
    k: int = 32
    d_init: int | str = "auto"
    norm: float | str = "fit"
    beta1: float = 0.9
    spectrum_of: str = ""
    model: str = "smollm2-135m"
    corpus: str = "english-mix"
    batch_size: int = BATCH
    decay: float = 0.2

    @property
    def hooks(self) -> set[str]:
        """Hook points whose activations the trial needs."""
        return {self.hook_name} | ({self.spectrum_of} if self.spectrum_of else set())

    @property
    def n_stored(self) -> int:
        """Tokens that the trial needs in all."""
        return self.n_train + N_VALIDATION + self.n_judged

    @property
    def n_read(self) -> int:
        """Different tokens that it trains on."""
        return self.n_train


TrialT = TypeVar("TrialT", bound=Trial)


@dataclass(frozen=True)
class Site:
    """Activations of a trial: a store, what to do with each block, and the spectrum after that."""

    store: saesub.ActivationStore
    spectrum: saesub.Spectrum
    map: tuple[Tensor, Tensor] | None  # mean (d,), matrix (d, d)

    def seen(self, x: Tensor) -> Tensor:
        """The activations (n, d) as the SAE sees them."""
        if self.map is None:
            return x
        mean, matrix = self.map
        return (x - mean) @ matrix + mean

    def blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """Rows start..stop as the SAE sees them."""
        for first in range(start, stop, _BLOCK):
            yield self.seen(self.store.rows(first, min(first + _BLOCK, stop)))


def harvest(trials: Iterable[Trial]) -> None:
    """Have the cache hold what the trials ask for, one pass for each model, corpus and length."""
    wanted: dict[tuple[str, str, int], set[str]] = {}
    for t in trials:
        wanted.setdefault((t.model, t.corpus, t.n_stored), set()).update(t.hooks)
    for (model, corpus, n_tokens), hooks in sorted(wanted.items()):
        if hooks:
            saesub.harvest(model, corpus, sorted(hooks), n_tokens=n_tokens)


@cache
def site(model: str, corpus: str, hook_name: str, n_tokens: int, spectrum_of: str = "") -> Site:
    """The activations that trials of a hook point share."""
    store = saesub.harvest(model, corpus, [hook_name], n_tokens=n_tokens)[hook_name]
    spectrum = saesub.Spectrum.from_activations(store.rows(0, N_SPECTRUM))
    if not spectrum_of:
        return Site(store, spectrum, None)
    target = site(model, corpus, spectrum_of, n_tokens).spectrum.eigenvalues
    target = target * (spectrum.eigenvalues.sum() / target.sum())
    gains = (target / spectrum.eigenvalues.clamp(min=1e-7 * spectrum.eigenvalues[0])).sqrt()
    matrix = (spectrum.eigenvectors * gains) @ spectrum.eigenvectors.T
    changed = Site(store, spectrum, (spectrum.mean.float(), matrix.float()))
    x = changed.seen(store.rows(0, N_SPECTRUM))
    return Site(store, saesub.Spectrum.from_activations(x), changed.map)


def site_of(trial: Trial) -> Site:
    """The activations of a trial."""
    return site(trial.model, trial.corpus, trial.hook_name, trial.n_stored, trial.spectrum_of)


def sample_for(trial: Trial, at: Site) -> Tensor:
    """Training tokens to which an initialisation is fitted, (n, d), as the SAE sees them.

    Features that start at data start at tokens of all documents: those that start at a few
    documents find hardly any tokens like theirs in others. There are more tokens than features,
    since those that are least alike are taken.
    """
    if "data" not in trial.start:
        return at.seen(at.store.rows(0, 4096))
    part, _ = at.store.split(at.store.n_tokens - trial.n_read)
    n = min(8 * trial.d_sae, trial.n_read)
    return at.seen(next(part.batches(n, seed=trial.seed)))


Start = Callable[[TopKTrainingSAE, Trial, Site], None]


@torch.no_grad()
def set_start(sae: TopKTrainingSAE, trial: Trial, at: Site) -> None:
    """Directions, bias and norm of a trial."""
    x = sample_for(trial, at)
    saesub.center_biases(sae, at.spectrum)
    if trial.start not in ("random", "mixed"):
        saesub.initialize_in_subspace(
            sae,
            at.spectrum,
            trial.d_init,
            directions="flat" if trial.start == "subspace" else trial.start,  # pyright: ignore[reportArgumentType]
            norm="fit" if trial.norm == "fit" else "keep",
            activations=x,
            seed=trial.seed,
        )
        return
    if trial.start == "mixed":
        random = sae.W_dec[: trial.d_sae // 2].clone()
        saesub.initialize_in_subspace(sae, at.spectrum, norm="keep", seed=trial.seed)
        sae.W_dec[: trial.d_sae // 2] = random
        sae.W_enc.copy_(sae.W_dec.T)
    if trial.norm == "fit":
        saesub.fit_norm(sae, at.spectrum, activations=x)


def recommended(trial: TrialT, spectrum: saesub.Spectrum) -> TrialT:
    """The trial with the start, optimizer, rate and schedule that `saesub.recommend` says."""
    cfg = TopKTrainingSAEConfig(d_in=spectrum.d, d_sae=trial.d_sae, k=trial.k)
    said = saesub.recommend(spectrum, cfg, n_tokens=trial.n_train)
    return replace(
        trial,
        start="subspace" if said.directions == "flat" else said.directions,
        optimizer=said.optimizer,
        lr=said.lr,
        decay=said.decay_steps / (trial.n_train // trial.batch_size),
    )


def move_bias(sae: TopKTrainingSAE, centre: str, at: Site) -> None:
    """Let the decoder bias begin at "zero" or the "geometric median" in place of the "mean", and
    fit the norm to it."""
    if centre == "mean":
        return
    x = at.seen(at.store.rows(0, N_MEDIAN))
    if centre == "zero":
        with torch.no_grad():
            sae.b_dec.zero_()
    else:
        saesub.center_at(sae, saesub.geometric_median(x), mean_norm=at.spectrum.mean_norm)
    saesub.fit_norm(sae, at.spectrum, activations=x)


def untrained(
    trial: Trial,
    at: Site,
    start: Start = set_start,
    kind: type[TopKTrainingSAE] = TopKTrainingSAE,
    **config: Any,
) -> TopKTrainingSAE:
    """The SAE of a trial at step 0, of class `kind`, with SAELens settings `config` besides."""
    torch.manual_seed(trial.seed)
    settings: dict[str, Any] = {
        "decoder_init_norm": 1.0 if trial.norm == "fit" else trial.norm,
        "aux_loss_coefficient": 0.0,
    }
    sae = kind(
        TopKTrainingSAEConfig(
            d_in=at.spectrum.d,
            d_sae=trial.d_sae,
            k=trial.k,
            normalize_activations="expected_average_only_in",
            **settings | config,
        )
    )
    start(sae, trial, at)
    return sae


def schedule(trial: Trial) -> SAETrainerConfig:
    """Rate, batches and schedule of a trial."""
    steps = trial.n_train // trial.batch_size
    return SAETrainerConfig(
        total_training_samples=trial.n_train,
        train_batch_size_samples=trial.batch_size,
        lr=trial.lr,
        lr_end=trial.lr,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=round(trial.decay * steps),
        adam_beta1=trial.beta1,
        n_batches_for_norm_estimate=20,
        device="cpu",
    )


def train(
    trial: Trial, sae: TopKTrainingSAE, at: Site, **trainer: Any
) -> saesub.SubspaceSAETrainer:
    """Train the SAE by the trial's schedule; returns the trainer at its end."""
    made = trainer_of(trial, sae, **trainer)
    fit({"trial": made}, trial, at)
    return made


def trainer_of(trial: Trial, sae: TopKTrainingSAE, **trainer: Any) -> saesub.SubspaceSAETrainer:
    """The trainer of an SAE by the trial's schedule, before its first step."""
    return saesub.SubspaceSAETrainer(
        schedule(trial),
        sae,
        iter(()),
        **{"optimizer": trial.optimizer, "dead_window_tokens": trial.n_train // 4} | trainer,
    )


def fit(trainers: dict[str, saesub.SubspaceSAETrainer], trial: Trial, at: Site) -> None:
    """Train to the end, all on the batches of one trial."""
    train_part, _ = at.store.split(at.store.n_tokens - trial.n_read)

    def batches(step: int) -> Iterator[dict[str, Tensor]]:
        stream = train_part.batches(trial.batch_size, seed=trial.seed, start_step=step)
        return ({trial.hook_name: at.seen(x)} for x in stream)

    saesub.train_together(trainers, batches)


def judged(trial: Trial, sae: TopKTrainingSAE, at: Site) -> dict[str, Any]:
    """The trial's settings and its outcome on held-out tokens."""
    start = at.store.n_tokens - trial.n_judged
    chosen_on = saesub.reconstruction(sae, at.blocks(start - N_VALIDATION, start), progress=False)
    found = saesub.judge(
        sae, at.blocks(start, at.store.n_tokens), n_tokens=trial.n_judged, progress=False
    )
    return row_of(trial, at.store.epochs, chosen_on, found)


def row_of(
    trial: Trial, epochs: float, chosen_on: Reconstruction, found: Judgement
) -> dict[str, Any]:
    """The trial's settings, how it fits the validation part, and its outcome on held-out tokens.

    `dead_share` is over `window` tokens, `silent` over all windows up to it. `firings` is how
    often a feature fires in them on average. `density` counts features by the power of two of
    their number of firings (0 for those that fire once, -1 for the dead).
    """
    powers = torch.where(found.counts > 0, found.counts.double().log2().floor(), -1).int()
    values, features = powers.unique(return_counts=True)
    return asdict(trial) | {
        "epochs": epochs,
        "validation_fvu": chosen_on.fvu,
        "validation_l0": chosen_on.l0,
        "fvu": found.fvu,
        "l0": found.l0,
        "window": found.n_tokens,
        "dead_share": found.silent[found.n_tokens],
        "silent": found.silent,
        "firings": mean_firings(found.n_tokens, d_sae=trial.d_sae, l0=found.l0),
        "density": dict(zip(values.tolist(), features.tolist(), strict=True)),
    }


def outcome(trial: Trial) -> dict[str, Any]:
    """Initialise, train and judge one SAE; `kept` is the share of all features whose decoder row is
    still at a cosine of 0.9 or more to where it began."""
    at = site_of(trial)
    sae = untrained(trial, at)
    before = sae.W_dec.detach().clone()
    train(trial, sae, at)
    cosines = torch.cosine_similarity(before, sae.W_dec.detach(), dim=1)
    return judged(trial, sae, at) | {
        "norm_at_start": before.norm(dim=1).mean().item(),
        "kept": (cosines >= 0.9).double().mean().item(),
        "cosine_to_start": cosines.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])).tolist(),
    }


def known_before(spectrum: saesub.Spectrum) -> dict[str, float]:
    """What is known of a site before training: γ = ‖mean‖ / ‖standard deviation‖, and the rank at
    99 % of the variance and the effective rank of the variances as shares of the width."""
    return {
        "offset": (spectrum.mean.norm() / spectrum.eigenvalues.sum().sqrt()).item(),
        "rank": spectrum.rank_at(0.99) / spectrum.d,
        "effective_rank": spectrum.effective_rank("variance") / spectrum.d,
    }


def recorded(name: str) -> list[dict[str, Any]]:
    """The rows of a record; none if there is none yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def trial_of(row: dict[str, Any], kind: type[Trial] = Trial) -> Trial:
    """The settings that a row has; those that it lacks are the defaults."""
    return kind(**{f.name: row[f.name] for f in fields(kind) if f.name in row})


def run(
    name: str,
    trials: Iterable[Trial],
    outcome: Callable[[Any], dict[str, Any]] = outcome,
    n_threads: int = 1,
) -> None:
    """Add to the record `name` the outcomes of the trials that it lacks, on all cores by workers of
    `n_threads` threads."""
    path = RESULTS / f"{name}.json"
    record = json.loads(path.read_text()) if path.is_file() else {"runs": [], "rows": []}
    trials = list(dict.fromkeys(trials))
    kinds = {type(t) for t in trials}
    done = {trial_of(row, kind) for kind in kinds for row in record["rows"]}
    if not (left := [t for t in trials if t not in done]):
        return
    harvest(left)
    torch.set_num_threads(n_threads)  # as the workers do, for the record
    this = this_run()
    last = record["runs"][-1] if record["runs"] else {}
    if any(last.get(name) != this[name] for name in ("command", "commit")):
        record["runs"].append(this)
    os.environ["OMP_NUM_THREADS"] = str(n_threads)
    n_workers = max(1, (os.cpu_count() or 1) // n_threads)
    context = get_context("spawn")
    with ProcessPoolExecutor(n_workers, context, _begin, (n_threads,)) as pool:
        jobs: list[Future] = [pool.submit(outcome, trial) for trial in left]
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="SAE", desc=name):
            record["rows"].append(job.result() | {"run": len(record["runs"]) - 1})
            write_atomically(path, record_text(record))


def record_text(record: Mapping[str, Any]) -> str:
    """A record as JSON with one line for each row, so that a change of a row is a change of a
    line."""
    parts = [
        f"{json.dumps(name)}: " + (_lines(part) if isinstance(part, list) else json.dumps(part))
        for name, part in record.items()
    ]
    return "{" + ",\n".join(parts) + "}\n"


def _lines(rows: list[Any]) -> str:
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"


def this_run() -> dict[str, Any]:
    """Command, commit, date and machine of this call."""
    return {
        "command": "python " + " ".join(sys.argv),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "run": run_facts(),
    }


def _begin(n_threads: int) -> None:
    """A worker's first act."""
    torch.set_num_threads(n_threads)
    os.environ["TQDM_DISABLE"] = "1"
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def sweep(
    name: str,
    conditions: Iterable[Trial],
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3),
    *,
    most: int = 7,
    n_seeds: int = 3,
    outcome: Callable[[Any], dict[str, Any]] = outcome,
) -> dict[Trial, float]:
    """Train each condition at all rates, beyond an edge that is best, and with more seeds at all
    rates that fit as well as the best; returns the best rates, by the mean over seeds."""
    conditions = [replace(c, lr=0.0) for c in conditions]
    tried = {c: set(rates) for c in conditions}
    for seeds in (1, n_seeds):  # beyond the edges by the first seed, and then by all
        while True:
            run(name, [replace(c, lr=lr) for c in conditions for lr in sorted(tried[c])], outcome)
            _train_near(name, conditions, seeds, outcome)
            sweeps = _sweeps(name, conditions, seeds)
            more = {c: s.next_rate() for c, s in sweeps.items() if len(tried[c]) < most}
            more = {c: lr for c, lr in more.items() if lr is not None}
            if not more:
                break
            for c, lr in more.items():
                tried[c].add(lr)
    return {c: s.rates[s.best] for c, s in sweeps.items()}


def _train_near(
    name: str,
    conditions: Iterable[Trial],
    n_seeds: int,
    outcome: Callable[[Any], dict[str, Any]],
) -> None:
    """Train the seeds at all rates that fit as well as the best; they may bring more rates near."""
    near: dict[Trial, set[float]] = {}
    while (found := _near(name, conditions, n_seeds)) != near:
        near = found
        trials = [replace(c, lr=lr) for c, rates in near.items() for lr in sorted(rates)]
        run(name, [replace(t, seed=t.seed + n) for n in range(n_seeds) for t in trials], outcome)


def _sweeps(name: str, conditions: Iterable[Trial], n_seeds: int) -> dict[Trial, Sweep]:
    """What is recorded of conditions at all rates, as means over their first seeds."""
    return {c: sweep_of(of) for c, of in _of_each(name, conditions, n_seeds).items()}


def _near(name: str, conditions: Iterable[Trial], n_seeds: int) -> dict[Trial, set[float]]:
    return {c: near_rates(of) for c, of in _of_each(name, conditions, n_seeds).items()}


def near_rates(
    rows: Iterable[dict[str, Any]], swept: Callable[[list[dict[str, Any]]], Sweep] = sweep_of
) -> set[float]:
    """The rates of one condition that fit as well as its best, by the seeds that each rate has."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        by_rate.setdefault(row["lr"], []).append(row)
    fvu = {lr: swept(of).validation_fvu[0] for lr, of in by_rate.items()}
    return {lr for lr, value in fvu.items() if value <= (1 + AS_GOOD) * min(fvu.values())}


def _of_each(name: str, conditions: Iterable[Any], n_seeds: int) -> dict[Any, list[dict[str, Any]]]:
    """The recorded rows of each condition, at all rates and its first seeds."""
    rows: dict[Any, list[dict[str, Any]]] = {c: [] for c in conditions}
    kinds = {type(c) for c in rows}
    for row in recorded(name):
        for trial in (trial_of(row, kind) for kind in kinds):
            for seed in range(n_seeds):
                rows.get(replace(trial, lr=0.0, seed=trial.seed - seed), []).append(row)
    return rows
