"""What the ranks of `test_distributed.py` do, as forks of one process or under torchrun.

Importing torch and saesub takes longer than a training run here, so it is done once:

    python distributed_worker.py cases FOLDER      # forks one rank, then two, then four
    torchrun … distributed_worker.py train FOLDER  # one run with checkpoints
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
from torch import Tensor

from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.loading.corpora import load_corpus
from saesub.loading.models import load_model
from saesub.training import distributed
from saesub.training import trainer as trainer_module
from saesub.training.distributed import (
    DataParallelSAETrainer,
    Ranks,
    ShardedSAETrainer,
    take_features,
)
from saesub.training.distributed.trainer import RanksTrainer
from saesub.training.trainer import SubspaceSAETrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from ranks import bytes_sent

D_SAE, BATCH = 515, 64  # two and four ranks get slices of different sizes
DEAD_WINDOW = 20 * BATCH - 10  # ends within a batch, of which ranks have unlike parts


@dataclass(frozen=True)
class Case:
    """A training run."""

    mode: str = "features"
    optimizer: Any = "sparse_adam"
    backend: Any = "torch"
    dtype: str = "float64"
    k: int = 16
    aux: float = 0.0
    steps: int = 200

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
CASES = {  # by the number of ranks
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
MOVED = [Case(mode=mode, steps=40, aux=AUX) for mode in ("features", "data")]  # to other ranks
WEIGHED = [
    replace(case, dtype="float32") for case in (Case(), Case(optimizer="adam"), Case("data"))
]
PASS = {"context_size": 32, "batch_size": 2, "progress": False}
HOOKS = ("blocks.0.hook_attn_out", "blocks.1.hook_mlp_out")
KILLED = (3, 1)  # of three ranks the second
TOKENS = {"many": 1000, "few": 100}  # few: two batches, so that some of four ranks have none


def batches(x: Tensor, start: int = 0) -> Iterator[Tensor]:
    """Batches of shuffled rows, from step `start` on."""
    step = start
    while True:
        chosen = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(step))
        yield x[chosen]
        step += 1


def own_rows(batch: Tensor, step: int, ranks: Ranks) -> Tensor:
    """Uneven parts of a batch: the last rank has five rows, and in every third step none."""
    cuts = [BATCH * i // ranks.world for i in range(ranks.world)]
    cuts.append(BATCH)
    if ranks.world > 1:
        cuts[-2] = BATCH if step % 3 == 0 else BATCH - 5
    return batch[cuts[ranks.rank] : cuts[ranks.rank + 1]]


def make_trainer(
    ranks: Ranks,
    case: Case,
    x: Tensor,
    folder: Path | None = None,
    before_step: Callable[[int], None] = lambda step: None,
) -> RanksTrainer:
    def rows(start: int) -> Iterator[Tensor]:
        for step, batch in enumerate(batches(x, start), start):
            before_step(step)
            yield own_rows(batch, step, ranks)

    sae, cfg = case.sae(x.mean(0)), case.cfg(folder)
    settings = {"optimizer": case.optimizer, "dead_window_tokens": DEAD_WINDOW}
    if case.mode == "data":
        return DataParallelSAETrainer(ranks, cfg, sae, rows, **settings)
    here = take_features(sae, ranks.share(D_SAE))
    return ShardedSAETrainer(ranks, cfg, here, rows, backend=case.backend, **settings)


def outcome(trainer: SubspaceSAETrainer, sae: Any) -> dict[str, Tensor]:
    """The weights, and what the trainer says of the run."""
    said = [point[name] for point in trainer.history for name in ("tokens", "mse", "dead_share")]
    metadata = trainer.sae.cfg.metadata
    said += [trainer.dead_fraction(), metadata.l0, metadata.num_dead_features]
    tensors = {name: t.detach().clone().contiguous() for name, t in sae.named_parameters()}
    return tensors | {"said": torch.tensor(said, dtype=torch.float64)}


def train_alone(x: Tensor, folder: Path) -> None:
    """What several ranks are held to: saesub's trainer, in one process, on whole batches."""
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


