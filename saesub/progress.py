"""Progress bars with rate and time left, and the environment of a process without them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from tqdm.auto import tqdm

_EVERY = 0.5  # seconds
QUIET = {
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""Hides the bars of saesub, transformers and datasets in a process with this environment.

tqdm itself obeys its variable in a terminal, but not in a notebook."""


def bar(iterable: Any = None, *, progress: bool, **settings: Any) -> tqdm:
    """tqdm's bar; hidden where `progress` is false or the environment says `TQDM_DISABLE`."""
    hidden = not progress or "TQDM_DISABLE" in os.environ
    return tqdm(iterable, disable=hidden, **settings)


@contextmanager
def following(shown: tqdm, folder: Path, most: int) -> Iterator[None]:
    """Within, the bar counts what another process writes under `folder`, up to `most` bytes."""
    start, before, done = shown.n, _bytes_under(folder), Event()

    def follow() -> None:
        while not done.wait(_EVERY):
            arrived = start + _bytes_under(folder) - before
            shown.update(max(0, min(arrived, most) - shown.n))

    if shown.disable:
        yield
        return
    follower = Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _bytes_under(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # moved away meanwhile
                total += os.stat(os.path.join(place, name)).st_size
    return total
