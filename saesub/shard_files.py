"""The state of a training run in a folder, each rank's slice of the features in a file of its own.

A state is the folder `state-<tokens>`: `slice-<rank>.safetensors` for every rank, with rows that
count features; `whole.safetensors`, what has no such axis; and `manifest.json`. It is written as
`state-<tokens>.partial` and renamed when every rank has finished, and only then is the state before
it deleted: at any moment one complete state is there. Any number of ranks can read it.

torch.distributed.checkpoint would do as much, but describes its files in a pickle, which is not
safe to load from elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from saesub.distributed import Ranks
from saesub.errors import SaesubError

_FORMAT = "saesub-shards-1"
_MANIFEST, _WHOLE = "manifest.json", "whole.safetensors"


def write_state(
    ranks: Ranks,
    folder: Path,
    tokens: int,
    first: int,
    rows: dict[str, Tensor],
    whole: dict[str, Tensor],
    record: dict[str, Any],
) -> None:
    """Write the state after `tokens` tokens; collective.

    Args:
        first: number of this rank's first feature; the slices follow one another in order of rank.
        rows: tensors with one row per feature of this rank's slice.
        whole: tensors without a feature axis; those of rank 0 are written.
        record: JSON values to go with them, likewise.

    Raises:
        SaesubError: a file could not be written, or the ranks do not see the same folder.
    """
    target = folder / f"state-{tokens}"
    if ranks.objects(target.exists())[0]:
        return
    partial = folder / f"{target.name}.partial"
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    name = f"slice-{ranks.rank}.safetensors"
    try:
        _save(partial / name, rows)
    except (OSError, SafetensorError) as error:
        raise SaesubError(
            f"Rank {ranks.rank} could not write {partial / name} ({error}): all ranks need room "
            "in a folder that every machine of the job shares; the state before it is intact."
        ) from error
    size = (partial / name).stat().st_size
    n_rows = len(next(iter(rows.values())))
    slices = ranks.objects({"file": name, "first": first, "count": n_rows, "bytes": size})
    if ranks.rank == 0:
        _save(partial / _WHOLE, whole)
        manifest = {"format": _FORMAT, "slices": slices, "record": record}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        os.replace(partial, target)
        for other in folder.glob("state-*"):
            if other != target:
                shutil.rmtree(other)
    ranks.barrier()


def newest_state(ranks: Ranks, folder: Path) -> Path | None:
    """The complete state of most tokens there, as rank 0 sees it; collective."""
    found = [p for p in folder.glob("state-*") if p.suffix != ".partial"]
    newest = max(found, key=lambda p: int(p.name.removeprefix("state-")), default=None)
    return ranks.objects(newest)[0]


class State:
    """A state that `write_state` made, read slice by slice.

    Attributes:
        record: the JSON values.
        n_features: number of features in all.

    Raises:
        SaesubError: a file is missing, truncated or not a state's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            manifest = json.loads((path / _MANIFEST).read_bytes())
            if manifest["format"] != _FORMAT:
                raise ValueError(f"format {manifest['format']!r}")
            self.record: dict[str, Any] = manifest["record"]
            self._slices: list[dict[str, Any]] = manifest["slices"]
            self.n_features = sum(part["count"] for part in self._slices)
            for part in self._slices:
                if (path / part["file"]).stat().st_size != part["bytes"]:
                    raise ValueError(f"{part['file']} is truncated")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def whole(self) -> dict[str, Tensor]:
        """The tensors without a feature axis."""
        try:
            return load_file(self.path / _WHOLE)
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor with a row per feature."""
        parts = []
        try:
            for part in self._slices:
                low = max(start - part["first"], 0)
                high = min(stop - part["first"], part["count"])
                if low < high:
                    with safe_open(self.path / part["file"], framework="pt") as file:
                        parts.append(file.get_slice(name)[low:high])
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error
        return torch.cat(parts)

    def _damaged(self, error: Exception) -> SaesubError:
        return SaesubError(
            f"The state {self.path} is damaged or incomplete ({error}): delete it and start anew."
        )


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
