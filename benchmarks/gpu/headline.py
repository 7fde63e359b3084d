"""The headline: 2^20 features, a random and an active-subspace start, Adam and SparseAdam.

    python benchmarks/gpu/headline.py          # the bridge to the CPU's record, then four arms
    python benchmarks/gpu/headline.py rates    # 131,072 features at several rates

The bridge repeats the first row of data/results/studies/million.json. The arms share a norm search,
a cool-down, batches and the number of tokens, as many as the time allows. The fourth arm has the
start and the schedule of `saesub.recommend` (its batches are larger, and its rate is that of the
others); at 131,072 features its decoder is refitted after judging. Each outcome is in
`$OUT/headline.json` as soon as it is known; counts of firing are in `$OUT/fires.npz`.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import arms
import harvest
import numpy as np
import stage
from arms import Arm, Outcome, Site, Untrained

from saesub.topk import encode, step_graph

_CONDITIONS: dict[str, dict[str, Any]] = {
    "random, Adam": {"start": "random", "optimizer": "adam"},
    "subspace, Adam": {"start": "subspace", "optimizer": "adam"},
    "subspace, SparseAdam": {"start": "subspace", "optimizer": "sparse_adam"},
    "recipe": {"start": "whitened_data", "optimizer": "sparse_adam", "cooling": 0.5},
}
FIRES = {"arms": "fires.npz", "rates": "fires_rates.npz"}
_RATES = (1e-3, 2e-3, 4e-3)
_SWEPT = ("random, Adam", "subspace, Adam", "recipe")
_MOST_FIRES_BYTES = 14_000_000
_HARVEST_SECONDS = 60.0
_BESIDE = 20.0  # seconds that an arm takes beside its steps, until one was seen
_BESIDE_NARROWER = 2.5
_REFIT_SECONDS = 7.0
_SLOWER = 1.1  # times the trial's seconds that a step of a whole arm may take
_PATIENCE = 1.25  # times its expected seconds that an arm may train
_END_SECONDS = 15.0  # to write counts, and for what a process takes to end


@dataclass(frozen=True)
class Sizes:
    """Tokens of the bridge (training, held out), its steps and batch, held-out tokens of the rest,
    both widths, batch, the most steps of an arm, and the tokens of a refit."""

    bridge: tuple[int, int] = (1_024_000, 512_000)
    bridge_steps: int = 500
    bridge_batch: int = 2048
    held_out: int = 512_000
    d_sae: int = 2**20
    narrower: int = 2**17
    batch: int = 4096
    most_steps: int = 20_000
    refitted: int = 1_500_000


FULL = Sizes()
SMALL = Sizes((3_000, 2_000), 4, 512, 800, 4096, 1024, 512, 4)


class Counts:
    """Counts of firing of all arms in one compressed file, within the size that comes back."""

    def __init__(self, file: str) -> None:
        self._path = stage.OUT / file
        self._kept: dict[str, np.ndarray] = {}
        self.left_out: list[str] = []

    def add(self, name: str, counts: dict[str, np.ndarray]) -> None:
        """Write the file with these counts too, or without them if it grew too large."""
        for kind in ("held_out", "training", "cooling"):
            if kind not in counts:
                continue
            key = f"{name}, {kind}"
            tried = self._kept | {key: counts[kind]}
            data = io.BytesIO()
            np.savez_compressed(data, **tried)
            if data.tell() > _MOST_FIRES_BYTES:
                self.left_out.append(key)
                continue
            self._kept = tried
            self._path.write_bytes(data.getvalue())


class Headline:
    """What the arms of a call share: activations, weights at step 0, results, and the time."""

    def __init__(self, seconds: float, counts: str) -> None:
        self.clock = stage.Clock(seconds - _END_SECONDS)
        self.device = stage.device()
        self.sizes = SMALL if stage.REHEARSAL else FULL
        self.results = stage.Results("headline", FIRES.values())
        self.counts = Counts(counts)
        self.untrained = Untrained(self.device)
        self.beside = _BESIDE
        self.rows, about = harvest.rows(self.device, _HARVEST_SECONDS)
        self.results.add("activations", about)
        self.backend = self.results.attempt("backend", self._backend) or "torch"

    def _backend(self) -> str:
        """Triton's kernels, without graphs if those go wrong, unless a few steps of theirs differ
        from torch's operators. Judging then searches by the kernels, too."""
        if self.device == "cpu":
            return "torch"
        try:
            self._compare()
        except ArithmeticError as error:
            self.results.add("graphs", {"error": "ArithmeticError", "message": str(error)})
            step_graph._LAUNCHED_FIRST = 10**9
            self._compare()
        encode.row_backend = partial(encode.row_backend, triton=True)
        return "triton"

    def _compare(self) -> None:
        place = self._site(*self.sizes.bridge, 20_000)
        arm = Arm("random", "adam", 1e-3, 4096, 1024, 12, fitted=False, cooling=0.0)
        losses = {}
        for backend in ("triton", "torch"):
            found = arms.outcome(arm, place, self.untrained, backend, 60)
            losses[backend] = found.about["fvu"]
        if abs(losses["triton"] / losses["torch"] - 1) > 1e-2:
            raise ArithmeticError(f"Triton and torch train differently: FVU {losses}")

    def _site(self, n_train: int, n_held_out: int, n_spectrum: int = 200_000) -> Site:
        return arms.site(self.rows[: n_train + n_held_out], n_held_out, n_spectrum)

    def whole_site(self) -> Site:
        """All rows, the last of them held out."""
        n = self.sizes.held_out
        return self._site(len(self.rows) - n, n)

    def run(self, name: str, arm: Arm, place: Site, seconds: float) -> Outcome | None:
        """Train and judge an arm, and keep what came out."""
        kept: list[Outcome] = []

        def outcome() -> dict[str, Any]:
            kept.append(arms.outcome(arm, place, self.untrained, self.backend, seconds))
            return kept[0].about

        self.results.attempt(name, outcome)
        if kept:
            self.counts.add(name, kept[0].counts)
        return kept[0] if kept else None

    def bridge(self) -> None:
        """The CPU's record again: random start of unit norm, Adam, its very rows and order."""
        s = self.sizes
        arm = Arm("random", "adam", 1e-3, s.d_sae, s.bridge_batch, s.bridge_steps, False, 0.0)
        found = self.run("bridge", arm, self._site(*s.bridge), self.clock.left / 3)
        if found is not None:
            took = found.about["seconds"]
            self.beside = took["made"] + took["judged"]

    def conditions(self, names: list[str], place: Site, first: Arm, seconds: float) -> None:
        """Arms of equal tokens, as many as fit into the seconds at the pace of each optimizer."""
        for name, arm, expected in self._with_steps(names, first, place, seconds):
            if self.clock.left < expected + self.beside / 2:
                self.results.add(name, {"left out": "no time"})
                continue
            self.run(name, arm, place, min(self.clock.left, _PATIENCE * expected))

    def _with_steps(
        self, names: list[str], first: Arm, place: Site, seconds: float
    ) -> list[tuple[str, Arm, float]]:
        """Name, arm, and the seconds that its training should take."""
        made = [(name, self._arm(name, first)) for name in names]
        if stage.REHEARSAL:
            steps = self.sizes.most_steps
            return [(name, replace(arm, steps=steps), seconds / len(made)) for name, arm in made]
        clock, pace = stage.Clock(seconds), {}
        for optimizer in ("adam", "sparse_adam"):
            trial = replace(first, optimizer=optimizer)
            of_a_step = arms.seconds_per_step(trial, place, self.untrained, self.backend)
            pace[optimizer] = _SLOWER * of_a_step
            stage.free()
        refits = sum(arm.refitted > 0 for _, arm in made)
        left = clock.left - len(names) * self.beside - refits * _REFIT_SECONDS
        steps = int(left / sum(pace[arm.optimizer] for _, arm in made))
        steps = max(50, min(steps, self.sizes.most_steps))
        self.results.add(f"pace, {first.d_sae} features", {"seconds": pace, "steps": steps})
        return [(n, replace(arm, steps=steps), steps * pace[arm.optimizer]) for n, arm in made]

    def _arm(self, name: str, first: Arm) -> Arm:
        """The arm of a condition, with the rate that the name ends with, if any."""
        condition, _, rate = name.partition(" at ")
        refits = condition == "recipe" and first.d_sae == self.sizes.narrower
        settings = _CONDITIONS[condition] | ({"lr": float(rate)} if rate else {})
        return replace(first, **settings, refitted=self.sizes.refitted if refits else 0)


def main() -> None:
    part, began = stage.part(__doc__, FIRES, default="arms"), time.monotonic()
    rates = part == "rates"
    headline = Headline(stage.seconds(250), FIRES[part])
    sizes = headline.sizes
    names, d_sae = list(_CONDITIONS), sizes.d_sae
    if rates:
        names, d_sae = [f"{name} at {rate:g}" for rate in _RATES for name in _SWEPT], sizes.narrower
        headline.beside = _BESIDE_NARROWER
    else:
        headline.bridge()
    first = Arm("random", "adam", _RATES[0], d_sae, sizes.batch, 1)
    headline.conditions(names, headline.whole_site(), first, headline.clock.left)
    took = time.monotonic() - began
    end = {"seconds": took, "counts left out": headline.counts.left_out}
    headline.results.add("end of rates" if rates else "end", end)
    raise SystemExit(headline.results.status)


if __name__ == "__main__":
    main()
