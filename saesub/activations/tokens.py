"""Fixed-length contexts cut from a corpus, and which of their positions are ordinary text."""

from __future__ import annotations

import warnings

import torch
from datasets import Dataset
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saesub.errors import SaesubError
from saesub.loading.corpora import Corpus, load_corpus
from saesub.loading.models import Model, context_tokens, load_model

_DOCUMENTS_AT_ONCE = 256


class ContextStream:
    """Contexts of `context_size` tokens, cut from the corpus's documents joined by the separator.

    Each context starts with BOS if the model was trained with one. Documents are tokenised only as
    they are needed; when the corpus runs out it starts over, with a warning, and `epochs` says how
    often it was read. Raises SaesubError for a context longer than the model's, or a corpus shorter
    than one.
    """

    def __init__(self, model: TransformerBridge, corpus: Dataset, context_size: int) -> None:
        limit = model.cfg.n_ctx
        if not 2 <= context_size <= limit:
            raise SaesubError(f"context_size must lie in 2..{limit} for this model: {context_size}")
        self.context_size = context_size
        self._specials = context_tokens(model)
        self._tokenizer = model.tokenizer
        self.corpus = corpus
        self._next = self._read = self._tokens = 0
        self._buffer: list[int] = []

    @property
    def epochs(self) -> float:
        """Passes over the corpus's documents so far."""
        return self._read / len(self.corpus)

    def take(self, n: int) -> Int[Tensor, "n context_size"]:
        """The next `n` contexts, int64."""
        bos = [] if self._specials.bos_id is None else [self._specials.bos_id]
        body = self.context_size - len(bos)
        while len(self._buffer) < n * body:
            self._read_documents(body)
        used, self._buffer = self._buffer[: n * body], self._buffer[n * body :]
        text = torch.tensor(used, dtype=torch.int64).view(n, body)
        return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(n, -1), text], dim=1)

    def _read_documents(self, body: int) -> None:
        if self._next >= len(self.corpus):
            if self._tokens < body:
                raise SaesubError(
                    f"the corpus holds {self._tokens} tokens, fewer than one context needs "
                    f"({body}): give a larger corpus or a smaller context_size"
                )
            if self._read == len(self.corpus):
                warnings.warn(
                    f"the corpus ends after {self._tokens:,} tokens and is read again: rows repeat "
                    "from there on; give a larger corpus, or ask for fewer tokens",
                    stacklevel=2,
                )
            self._next = 0
        texts = self.corpus[self._next : self._next + _DOCUMENTS_AT_ONCE]["text"]
        self._next, self._read = self._next + len(texts), self._read + len(texts)
        separator = self._specials.separator_id
        tail = [] if separator is None else [separator]
        for ids in self._tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids:
            self._buffer += ids + tail
            self._tokens += len(ids) + len(tail)


def pack_contexts(
    model: Model, corpus: Corpus, *, n_contexts: int, context_size: int
) -> Int[Tensor, "n_contexts context_size"]:
    """The first `n_contexts` contexts of a corpus; see `ContextStream`, whose errors it raises."""
    return ContextStream(load_model(model), load_corpus(corpus), context_size).take(n_contexts)


def kept_positions(
    model: TransformerBridge, tokens: Int[Tensor, "batch pos"], skip_first: int
) -> Bool[Tensor, "batch pos"]:
    """Mask (batch, pos), true where statistics are taken: not at special tokens, nor at the first
    `skip_first` positions after the BOS."""
    specials = context_tokens(model)
    kept = ~torch.isin(tokens, torch.tensor(specials.special_ids, device=tokens.device))
    kept[:, : skip_first + (specials.bos_id is not None)] = False
    return kept
