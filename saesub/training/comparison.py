"""Training of several SAEs on the same batches, for comparisons; interrupted runs continue."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepOutput, mse_loss
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor
from tqdm.auto import tqdm

from saesub.activations.store import ActivationStore
from saesub.arguments import batch_of, whole_number
from saesub.errors import SaesubError, needs_extra
from saesub.paths import library_versions, source_digest
from saesub.progress import bar
from saesub.topk.eligibility import is_hooked
from saesub.training.plan import NO_SCALE, ended, for_scale, lacks_scale, zero_scale
from saesub.training.trainer import SubspaceSAETrainer

if TYPE_CHECKING:
    import pandas as pd

_FINAL = "final"
_LIBRARIES = ("saesub.", "sae_lens.", "torch.")
_COMPLETE = "complete"  # an empty file, written when a checkpoint is whole
# What stores of the same tokens have in common
_SAME_TOKENS = ("text", "documents", "tokenizer", "context_size", "skip_first", "n_tokens")
# The code that decides the weights and the history, with the transcoders' and what reads batches.
_DECIDING = (
    *("arguments.py", "activations/checks.py", "activations/store.py"),
    *("activations/store_file.py", "extras/transcoders.py", "precision.py"),
    *("topk/", "training/mitigations/"),
    *(f"training/{name}.py" for name in ("checkpoint", "comparison", "firing", "history")),
    *(f"training/{name}.py" for name in ("native_step", "plan", "schedule", "trainer")),
)


class ComparisonTrainer(MultiSAETrainer):
    """SAELens' lockstep trainer of several SAEs, for `SubspaceSAETrainer`s of any settings.

    Args:
        conditions: name -> trainer. All must train on as many tokens in batches of the same size.
        sites: name -> key of the batch that the condition trains on.
        checkpoint_folder: for checkpoints, or None.
        n_checkpoints: how many are written before the final one.
    """

    def __init__(
        self,
        conditions: Mapping[str, SubspaceSAETrainer],
        sites: Mapping[str, str],
        *,
        checkpoint_folder: Path | None = None,
        n_checkpoints: int = 0,
    ) -> None:
        cfgs = [trainer.cfg for trainer in conditions.values()]
        sizes = {(cfg.total_training_samples, cfg.train_batch_size_samples) for cfg in cfgs}
        if len(sizes) != 1:
            raise SaesubError(
                "Conditions are compared at equal tokens: give all the same total_training_samples "
                f"and train_batch_size_samples, not {sorted(sizes)}."
            )
        cfg = replace(
            cfgs[0],
            checkpoint_path=str(checkpoint_folder) if checkpoint_folder else None,
            n_checkpoints=n_checkpoints if checkpoint_folder else 0,
            save_final_checkpoint=False,
        )
        saes = {name: trainer.sae for name, trainer in conditions.items()}
        super().__init__(cfg, saes, dict(sites), iter(()), save_checkpoint_fn=_mark_complete)  # pyright: ignore
        self.trainers: dict[str, Any] = dict(conditions)

    def fit_from(self, batches: Callable[[int], Iterator[dict[str, Tensor]]]) -> None:
        """Train from the step that was reached; input scales come from the first batches.

        SAELens would take these batches out of the training stream, and a resumed run would then
        train on other batches than an uninterrupted one.
        """
        self.data_provider = self._batches_of(batches(0))
        try:
            self._estimate_scaling_factors()
        except NO_SCALE as error:
            raise SaesubError(zero_scale(self.cfg)) from error
        self.data_provider = self._batches_of(batches(self.n_training_steps))
        self.fit()

    def _batches_of(self, given: Iterator[Any]) -> Iterator[dict[str, Tensor]]:
        """The batches as tensors, checked where SAELens reads them before the first step."""
        came = 0
        for came, batch in enumerate(given, start=1):  # noqa: B007 - it is counted for the error
            tensors = _sites_of(batch, self.hook_names.values())
            for name, trainer in self.trainers.items():
                if lacks_scale(trainer):
                    site = self.hook_names[name]
                    tensors[site] = for_scale(trainer, tensors[site])
            yield tensors
        raise ended(self, came)

    def save_checkpoint(self, checkpoint_name: str, wandb_aliases: list[str] | None = None) -> None:
        """SAELens' checkpoint. If the disk is full, what was written of it is deleted."""
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

    With a `folder`, run an interrupted call again and it continues from its last checkpoint; a
    finished call returns the trained weights at once. Checkpoints are in a subfolder named by a
    hash of all settings and initial weights, so a changed experiment starts anew and the
    checkpoints of the old one stay. The batches count too: those of `joint_batches` by the
    checksums of their stores; any other stream without an `identity` of its own, a text, is read
    through once before training. Calls that share a folder wait for one another.

    Args:
        conditions: name -> trainer that has made no step. Its SAE is trained in place.
        batches: start step -> iterator of {site: (batch, d_in)}, which must give the same batches
            from a step on whenever it is called (`joint_batches` does).
        sites: name -> site of the batch. It may be left out if there is one site only.
        folder: for checkpoints, or None.
        n_checkpoints: how many are written before the final one; each holds the weights and the
            optimizer of every condition.

    Returns:
        columns condition, tokens, mse, dead_share (see `SubspaceSAETrainer.history`).

    Raises:
        SaesubError: no conditions, or conditions that train on different numbers of tokens, were
            trained before or share weights; a folder for an SAE, trainer or optimizer with hooks,
            replaced functions or code of your own; bad batches, or the same iterator at every call;
            a damaged checkpoint; a folder that is full or cannot be written; pandas is not
            installed.
    """
    with needs_extra("train_together"):
        import pandas as pd

    if not conditions:
        raise SaesubError("There are no conditions to train: give at least one.")
    if not callable(batches):
        raise SaesubError(
            "batches must be a function of a step's number that gives the batches from there on, "
            f"not {type(batches).__name__}."
        )

    stepped = sorted(name for name, trainer in conditions.items() if trainer.n_training_samples)
    if stepped:
        raise SaesubError(
            f"Conditions {stepped} were trained before, perhaps by an interrupted call: make them "
            "anew; with the same folder the call then continues from its last checkpoint."
        )
    _check_weights_apart(conditions)
    stream = batches(0)
    first = _sites_of(next(stream, None), [] if sites is None else sites.values())
    if batches(0) is stream:
        raise SaesubError(
            "batches gives the same iterator at every call, which goes on where it was: make a new "
            "one at each, from the step it is given, as joint_batches does."
        )
    if sites is None:
        sites = dict.fromkeys(conditions, next(iter(first)))
    if {*sites} != {*conditions}:
        raise SaesubError(
            f"sites names the conditions {sorted(sites)}, not {sorted(conditions)}: give each its "
            "site."
        )
    n_checkpoints = whole_number(n_checkpoints, "n_checkpoints", 0)
    place = None if folder is None else Path(folder) / _fingerprint(conditions, sites, batches)
    together = ComparisonTrainer(
        conditions, sites, checkpoint_folder=place, n_checkpoints=n_checkpoints
    )
    if place is None:
        together.fit_from(batches)
    else:
        with _alone_in(place):
            if not _load_latest(together, place):
                together.fit_from(batches)
                together.save_checkpoint(_FINAL)
            _drop_intermediate(place)
    points = [(name, point) for name, trainer in conditions.items() for point in trainer.history]
    return pd.DataFrame([{"condition": name, **point} for name, point in points])


def _check_weights_apart(conditions: Mapping[str, SubspaceSAETrainer]) -> None:
    """Refuse conditions that would train one SAE's weights together. Raises SaesubError."""
    owner: dict[int, str] = {}
    for name, trainer in conditions.items():
        for weight in trainer.sae.parameters():
            other = owner.setdefault(weight.data_ptr(), name)
            if weight.data_ptr() and other != name:
                raise SaesubError(
                    f"The conditions {other!r} and {name!r} share weights, so that each would "
                    "train the other's: give each an SAE of its own, such as copy.deepcopy(sae)."
                )


