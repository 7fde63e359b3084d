"""Activations of a language model: batch by batch, as spectra, or in memory-mapped stores.

Special tokens (BOS, the separator between documents, padding) and the first `skip_first` positions
after the BOS are left out everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from saesub.activations.checks import require_finite
from saesub.activations.forward_pass import ModelPass, TokenStream
from saesub.activations.spectra_checkpoint import load_totals, save_totals
from saesub.activations.spectrum import Spectrum, SpectrumAccumulator
from saesub.activations.store import ActivationStore, StoreWriter, open_or_none, unfinished
from saesub.errors import SaesubError
from saesub.loading.corpora import Corpus
from saesub.loading.models import Model


def stream_activations(
    model: Model,
    corpus: Corpus,
    hook_names: Sequence[str],
    *,
    n_tokens: int,
    **stream: Unpack[TokenStream],
) -> Iterator[dict[str, Float[Tensor, "n d"]]]:
    """Activations at several hook points, batch by batch, of `n_tokens` tokens in all.

    Row i belongs to the same token at every hook point; heads are concatenated (hook_z gives
    heads × d_head columns). `TokenStream` documents the other keywords: context_size, batch_size,
    skip_first and progress.

    Raises:
        SaesubError: at the first step or as met: unknown hook point, too short a corpus, too long a
            context, NaN or infinite activations (which hook, which batch).
    """
    run = ModelPass(model, corpus, hook_names, n_tokens=n_tokens, **stream)
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
    share: tuple[int, int] = (0, 1),
    checkpoint: str | Path | None = None,
    keep_massive: bool = False,
    **stream: Unpack[TokenStream],
) -> dict[str, Spectrum]:
    """Mean and covariance at several hook points from one pass; no activations are stored.

    Each batch is reduced inside the hook, so the memory is one (d, d) float64 matrix for each
    hook point.

    Args:
        share: with (i, n) only every n-th batch is measured, from batch i on: the spectra of the n
            shares add up to that of the pass, and a share without a batch is {}.
        checkpoint: a file that is written every minute. Make an interrupted call again and it
            continues where it stopped, to the same bits; a finished one returns at once.
        keep_massive: count also tokens more than 20 times as far from the mean of their batch as
            its median token: massive activations, which by default are left out at the hook points
            where they are found, counted in the spectrum's metadata, and warned of where they are
            more than one token in a thousand.
        **stream: context_size, batch_size, skip_first and progress, see `TokenStream`.

    Raises:
        SaesubError: as `stream_activations`, and for a checkpoint that is damaged, of another
            model, text or settings, or cannot be written.
    """
    run = ModelPass(model, corpus, hook_names, n_tokens=n_tokens, share=share, **stream)
    totals: dict[str, SpectrumAccumulator] = {}

    def receive(name: str, x: Tensor) -> None:
        if name not in totals:
            totals[name] = SpectrumAccumulator(x.shape[1], keep_massive=keep_massive)
        totals[name].update(x)

    if checkpoint is None:
        run.run(receive, lambda *_: None)
    else:
        path = Path(checkpoint)
        settings = run.settings() | {
            "hook_names": ", ".join(run.points),
            "share": f"{share[0]} of {share[1]}",
            "batch_size": str(run.batch_size),
            "keep_massive": str(keep_massive),
        }
        kept, first = load_totals(path, settings, run.same_text)
        totals.update(kept)
        run.run(
            receive, lambda n, _: save_totals(path, totals, n, settings | run.text_read()), first
        )
    record = {**run.source, "epochs": f"{run.contexts.epochs:.3g}"}
    return {name: total.finish({"hook_name": name, **record}) for name, total in totals.items()}


def measure_spectrum(
    model: Model,
    corpus: Corpus,
    hook_name: str,
    *,
    n_tokens: int,
    checkpoint: str | Path | None = None,
    keep_massive: bool = False,
    **stream: Unpack[TokenStream],
) -> Spectrum:
    """`measure_spectra` at one hook point."""
    if not isinstance(hook_name, str):
        raise SaesubError(
            f"measure_spectrum takes the name of one hook point, not {hook_name!r}: call "
            "measure_spectra for several"
        )
    kept = {"checkpoint": checkpoint, "keep_massive": keep_massive}
    return measure_spectra(model, corpus, [hook_name], n_tokens=n_tokens, **kept, **stream)[
        hook_name
    ]


def harvest(
    model: Model,
    corpus: Corpus,
    hook_names: Sequence[str],
    folder: str | Path,
    *,
    n_tokens: int,
    dtype: torch.dtype = torch.float16,
    **stream: Unpack[TokenStream],
) -> dict[str, ActivationStore]:
    """Activations at several hook points, written from one pass to `<folder>/<hook>.bin`.

    A finished store of the same model, text and settings is reused, and a damaged one is written
    again. All weights and all documents that are read count; a store that was made while the model
    had hooks is never reused. Make an interrupted call again, with the same hook points or others,
    and each continues from the last minute that was kept of it. Processes that harvest to one
    folder wait for one another.

    Args:
        dtype: torch.float16 or torch.float32, of the numbers on disk. docs/speed.md has what
            float16 changes in spectra and SAEs, as measured.
        **stream: context_size, batch_size, skip_first and progress, see `TokenStream`.

    Raises:
        SaesubError: as `stream_activations`, and for a store of other settings in the folder, a
            full or read-only disk, or values beyond the range of `dtype`.
    """
    run = ModelPass(model, corpus, hook_names, n_tokens=n_tokens, **stream)
    settings = {**run.settings(), "dtype": str(dtype).removeprefix("torch.")}
    names, place = list(run.points), Path(folder)
    if any(open_or_none(place, name, settings, run.same_text) is None for name in names):
        try:
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(place / ".lock"):
                _write_missing(run, place, settings, dtype)
        except OSError as error:
            raise SaesubError(
                f"{place} cannot be written ({error.strerror or error}): make room and make the "
                "same call again, which continues from what is kept there, or pass another folder"
            ) from error
    return {name: ActivationStore.open(place, name) for name in names}


def _write_missing(
    run: ModelPass, folder: Path, settings: dict[str, str], dtype: torch.dtype
) -> None:
    """Write stores of those of the run's hook points that have none."""
    run.points = {
        name: point
        for name, point in run.points.items()
        if open_or_none(folder, name, settings, run.same_text) is None
    }
    if not run.points:
        return
    steps = settings | run.steps()
    # Batches and rows of each that an interrupted call kept; the pass begins after the fewest.
    kept = {name: unfinished(folder, name, steps, run.same_text) for name in run.points}
    first = min(n_batches for n_batches, _ in kept.values())
    seen = dict.fromkeys(run.points, first)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(StoreWriter(folder, name, run.n_tokens, dtype, n_rows))
            for name, (_, n_rows) in kept.items()
        }

        def receive(name: str, x: Tensor) -> None:
            if seen[name] >= kept[name][0]:
                writers[name].write(x)
            seen[name] += 1

        def keep(n_batches: int, n_rows: int) -> None:
            for name, writer in writers.items():
                if n_batches > kept[name][0]:
                    writer.keep(steps | run.text_read(), n_batches, n_rows)

        run.run(receive, keep, first)
        for writer in writers.values():
            writer.finish(settings | run.text_read(), epochs=run.contexts.epochs)
