"""Activations of a language model: to statistics, to memory-mapped stores, or batch by batch.

Left out everywhere: special tokens (BOS, the separator between documents, padding) and the first
`skip_first` positions after the BOS, whose massive activations would dominate a covariance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from datasets import Dataset
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.finite import require_finite
from saesub.activations.forward_pass import KeepClock, ModelPass, hook_points, make_pass
from saesub.activations.spectra_checkpoint import SpectraState
from saesub.activations.spectrum import Spectrum
from saesub.activations.store import ActivationStore, StoreWriter, open_or_none, unfinished
from saesub.activations.tokens import pack_contexts
from saesub.errors import SaesubError
from saesub.loading.corpora import Corpus
from saesub.loading.models import Model

_DOCUMENTS_IN_FINGERPRINT = 1000

__all__ = [
    "ActivationStore",
    "harvest",
    "hook_points",
    "measure_spectra",
    "measure_spectrum",
    "pack_contexts",
    "stream_activations",
]


def stream_activations(
    model: Model,
    corpus: Corpus,
    hook_names: Sequence[str],
    *,
    n_tokens: int,
    context_size: int = 256,
    batch_size: int = 16,
    skip_first: int = 1,
    progress: bool = True,
) -> Iterator[dict[str, Float[Tensor, "n d"]]]:
    """Activations at several hook points, batch by batch, `n_tokens` rows in all.

    Rows of different hook points belong to the same tokens; heads are concatenated (hook_z gives
    heads × d_head columns). Raises SaesubError, at the first step or as met: unknown hook point,
    too short a corpus, too long a context, NaN or infinite activations (which hook, which batch).
    """
    run = make_pass(
        model, corpus, hook_names, n_tokens, context_size, batch_size, skip_first, progress
    )
    rows: dict[str, Tensor] = {}

    def receive(name: str, x: Tensor) -> None:
        require_finite(x)
        rows[name] = x

    for _ in run.batches(receive):
        yield {name: rows[name] for name in run.points}


def measure_spectra(
    model: Model,
    corpus: Corpus,
    hook_names: Sequence[str],
    *,
    n_tokens: int,
    context_size: int = 256,
    batch_size: int = 16,
    skip_first: int = 1,
    progress: bool = True,
    share: tuple[int, int] = (0, 1),
    checkpoint: str | Path | None = None,
) -> dict[str, Spectrum]:
    """Mean and covariance at several hook points from one pass; no activations are stored.

    Each batch is reduced inside the hook, so the memory is one (d, d) float64 matrix for each
    hook point. With a `share` (i, n) only every n-th batch is measured, from batch i on: the
    spectra of the n shares add up to that of the pass, and a share without a batch is {}.

    With a `checkpoint`, a file that is written every minute, an interrupted call goes on from there
    when it is made again, to the same bits, and a finished one returns at once.

    Raises what `stream_activations` raises, and SaesubError for a checkpoint that is damaged, of
    other settings, or cannot be written.
    """
    run = make_pass(
        model, corpus, hook_names, n_tokens, context_size, batch_size, skip_first, progress
    )
    run.share = share
    described = {**run.describe(), "corpus": _corpus_name(corpus)}
    state = SpectraState(None if checkpoint is None else Path(checkpoint))
    if checkpoint is not None:
        state.load({**described, **_identity(run), "batch_size": str(batch_size)})
    clock, first = KeepClock(), state.n_batches
    for batch, _ in enumerate(run.batches(state.receive, first)):
        state.n_batches = max(batch + 1, first)
        if batch >= first and clock.is_due():
            state.save()
    if state.n_batches > first:  # else a finished one was read, perhaps from a read-only folder
        state.save()
    record = {**described, "epochs": f"{run.contexts.epochs:.3g}"}
    return {
        name: total.finish({"hook_name": name, **record}) for name, total in state.totals.items()
    }


def measure_spectrum(
    model: Model,
    corpus: Corpus,
    hook_name: str,
    *,
    n_tokens: int,
    context_size: int = 256,
    batch_size: int = 16,
    skip_first: int = 1,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Spectrum:
    """`measure_spectra` at one hook point."""
    return measure_spectra(
        model,
        corpus,
        [hook_name],
        n_tokens=n_tokens,
        context_size=context_size,
        batch_size=batch_size,
        skip_first=skip_first,
        progress=progress,
        checkpoint=checkpoint,
    )[hook_name]


def harvest(
    model: Model,
    corpus: Corpus,
    hook_names: Sequence[str],
    folder: str | Path,
    *,
    n_tokens: int,
    context_size: int = 256,
    batch_size: int = 16,
    skip_first: int = 1,
    progress: bool = True,
    dtype: torch.dtype = torch.float16,
) -> dict[str, ActivationStore]:
    """Activations at several hook points, written from one pass to `<folder>/<hook>.bin`.

    A finished store of the same model, text and settings is reused; a damaged one is written again;
    an interrupted one is gone on with from its last whole minute. Processes that harvest to one
    folder wait for one another. Raises what `stream_activations` raises, and SaesubError for a
    store of other settings in the folder, a full or read-only disk, or values beyond the range of
    `dtype`.
    """
    run = make_pass(
        model, corpus, hook_names, n_tokens, context_size, batch_size, skip_first, progress
    )
    settings = {
        **run.describe(),
        "corpus": _corpus_name(corpus),
        "n_tokens": str(n_tokens),
        "dtype": str(dtype).removeprefix("torch."),
        "content": _content(run.model, run.contexts.corpus),
    }
    names, place = list(run.points), Path(folder)
    if any(open_or_none(place, name, settings) is None for name in names):
        try:
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(place / ".lock"):
                _write_missing(run, place, settings, batch_size, dtype)
        except OSError as error:
            raise SaesubError(
                f"{place} cannot be written ({error.strerror or error}): make room and make the "
                "same call again, which goes on from what is kept there, or pass another folder"
            ) from error
    return {name: ActivationStore.open(place, name) for name in names}


def _write_missing(
    run: ModelPass, folder: Path, settings: dict[str, str], batch_size: int, dtype: torch.dtype
) -> None:
    """Stores at those of the run's hook points that have none."""
    run.points = {
        name: point
        for name, point in run.points.items()
        if open_or_none(folder, name, settings) is None
    }
    steps = settings | {"batch_size": str(batch_size)}
    left = [unfinished(folder, name, steps) for name in run.points]
    first, n_kept = min(left, default=(0, 0))
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(StoreWriter(folder, name, run.n_tokens, dtype, n_kept))
            for name in run.points
        }
        clock, n_rows = KeepClock(), 0
        batches = run.batches(lambda name, x: writers[name].write(x), first) if writers else ()
        for batch, rows in enumerate(batches):
            n_rows += rows
            if batch >= first and (clock.is_due() or n_rows == run.n_tokens):
                for writer in writers.values():
                    writer.keep(steps, batch + 1, n_rows)
        for writer in writers.values():
            writer.finish(settings, epochs=run.contexts.epochs)


def _corpus_name(corpus: Corpus) -> str:
    return str(corpus) if isinstance(corpus, (str, Path)) else f"{len(corpus)} live documents"


def _identity(run: ModelPass) -> dict[str, str]:
    """What else decides the rows of a pass and their order."""
    return {
        "hook_names": ", ".join(run.points),
        "n_tokens": str(run.n_tokens),
        "share": f"{run.share[0]} of {run.share[1]}",
        "content": _content(run.model, run.contexts.corpus),
    }


def _content(model: TransformerBridge, corpus: Dataset) -> str:
    """A hash of a sample of the model's weights and of the corpus's documents."""
    digest = hashlib.sha256(str(len(corpus)).encode())
    for parameter in model.original_model.parameters():
        digest.update(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    step = max(1, len(corpus) // _DOCUMENTS_IN_FINGERPRINT)
    for text in corpus.select(range(0, len(corpus), step))["text"]:
        digest.update(text.encode())
    return digest.hexdigest()
