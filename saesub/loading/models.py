"""A language model by name, folder or live object, as a TransformerBridge of raw weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from saesub.errors import SaesubError, near_names
from saesub.loading.download import fetch, hub_is_reachable, require_disk
from saesub.loading.registry import Packaged, packaged, packaged_names
from saesub.paths import cache_dir, made_once

Model: TypeAlias = (
    str
    | Path
    | PreTrainedModel
    | tuple[PreTrainedModel, PreTrainedTokenizerBase]
    | TransformerBridge
)

HUB_NAMES = (
    "gpt2",
    "EleutherAI/pythia-160m",
    "meta-llama/Llama-3.1-8B",
    "google/gemma-2-9b",
    "Qwen/Qwen3-8B",
)
"""The paper's models and smaller kin, which need the hub: named in errors as near names."""


@dataclass(frozen=True)
class ContextTokens:
    """What stands around text in a context: the token before it, the one between documents.

    `special_ids` are all the ids whose activations are not those of text.
    """

    bos_id: int | None
    separator_id: int | None
    special_ids: tuple[int, ...]


def load_model(
    model: Model, *, device: str = "auto", dtype: torch.dtype | None = None
) -> TransformerBridge:
    """A model ready for reading: unprocessed weights, eval mode, no gradients.

    Args:
        model: a local folder, a packaged name (see `packaged_names("models")`), a hub name, a live
            Hugging Face model (or a pair of it and its tokenizer), or a bridge, returned as it is.
        device: "auto" is CUDA where there is one; a live model then stays where it is.
        dtype: by default float32 on the CPU and for packaged models, else the checkpoint's own.

    Packaged weights were quantised to about 4 bits and are de-quantised here: a figure measured on
    one should say so. The first load of a packaged model converts it, which takes a minute or more.

    Code that a model brings with it is never run: load such a model with transformers, where you
    can say that you trust it, and give it here as a live one.

    Raises:
        SaesubError: nothing loads under that name; the message says what does.
    """
    if isinstance(model, TransformerBridge):
        return model
    if isinstance(model, PreTrainedModel):
        model = (model, _tokenizer_of(model))
    if isinstance(model, tuple):
        return _bridge(*_moved(model, device, dtype), name=model[0].name_or_path or "live model")
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    name, folder = _resolve(model)
    if dtype is None and (place == "cpu" or name in packaged_names("models")):
        dtype = torch.float32
    hf_model, tokenizer = _from_pretrained(name, folder, dtype)
    return _bridge(cast(Any, hf_model).to(place), tokenizer, name=name)


def model_name(model: TransformerBridge) -> str:
    """A readable name for records: the packaged or hub name, or the folder's."""
    name = str(model.cfg.model_name)
    return Path(name).name if Path(name).is_absolute() else name


