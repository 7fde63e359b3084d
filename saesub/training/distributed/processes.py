"""What the ranks of a torchrun job say to one another."""

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

_GRACE_S = 5.0  # in which every rank that lives says so


@dataclass(frozen=True)
class Ranks:
    """One process of a job, number `rank` of `world`; made by `join`.

    Every method but `share` is collective: all ranks call it, in the same order. A rank that has
    died, or does not answer within the time that `join` was given, raises SaesubError in the
    others.
    """

    rank: int
    world: int
    store: Store = field(repr=False)

    def share(self, n: int) -> range:
        """This rank's part of 0..n - 1, as `torch.chunk` would cut it; it may be empty."""
        size = -(-n // self.world)
        return range(min(n, self.rank * size), min(n, (self.rank + 1) * size))

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor`, overwritten with the sum over ranks; bit for bit the same on all of them."""
        with self.answering():
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in order of rank; all of one shape."""
        tensor = tensor.contiguous()
        gathered = [torch.empty_like(tensor) for _ in range(self.world)]
        with self.answering():
            dist.all_gather(gathered, tensor)
        return gathered

    def gather_rows(self, rows: Float[Tensor, "n_here d"]) -> Float[Tensor, "n d"]:
        """The rows of all ranks, in order of rank; a rank may have none."""
        sizes = [int(n) for n in self.gather(torch.tensor([len(rows)]))]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = zip(self.gather(padded), sizes, strict=True)
        return torch.cat([part[:size] for part, size in parts])

    def rows_at_first(self, rows: Tensor) -> Tensor | None:
        """The rows of all ranks, in order of rank, in the memory of rank 0; None elsewhere."""
        sizes = [int(n) for n in self.gather(torch.tensor([len(rows)]))]
        here = rows.detach().cpu().contiguous()
        with self.answering():
            if self.rank:
                dist.send(here, dst=0)
                return None
            whole = here.new_empty(sum(sizes), *here.shape[1:])
            whole[: sizes[0]] = here
            for source, part in enumerate(whole.split(sizes)[1:], start=1):
                dist.recv(part, src=source)
        return whole

    def objects(self, value: Any) -> list[Any]:
        """A small Python value of every rank, in order of rank."""
        values: list[Any] = [None] * self.world
        with self.answering():
            dist.all_gather_object(values, value)
        return values

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """`tensor`, overwritten with that of rank `source`."""
        with self.answering():
            dist.broadcast(tensor, source)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum_(torch.zeros(1))

    def check_same(self, what: str, value: Any) -> None:
        """Raises SaesubError on every rank unless all have an equal `value`; a dict's keys are
        named where they differ."""
        values = self.objects(value)
        for rank, other in enumerate(values):
            if other == values[0]:
                continue
            first = values[0]
            if isinstance(value, dict):
                keys = sorted(k for k in first | other if first.get(k) != other.get(k))
                first, other = ({k: v.get(k) for k in keys} for v in (first, other))
            raise SaesubError(
                f"Rank {rank} has another {what} than rank 0 ({other} instead of {first}): give "
                "all ranks the same."
            )

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around a collective of torch's: what it raises for a lost rank becomes a SaesubError."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # gloo's for a connection closed or timed out
            raise SaesubError(self.report_loss() or f"The ranks lost touch: {error}") from error

    def report_loss(self) -> str:
        """Which ranks are gone and what to do, "" if none is; this rank's last word to the job.

        Without torchrun the store lives in rank 0, which stays twice as long, for those that are
        late; one that is later still can name nobody.
        """
        stay = _GRACE_S if self.rank else 2 * _GRACE_S
        with _deaf_to_sigterm():
            try:
                self.store.set(f"here/{self.rank}", "")
                if dist.is_initialized():
                    dist.destroy_process_group()  # those who still wait for this rank wake up
                time.sleep(stay)
                lost = [r for r in range(self.world) if not self.store.check([f"here/{r}"])]
            except RuntimeError:
                lost = None
        if lost == []:
            return ""
        if lost is None:
            what = f"One of {self.world} ranks, and rank 0 with the list of those that live,"
        else:
            what = f"{' and '.join(f'rank {r}' for r in lost)} of {self.world}"
        return (
            f"{what} did not answer (seen by rank {self.rank}): the job ends; run the same command "
            "again, and it goes on from its last checkpoint."
        )


@contextmanager
def join(timeout_s: float = 600.0) -> Iterator[Ranks]:
    """Join the job that torchrun started, as one of its ranks, until the block ends.

    A process without torchrun's environment variables is a job of its own. With CUDA each rank
    takes the GPU of its local rank, and tensors there go over NCCL; all else goes over gloo. Where
    torchrun ends this rank since another has died, a SaesubError says which.

    Args:
        timeout_s: how long a rank is waited for before the job ends.

    Raises:
        SaesubError: the process has joined a job before, the other ranks did not come, there is
            no GPU for this one, or torchrun's environment variables are incomplete.
    """
    if dist.is_initialized():
        raise SaesubError("This process has already joined a job: use the ranks it was given.")
    timeout = timedelta(seconds=timeout_s)
    backend = "gloo"
    if torch.cuda.is_available():
        _take_gpu(os.environ.get("LOCAL_RANK", "0"))
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, world = _meeting_point(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except ValueError as error:  # rendezvous's for a variable that is missing or no number
        raise SaesubError(
            f"RANK is set, but not all that torchrun sets with it ({error}): start with torchrun, "
            "or unset RANK to be a job of one process."
        ) from error
    except RuntimeError as error:
        raise SaesubError(
            f"The ranks did not all come together within {timeout_s:.0f} s ({error}): start them "
            "with torchrun, all with the same --nnodes and --rdzv-endpoint."
        ) from error
    ranks = Ranks(rank, world, PrefixStore("saesub", store))

    def end(*_: Any) -> None:
        if lost := ranks.report_loss():
            raise SaesubError(lost)
        raise SystemExit(128 + signal.SIGTERM)

    try:
        with _on_sigterm(end):
            yield ranks
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _take_gpu(local_rank: str) -> None:
    try:
        torch.cuda.set_device(int(local_rank))
    except (RuntimeError, ValueError) as error:
        raise SaesubError(
            f"There is no GPU for local rank {local_rank} ({error}): start no more ranks on a "
            "machine than it has GPUs."
        ) from error


def _meeting_point(timeout: timedelta) -> tuple[Store, int, int]:
    if "RANK" not in os.environ:
        return HashStore(), 0, 1
    return next(iter(rendezvous("env://", timeout=timeout)))


@contextmanager
def _on_sigterm(handler: Any) -> Iterator[None]:
    """torchrun ends the ranks that live with SIGTERM, maybe before they miss the one that died."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _deaf_to_sigterm() -> Any:
    return _on_sigterm(signal.SIG_IGN)
