"""Tensors of the CPU that say they are on MPS and, like those, refuse float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

MPS = torch.device("mps")


class _OnMps(torch.Tensor):
    """Holds the tensor of the CPU that it stands for. To torch's C++ it is on the meta device."""

    device = property(lambda self: MPS)  # pyright: ignore
    is_meta = property(lambda self: False)  # pyright: ignore
    is_sparse = property(lambda self: self.held.is_sparse)  # pyright: ignore

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> _OnMps:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device="meta"
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _MakeThere(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _AskForMeta(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args, kwargs or {}
        args, kwargs = tree_map(
            lambda a: "meta" if isinstance(a, (str, torch.device)) and a in (MPS, "mps") else a,
            given,
        )
        return func(*args, **kwargs)


@contextmanager
def fake_mps() -> Iterator[None]:
    """Within it "mps" is a device."""
    with _MakeThere(), _AskForMeta():
        yield


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _OnMps)]
    place = kwargs.get("device")
    here = bool(given) if place is None else torch.device(place).type in ("mps", "meta")
    if place is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map_only(_OnMps, lambda t: t.held, (args, kwargs))
    out = func(*args, **kwargs)
    if given or here:
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as MPS has none.")
    if func._schema.is_mutable:
        return given[0] if given else out
    return tree_map_only(torch.Tensor, _OnMps, out) if here else out
