"""Conditions of an experiment: several SAEs trained on the same batches, resumable."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor
from tqdm.auto import tqdm

from saesub.activations.store import ActivationStore
from saesub.errors import SaesubError
from saesub.paths import source_digest
from saesub.training.trainer import SubspaceSAETrainer

_FINAL = "final"
_COMPLETE = "complete"  # an empty file, written when a checkpoint is whole


class ComparisonTrainer(MultiSAETrainer):
    """SAELens' lockstep trainer, driving `SubspaceSAETrainer`s that may differ in everything.

    Args:
        conditions: name -> trainer. All must ask for the same number of tokens and the same batch.
        sites: name -> key of the batch that condition trains on.
        checkpoint_folder: where checkpoints go, or None for none.
        n_checkpoints: how many on the way, besides the final one.
    """

    def __init__(
        self,
        conditions: Mapping[str, SubspaceSAETrainer],
        sites: Mapping[str, str],
        *,
        checkpoint_folder: Path | None = None,
        n_checkpoints: int = 0,
    ) -> None:
        shapes = {
            (t.cfg.total_training_samples, t.cfg.train_batch_size_samples)
            for t in conditions.values()
        }
        if len(shapes) != 1:
            raise SaesubError(
                "Conditions are compared at equal tokens: give all the same total_training_samples and "
                f"train_batch_size_samples, not {sorted(shapes)}."
            )
        cfg = replace(
            next(iter(conditions.values())).cfg,
            checkpoint_path=str(checkpoint_folder) if checkpoint_folder else None,
            n_checkpoints=n_checkpoints if checkpoint_folder else 0,
            save_final_checkpoint=False,
        )
        saes = {name: trainer.sae for name, trainer in conditions.items()}
        super().__init__(cfg, saes, dict(sites), iter(()), save_checkpoint_fn=_mark_complete)  # pyright: ignore
        self.trainers = dict(conditions)

    def fit_from(self, batches: Callable[[int], Iterator[dict[str, Tensor]]]) -> None:
        """Train from the step that was reached; input scales come from the first batches.

        SAELens would estimate them from the training stream itself, which would then start
        elsewhere than the stream of a resumed run.
        """
        self.data_provider = batches(0)
        self._estimate_scaling_factors()
        self.data_provider = batches(self.n_training_steps)
        self.fit()

    def save_checkpoint(self, checkpoint_name: str, wandb_aliases: list[str] | None = None) -> None:
        """SAELens' checkpoint; what a full disk took of one is deleted, to make room."""
        try:
            super().save_checkpoint(checkpoint_name, wandb_aliases)
        except SaesubError:
            if self.cfg.checkpoint_path:
                shutil.rmtree(Path(self.cfg.checkpoint_path) / checkpoint_name, ignore_errors=True)
            raise

    def _update_pbar(
        self, step_outputs: dict[str, TrainStepOutput], pbar: tqdm, update_interval: int = 1
    ) -> None:
        if pbar.n == 0 and self.n_training_samples > 0:
            pbar.set_description(f"Training {len(self.saes)} SAEs")
        pbar.update(self.n_training_samples - pbar.n)


def train_together(
    conditions: Mapping[str, SubspaceSAETrainer],
    batches: Callable[[int], Iterator[dict[str, Tensor]]],
    *,
    sites: Mapping[str, str] | None = None,
    folder: Path | str | None = None,
    n_checkpoints: int = 4,
) -> pd.DataFrame:
    """Train every condition on the same batches and return their histories as one table.

    With a `folder`, an interrupted call continues from its last checkpoint when it is made again,
    and a finished one returns at once with the trained weights. Checkpoints lie in a subfolder
    named by a hash of all settings and initial weights, so a changed experiment starts anew and
    loses nothing of the old one. Calls that share a folder wait for one another.

    Args:
        conditions: name -> trainer, not yet stepped. Their SAEs are trained in place.
        batches: start step -> iterator of {site: (batch, d_in)}, which must give the same batches
            from a step on whenever it is asked (`joint_batches` does).
        sites: name -> site of the batch. May be left out if there is one site only.
        folder: for checkpoints, or None.
        n_checkpoints: how many on the way; each holds the weights and optimizer of every condition.

    Returns:
        columns condition, tokens, mse, dead_share (see `SubspaceSAETrainer.history`).

    Raises:
        SaesubError: conditions that ask for different numbers of tokens, or were trained before; bad
            batches; a damaged checkpoint; a folder that is full or cannot be written.
    """
    if stepped := sorted(
        name for name, condition in conditions.items() if condition.n_training_samples
    ):
        raise SaesubError(
            f"Conditions {stepped} were trained before, perhaps by an interrupted call: make them anew; "
            "with the same folder the call then goes on from its last checkpoint."
        )
    sites = sites or dict.fromkeys(conditions, next(iter(next(batches(0)))))
    place = (
        None if folder is None else Path(folder) / _fingerprint(conditions, sites, next(batches(0)))
    )
    trainer = ComparisonTrainer(
        conditions, sites, checkpoint_folder=place, n_checkpoints=n_checkpoints
    )
    with nullcontext() if place is None else _alone_in(place):
        if not (place and _load_latest(trainer, place)):
            trainer.fit_from(batches)
            if place:
                trainer.save_checkpoint(_FINAL)
        if place:
            _drop_intermediate(place)
    return pd.DataFrame(
        [
            {"condition": name, **point}
            for name, condition in conditions.items()
            for point in condition.history
        ]
    )


