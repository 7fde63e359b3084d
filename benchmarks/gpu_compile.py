"""Compiles every Triton kernel that is launched, without a GPU, and prints what it takes.

    python benchmarks/gpu_compile.py                (sm_90 and the other architectures of ptxas)
    python benchmarks/gpu_compile.py --targets 90

It fails where a kernel does not compile for an H100, spills registers there (more than
`MOST_SPILLED`) or wants more shared memory than it has. Each architecture is
listed with the tiles and types that it launches; others than an H100's are reported only. Every
launched kernel needs an `Entry` in `entries`; one without makes the script fail.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "saesub" / "topk"
MUST_FIT = 90
MOST_SPILLED = 0  # bytes a thread
# Bytes of shared memory that a program may have, by compute capability (CUDA programming guide).
_K = 32
_FLOAT8 = 89  # the least capability that has it
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@dataclass(frozen=True)
class Entry:
    """One way in which a kernel is launched.

    Attributes:
        kernel: module and name, as "triton_kernels.decode".
        types: a type, and the names of the arguments that have it, parted by spaces: "*fp32" and
            "*i64" are pointers (aligned to 16 bytes), "fp32" and "i32" numbers, "i32:16" a number
            that 16 divides, "tensordesc<bf16[128, 64]>" a descriptor of blocks of that shape.
        constants: of the kernel's constexpr arguments, None for arguments that are None; also
            `num_warps` and `num_stages`, as they are given to the launch.
    """

    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The kernel, its few bits if any, and its constants that differ from launch to launch."""
        few_bits = sorted(set(re.findall("fp16|fp8e4nv", " ".join(self.types))))
        constants = [f"{k}={v}" for k, v in self.constants.items()]
        return f"{self.kernel}({', '.join(few_bits + constants)})"


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers a thread, bytes a thread on the stack (spills) and in
    local memory, by cuobjdump; and the bytes of shared memory that a launch asks for."""

    registers: int
    stack: int
    local: int
    shared: int


@cache
def entries(capability: int) -> tuple[Entry, ...]:
    """Every kernel that a card launches, at the widths 576 and 4,096, with the constants that the
    backend would give."""
    found = []
    for d in (576, 4096):
        found += _row_kernels(d)
        for bits in _few_bits(capability):
            found += [*_shadow_kernels(d, bits), *_search_kernels(d, bits, capability)]
    return tuple(found)


def _few_bits(capability: int) -> list[str]:
    """The types of shadows that a card has, by Triton's names."""
    return ["fp16", "fp8e4nv"] if capability >= _FLOAT8 else ["fp16"]


