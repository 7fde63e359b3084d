"""What the stages share: where files lie, whether this is a rehearsal, time, results as JSON."""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LOAD = Path(os.environ.get("GPU_LOAD") or HERE / "load")
REHEARSAL = os.environ.get("GPU_REHEARSAL") == "1"
OUT = Path(os.environ.get("OUT") or ("out-rehearsal" if REHEARSAL else "out"))
_PACKAGES = ("torch", "triton", "transformers", "sae-lens", "transformer-lens", "numpy")
_MOST_LINES = 30


class Clock:
    """The seconds that a stage may take, from its start on."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._start = seconds, time.monotonic()

    @property
    def left(self) -> float:
        return self.seconds - self.used

    @property
    def used(self) -> float:
        return time.monotonic() - self._start


def part(description: str | None, choices: Iterable[str], default: str | None = None) -> str:
    """The part of a stage that the command line names."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    optional: dict[str, Any] = {} if default is None else {"nargs": "?", "default": default}
    parser.add_argument("part", choices=list(choices), **optional)
    return parser.parse_args().part


def seconds(default: float) -> float:
    """The stage's time limit, `GPU_SECONDS`, which `run.sh` sets a little below its own."""
    return float(os.environ.get("GPU_SECONDS") or default)


def device() -> str:
    """The card, or in a rehearsal the CPU. Raises SystemExit without a card."""
    import torch

    if REHEARSAL:
        return "cpu"
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here: set GPU_REHEARSAL=1 to rehearse on the CPU")
    return "cuda"


def facts() -> dict[str, Any]:
    """What ran where: card, driver, versions, date, and a digest of the code."""
    import torch

    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "card": "none (rehearsal)",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "code": code_digest(),
        "rehearsal": REHEARSAL,
    }
    if torch.cuda.is_available() and not REHEARSAL:
        card = torch.cuda.get_device_properties(0)
        found |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_bytes": card.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _driver() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def code_digest() -> str:
    """A hash of saesub's code and the kit's, so that a record names the commit that ran."""
    digest = hashlib.sha256()
    files = [
        *(ROOT / "saesub").rglob("*.py"),
        *(ROOT / "saesub").rglob("*.cpp"),
        *HERE.glob("*.py"),
    ]
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Results:
    """The results of a stage in `$OUT/<name>.json`, written anew after each.

    Those that earlier processes left there are kept, if they ran the same code on the same card;
    else they are dropped, and `files` of `$OUT`, which belong to them, are deleted.

    Attributes:
        failed: the names of what failed in this process.
    """

    def __init__(self, name: str, files: Iterable[str] = ()) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        self.path = OUT / f"{name}.json"
        self.failed: list[str] = []
        self.content: dict[str, Any] = {"facts": facts(), "results": {}}
        before = json.loads(self.path.read_text()) if self.path.is_file() else None
        if before is not None and self._is_own(before["facts"]):
            self.content["results"] = before["results"]
        else:
            for file in files:
                (OUT / file).unlink(missing_ok=True)
        self._write()

    def _is_own(self, facts: dict[str, Any]) -> bool:
        own = self.content["facts"]
        return all(facts[key] == own[key] for key in ("code", "card", "rehearsal"))

    @property
    def status(self) -> int:
        """What the stage's process ends with: 1 if something failed."""
        return 1 if self.failed else 0

    def add(self, name: str, result: Any) -> None:
        self.content["results"][name] = result
        self._write()

    def attempt(self, name: str, do: Callable[[], Any]) -> Any:
        """What `do` returns, kept under `name`; its error in place of it, and None, if it fails."""
        start = time.monotonic()
        print(f"--- {name}", flush=True)
        try:
            result = do()
        except Exception as error:
            lines = traceback.format_exc().splitlines()[-_MOST_LINES:]
            print("\n".join(lines), flush=True)
            kind = type(error).__name__
            self.failed.append(name)
            self.add(name, {"error": kind, "message": str(error)[:2000], "trace": lines})
            result = None
        else:
            self.add(name, result)
            print(json.dumps(result, default=str)[:2000], flush=True)
        free()
        print(f"    {time.monotonic() - start:.1f} s", flush=True)
        return result

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1, default=str))
        partial.replace(self.path)


def free() -> None:
    """Give back what failed attempts held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
