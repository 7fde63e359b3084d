"""Notes on which GPUs the Triton kernels have passed `saesub check-gpu`.

A note holds for one model of card with the same versions of Triton and torch and the same code of
`saesub.topk`: a change of any of them asks for a new check.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from saesub.files import write_atomically
from saesub.paths import cache_dir, cache_errors, source_digest


@cache
def has_passed(device: torch.device) -> bool:
    """Whether the kernels have passed on this card, as they are now; read once in a process.

    False for other devices than CUDA, and where the note is damaged or cannot be read.
    """
    if device.type != "cuda" or not _folder().is_dir():
        return False
    with suppress(OSError, ValueError, ImportError, RecursionError):
        wanted = conditions(device)
        kept = json.loads(_note(wanted).read_text(encoding="utf-8"))
        return isinstance(kept, dict) and kept.get("conditions") == wanted
    return False


def note_passed(device: torch.device, report: dict[str, Any]) -> Path:
    """Keep a note that all checks have passed on this card, with their report; its path.

    Raises SaesubError where the cache folder cannot be written.
    """
    wanted = conditions(device)
    text = json.dumps({"conditions": wanted, "report": report}, indent=1)
    with cache_errors(_folder()):
        write_atomically(_note(wanted), text)
    has_passed.cache_clear()
    return _note(wanted)


def note_failed(device: torch.device) -> None:
    """Drop the note of an earlier check that this card had passed.

    Raises SaesubError where the cache folder cannot be written.
    """
    with cache_errors(_folder()):
        _note(conditions(device)).unlink(missing_ok=True)
    has_passed.cache_clear()


def conditions(device: torch.device) -> dict[str, str]:
    """What a note holds for: the card, its compute capability, the libraries and the kernels."""
    return {
        "card": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "triton": triton_version() or "none",
        "torch": torch.__version__,
        "kernels": source_digest("topk/"),
    }


def triton_version() -> str | None:
    """The version of Triton; None if it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return str(importlib.import_module("triton").__version__)


def _folder() -> Path:
    return cache_dir() / "gpu"


def _note(wanted: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    return _folder() / f"passed-{digest[:16]}.json"