def _dtype(bits: str) -> Any:
    import torch

    return {"fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn}[bits]


_SORTED = {
    "*i32": "start part",
    "*i64": "token",
    "*fp32": "g_pre value x g_out enc_parts dec_parts",
}
_TABLES = "enc enc_m enc_v dec dec_m dec_v bias bias_m bias_v factors keep"


def _row_kernels(d: int) -> Iterator[Entry]:
    """Those that touch no shadow."""
    from saesub.topk import triton_backend, triton_launch

    one, both = triton_launch.row_shape(d), _update_shape(d)
    arrays = {"*i64": "features offsets", "*fp32": "vectors table products"}
    yield Entry("triton_kernels.row_products", arrays, one)
    arrays = "values W_dec target x_hat g_out g_pre squared_error b_dec"
    types = {"*i64": "features offsets", "*fp32": arrays, "fp32": "scale"}
    yield Entry("triton_kernels.decode", types, one)
    types = {"*i32": "valid feature", "*fp32": "g_pre W_enc sums"}
    segment = {"SEGMENT": triton_backend._ENTRIES_PER_SUM}
    yield Entry("triton_kernels.through_encoder", types, one | segment)
    types = _with(_SORTED, {"*i32": "owner", "i32:16": "d_sae"})
    yield Entry("triton_kernels.segment_sums", types, both)
    types = _with(_SORTED, {"*i32": "touched", "*fp32": "squares", "i32:16": "d_sae"})
    yield Entry("triton_kernels.row_norms", types, both)
    none = {"shadow": None, "norms": None, "stale": None, "WIDTH": 0, "LIMIT": 0}
    for lazy in (True, False):
        yield Entry("triton_kernels.adam_rows", _update_types(), {"LAZY": lazy} | both | none)


def _update_types() -> dict[str, str]:
    update = {"*i32": "touched", "i32:16": "d_sae", "*fp32": _TABLES}
    return _with(_SORTED, update, {"fp32": "one_less1 one_less2 eps factor"})


def _update_shape(d: int) -> dict[str, Any]:
    from saesub.topk import triton_backend, triton_launch

    both = triton_launch.row_shapes(d, d)
    return both | {
        "ENTRIES": triton_launch.rows_at_once(both),
        "SEGMENT": triton_backend._SEGMENT,
    }


def _shadow_kernels(d: int, bits: str) -> Iterator[Entry]:
    """Those that write a shadow of this type."""
    from saesub.topk import shadow, triton_launch

    kept = {"WIDTH": d, "LIMIT": shadow._LIMITS[_dtype(bits)]}
    shared = {"*i32": "stale", "*fp32": "norms", f"*{bits}": "shadow"}
    types = _with(shared, {"i32": "first_feature", "*fp32": "enc dec", "fp32": "factor"})
    yield Entry("triton_kernels.write_shadow", types, triton_launch.row_shapes(d, d) | kept)
    for lazy in (True, False):
        constants = {"LAZY": lazy} | _update_shape(d) | kept
        yield Entry("triton_kernels.adam_rows", _with(_update_types(), shared), constants)


def _search_kernels(d: int, bits: str, capability: int) -> Iterator[Entry]:
    from saesub.topk import maxima, shadow, triton_launch

    numbers = {"*fp32": "bias scale", "i32": "n", "i32:16": "d_sae", "*bf16": "maxima"}
    for tiles in maxima.tiles_for(divmod(capability, 10)):
        blocks = {
            f"tensordesc<{bits}[{tiles.tokens}, {tiles.numbers}]>": "tokens",
            f"tensordesc<{bits}[{tiles.features}, {tiles.numbers}]>": "features",
        }
        if tiles.tokens == tiles.features:
            blocks = {next(iter(blocks)): "tokens features"}
        constants = {"WIDTH": d, "BM": tiles.tokens, "BN": tiles.features, "BK": tiles.numbers}
        constants |= {"STRIDE": maxima.STRIDE, "MEMBERS": maxima.MEMBERS, "FLATTEN": tiles.flatten}
        constants |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
        yield Entry("triton_search_kernels.group_maxima", _with(numbers, blocks), constants)
    types = {f"*{bits}": "tokens features", "*fp32": "bias scale scores", "*i32": "groups ids"}
    constants = {"WIDTH": d, "BLOCK": triton_launch.block_of(d), "STRIDE": maxima.STRIDE}
    constants |= {"MEMBERS": maxima.MEMBERS, "GROUPS": shadow.width_of(_K, _dtype(bits))}
    constants["PER_PROGRAM"] = shadow._MEMBERS_PER_PROGRAM
    constants["ENTRIES"] = shadow._MEMBERS_AT_ONCE
    yield Entry("triton_search_kernels.member_scores", types | {"i32:16": "d_sae"}, constants)


def _with(*types: Mapping[str, str]) -> dict[str, str]:
    """The names of all of them, by type."""
    kinds = dict.fromkeys(kind for part in types for kind in part)
    return {kind: " ".join(part.get(kind, "") for part in types) for kind in kinds}


def launched() -> set[str]:
    """Every kernel that no other kernel calls, as "module.name", read from the code."""
    kernels, called = set(), set()
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list)):
                kernels.add((path.stem, node.name))
                calls = (call.func for call in ast.walk(node) if isinstance(call, ast.Call))
                called |= {f.id for f in calls if isinstance(f, ast.Name)}
    return {f"{module}.{name}" for module, name in kernels if name not in called}


