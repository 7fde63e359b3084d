"""Loads a language model by name, from a folder or from a live object, as a TransformerBridge."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.nn import Module, Parameter
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.hook_points import HookedRootModule
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Pipeline,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from saesub.errors import SaesubError
from saesub.loading.conversion import conversion_key, convert, quiet
from saesub.loading.hub import hub_is_reachable, not_found
from saesub.loading.registry import Packaged, packaged, packaged_names
from saesub.paths import cache_dir, made_once
from saesub.precision import without_autocast

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
            A live model and its tokenizer stay as they are: the bridge shares the model's weights
            but none of its settings, and has a tokenizer of its own. Hooks that you set on the
            model before run in the bridge too.
        device: "auto" is CUDA where there is one; for a live model it is the model's own device.
        dtype: by default float32 on the CPU and for packaged models, else the checkpoint's own.

    Packaged weights were quantised to about 4 bits and are de-quantised here: a figure measured on
    one should say so. The first load of a packaged model converts it, which takes a minute or more.

    Code that a model brings with it is never run: load such a model with transformers, where you
    can say that you trust it, and give it here as a live one.

    Raises:
        SaesubError: nothing loads under that name, the checkpoint lacks weights or a tokenizer,
            TransformerLens does not support the model, or the device or dtype is of no use.
    """
    _check_place(device, dtype)
    if isinstance(model, TransformerBridge):
        return _unmoved(model, device, dtype)
    if isinstance(model, PreTrainedModel):
        model = (model, _tokenizer_of(model))
    if isinstance(model, tuple) and len(model) == 2 and all(map(isinstance, model, _PAIR)):
        name = model[0].name_or_path or "live model"
        return _bridge(*model, name, device, dtype)
    if not isinstance(model, (str, Path)) or model == "":
        raise SaesubError(_no_model(model))
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


def same_model(a: str, b: str) -> bool:
    """Whether two names are of one model, whatever its owner or folder; TransformerLens has names
    of its own for some."""
    bare = []
    for name in (a, b):
        with suppress(ValueError):
            name = get_official_model_name(name)
        bare.append(Path(name).name.casefold())
    return bare[0] == bare[1]


@contextmanager
def in_eval_mode(model: TransformerBridge) -> Iterator[None]:
    """Switches off dropout and autocast within, whatever mode the model was left in, and then sets
    every module's mode back."""
    modules = [*model.modules(), *model.original_model.modules()]
    modes = [(module, module.training) for module in modules]
    model.eval()
    try:
        with without_autocast():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def context_tokens(model: TransformerBridge) -> ContextTokens:
    """The special tokens this model was trained with: from the registry, else from its tokenizer.

    A tokenizer that prepends nothing gives `bos_id` None; its end-of-text token is the separator,
    and `separator_id` is None where it has none, or one that the model has no embedding for
    (TransformerLens adds such a token to a tokenizer without one).

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
        with own_settings(tokenizer):
            ids, plain = (tokenizer("a", add_special_tokens=s)["input_ids"] for s in (True, False))
        prepends_bos = len(ids) > len(plain) and ids[0] == tokenizer.bos_token_id
        separator = tokenizer.eos_token_id
        if separator is not None and separator >= n_embeddings(model):
            separator = None
    bos = tokenizer.bos_token_id if prepends_bos else None
    known = {*tokenizer.all_special_ids, bos, separator} - {None}
    return ContextTokens(bos, separator, tuple(sorted(known)))


def n_embeddings(model: TransformerBridge) -> int:
    """How many token ids the model has an input embedding for."""
    hf_model: Any = model.original_model
    return len(hf_model.get_input_embeddings().weight)


@contextmanager
def own_settings(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Calls within it change the truncation and padding that a fast tokenizer is set to;
    afterwards they are as before."""
    if not tokenizer.is_fast:
        yield
        return
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
        backend.enable_padding(**padding) if padding else backend.no_padding()


def _unmoved(
    bridge: TransformerBridge, device: str, dtype: torch.dtype | None
) -> TransformerBridge:
    place = torch.empty(0, device=bridge.cfg.device).device
    elsewhere = device != "auto" and torch.empty(0, device=device).device != place
    if elsewhere or dtype not in (None, bridge.cfg.dtype):
        raise SaesubError(
            f"this bridge is on {place} in {bridge.cfg.dtype} and is used as it is: leave device "
            "and dtype out, or give its Hugging Face model."
        )
    return bridge


def _no_model(given: Any) -> str:
    """What is wrong with an object that is no model, and what to give in its place."""
    pair = isinstance(given, tuple) and len(given) == 2
    wrong = given[0] if pair else given
    what = repr(given) if given == "" else type(given).__name__
    if pair:
        what = f"a pair ({', '.join(type(part).__name__ for part in given)})"
    message = (
        "a model is a name, a folder, a Hugging Face model, a pair (model, tokenizer) of "
        f"transformers or a TransformerBridge, not {what}"
    )
    if isinstance(wrong, HookedRootModule):
        return f"{message}: load it with TransformerBridge.boot_transformers, or give its name."
    if isinstance(wrong, Pipeline):
        return f"{message}: give (pipeline.model, pipeline.tokenizer)."
    if isinstance(wrong, Module) and not isinstance(wrong, PreTrainedModel):
        return f"{message}: give the model of transformers within the {type(wrong).__name__}."
    if pair:
        return f"{message}: load both with transformers, and give the model first."
    return f"{message}."


