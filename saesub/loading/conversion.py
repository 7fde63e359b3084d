"""Turns a packaged GGUF file into a Hugging Face folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from saesub.loading.download import fetch, require_disk
from saesub.loading.registry import Packaged
from saesub.paths import source_digest


def conversion_key(entry: Packaged, *code: str) -> str:
    """Eight characters that change with whatever decides a converted folder: the files, the
    registry's settings, the `code` of saesub that converts, and transformers, which reads them."""
    parts = (
        entry.digest,
        repr(sorted(entry.details.items())),
        source_digest(*code),
        transformers.__version__,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def convert(entry: Packaged, folder: Path) -> None:
    """Writes a GGUF file as a Hugging Face folder."""
    source, gguf = fetch(entry.name), entry.files[0].name
    require_disk(folder, 6 * entry.files[0].size, f"converting {entry.name}")
    with quiet(progress=True):
        config = AutoConfig.from_pretrained(source, gguf_file=gguf)
        hf_model: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf, config=config, dtype="float32"
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    # The weights are plain float32 by now, but still bear the mark of the quantised file.
    hf_model.hf_quantizer = None
    del hf_model.config.quantization_config
    hf_model.save_pretrained(folder)
    tokenizer.add_bos_token = entry.details["bos"]
    tokenizer.save_pretrained(folder)


@contextmanager
def quiet(progress: bool = False) -> Iterator[None]:
    """Silences transformers within: its advice is for people who train and generate."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if not progress:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
