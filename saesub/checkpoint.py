"""What saesub keeps beside SAELens' files in a checkpoint: its own state, settings, checksums."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saesub.checksummed import Form, damaged, file_sha256, read_checksummed, write_checksummed
from saesub.errors import SaesubError

STATE_FILENAME = "saesub_state.safetensors"
_FORM = Form(
    format="saesub-trainer-1",
    key="record",
    what="trainer state",
    missing="the checkpoint is damaged or incomplete; resume from an earlier one, or start anew",
    damaged="resume from an earlier checkpoint, or start anew",
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)


def write_checkpoint_state(
    folder: Path, state: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """Write the last file of a checkpoint, with the checksums of all that are there before it."""
    others = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != STATE_FILENAME]
    checksums = {path.name: file_sha256(path) for path in others}
    record = json.dumps({"settings": settings, "files": checksums})
    write_checksummed(folder / STATE_FILENAME, _FORM, state, record)


def read_checkpoint_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state and settings of a checkpoint, all of whose files are as they were.

    Raises SaesubError for a file that is missing or has changed.
    """
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


def check_same_settings(folder: Path, kept: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises SaesubError, naming what differs, where a checkpoint is of other settings."""
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


def random_state(device: str) -> dict[str, Tensor]:
    """The states of torch's global random numbers on the CPU and on the device."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_state(state: dict[str, Tensor], device: str) -> None:
    """Set torch's global random numbers to where `random_state` found them."""
    torch.set_rng_state(state["random.cpu"])
    if torch.device(device).type == "cuda" and "random.cuda" in state:
        torch.cuda.set_rng_state(state["random.cuda"], device)


def is_write_failure(error: Exception) -> bool:
    """Whether an error of torch's, safetensors' or the system's says that a file was not taken."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    text = str(error)
    return "os error" in text or "PytorchStreamWriter" in text or "inline_container" in text
