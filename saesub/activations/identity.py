"""What decides the activations of a pass, as hashes: a kept result is used again only if all agree.

Everything is hashed that a pass reads, not a sample of it: on the CPU the weights take less time
than one batch, on a GPU some seconds for each GB. Hooks are functions, which no hash tells apart,
so a result made under hooks is never used again. Nor is one of a model with code of the user's own:
a module whose class is none of the libraries', such as an adapter, or a function in place of a
library's.

Through the bridge or through the plain model within it, a pass gives the same activations to
rounding, so finished stores and spectra do not say which it was. It follows from the model, the
length of the contexts, the processor and the versions of the libraries.
"""

from __future__ import annotations

import copy
import hashlib
import json
import secrets
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from saesub.errors import SaesubError
from saesub.loading.models import ContextTokens, context_tokens

_AT_ONCE = 16  # documents, of which each may be a book
# What a config says of where it comes from, and what changes no value beyond rounding.
_OF_NO_EFFECT = {
    *("_name_or_path", "transformers_version", "_attn_implementation_autoset", "architectures"),
    *("_attn_implementation", "attn_implementation", "_experts_implementation", "use_cache"),
    *("name_or_path", "gradient_checkpointing"),
}
_PROBE = "It's 2026: Ça va? Ünïcode  FAST,\n\ttabs & NEWLINES… 12,345.67"
_DECORATORS = ("contextlib.", "functools.")  # whose wrappers are the standard library's
_LIBRARIES = ("torch.", "transformers.", "transformer_lens.", "accelerate.")
_EVERY_MODULES = frozenset(vars(nn.Module()))  # attributes
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum, np.generic, slice, range)
_PLAIN += (torch.dtype, torch.device, torch.Size)


def model_settings(model: TransformerBridge) -> dict[str, str]:
    """Hashes of a model's weights, its architecture and its tokenizer, its active hooks, and what
    float32 products are rounded to.

    Raises SaesubError for weights on the meta device, which hold no values.
    """
    return {
        "weights": _weights(model.original_model),
        "architecture": _architecture(model),
        "tokenizer": _tokenizer(model.tokenizer, context_tokens(model)),
        "hooks": _hooks(model),
        "arithmetic": _arithmetic(torch.device(model.cfg.device or "cpu").type),
    }


class DocumentsDigest:
    """Hashes of the first documents of a corpus. Those that an earlier hash is of are not read
    again, so that a long pass, which asks every minute, reads its text but once more."""

    def __init__(self, corpus: Dataset) -> None:
        self._corpus, self._known = corpus, {0: hashlib.sha256()}

    def of(self, n: int) -> str:
        """A hash of the first `n` documents, or of all where there are fewer."""
        n = min(n, len(self._corpus))
        if n in self._known:
            return self._known[n].hexdigest()
        known = max(m for m in self._known if m < n)
        self._known[n] = digest = self._known[known].copy()
        read: Any = self._corpus.select(range(known, n))
        for block in read.iter(_AT_ONCE):
            for document in block[self._corpus.column_names[0]]:
                is_text = isinstance(document, str)
                content = document.encode() if is_text else np.asarray(document, np.int64).tobytes()
                digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()


def _weights(model: nn.Module) -> str:
    digest, known = hashlib.sha256(), dict[tuple[Any, ...], str]()
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    named = (model.state_dict(), dict(parameters), dict(buffers))
    for name, value in (item for of in named for item in of.items()):
        # A quantized layer keeps a tuple of them; some parameters and buffers are in no state dict.
        for tensor in value if isinstance(value, (tuple, list)) else [value]:
            if not isinstance(tensor, Tensor):
                digest.update(f"{name} {_plainly(tensor)}".encode())
                continue
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if place not in known or tensor.numel() == 0:
                known[place] = _hash_of(tensor, name)
            digest.update(f"{name} {known[place]}".encode())
    return digest.hexdigest()


def _hash_of(tensor: Tensor, name: str) -> str:
    if tensor.is_meta:
        raise SaesubError(
            f"the weight {name} is on the meta device and holds no values: load the model "
            "whole, without offloading"
        )
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    content = hashlib.sha256(_bytes_of(tensor)).hexdigest()
    return f"{tensor.dtype} {tuple(tensor.shape)} {content}"


def _bytes_of(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return memoryview(plain.numpy())  # pyright: ignore[reportArgumentType]


def _architecture(model: TransformerBridge) -> str:
    config: Any = model.original_model.config
    parts = [{k: v for k, v in config.to_dict().items() if k not in _OF_NO_EFFECT}]
    parts += [{"compatibility_mode": model.compatibility_mode}]
    parts += [{name: type(part).__qualname__ for name, part in model.named_modules()}]
    modules = model.original_model.named_modules()
    parts += [{name: _own_values(part) for name, part in modules}]
    return hashlib.sha256(_plainly(parts).encode()).hexdigest()


def _own_values(module: nn.Module) -> dict[str, str]:
    """The numbers, texts, switches and containers of them that a library's module holds."""
    if _of_bridge(module) or not of_library(type(module)):  # a bridge keeps count there
        return {}
    left_out = _EVERY_MODULES | _OF_NO_EFFECT
    held = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in left_out}
    return {k: _plainly(v) for k, v in held.items() if not k.endswith("_cached")}