class StoreBatches(Iterator[dict[str, Float[Tensor, "batch d_in"]]]):
    """Batches from stores, and the text `identity` that says which batches they are."""

    def __init__(self, batches: Iterator[dict[str, Tensor]], identity: str) -> None:
        self.identity, self._batches = identity, batches

    def __next__(self) -> dict[str, Float[Tensor, "batch d_in"]]:
        return next(self._batches)


def joint_batches(
    stores: Mapping[str, ActivationStore], batch_size: int, *, seed: int, start_step: int = 0
) -> StoreBatches:
    """Endless shuffled batches of the same tokens from the stores of several sites, by step.

    Raises:
        SaesubError: the stores do not hold the same tokens.
    """
    if len({store.n_tokens for store in stores.values()}) != 1:
        sizes = {site: store.n_tokens for site, store in stores.items()}
        raise SaesubError(
            f"Stores of different lengths hold different tokens ({sizes}): harvest all hook "
            "points in one call."
        )
    texts = [{k: s.settings.get(k) for k in _SAME_TOKENS} for s in stores.values()]
    parts = {store.identity.partition(" ")[2] for store in stores.values()}  # without checksums
    if any(text != texts[0] for text in texts) or len(parts) != 1:
        raise SaesubError(
            f"The stores of {', '.join(stores)} were made from different text or settings, or are "
            "different parts of it, so that their rows are not of the same tokens: harvest all "
            "hook points in one call, and split all alike."
        )
    streams = [s.batches(batch_size, seed=seed, start_step=start_step) for s in stores.values()]
    blocks = (dict(zip(stores, parts, strict=True)) for parts in zip(*streams, strict=True))
    held = {site: store.identity for site, store in stores.items()}
    return StoreBatches(blocks, json.dumps([held, int(batch_size), int(seed)], sort_keys=True))


