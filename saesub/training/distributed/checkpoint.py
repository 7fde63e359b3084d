"""The state of a run on several processes, from which any number of them can continue.

torch.distributed.checkpoint writes the tensors, each process into safetensors files of its own. It
keeps no settings and finds no damage, so `saesub_state.safetensors` holds settings and checksums. A
state is written as `state-<tokens>.partial` and renamed when it is complete, and only then is the
one before it deleted: at any moment one complete state is there. Jobs that write to one folder wait
for one another. States need torch 2.9; training without them does not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from saesub.errors import SaesubError
from saesub.files import Form, damaged, file_sha256, read_checksummed, write_checksummed
from saesub.training.checkpoint import STATE_FILENAME, check_same_settings
from saesub.training.distributed.processes import Processes

_STATE = re.compile(r"state-(\d+)(\.partial)?")
_FORM = Form(
    format="saesub-processes-1",
    key="record",
    what="state of a run on several processes",
    missing="the state is damaged or incomplete; delete it and start again",
    damaged="delete the state and start again",
)


def write_state(
    processes: Processes,
    folder: Path,
    tokens: int,
    tensors: Mapping[str, Tensor],
    settings: dict[str, Any],
    progress: dict[str, Any],
) -> None:
    """Write the state after `tokens` tokens; collective.

    Args:
        tensors: DTensors, of which each process writes its part, and tensors equal on all.
        settings, progress: JSON values; those of the first process are written.

    Raises:
        SaesubError: a file could not be written, the processes do not see the same folder, or torch
            is older than 2.9.
    """
    hf_storage = _hf_storage()
    target = folder / f"state-{tokens}"
    partial = folder / f"{target.name}.partial"
    try:
        with _alone_in(folder, processes):
            if processes.objects(target.exists())[0]:
                return
            if processes.index == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            processes.barrier()
            writer = hf_storage.HuggingFaceStorageWriter(str(partial), save_distributed=True)
            with processes.answering():
                save(dict(tensors), storage_writer=writer)
            files = sorted(path.name for path in partial.iterdir())
            processes.check_same("view of the checkpoint folder", files)
            checksums = _checksums(processes, partial, files)
            if processes.index == 0:
                record = {"settings": settings, "progress": progress, "files": checksums}
                write_checksummed(partial / STATE_FILENAME, _FORM, {}, json.dumps(record))
                os.replace(partial, target)
                for other in folder.glob("state-*"):
                    if other != target and _STATE.fullmatch(other.name):
                        shutil.rmtree(other)
    except (OSError, SafetensorError, CheckpointException) as error:
        raise SaesubError(
            f"The state {partial} could not be written ({error}): use a folder with enough room "
            "that every machine of the job shares; the state before it is kept."
        ) from error
    processes.barrier()


@contextmanager
def _alone_in(folder: Path, processes: Processes) -> Iterator[None]:
    """Wait until no other job writes there. The first process waits, the others for it."""
    if processes.index:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield


def newest_state(processes: Processes, folder: Path) -> Path | None:
    """The complete state of most tokens there, as the first process sees it; collective.

    Raises:
        SaesubError: torch is older than 2.9. This is said before training, not at its first state.
    """
    _hf_storage()
    names = [_STATE.fullmatch(path.name) for path in folder.glob("state-*")]
    tokens = [int(name[1]) for name in names if name and not name[2]]
    return processes.objects(folder / f"state-{max(tokens)}" if tokens else None)[0]


def read_state(
    processes: Processes, path: Path, tensors: Mapping[str, Tensor], settings: dict[str, Any]
) -> dict[str, Any]:
    """Fill `tensors` in place with what `write_state` wrote, and return its progress; collective.

    Raises:
        SaesubError: a file is missing or has changed, the state is of other settings, or torch is
            older than 2.9.
    """
    hf_storage = _hf_storage()
    _, text = read_checksummed(path / STATE_FILENAME, _FORM)
    record = json.loads(text)
    check_same_settings(path, record["settings"], settings)
    found = _checksums(processes, path, sorted(record["files"]))
    for name, checksum in record["files"].items():
        if found[name] != checksum:
            raise SaesubError(
                f"{path} is damaged ({name} is not the file that was written): {_FORM.damaged}."
            )
    try:
        with processes.answering():
            load(dict(tensors), storage_reader=hf_storage.HuggingFaceStorageReader(str(path)))
    except CheckpointException as error:
        raise damaged(path, _FORM, error) from error
    return record["progress"]


def _checksums(processes: Processes, folder: Path, names: list[str]) -> dict[str, str | None]:
    """Of all files, each read by one process; None for one that is not there."""
    own = names[processes.index :: processes.count]
    here = {n: file_sha256(folder / n) if (folder / n).is_file() else None for n in own}
    return {name: value for part in processes.objects(here) for name, value in part.items()}


def _hf_storage() -> Any:
    """torch's module for states in safetensors files. Raises SaesubError if torch lacks it."""
    if torch.__version__ < "2.9":
        raise SaesubError(
            "States of a run on several processes need torch 2.9 or newer, not "
            f'{torch.__version__}: pip install "torch>=2.9", or train without checkpoints.'
        )
    from torch.distributed.checkpoint import hf_storage

    return hf_storage