def _is_jit(decorator: ast.expr) -> bool:
    """Whether a function decorated so is one of Triton's, `triton.jit` or what takes one."""
    return any("jit" in (getattr(n, "attr", ""), getattr(n, "id", "")) for n in ast.walk(decorator))


def compiled(entry: Entry, capability: int) -> Usage:
    """Compile for one compute capability. Raises Triton's errors where that is impossible."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = entry.kernel.split(".")
    kernel = getattr(importlib.import_module(f"saesub.topk.{module}"), name)
    constants = dict(entry.constants)
    given = {n: constants.pop(n) for n in ("num_warps", "num_stages") if n in constants}
    signature, aligned = _signature(kernel.arg_names, entry.types, constants)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=given)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return Usage(*_registers(binary.asm["cubin"], tool), binary.metadata.shared)


def _signature(
    arguments: list[str], types: Mapping[str, str], constants: Mapping[str, Any]
) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
    """The type of every argument, and which pointers and numbers 16 divides."""
    given = {name: kind for kind, names in types.items() for name in names.split()}
    given |= dict.fromkeys(constants, "constexpr")
    if set(given) != set(arguments):
        raise ValueError(f"its entry has other arguments: {sorted(set(given) ^ set(arguments))}")
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(arguments)
        if given[name].startswith("*") or given[name].endswith(":16")
    }
    return {name: given[name].removesuffix(":16") for name in arguments}, aligned


def _registers(cubin: bytes, tool: Path) -> tuple[int, int, int]:
    """Registers, stack and local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ask = [str(tool), "--dump-resource-usage", file.name]
        told = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", told)
    if found is None:
        raise ValueError(f"cuobjdump tells nothing of registers: {told.strip()[-200:]}")
    return int(found[1]), int(found[2]), int(found[3])


def fault(usage: Usage, capability: int) -> str | None:
    """What is wrong with a compiled kernel."""
    found = []
    if (spilled := usage.stack + usage.local) > MOST_SPILLED:
        found.append(f"spills {spilled} bytes a thread")
    if usage.shared > SHARED[capability]:
        found.append(f"wants {usage.shared:,} bytes of shared memory of {SHARED[capability]:,}")
    return ", ".join(found) or None


def report(capabilities: list[int]) -> list[str]:
    """Print a table a card, and return what is wrong for an H100, and kernels without an entry."""
    listed = {entry.kernel for entry in entries(MUST_FIT)}
    wrong = [
        f"{kernel} has no entry in benchmarks/gpu_compile.py" for kernel in launched() - listed
    ]
    for capability in capabilities:
        print(f"sm_{capability}")
        for entry in entries(capability):
            said, told = _line(entry, capability)
            print(f"  {entry.name}\n    {told}", flush=True)
            if said and capability == MUST_FIT:
                wrong.append(f"{entry.name} for sm_{capability}: {said}")
    return wrong


def _line(entry: Entry, capability: int) -> tuple[str | None, str]:
    """What is wrong, if anything; and the line of the table."""
    try:
        u = compiled(entry, capability)
    except Exception as error:  # Triton's compiler raises many kinds
        said = f"does not compile: {type(error).__name__}: {str(error).strip()[-200:]}"
        return said, said
    said = fault(u, capability)
    return said, f"{u.registers} registers, {u.shared:,} bytes of shared memory: {said or 'fits'}"


def main(arguments: list[str] | None = None) -> int:
    """0 if every kernel fits an H100."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--targets", nargs="+", type=int, choices=SHARED, default=[*SHARED])
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed: pip install triton")
    wrong = report(options.targets)
    for line in wrong:
        print(line, file=sys.stderr)
    print(closing(options.targets, len(wrong)))
    return 1 if wrong else 0


def closing(capabilities: list[int], n_wrong: int) -> str:
    """The last line."""
    said = "not asked for"
    if MUST_FIT in capabilities:
        said = "all kernels fit" if n_wrong == 0 else "not all kernels fit"
    return f"sm_{MUST_FIT}: {said}; others are reported only"


if __name__ == "__main__":
    sys.exit(main())
