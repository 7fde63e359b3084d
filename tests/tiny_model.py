"""A random GPT-2 with a byte-level tokenizer, made offline in a second."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCABULARY = 512
HOOK = "blocks.1.hook_attn_out"


def tiny_texts(n: int = 300, words: int = 60) -> list[str]:
    """Texts of random words, the same in every call."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    known = ["".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(400)]
    return [" ".join(draw.choices(known, k=words)) + "." for _ in range(n)]


def tiny_tokenizer(
    bos: str | None = "<|bos|>", eos: str | None = "<|eos|>"
) -> PreTrainedTokenizerFast:
    """Its BOS, if it has one, is prepended to texts."""
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[token for token in (bos, eos) if token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(tiny_texts(), trainer)
    if bos:
        special = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=special
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def tiny_gpt2(**changes: Any) -> GPT2LMHeadModel:
    """Two layers of width 64 with four heads, the same weights in every call."""
    settings = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 64, "n_layer": 2}
    settings |= {"n_head": 4, "bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**{**settings, **changes}))
