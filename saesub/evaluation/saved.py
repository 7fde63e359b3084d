"""`saesub diagnose`: the saved SAEs in a folder, and the activations that each of them reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saesub.activations.collect import harvest
from saesub.arguments import batch_of, whole_number
from saesub.errors import SaesubError
from saesub.evaluation.diagnosis import SAEDiagnosis, diagnose
from saesub.evaluation.passes import hook_of

_TOKENS = 100_000  # where the user names no window
_BLOCK = 8192
_OF_RUN = ("lr", "training_tokens")
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, SafetensorError)
_READERS = {
    ".npy": lambda path: np.load(path, allow_pickle=False),
    ".safetensors": load_file,
}


def diagnose_saved(
    path: str | Path,
    *,
    file: str | None = None,
    model: str | None = None,
    corpus: str = "wiki-en",
    hook_name: str | None = None,
    n_tokens: int | None = None,
) -> dict[str, SAEDiagnosis]:
    """The diagnosis of each SAE in a folder, by its path there, over one window.

    SAEs are loaded one after the other. Activations are those of a file, or of the model and hook
    point that are named, or else that the SAE's metadata name.

    Raises SaesubError where an SAE names no model or hook point and none is given, for both a file
    and a model or hook point, and as `find_saes`, `load_sae`, `load_activations`, `harvest` and
    `diagnose`.
    """
    folders = find_saes(path)
    if n_tokens is not None:
        n_tokens = whole_number(n_tokens, "the number of tokens")
    if file is not None:
        if model or hook_name:
            raise SaesubError(
                "activations come from a file: leave out the model and the hook point"
            )
        x = load_activations(file)
        return {at: _diagnosed(at, of, x, n_tokens) for at, of in folders.items()}
    n = n_tokens or _TOKENS
    sources = {at: _source(load_sae(of), at, model, hook_name) for at, of in folders.items()}
    hooks: dict[str, list[str]] = {}
    for name, hook in sorted(set(sources.values())):
        hooks.setdefault(name, []).append(hook)
    stores = {name: harvest(name, corpus, of, n_tokens=n) for name, of in hooks.items()}

    def rows(at: str) -> Iterator[Tensor]:
        name, hook = sources[at]
        return (stores[name][hook].rows(i, min(i + _BLOCK, n)) for i in range(0, n, _BLOCK))

    return {at: _diagnosed(at, of, rows(at), n) for at, of in folders.items()}


def _diagnosed(at: str, folder: Path, x: Any, n_tokens: int | None) -> SAEDiagnosis:
    try:
        return diagnose(load_sae(folder), x, n_tokens=n_tokens)
    except SaesubError as error:
        raise SaesubError(f"{at}: {error}") from error


def _source(sae: SAE[Any], at: str, model: str | None, hook_name: str | None) -> tuple[str, str]:
    """The model and the hook point of an SAE."""
    model = model or sae.cfg.metadata.model_name
    if not model:
        raise SaesubError(f"the SAE {at} does not name its model: pass --model or --activations")
    return model, hook_name or hook_of(sae)


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
    return {str(of.relative_to(top)) if of != top else top.name: of for of in found}


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
    """Activations (n, d_in) from a .npy or .safetensors file with one array.

    Raises SaesubError for another ending, a file that cannot be read, or several arrays.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise SaesubError(f"{path} is of no kind known here: give a {', '.join(_READERS)} file")
    try:
        found = _READERS[path.suffix](path)
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
