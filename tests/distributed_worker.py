"""What the processes of `test_distributed.py` do, all of them forks of one process.

Importing torch and saesub takes longer than a training run here, so it is done once:

    python distributed_worker.py FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from safetensors.torch import load_file, save_file
from short_model import first_layers
from torch import Tensor
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.init.norm import fit_norm
from saesub.init.subspace import initialize_in_subspace
from saesub.loading.corpora import load_corpus
from saesub.training import distributed, history
from saesub.training.distributed import (
    DataParallelSAETrainer,
    FeatureParallelSAETrainer,
    Processes,
    take_features,
)
from saesub.training.distributed.trainer import MultiProcessTrainer
from saesub.training.trainer import SubspaceSAETrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from processes import bytes_sent

WIDTH = 192  # of the model's 576 coordinates; AuxK takes half as many features of each token
D_SAE, BATCH = 515, 64  # two and four processes get slices of unlike sizes
DEAD_WINDOW = 20 * BATCH - 10  # ends within a batch, of which processes have unlike parts


@dataclass(frozen=True)
class Case:
    """A training run."""

    mode: str = "features"
    optimizer: Any = "sparse_adam"
    backend: Any = "torch"
    dtype: str = "float64"
    k: int = 16
    aux: float = 0.0
    steps: int = 100

    def __str__(self) -> str:
        name = f"{self.mode}-{self.optimizer}-{self.backend}-{self.dtype}-k{self.k}-{self.steps}"
        return name + "-auxk" * bool(self.aux)

    def sae(self, mean: Tensor) -> TopKTrainingSAE:
        torch.manual_seed(0)
        cfg = TopKTrainingSAEConfig(
            d_in=len(mean), d_sae=D_SAE, k=self.k, dtype=self.dtype, aux_loss_coefficient=self.aux
        )
        sae = TopKTrainingSAE(cfg)
        sae.b_dec.data.copy_(mean)
        return sae

    def cfg(self, folder: Path | None, n_checkpoints: int = 3) -> SAETrainerConfig:
        return SAETrainerConfig(
            total_training_samples=self.steps * BATCH,
            train_batch_size_samples=BATCH,
            lr=1e-3,
            lr_warm_up_steps=5,
            lr_decay_steps=10,
            n_checkpoints=n_checkpoints,
            checkpoint_path=None if folder is None else str(folder),
        )


AUX = 1 / 32
FEW = {"k": 8, "aux": AUX}  # more features are dead than AuxK takes of a token
CASES = {  # by the number of processes
    2: [
        Case(optimizer="adam", **FEW),
        Case(mode="data"),
        Case(mode="data", optimizer="adam", aux=AUX),
        Case(backend="exact_search", dtype="float32", aux=AUX, steps=40),
    ],
    4: [
        Case(**FEW),
        Case(mode="data", aux=AUX),
        Case(backend="exact_search", dtype="float32", optimizer="adam", steps=40),
    ],
}
MOVED = [Case(mode=mode, steps=40, aux=AUX) for mode in ("features", "data")]  # to other processes
WEIGHED = [
    replace(case, dtype="float32") for case in (Case(), Case(optimizer="adam"), Case("data"))
]
PASS = {"context_size": 32, "batch_size": 2, "progress": False}
HOOKS = ("blocks.0.hook_attn_out", "blocks.1.hook_mlp_out")
KILLED = (3, 1)  # of three processes, the second
TOKENS = {"many": 1000, "few": 100}  # few: two batches, so that some of four processes have none


def batches(x: Tensor, start: int = 0) -> Iterator[Tensor]:
    """Batches of shuffled rows, from step `start` on."""
    step = start
    while True:
        chosen = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(step))
        yield x[chosen]
        step += 1


def own_rows(batch: Tensor, step: int, processes: Processes) -> Tensor:
    """Uneven parts of a batch: the last process has five rows, and in every third step none."""
    cuts = [BATCH * i // processes.count for i in range(processes.count)]
    cuts.append(BATCH)
    if processes.count > 1:
        cuts[-2] = BATCH if step % 3 == 0 else BATCH - 5
    return batch[cuts[processes.index] : cuts[processes.index + 1]]


def make_trainer(
    processes: Processes,
    case: Case,
    x: Tensor,
    folder: Path | None = None,
    before_step: Callable[[int], None] = lambda step: None,
) -> MultiProcessTrainer:
    def rows(start: int) -> Iterator[Tensor]:
        for step, batch in enumerate(batches(x, start), start):
            before_step(step)
            yield own_rows(batch, step, processes)

    sae, cfg = case.sae(x.mean(0)), case.cfg(folder)
    settings = {"optimizer": case.optimizer, "dead_window_tokens": DEAD_WINDOW}
    if case.mode == "data":
        return DataParallelSAETrainer(processes, cfg, sae, rows, **settings)
    here = take_features(sae, processes.share(D_SAE))
    return FeatureParallelSAETrainer(processes, cfg, here, rows, backend=case.backend, **settings)


def outcome(trainer: SubspaceSAETrainer, sae: Any) -> dict[str, Tensor]:
    """The weights, and what the trainer says of the run."""
    said = [point[name] for point in trainer.history for name in ("tokens", "mse", "dead_share")]
    metadata = trainer.sae.cfg.metadata
    said += [metadata.l0, metadata.num_dead_features, metadata.dead_share, trainer.dead_fraction()]
    tensors = {name: t.detach().clone().contiguous() for name, t in sae.named_parameters()}
    return tensors | {"said": torch.tensor(said, dtype=torch.float64)}


def train_alone(x: Tensor, folder: Path) -> None:
    """What several processes are held to: saesub's trainer, in one process, on whole batches."""
    for case in [*CASES[2], *CASES[4], *MOVED]:
        backend = "torch" if case.mode == "data" else case.backend
        trainer = SubspaceSAETrainer(
            case.cfg(None),
            case.sae(x.mean(0)),
            batches(x),
            optimizer=case.optimizer,
            backend=backend,
            dead_window_tokens=DEAD_WINDOW,
        )
        trainer.fit()
        save_file(outcome(trainer, trainer.sae), folder / f"1-{case}.safetensors")


