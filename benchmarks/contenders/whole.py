"""What every contender of `end_to_end.py` shares: the job, a clock, and a judge. Needs torch and
numpy only, so that it works in every contender's environment."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor

NORM_BATCHES = 1
"""From which SAELens and saesub take the scale of activations; SAELens' default is 1,000, which is
ten times the job."""

Rebuild = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From x (n, d_in) to its reconstruction (n, d_in), and the features that fire, in any shape."""


def job(parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The command line of every contender; `parser` may bring more options."""
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--started", type=float, required=True, help="time.monotonic() at start")
    parser.add_argument("--model", required=True, help="its name in saesub")
    parser.add_argument("--texts", type=Path, required=True, help="folder that `prepare` filled")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--site", required=True, help="its module within the model's layer")
    parser.add_argument("--d-in", type=int, required=True)
    parser.add_argument("--d-sae", type=int, required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="tokens per step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--held-out", type=int, required=True, help="tokens to judge on")
    parser.add_argument("--context", type=int, required=True, help="tokens of a context")
    parser.add_argument("--bos", type=int, help="token before each context, if any")
    parser.add_argument("--separator", type=int, help="token between documents, if any")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.weights = args.texts / "model"  # a folder, for libraries that do not know the name
    args.out = tempfile.mkdtemp()  # for the SAE that each library saves
    return args


def documents(args: argparse.Namespace, name: str) -> list[str]:
    """The documents to train on ("train") or to judge on ("held_out")."""
    lines = (args.texts / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


class Clock:
    """Seconds by part. The parts follow one another, from the start of the process on."""

    def __init__(self, started: float) -> None:
        self.parts: dict[str, float] = {}
        self._last = started
        self.lap("start")  # the interpreter and the imports

    def lap(self, part: str, *, of_which: dict[str, float] | None = None) -> None:
        """The time since the last call is `part`'s, but for what other parts took of it."""
        now = time.monotonic()
        took, self._last = now - self._last, now
        for other, seconds in (of_which or {}).items():
            self.parts[other] = self.parts.get(other, 0) + seconds
            took -= seconds
        self.parts[part] = self.parts.get(part, 0) + took


class Timed:
    """An iterator of batches, or a function, and the seconds spent in it.

    `n_tokens` counts the rows of all batches that were handed out.
    """

    def __init__(self, inner: Any) -> None:
        self._inner, self.seconds, self.n_tokens = inner, 0.0, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = self._time(lambda: next(self._inner))
        self.n_tokens += len(batch)
        return batch

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self._time(lambda: self._inner(*args, **settings))

    def _time(self, work: Callable[[], Any]) -> Any:
        start = time.monotonic()
        try:
            return work()
        finally:
            self.seconds += time.monotonic() - start


@torch.no_grad()
def judge(blocks: Iterable[Tensor], rebuild: Rebuild, d_sae: int) -> dict[str, float]:
    """FVU and the share of features that never fire, over blocks (n, d_in) of activations."""
    error = squares = torch.zeros((), dtype=torch.float64)
    sums, n = torch.zeros((), dtype=torch.float64), 0
    fired = torch.zeros(d_sae, dtype=torch.bool)
    for block in blocks:
        for x in block.split(1024):
            rebuilt, features = rebuild(x)
            fired[features.flatten()] = True
            y = x.double()
            error = error + (rebuilt.double() - y).square().sum()
            squares, sums, n = squares + y.square().sum(), sums + y.sum(0), n + len(y)
    fvu = error / (squares - sums.square().sum() / n)
    return {"fvu": float(fvu), "dead_share": 1 - float(fired.float().mean()), "n_tokens": n}


def finish(
    args: argparse.Namespace,
    clock: Clock,
    package: str,
    n_trained: int,
    judged: list[dict[str, float]],
    rebuilds: list[Rebuild],
) -> None:
    """Print the record as the last line of standard output: the parts, and the SAEs as the library
    judged them and as the same activations judge all contenders, which no part counts."""
    peak = harness.peak_bytes()
    held_out = torch.from_numpy(np.load(args.texts / "held_out.npy"))
    record = {
        "version": version(package),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "parts": clock.parts,
        "seconds": sum(clock.parts.values()),
        "tokens_trained": n_trained,
        "judged": judged,
        "same_tokens": [judge([held_out], rebuild, args.d_sae) for rebuild in rebuilds],
        "peak_bytes": peak,
    }
    print(f"\n{json.dumps(record)}", flush=True)
