"""The memory that work is said to need, against what it is known to hold."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from saesub.reproduce.peak_memory import peak_memory_of

MB = 2**20


def _hold(*sizes: int) -> None:
    kept = [torch.ones(size * MB // 4) for size in sizes]
    time.sleep(0.5)  # many samples, on a loaded machine too
    assert len(kept) == len(sizes)


def _peaks() -> list[int]:
    work = [lambda: _hold(300, 100), lambda: (_hold(150), _hold(200)), lambda: _hold(*[1] * 100)]
    _hold(*[1] * 100)  # blocks small enough to be kept by the allocator
    return [peak_memory_of(one) for one in work]


def test_it_is_what_the_work_holds_at_once_and_memory_freed_before_does_not_hide_it():
    """In a process of its own: what other tests left would be given back meanwhile."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peaks = pool.submit(_peaks).result()
    for peak, held in zip(peaks, (400 * MB, 200 * MB, 100 * MB), strict=True):
        assert 0.9 * held < peak < held + 50 * MB, "not less, and no sum of what is held in turn"


def test_an_error_of_the_work_is_raised():
    with pytest.raises(ZeroDivisionError):
        peak_memory_of(lambda: 1 / 0)