def train_together(processes: Processes, x: Tensor, folder: Path) -> None:
    """Each case's gathered SAE in a file; that `b_dec` is the same bits everywhere."""
    for case in CASES[processes.count]:
        trainer = make_trainer(processes, case, x)
        trainer.fit()
        processes.check_same("b_dec", trainer.sae.b_dec.tolist())
        keep(processes, trainer, folder / f"{processes.count}-{case}")


def keep(processes: Processes, trainer: MultiProcessTrainer, path: Path) -> None:
    trainer.dead_fraction()
    said = outcome(trainer, trainer.sae)["said"]
    whole = trainer.gather()
    if whole is not None:
        parameters = {n: t.detach().contiguous() for n, t in whole.named_parameters()}
        save_file(parameters | {"said": said}, path.with_name(f"{path.name}.safetensors"))
        whole.save_inference_model(path)


class _StopError(Exception):
    pass


def stop_or_continue(processes: Processes, x: Tensor, folder: Path) -> None:
    """Four processes stop in mid-run; two continue, each kind of trainer from the other's state."""
    four = processes.count == 4

    def stop(step: int) -> None:
        if four and step == 25:
            raise _StopError

    for case, other in (MOVED, MOVED[::-1]):
        ours = case if four else other
        trainer = make_trainer(processes, ours, x, folder / f"moved-{case.mode}", stop)
        assert trainer.n_training_steps == (0 if four else 21)
        try:
            trainer.fit()
        except _StopError:
            continue
        keep(processes, trainer, folder / f"{processes.count}-{ours}")


def run_uninterrupted(processes: Processes, x: Tensor, folder: Path) -> None:
    """What a run under torchrun, killed and run again, must end with."""
    trainer = make_trainer(processes, MOVED[0], x, folder / "uninterrupted")
    trainer.fit()
    whole = trainer.gather()
    if whole is not None:
        whole.save_inference_model(folder / "whole")


