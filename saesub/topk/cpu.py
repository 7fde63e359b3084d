"""The functions of cpu.cpp on CPU tensors: compiled on first use, absent without a compiler.

They are the `RowBackend` of `saesub.topk.step` there. Setting SAESUB_NATIVE=0 turns them off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesub.errors import SaesubError
from saesub.paths import cache_dir, made_once
from saesub.topk import backend
from saesub.topk.backend import AdamSettings, Decoded, check_shapes
from saesub.topk.ops import LEAST_FEATURES_PER_K, Search, Selected, dense_search

_SOURCE = Path(__file__).with_name("cpu.cpp")
_LIBRARY = "native.so"
_TOKENS_PER_BLOCK, _FEATURES_PER_BLOCK, _FEATURES_PER_TILE = 32, 128, 64

exact_search: Search = dense_search


class _AdamStruct(ctypes.Structure):
    """The struct AdamSettings of cpu.cpp."""

    _fields_ = [
        ("lr", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("step", ctypes.c_int64),
        ("lazy", ctypes.c_int64),
        ("clip", ctypes.c_double),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had (which is said once)."""
    if os.environ.get("SAESUB_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, SaesubError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"saesub trains on torch operators alone, at half the speed it could or less: its C++ "
            f"functions were not built ({reason.strip()[-300:]}). Install a C++ compiler (g++ or "
            "clang++), or set SAESUB_NATIVE=0 to be rid of this message.",
            stacklevel=2,
        )
        return None


def has_int8_search() -> bool:
    """Whether `search` works in 8 bits here: the processor needs AVX-512 VNNI."""
    lib = library()
    return lib is not None and bool(lib.saesub_has_int8_search())


