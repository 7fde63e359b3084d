"""Attention outputs of layer 12 for all of the load's text, on the card, in float16.

    python benchmarks/gpu/harvest.py

The rows are those of `saesub.harvest(model, "english-mix", ...)` on a CPU, in its order. They are
kept in memory-backed files where there is room, so that the next stage of the same machine reads
them, if the load and the code are the same; `$OUT/harvest.json` says how they compare with the
package's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import contexts
import numpy as np
import stage
import torch
from model import MOST_ERROR, AttentionOutput, largest_error
from torch import Tensor

FILE = "activations.npy"
_PREFIX = "saesub-gpu-rehearsal-" if stage.REHEARSAL else "saesub-gpu-"
_N_TOKENS = 5_000 if stage.REHEARSAL else None
_AT_ONCE = 8 if stage.REHEARSAL else 256  # contexts in a forward pass
_END_SECONDS = 30  # to begin, and to keep the rows
_SPARE = 1.2  # times the file's size that a folder must have free


class WrongActivationsError(Exception):
    """The activations are not the package's, so that nothing may be trained on them."""


def rows(device: str, seconds: float) -> tuple[Tensor, dict[str, Any]]:
    """Activations (tokens, 576) float16 on the device, and what is to be said of them.

    Those of an earlier stage are read; else as many as `seconds` allow are made.

    Raises:
        WrongActivationsError: the reference activations come out differently.
    """
    if (file := _own_file()) is not None:
        start = time.monotonic()
        kept = torch.from_numpy(np.load(file, mmap_mode="c")).to(device)
        return kept, {"tokens": len(kept), "read_seconds": time.monotonic() - start}
    return _made(device, seconds)


def kept_rows(n: int) -> Tensor | None:
    """The first `n` rows that an earlier stage kept, in float32 on the CPU; None without any."""
    if (file := _own_file()) is None:
        return None
    return torch.from_numpy(np.load(file, mmap_mode="r")[:n].astype(np.float32))


def _made(device: str, seconds: float) -> tuple[Tensor, dict[str, Any]]:
    torch.set_float32_matmul_precision("highest")
    text = contexts.read(stage.LOAD)
    model = AttentionOutput(stage.LOAD / "model.zip", device)
    error = _error(model, text, device)
    clock = stage.Clock(seconds)
    wanted = text.n_kept if _N_TOKENS is None else min(_N_TOKENS, text.n_kept)
    made = torch.empty(wanted, 576, dtype=torch.float16, device=device)
    done = 0
    for start in range(0, len(text.rows), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(text.rows))
        x = model(torch.from_numpy(text.rows[start:stop].astype(np.int64)).to(device))
        mask = torch.from_numpy(text.kept(start, stop)).to(device)
        found = x[mask][: wanted - done]
        made[done : done + len(found)] = found.half()
        done += len(found)
        if done == wanted or clock.left < 0:
            break
    made = made[:done]
    if not bool(made.isfinite().all()):
        raise WrongActivationsError("some activations are not finite in float16")
    about = {"tokens": done, "of": wanted, "seconds": clock.used, "largest_error": error}
    return made, about | {"corpus": text.corpus}


def _error(model: AttentionOutput, text: contexts.Contexts, device: str) -> float:
    """How far activations are from the package's. Raises WrongActivationsError if too far."""
    with np.load(stage.LOAD / "reference.npz") as reference:
        chosen, expected = reference["contexts"], reference["activations"]
    tokens = torch.from_numpy(text.rows[chosen].astype(np.int64)).to(device)
    error = largest_error(model(tokens)[:, ::4].cpu().numpy(), expected)
    if not error <= MOST_ERROR:
        raise WrongActivationsError(f"activations differ from the package's by {error:.1e}")
    return error


def _file() -> Path:
    """Where rows are kept between stages: in memory if that has a file system, else on disk."""
    if place := os.environ.get("GPU_SCRATCH"):
        return Path(place) / FILE
    memory = Path("/dev/shm")
    return (memory if memory.is_dir() else Path(tempfile.gettempdir())) / f"{_PREFIX}{FILE}"


def _own_file() -> Path | None:
    """The rows that an earlier stage kept; None without any, or if load or code were others."""
    file = _file()
    origin = file.with_suffix(".json")
    if not (file.is_file() and origin.is_file()):
        return None
    return file if json.loads(origin.read_text()) == _origin() else None


@cache
def _origin() -> dict[str, str]:
    """What rows are made from: digests of the load and of the code."""
    digest = hashlib.sha256()
    for name in (contexts.FILE, "model.zip"):
        digest.update((stage.LOAD / name).read_bytes())
    return {"load": digest.hexdigest()[:16], "code": stage.code_digest()}


def _keep(made: Tensor) -> str:
    """Write the rows for the next stage; returns where, or why not."""
    file = _file()
    file.parent.mkdir(parents=True, exist_ok=True)
    for old in (file.with_suffix(".json"), file):
        old.unlink(missing_ok=True)
    if shutil.disk_usage(file.parent).free < _SPARE * made.numel() * made.element_size():
        return "not kept: too little room"
    partial = file.with_suffix(".partial")
    with partial.open("wb") as out:
        np.save(out, made.cpu().numpy())
    partial.replace(file)
    file.with_suffix(".json").write_text(json.dumps(_origin()))
    return "kept"


def main() -> None:
    results = stage.Results("harvest")
    device = stage.device()

    def harvested() -> dict[str, Any]:
        made, about = _made(device, stage.seconds(60) - _END_SECONDS)
        start = time.monotonic()
        return about | {"kept": _keep(made), "keep_seconds": time.monotonic() - start}

    if results.attempt("harvest", harvested) is None:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
