"""The functions of cpu.cpp, compiled on first use for the processor that is there.

Without a C++ compiler there are none. Setting SAESUB_NATIVE=0 turns them off, and
SAESUB_NATIVE_ISA=avx2 leaves out what newer x86 processors have.
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

TOKENS_PER_BLOCK, FEATURES_PER_BLOCK, FEATURES_PER_TILE = 32, 128, 64
COORDINATES = 8  # vectors in 8 bits are padded to a multiple of this many
DEVIATIONS = 4  # half-width of the bounds, in standard deviations of the rounding error
_SOURCE = Path(__file__).with_name("cpu.cpp")
_LIBRARY = "native.so"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None if they cannot be built, with one warning."""
    if os.environ.get("SAESUB_NATIVE") == "0":
        return None
    if (isa := os.environ.get("SAESUB_NATIVE_ISA") or "avx2") != "avx2":
        raise SaesubError(
            f"SAESUB_NATIVE_ISA={isa} is not what the compiled functions can be held to: set it "
            "to avx2, or unset it."
        )
    try:
        found = ctypes.CDLL(str(_built()))
    except (OSError, SaesubError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"saesub trains by torch operators alone, at half the speed or less, because its C++ "
            f"functions were not built ({reason.strip()[-300:]}). Install a C++ compiler (g++ or "
            "clang++), or set SAESUB_NATIVE=0 to silence this warning.",
            stacklevel=2,
        )
        return None
    found.saesub_instructions.restype = ctypes.c_char_p
    return found


def instructions() -> str:
    """By what the compiled functions multiply in 8 bits: avx512vnni, avxvnni, avx2 or neon; empty
    where there is none of these, or no library."""
    lib = library()
    return "" if lib is None else lib.saesub_instructions().decode()


def n_steps() -> int:
    """Steps of their 8 or 7 bits, either side of zero."""
    lib = library()
    return 0 if lib is None else lib.saesub_steps()


def offset() -> int:
    """What they add to a weight to make it unsigned."""
    lib = library()
    return 0 if lib is None else lib.saesub_offset()


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library; a tensor or None is passed as a pointer, an int as int64.

    Raises MemoryError if there is not enough memory.
    """
    lib = library()
    if lib is None:
        raise RuntimeError("saesub has no compiled library here: ask library() first")
    if getattr(lib, f"saesub_{name}")(*map(_as_c, arguments)):
        raise MemoryError(f"no memory left in saesub's compiled {name}: train on smaller batches")


def _as_c(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """On the CPU, whatever the user's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def threads() -> int:
    """How many threads a function may use."""
    return torch.get_num_threads()


def _built() -> Path:
    """The shared library for this source, compiler and processor, compiled if it is not there."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler was found")
    command = [*shlex.split(compiler), *_flags(), str(_SOURCE)]
    sources = [path.read_bytes() for path in (_SOURCE, *sorted(_SOURCE.parent.glob("cpu_*.h")))]
    key = [*sources, " ".join(command[:-1]).encode(), _processor()]
    name = hashlib.sha256(b"\0".join(key)).hexdigest()[:16]

    def compile_into(folder: Path) -> None:
        output = ["-o", str(folder / _LIBRARY)]
        subprocess.run([*command, *output], check=True, capture_output=True, text=True, timeout=300)

    return made_once(cache_dir() / "native" / name, compile_into) / _LIBRARY


def _flags() -> list[str]:
    tuned = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    if os.environ.get("SAESUB_NATIVE_ISA") == "avx2":
        tuned = "-march=x86-64-v3"
    sizes = {
        "TOKENS_PER_BLOCK": TOKENS_PER_BLOCK,
        "FEATURES_PER_BLOCK": FEATURES_PER_BLOCK,
        "FEATURES_PER_TILE": FEATURES_PER_TILE,
        "COORDINATES": COORDINATES,
        "DEVIATIONS": DEVIATIONS,
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