def _check_place(device: str, dtype: torch.dtype | None) -> None:
    try:
        usable = device == "auto" or torch.empty(0, device=torch.device(device)).device.type
    except (RuntimeError, TypeError, AssertionError):  # of a build without that device
        usable = False
    if not usable or usable == "meta":
        raise SaesubError(
            f'device={device!r} is not here: give "auto", "cpu" or a device you have.'
        )
    if not isinstance(dtype, torch.dtype | None) or not getattr(dtype, "is_floating_point", True):
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
    """A bridge around copies that share the model's weights."""
    _check_text_model(hf_model)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise SaesubError(
            f"the tokenizer of {name} has no vocabulary, as where a folder lacks the tokenizer's "
            "files: save one there with save_pretrained, or give a pair (model, tokenizer)."
        )
    try:
        hf_model = _sharing_weights(hf_model)
        if device != "auto" or dtype is not None:
            hf_model = hf_model.to(device=None if device == "auto" else device, dtype=dtype)
        with torch.random.fork_rng():  # TransformerLens draws weights that it then replaces
            bridge = _boot(hf_model, copy.deepcopy(tokenizer), name)
        n_embeddings(bridge)  # a model of images has none
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # TransformerLens raises what each of its adapters raises
        reason = (str(error) or type(error).__name__).split("\n")[0].split(" Available arch")[0]
        raise SaesubError(
            f"TransformerLens cannot wrap a {type(hf_model).__name__} ({reason}): give a causal "
            "language model, with its head (AutoModelForCausalLM), of an architecture that it "
            "supports."
        ) from error
    bridge.cfg.default_prepend_bos = context_tokens(bridge).bos_id is not None
    bridge.eval()
    return bridge.requires_grad_(False)


def _check_text_model(hf_model: Any) -> None:
    kind = type(hf_model).__name__
    if getattr(hf_model.config, "is_encoder_decoder", False):
        raise SaesubError(
            f"{kind} has an encoder and a decoder: give a model with a decoder alone."
        )
    if any(weight.is_meta for weight in hf_model.parameters()):
        raise SaesubError(
            f"some weights of this {kind} are on the meta device and hold no values: load them all "
            "into memory."
        )


def _boot(hf_model: Any, tokenizer: Any, name: str) -> TransformerBridge:
    """Wraps without reloading: boot_transformers would swap in a tokenizer that prepends BOS,
    unless this one says that it does, so it is told so while it boots and then set right.

    Both arguments become the bridge's own. TransformerLens adds an end-of-text token, which the
    model does not know, to a tokenizer without one: there all is set right.
    """
    true = copy.deepcopy(vars(tokenizer)) if tokenizer.eos_token is None else {}
    true |= {"init_kwargs": tokenizer.init_kwargs}
    if type(hf_model).__name__ in SUPPORTED_ARCHITECTURES:  # a config made by hand names none
        hf_model.config.architectures = [type(hf_model).__name__]
    tokenizer.init_kwargs = {"name_or_path": name, **tokenizer.init_kwargs, "add_bos_token": True}
    with quiet():
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=hf_model, tokenizer=tokenizer, dtype=hf_model.dtype
        )
    vars(tokenizer).update(true)
    return bridge


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    name = model.name_or_path
    try:
        if not name:  # AutoTokenizer would read the working folder
            raise ValueError("it has none")
        return _read(AutoTokenizer, str(name))
    except Exception as error:  # transformers raises what each of its readers raises
        raise SaesubError(
            f"no tokenizer was found under the model's name {name!r}: "
            "give the pair (model, tokenizer)."
        ) from error


def _resolve(model: str | Path) -> tuple[str, str]:
    """The name to record, and the folder or hub name that `from_pretrained` reads."""
    folder = Path(os.path.expanduser(model))
    if os.path.isfile(folder / "config.json"):  # False for a name that no file can have
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
    offline = os.path.isdir(source) or not hub_is_reachable()
    with quiet():
        return auto.from_pretrained(
            source, local_files_only=offline, trust_remote_code=False, **settings
        )


def _from_pretrained(name: str, source: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    settings = {"dtype": dtype or "auto", "attn_implementation": "eager"}
    try:
        model, found = _read(AutoModelForCausalLM, source, output_loading_info=True, **settings)
        if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
            raise ValueError(
                f"the checkpoint lacks weights ({', '.join(missing[:3])}): save a model with its "
                "head there, or give the live model."
            )
        return model, _read(AutoTokenizer, source)
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
        elif os.path.isdir(source):
            message = f"the model folder {source} does not load ({reason}): save it again."
        else:
            message = not_found(name, "models", reason, _HUB_NAMES)
        raise SaesubError(message) from error


def _converted(entry: Packaged) -> Path:
    """The folder of the model's de-quantised safetensors, written at the first call."""
    folder = (
        cache_dir() / "models" / f"{entry.name}-{conversion_key(entry, 'loading/conversion.py')}"
    )
    return made_once(folder, lambda partial: convert(entry, partial))
