"""Saved SAEs, found in a folder, and activations in a file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saesub.arguments import batch_of
from saesub.errors import SaesubError

_OF_RUN = ("lr", "training_tokens")
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError, SafetensorError)


def find_saes(path: str | Path) -> dict[str, Path]:
    """The SAELens SAEs in a folder: it itself, or all below it, by their paths from there.

    Raises SaesubError if there is none.
    """
    top = Path(path)
    found = sorted(config.parent for config in top.rglob(SAE_CFG_FILENAME))
    if not found:
        raise SaesubError(
            f"{top} holds no SAE of SAELens ({SAE_CFG_FILENAME} and weights): give the folder that "
            "save_model or save_inference_model wrote, or one above several of them"
        )
    return {str(folder.relative_to(top)) if folder != top else top.name: folder for folder in found}


def load_sae(folder: str | Path) -> SAE[Any]:
    """A saved SAE, in the form in which it was saved, on the CPU.

    The learning rate and the tokens of a SAELens run, whose settings are beside it, go into its
    metadata. Raises SaesubError for files that SAELens cannot read.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / SAE_CFG_FILENAME).read_text(encoding="utf-8"))
        form = TrainingSAE if "decoder_init_norm" in config else SAE
        sae: SAE[Any] = form.load_from_disk(folder, device="cpu")
        run = folder / RUNNER_CFG_FILENAME
        settings = json.loads(run.read_text(encoding="utf-8")) if run.exists() else {}
    except (*_UNREADABLE, KeyError, TypeError, AttributeError) as error:
        raise SaesubError(
            f"SAELens cannot load the SAE in {folder} ({type(error).__name__}: {error}): save it "
            "again with save_model or save_inference_model"
        ) from error
    for name in _OF_RUN:
        if name in settings:
            sae.cfg.metadata[name] = settings[name]
    return sae


def load_activations(path: str | Path) -> Tensor:
    """Activations (n, d_in) from a .npy, .pt or .safetensors file with one array.

    Raises SaesubError for another ending, a file that cannot be read, or several arrays.
    """
    path = Path(path)
    readers = {
        ".npy": lambda: np.load(path, allow_pickle=False),
        ".pt": lambda: torch.load(path, map_location="cpu", weights_only=True),
        ".safetensors": lambda: load_file(path),
    }
    if path.suffix not in readers:
        raise SaesubError(f"{path} is of no kind known here: give a {', '.join(readers)} file")
    try:
        found = readers[path.suffix]()
    except _UNREADABLE as error:
        raise SaesubError(
            f"{path} cannot be read ({type(error).__name__}: {error}): write it again, as one "
            "tensor (n, d_in)"
        ) from error
    if isinstance(found, dict):
        if len(found) != 1:
            raise SaesubError(f"{path} holds {len(found)} arrays: give a file with one, (n, d_in)")
        (found,) = found.values()
    return batch_of(found, "activations")