def train_together(ranks: Ranks, x: Tensor, folder: Path) -> None:
    """Each case's gathered SAE in a file; that `b_dec` is the same bits everywhere."""
    for case in CASES[ranks.world]:
        trainer = make_trainer(ranks, case, x)
        trainer.fit()
        ranks.check_same("b_dec", trainer.sae.b_dec.tolist())
        keep(ranks, trainer, folder / f"{ranks.world}-{case}")


def keep(ranks: Ranks, trainer: RanksTrainer, path: Path) -> None:
    trainer.dead_fraction()
    said = outcome(trainer, trainer.sae)["said"]
    whole = trainer.gather()
    if whole is not None:
        parameters = {n: t.detach().contiguous() for n, t in whole.named_parameters()}
        save_file(parameters | {"said": said}, path.with_name(f"{path.name}.safetensors"))
        whole.save_inference_model(path)


class _StopError(Exception):
    pass


def stop_or_go_on(ranks: Ranks, x: Tensor, folder: Path) -> None:
    """Four ranks stop within a run; two go on, each kind of trainer from the other's state."""
    four = ranks.world == 4

    def stop(step: int) -> None:
        if four and step == 25:
            raise _StopError

    for case, other in (MOVED, MOVED[::-1]):
        ours = case if four else other
        trainer = make_trainer(ranks, ours, x, folder / f"moved-{case.mode}", stop)
        assert trainer.n_training_steps == (0 if four else 21)
        try:
            trainer.fit()
        except _StopError:
            continue
        keep(ranks, trainer, folder / f"{ranks.world}-{ours}")


def run_whole(ranks: Ranks, x: Tensor, folder: Path) -> None:
    """What a run under torchrun, killed and run again, must end with."""
    trainer = make_trainer(ranks, MOVED[0], x, folder / "uninterrupted")
    trainer.fit()
    whole = trainer.gather()
    if whole is not None:
        whole.save_inference_model(folder / "whole")


def refuse(ranks: Ranks, x: Tensor, folder: Path) -> None:
    """What each rank is told of mistakes, in a file."""
    said = []

    def attempt(what: Callable[[], Any]) -> None:
        try:
            what()
        except SaesubError as error:
            said.append(str(error))

    place = folder / "moved-data"
    attempt(lambda: make_trainer(ranks, replace(MOVED[0], optimizer="adam"), x, place))
    attempt(lambda: make_trainer(ranks, replace(MOVED[0], steps=40 + ranks.rank), x))
    slice_ = take_features(MOVED[0].sae(x[0]), range(200 + ranks.rank))
    attempt(lambda: ShardedSAETrainer(ranks, MOVED[0].cfg(None), slice_, lambda start: iter(())))
    attempt(lambda: make_trainer(ranks, MOVED[0], x).step(x[:0]))
    attempt(lambda: make_trainer(ranks, MOVED[1], x).step(x[:0]))
    if ranks.rank == 0:
        damaged = next(next(place.glob("state-*")).glob("shard-*"))
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
    ranks.barrier()
    attempt(lambda: make_trainer(ranks, MOVED[0], x, place))
    (folder / f"refused-{ranks.rank}").write_text("\n".join(said))


def merge(ranks: Ranks, x: Tensor, folder: Path) -> None:
    """Spectra of uneven parts of the rows, the last rank having none."""
    cuts = [0, len(x), len(x)] if ranks.world == 2 else [0, 100, 1900, len(x), len(x)]
    part = x[cuts[ranks.rank] : cuts[ranks.rank + 1]]
    own = {"all": Spectrum.from_activations(part)} if len(part) else {}
    for name, spectrum in distributed.merge_spectra(ranks, own).items():
        spectrum.save(folder / f"{name}-{ranks.world}-{ranks.rank}")
    with pytest.raises(SaesubError, match="No rank measured a token"):
        distributed.merge_spectra(ranks, {})


