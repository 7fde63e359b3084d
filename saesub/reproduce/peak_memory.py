"""Measures the memory that a piece of work needs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import psutil
import torch


def peak_memory_of(work: Callable[[], object]) -> int:
    """The most bytes held during `work` beyond those held before it: of a GPU's memory if this
    process uses one, else of the machine's, sampled every two milliseconds."""
    gc.collect()
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    # What glibc's allocator keeps of freed memory would hide as much of the work's.
    if trim := getattr(ctypes.pythonapi, "malloc_trim", None):
        trim(0)
    memory, over = psutil.Process().memory_info, Event()
    before = memory().rss
    with ThreadPoolExecutor(1) as pool:
        samples = iter(lambda: over.wait(0.002), True)
        peak = pool.submit(lambda: max((memory().rss for _ in samples), default=before))
        try:
            work()
        finally:
            over.set()
    return max(peak.result() - before, 0)
