"""Fixed-length contexts cut from a corpus, and which of their positions are ordinary text."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import count
from math import ceil
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saesub.arguments import whole_number
from saesub.errors import SaesubError
from saesub.loading.corpora import Corpus, load_corpus
from saesub.loading.models import (
    Model,
    context_tokens,
    load_model,
    model_name,
    n_embeddings,
    own_settings,
)

_ROWS = 16  # documents read at once, of which each may be a book
_AT_ONCE = 200_000  # characters (or given tokens) prepared at once
_OVERLAP = 2_000  # characters that two windows of a long document share
_AGREEING = 16  # tokens on either side of a cut that both windows must give alike


class ContextStream:
    """Contexts of `context_size` tokens, cut from the corpus's documents joined by the separator.

    Each context starts with BOS if the model was trained with one. Where the tokenizer has no
    end-of-text token, documents are joined without a separator. Documents are tokenised only as
    they are needed; when the corpus runs out it starts over, with a warning.

    A document of more than 200,000 characters is tokenised in windows that overlap, joined where
    both give the same tokens, so that they are the tokens of the whole document; only a tokenizer
    that does not say which characters its tokens stand for (a slow one) takes it as a whole.

    Documents given as token ids lose their padding, and the BOS, the separators and the padding
    tokens at either end, and are joined as texts are: a corpus of packed contexts is read as if
    each were a document.

    Raises SaesubError for a context longer than the model's, a corpus shorter than one context, or
    a token that the model has no embedding for.
    """

    def __init__(self, model: TransformerBridge, corpus: Dataset, context_size: int) -> None:
        limit = model.cfg.n_ctx
        context_size = whole_number(context_size, "context_size", least=2)
        if context_size > limit:
            raise SaesubError(f"context_size must lie in 2..{limit} for this model: {context_size}")
        specials = context_tokens(model)
        self.corpus = corpus
        self.epochs = 0.0
        """How often the corpus's documents were read so far."""
        self.n_read = 0
        """Documents of which anything was read so far, those read again among them."""
        self._model = model
        self._bos = [] if specials.bos_id is None else [specials.bos_id]
        self._separator = [] if specials.separator_id is None else [specials.separator_id]
        self._body = context_size - len(self._bos)
        self._tokenizer: Any = model.tokenizer
        self._buffer: list[int] = []
        self._tokens = self._read()

    def take(self, n: int) -> Int[Tensor, "n context_size"]:
        """The next `n` contexts, int64."""
        wanted = n * self._body
        while len(self._buffer) < wanted:
            self._buffer += next(self._tokens)
        used, self._buffer = self._buffer[:wanted], self._buffer[wanted:]
        text = torch.tensor(used, dtype=torch.int64).view(n, self._body)
        bos = torch.tensor(self._bos, dtype=torch.int64).expand(n, -1)
        return require_embedded(self._model, torch.cat([bos, text], dim=1))

    def _read(self) -> Iterator[list[int]]:
        """The tokens of some documents after others, without end."""
        for epoch in count():
            n_tokens = n_documents = 0
            for block in _blocks(_documents(self.corpus)):
                for tokens, n_read in self._tokenised(block):
                    self.epochs = epoch + (n_documents + n_read) / len(self.corpus)
                    self.n_read = epoch * len(self.corpus) + n_documents + ceil(n_read)
                    n_tokens += len(tokens)
                    yield tokens
                n_documents += len(block)
            if n_tokens < self._body:
                raise SaesubError(
                    f"the corpus holds {n_tokens} tokens, fewer than one context needs "
                    f"({self._body}): give a larger corpus or a smaller context_size"
                )
            if epoch == 0:
                warnings.warn(
                    f"the corpus ends after {n_tokens:,} tokens and is read again, so activations "
                    "repeat from there on: give a larger corpus, or ask for fewer tokens",
                    stacklevel=3,
                )

    def _tokenised(self, block: list[Any]) -> Iterator[tuple[list[int], float]]:
        """Tokens, separators among them, and how many of the block's documents are read by then."""
        if not isinstance(block[0], str):
            found = [self._stripped(ids) for ids in block]
            yield [token for ids in found if ids for token in ids + self._separator], len(block)
        elif len(block[0]) > _AT_ONCE and self._tokenizer.is_fast:  # a long one comes alone
            for ids, share in _in_windows(self._tokenizer, block[0]):
                yield ids + self._separator if share == 1 else ids, share
        else:
            with own_settings(self._tokenizer):
                found = self._tokenizer(block, add_special_tokens=False, verbose=False).input_ids
            yield [token for ids in found for token in ids + self._separator], len(block)

    def _stripped(self, ids: list[int]) -> list[int]:
        """Without the special tokens at either end, which the stream puts there itself."""
        edges = {*self._bos, *self._separator, self._tokenizer.pad_token_id}
        text = [i for i, token in enumerate(ids) if token not in edges]
        return ids[text[0] : text[-1] + 1] if text else []


