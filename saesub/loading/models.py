"""Loads a language model by name, from a folder or from a live object, as a TransformerBridge."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.nn import Parameter
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from saesub.errors import SaesubError
from saesub.loading.download import fetch, require_disk
from saesub.loading.hub import hub_is_reachable, not_found
from saesub.loading.registry import Packaged, packaged, packaged_names
from saesub.paths import cache_dir, made_once

Model: TypeAlias = (
    str
    | Path
    | PreTrainedModel
    | tuple[PreTrainedModel, PreTrainedTokenizerBase]
    | TransformerBridge
)
_PAIR = (PreTrainedModel, PreTrainedTokenizerBase)
_HUB_NAMES = (  # the paper's models and smaller ones of their families, for hints in errors
    "gpt2",
    "EleutherAI/pythia-160m",
    "meta-llama/Llama-3.1-8B",
    "google/gemma-2-9b",
    "Qwen/Qwen3-8B",
)


@dataclass(frozen=True)
class ContextTokens:
    """The special tokens of a context: the one before its text, the one between documents.

    `special_ids` are all the ids whose activations are not those of text.
    """

    bos_id: int | None
    separator_id: int | None
    special_ids: tuple[int, ...]


def load_model(
    model: Model, *, device: str = "auto", dtype: torch.dtype | None = None
) -> TransformerBridge:
    """A model for reading activations: unprocessed weights, eval mode, no gradients.

    Args:
        model: a local folder, a packaged name (see `packaged_names("models")`), a hub name, a live
            Hugging Face model (or a pair of it and its tokenizer), or a bridge, returned as it is.
            A live model stays as it is: the bridge shares its weights but none of its settings.
        device: "auto" is CUDA where there is one; for a live model it is the model's own device.
        dtype: by default float32 on the CPU and for packaged models, else the checkpoint's own.

    Packaged weights were quantised to about 4 bits and are de-quantised here: a figure measured on
    one should say so. The first load of a packaged model converts it, which takes a minute or more.

    Code that a model brings with it is never run: load such a model with transformers, where you
    can say that you trust it, and give it here as a live one.

    Raises:
        SaesubError: nothing loads under that name, or the device or dtype is of no use.
    """
    if isinstance(model, TransformerBridge):
        return model
    _check_place(device, dtype)
    if isinstance(model, PreTrainedModel):
        model = (model, _tokenizer_of(model))
    if isinstance(model, tuple) and len(model) == 2 and all(map(isinstance, model, _PAIR)):
        name = model[0].name_or_path or "live model"
        return _bridge(_sharing_weights(model[0]), model[1], name, device, dtype)
    if not isinstance(model, (str, Path)):
        raise SaesubError(
            "a model is a name, a folder, a Hugging Face model, a pair (model, tokenizer) of "
            f"transformers or a TransformerBridge, not {type(model).__name__}."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name, source = _resolve(model)
    if dtype is None and (str(device) == "cpu" or name in packaged_names("models")):
        dtype = torch.float32
    return _bridge(*_from_pretrained(name, source, dtype), name, device, dtype)


def model_name(model: TransformerBridge) -> str:
    """A readable name for records: the packaged or hub name, or the folder's."""
    name = str(model.cfg.model_name)
    return Path(name).name if Path(name).is_absolute() else name


