"""Tokenizers of kinds that cut text in other ways than GPT-2's does, trained on a few words."""

from __future__ import annotations

from typing import Any

from tiny_model import tiny_texts, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """`kind` is "bytes" (GPT-2), "metaspace" (Llama), "pieces" (BERT) or "unigram" (T5)."""
    if kind == "bytes":
        return tiny_tokenizer()
    more: dict[str, Any] = {"vocab_size": 400, "show_progress": False}
    more |= {"special_tokens": ["<unk>", "<|bos|>", "<|eos|>"]}
    space = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model, trainer, cuts = {
        "metaspace": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer, space),
        "pieces": (
            models.WordPiece(unk_token="<unk>"),
            trainers.WordPieceTrainer,
            pre_tokenizers.BertPreTokenizer(),
        ),
        "unigram": (models.Unigram(), trainers.UnigramTrainer, space),
    }[kind]
    backend: Any = Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), cuts
    unknown = {"unk_token": "<unk>"} if kind == "unigram" else {}
    backend.train_from_iterator(tiny_texts(60), trainer(**more, **unknown))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>"
    )
