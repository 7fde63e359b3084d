"""What the ranks of `test_distributed.py` do; with torchrun, also a script: it trains and saves."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from saesub import distributed
from saesub.data_parallel import DataParallelSAETrainer
from saesub.sharded import ShardedSAETrainer, take_features
from saesub.spectrum import Spectrum

D_SAE, K, BATCH = 1030, 8, 64  # two and four ranks get slices of different sizes
LR, DEAD_WINDOW = 1e-3, 20 * BATCH


@dataclass(frozen=True)
class Case:
    """A training run."""

    mode: str = "features"
    optimizer: Any = "sparse_adam"
    backend: Any = "torch"
    dtype: str = "float32"
    aux: float = 0.0
    steps: int = 200
    n_checkpoints: int = 0

    def sae(self, spectrum_mean: Tensor) -> TopKTrainingSAE:
        torch.manual_seed(0)
        cfg = TopKTrainingSAEConfig(
            d_in=len(spectrum_mean),
            d_sae=D_SAE,
            k=K,
            dtype=self.dtype,
            aux_loss_coefficient=self.aux,
        )
        sae = TopKTrainingSAE(cfg)
        sae.b_dec.data.copy_(spectrum_mean)
        return sae

    def cfg(self, folder: Path | None = None) -> SAETrainerConfig:
        return SAETrainerConfig(
            total_training_samples=self.steps * BATCH,
            train_batch_size_samples=BATCH,
            lr=LR,
            lr_warm_up_steps=5,
            n_checkpoints=self.n_checkpoints,
            checkpoint_path=None if folder is None else str(folder),
        )


def batches(x: Tensor, start: int = 0) -> Iterator[Tensor]:
    """Batches of shuffled rows, from step `start` on."""
    step = start
    while True:
        chosen = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(step))
        yield x[chosen]
        step += 1


def own_rows(batch: Tensor, step: int, ranks: distributed.Ranks) -> Tensor:
    """Uneven parts of a batch: the last rank has few rows, and in every third step none."""
    cuts = [BATCH * i // ranks.world for i in range(ranks.world)]
    cuts.append(BATCH)
    last = BATCH if step % 3 == 0 else BATCH - 5
    cuts[-2] = last
    return batch[cuts[ranks.rank] : cuts[ranks.rank + 1]]


def make_trainer(ranks, case: Case, x: Tensor, folder: Path | None = None, stop=None):
    def rows(start: int) -> Iterator[Tensor]:
        for step, batch in enumerate(batches(x, start), start):
            if stop is not None:
                stop(step, ranks)
            yield own_rows(batch, step, ranks)

    sae, cfg = case.sae(x.mean(0)), case.cfg(folder)
    settings = {"optimizer": case.optimizer, "dead_window_tokens": DEAD_WINDOW}
    if case.mode == "data":
        return DataParallelSAETrainer(ranks, cfg, sae, rows, **settings)
    here = take_features(sae, ranks.share(D_SAE))
    return ShardedSAETrainer(ranks, cfg, here, rows, backend=case.backend, **settings)


def outcome(trainer, sae) -> dict[str, Tensor]:
    """The weights, and what the trainer says of the run."""
    said = [*(point["mse"] for point in trainer.history), trainer.sae.cfg.metadata.l0]
    said += [trainer.sae.cfg.metadata.num_dead_features]
    tensors = {name: t.detach().clone().contiguous() for name, t in sae.named_parameters()}
    return tensors | {"said": torch.tensor(said, dtype=torch.float64)}


@contextmanager
def joined(rank: int, world: int, port: int, timeout_s: float = 60.0):
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    with distributed.join(timeout_s) as ranks:
        yield ranks


def train_cases(rank: int, world: int, port: int, folder: Path, cases: list[Case]) -> None:
    """Each case's gathered SAE in a file; that `b_dec` is the same bits everywhere."""
    x = load_file(folder / "x.safetensors")["x"]
    with joined(rank, world, port) as ranks:
        for i, case in enumerate(cases):
            trainer = make_trainer(ranks, case, x)
            trainer.fit()
            ranks.check_same("b_dec", trainer.sae.b_dec.tolist())
            trainer.dead_fraction()
            whole = trainer.gather()
            if whole is not None:
                save_file(outcome(trainer, whole), folder / f"{world}-{i}.safetensors")
                whole.save_inference_model(folder / f"{world}-{i}")


def die_in_the_middle(step: int, ranks: distributed.Ranks) -> None:
    """What the environment asks for."""
    if os.environ.get("DIE_AT") == f"{ranks.rank}:{step}":
        os.kill(os.getpid(), signal.SIGKILL)


@record
def main(folder: Path) -> None:
    """Train, resuming what is there; rank 0 saves the whole SAE."""
    torch.set_num_threads(1)
    with distributed.join(timeout_s=60) as ranks:
        x = load_file(folder / "x.safetensors")["x"]
        case = Case(steps=40, n_checkpoints=3, backend="auto")
        trainer = make_trainer(ranks, case, x, folder / "run", die_in_the_middle)
        print(f"rank {ranks.rank} starts at step {trainer.n_training_steps}", flush=True)
        trainer.fit()
        sae = trainer.gather()
        if sae is not None:
            sae.save_inference_model(folder / "sae")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
