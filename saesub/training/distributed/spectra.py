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
from saesub.training.distributed.processes import Ranks


def measure_spectra(
    ranks: Ranks,
    model: Model,
    corpus: Corpus,
    hook_names: Sequence[str],
    *,
    n_tokens: int,
    checkpoint: str | Path | None = None,
    **stream: Unpack[TokenStream],
) -> dict[str, Spectrum]:
    """`saesub.measure_spectra`, its batches dealt out to the ranks; the result is on all of them.

    Every rank reads and tokenises the whole corpus, the model being by far the slower, so the
    contexts are those of one process and the spectra equal its own up to rounding. Where each rank
    has only documents of its own, measure these and use `merge_spectra`. Every rank keeps a
    `checkpoint` of its own, with its number added to the name. Raises what `saesub.measure_spectra`
    raises.
    """
    if checkpoint is not None:
        checkpoint = f"{checkpoint}.{ranks.rank}-of-{ranks.world}"
    stream["progress"] = stream.get("progress", True) and ranks.rank == 0
    share = (ranks.rank, ranks.world)
    own = collect.measure_spectra(
        model, corpus, hook_names, n_tokens=n_tokens, share=share, checkpoint=checkpoint, **stream
    )
    return merge_spectra(ranks, own)


def merge_spectra(ranks: Ranks, spectra: dict[str, Spectrum]) -> dict[str, Spectrum]:
    """The spectra of all ranks' samples together, exactly, on every rank.

    Args:
        spectra: this rank's, by hook point; {} if it saw no token there.

    Raises:
        SaesubError: nobody measured anything, or spectra of different widths, models or hooks.
    """
    names = dict.fromkeys(name for names in ranks.objects(list(spectra)) for name in names)
    if not names:
        raise SaesubError("No rank measured a token: give at least one of them documents.")
    return {name: _merge(ranks, spectra.get(name)) for name in names}


def _merge(ranks: Ranks, own: Spectrum | None) -> Spectrum:
    """In order of rank, one after another: at most two spectra beside the own in memory."""
    mine = None if own is None else (own.n_tokens, own.d, own.mean_norm, own.metadata)
    merged: Spectrum | None = None
    for source, described in enumerate(ranks.objects(mine)):
        if described is None:
            continue
        n_tokens, d, mean_norm, metadata = described
        if own is not None and source == ranks.rank:
            mean, covariance = own.mean.clone(), own.covariance.clone()
        else:
            mean, covariance = (torch.empty(*s, dtype=torch.float64) for s in ((d,), (d, d)))
        ranks.broadcast_(mean, source)
        ranks.broadcast_(covariance, source)
        part = Spectrum(n_tokens, mean, covariance, mean_norm, metadata)
        merged = part if merged is None else merged + part
    assert merged is not None  # `merge_spectra` takes names that some rank has
    return merged
