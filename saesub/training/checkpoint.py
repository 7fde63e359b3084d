"""Checkpoints of a trainer: what SAELens' files lack, the settings, and checksums of all files."""

from __future__ import annotations

import errno
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME
from safetensors import SafetensorError
from torch import Tensor

from saesub.errors import SaesubError
from saesub.files import Form, damaged, file_sha256, read_checksummed, write_checksummed
from saesub.topk.optim import steps_taken
from saesub.topk.subspace_watch import restore_search, state_of_search
from saesub.training.schedule import follow_schedule

if TYPE_CHECKING:  # the trainer imports this module
    from saesub.training.trainer import SubspaceSAETrainer

STATE_FILENAME = "saesub_state.safetensors"
_FORM = Form(
    format="saesub-trainer-2",
    key="record",
    what="trainer state",
    missing="the checkpoint is damaged or incomplete; resume from an earlier one, or start anew",
    damaged="resume from an earlier checkpoint, or start anew",
)
_UNREADABLE = (
    OSError,
    SafetensorError,
    RuntimeError,
    KeyError,
    ValueError,
    EOFError,
    pickle.UnpicklingError,
)
_MITIGATION = "mitigation."  # before the names of what mitigations keep
_SEARCH = "search."  # and of what the search keeps
_MARK = "saesub_checkpoint.txt"  # the first file written: without the last, it is half a checkpoint
# In an SAE's metadata: what its trainer does to activations before it gives them to the SAE.
SCALED_BY = "activations_scaled_by"
_SCALED = (
    "The SAE reads activations that its trainer has scaled (metadata.activations_scaled_by: {}). "
    "Training folds this into the weights at its end; until then scale what the SAE is given."
)
_FOLDED = ("normalize_activations", "rescale_acts_by_decoder_norm")
# Where a run is made and what is kept of it, and what folding changes in the SAE at its end.
_FREE_TO_CHANGE = {
    *("device", "logger", "metadata", "sae_lens_training_version"),
    *("checkpoint_path", "n_checkpoints", "save_final_checkpoint"),
    *("feature_sampling_window", "n_batches_for_norm_estimate"),
    *_FOLDED,
}
# What a run may be continued with: its schedule and windows follow.
_FOLLOWED = (
    *("total_training_samples", "train_batch_size_samples", "lr", "lr_end", "lr_scheduler_name"),
    *("lr_warm_up_steps", "lr_decay_steps", "n_restart_cycles"),
    *("dead_window_tokens", "dead_feature_window", "autocast"),
)
_RESUME = (
    "Resume with those, or go on from its weights: load them into the SAE of a new trainer, with "
    "sae.load_weights_from_checkpoint."
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)


