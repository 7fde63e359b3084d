"""The `RowBackend` on the CPU: the functions of cpu.cpp, compiled on first use.

Without a C++ compiler there are none. Setting SAESUB_NATIVE=0 turns them off.
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
from torch import Tensor

from saesub.errors import SaesubError
from saesub.paths import cache_dir, made_once
from saesub.topk import backend
from saesub.topk.backend import Decoded, RowBackend
from saesub.topk.ops import LEAST_FEATURES_PER_K, dense_search

_SOURCE = Path(__file__).with_name("cpu.cpp")
_LIBRARY = "native.so"
_TOKENS_PER_BLOCK, _FEATURES_PER_BLOCK, _FEATURES_PER_TILE = 32, 128, 64


class _AdamStruct(ctypes.Structure):
    """The struct AdamSettings of cpu.cpp."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "clip")),
        *((name, ctypes.c_int64) for name in ("step", "lazy")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None if they cannot be built, with one warning."""
    if os.environ.get("SAESUB_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, SaesubError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"saesub trains by torch operators alone, at half the speed or less, because its C++ "
            f"functions were not built ({reason.strip()[-300:]}). Install a C++ compiler (g++ or "
            "clang++), or set SAESUB_NATIVE=0 to silence this warning.",
            stacklevel=2,
        )
        return None


def has_int8_search() -> bool:
    """Whether the search works in 8 bits here: the processor needs AVX-512 VNNI."""
    lib = library()
    return lib is not None and bool(lib.saesub_has_int8_search())


class RowGradients(backend.RowGradients):
    """The entries in CPU memory."""

    def _norms(self, W_enc) -> tuple[Tensor, Tensor | None]:
        blocks = -(-self.d_sae // _FEATURES_PER_BLOCK)
        squares, through = _empty(blocks, dtype=torch.float64), _empty(blocks, self.x.shape[1])
        weights = None if W_enc is None else W_enc.T
        _call("row_norms", *self._entries(), weights, *self._sizes(), squares, through, _threads())
        return squares.sum(), None if W_enc is None else through.sum(0)

    def _adam(self, settings, step, clip, tensors, moved, shadow) -> None:
        s, lazy = settings, moved is not None
        passed = _AdamStruct(s.lr, s.beta1, s.beta2, s.eps, float(clip), int(step), lazy)
        where = [*self._entries(), *self._sizes()]
        _call("adam_rows", *where, ctypes.byref(passed), *tensors, moved, _threads())

    def _entries(self) -> list[Tensor]:
        return [self.start, self.token, self.g_pre, self.value, self.x, self.g_out]

    def _sizes(self) -> list[int]:
        return [self.x.shape[1], self.g_out.shape[1], self.d_sae]


class CpuBackend(RowBackend):
    """The functions of cpu.cpp; `library` tells whether there are any."""

    device_type = "cpu"

    def _search(self, x, W_enc, b_enc, k, feature_scale) -> tuple[Tensor, Tensor]:
        """Products in 8 bits, a few times faster than the whole product.

        Bounds on their rounding error leave some tens of candidates a token, which are then ranked
        in float32. The bounds are four standard deviations wide on either side, for errors without
        direction. Tokens whose rounding error has one (a massive coordinate takes the range for
        itself) or that have too many candidates are ranked by the whole product.
        """
        (n, d), d_sae = x.shape, W_enc.shape[1]
        if d_sae < LEAST_FEATURES_PER_K * k or not has_int8_search():
            return dense_search(x, W_enc, b_enc, k, feature_scale)
        padded = -(-d_sae // _FEATURES_PER_TILE) * _FEATURES_PER_TILE
        weights, table = _empty(padded * -(-d // 4) * 4, dtype=torch.uint8), _empty(4, padded)
        dictionary = [W_enc.T, b_enc, feature_scale]
        _call("pack", *dictionary, d, d_sae, weights, table, _threads())
        if not bool(table[:, :d_sae].isfinite().all()):
            return dense_search(x, W_enc, b_enc, k, feature_scale)  # shows NaN and Inf as they are
        features, pre = _empty(n, k, dtype=torch.int64), _empty(n, k)
        failed, sizes = _empty(n, dtype=torch.bool), [n, d, d_sae, k]
        _call("search", x, *dictionary, weights, table, *sizes, features, pre, failed, _threads())
        if bool(failed.any()):
            features[failed], pre[failed] = dense_search(x[failed], W_enc, b_enc, k, feature_scale)
        return features, pre

    def _decode(self, selected, values, W_dec, b_dec, target, weight) -> Decoded:
        """Reads each row once."""
        n, d = target.shape
        x_hat, g_out, g_pre = _empty(n, d), _empty(n, d), _empty(len(values))
        sums = _empty(-(-n // _TOKENS_PER_BLOCK), d + 1)
        given = [selected.features, selected.offsets, values, W_dec, b_dec, target]
        _call("decode", *given, n, d, 2.0 * weight, x_hat, g_out, g_pre, sums, _threads())
        total = sums.sum(0, dtype=torch.float64)
        squared_error = (total[-1] / (2 * weight) ** 2).float()
        return Decoded(x_hat, g_out, g_pre, total[:-1].float(), squared_error)

    def _row_gradients(self, features, tokens, values, g_pre, x, g_out, d_sae) -> RowGradients:
        m = len(features)
        start, token = _empty(d_sae + 1, dtype=torch.int64), _empty(m, dtype=torch.int64)
        sorted_g_pre, sorted_value = _empty(m), _empty(m)
        into = [start, token, sorted_g_pre, sorted_value]
        _call("sort", features, tokens, values, g_pre, m, d_sae, *into)
        return RowGradients(start, token, sorted_g_pre, sorted_value, x, g_out)


BACKEND = CpuBackend()


def _call(name: str, *arguments: Any) -> None:
    lib = library()
    if lib is None:
        raise RuntimeError("saesub.topk.cpu has no compiled library here: ask library() first")
    if getattr(lib, f"saesub_{name}")(*map(_as_c, arguments)):
        raise MemoryError(f"no memory left in saesub's compiled {name}: train on smaller batches")


def _as_c(argument: Any) -> Any:
    """A tensor or None as a pointer, an int as int64, a float as float."""
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the user's defaults are


def _threads() -> int:
    return torch.get_num_threads()


def _built() -> Path:
    """The shared library for this source, compiler and processor, compiled if it is not there."""
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
