"""Reads Whisper weights from a CTranslate2 file, as a Hugging Face state dict.

CTranslate2 (github.com/OpenNMT/CTranslate2, `Model::load`) writes little-endian: the format's
version, the model's kind and revision, then for each variable its name, shape, type and bytes, and
last the aliases. This module reads only what Whisper needs: float32 and float16 weights, in which
queries, keys and values share one matrix.
"""

from __future__ import annotations

import re
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

# The parts of a stack or a block by CTranslate2's names, and what each holds by transformers'.
_PARTS = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "layer_norm": ("layer_norm",),
    "embeddings": ("embed_tokens",),
    "position_encodings": ("embed_positions",),
    "conv1": ("conv1",),
    "conv2": ("conv2",),
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
        (n_axes,) = _read(file, "B")
        *shape, number, size = _read(file, f"{n_axes}IBI")
        data = file.read(size)
        if not shape or name == "decoder/alignment_heads":  # settings, not weights
            continue
        if number not in _FLOATS:
            raise SaesubError(
                f"{name} is quantised: convert the model without --quantization int8."
            )
        yield name, np.frombuffer(data, _FLOATS[number]).reshape(shape)


def _read(file: BufferedReader, layout: str) -> tuple[int, ...]:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _string(file: BufferedReader) -> str:
    return file.read(_read(file, "H")[0]).rstrip(b"\0").decode()


def _renamed(name: str, value: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    stack, block, part, leaf = re.findall(r"(\w+?)/(?:layer_(\d+)/)?(.+)/(\w+)", name)[0]
    prefix = f"model.{stack}." + (f"layers.{block}." if block else "")
    leaf, pieces = _LEAVES.get(leaf, leaf), _PARTS[part]
    weight = torch.from_numpy(value.astype(np.float32))
    for piece, rows in zip(pieces, weight.chunk(len(pieces)), strict=True):
        if not (leaf == "bias" and piece.endswith("k_proj")):  # Whisper's keys have no bias
            yield f"{prefix}{piece}.{leaf}", rows.clone()
