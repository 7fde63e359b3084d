"""One pass of a model gives each of several results the rows that it lacks.

Results of some hook points may be longer than those of others. The pass begins where the shortest
stops, and the others join when it comes to their end. So no token passes the model again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from saesub.activations.checks import differing
from saesub.activations.forward_pass import ModelPass
from saesub.activations.store import ActivationStore
from saesub.activations.store_file import (
    ReadSoFar,
    Record,
    StoreWriter,
    held,
    lock_of,
    refuse_another_version,
    with_part,
)
from saesub.errors import SaesubError
from saesub.loading.download import require_disk


class Growing(Protocol):
    """A result that grows: `n_rows` rows that `n_contexts` whole contexts gave, the latter as of
    the last `keep`."""

    n_rows: int
    n_contexts: int

    def write(self, x: Tensor) -> None:
        """Add the rows that follow."""
        ...

    def keep(self, read: ReadSoFar) -> None:
        """Make the rows so far survive this process."""
        ...

    def missing_bytes(self, n_tokens: int) -> int:
        """Room on the disk that the result of so many tokens needs yet, 0 while it has no row."""
        ...


def grow(run: ModelPass, results: Mapping[str, Growing], folder: Path) -> None:
    """Give the results, by hook point, their rows up to the end of the context that holds the last
    of `run.n_tokens`.

    Raises SaesubError for too little disk, and what the pass and the results raise.
    """
    points, run.whole_contexts = run.points, True
    first = min(result.n_contexts for result in results.values())
    before, checked = 0, False

    def listen(n_contexts: int) -> None:
        end = n_contexts + run.batch_size
        run.points = {name: points[name] for name, r in results.items() if r.n_contexts < end}

    def receive(name: str, x: Tensor) -> None:
        missing = x[max(0, results[name].n_rows - before) :]
        if len(missing):
            results[name].write(missing)

    def after(n_contexts: int, n_rows: int, due: bool) -> None:
        nonlocal before, checked
        before = n_rows
        listen(n_contexts)
        if n_contexts > first and not checked:
            checked = True
            wanted = sum(r.missing_bytes(run.n_tokens) for r in results.values())
            require_disk(folder, wanted, "what this pass writes")
        if due:
            read = run.read_so_far()
            for result in results.values():
                if n_contexts > result.n_contexts:
                    result.keep(read)

    listen(first)
    try:
        run.run(receive, after, first)
    finally:
        run.points = points


def grown_stores(
    run: ModelPass, folder: Path, settings: dict[str, str], dtype: torch.dtype
) -> dict[str, ActivationStore]:
    """Stores of the first `run.n_tokens` rows at the run's hook points; what is not in the folder
    is written there first.

    Raises SaesubError for a store of other settings or another text, and OSError.
    """
    if (stores := _stores(run, folder, settings)) is None:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_of(folder):
            _write_missing(run, folder, settings, dtype)
            stores = _stores(run, folder, settings)
    if stores is None:
        raise SaesubError(f"what was written to {folder} is not there: check the disk")
    # All were found to be of the same; names, and documents read ahead, are those of this call.
    first = next(iter(stores.values())).settings
    about = settings | {key: first[key] for key in ("n_tokens", "documents", "text")}
    return {name: replace(store, settings=about) for name, store in stores.items()}


def _stores(
    run: ModelPass, folder: Path, settings: dict[str, str]
) -> dict[str, ActivationStore] | None:
    """The stores of as many rows as the run asks for, or None if one is too short."""
    records = {name: _held(run, folder, name, settings) for name in run.points}
    whole = {n: r for n, r in records.items() if r is not None and r.n_rows >= run.n_tokens}
    if len(whole) < len(records):
        return None
    if new := [n for n, r in whole.items() if str(run.n_tokens) not in r.parts]:
        for _ in run.batches(lambda *_: None, sys.maxsize):  # reads the text alone
            pass
        read = run.read_so_far()
        whole |= {name: with_part(folder, name, run.n_tokens, read) for name in new}
    opened = ActivationStore.of_record
    return {name: opened(folder, name, record, run.n_tokens) for name, record in whole.items()}


def _held(run: ModelPass, folder: Path, name: str, settings: dict[str, str]) -> Record | None:
    """The record of a store of these settings and this text, or None if there is none or it is
    damaged.

    Raises SaesubError if a store of others is in the way.
    """
    refuse_another_version(folder, name)
    try:
        record = held(folder, name)
    except SaesubError:
        return None
    if not record.parts and record.settings.get("hooks") != "none":  # no other call can continue it
        return None
    kept, wanted = record.settings | record.text, settings | dict(run.same_text(record.text))
    if not (other := differing(kept, wanted)):
        return record
    if record.parts:
        raise SaesubError(
            f"{folder} already holds a store of {name} that differs in {other}: pass another "
            "folder, or delete that store"
        )
    raise SaesubError(
        f"{folder} holds an interrupted store of {name} that differs in {other}: continue that "
        f"one, pass another folder, or delete {name}.json"
    )


def _write_missing(
    run: ModelPass, folder: Path, settings: dict[str, str], dtype: torch.dtype
) -> None:
    """Lengthen the stores that are too short. Whoever held the lock before may have done so."""
    records = {name: _held(run, folder, name, settings) for name in run.points}
    short = {n: r for n, r in records.items() if r is None or r.n_rows < run.n_tokens}
    if not short:
        return
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(StoreWriter(folder, name, dtype, settings, record))
            for name, record in short.items()
        }
        grow(run, writers, folder)
        for writer in writers.values():
            writer.finish(run.n_tokens, run.read_so_far())