def joint_batches(
    stores: Mapping[str, ActivationStore], batch_size: int, *, seed: int, start_step: int = 0
) -> Iterator[dict[str, Float[Tensor, "batch d_in"]]]:
    """Endless shuffled batches of the same tokens from the stores of several sites, by step.

    Raises:
        SaesubError: the stores do not hold the same number of tokens.
    """
    if len({store.n_tokens for store in stores.values()}) != 1:
        sizes = {site: store.n_tokens for site, store in stores.items()}
        raise SaesubError(f"Stores of different lengths hold different tokens: {sizes}.")
    streams = [s.batches(batch_size, seed=seed, start_step=start_step) for s in stores.values()]
    for blocks in zip(*streams, strict=True):
        yield dict(zip(stores, blocks, strict=True))


@contextmanager
def _alone_in(place: Path) -> Iterator[None]:
    """Waits until no other process trains in this folder."""
    lock = FileLock(place / ".lock")
    try:
        place.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            warnings.warn(f"another process trains in {place}: waiting for it.", stacklevel=4)
            lock.acquire()
    except OSError as error:
        raise SaesubError(
            f"Checkpoints cannot be written to {place} ({error.strerror or error}): pass another "
            "folder, or none."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _load_latest(trainer: ComparisonTrainer, place: Path) -> bool:
    """Load the newest complete checkpoint, if any; True if it is the final one."""
    complete = {p.parent.name: p.parent for p in place.glob(f"*/{_COMPLETE}")}
    if not complete:
        return False
    newest = _FINAL if _FINAL in complete else max(complete, key=int)
    try:
        trainer.load_checkpoint(complete[newest])
    except (SaesubError, FileNotFoundError) as error:
        raise SaesubError(
            f"{str(error).rstrip('.')}. To go on from the checkpoint before it, or from the start: "
            f"delete {complete[newest]} and make the conditions anew."
        ) from error
    passed = trainer.n_training_samples
    trainer.checkpoint_thresholds = [t for t in trainer.checkpoint_thresholds if t >= passed]
    return newest == _FINAL


def _mark_complete(checkpoint_path: Path | None) -> None:
    if checkpoint_path is not None:
        (checkpoint_path / _COMPLETE).touch()


def _drop_intermediate(place: Path) -> None:
    for checkpoint in place.iterdir():
        if checkpoint.is_dir() and checkpoint.name != _FINAL:
            shutil.rmtree(checkpoint)


def _fingerprint(
    conditions: Mapping[str, SubspaceSAETrainer],
    sites: Mapping[str, str],
    batch: Mapping[str, Tensor],
) -> str:
    """A hash of what the result depends on: code, settings, initial weights, the first batch."""
    digest = hashlib.sha256(source_digest().encode())
    for name, trainer in sorted(conditions.items()):
        cfg = {k: v for k, v in asdict(trainer.cfg).items() if k != "logger"}
        settings = [name, sites[name], cfg, trainer.optimizer_name, trainer.backend]
        settings += [trainer.dead_window_tokens, repr(trainer.mitigations)]
        digest.update(json.dumps(settings).encode())
        digest.update(json.dumps(trainer.sae.cfg.to_dict(), default=str, sort_keys=True).encode())
        for parameter in trainer.sae.parameters():
            digest.update(_bytes_of(parameter))
    for site in sorted(batch):
        digest.update(_bytes_of(batch[site]))
    return digest.hexdigest()[:16]


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
