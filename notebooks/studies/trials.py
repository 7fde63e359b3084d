"""Train and judge one SAE, or many with a record that can be continued; the studies here share it.

A study is a list of trials. Its record has one row per trial. `runs` has the command, the commit,
the date and the machine of every call, each row names its call, and the record's head repeats the
last call. Run a study again and it continues where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from tqdm.auto import tqdm

import saesub
from saesub.files import write_atomically
from saesub.reproduce.report import run_facts

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "data" / "results" / "studies"
TOKENS = {"wiki-en": (400_000, 60_000), "english-mix": (1_536_000, 512_000)}  # all, held out
WINDOW, N_JUDGED = 40_000, 16_384
N_SPECTRUM = 200_000  # tokens for a spectrum, and to draw data points from


@dataclass(frozen=True)
class Trial:
    """`start` is "random", a rule of `saesub.init.directions` or of a study; `d_init` as there."""

    hook_name: str
    start: str
    d_init: int | str = "auto"
    optimizer: str = "adam"
    lr: float = 2e-3
    d_sae: int = 8192
    seed: int = 0
    model: str = "smollm2-135m"
    n_train: int = 240_000
    batch_size: int = 1024
    k: int = 32
    corpus: str = "wiki-en"


def harvest(trials: list[Trial]) -> None:
    """Have the cache hold the activations that the trials ask for, one pass for each corpus and
    model."""
    for corpus, model in sorted({(t.corpus, t.model) for t in trials}):
        hooks = sorted({t.hook_name for t in trials if (t.corpus, t.model) == (corpus, model)})
        saesub.harvest(model, corpus, hooks, n_tokens=TOKENS[corpus][0])


@cache
def site(model: str, hook_name: str, corpus: str = "wiki-en") -> tuple:
    """(training store, held-out store, spectrum, first activations) of a hook point."""
    store = saesub.harvest(model, corpus, [hook_name], n_tokens=TOKENS[corpus][0])[hook_name]
    train, held_out = store.split(TOKENS[corpus][1])
    x = train.rows(0, N_SPECTRUM)
    return train, held_out, saesub.Spectrum.from_activations(x), x


Start = Callable[[TopKTrainingSAE, Trial], None]  # sets directions; the biases are already set


def package_start(sae: TopKTrainingSAE, trial: Trial) -> None:
    """Initialise with `initialize_in_subspace`, by the rule that the trial names."""
    _, _, spectrum, x = site(trial.model, trial.hook_name, trial.corpus)
    saesub.initialize_in_subspace(
        sae,
        spectrum,
        trial.d_init,
        norm="keep",  # of the unit norm that `untrained` sets
        directions=trial.start,  # pyright: ignore[reportArgumentType]
        activations=x if "data" in trial.start else None,
        seed=trial.seed,
    )


def untrained(trial: Trial, start: Start) -> TopKTrainingSAE:
    """The SAE of a trial at step 0, initialised."""
    spectrum = site(trial.model, trial.hook_name, trial.corpus)[2]
    torch.manual_seed(trial.seed)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=spectrum.d,
            d_sae=trial.d_sae,
            k=trial.k,
            decoder_init_norm=1.0,
            aux_loss_coefficient=0.0,
            normalize_activations="expected_average_only_in",
        )
    )
    saesub.center_biases(sae, spectrum)
    if trial.start != "random":
        start(sae, trial)
    return sae


def trained(trial: Trial, start: Start, window: int = WINDOW) -> saesub.SubspaceSAETrainer:
    """The trainer of a trial at its end; a feature silent for a `window` of training tokens counts
    as dead in its history."""
    train = site(trial.model, trial.hook_name, trial.corpus)[0]
    cfg = SAETrainerConfig(
        total_training_samples=trial.n_train,
        train_batch_size_samples=trial.batch_size,
        lr=trial.lr,
        lr_end=trial.lr / 10,
        lr_warm_up_steps=10,
        n_batches_for_norm_estimate=20,
        device="cpu",
    )
    trainer = saesub.SubspaceSAETrainer(
        cfg,
        untrained(trial, start),
        iter(()),
        optimizer=trial.optimizer,  # pyright: ignore[reportArgumentType]
        dead_window_tokens=window,
    )
    saesub.train_together(
        {"trial": trainer},
        lambda step: saesub.joint_batches(
            {trial.hook_name: train}, trial.batch_size, seed=trial.seed, start_step=step
        ),
    )
    return trainer


def outcome(trial: Trial, start: Start = package_start) -> dict:
    """Train the trial; its settings, how often it saw each activation, and the dead share and FVU
    on held-out tokens."""
    trainer = trained(trial, start)
    train, held_out, _, _ = site(trial.model, trial.hook_name, trial.corpus)
    x = held_out.rows(0, WINDOW)
    dead = saesub.dead_features(trainer.sae, x, n_tokens=WINDOW).float().mean().item()
    fvu = saesub.reconstruction(trainer.sae, x[:N_JUDGED].split(1024)).fvu
    epochs = trial.n_train / train.n_tokens
    return asdict(trial) | {"epochs": epochs, "dead_share": dead, "fvu": fvu}


def run(
    name: str,
    trials: list[Trial],
    judged: Callable[[Trial], dict] = outcome,
    n_workers: int | None = None,
    n_threads: int = 1,
) -> None:
    """Add to the record `name` the `judged` outcomes of the trials that it lacks, by workers of
    `n_threads` threads each."""
    path = RESULTS / f"{name}.json"
    record = json.loads(path.read_text()) if path.is_file() else {"runs": [], "rows": []}
    # A row older than a setting gets the setting's default.
    done = {
        Trial(**{f.name: row[f.name] for f in fields(Trial) if f.name in row})
        for row in record["rows"]
    }
    left = [t for t in trials if t not in done]
    harvest(left)
    os.environ["OMP_NUM_THREADS"] = str(n_threads)
    torch.set_num_threads(n_threads)  # as the workers do, for the record
    this = {
        "command": "python " + " ".join(sys.argv),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "run": run_facts(),
    }
    place = len(record["runs"])
    record = this | {"runs": [*record["runs"], this], "rows": record["rows"]}
    context = get_context("spawn")
    with ProcessPoolExecutor(n_workers or os.cpu_count(), context, _begin, (n_threads,)) as pool:
        jobs = [pool.submit(judged, trial) for trial in left]
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="SAE"):
            record["rows"].append(job.result() | {"run": place})
            write_atomically(path, json.dumps(record, indent=1))


def _begin(n_threads: int) -> None:
    """A worker's first act."""
    torch.set_num_threads(n_threads)
    os.environ["TQDM_DISABLE"] = "1"
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
