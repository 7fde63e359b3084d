"""A tiny GPT-2 and tokenizers of several kinds, trained on a few words; nothing is downloaded."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

BOS, EOS = "<|bos|>", "<|eos|>"
_WORDS = random.Random(0)
VOCABULARY = [
    "".join(_WORDS.choices("abcdefghijklmnop", k=_WORDS.randint(2, 7))) for _ in range(99)
]


def texts(n: int = 60, n_words: int = 50, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(VOCABULARY, k=n_words)) + "." for _ in range(n)]


def _trained(model: Any, trainer: Any, specials: list[str], **settings: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    more: dict[str, Any] = {"vocab_size": 400, "show_progress": False}
    more |= {"special_tokens": ["<unk>", *specials]}
    tokenizer.train_from_iterator(texts(), trainer(**more))
    return tokenizer


def tokenizer(
    bos: str | None = BOS, eos: str | None = EOS, kind: str = "bytes", prepends: bool = True
) -> PreTrainedTokenizerFast:
    """`kind` is "bytes" (GPT-2), "metaspace" (Llama), "pieces" (BERT) or "unigram" (T5)."""
    specials = [token for token in (bos, eos) if token]
    space = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if kind == "bytes":
        alphabet = pre_tokenizers.ByteLevel.alphabet()

        def with_bytes(**more: Any) -> Any:
            return trainers.BpeTrainer(initial_alphabet=alphabet, **more)

        decoder = {"decoder": decoders.ByteLevel()}
        made = _trained(models.BPE(), with_bytes, specials, **decoder)
    elif kind == "metaspace":
        whole = {"normalizer": normalizers.NFKC(), "pre_tokenizer": space}
        made = _trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, specials, **whole)
    elif kind == "pieces":
        words = {"pre_tokenizer": pre_tokenizers.BertPreTokenizer()}
        model = models.WordPiece(unk_token="<unk>")
        made = _trained(model, trainers.WordPieceTrainer, specials, **words)
    else:

        def unigram(**more: Any) -> Any:
            return trainers.UnigramTrainer(unk_token="<unk>", **more)

        made = _trained(models.Unigram(), unigram, specials, pre_tokenizer=space)
    if bos and prepends:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos)


def gpt2(n_vocabulary: int = 512, **more: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=n_vocabulary, **ids, **sizes, **more))