def refuse(processes: Processes, x: Tensor, folder: Path) -> None:
    """What each process is told of mistakes, in a file."""
    said = []

    def attempt(what: Callable[[], Any]) -> None:
        try:
            what()
        except SaesubError as error:
            said.append(str(error))

    place = folder / "moved-data"
    attempt(lambda: make_trainer(processes, replace(MOVED[0], optimizer="adam"), x, place))
    attempt(lambda: make_trainer(processes, replace(MOVED[0], steps=40 + processes.index), x))
    slice_ = take_features(MOVED[0].sae(x[0]), range(200 + processes.index))
    nothing: Any = lambda start: iter(())  # noqa: E731
    attempt(lambda: FeatureParallelSAETrainer(processes, MOVED[0].cfg(None), slice_, nothing))
    slice_ = take_features(MOVED[0].sae(x[0]), processes.share(D_SAE))
    initialize_in_subspace(slice_, Spectrum.from_activations(x), seed=processes.index)
    attempt(lambda: FeatureParallelSAETrainer(processes, MOVED[0].cfg(None), slice_, nothing))
    sample = x[processes.index : processes.index + 9]
    spectrum = Spectrum.from_activations(x)
    attempt(lambda: distributed.fit_norm(processes, slice_, spectrum, activations=sample))
    attempt(lambda: make_trainer(processes, MOVED[0], x).step(x[:0]))
    attempt(lambda: make_trainer(processes, MOVED[1], x).step(x[:0]))
    if processes.index == 0:
        damaged = next(next(place.glob("state-*")).glob("shard-*"))
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
    processes.barrier()
    attempt(lambda: make_trainer(processes, MOVED[0], x, place))
    (folder / f"refused-{processes.index}").write_text("\n".join(said))


def merge(processes: Processes, x: Tensor, folder: Path) -> None:
    """Spectra of uneven parts of the rows, the last process having none."""
    cuts = [0, len(x), len(x)] if processes.count == 2 else [0, 100, 1900, len(x), len(x)]
    part = x[cuts[processes.index] : cuts[processes.index + 1]]
    own = {"all": Spectrum.from_activations(part)} if len(part) else {}
    for name, spectrum in distributed.merge_spectra(processes, own).items():
        spectrum.save(folder / f"{name}-{processes.count}-{processes.index}")
    with pytest.raises(SaesubError, match="No process measured a token"):
        distributed.merge_spectra(processes, {})


def measure(processes: Processes, folder: Path) -> None:
    """Spectra of a model's activations, its batches dealt out to the processes."""
    for name, n_tokens in TOKENS.items():
        found = distributed.measure_spectra(
            processes, MODEL, CORPUS, HOOKS, n_tokens=n_tokens, checkpoint=folder / name, **PASS
        )
        for hook, spectrum in found.items():
            spectrum.save(folder / f"{name}-{hook}-{processes.count}-{processes.index}")


def fit(processes: Processes, x: Tensor, folder: Path) -> None:
    """The norm fitted to slices together, to the whole SAE, and to one slice, in files."""
    spectrum, whole = Spectrum.from_activations(x), Case(dtype="float32").sae(x.mean(0))
    initialize_in_subspace(whole, spectrum, norm="keep")
    here, by_itself = (take_features(whole, processes.share(D_SAE)) for _ in range(2))
    norms = {
        "together": distributed.fit_norm(processes, here, spectrum),
        "whole": fit_norm(whole, spectrum),
        "slice": fit_norm(by_itself, spectrum),
    }
    (folder / f"norms-{processes.count}-{processes.index}").write_text(json.dumps(norms))
    for name, expected in take_features(whole, processes.share(D_SAE)).named_parameters():
        torch.testing.assert_close(getattr(here, name), expected, rtol=1e-4, atol=1e-7)
    cfg = Case().cfg(None)
    FeatureParallelSAETrainer(processes, cfg, here, lambda start: iter(()))  # is not refused


def weigh(processes: Processes, x: Tensor, folder: Path) -> None:
    """What a process holds, and what it sends in a step, in files."""
    for case in WEIGHED:
        trainer = make_trainer(processes, case, x)
        share = processes.share(BATCH)
        parts = [x[i * BATCH :][share.start : share.stop] for i in range(6)]
        trainer.step(parts[0])
        processes.barrier()
        before = bytes_sent()
        for part in parts[1:]:
            trainer.step(part)
        sent = (bytes_sent() - before) / (len(parts) - 1)
        state = [t for s in trainer.optimizer.state.values() for t in s.values()]
        held = {
            "parameters": sum(p.nbytes for p in trainer.sae.parameters()),
            "moments": sum(t.nbytes for t in state if t.ndim and t.dtype.is_floating_point),
            "counts": sum(t.nbytes for t in state if not t.dtype.is_floating_point)
            + trainer.tokens_since_fired.nbytes
            + trainer.n_forward_passes_since_fired.nbytes
            + trainer.act_freq_scores.nbytes,
        }
        (folder / f"weighed-{case}-{processes.count}-{processes.index}").write_text(
            json.dumps({"sent": sent, "held": held})
        )