def _sites_of(batch: Any, sites: Iterable[str]) -> dict[str, Tensor]:
    """A batch's tensors by site. Raises SaesubError for anything else, and a site it lacks."""
    if not isinstance(batch, Mapping) or not batch:
        raise SaesubError(
            "batches must give an iterator of {site: (batch, d_in)}, as joint_batches does, not of "
            f"{type(batch).__name__}."
        )
    missing = sorted({*sites} - {*batch})
    if missing:
        raise SaesubError(
            f"The batches have the sites {sorted(batch)}, and no {missing}: give each condition "
            "one of theirs."
        )
    return {site: batch_of(x, f"the batch of site {site!r}") for site, x in batch.items()}


@contextmanager
def _alone_in(place: Path) -> Iterator[None]:
    """Wait until no other process trains in this folder."""
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
            f"{str(error).rstrip('.')}. To continue from the checkpoint before it, or from the "
            f"first step, delete {complete[newest]} and make the conditions anew."
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
    batches: Callable[[int], Iterator[dict[str, Tensor]]],
) -> str:
    """A hash of what the result depends on: code, libraries, settings, initial weights, batches."""
    digest = hashlib.sha256(f"{source_digest(*_DECIDING)} {library_versions()}".encode())
    for name, trainer in sorted(conditions.items()):
        cfg = {k: v for k, v in asdict(trainer.cfg).items() if k != "logger"}
        settings = [name, sites[name], cfg, trainer.optimizer_name, trainer.backend]
        settings += [trainer.dead_window_tokens, repr(trainer.mitigations)]
        settings += _changed_by_hand(name, trainer)
        digest.update(json.dumps(settings, default=str).encode())
        digest.update(json.dumps(trainer.sae.cfg.to_dict(), default=str, sort_keys=True).encode())
        for tensor in (*trainer.sae.parameters(), *trainer.sae.buffers()):
            digest.update(_bytes_of(tensor))
    cfg = next(iter(conditions.values())).cfg
    digest.update(_identity(batches(0), cfg.total_training_samples).encode())
    return digest.hexdigest()[:16]


def _identity(stream: Iterator[dict[str, Tensor]], n_tokens: int) -> str:
    """What tells a stream of batches from others: its own text, or a hash of all its batches."""
    identity = getattr(stream, "identity", None)
    if isinstance(identity, str):
        return identity
    digest, read = hashlib.sha256(), 0
    shows = {"unit": "tok", "desc": "identifying the batches", "delay": 1, "progress": True}
    with bar(total=n_tokens, **shows) as shown:
        while read < n_tokens and (given := next(stream, None)) is not None:
            batch = _sites_of(given, [])
            for site in sorted(batch):
                digest.update(f"{site} {tuple(batch[site].shape)}".encode())
                digest.update(_bytes_of(batch[site]))
            n = len(next(iter(batch.values())))
            read += n
            shown.update(n)
    return digest.hexdigest()


def _changed_by_hand(name: str, trainer: SubspaceSAETrainer) -> list[Any]:
    """What decides a run and is in no config: the optimizer's own settings, frozen weights, the
    activation function, the input scale.

    Raises SaesubError for hooks, replaced functions and classes of the user's own, which a hash
    does not tell apart.
    """
    sae, function = trainer.sae, getattr(trainer.sae, "activation_fn", None)
    own_error = getattr(sae, "mse_loss_fn", mse_loss) is not mse_loss
    own_schedule = trainer.lr_scheduler is not trainer.planned_schedule
    if own_error or own_schedule or _is_changed(trainer):
        raise SaesubError(
            f"Condition {name!r} has hooks, replaced functions or classes of your own (of its SAE, "
            "trainer, optimizer or schedule), so a kept run of it could be another's: leave the "
            "folder out."
        )
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in trainer.optimizer.param_groups
    ]
    frozen = [key for key, p in sae.named_parameters() if not p.requires_grad]
    activation = [type(function).__qualname__, getattr(function, "k", None)]
    scale = trainer.activation_scaler.scaling_factor
    return [type(trainer.optimizer).__qualname__, groups, frozen, activation, scale]


def _is_changed(trainer: SubspaceSAETrainer) -> bool:
    """Whether other code takes part in training than that of the libraries, which is hashed."""
    sae, optimizer = trainer.sae, trainer.optimizer
    parts = (trainer, sae, optimizer, *trainer.mitigations)
    foreign = any(not type(part).__module__.startswith(_LIBRARIES) for part in parts)
    replaced = any(callable(getattr(type(p), k, None)) for p in (trainer, sae) for k in vars(p))
    of_step = [
        hook
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        for hook in vars(optimizer)[hooks].values()
        if not (getattr(hook, "__module__", None) or "").startswith(_LIBRARIES)
    ]
    of_gradients = any(
        p._backward_hooks or p._post_accumulate_grad_hooks  # pyright: ignore
        for p in sae.parameters()
    )
    return foreign or replaced or bool(of_step) or of_gradients or is_hooked(sae)


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
