"""Fixed-length contexts cut from a corpus, and which of their positions are ordinary text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

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
    they are needed; when the corpus runs out it starts over, with a warning. Raises SaesubError for
    a context longer than the model's, or a corpus shorter than one context.
    """

    def __init__(self, model: TransformerBridge, corpus: Dataset, context_size: int) -> None:
        limit = model.cfg.n_ctx
        if not 2 <= context_size <= limit:
            raise SaesubError(f"context_size must lie in 2..{limit} for this model: {context_size}")
        specials = context_tokens(model)
        self.corpus = corpus
        self._bos = [] if specials.bos_id is None else [specials.bos_id]
        self._separator = [] if specials.separator_id is None else [specials.separator_id]
        self._body = context_size - len(self._bos)
        self._tokenizer = model.tokenizer
        self.n_read = 0  # documents
        self._buffer: list[int] = []
        self._documents = self._read()

    @property
    def epochs(self) -> float:
        """How often the corpus's documents were read so far."""
        return self.n_read / len(self.corpus)

    def take(self, n: int) -> Int[Tensor, "n context_size"]:
        """The next `n` contexts, int64."""
        wanted = n * self._body
        while len(self._buffer) < wanted:
            self._buffer += next(self._documents)
        used, self._buffer = self._buffer[:wanted], self._buffer[wanted:]
        text = torch.tensor(used, dtype=torch.int64).view(n, self._body)
        return torch.cat([torch.tensor(self._bos, dtype=torch.int64).expand(n, -1), text], dim=1)

    def _read(self) -> Iterator[list[int]]:
        """The tokens of some documents after others, without end."""
        while True:
            n_tokens = 0
            for at in range(0, len(self.corpus), _DOCUMENTS_AT_ONCE):
                texts = list(self.corpus[at : at + _DOCUMENTS_AT_ONCE]["text"])
                self.n_read += len(texts)
                found = self._tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
                joined = [token for ids in found for token in ids + self._separator]
                n_tokens += len(joined)
                yield joined
            if n_tokens < self._body:
                raise SaesubError(
                    f"the corpus holds {n_tokens} tokens, fewer than one context needs "
                    f"({self._body}): give a larger corpus or a smaller context_size"
                )
            if self.n_read == len(self.corpus):
                warnings.warn(
                    f"the corpus ends after {n_tokens:,} tokens and is read again, so activations "
                    "repeat from there on: give a larger corpus, or ask for fewer tokens",
                    stacklevel=3,
                )


def pack_contexts(
    model: Model, corpus: Corpus, *, n_contexts: int, context_size: int
) -> Int[Tensor, "n_contexts context_size"]:
    """The first `n_contexts` contexts of a corpus, each of `context_size` tokens.

    Documents are joined by the model's separator, and each context starts with BOS if the model was
    trained with one. A corpus that is too short is read again, with a warning.

    Raises:
        SaesubError: no contexts asked for, a context longer than the model's, or a corpus shorter
            than one context.
    """
    if n_contexts < 1:
        raise SaesubError(f"n_contexts must be at least 1, not {n_contexts}")
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