@contextmanager
def writing(checkpoint_name: str) -> Iterator[None]:
    """Turn the errors of a disk that is full or read-only into a SaesubError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_write_failure(error):
            raise
        raise SaesubError(
            f"The checkpoint {checkpoint_name!r} could not be written ({error}): make room, or "
            "name another folder; the checkpoints before it are as they were."
        ) from error


def save_state(
    trainer: SubspaceSAETrainer, folder: Path, save_saelens: Callable[[Path], None]
) -> None:
    """Write a trainer's state: SAELens' part by `save_saelens`, then what that lacks, and the
    checksums of all files in the folder."""
    folder.mkdir(exist_ok=True, parents=True)
    lines = [f"SAELens' files, and what they lack in {STATE_FILENAME}"]
    if scaled_by := note_scaling(trainer):
        lines.append(_SCALED.format(scaled_by))
    (folder / _MARK).write_text("\n".join(lines) + "\n")
    save_saelens(folder)
    state = {"tokens_since_fired": trainer.tokens_since_fired} | trainer.recorder.state()
    state |= {f"{_MITIGATION}{name}": kept for name, kept in trainer.mitigation_state.items()}
    state |= {f"{_SEARCH}{name}": kept for name, kept in state_of_search(trainer.sae).items()}
    state["random.cpu"] = torch.get_rng_state()
    if torch.device(trainer.cfg.device).type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(trainer.cfg.device)
    # Hidden files are what a killed process left half-written; the writing below removes them.
    others = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != "."]
    checksums = {path.name: file_sha256(path) for path in others if path.name != STATE_FILENAME}
    record = json.dumps({"settings": trainer.settings(), "files": checksums})
    write_checksummed(folder / STATE_FILENAME, _FORM, state, record)


def note_scaling(trainer: SubspaceSAETrainer) -> float | str | None:
    """Write into the SAE's metadata what activations are multiplied by before the SAE reads them,
    "covariance_whitening" if they are whitened; nothing where that is folded into the weights."""
    scaler, metadata = trainer.activation_scaler, getattr(trainer.sae.cfg, "metadata", None)
    scaled_by = "covariance_whitening" if scaler.whitening is not None else scaler.scaling_factor
    if scaled_by is not None:
        setattr(metadata, SCALED_BY, scaled_by)
    elif metadata is not None:
        vars(metadata).pop(SCALED_BY, None)
    return scaled_by


def load_state(
    trainer: SubspaceSAETrainer, folder: Path, load_saelens: Callable[[Path], None]
) -> None:
    """Restore a checkpoint of saesub or of SAELens, whose part `load_saelens` restores, and the
    SAE's weights, if they are there: the state belongs to them alone.

    What SAELens' checkpoints lack is filled in: features are silent for as many whole batches as
    SAELens counted, the history is empty.

    Raises:
        SaesubError: the checkpoint is damaged, half-written, or of another SAE, optimizer or
            settings.
    """
    state: dict[str, Tensor] = {}
    if (folder / STATE_FILENAME).is_file() or (folder / _MARK).is_file():
        state, kept_settings = read_checkpoint_state(folder)
    elif (folder / TRAINER_STATE_FILENAME).is_file():
        kept_settings = _settings_of_saelens(folder)
    else:
        raise SaesubError(
            f"No checkpoint is in {folder}: name the folder that holds {TRAINER_STATE_FILENAME}, a "
            "subfolder of cfg.checkpoint_path."
        )
    check_same_settings(folder, kept_settings, trainer.settings())
    kept_batch = kept_settings.get("train_batch_size_samples")
    steps = _load_saelens_part(trainer, folder, load_saelens, kept_batch)
    if not state:
        state = {"tokens_since_fired": trainer.tokens_of_silent_steps(steps)}
        state |= trainer.recorder.state() | {"random.cpu": torch.get_rng_state()}
    check_same_shapes(folder, state, trainer.optimizer, trainer.sae.cfg.d_sae)
    updates = {float(kept["step"]) for kept in trainer.optimizer.state.values()}
    trainer.native_step.equal_steps = len(updates) <= 1
    torch.set_rng_state(state["random.cpu"])
    if "random.cuda" in state and torch.device(trainer.cfg.device).type == "cuda":
        torch.cuda.set_rng_state(state["random.cuda"], trainer.cfg.device)
    device = trainer.cfg.device  # where the history's float64 may not exist
    trainer.tokens_since_fired = state["tokens_since_fired"].to(device)
    kept = _under(_MITIGATION, state)
    trainer.mitigation_state = {name: tensor.to(device) for name, tensor in kept.items()}
    restore_search(trainer.sae, _under(_SEARCH, state))
    trainer.recorder.load_state(state)
    follow_config(trainer, folder, kept_settings.get("total_training_samples"))
    _restore_weights(trainer.sae, folder)
    trainer.n_training_steps = steps
    reached = trainer.n_training_samples
    trainer.checkpoint_thresholds = [t for t in trainer.checkpoint_thresholds if t >= reached]


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of names with a prefix, without it."""
    return {n.removeprefix(prefix): kept for n, kept in state.items() if n.startswith(prefix)}


def _restore_weights(sae: Any, folder: Path) -> None:
    """SAELens asks the user to load them, and without them trains others in silence."""
    if not (folder / SAE_WEIGHTS_FILENAME).is_file():
        return
    try:
        sae.load_weights_from_checkpoint(folder)
    except _UNREADABLE as error:
        raise SaesubError(
            f"The weights in {folder} are damaged or those of another SAE ({error}): resume from "
            "an earlier checkpoint, or start anew."
        ) from error


class _KeptState:
    """Takes the place of a schedule while SAELens loads a checkpoint."""

    state: dict[str, Any]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def _load_saelens_part(
    trainer: SubspaceSAETrainer,
    folder: Path,
    load_saelens: Callable[[Path], None],
    kept_batch: int | None,
) -> int:
    """Load SAELens' files and let the schedule follow; the number of steps that were taken."""
    schedule, kept = trainer.lr_scheduler, _KeptState()
    trainer.lr_scheduler = kept  # pyright: ignore[reportAttributeAccessIssue]
    try:
        load_saelens(folder)
    except _UNREADABLE as error:
        raise SaesubError(
            f"The checkpoint {folder} is damaged or incomplete, or of another optimizer than "
            f"{trainer.optimizer_name!r} ({type(error).__name__}: {error}): resume from an earlier "
            "one or with the optimizer it was made with, or start anew."
        ) from error
    finally:
        trainer.lr_scheduler = schedule
    follow_schedule(trainer, kept.state, kept_batch)
    # SAELens saves in the middle of a step, before it counts it.
    return max(trainer.n_training_steps, steps_taken(trainer.optimizer))


def _settings_of_saelens(folder: Path) -> dict[str, Any]:
    """What SAELens' checkpoints say of the settings they were made with."""
    path = folder / SAE_CFG_FILENAME
    cfg = json.loads(path.read_text()) if path.is_file() else {}
    return {name: value for name, value in cfg.items() if name not in _FREE_TO_CHANGE} | {
        "optimizer": "adam"
    }


