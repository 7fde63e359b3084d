"""What every contender runs: read activations, warm up, time whole training steps, print one JSON
line. Needs torch and numpy only, so that it works in every contender's environment."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np
import torch
from torch import Tensor

Step = Callable[[Tensor], object]
Make = Callable[[int, int, int, int, int], Step]


def main(name: str, make: Make, package: str = "torch") -> None:
    """Time `make(d_in, d_sae, k, batch, seed)`'s steps as the command line asks, and print them.

    The last line of standard output is a JSON object: `seconds`, one number per timed step, and
    `peak_bytes`, the process's peak resident memory.

    Args:
        make: gives `step(x)`, one whole training step on x (batch, d_in) float32.
        package: the distribution whose version is reported.
    """
    args = _arguments()
    _limit_memory(args.memory_bytes)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    activations = np.load(args.activations, mmap_mode="r")
    step = make(activations.shape[1], args.d_sae, args.k, args.batch, args.seed)
    seconds = _time(step, batches(activations, args.batch), args.warm_up, args.steps)
    record = {
        "name": name,
        "version": version(package),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "d_in": activations.shape[1],
        "d_sae": args.d_sae,
        "k": args.k,
        "batch": args.batch,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(record), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--activations", required=True, help=".npy file, (tokens, d_in) float32")
    parser.add_argument("--d-sae", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="tokens per step")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-bytes", type=int, help="fail beyond this much data")
    return parser.parse_args()


def batches(activations: np.ndarray, batch: int) -> Iterator[Tensor]:
    """Consecutive batches (batch, d_in), copied to memory, from the start again at the end."""
    per_pass = len(activations) // batch
    if per_pass == 0:
        raise ValueError(f"{len(activations)} tokens are no batch of {batch}")
    while True:
        for i in range(per_pass):
            yield torch.from_numpy(np.array(activations[i * batch : (i + 1) * batch]))


def _time(step: Step, source: Iterator[Tensor], warm_up: int, n_steps: int) -> list[float]:
    """Seconds of each of `n_steps` steps, after `warm_up` others, without reading the batches."""
    for _ in range(warm_up):
        step(next(source))
    seconds = []
    for _ in range(n_steps):
        x = next(source)
        start = time.perf_counter()
        step(x)
        seconds.append(time.perf_counter() - start)
    return seconds


def stepwise(fit: Callable[[Iterator[Tensor]], object]) -> Step:
    """A step function for a library that has its training step inside a loop of its own.

    `fit` trains on an iterator of batches (batch, d_in). It runs in a thread: `step(x)` hands it
    one batch and returns once the loop asks for the next, which is when its step is over.
    """
    given: SimpleQueue[Tensor] = SimpleQueue()
    asked: SimpleQueue[BaseException | None] = SimpleQueue()

    def feed() -> Iterator[Tensor]:
        while True:
            asked.put(None)
            yield given.get()

    def run() -> None:
        try:
            fit(feed())
            asked.put(RuntimeError("the library's training loop ended early"))
        except BaseException as error:
            asked.put(error)

    def wait() -> None:
        if (error := asked.get()) is not None:
            raise error

    def step(x: Tensor) -> None:
        given.put(x)
        wait()

    Thread(target=run, daemon=True).start()
    wait()
    return step


def _limit_memory(n_bytes: int | None) -> None:
    """Past `n_bytes`, allocating raises an error here rather than the kernel ending a process."""
    if n_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))


def peak_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's would be the parent's, where that had more
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