def _of_bridge(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformer_lens.")


def _plainly(value: Any) -> str:
    """A text that two processes make alike; of a function its name, of an object its class."""
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_plainly(k)}: {_plainly(v)}' for k, v in value.items()))}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_plainly, value)))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plainly, value))}]"
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(_bytes_of(value)).hexdigest()}"
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, partial):
        return f"{_plainly(value.func)} of {_plainly([value.args, value.keywords])}"
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _tokenizer(tokenizer: Any, specials: ContextTokens) -> str:
    parts: list[Any] = [type(tokenizer).__qualname__]
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        described = json.loads(backend.to_str())
        for of_last_call in ("padding", "truncation"):
            described.pop(of_last_call, None)
        parts += [json.dumps(described, sort_keys=True)]  # a hundred thousand words and more
    if backend is None or not of_library(type(tokenizer)):
        # A copy, since a call changes the padding.
        parts += [tokenizer.get_vocab(), copy.deepcopy(tokenizer)(_PROBE).input_ids]
    parts += [{k: str(v) for k, v in tokenizer.special_tokens_map.items()}, repr(specials)]
    return hashlib.sha256(_plainly(parts).encode()).hexdigest()


def _arithmetic(device: str) -> str:
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else "none"
    torch_backends: Any = torch.backends
    backends = [torch_backends.cuda.matmul, torch_backends.cudnn.conv, torch_backends.mkldnn.matmul]
    said = [_told(torch.get_float32_matmul_precision)]
    said += [_told(partial(getattr, backend, "fp32_precision")) for backend in backends]
    return f"float32 products {', '.join(said)}, autocast {dtype}"


def _told(setting: Callable[[], Any]) -> str:
    """A setting of torch, which refuses to tell one of its older or newer names if the other was
    used; older versions lack the newer."""
    try:
        return str(setting())
    except (RuntimeError, AttributeError):
        return "not told"


def _hooks(model: TransformerBridge) -> str:
    """The names of the modules in which code of the user's own runs, with a mark that no other call
    has."""
    names = modules_with_own_code(model)
    return f"{', '.join(names)} (call {secrets.token_hex(8)})" if names else "none"


def modules_with_own_code(model: TransformerBridge) -> list[str]:
    """The names of the modules with which a function runs that is not of the libraries."""
    modules = {id(m): (name, m) for name, m in model.original_model.named_modules()}
    modules |= {id(m): (name, m) for name, m in model.named_modules()}
    inside = set(modules)
    edited = {cls for cls in _classes(m for _, m in modules.values()) if _is_edited(cls)}
    names = sorted(
        name or "the model"
        for name, module in modules.values()
        if edited.intersection(type(module).__mro__) or _is_hooked(module, inside)
    )
    names += ["every module"] if _of_users(nn.modules.module._global_forward_hooks.values()) else []
    names += (
        ["every input"] if _of_users(nn.modules.module._global_forward_pre_hooks.values()) else []
    )
    return names


def _classes(modules: Iterable[nn.Module]) -> set[type]:
    found = {cls for module in modules for cls in type(module).__mro__}
    return {cls for cls in found if cls.__module__ not in ("builtins", "typing")}


def _is_edited(cls: type) -> bool:
    """Whether a class, or one of its functions, is not of the libraries: as by
    `Conv1D.forward = ...`, for all modules of a class."""
    held = (getattr(value, "__func__", value) for value in vars(cls).values())
    return not of_library(cls) or any(
        isinstance(value, FunctionType) and not of_library(value) for value in held
    )


def _is_hooked(module: nn.Module, inside: set[int]) -> bool:
    """Whether a function runs with the module that is not of the libraries themselves, or that is
    bound to other weights than those of the model's modules, whose ids are `inside`.
    """
    own = vars(module)
    if isinstance(module, HookPoint) and _of_users(h.user_hook for h in module.fwd_hooks):
        return True
    held = (v for v in own.values() if callable(v) and not isinstance(v, (nn.Module, type)))
    called = [*held, *own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()]
    bound = (value for function in called for value in _bound(function))
    return _of_users(called) or not all(_is_known(value, inside) for value in bound)


def _is_known(value: Any, inside: set[int]) -> bool:
    """Whether a hash tells it: a module of the model, a plain value, or a library's own object.

    A bridge's parts keep methods of the part that they were copied from, which has no weights.
    """
    if isinstance(value, nn.Module):
        copied = _of_bridge(value) and not (*value.parameters(), *value.buffers())
        return copied or id(value) in inside
    return isinstance(value, _PLAIN) or (of_library(type(value)) and not isinstance(value, Tensor))


def _bound(function: Any) -> tuple[Any, ...]:
    """What a method or a partial function is bound to."""
    if isinstance(function, MethodType):
        return (function.__self__,)
    if isinstance(function, partial):
        return *_bound(function.func), *function.args, *function.keywords.values()
    return ()


def _of_users(functions: Iterable[Any]) -> bool:
    return not all(map(of_library, functions))


def of_library(function: Any) -> bool:
    """Whether a function, an object or a class is of the libraries that models are made of.

    A function says what module it is of, which `functools.wraps` copies, so where it was defined
    counts too, and what it wraps.
    """
    if isinstance(function, (partial, MethodType)):
        inner = function.func if isinstance(function, partial) else function.__func__
        return of_library(inner)
    if not _named(getattr(function, "__module__", None), _LIBRARIES):
        return False
    if not isinstance(function, FunctionType):
        return True
    defined = function.__globals__.get("__name__")
    wrapped = vars(function).get("__wrapped__")
    return _named(defined, (*_LIBRARIES, *_DECORATORS)) and (not wrapped or of_library(wrapped))


def _named(module: Any, libraries: tuple[str, ...]) -> bool:
    return isinstance(module, str) and f"{module}.".startswith(libraries)
