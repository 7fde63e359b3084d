"""Spectra measured by several processes together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from typing_extensions import Unpack

from saesub.activations import collect
from saesub.activations.forward_pass import TokenStream
from saesub.activations.spectrum import Spectrum
from saesub.errors import SaesubError
from saesub.loading.corpora import Corpus
from saesub.loading.models import Model
from saesub.training.distributed.processes import Processes


def measure_spectra(
    processes: Processes,
    model: Model,
    corpus: Corpus,
    hook_names: Sequence[str],
    *,
    n_tokens: int,
    checkpoint: str | Path | None = None,
    **stream: Unpack[TokenStream],
) -> dict[str, Spectrum]:
    """`saesub.measure_spectra`, its batches dealt out to the processes; all get the result.

    Every process reads and tokenises the whole corpus, which is fast beside the model. So the
    contexts are those of one process, and the spectra equal its spectra up to rounding. Where each
    process has only documents of its own, measure these and use `merge_spectra`. Every process
    writes a `checkpoint` of its own, with its number added to the name. Raises what
    `saesub.measure_spectra` raises.
    """
    if checkpoint is not None:
        checkpoint = f"{checkpoint}.{processes.index}-of-{processes.count}"
    stream["progress"] = stream.get("progress", True) and processes.index == 0
    share = (processes.index, processes.count)
    own = collect.measure_spectra(
        model, corpus, hook_names, n_tokens=n_tokens, share=share, checkpoint=checkpoint, **stream
    )
    return merge_spectra(processes, own)


def merge_spectra(processes: Processes, spectra: dict[str, Spectrum]) -> dict[str, Spectrum]:
    """The exact spectra of all processes' samples together; every process gets them.

    Args:
        spectra: this process's, by hook point; {} if it saw no token there.

    Raises:
        SaesubError: no process measured a token, or spectra of different widths, models or hooks.
    """
    names = dict.fromkeys(name for names in processes.objects(list(spectra)) for name in names)
    if not names:
        raise SaesubError("No process measured a token: give documents to at least one of them.")
    return {name: _merge(processes, spectra.get(name)) for name in names}


def _merge(processes: Processes, own: Spectrum | None) -> Spectrum:
    """One process's after another's: at most two spectra beside the own in memory."""
    mine = None if own is None else (own.n_tokens, own.d, own.mean_norm, own.metadata)
    merged: Spectrum | None = None
    for source, described in enumerate(processes.objects(mine)):
        if described is None:
            continue
        n_tokens, d, mean_norm, metadata = described
        if own is not None and source == processes.index:
            mean, covariance = own.mean.clone(), own.covariance.clone()
        else:
            mean, covariance = (torch.empty(*s, dtype=torch.float64) for s in ((d,), (d, d)))
        processes.broadcast_(mean, source)
        processes.broadcast_(covariance, source)
        part = Spectrum(n_tokens, mean, covariance, mean_norm, metadata)
        merged = part if merged is None else merged + part
    assert merged is not None  # `merge_spectra` takes names that some process has
    return merged
