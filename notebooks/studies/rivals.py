"""What do the rivals of 2026 do for dead features, each with random and subspace initialisation?

    python notebooks/studies/rivals.py
    python notebooks/studies/rivals.py cost

The first writes data/results/studies/rivals.json, at the place and size of mitigations.py and by
the same protocol, so that its rows can be joined with those of mitigations.json and cure.json:

- aligned training, GroupMax, AuxK as Gao et al. define it, and schedule-free sign descent, whose
  definitions and sources are in rival_methods.py;
- SAELens' AuxK and the start at data under SparseAdam, and the bias at the geometric median with
  subspace initialisation;
- SAELens' default norm of 0.1 in place of the norm search;
- what `saesub.recommend` says, at its rate without a sweep, before its refit (`fvu_unrefitted`) and
  after it;
- ASI and the whitened start under SparseAdam, swept with the same refit.

Sign descent moves every entry by the rate, so it is swept about rates of its own, and has no
schedule, as its authors train. Aligned training starts at unit norm, where tied rows and columns
are aligned, so it has no norm search.

The second writes data/results/studies/rivals_cost.json, on a machine that does nothing else: the
time of a step of every kind of condition, those of mitigations.py and cure.py too, that of the
recipe's refit, and the memory of its training. All train in lockstep on the same batches, so that
their steps take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from statistics import median
from time import perf_counter
from typing import Any

import mitigations
import torch
from mitigations import HOOK, Mitigated, outcome_of, set_start
from protocol import (
    RESULTS,
    SMALL,
    Site,
    fit,
    harvest,
    recommended,
    record_text,
    run,
    site_of,
    sweep,
    this_run,
    trainer_of,
)
from protocol import untrained as untrained_of
from rival_methods import (
    Aligned,
    AlignedSAE,
    AuxKOfGao,
    AverageAtEnd,
    GroupMaxSAE,
    ScheduleFreeSign,
)
from sae_lens import TopKTrainingSAE
from torch.optim.lr_scheduler import LambdaLR

import saesub
from saesub.files import write_atomically
from saesub.reproduce.peak_memory import peak_memory_of
from saesub.reproduce.revival import RevivalCount
from saesub.training.mitigations import Mitigation

KINDS = {"aligned": AlignedSAE, "GroupMax": GroupMaxSAE}
SIGN = "schedule-free sign"
SIGN_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
RECIPE, REFIT = "recipe", " + refit"
SHORT = 16_000  # tokens: the dead window with which SAELens' AuxK leaves the fewest dead
N_BLOCKS = 20  # of a run, each with its ratio of times


def _trial(start: str, condition: str, **settings: Any) -> Mitigated:
    return Mitigated(HOOK, start, condition=condition, **SMALL, **settings)


def _both(condition: str, **settings: Any) -> list[Mitigated]:
    """A condition with both initialisations."""
    return [
        _trial("random", condition, **settings),
        _trial("subspace", f"ASI + {condition}", **settings),
    ]


SPARSE, MEDIAN = {"optimizer": "sparse_adam"}, {"centre": "geometric median"}
# A sweep each, in this order.
SWEEPS: list[list[Mitigated]] = [
    _both("aligned", mitigation="aligned", norm=1.0),
    _both("GroupMax", mitigation="GroupMax"),
    _both("AuxK of Gao et al.", mitigation="AuxK of Gao et al.", dead_window=SHORT),
    [
        _trial("data", "data start + SparseAdam", **SPARSE),
        _trial("subspace", "ASI + bias at the median", **MEDIAN),
    ],
    _both("norm 0.1", norm=0.1),
    [
        _trial(
            "random",
            "AuxK + SparseAdam",
            mitigation="AuxK",
            coefficient=1.0,
            dead_window=SHORT,
            **SPARSE,
        )
    ],
]
SIGN_SWEEP = _both(SIGN, optimizer=SIGN)
# What the recipe has, swept; its rate falls over the last fifth, as that of all rivals.
REFITTED = [
    _trial("subspace", "ASI + SparseAdam" + REFIT, **SPARSE),
    _trial("whitened_data", "whitened start + SparseAdam" + REFIT, **SPARSE),
]

COSTED = [
    mitigations.PLAIN,
    *(t for t in (*mitigations.RIVALS, *mitigations.OTHERS) if t.start != "subspace"),
    _trial("random", "random + SparseAdam", **SPARSE),
    _trial("subspace", "ASI"),
    _trial("whitened_data", "whitened start"),
    _trial("random", "bias at the median", **MEDIAN),
    *(several[0] for several in (*SWEEPS[:3], SIGN_SWEEP)),
    _trial("random", "random, again"),  # what the measurement itself adds
]
COSTED = [replace(t, lr=4e-3 if t.optimizer == SIGN else 2e-3) for t in COSTED]


def recipe() -> Mitigated:
    """What `saesub.recommend` says at this place and size."""
    plain = _trial("random", RECIPE)
    return recommended(plain, site_of(plain).spectrum)


def acting(trial: Mitigated) -> list[Mitigation]:
    """What acts during training; GroupMax is the SAE's, AuxK a setting of it."""
    own: dict[str, list[Mitigation]] = {
        "aligned": [Aligned()],
        "AuxK of Gao et al.": [AuxKOfGao()],
    }
    at_end = [AverageAtEnd()] if trial.optimizer == SIGN else []
    return own.get(trial.mitigation, list(mitigations.acting(trial))) + at_end


