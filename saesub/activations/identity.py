"""What decides the activations of a pass, as hashes: a kept result is used again only if all agree.

Everything is hashed that a pass reads, not a sample of it: on the CPU the weights take less time
than one batch, on a GPU some seconds for each GB. Hooks are functions, which no hash tells apart,
so a result made under hooks is never used again. Modules of the user's own, such as those of LoRA,
may hold numbers that are no weights, a scale or a switch: these are hashed too.

Through the bridge or through the plain model within it, a pass gives the same activations to
rounding, so finished stores and spectra do not say which it was. It follows from the model, the
length of the contexts, the processor and the versions of the libraries.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
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
}
_PROBE = "It's 2026: Ça va? Ünïcode  FAST,\n\ttabs & NEWLINES… 12,345.67"  # for slow tokenizers
_LIBRARIES = ("torch.", "transformers.", "transformer_lens.", "accelerate.")
_EVERY_MODULES = frozenset(vars(nn.Module()))  # attributes
_Met = dict[int, tuple[int, Any]]  # by id: its number, and itself, lest the id return


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
    digest, seen = hashlib.sha256(), set[tuple[Any, ...]]()
    # Some buffers are in no state dict.
    for name, tensor in (*model.state_dict().items(), *model.named_buffers()):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise SaesubError(
                f"the weight {name} is on the meta device and holds no values: load the model "
                "whole, without offloading"
            )
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if place in seen:  # tied to one that was hashed
            continue
        seen.add(place)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return memoryview(plain.numpy())  # pyright: ignore[reportArgumentType]


def _architecture(model: TransformerBridge) -> str:
    config: Any = model.original_model.config
    parts = [{k: v for k, v in config.to_dict().items() if k not in _OF_NO_EFFECT}]
    parts += [{"compatibility_mode": model.compatibility_mode}]
    parts += [{name: type(part).__qualname__ for name, part in model.named_modules()}]
    modules = dict(model.original_model.named_modules())
    met: _Met = {}
    for part in (*modules.values(), *model.modules()):
        met.setdefault(id(part), (len(met), part))
    parts += [{name: _own_values(part, met) for name, part in modules.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _own_values(module: nn.Module, met: _Met) -> dict[str, str]:
    """What a module holds beside weights, and modules in it; of a library's module its numbers,
    texts and switches. `met` has the model's modules, which are described by themselves."""
    held = {k: v for k, v in vars(module).items() if k not in _EVERY_MODULES}
    if type(module).__module__.startswith("transformer_lens."):
        return {}  # of the bridge, which keeps count there
    if of_library(type(module)):
        plain = (bool, int, float, str, np.generic)
        held = {k: v for k, v in held.items() if isinstance(v, plain) and not k.endswith("_cached")}
    return {k: _described(v, met) for k, v in held.items()}


def _described(value: Any, met: _Met) -> str:
    """A text that two processes make alike: of the libraries' functions and objects their name, of
    all else what it holds, once: what was met before is told by its number."""
    if isinstance(value, (str, int, float, complex, bool, type(None), np.generic)):
        return repr(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Tensor):
        return hashlib.sha256(_bytes_of(value)).hexdigest()
    if isinstance(value, np.ndarray) and value.dtype != object:
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"{value.dtype} {value.shape} {content}"
    name = str(getattr(value, "__qualname__", type(value).__qualname__))
    if id(value) in met:
        return f"{name} {met[id(value)][0]}"
    if not isinstance(value, (tuple, frozenset, CodeType)):  # those that processes share or not
        met[id(value)] = len(met), value
    if isinstance(value, dict):
        parts = [part for k, v in value.items() for part in (str(k), _described(v, met))]
    elif isinstance(value, (list, tuple, np.ndarray)):
        parts = [_described(v, met) for v in value]
    elif isinstance(value, (set, frozenset)):
        parts = sorted(_described(v, met) for v in value)
    else:
        parts = [_described(v, met) for v in _held(value)]
    return hashlib.sha256(json.dumps([name, *parts]).encode()).hexdigest()


def _held(value: Any) -> Sequence[Any]:
    """What decides how a function or an object acts; nothing where its name says it."""
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, CodeType):
        return value.co_code, value.co_consts, value.co_names
    if isinstance(value, nn.Module):  # no submodule, or it were among those met
        return [vars(value)]
    if isinstance(value, type) or of_library(value) or of_library(type(value)):
        return ()
    if isinstance(value, FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if c != CellType()]
        return value.__code__, value.__defaults__, value.__kwdefaults__, cells
    return [vars(value)] if hasattr(value, "__dict__") else ()


def _tokenizer(tokenizer: Any, specials: ContextTokens) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())
        for of_last_call in ("padding", "truncation"):
            described.pop(of_last_call, None)
    else:
        described = [tokenizer.get_vocab(), tokenizer(_PROBE).input_ids]
    parts = [type(tokenizer).__qualname__, described, tokenizer.special_tokens_map, specials]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


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
    """The names of the modules that someone hooked, with a mark that no other call has."""
    names = hooked_modules(model)
    return f"{', '.join(names)} (call {secrets.token_hex(8)})" if names else "none"


def hooked_modules(model: TransformerBridge) -> list[str]:
    """The names of the modules with which a function runs that is not of the libraries."""
    modules = {id(m): (name, m) for name, m in model.original_model.named_modules()}
    modules |= {id(m): (name, m) for name, m in model.named_modules()}
    names = sorted(name or "the model" for name, module in modules.values() if _is_hooked(module))
    names += ["every module"] if _of_users(nn.modules.module._global_forward_hooks) else []
    names += ["every input"] if _of_users(nn.modules.module._global_forward_pre_hooks) else []
    return names


def _is_hooked(module: nn.Module) -> bool:
    """Whether a function that is not of the libraries themselves runs with the module."""
    if isinstance(module, HookPoint):
        return any(not of_library(handle.user_hook) for handle in module.fwd_hooks)
    own = vars(module)
    replaced = "forward" in own and not of_library(own["forward"])
    # As by Conv1D.forward = ..., for all modules of a class
    replaced |= of_library(type(module)) and not of_library(type(module).forward)
    return replaced or _of_users(own["_forward_hooks"]) or _of_users(own["_forward_pre_hooks"])


def _of_users(hooks: dict[int, Callable[..., Any]]) -> bool:
    return any(not of_library(hook) for hook in hooks.values())


def of_library(function: Any) -> bool:
    """Whether a function or a class is of the libraries that models are made of."""
    return (getattr(function, "__module__", None) or "").startswith(_LIBRARIES)
