"""Streams of batches that end in an error at a step, as an interrupted run would."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from saesub.training.comparison import StoreBatches


class StoppedError(Exception):
    """The interruption."""


def stopping(stream: StoreBatches, start: int, stop_at: int | None) -> StoreBatches:
    """The batches of steps `start` to `stop_at`, under the stream's own identity."""

    def until() -> Iterator[dict[str, Tensor]]:
        for step, batch in enumerate(stream, start=start):
            if step == stop_at:
                raise StoppedError
            yield batch

    return StoreBatches(until(), stream.identity)
