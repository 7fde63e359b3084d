"""A process that runs jobs in forks of itself and kills them: what `test_kill.py` talks to.

Importing torch and loading the model takes longer than any of the jobs, so they are done once. A
line of JSON on standard input asks for a job; a line on standard output says how it went.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from short_model import first_layers
from tqdm import tqdm

from saesub.activations import forward_pass
from saesub.activations.collect import harvest, measure_spectra
from saesub.activations.store import ActivationStore
from saesub.loading import download as fetching
from saesub.loading import models
from saesub.loading.corpora import load_corpus
from saesub.loading.models import load_model
from saesub.loading.registry import read_registry
from saesub.paths import cache_dir
from saesub.reproduce import runner
from saesub.training import comparison
from saesub.training.trainer import SubspaceSAETrainer

HOOKS = ("blocks.0.hook_attn_out", "blocks.1.hook_mlp_out")
LIMIT = 600  # seconds, after which a job hangs
PASS = {"n_tokens": 480, "context_size": 32, "batch_size": 2, "progress": False}
BATCH, STEPS = 64, 60
CORPUS = load_corpus("wiki-en").select(range(200))
MODEL = first_layers(2)  # of its 30: those that the hook points need
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
FILE_CALLS = {"write", "flush", "close"}

torch.set_num_threads(1)  # a fork inherits no other threads

Tick = Callable[[], None]


def sha(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def count_passes(tick: Tick) -> None:
    """Have every forward pass ticked off, and the state kept after each."""
    forward = forward_pass.capture
    forward_pass.KEEP_EVERY = 0.0

    def counted(*args: Any) -> None:
        tick()
        forward(*args)

    forward_pass.capture = counted


def do_convert(folder: Path, tick: Tick) -> str:
    """The packaged model, whose file was fetched before, into a cache that lacks its conversion."""
    packages = Path("packages") / "smollm2-135m"
    whole = cache_dir() / packages
    os.environ["SAESUB_CACHE"] = str(folder / "cache")
    with suppress(FileExistsError):
        shutil.copytree(whole, folder / "cache" / packages, copy_function=os.link)
    convert = models.convert

    def counted(*args: Any) -> None:
        tick()
        convert(*args)

    models.convert = counted
    model = load_model("smollm2-135m", device="cpu")
    return sha(*(p.numpy().tobytes() for p in model.original_model.parameters()))


def do_fetch(folder: Path, tick: Tick) -> str:
    os.environ["SAESUB_CACHE"] = str(folder / "cache")
    download = fetching._download_wheel

    def counted(*args: Any) -> Path:
        tick()
        return download(*args)

    fetching._download_wheel = counted
    registry = read_registry(folder / "registry.toml")
    path = fetching.fetch("toy", progress=False, registry=registry)
    return sha((path / "a.bin").read_bytes(), (path / "b.bin").read_bytes())


def do_harvest(folder: Path, tick: Tick) -> str:
    count_passes(tick)
    stores = harvest(MODEL, CORPUS, HOOKS, folder / "stores", **PASS)
    return sha(*(s.rows(0, s.n_tokens).numpy().tobytes() for s in stores.values()))


def do_grow(folder: Path, tick: Tick) -> str:
    """Stores in the cache, of more and more tokens and hook points."""
    os.environ["SAESUB_CACHE"] = str(folder / "cache")
    count_passes(tick)
    harvest(MODEL, CORPUS, HOOKS[:1], **PASS | {"n_tokens": 200})
    stores = harvest(MODEL, CORPUS, HOOKS, **PASS)
    return sha(*(s.rows(0, s.n_tokens).numpy().tobytes() for s in stores.values()))


def do_cached(folder: Path, tick: Tick) -> str:
    """Spectra in the cache, of more and more tokens and hook points."""
    os.environ["SAESUB_CACHE"] = str(folder / "cache")
    count_passes(tick)
    measure_spectra(MODEL, CORPUS, HOOKS[:1], cache=True, **PASS | {"n_tokens": 200})
    found = measure_spectra(MODEL, CORPUS, HOOKS, cache=True, **PASS)
    parts = [t.numpy().tobytes() for s in found.values() for t in (s.mean, s.covariance)]
    return sha(*parts, repr([s.mean_norm for s in found.values()]).encode())


def do_spectra(folder: Path, tick: Tick) -> str:
    count_passes(tick)
    found = measure_spectra(MODEL, CORPUS, HOOKS, checkpoint=folder / "state", **PASS)
    parts = [t.numpy().tobytes() for s in found.values() for t in (s.mean, s.covariance)]
    return sha(*parts, repr([s.mean_norm for s in found.values()]).encode())


def make_condition(name: str, optimizer: str) -> SubspaceSAETrainer:
    cfg = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_warm_up_steps=10,
        lr_decay_steps=20,
        n_batches_for_norm_estimate=3,
    )
    torch.manual_seed(len(name))
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=576,
            d_sae=512,
            k=8,
            aux_loss_coefficient=1 / 32,
            normalize_activations="expected_average_only_in",
        )
    )
    window = 10 * BATCH  # some features die, so that AuxK has something to do
    return SubspaceSAETrainer(cfg, sae, iter(()), optimizer=optimizer, dead_window_tokens=window)  # pyright: ignore


def do_train(folder: Path, tick: Tick) -> str:
    store = ActivationStore.open(folder.parent / "whole-harvest" / "stores", HOOKS[0])

    def batches(start: int) -> Any:
        stream = comparison.joint_batches({HOOKS[0]: store}, BATCH, seed=5, start_step=start)
        ticking = (batch for batch in stream if tick() is None)
        return comparison.StoreBatches(ticking, stream.identity)

    trainers = {
        "adam": make_condition("adam", "adam"),
        "sparse": make_condition("sparse", "sparse_adam"),
    }
    history = comparison.train_together(trainers, batches, folder=folder / "runs", n_checkpoints=11)
    parts = [p.detach().numpy().tobytes() for t in trainers.values() for p in t.sae.parameters()]
    counts = [t.tokens_since_fired.numpy().tobytes() for t in trainers.values()]
    assert sum(int(t.dead_neurons.sum()) for t in trainers.values()) > 0
    return sha(*parts, *counts, history.to_csv(index=False).encode())


def do_reproduce(folder: Path, tick: Tick) -> str:
    runner.notebooks_dir = lambda: folder.parent / "notebooks"
    os.environ["KILLING_LOG"] = str(folder / "ran")
    run = runner._execute

    def counted(*args: Any) -> Any:
        tick()
        return run(*args)

    runner._execute = counted
    outcomes = runner.reproduce("smoke", results=folder / "results", quiet=True)
    assert not [o.error for o in outcomes if o.error]
    pages = [folder / "results" / "smoke" / "notebooks" / f"{o.name}.ipynb" for o in outcomes]
    texts = [cell["outputs"] for p in pages for cell in json.loads(p.read_text())["cells"][-1:]]
    return sha(json.dumps([[o["text"] for o in outputs] for outputs in texts]).encode())


JOBS = {
    "convert": do_convert,
    "fetch": do_fetch,
    "harvest": do_harvest,
    "grow": do_grow,
    "cached": do_cached,
    "spectra": do_spectra,
    "train": do_train,
    "reproduce": do_reproduce,
}


def child(job: str, folder: Path, kill_at_event: int | None, to_parent: int) -> None:
    """Runs the job; writes "under way" at its first tick, and how it ended."""
    tqdm.set_lock(threading.RLock())  # the inherited one would stay locked by a killed sibling
    log = os.open(folder / "ticks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    events, ticks = [0], [0]

    def tick() -> None:
        os.write(log, b".")
        ticks[0] += 1
        if ticks[0] == 1:
            os.write(to_parent, b"\n")

    def count() -> None:
        events[0] += bool(ticks[0])
        if events[0] == kill_at_event:
            os.kill(os.getpid(), signal.SIGKILL)

    def of_files(event: str, _: Any) -> None:
        if event in FILE_EVENTS:
            count()

    def of_open_files(_: Any, event: str, called: Any) -> None:
        """Before and after each write, which no audit event tells of."""
        if event in ("c_call", "c_return") and called.__name__ in FILE_CALLS:
            file = getattr(called, "__self__", None)
            name = getattr(file, "name", None)  # none of a buffer in memory
            if isinstance(file, io.IOBase) and name not in (None, "<stdout>", "<stderr>"):
                count()

    sys.addaudithook(of_files)
    sys.setprofile(of_open_files)
    start = time.monotonic()
    result = JOBS[job](folder, tick)
    sys.setprofile(None)
    seconds = time.monotonic() - start
    answer = {"result": result, "seconds": seconds, "events": events[0], "ticks": ticks[0]}
    os.write(to_parent, json.dumps(answer).encode())


def start(job: str, folder: Path, kill_at_event: int | None) -> tuple[int, int]:
    """Forks a child for the job; its process id, and where it says how it goes."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.alarm(LIMIT)
        try:
            with (folder / "output").open("a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                child(job, folder, kill_at_event, write)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    return pid, read


def end(folder: Path, pid: int, read: int, seconds: float | None) -> dict[str, Any]:
    """How a child ended, killed so many seconds after it was under way."""
    with os.fdopen(read, "rb") as answers:
        answer = answers.readline()  # a job with nothing left to do is never under way
        if answer == b"\n" and seconds is not None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
        answer += answers.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        text = (folder / "output").read_text()[-2000:]
        return {"failed": f"{signal.Signals(os.WTERMSIG(status)).name}: {text}"}
    if os.WIFSIGNALED(status):
        return {"killed": True}
    if os.WEXITSTATUS(status):
        return {"failed": (folder / "output").read_text()[-2000:]}
    return json.loads(answer)


def serve(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs a job, in several processes at once if so many `at_once` are asked for, and kills it if
    asked: {"seconds": …} or {"event": …}."""
    job, folder, kill = request["job"], Path(request["folder"]), request["kill"]
    folder.mkdir(parents=True, exist_ok=True)
    started = [start(job, folder, kill.get("event")) for _ in range(request["at_once"])]
    return [end(folder, *each, kill.get("seconds")) for each in started]


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)