def untrained(trial: Mitigated, at: Site) -> TopKTrainingSAE:
    """The SAE of a trial at step 0."""
    kind = KINDS.get(trial.mitigation, TopKTrainingSAE)
    auxk = trial.coefficient if trial.mitigation == "AuxK" else 0.0
    return untrained_of(trial, at, set_start, kind, aux_loss_coefficient=auxk)


def trainer_for(trial: Mitigated, sae: TopKTrainingSAE) -> saesub.SubspaceSAETrainer:
    """The trainer of a trial, which counts revivals, with its own optimizer if saesub has none."""
    made = trainer_of(
        trial,
        sae,
        optimizer="adam" if trial.optimizer == SIGN else trial.optimizer,
        dead_window_tokens=trial.dead_window,
        mitigations=[RevivalCount(), *acting(trial)],
    )
    if trial.optimizer == SIGN:
        made.optimizer = ScheduleFreeSign(sae.parameters(), trial.lr)  # pyright: ignore
        made.optimizer_name = trial.optimizer  # pyright: ignore
        made.lr_scheduler = LambdaLR(made.optimizer, lambda _: 1.0)
    return made


def outcome(trial: Mitigated) -> dict[str, Any]:
    """Train and judge one SAE; how many features were silent and then revived."""
    at = site_of(trial)
    sae = untrained(trial, at)
    norm = sae.W_dec.detach().norm(dim=1).mean().item()
    trainer = trainer_for(trial, sae)
    fit({"trial": trainer}, trial, at)
    row = outcome_of(trial, trainer, at, norm)
    if _has_refit(trial):
        before = {name + "_unrefitted": row[name] for name in ("fvu", "validation_fvu")}
        finish(trial, trainer, at)
        row = outcome_of(trial, trainer, at, norm) | before
    return row


def finish(trial: Mitigated, trainer: saesub.SubspaceSAETrainer, at: Site) -> None:
    """What comes after the last step: a refit, or nothing."""
    if _has_refit(trial):
        saesub.refit_decoder(trainer.sae, at.blocks(0, trial.n_read), progress=False)


def _has_refit(trial: Mitigated) -> bool:
    return trial.condition == RECIPE or trial.condition.endswith(REFIT)


def seconds(trials: list[Mitigated]) -> list[dict[str, Any]]:
    """How long the start, each training step and what follows the last took for every trial, all
    trained in lockstep."""
    at, trainers, found = site_of(trials[0]), {}, []
    for trial in trials:
        start = perf_counter()
        trainer = trainers[trial.condition] = trainer_for(trial, untrained(trial, at))
        times: list[float] = []
        found.append({"start_seconds": perf_counter() - start, "step_seconds": times})
        trainer.step = _timed(trainer.step, times)
    fit(trainers, trials[0], at)
    for trial, of in zip(trials, found, strict=True):
        start = perf_counter()
        finish(trial, trainers[trial.condition], at)
        of["end_seconds"] = perf_counter() - start
    return found


