"""A training step as a CUDA graph: recorded once, then repeated by one call.

A step on Triton kernels is some 250 operations, and at small widths Python takes longer to launch
them than the GPU to do them. None of them waits for the GPU or depends on a number that is read
from it, so that a recording does the same as the step itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saesub.topk.step import Computed

    # Of the batch, of the features that are dead (or None), and of the learning rate.
    Compute = Callable[[Tensor, Tensor | None, float | Tensor], Computed]
    Recording = tuple[Computed, Callable[[], None]]
    Record = Callable[[Callable[[], Computed], torch.device], Recording]

_STEPS_BEFORE = 3  # that are taken as they are: they compile kernels and make the optimizer's state


class StepGraph:
    """The recording of one trainer's steps, made anew when something that is fixed in it changes.

    Args:
        record: records a function on a device, without running it: gives what it will compute, and
            a function that computes it. None takes a CUDA graph.
    """

    def __init__(self, record: Record | None = None) -> None:
        self._record = record or _cuda_graph
        self._fixed: Any = None
        self._steps = 0
        self._repeat: Callable[[], None] | None = None
        self._given: tuple[Tensor, Tensor | None, Tensor] | None = None
        self._made: Computed | None = None
        self._refused = False

    def run(
        self, compute: Compute, given: tuple[Tensor, Tensor | None, float], fixed: Any
    ) -> Computed:
        """`compute(*given)`, by the recording if there is one.

        `fixed` is what else it depends on: if it differs from the last step's, or the shape of the
        batch does, the recording is dropped. A step that cannot be recorded is taken as it is, and
        so are all later ones, with one warning.
        """
        x, dead, lr = given
        fixed = (fixed, x.shape, x.dtype, dead is None)
        if fixed != self._fixed:
            self._fixed, self._steps = fixed, 0
            self._repeat = self._given = self._made = None
        self._steps += 1
        if self._refused or self._steps <= _STEPS_BEFORE:
            return compute(*given)
        if self._repeat is None:
            self._start(compute, x, dead, lr)
        if self._repeat is None or self._given is None or self._made is None:
            return compute(*given)
        kept_x, kept_dead, kept_lr = self._given
        kept_x.copy_(x)
        kept_lr.fill_(lr)
        if kept_dead is not None and dead is not None:
            kept_dead.copy_(dead)
        self._repeat()
        return _copied(self._made)

    def _start(self, compute: Compute, x: Tensor, dead: Tensor | None, lr: float) -> None:
        given = (
            x.clone(),
            None if dead is None else dead.clone(),
            torch.full_like(x[0, 0], lr, dtype=torch.float64),
        )
        try:
            self._made, self._repeat = self._record(lambda: compute(*given), x.device)
            self._given = given
        except Exception as error:  # a version of torch or of Triton that does not record it
            self._refused = True
            warnings.warn(
                "The training step cannot be recorded as a CUDA graph, so each is launched by "
                f"Python ({type(error).__name__}: {str(error).strip()[-300:]}).",
                stacklevel=2,
            )


def _cuda_graph(compute: Callable[[], Computed], device: torch.device) -> Recording:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        try:
            # Of this device: torch's own is of the first that was used. Other threads may use the
            # GPU meanwhile: a loader of batches, say.
            given: Any = {"stream": torch.cuda.Stream(), "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, **given):
                made = compute()
        finally:
            torch.cuda.set_stream(before)  # a recording that fails leaves its own

    def repeat() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return made, repeat


def _copied(made: Computed) -> Computed:
    """Copies of all tensors, over which the next repetition writes."""
    selected = made.selected
    features, offsets, pre = (
        t.clone() for t in (selected.features, selected.offsets, selected.pre)
    )
    own = replace(selected, features=features, offsets=offsets, pre=pre)
    others = (None if t is None else t.clone() for t in made[1:])
    return type(made)(own, *others)
