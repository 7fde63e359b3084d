"""The state of a run on several processes, in a folder that any number of them can go on from.

torch.distributed.checkpoint writes the tensors, every rank a safetensors file of its own; it says
nothing of settings or damage, so `saesub_state.safetensors` holds these and the checksums. A state
is written as `state-<tokens>.partial` and renamed when it is whole, and only then is the one before
it deleted: at any moment one whole state is there. Needs torch 2.9.
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
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from saesub.errors import SaesubError
from saesub.files import Form, damaged, file_sha256, read_checksummed, write_checksummed
from saesub.training.checkpoint import STATE_FILENAME, check_same_settings
from saesub.training.distributed.processes import Ranks

if torch.__version__ < "2.9":
    raise SaesubError(
        f"Training on several processes needs torch 2.9 or newer, not {torch.__version__}: pip "
        'install "torch>=2.9", or train in one process.'
    )
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

_STATE = re.compile(r"state-(\d+)(\.partial)?")
_FORM = Form(
    format="saesub-ranks-2",
    key="record",
    what="state of a run on several processes",
    missing="the state is damaged or incomplete; delete it and start anew",
    damaged="delete the state and start anew",
)


def write_state(
    ranks: Ranks,
    folder: Path,
    tokens: int,
    tensors: Mapping[str, Tensor],
    settings: dict[str, Any],
    progress: dict[str, Any],
) -> None:
    """Write the state after `tokens` tokens; collective.

    Args:
        tensors: DTensors, of which each rank writes its part, and tensors equal on all ranks.
        settings, progress: JSON values; those of rank 0 are written.

    Raises:
        SaesubError: a file could not be written, or the ranks do not see the same folder.
    """
    target = folder / f"state-{tokens}"
    if ranks.objects(target.exists())[0]:
        return
    partial = folder / f"{target.name}.partial"
    with _writing(partial):
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        ranks.barrier()
        with ranks.answering():
            save(
                dict(tensors),
                storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
            )
        files = sorted(path.name for path in partial.iterdir())
        ranks.check_same("view of the checkpoint folder", files)
        checksums = _checksums(ranks, partial, files)
        if ranks.rank == 0:
            record = {"settings": settings, "progress": progress, "files": checksums}
            write_checksummed(partial / STATE_FILENAME, _FORM, {}, json.dumps(record))
            os.replace(partial, target)
            for other in folder.glob("state-*"):
                if other != target and _STATE.fullmatch(other.name):
                    shutil.rmtree(other)
    ranks.barrier()


def newest_state(ranks: Ranks, folder: Path) -> Path | None:
    """The whole state of most tokens there, as rank 0 sees it; collective."""
    names = [_STATE.fullmatch(path.name) for path in folder.glob("state-*")]
    tokens = [int(name[1]) for name in names if name and not name[2]]
    return ranks.objects(folder / f"state-{max(tokens)}" if tokens else None)[0]


def read_state(
    ranks: Ranks, path: Path, tensors: Mapping[str, Tensor], settings: dict[str, Any]
) -> dict[str, Any]:
    """Fill `tensors` in place with what `write_state` wrote, and return its progress; collective.

    Raises:
        SaesubError: a file is missing or has changed, or the state is of other settings.
    """
    _, text = read_checksummed(path / STATE_FILENAME, _FORM)
    record = json.loads(text)
    check_same_settings(path, record["settings"], settings)
    found = _checksums(ranks, path, sorted(record["files"]))
    for name, checksum in record["files"].items():
        if found[name] != checksum:
            raise SaesubError(
                f"{path} is damaged ({name} is not the file that was written): {_FORM.damaged}."
            )
    try:
        with ranks.answering():
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)))
    except CheckpointException as error:
        raise damaged(path, _FORM, error) from error
    return record["progress"]


def _checksums(ranks: Ranks, folder: Path, names: list[str]) -> dict[str, str | None]:
    """Of all files, each read by one rank; None for one that is not there."""
    own = names[ranks.rank :: ranks.world]
    here = {n: file_sha256(folder / n) if (folder / n).is_file() else None for n in own}
    return {name: value for part in ranks.objects(here) for name, value in part.items()}


@contextmanager
def _writing(partial: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        raise SaesubError(
            f"The state {partial} could not be written ({error}): all ranks need room in a folder "
            "that every machine of the job shares; the state before it is as it was."
        ) from error
