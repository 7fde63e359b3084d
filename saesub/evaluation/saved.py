"""`saesub diagnose`: the saved SAEs in a folder, and the activations that each of them reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saesub.activations.collect import harvest
from saesub.activations.store import ActivationStore
from saesub.arguments import batch_of, whole_number
from saesub.errors import SaesubError
from saesub.evaluation.diagnosis import SAEDiagnosis, diagnose
from saesub.evaluation.passes import check_folded
from saesub.loading.corpora import load_corpus

Found = TypeVar("Found")

_TOKENS = 100_000  # where the user names no window
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
) -> tuple[dict[str, SAEDiagnosis], list[SaesubError]]:
    """The diagnosis of each SAE in a folder, by its path there, over one window; and why others
    have none.

    SAEs are loaded one after the other. Activations are those of a file, or of the model and hook
    point that are named, or else that the SAE's metadata name. Then the text is read from its last
    document back, since a training run begins at the first.

    Raises SaesubError for both a file and a model or hook point, and as `find_saes`,
    `load_activations` and `harvest`.
    """
    folders = find_saes(path)
    if n_tokens is not None:
        n_tokens = whole_number(n_tokens, "the number of tokens")
    refused: list[SaesubError] = []
    if file is not None:
        if model or hook_name:
            raise SaesubError(
                "activations come from a file: leave out the model and the hook point"
            )
        activations: dict[str, Any] = dict.fromkeys(folders, load_activations(file))
    else:
        n_tokens = n_tokens or _TOKENS
        sources = _of_each(folders, lambda _, sae: _source(sae, model, hook_name), refused)
        stores = _harvested(sources.values(), corpus, n_tokens)
        activations = {at: stores[source] for at, source in sources.items()}
    left = {at: of for at, of in folders.items() if at in activations}
    reports = _of_each(
        left, lambda at, sae: diagnose(sae, activations[at], n_tokens=n_tokens), refused
    )
    return reports, refused


def _of_each(
    folders: dict[str, Path], find: Callable[[str, SAE[Any]], Found], refused: list[SaesubError]
) -> dict[str, Found]:
    """What is found of each SAE; why it is refused goes into `refused`."""
    found = {}
    for at, of in folders.items():
        try:
            found[at] = find(at, load_sae(of))
        except SaesubError as error:
            refused.append(SaesubError(f"{at}: {error}"))
    return found


def _source(sae: SAE[Any], model: str | None, hook_name: str | None) -> tuple[str, str]:
    """The model and the hook point of an SAE that can be judged there."""
    check_folded(sae)
    model = model or sae.cfg.metadata.model_name
    hook_name = hook_name or sae.cfg.metadata.hook_name
    if not (model and hook_name):
        missing = ["--model"] * (not model) + ["--hook"] * (not hook_name)
        raise SaesubError(
            "the SAE does not say which activations it reads: pass "
            f"{' and '.join(missing)}, or --activations"
        )
    return model, hook_name


def _harvested(
    sources: Iterable[tuple[str, str]], corpus: str, n_tokens: int
) -> dict[tuple[str, str], ActivationStore]:
    """The activations of each model and hook point, in one pass for each model."""
    hooks: dict[str, list[str]] = {}
    for name, hook in sorted(set(sources)):
        hooks.setdefault(name, []).append(hook)
    if not hooks:
        return {}
    text = load_corpus(corpus)
    text = text.select(range(len(text) - 1, -1, -1))
    return {
        (name, hook): store
        for name, of in hooks.items()
        for hook, store in harvest(name, text, of, n_tokens=n_tokens).items()
    }


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
