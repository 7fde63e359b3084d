"""The memory that some work needs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from threading import Event, Thread

import psutil
import torch

_EVERY_SECONDS = 0.002


def peak_memory_of(work: Callable[[], object]) -> int:
    """The most bytes held during `work`, more than were held before it: of a GPU's memory if this
    process uses one, else of the machine's, looked at every two milliseconds."""
    gc.collect()
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    _give_back_freed()
    return _sampled(work)


def _sampled(work: Callable[[], object]) -> int:
    process, over = psutil.Process(), Event()
    held = [process.memory_info().rss]

    def look() -> None:
        while not over.wait(_EVERY_SECONDS):
            held.append(process.memory_info().rss)

    watcher = Thread(target=look, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        over.set()
        watcher.join()
    return max(held) - held[0]


def _give_back_freed() -> None:
    """What the allocator keeps of freed memory would hide as much of the work's."""
    trim = getattr(ctypes.pythonapi, "malloc_trim", None)  # glibc's
    if trim:
        trim(0)