@torch.no_grad()
def search(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    feature_scale: Float[Tensor, " d_sae"] | None = None,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """`dense_search` at a few times its speed, for a `W_enc` that lies feature-major in memory.

    Products in 8 bits with bounds on their rounding error leave some tens of candidates a token,
    which are then ranked in float32. The bounds are four standard deviations wide on either side,
    for errors without direction; tokens whose rounding error has one (a massive coordinate takes
    the range for itself) or that have too many candidates are ranked by the whole product.
    """
    (n, d), d_sae = x.shape, W_enc.shape[1]
    check_shapes(x, (n, d), W_enc, (d, d_sae), b_enc, (d_sae,), feature_scale, (d_sae,))
    if d_sae < LEAST_FEATURES_PER_K * k or not has_int8_search():
        return dense_search(x, W_enc, b_enc, k, feature_scale)
    padded = -(-d_sae // _FEATURES_PER_TILE) * _FEATURES_PER_TILE
    weights, table = _empty(padded * -(-d // 4) * 4, dtype=torch.uint8), _empty(4, padded)
    features, pre = _empty(n, k, dtype=torch.int64), _empty(n, k)
    failed = _empty(n, dtype=torch.bool)
    dictionary = [_pointer(W_enc.T), _pointer(b_enc), _pointer(feature_scale)]
    packed = [_pointer(weights, torch.uint8), _pointer(table)]
    _call("pack", *dictionary, d, d_sae, *packed, torch.get_num_threads())
    if not bool(table[:, :d_sae].isfinite().all()):
        return dense_search(x, W_enc, b_enc, k, feature_scale)  # shows NaN and Inf as they are
    found = [_pointer(features, torch.int64), _pointer(pre), _pointer(failed, torch.bool)]
    threads = torch.get_num_threads()
    _call("search", _pointer(x), *dictionary, *packed, n, d, d_sae, k, *found, threads)
    if bool(failed.any()):
        features[failed], pre[failed] = dense_search(x[failed], W_enc, b_enc, k, feature_scale)
    return features, pre


def decode(
    selected: Selected,
    values: Float[Tensor, " m"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None,
    target: Float[Tensor, "n d_out"],
    weight: float,
) -> Decoded:
    """Reconstruct, and differentiate `weight * sum of (x_hat - target)²`; one read of each row."""
    (n, d), m = target.shape, len(values)
    check_shapes(W_dec, (len(W_dec), d), b_dec, (d,), selected.features, (m,))
    check_shapes(selected.offsets, (n + 1,))
    x_hat, g_out, g_pre = _empty(n, d), _empty(n, d), _empty(m)
    sums = _empty(-(-n // _TOKENS_PER_BLOCK), d + 1)
    _call(
        "decode",
        *(_pointer(t, torch.int64) for t in (selected.features, selected.offsets)),
        *(_pointer(t) for t in (values, W_dec, b_dec, target)),
        n,
        d,
        ctypes.c_float(2 * weight),
        *(_pointer(t) for t in (x_hat, g_out, g_pre, sums)),
        torch.get_num_threads(),
    )
    total = sums.sum(0, dtype=torch.float64)
    squared_error = (total[-1] / (2 * weight) ** 2).float()
    return Decoded(x_hat, g_out, g_pre, total[:-1].float(), squared_error)


class RowGradients(backend.RowGradients):
    """The entries in CPU memory, as cpu.cpp takes them."""

    def norms(
        self, W_enc: Float[Tensor, "d_in d_sae"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " d_in"]]:
        """Squared norm of all gradients, float64; and `W_enc @ gradient of b_enc`."""
        check_shapes(W_enc, (self.x.shape[1], self.d_sae))
        blocks = -(-self.d_sae // _FEATURES_PER_BLOCK)
        squares, through = _empty(blocks, dtype=torch.float64), _empty(blocks, self.x.shape[1])
        _call(
            "row_norms",
            *self._pointers(),
            _pointer(W_enc.T),
            *self._sizes(),
            _pointer(squares, torch.float64),
            _pointer(through),
            torch.get_num_threads(),
        )
        return squares.sum(), through.sum(0)

    def adam(
        self,
        settings: AdamSettings,
        step: Float[Tensor, ""],
        clip: Float[Tensor, ""],
        *tensors: Tensor,
        moved: Int[Tensor, " d_sae"] | None,
    ) -> None:
        """One update, as `backend.RowGradients` describes it."""
        self.check_parameters(tensors)
        s, lazy = settings, moved is not None
        passed = _AdamStruct(s.lr, s.beta1, s.beta2, s.eps, int(step), lazy, float(clip))
        _call(
            "adam_rows",
            *self._pointers(),
            *self._sizes(),
            ctypes.byref(passed),
            *(_pointer(t) for t in tensors),
            _pointer(moved, torch.int64),
            torch.get_num_threads(),
        )

    def _pointers(self) -> list[ctypes.c_void_p]:
        ids = [_pointer(t, torch.int64) for t in (self.start, self.token)]
        return ids + [_pointer(t) for t in (self.g_pre, self.value, self.x, self.g_out)]

    def _sizes(self) -> list[int]:
        return [self.x.shape[1], self.g_out.shape[1], self.d_sae]


def row_gradients(
    features: Int[Tensor, " m"],
    tokens: Int[Tensor, " m"],
    values: Float[Tensor, " m"],
    g_pre: Float[Tensor, " m"],
    x: Float[Tensor, "n d_in"],
    g_out: Float[Tensor, "n d_out"],
    d_sae: int,
) -> RowGradients:
    """Sort entries by feature; those of value zero have no gradient and are left out."""
    m = len(features)
    check_shapes(tokens, (m,), values, (m,), g_pre, (m,), g_out, (len(x), g_out.shape[1]))
    start, token = _empty(d_sae + 1, dtype=torch.int64), _empty(m, dtype=torch.int64)
    sorted_g_pre, sorted_value = _empty(m), _empty(m)
    _call(
        "sort",
        *(_pointer(t, torch.int64) for t in (features, tokens)),
        *(_pointer(t) for t in (values, g_pre)),
        m,
        d_sae,
        *(_pointer(t, torch.int64) for t in (start, token)),
        *(_pointer(t) for t in (sorted_g_pre, sorted_value)),
    )
    return RowGradients(start, token, sorted_g_pre, sorted_value, x, g_out)


def _call(name: str, *arguments: Any) -> None:
    lib = library()
    if lib is None:
        raise RuntimeError("saesub.topk.cpu has no compiled library here: ask library() first")
    passed = [ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments]
    if getattr(lib, f"saesub_{name}")(*passed):
        raise MemoryError(f"no memory left in saesub's compiled {name}: train on smaller batches")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the user's defaults are


def _pointer(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> ctypes.c_void_p:
    if tensor is None:
        return ctypes.c_void_p(None)
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise TypeError(
            f"a contiguous {dtype} tensor on the CPU is wanted, not {tensor.dtype} on "
            f"{tensor.device} with strides {tensor.stride()}"
        )
    return ctypes.c_void_p(tensor.data_ptr())


def _built() -> Path:
    """The shared library for this source, compiler and processor, compiled if need be."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler was found")
    command = [*shlex.split(compiler), *_flags(), str(_SOURCE)]
    key = [_SOURCE.read_bytes(), " ".join(command[:-1]).encode(), _processor()]
    name = hashlib.sha256(b"\0".join(key)).hexdigest()[:16]

    def compile_into(folder: Path) -> None:
        output = ["-o", str(folder / _LIBRARY)]
        subprocess.run([*command, *output], check=True, capture_output=True, text=True, timeout=300)

    return made_once(cache_dir() / "native" / name, compile_into) / _LIBRARY


def _flags() -> list[str]:
    tuned = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    sizes = {
        "TOKENS_PER_BLOCK": _TOKENS_PER_BLOCK,
        "FEATURES_PER_BLOCK": _FEATURES_PER_BLOCK,
        "FEATURES_PER_TILE": _FEATURES_PER_TILE,
    }
    defined = [f"-D{name}={size}" for name, size in sizes.items()]
    maths = ["-fno-math-errno", "-fno-trapping-math"]
    return ["-O3", tuned, *maths, "-std=c++17", "-shared", "-fPIC", "-pthread", *defined]


def _processor() -> bytes:
    """What `-march=native` depends on: a home folder may be shared by different machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    about = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return (platform.machine() + "".join(sorted(about)) + platform.processor()).encode()
