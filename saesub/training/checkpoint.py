"""Checkpoints of a trainer: what SAELens' files lack, the settings, and checksums of all files."""

from __future__ import annotations

import errno
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME
from safetensors import SafetensorError
from torch import Tensor

from saesub.errors import SaesubError
from saesub.files import Form, damaged, file_sha256, read_checksummed, write_checksummed

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
_FOLDED = ("normalize_activations", "rescale_acts_by_decoder_norm")
# Where a run is made and what is kept of it, and what folding changes in the SAE at its end.
_FREE_TO_CHANGE = {
    *("device", "logger", "metadata", "sae_lens_training_version"),
    *("checkpoint_path", "n_checkpoints", "save_final_checkpoint"),
    *_FOLDED,
}
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


def save_state(trainer: SubspaceSAETrainer, folder: Path) -> None:
    """Write what SAELens' files lack, and the checksums of these, as a checkpoint's last file."""
    state = {"tokens_since_fired": trainer.tokens_since_fired} | trainer.recorder.state()
    state |= {f"{_MITIGATION}{name}": kept for name, kept in trainer.mitigation_state.items()}
    state["random.cpu"] = torch.get_rng_state()
    if torch.device(trainer.cfg.device).type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(trainer.cfg.device)
    others = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != STATE_FILENAME]
    checksums = {path.name: file_sha256(path) for path in others}
    record = json.dumps({"settings": trainer.settings(), "files": checksums})
    write_checksummed(folder / STATE_FILENAME, _FORM, state, record)


def load_state(
    trainer: SubspaceSAETrainer, folder: Path, load_saelens: Callable[[Path], None]
) -> None:
    """Restore a checkpoint, SAELens' part by `load_saelens`.

    Raises:
        SaesubError: the checkpoint is damaged, half-written, or of another SAE or settings.
    """
    state, kept_settings = read_checkpoint_state(folder)
    check_same_settings(folder, kept_settings, trainer.settings())
    try:
        load_saelens(folder)
    except _UNREADABLE as error:
        raise SaesubError(
            f"The checkpoint {folder} is damaged or incomplete, or another optimizer's "
            f"({type(error).__name__}): resume from an earlier one, or start anew."
        ) from error
    check_same_shapes(folder, state, trainer.optimizer, trainer.sae.cfg.d_sae)
    steps = {float(kept["step"]) for kept in trainer.optimizer.state.values()}
    trainer.step_choice.equal_steps = len(steps) <= 1
    torch.set_rng_state(state["random.cpu"])
    if "random.cuda" in state and torch.device(trainer.cfg.device).type == "cuda":
        torch.cuda.set_rng_state(state["random.cuda"], trainer.cfg.device)
    state = {name: kept.to(trainer.cfg.device) for name, kept in state.items()}
    trainer.tokens_since_fired = state["tokens_since_fired"]
    trainer.mitigation_state = {
        name.removeprefix(_MITIGATION): kept
        for name, kept in state.items()
        if name.startswith(_MITIGATION)
    }
    trainer.recorder.load_state(state)
    follow_folding(trainer.sae, folder)
    # SAELens saves in the middle of a step: its step counter lags the steps taken by one.
    trainer.n_training_steps = trainer.n_training_samples // trainer.cfg.train_batch_size_samples


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
    """Raise SaesubError, which names the differences, if a checkpoint is of other settings."""
    differing = [
        f"{name} {kept.get(name)!r} (here {wanted.get(name)!r})"
        for name in sorted(kept.keys() | wanted.keys())
        if kept.get(name) != wanted.get(name)
    ]
    if differing:
        raise SaesubError(
            f"The checkpoint {folder} was made with other settings: {', '.join(differing)}. Resume "
            "with those, or start anew."
        )


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


def follow_folding(sae: Any, folder: Path) -> None:
    """Take over the config of a finished run, whose weights have their input scaling folded in.

    SAELens saves the config with the weights but loads the weights alone.
    """
    path = folder / SAE_CFG_FILENAME
    saved = json.loads(path.read_text()) if path.exists() else {}
    for name in _FOLDED:
        if name in saved:
            setattr(sae.cfg, name, saved[name])


def _is_write_failure(error: Exception) -> bool:
    """Whether torch, safetensors or the system says that a file could not be written."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    text = str(error)
    return "os error" in text or "PytorchStreamWriter" in text or "inline_container" in text
