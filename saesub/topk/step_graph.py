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

_LAUNCHED_FIRST = 3  # steps before a recording: they compile kernels and make the optimizer's state


class StepGraph:
    """The recording of one trainer's steps.

    Before each new recording twice as many steps are launched one by one as before the last, so
    that what changes often costs little.

    Args:
        record: records a function on a device, without running it: gives what it will compute, and
            a function that computes it. None takes a CUDA graph.
    """

    def __init__(self, record: Record | None = None) -> None:
        self._record = record or _cuda_graph
        self._launch_first = _LAUNCHED_FIRST
        self._seen: Any = None  # the kind of the last step, and how many came in a row
        self._in_a_row = 0
        self._recorded: Any = None  # the kind of step that the recording repeats
        self._repeat: Callable[[], None] | None = None
        self._inputs: tuple[Tensor, Tensor | None, Tensor] | None = None
        self._outputs: Computed | None = None
        self._impossible = False

    def run(
        self, compute: Compute, given: tuple[Tensor, Tensor | None, float], fixed: Any
    ) -> Computed:
        """`compute(*given)`, by the recording if there is one of this kind of step.

        A kind is `fixed`, what else `compute` depends on, and the batch's shape. A recording with
        another `fixed` is dropped; one of another shape is kept, for a shorter batch may be the
        last of an epoch. A step that cannot be recorded is launched as it is, and so are all later
        ones, with one warning.
        """
        x, dead, lr = given
        kind = (fixed, x.shape, x.dtype, dead is None)
        if self._impossible:
            return compute(*given)
        if self._recorded is not None and self._recorded[0] != fixed:
            self._recorded = self._repeat = self._inputs = self._outputs = None
        self._in_a_row = self._in_a_row + 1 if kind == self._seen else 1
        self._seen = kind
        if kind != self._recorded:
            if self._in_a_row <= self._launch_first:
                # From memory like a recording's, so that all kernels are compiled for it.
                return compute(x.clone(), None if dead is None else dead.clone(), lr)
            self._start(compute, given, kind)
        if self._repeat is None or self._inputs is None or self._outputs is None:
            return compute(*given)
        own_x, own_dead, own_lr = self._inputs
        own_x.copy_(x)
        own_lr.fill_(lr)
        if own_dead is not None and dead is not None:
            own_dead.copy_(dead)
        self._repeat()
        return _copied(self._outputs)

    def _start(
        self, compute: Compute, given: tuple[Tensor, Tensor | None, float], kind: Any
    ) -> None:
        x, dead, lr = given
        self._recorded = self._repeat = self._inputs = self._outputs = None
        try:
            own_dead = None if dead is None else dead.clone()
            own = x.clone(), own_dead, torch.full_like(x[0, 0], lr, dtype=torch.float64)
            self._outputs, self._repeat = self._record(lambda: compute(*own), x.device)
        except Exception as error:  # too little memory, or a version of torch or of Triton
            self._impossible = True
            warnings.warn(
                "The training step cannot be recorded as a CUDA graph, so each is launched by "
                f"Python, as fast as without graphs ({type(error).__name__}: "
                f"{str(error).strip()[-300:]}). If memory runs short later, start a new process.",
                stacklevel=2,
            )
            return
        self._inputs, self._recorded = own, kind
        self._launch_first *= 2


def _cuda_graph(compute: Callable[[], Computed], device: torch.device) -> Recording:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        try:
            # Of this device: torch's own is of the first that was used. Other threads may use the
            # GPU meanwhile: a loader of batches, say.
            given: Any = {"stream": torch.cuda.Stream(), "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, **given):
                outputs = compute()
        finally:
            torch.cuda.set_stream(before)  # a recording that fails leaves its own

    def repeat() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return outputs, repeat


def _copied(outputs: Computed) -> Computed:
    """Copies of all tensors, over which the next repetition writes."""
    selected = outputs.selected
    features, offsets, pre = (
        t.clone() for t in (selected.features, selected.offsets, selected.pre)
    )
    own = replace(selected, features=features, offsets=offsets, pre=pre)
    others: Any = (None if t is None else t.clone() for t in outputs[1:])
    return type(outputs)(own, *others)