def context_tokens(model: TransformerBridge) -> ContextTokens:
    """The special tokens this model was trained with: from the registry, else from its tokenizer.

    A tokenizer that prepends nothing gives `bos_id` None; its end-of-text token is the separator.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise SaesubError(
            f"{model_name(model)} has no tokenizer: load it as a pair (model, tokenizer)."
        )
    entry = packaged().get(str(model.cfg.model_name))
    if entry is not None:
        bos = tokenizer.bos_token_id if entry.details["bos"] else None
        separator = tokenizer.convert_tokens_to_ids(entry.details["separator"])
    else:
        bos = tokenizer.bos_token_id if _prepends_bos(tokenizer) else None
        separator = tokenizer.eos_token_id
    known = {*tokenizer.all_special_ids, bos, separator} - {None}
    return ContextTokens(bos, separator, tuple(sorted(known)))


def _prepends_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def _bridge(hf_model: Any, tokenizer: Any, *, name: str) -> TransformerBridge:
    """Wraps without reloading: boot_transformers would swap in a tokenizer that prepends BOS,
    unless this one says that it does, so it is told so while it boots and then set right.
    """
    tokenizer = copy.copy(tokenizer)
    true_kwargs = tokenizer.init_kwargs
    tokenizer.init_kwargs = {"name_or_path": name, **true_kwargs, "add_bos_token": True}
    with _quiet():
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=hf_model, tokenizer=tokenizer, dtype=hf_model.dtype
        )
    tokenizer.init_kwargs = true_kwargs
    bridge.cfg.default_prepend_bos = context_tokens(bridge).bos_id is not None
    bridge.eval()
    return bridge.requires_grad_(False)


def _moved(
    pair: tuple[PreTrainedModel, PreTrainedTokenizerBase], device: str, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = pair
    if device != "auto" or dtype is not None:
        model = cast(Any, model).to(device=None if device == "auto" else device, dtype=dtype)
    return model, tokenizer


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    try:
        with _quiet():
            name = str(model.name_or_path)
            offline = Path(name).is_dir() or not hub_is_reachable()
            return AutoTokenizer.from_pretrained(
                name, local_files_only=offline, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise SaesubError(
            f"no tokenizer was found under the model's name {model.name_or_path!r}: "
            "give the pair (model, tokenizer)."
        ) from error


def _resolve(model: str | Path) -> tuple[str, str]:
    """The name to record and what `from_pretrained` is to read: a folder, or a hub name."""
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.resolve()), str(folder.resolve())
    if isinstance(model, Path) or model.startswith(("/", ".", "~")):
        raise SaesubError(
            f"{model} is not a Hugging Face model folder (it has no config.json): "
            "save one there with save_pretrained, or give a name."
        )
    if model in packaged_names("models"):
        return model, str(_converted(packaged()[model]))
    return model, model


def _from_pretrained(name: str, source: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    try:
        with _quiet():
            offline = Path(source).is_dir() or not hub_is_reachable()
            hf_model = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype or "auto",
                attn_implementation="eager",
                local_files_only=offline,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                source, local_files_only=offline, trust_remote_code=False
            )
            return hf_model, tokenizer
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises what each of its readers raises
        raise SaesubError(_load_failure(name, source, error)) from error


def _load_failure(name: str, source: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if source != name:
        return f"the converted copy of {name} cannot be read ({reason}): delete {source} and retry."
    if "trust_remote_code" in str(error):
        return (
            f"the model {name} brings code of its own, which saesub does not run: load it with "
            "transformers, where you can say that you trust it, and give the live model."
        )
    if Path(source).is_dir():
        return f"the model folder {source} does not load: {reason}"
    offline = packaged_names("models")
    return (
        f"no model loads under {name!r}, which is neither packaged nor a local folder, and the hub "
        f"did not give it: {near_names(name, [*offline, *HUB_NAMES])} Without the hub, these load: "
        f"{', '.join(offline)}. (The hub: {reason})"
    )


def _converted(entry: Packaged) -> Path:
    """The folder of the model's de-quantised safetensors, written at the first call."""
    folder = cache_dir() / "models" / f"{entry.name}-{entry.digest}"
    return made_once(folder, lambda partial: _convert(entry, partial))


def _convert(entry: Packaged, folder: Path) -> None:
    """GGUF to a Hugging Face folder."""
    source, gguf = fetch(entry.name), entry.files[0].name
    require_disk(folder, 6 * entry.files[0].size, f"converting {entry.name}")
    with _quiet(progress=True):
        config = AutoConfig.from_pretrained(source, gguf_file=gguf)
        hf_model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf, config=config, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    # The weights are plain float32 by now, but still bear the mark of the quantised file.
    cast(Any, hf_model).hf_quantizer = None
    del cast(Any, hf_model.config).quantization_config
    hf_model.save_pretrained(folder)
    tokenizer.add_bos_token = entry.details["bos"]
    tokenizer.save_pretrained(folder)


@contextmanager
def _quiet(progress: bool = False) -> Iterator[None]:
    """Silences transformers within: its advice is for people who train and generate."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if not progress:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
