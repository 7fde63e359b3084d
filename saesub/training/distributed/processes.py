"""The processes of a torchrun job, and how they exchange tensors and values."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store  # pyright: ignore
from torch.distributed.rendezvous import rendezvous

from saesub.errors import SaesubError

_GRACE_S = 5.0  # in which every live process says so


@dataclass(frozen=True)
class Processes:
    """This process, number `index` of the `count` processes of a job; made by `join`.

    Every method but `share` is collective: all processes call it, in the same order. If one has
    died, or does not answer within the time that `join` was given, the others raise SaesubError.
    """

    index: int
    count: int
    store: Store = field(repr=False)

    def share(self, n: int) -> range:
        """This process's part of 0..n - 1, as `torch.chunk` would cut it; it may be empty."""
        size = -(-n // self.count)
        return range(min(n, self.index * size), min(n, (self.index + 1) * size))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` with the sum over processes, the same bits on all of them."""
        with self.answering():
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, in order; all of one shape."""
        tensor = tensor.contiguous()
        gathered = [torch.empty_like(tensor) for _ in range(self.count)]
        with self.answering():
            dist.all_gather(gathered, tensor)
        return gathered

    def gather_rows(self, rows: Float[Tensor, "n_here d"]) -> Float[Tensor, "n d"]:
        """The rows of all processes, in order; a process may have none."""
        sizes = self._sizes(rows)
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = zip(self.gather(padded), sizes, strict=True)
        return torch.cat([part[:size] for part, size in parts])

    def rows_at_first(self, rows: Tensor) -> Tensor | None:
        """The rows of all processes, in order, in the memory of the first; None elsewhere."""
        sizes = self._sizes(rows)
        here = rows.detach().cpu().contiguous()
        with self.answering():
            if self.index:
                dist.send(here, dst=0)
                return None
            whole = here.new_empty(sum(sizes), *here.shape[1:])
            whole[: sizes[0]] = here
            for source, part in enumerate(whole.split(sizes)[1:], start=1):
                dist.recv(part, src=source)
        return whole

    def _sizes(self, rows: Tensor) -> list[int]:
        return [int(n) for n in self.gather(torch.tensor([len(rows)]))]

    def objects(self, value: Any) -> list[Any]:
        """The small Python values of all processes, in order."""
        values: list[Any] = [None] * self.count
        with self.answering():
            dist.all_gather_object(values, value)
        return values

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite `tensor` with that of process `source`."""
        with self.answering():
            dist.broadcast(tensor, source)
        return tensor

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum_(torch.zeros(1))

    def check_same(self, what: str, value: Any) -> None:
        """Raises SaesubError on all processes unless all have an equal `value`. Of dicts the
        message shows the entries that differ."""
        first, *others = self.objects(value)
        for index, other in enumerate(others, start=1):
            if other == first:
                continue
            if isinstance(value, dict):
                keys = sorted(k for k in first | other if first.get(k) != other.get(k))
                first, other = ({k: v.get(k) for k in keys} for v in (first, other))
            raise SaesubError(
                f"Process {index} has another {what} than process 0 ({other} instead of {first}): "
                "give all processes the same."
            )

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around torch's collectives: what they raise for a lost process becomes a SaesubError."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # gloo's for a connection closed or timed out
            message = self.report_loss() or (
                f"The processes lost touch ({error}): run the same command again, and it continues "
                "from its last checkpoint."
            )
            raise SaesubError(message) from error

    def report_loss(self) -> str:
        """Which processes are gone and what to do, or "" if none is. Leaves the job.

        Without torchrun the store is in the first process, which waits twice as long for late
        ones; one that is later still can name no process.
        """
        wait = _GRACE_S if self.index else 2 * _GRACE_S
        with _on_sigterm(signal.SIG_IGN):
            try:
                self.store.set(f"here/{self.index}", "")
                if dist.is_initialized():
                    dist.destroy_process_group()  # wakes those that still wait for this process
                time.sleep(wait)
                lost = [i for i in range(self.count) if not self.store.check([f"here/{i}"])]
            except RuntimeError:
                lost = None
        if lost == []:
            return ""
        if lost is None:
            what = f"One of {self.count} processes, and process 0 with the list of live ones,"
        else:
            what = f"{' and '.join(f'process {i}' for i in lost)} of {self.count}"
        return (
            f"{what} did not answer (seen by process {self.index}): the job ends; run the same "
            "command again and it continues from its last checkpoint."
        )


@contextmanager
def join(timeout_s: float = 600.0) -> Iterator[Processes]:
    """Join the job that torchrun started, until the block ends.

    A process without torchrun's environment variables is a job of its own. With CUDA each process
    takes the GPU of its local rank (torchrun's LOCAL_RANK), and tensors there go over NCCL; all
    else goes over gloo. Where torchrun ends this process because another has died, a SaesubError
    says which.

    Args:
        timeout_s: how long a process is waited for before the job ends.

    Raises:
        SaesubError: the process has joined a job before, the others did not come, there is no GPU
            for this one, or torchrun's environment variables are incomplete.
    """
    if dist.is_initialized():
        raise SaesubError("This process has already joined a job: use what join gave it.")
    timeout = timedelta(seconds=timeout_s)
    backend = "gloo"
    if torch.cuda.is_available():
        _take_gpu(os.environ.get("LOCAL_RANK", "0"))
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, world_size = HashStore(), 0, 1
        if "RANK" in os.environ:
            store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    except ValueError as error:  # rendezvous's for a variable that is missing or no number
        raise SaesubError(
            f"RANK is set, but not all that torchrun sets with it ({error}): start with torchrun, "
            "or unset RANK to be a job of one process."
        ) from error
    except RuntimeError as error:
        raise SaesubError(
            f"The processes did not all join within {timeout_s:.0f} s ({error}): start them with "
            "torchrun, all with the same --nnodes and --rdzv-endpoint."
        ) from error
    processes = Processes(rank, world_size, PrefixStore("saesub", store))

    def end(*_: Any) -> None:
        if lost := processes.report_loss():
            raise SaesubError(lost)
        raise SystemExit(128 + signal.SIGTERM)

    try:
        with _on_sigterm(end):
            yield processes
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _take_gpu(local_rank: str) -> None:
    try:
        torch.cuda.set_device(int(local_rank))
    except (RuntimeError, ValueError) as error:
        raise SaesubError(
            f"There is no GPU for local rank {local_rank} ({error}): start no more processes on a "
            "machine than it has GPUs."
        ) from error


@contextmanager
def _on_sigterm(handler: Any) -> Iterator[None]:
    """torchrun sends SIGTERM to the live processes, maybe before they notice which one died."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
