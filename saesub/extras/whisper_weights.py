"""Whisper weights out of a CTranslate2 file, as a Hugging Face state dict.

CTranslate2 (github.com/OpenNMT/CTranslate2, `Model::load`) writes little-endian: the format's
version, the model's kind and revision, then for each variable its name, shape, type and bytes, and
last the aliases. Here only what Whisper needs is read: float32 and float16 weights, in which
queries, keys and values stand in one matrix.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saesub.errors import SaesubError

_VERSION = 6
_FLOATS = {0: np.float32, 4: np.float16}

# Where a block's parts stand in CTranslate2 and in transformers, and what each fused matrix holds.
_ATTENTION = {"self_attention": "self_attn", "attention": "encoder_attn"}
_FUSED = {
    "self_attention/linear_0": ("q_proj", "k_proj", "v_proj"),
    "self_attention/linear_1": ("out_proj",),
    "attention/linear_0": ("q_proj",),
    "attention/linear_1": ("k_proj", "v_proj"),
    "attention/linear_2": ("out_proj",),
}
_RENAMED = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "layer_norm": "layer_norm",
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "conv1": "conv1",
    "conv2": "conv2",
}
_LEAVES = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def whisper_state_dict(path: Path) -> dict[str, Tensor]:
    """The float32 weights of `WhisperForConditionalGeneration`, from CTranslate2's `model.bin`.

    Raises SaesubError for another version or kind of file, quantised weights, or a damaged file.
    """
    try:
        with path.open("rb") as file:
            state = dict(pair for name, value in _variables(file) for pair in _renamed(name, value))
        state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    except SaesubError:
        raise
    except (struct.error, ValueError, LookupError) as error:
        raise SaesubError(f"{path} is damaged ({error}): delete it and fetch it again.") from error
    return state


def _variables(file: BufferedReader) -> Iterator[tuple[str, np.ndarray]]:
    (version,) = _read(file, "I")
    kind = _string(file)
    if version != _VERSION or kind != "WhisperSpec":
        raise SaesubError(
            f"expected CTranslate2's Whisper in format {_VERSION}, found {kind!r} in format "
            f"{version}: convert it again with a current ct2-transformers-converter."
        )
    _, count = _read(file, "II")
    for _ in range(count):
        name = _string(file)
        (rank,) = _read(file, "B")
        shape = _read(file, f"{rank}I")
        kind_of_number, size = _read(file, "BI")
        data = file.read(size)
        if not shape or name == "decoder/alignment_heads":  # settings, not weights
            continue
        if kind_of_number not in _FLOATS:
            raise SaesubError(
                f"{name} is quantised: convert the model without --quantization int8."
            )
        yield name, np.frombuffer(data, _FLOATS[kind_of_number]).reshape(shape)


def _read(file: BufferedReader, layout: str) -> tuple[int, ...]:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _string(file: BufferedReader) -> str:
    return file.read(_read(file, "H")[0]).rstrip(b"\0").decode()


def _renamed(name: str, value: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    weight = torch.from_numpy(value.astype(np.float32))
    stack, *middle, leaf = name.split("/")
    prefix = f"model.{stack}."
    if middle[0].startswith("layer_") and middle[0] != "layer_norm":
        prefix += f"layers.{middle.pop(0).removeprefix('layer_')}."
    part, leaf = "/".join(middle), _LEAVES.get(leaf, leaf)
    if part in _RENAMED:
        yield f"{prefix}{_RENAMED[part]}.{leaf}", weight
        return
    pieces = _FUSED[part]
    for piece, rows in zip(pieces, weight.chunk(len(pieces)), strict=True):
        if (piece, leaf) != ("k_proj", "bias"):  # Whisper's keys have none: zeros stand there
            yield f"{prefix}{_ATTENTION[middle[0]]}.{piece}.{leaf}", rows.clone()