def measure(ranks: Ranks, folder: Path) -> None:
    """Spectra of a model's activations, its batches dealt out to the ranks."""
    for name, n_tokens in TOKENS.items():
        found = distributed.measure_spectra(
            ranks, MODEL, CORPUS, HOOKS, n_tokens=n_tokens, checkpoint=folder / name, **PASS
        )
        for hook, spectrum in found.items():
            spectrum.save(folder / f"{name}-{hook}-{ranks.world}-{ranks.rank}")


def weigh(ranks: Ranks, x: Tensor, folder: Path) -> None:
    """What a rank holds, and what it sends in a step, in files."""
    for case in WEIGHED:
        trainer = make_trainer(ranks, case, x)
        share = ranks.share(BATCH)
        parts = [x[i * BATCH :][share.start : share.stop] for i in range(6)]
        trainer.step(parts[0])
        ranks.barrier()
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
        (folder / f"weighed-{case}-{ranks.world}-{ranks.rank}").write_text(
            json.dumps({"sent": sent, "held": held})
        )


def lose_a_rank(ranks: Ranks, x: Tensor, folder: Path) -> None:
    """Rank 1 kills itself in the middle; what the others say, in files."""

    def die(step: int) -> None:
        if (ranks.world, ranks.rank) == KILLED and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks.rank == 2 and step == 5:  # so that it misses rank 1 later than rank 0 does
            time.sleep(1)

    try:
        make_trainer(ranks, MOVED[0], x, None, die).fit()
    except SaesubError as error:
        (folder / f"lost-{ranks.rank}").write_text(str(error))


def as_rank(rank: int, world: int, port: int, folder: Path) -> None:
    x = load_file(folder / "x.safetensors")["x"]
    if world == 1:
        return train_alone(x, folder)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    with distributed.join(60) as ranks:
        if world == 3:
            return lose_a_rank(ranks, x, folder)
        merge(ranks, x, folder)
        measure(ranks, folder)
        weigh(ranks, x, folder)
        stop_or_go_on(ranks, x, folder)
        if world == 2:
            refuse(ranks, x, folder)
            run_whole(ranks, x, folder)
        train_together(ranks, x, folder)


def fork_ranks(world: int, folder: Path) -> list[int]:
    """The process ids of the ranks, whose output goes to files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with (folder / f"output-{world}-{rank}").open("w") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                as_rank(rank, world, port, folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        started.append(pid)
    return started


def fork_all(folder: Path) -> None:
    failed = []
    for worlds in ([3, 1], [4], [2]):
        started = {
            (world, r): pid for world in worlds for r, pid in enumerate(fork_ranks(world, folder))
        }
        for rank, pid in started.items():
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            failed += [(rank, code)] * (code != (-signal.SIGKILL if rank == KILLED else 0))
    if failed:
        sys.exit(f"World, rank and exit code of those that failed: {failed}")


def train_and_save(folder: Path) -> None:
    """Under torchrun: train, going on from what is there; rank 0 saves the whole SAE."""
    with distributed.join(60) as ranks:

        def die(step: int) -> None:
            if os.environ.get("DIE_AT") == f"{ranks.rank}:{step}":
                os.kill(os.getpid(), signal.SIGKILL)

        x = load_file(folder / "x.safetensors")["x"]
        trainer = make_trainer(ranks, MOVED[0], x, folder / "run", die)
        print(f"rank {ranks.rank} starts at step {trainer.n_training_steps}", flush=True)
        trainer.fit()
        sae = trainer.gather()
        if sae is not None:
            sae.save_inference_model(folder / "sae")


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork inherits no other threads
    trainer_module._HISTORY_POINTS = 8  # so that checkpoints lie between two points
    if sys.argv[1] == "cases":
        MODEL = load_model("smollm2-135m", device="cpu")
        CORPUS = load_corpus("wiki-en").select(range(200))
        fork_all(Path(sys.argv[2]))
    else:
        train_and_save(Path(sys.argv[2]))
