"""The memory that work is said to need, against what it is known to hold."""

from __future__ import annotations

import time

import pytest
import torch

from saesub.memory import peak_memory_of

MB = 2**20


def _hold(*sizes: int) -> None:
    kept = [torch.ones(size * MB // 4) for size in sizes]
    time.sleep(0.1)
    assert len(kept) == len(sizes)


def test_it_is_what_the_work_holds_at_once():
    assert peak_memory_of(lambda: _hold(150, 50)) == pytest.approx(200 * MB, rel=0.1)
    assert peak_memory_of(lambda: (_hold(50), _hold(60))) == pytest.approx(60 * MB, rel=0.1)


def test_memory_freed_before_does_not_hide_it():
    _hold(*[1] * 100)  # blocks small enough to be kept by the allocator
    assert peak_memory_of(lambda: _hold(*[1] * 100)) == pytest.approx(100 * MB, rel=0.1)


def test_an_error_of_the_work_is_raised():
    with pytest.raises(ZeroDivisionError):
        peak_memory_of(lambda: 1 / 0)
