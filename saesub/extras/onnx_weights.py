"""Reads the weights of an ONNX file, without a library for it.

ONNX (github.com/onnx/onnx, `onnx.proto`) is one protocol buffer: a model holds a graph, a graph
holds nodes and initialisers, and an initialiser has a name, a shape, a type and its bytes. This
module reads only what a torch export of float32 weights needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from saesub.errors import SaesubError

_GRAPH, _NODE, _INITIALISER = 7, 1, 5
_INPUT, _NODE_NAME = 1, 3
_DIMS, _TYPE, _TENSOR_NAME, _RAW = 1, 2, 8, 9
_FLOAT32 = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Field = tuple[int, "int | memoryview"]


def onnx_weights(path: Path) -> dict[str, Tensor]:
    """The float32 initialisers of a torch export, by their names in the torch model.

    torch gives no name to the second operand of a linear layer's product, so it is found by the
    product's node, "/a/b/MatMul", and given back transposed as "a.b.weight". Another unnamed
    initialiser goes by its node, such as "a.b.Concat_6".

    Raises SaesubError for a file that is no ONNX model or is damaged, or has no float32 weights.
    """
    weights: dict[str, Tensor] = {}
    used: dict[str, str] = {}  # the node that reads an unnamed initialiser
    try:
        for number, part in _graph(memoryview(path.read_bytes())):
            if number == _INITIALISER:
                weights |= dict(_tensor(part))
            elif number == _NODE:
                fields = list(_fields(part))
                (node,) = (_text(v) for n, v in fields if n == _NODE_NAME)
                used |= {_text(v): node for n, v in fields if n == _INPUT}
    except (ValueError, LookupError, RuntimeError) as error:
        raise SaesubError(
            f"{path} is no ONNX model, or damaged ({error}): delete it and fetch it again"
        ) from error
    if not weights:
        raise SaesubError(f"{path} holds no float32 weights: give an export without quantisation")
    return dict(_named(name, value, used.get(name, "")) for name, value in weights.items())


def _named(name: str, value: Tensor, node: str) -> tuple[str, Tensor]:
    if not name.startswith("onnx::"):
        return name, value
    *path, operation = node.strip("/").split("/")
    if operation.startswith("MatMul"):
        return ".".join([*path, "weight"]), value.T.contiguous()
    return ".".join([*path, operation]), value


def _graph(model: memoryview) -> Iterator[Field]:
    graphs = [value for number, value in _fields(model) if number == _GRAPH]
    if len(graphs) != 1:
        raise ValueError(f"{len(graphs)} graphs")
    return _fields(graphs[0])


def _tensor(data: int | memoryview) -> Iterator[tuple[str, Tensor]]:
    """The name and the value; nothing for another type than float32."""
    fields = list(_fields(data))
    one = {number: value for number, value in fields if number != _DIMS}
    if one.get(_TYPE) != _FLOAT32 or _RAW not in one:
        return
    shape = [size for number, value in fields if number == _DIMS for size in _sizes(value)]
    value = torch.frombuffer(bytearray(_bytes(one[_RAW])), dtype=torch.float32)
    yield _text(one[_TENSOR_NAME]), value.reshape(shape)


def _sizes(value: int | memoryview) -> Iterator[int]:
    """Sizes written one by one or packed."""
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        size, at = _varint(value, at)
        yield size


def _fields(data: int | memoryview) -> Iterator[Field]:
    data, at = _bytes(data), 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
        else:
            sizes = {_FIXED64: 8, _FIXED32: 4}
            size, at = _varint(data, at) if kind == _BYTES else (sizes[kind], at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError("it ends early")
        yield key >> 3, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where there should be a message")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_bytes(value)).decode()