def lose_a_process(processes: Processes, x: Tensor, folder: Path) -> None:
    """Process 1 kills itself in the middle; what the others say, in files."""

    def die(step: int) -> None:
        if (processes.count, processes.index) == KILLED and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if processes.index == 2 and step == 5:  # to notice the loss later than process 0
            time.sleep(1)

    try:
        make_trainer(processes, MOVED[0], x, None, die).fit()
    except SaesubError as error:
        (folder / f"lost-{processes.index}").write_text(str(error))


def as_process(index: int, count: int, port: int, folder: Path) -> None:
    x = load_file(folder / "x.safetensors")["x"]
    if count == 1:
        return train_alone(x, folder)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(index), WORLD_SIZE=str(count), LOCAL_RANK=str(index))
    with distributed.join(60) as processes:
        if count == 3:
            return lose_a_process(processes, x, folder)
        merge(processes, x, folder)
        measure(processes, folder)
        fit(processes, x, folder)
        weigh(processes, x, folder)
        stop_or_continue(processes, x, folder)
        if count == 2:
            refuse(processes, x, folder)
            run_uninterrupted(processes, x, folder)
        train_together(processes, x, folder)


def under_torchrun(folder: Path) -> None:
    """What `torchrun --standalone --nproc-per-node 2` does, twice; the first job loses a process.

    Its processes are forks, since a script would import torch and saesub anew.
    """
    standalone = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [*standalone, "--nproc-per-node", "2", "--start-method", "fork", "script"]
    config, _, _ = torchrun.config_from_args(torchrun.parse_args(command))
    for die_at in ("0:25", ""):
        os.environ["DIE_AT"] = die_at
        try:
            elastic_launch(config, train_and_save)(folder)
        except ChildFailedError as error:
            print(f"torchrun: process {error.get_first_failure()[0]} failed", flush=True)


def train_and_save(folder: Path) -> None:
    """Train, continuing from the state that is there; the first process saves the whole SAE."""
    with distributed.join(60) as processes:

        def die(step: int) -> None:
            if os.environ["DIE_AT"] == f"{processes.index}:{step}":
                os.kill(os.getpid(), signal.SIGKILL)

        x = load_file(folder / "x.safetensors")["x"]
        trainer = make_trainer(processes, MOVED[0], x, folder / "run", die)
        print(f"process {processes.index} begins at step {trainer.n_training_steps}\n", end="")
        try:
            trainer.fit()
        except SaesubError as error:  # torchrun prints it where it started a script
            print(error, flush=True)
            raise
        sae = trainer.gather()
        if sae is not None:
            sae.save_inference_model(folder / "sae")


def fork(output: Path, work: Callable[[], None]) -> int:
    """The id of a process that does `work`, its output going to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fork_job(count: int, folder: Path) -> dict[tuple[int, int], int]:
    """The ids of the processes of a job, by number of processes and index."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        (count, i): fork(
            folder / f"output-{count}-{i}", lambda i=i: as_process(i, count, port, folder)
        )
        for i in range(count)
    }


def fork_all(folder: Path) -> None:
    failed = []
    by_torchrun = {(0, 0): fork(folder / "torchrun", lambda: under_torchrun(folder))}
    for counts in ([3, 1], [4], [2]):
        started = by_torchrun
        for count in counts:
            started = started | fork_job(count, folder)
        by_torchrun = {}
        for process, pid in started.items():
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            failed += [(process, code)] * (code != (-signal.SIGKILL if process == KILLED else 0))
    if failed:
        sys.exit(f"Number of processes, index and exit code of those that failed: {failed}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork inherits no other threads
    history._POINTS = 8  # so that checkpoints lie between two points
    MODEL = first_layers(2)
    CORPUS = load_corpus("wiki-en").select(range(200))
    fork_all(Path(sys.argv[1]))