def require_embedded(
    model: TransformerBridge, tokens: Int[Tensor, "contexts pos"]
) -> Int[Tensor, "contexts pos"]:
    """The tokens as they are. Raises SaesubError for one that the model has no embedding for."""
    n = n_embeddings(model)
    beyond = tokens[(tokens < 0) | (tokens >= n)]
    if len(beyond):
        raise SaesubError(
            f"the text holds the token id {int(beyond[0])}, but {model_name(model)} has embeddings "
            f"for 0..{n - 1} only: give the model's own tokenizer, as a pair (model, tokenizer), "
            "or token ids made with it."
        )
    return tokens


def _documents(corpus: Dataset) -> Iterator[Any]:
    """Texts, or lists of token ids."""
    for at in range(0, len(corpus), _ROWS):
        (documents,) = corpus[at : at + _ROWS].values()
        yield from documents


def _blocks(documents: Iterable[Any]) -> Iterator[list[Any]]:
    """The documents in lists of about 200,000 characters or tokens; a longer one comes alone."""
    block, size = [], 0
    for document in documents:
        if block and size + len(document) > _AT_ONCE:
            yield block
            block, size = [], 0
        block.append(document)
        size += len(document)
    if block:
        yield block


def _in_windows(tokenizer: Any, text: str) -> Iterator[tuple[list[int], float]]:
    """The tokens of one long text, window by window, and the share of it that is read by then.

    The ends of a window are not as in the whole text. So a window ends, and the next goes on, in
    the middle of what they share, if both give the same tokens there; else the window doubles.
    """
    start, done, size = 0, 0, _AT_ONCE
    ids, at = _with_places(tokenizer, text, start, size)
    while (end := start + size) < len(text):
        following = _with_places(tokenizer, text, end - _OVERLAP, _AT_ONCE)
        cut = _agreement(ids, at, *following, end - _OVERLAP // 2)
        if cut is None:
            size *= 2
            ids, at = _with_places(tokenizer, text, start, size)
            continue
        yield _between(ids, at, done, cut), cut / len(text)
        start, done, size = end - _OVERLAP, cut, _AT_ONCE
        ids, at = following
    yield _between(ids, at, done, len(text) + 1), 1


def _with_places(tokenizer: Any, text: str, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a window, and the place in the whole text where each begins."""
    window = text[start : start + size]
    with own_settings(tokenizer):
        found = tokenizer(
            window, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
    places = [begin for begin, _ in found.offset_mapping]
    return np.array(found.input_ids), start + np.array(places)


def _agreement(
    ids: np.ndarray, at: np.ndarray, next_ids: np.ndarray, next_at: np.ndarray, place: int
) -> int | None:
    """Where the first token from `place` on begins, if both windows have the same around it."""
    i, j = int(np.searchsorted(at, place)), int(np.searchsorted(next_at, place))
    if not (_AGREEING <= i <= len(at) - _AGREEING and _AGREEING <= j <= len(next_at) - _AGREEING):
        return None
    here, there = (slice(k - _AGREEING, k + _AGREEING) for k in (i, j))
    same = np.array_equal(ids[here], next_ids[there]) and np.array_equal(at[here], next_at[there])
    return int(at[i]) if same else None


def _between(ids: np.ndarray, at: np.ndarray, first: int, last: int) -> list[int]:
    """The tokens that begin at `first` or later, and before `last`."""
    return ids[np.searchsorted(at, first) : np.searchsorted(at, last)].tolist()


def pack_contexts(
    model: Model, corpus: Corpus, *, n_contexts: int, context_size: int
) -> Int[Tensor, "n_contexts context_size"]:
    """The first `n_contexts` contexts of a corpus, each of `context_size` tokens.

    Documents are joined by the model's separator, and each context starts with BOS if the model was
    trained with one; `ContextStream` says the rest. A corpus that is too short is read again, with
    a warning.

    Raises:
        SaesubError: no contexts asked for, a context longer than the model's, a corpus shorter
            than one context, a token that the model has no embedding for, or whatever `load_model`
            and `load_corpus` refuse.
    """
    n_contexts = whole_number(n_contexts, "n_contexts")
    return ContextStream(load_model(model), load_corpus(corpus), context_size).take(n_contexts)


def kept_positions(
    model: TransformerBridge, tokens: Int[Tensor, "batch pos"], skip_first: int
) -> Bool[Tensor, "batch pos"]:
    """Mask (batch, pos), true where statistics are taken: not at special tokens, nor at the first
    `skip_first` positions after the BOS. Raises SaesubError for a `skip_first` below 0."""
    skip_first = whole_number(skip_first, "skip_first", least=0)
    specials = context_tokens(model)
    kept = ~torch.isin(tokens, torch.tensor(specials.special_ids, device=tokens.device))
    kept[:, : skip_first + (specials.bos_id is not None)] = False
    return kept
