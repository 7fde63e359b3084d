"""The real model and corpus that many tests share, loaded once a session.

What only they need is imported in them, so that tests of one part run where the rest is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when others import it

import pytest

with suppress(ImportError):
    from triton import language as tl
    from triton.runtime import interpreter

    def _call(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        """As the interpreter's, but that takes half of its time to put its own functions into
        Triton's language in every call of a device function, also where they are there."""
        if any(tl.core.is_builtin(place.load) for place in (tl, tl.core)):
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = _call

if TYPE_CHECKING:
    from datasets import Dataset
    from transformer_lens.model_bridge import TransformerBridge


@pytest.fixture(scope="session")
def model() -> TransformerBridge:
    from saesub.loading.models import load_model

    return load_model("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def two_layers() -> TransformerBridge:
    """The first two layers of the same model: checks of a whole model's weights take longer."""
    from short_model import first_layers

    return first_layers(2)


@pytest.fixture(scope="session")
def corpus() -> Dataset:
    from saesub.loading.corpora import load_corpus

    return load_corpus("wiki-en")


@pytest.fixture(scope="session")
def activations(model, corpus) -> torch.Tensor:
    """(4000, 576) attention outputs of one layer."""
    from saesub.activations.collect import stream_activations

    hook = "blocks.4.hook_attn_out"
    blocks = stream_activations(model, corpus, [hook], n_tokens=4000, progress=False)
    return torch.cat([block[hook] for block in blocks])


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """saesub's wheel, built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    root = Path(__file__).resolve().parent.parent
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(root)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, *build], check=True, cwd=folder)
    (built,) = folder.glob("saesub-*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel) -> Path:
    """A folder holding saesub as installed from its wheel, and nothing else."""
    target = wheel.parent / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "install", "--no-deps", "-t", str(target), str(wheel)], check=True)
    return target