def _timed(step: Any, times: list[float]) -> Any:
    def timed(batch: torch.Tensor) -> Any:
        start = perf_counter()
        output = step(batch)
        times.append(perf_counter() - start)
        return output

    return timed


def memory(trial: Mitigated) -> dict[str, int]:
    """Of a training run, for a process of its own: the most bytes that it held beside the SAE and
    its activations, and the bytes of the weights and of all that is kept from step to step."""
    at = site_of(trial)
    at = replace(at, store=at.store.on("cpu"))  # pages of a file would count as the process's
    trainer = trainer_for(trial, untrained(trial, at))

    def whole() -> None:
        fit({"trial": trainer}, trial, at)
        finish(trial, trainer, at)

    peak = peak_memory_of(whole)
    return {"peak_bytes": peak, "kept_bytes": sum(t.nbytes for t in _kept(trainer))}


def _kept(trainer: saesub.SubspaceSAETrainer) -> Iterator[torch.Tensor]:
    yield from trainer.sae.parameters()
    for state in trainer.optimizer.state.values():
        yield from (t for t in state.values() if isinstance(t, torch.Tensor))
    yield from trainer.mitigation_state.values()


def cost_rows(
    trials: list[Mitigated], times: list[dict[str, Any]], held: list[dict[str, int]]
) -> list[dict[str, Any]]:
    """A row for each trial; the first is what the others are compared with.

    `step_ratios` are ratios of times to the first trial's, for equal parts of the run, `step_ratio`
    is their median and `whole_ratio` that of all steps and what follows them. `extra_bytes` is what
    the run's peak has beyond the first trial's.
    """
    plain = times[0]["step_seconds"]
    rows = []
    for trial, time, bytes_of in zip(trials, times, held, strict=True):
        ratios = [
            sum(mine) / sum(plains)
            for mine, plains in zip(_parts(time["step_seconds"]), _parts(plain), strict=True)
        ]
        rows.append(
            asdict(trial)
            | {
                "start_seconds": time["start_seconds"],
                "seconds": sum(time["step_seconds"]),
                "end_seconds": time["end_seconds"],
                "step_ratio": median(ratios),
                "step_ratios": ratios,
                "whole_ratio": (sum(time["step_seconds"]) + time["end_seconds"]) / sum(plain),
                **bytes_of,
                "extra_bytes": bytes_of["peak_bytes"] - held[0]["peak_bytes"],
                "run": 0,
            }
        )
    return rows


def _parts(times: list[float]) -> list[list[float]]:
    size = max(1, len(times) // N_BLOCKS)
    return [times[i : i + size] for i in range(0, len(times), size)]


def cost(trials: list[Mitigated], name: str = "rivals_cost") -> None:
    """Measure all trials anew and write the record."""
    harvest(trials)
    torch.set_num_threads(1)
    this = this_run()
    times = seconds(trials)
    alone: Any = {"initializer": torch.set_num_threads, "initargs": (1,), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(1, get_context("spawn"), **alone) as pool:
        held = list(pool.map(memory, trials))
    record = {"runs": [this], "rows": cost_rows(trials, times, held)}
    write_atomically(RESULTS / f"{name}.json", record_text(record))


if __name__ == "__main__":
    if sys.argv[1:] == ["cost"]:
        cost([*COSTED, recipe()])
    else:
        for conditions in SWEEPS:
            sweep("rivals", conditions, outcome=outcome)
        sweep("rivals", SIGN_SWEEP, SIGN_RATES, outcome=outcome)
        run("rivals", [replace(recipe(), seed=seed) for seed in range(3)], outcome)
        sweep("rivals", REFITTED, outcome=outcome)