@contextmanager
def in_eval_mode(model: TransformerBridge) -> Iterator[None]:
    """Switches off dropout within, whatever mode the model was left in, and then sets every
    module's mode back."""
    modules = [*model.modules(), *model.original_model.modules()]
    modes = [(module, module.training) for module in modules]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def context_tokens(model: TransformerBridge) -> ContextTokens:
    """The special tokens this model was trained with: from the registry, else from its tokenizer.

    A tokenizer that prepends nothing gives `bos_id` None; its end-of-text token is the separator.

    Raises SaesubError for a model without a tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise SaesubError(
            f"{model_name(model)} has no tokenizer: load it as a pair (model, tokenizer)."
        )
    entry = packaged().get(str(model.cfg.model_name))
    if entry is not None:
        prepends_bos = entry.details["bos"]
        separator = tokenizer.convert_tokens_to_ids(entry.details["separator"])
    else:
        ids = tokenizer("a", add_special_tokens=True)["input_ids"]
        prepends_bos = len(ids) > 1 and ids[0] == tokenizer.bos_token_id
        separator = tokenizer.eos_token_id
    bos = tokenizer.bos_token_id if prepends_bos else None
    known = {*tokenizer.all_special_ids, bos, separator} - {None}
    return ContextTokens(bos, separator, tuple(sorted(known)))


def _check_place(device: str, dtype: torch.dtype | None) -> None:
    try:
        usable = (
            device == "auto" or torch.device(device).type != "cuda" or torch.cuda.is_available()
        )
    except (RuntimeError, TypeError):
        usable = False
    if not usable:
        raise SaesubError(
            f'device={device!r} is not here: give "auto", "cpu" or a device you have.'
        )
    if not isinstance(dtype, torch.dtype | None):
        raise SaesubError(f"dtype must be such as torch.float32, not {dtype!r}.")


def _sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the same memory: its mode, gradients, hooks, device and dtype are its own."""
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for weight in model.parameters():
        plain = type(weight) is Parameter  # quantised ones are of other classes
        shared[id(weight)] = Parameter(weight.detach(), requires_grad=False) if plain else weight
    return copy.deepcopy(model, shared)


def _bridge(
    hf_model: Any, tokenizer: Any, name: str, device: str, dtype: torch.dtype | None
) -> TransformerBridge:
    """Wraps without reloading: boot_transformers would swap in a tokenizer that prepends BOS,
    unless this one says that it does, so it is told so while it boots and then set right.
    """
    if device != "auto" or dtype is not None:
        hf_model = hf_model.to(device=None if device == "auto" else device, dtype=dtype)
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


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    try:
        return _read(AutoTokenizer, str(model.name_or_path))
    except (OSError, ValueError) as error:
        raise SaesubError(
            f"no tokenizer was found under the model's name {model.name_or_path!r}: "
            "give the pair (model, tokenizer)."
        ) from error


def _resolve(model: str | Path) -> tuple[str, str]:
    """The name to record, and the folder or hub name that `from_pretrained` reads."""
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


def _read(auto: Any, source: str, **settings: Any) -> Any:
    """What transformers reads from a folder or the hub; code that comes with it is never run."""
    offline = Path(source).is_dir() or not hub_is_reachable()
    with _quiet():
        return auto.from_pretrained(
            source, local_files_only=offline, trust_remote_code=False, **settings
        )


def _from_pretrained(name: str, source: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    settings = {"dtype": dtype or "auto", "attn_implementation": "eager"}
    try:
        return _read(AutoModelForCausalLM, source, **settings), _read(AutoTokenizer, source)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises what each of its readers raises
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if source != name:
            message = f"the converted copy of {name} cannot be read ({reason}): delete {source}."
        elif "trust_remote_code" in str(error):
            message = (
                f"the model {name} brings code of its own, which saesub does not run: load it with "
                "transformers, where you can say that you trust it, and give the live model."
            )
        elif Path(source).is_dir():
            message = f"the model folder {source} does not load: {reason}"
        else:
            message = not_found(name, "models", reason, _HUB_NAMES)
        raise SaesubError(message) from error


def _converted(entry: Packaged) -> Path:
    """The folder of the model's de-quantised safetensors, written at the first call."""
    folder = cache_dir() / "models" / f"{entry.name}-{entry.digest}"
    return made_once(folder, lambda partial: _convert(entry, partial))


def _convert(entry: Packaged, folder: Path) -> None:
    """Writes a GGUF file as a Hugging Face folder."""
    source, gguf = fetch(entry.name), entry.files[0].name
    require_disk(folder, 6 * entry.files[0].size, f"converting {entry.name}")
    with _quiet(progress=True):
        config = AutoConfig.from_pretrained(source, gguf_file=gguf)
        hf_model: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf, config=config, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    # The weights are plain float32 by now, but still bear the mark of the quantised file.
    hf_model.hf_quantizer = None
    del hf_model.config.quantization_config
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
