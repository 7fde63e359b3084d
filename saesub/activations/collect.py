"""Activations of a language model: batch by batch, as spectra, or in memory-mapped stores.

Special tokens (BOS, the separator between documents, padding) and the first `skip_first` positions
after the BOS are left out everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from saesub.activations.cache import cached_folder
from saesub.activations.checks import require_finite
from saesub.activations.forward_pass import ModelPass, TokenStream
from saesub.activations.growth import grown_stores
from saesub.activations.spectra_cache import cached_spectra
from saesub.activations.spectra_checkpoint import load_totals, save_totals
from saesub.activations.spectrum import Spectrum, SpectrumAccumulator
from saesub.activations.store import ActivationStore
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
    cache: bool = False,
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
        cache: use the totals in the cache, and keep those that are missing there: a pass begins
            where the longest of at most `n_tokens` tokens ends. Such a spectrum is that of one
            pass but for rounding, and where massive activations are judged in another block.
        keep_massive: count also tokens more than 20 times as far from the mean of their batch as
            its median token: massive activations, which by default are left out at the hook points
            where they are found, counted in the spectrum's metadata, and warned of where they are
            more than one token in a thousand.
        **stream: context_size, batch_size, skip_first and progress, see `TokenStream`.

    Raises:
        SaesubError: as `stream_activations`, and for a checkpoint that is damaged, of another
            model, text or settings, or cannot be written; for a cache together with a checkpoint
            or a share, or of a model with hooks.
    """
    if cache and (checkpoint is not None or share != (0, 1)):
        raise SaesubError(
            "the cache holds spectra of whole passes, and is a checkpoint itself: leave out "
            "cache=True, or the checkpoint and the share"
        )
    run = ModelPass(model, corpus, hook_names, n_tokens=n_tokens, share=share, **stream)
    if cache:
        return cached_spectra(run, keep_massive=keep_massive)
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

        def after(n_contexts: int, _: int, due: bool) -> None:
            if due:
                save_totals(path, totals, n_contexts, settings | run.text_read())

        run.run(receive, after, first)
    record = {**run.source, "epochs": f"{run.contexts.epochs:.3g}"}
    return {name: total.finish({"hook_name": name, **record}) for name, total in totals.items()}


def measure_spectrum(
    model: Model,
    corpus: Corpus,
    hook_name: str,
    *,
    n_tokens: int,
    checkpoint: str | Path | None = None,
    cache: bool = False,
    keep_massive: bool = False,
    **stream: Unpack[TokenStream],
) -> Spectrum:
    """`measure_spectra` at one hook point."""
    if not isinstance(hook_name, str):
        raise SaesubError(
            f"measure_spectrum takes the name of one hook point, not {hook_name!r}: call "
            "measure_spectra for several"
        )
    kept = {"checkpoint": checkpoint, "cache": cache, "keep_massive": keep_massive}
    return measure_spectra(model, corpus, [hook_name], n_tokens=n_tokens, **kept, **stream)[
        hook_name
    ]


def harvest(
    model: Model,
    corpus: Corpus,
    hook_names: Sequence[str],
    folder: str | Path | None = None,
    *,
    n_tokens: int,
    dtype: torch.dtype = torch.float16,
    **stream: Unpack[TokenStream],
) -> dict[str, ActivationStore]:
    """Activations of the first `n_tokens` tokens at several hook points, on the disk.

    What is there of the same model, text and settings is used: of a longer store its first rows,
    and a shorter one grows from where it ends, so that a token passes the model once. All weights
    and all documents that are read count; a damaged store is written again; a store that was made
    while the model had hooks is never used again. Make an interrupted call again, with the same
    hook points or others, and each continues from the last minute that was kept of it. Processes
    that harvest the same wait for one another.

    Rows of a store that grew are those of one harvested at once, but for rounding where a batch was
    cut, or where the model ran within the bridge before and now runs without it: a float16 number
    may differ by its last bit.

    Args:
        folder: where `<hook>.bin` and `<hook>.json` are; without it, in the one cache for all
            (`saesub cache` lists it, and `saesub cache --clear` empties it), under a key of the
            model, the whole corpus, the settings and the versions of saesub and the libraries.
        dtype: torch.float16 or torch.float32, of the numbers on disk. docs/speed.md has what
            float16 changes in spectra and SAEs, as measured.
        **stream: context_size, batch_size, skip_first and progress, see `TokenStream`.

    Raises:
        SaesubError: as `stream_activations`, and for a store of other settings in the folder, a
            model with hooks where no folder is given, a full or read-only disk, or values beyond
            the range of `dtype`.
    """
    run = ModelPass(model, corpus, hook_names, n_tokens=n_tokens, **stream)
    settings = run.settings() | {"dtype": str(dtype).removeprefix("torch.")}
    del settings["n_tokens"]
    if folder is None:
        place = cached_folder("activations", settings, run.whole_text())
    else:
        place = Path(folder)
    try:
        return grown_stores(run, place, settings, dtype)
    except OSError as error:
        raise SaesubError(
            f"{place} cannot be written ({error.strerror or error}): make room and make the "
            "same call again, which continues from what is kept there, or pass another folder"
        ) from error