def read_checkpoint_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state and settings of a checkpoint. Raises SaesubError if a file is lost or changed."""
    path = folder / STATE_FILENAME
    state, text = read_checksummed(path, _FORM)
    try:
        record = json.loads(text)
        settings, checksums = record["settings"], record["files"].items()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, _FORM, error) from error
    for name, checksum in checksums:
        file = folder / name
        if not file.is_file() or file_sha256(file) != checksum:
            raise SaesubError(
                f"The checkpoint {folder} is damaged or incomplete ({name} is not the file that "
                f"was written): {_FORM.damaged}."
            )
    return state, settings


def settings_of(trainer: SubspaceSAETrainer) -> dict[str, Any]:
    """What a run that continues must have in common with its first part."""
    own = {
        "optimizer": trainer.optimizer_name,
        "dead_window_tokens": trainer.dead_window_tokens,
        "mitigations": [repr(mitigation) for mitigation in trainer.mitigations],
    }
    given = asdict(trainer.cfg) | trainer.sae.cfg.to_dict()
    own |= {name: value for name, value in given.items() if name not in _FREE_TO_CHANGE}
    # As JSON gives them back, so that they compare equal with kept ones.
    return json.loads(json.dumps(own, default=str))


def check_same_settings(folder: Path, kept: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise SaesubError, which names them, if settings of a checkpoint contradict the wanted ones;
    warn of those that its run continues with.

    A setting that one of them does not know is of another version of SAELens, and no difference.
    """
    differing = {
        name: f"{name} {kept[name]!r} (here {wanted[name]!r})"
        for name in sorted(kept.keys() & wanted.keys())
        if kept[name] != wanted[name]
    }
    contradicting = [text for name, text in differing.items() if name not in _FOLLOWED]
    if contradicting:
        raise SaesubError(
            f"The checkpoint {folder} was made with other settings: {', '.join(contradicting)}. "
            + _RESUME
        )
    if differing:
        text = ", ".join(differing.values())
        warnings.warn(f"The run of {folder} continues with other settings: {text}.", stacklevel=4)


def check_same_shapes(
    folder: Path, state: dict[str, Tensor], optimizer: torch.optim.Optimizer, d_sae: int
) -> None:
    """Raise SaesubError if a checkpoint's counts or loaded moments are of another SAE."""
    if len(state["tokens_since_fired"]) != d_sae:
        raise SaesubError(
            f"The checkpoint {folder} holds {len(state['tokens_since_fired'])} features, "
            f"this SAE has {d_sae}: resume with the SAE it was made from."
        )
    for parameter, kept in optimizer.state.items():
        if kept["exp_avg"].shape != parameter.shape:
            raise SaesubError(
                f"The checkpoint {folder} holds optimizer moments of shape "
                f"{tuple(kept['exp_avg'].shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}: resume with the SAE it was made from."
            )


def follow_config(trainer: SubspaceSAETrainer, folder: Path, kept_total: int | None) -> None:
    """Take over from the saved config what SAELens does not load with the weights: that a finished
    run's input scaling is folded into them, and metadata that this SAE lacks.

    Raises SaesubError where other scaling settings contradict, and where a run whose scaling is
    folded would be trained on: the optimizer's state belongs to the scaled weights.
    """
    sae, path = trainer.sae, folder / SAE_CFG_FILENAME
    saved = json.loads(path.read_text()) if path.exists() else {}
    reached = trainer.n_training_samples
    folded = [name for name in _FOLDED if name in saved and hasattr(sae.cfg, name)]
    differing = {name: saved[name] for name in folded if saved[name] != getattr(sae.cfg, name)}
    if differing and reached < trainer.cfg.total_training_samples:
        if kept_total is None or reached >= kept_total:
            raise SaesubError(
                f"The run of {folder} is finished and its input scaling folded into the weights: "
                "continue from a checkpoint before its end, or load its SAE into a new trainer, "
                "with SAE.load_weights_from_checkpoint and normalize_activations='none'."
            )
        here = {name: getattr(sae.cfg, name) for name in differing}
        raise SaesubError(
            f"The checkpoint {folder} was made with other settings: {differing} (here {here}). "
            + _RESUME
        )
    for name, value in differing.items():
        setattr(sae.cfg, name, value)
    for name, value in saved.get("metadata", {}).items():
        if getattr(sae.cfg.metadata, name, None) is None:
            setattr(sae.cfg.metadata, name, value)


def _is_write_failure(error: Exception) -> bool:
    """Whether torch, safetensors or the system says that a file could not be written."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    text = str(error)
    return "os error" in text or "PytorchStreamWriter" in text or "inline_container" in text
