"""Contexts of tiny models: the right tokens, of any document, tokenizer and corpus of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_language import tokenizer_of
from tiny_model import tiny_gpt2, tiny_texts, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from saesub.activations import tokens as module
from saesub.activations.collect import harvest, measure_spectrum, stream_activations
from saesub.activations.tokens import (
    ContextStream,
    kept_positions,
    pack_contexts,
    require_embedded,
)
from saesub.errors import SaesubError
from saesub.loading.corpora import load_corpus
from saesub.loading.models import context_tokens, load_model

LONG = " ".join(tiny_texts(8, 400))


def stream(tokens: PreTrainedTokenizerBase, corpus: Any, context_size: int = 16) -> ContextStream:
    return ContextStream(load_model((tiny_gpt2(), tokens)), load_corpus(corpus), context_size)


def body(of: ContextStream, n: int) -> list[int]:
    """Their tokens in a row, without BOS."""
    return of.take(n)[:, -of._body :].flatten().tolist()


def small_windows(monkeypatch: pytest.MonkeyPatch, n_characters: int) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", n_characters)
    monkeypatch.setattr(module, "_OVERLAP", 300)


# --- long documents ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "pieces", "unigram"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(LONG, id="words"),
        pytest.param(LONG.replace(" ", "  \n\n "), id="spaces"),
        pytest.param(LONG.replace(" ", ""), id="no-space"),
        pytest.param("a" * 7001, id="one-letter"),
        pytest.param("abc" * 2500, id="period"),
        pytest.param(" " * 7000 + "end", id="blank"),
        pytest.param(LONG.replace("a", "\N{PILE OF POO}").replace("e", "漢"), id="emoji"),
        pytest.param(LONG.replace("a", "e\N{COMBINING ACUTE ACCENT}"), id="combining"),
        pytest.param(LONG.replace(".", "<|eos|>"), id="special"),
    ],
)
def test_windows_give_the_tokens_of_the_whole(
    kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokenizer_of(kind)
    whole = tokens(text, add_special_tokens=False).input_ids
    small_windows(monkeypatch, 1000)
    pieces = list(module._in_windows(tokens, text))
    assert [token for ids, _ in pieces for token in ids] == whole
    shares = [share for _, share in pieces]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(pieces) > 5 or kind != "bytes" or " " not in text.strip()


@pytest.mark.parametrize("overlap", [300, 301])
def test_windows_that_disagree_grow(overlap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text of one letter in pairs, a window that begins at an odd place gives other pairs."""
    pairs = Tokenizer(models.BPE({"a": 0, "aa": 1}, [("a", "a")]))
    tokens = PreTrainedTokenizerFast(tokenizer_object=pairs)
    monkeypatch.setattr(module, "_AT_ONCE", 1000)
    monkeypatch.setattr(module, "_OVERLAP", overlap)
    pieces = list(module._in_windows(tokens, "a" * 7001))
    assert [token for ids, _ in pieces for token in ids] == [1] * 3500 + [0]
    assert (len(pieces) > 5) == (overlap == 300)


def test_a_documents_tokens_do_not_depend_on_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, documents = (
        tiny_tokenizer(),
        [*tiny_texts(5), LONG, *tiny_texts(9)[4:], LONG, LONG[:900]],
    )
    expected = [
        token for text in documents for token in [*tokens(text).input_ids[1:], tokens.eos_token_id]
    ]
    n = len(expected) // 15
    for at_once in (200_000, 3000, 1000):
        small_windows(monkeypatch, at_once)
        assert body(stream(tokens, documents), n) == expected[: 15 * n]
        in_small_steps = stream(tokens, documents)
        assert [i for _ in range(n) for i in body(in_small_steps, 1)] == expected[: 15 * n]


@pytest.mark.parametrize(
    "documents", [[LONG * 10] * 200, [LONG * 200]], ids=["many-long", "one-very-long"]
)
def test_no_more_is_tokenised_than_was_asked_for(documents: list[str]) -> None:
    contexts = stream(tiny_tokenizer(), documents)
    contexts.take(20)
    assert 0 < contexts.epochs < 0.1


def test_epochs_are_a_share_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    small_windows(monkeypatch, 1000)
    contexts = stream(tiny_tokenizer(), [LONG, *tiny_texts(3)])
    n = len(tiny_tokenizer()(LONG).input_ids) // 15
    contexts.take(n // 2)
    assert contexts.epochs == pytest.approx(0.125, abs=0.02)
    contexts.take(n // 2)
    assert 0.2 < contexts.epochs <= 0.25
    with pytest.warns(UserWarning, match="is read again"):
        contexts.take(n)
    assert 1 < contexts.epochs < 1.25


def test_a_slow_tokenizer_takes_documents_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    small_windows(monkeypatch, 1000)
    slow = _characters()
    assert not slow.is_fast
    expected = slow(LONG, add_special_tokens=False).input_ids
    assert body(stream(slow, [LONG]), 100) == expected[:1600]


def _characters() -> PreTrainedTokenizerBase:
    """A tokenizer in Python of letters alone: it has no special token, and none for a space."""
    from transformers.tokenization_python import PythonBackend

    class Characters(PythonBackend):
        vocab_size = 26

        def get_vocab(self) -> dict[str, int]:
            return {chr(97 + i): i for i in range(26)}

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return [letter for letter in text if letter.isalpha()]

        def _convert_token_to_id(self, token: str) -> int:
            return self.get_vocab().get(token, 0)

        def _convert_id_to_token(self, index: int) -> str:
            return chr(97 + index)

    return Characters()


# --- special tokens, and ids beyond the embedding ------------------------------------------------


@pytest.mark.parametrize("bos", [None, "<|bos|>"])
def test_without_an_end_of_text_token_documents_are_joined(bos: str | None) -> None:
    tokens, documents = tiny_tokenizer(bos=bos, eos=None), tiny_texts(3)
    contexts = stream(tokens, documents)
    specials = context_tokens(contexts._model)
    assert specials.separator_id is None
    assert specials.bos_id == tokens.bos_token_id
    expected = [i for text in documents for i in tokens(text, add_special_tokens=False).input_ids]
    assert body(contexts, 10) == expected[: 10 * contexts._body]


def test_a_bos_is_seen_where_a_letter_is_no_token() -> None:
    """Of DNA, say: "a" gives no token, and the BOS stands alone."""
    tokens = tiny_tokenizer()
    tokens._tokenizer.normalizer = normalizers.Replace("a", "")
    assert tokens("a").input_ids == [tokens.bos_token_id]
    assert context_tokens(load_model((tiny_gpt2(), tokens))).bos_id == tokens.bos_token_id


def test_a_bridges_end_of_text_token_beyond_its_embedding_is_none() -> None:
    """As TransformerLens adds one to a tokenizer that has none."""
    from transformer_lens.model_bridge import TransformerBridge

    tokens = tiny_tokenizer(bos=None, eos=None)
    hf_model = tiny_gpt2(vocab_size=len(tokens))
    hf_model.config.architectures = ["GPT2LMHeadModel"]
    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=hf_model, tokenizer=tokens)
    assert bridge.tokenizer.eos_token_id == len(tokens) - 1  # pyright: ignore
    assert context_tokens(bridge).separator_id is None
    assert (
        int(pack_contexts(bridge, tiny_texts(), n_contexts=60, context_size=16).max())
        < hf_model.config.vocab_size
    )


def test_a_token_beyond_the_embedding_is_named_before_the_model_runs() -> None:
    pair = (tiny_gpt2(vocab_size=300), tiny_tokenizer())
    for use in (
        lambda: pack_contexts(pair, tiny_texts(), n_contexts=9, context_size=16),
        lambda: next(
            stream_activations(
                pair,
                tiny_texts(),
                ["blocks.0.hook_attn_out"],
                n_tokens=9,
                context_size=16,
                progress=False,
            )
        ),
    ):
        with pytest.raises(SaesubError, match=r"token id [34]\d\d, but .* for 0\.\.299 only: give"):
            use()


def test_a_larger_tokenizer_is_fine_where_its_further_ids_do_not_occur() -> None:
    tokens = tiny_tokenizer()
    used = 1 + max(i for text in tiny_texts() for i in tokens(text).input_ids)
    tokens.add_tokens([f"<extra{i}>" for i in range(300)])
    assert len(tokens) > 600
    assert (
        pack_contexts(
            (tiny_gpt2(vocab_size=used), tokens), tiny_texts(), n_contexts=9, context_size=16
        ).max()
        < used
    )
    with pytest.raises(SaesubError, match=f"token id {len(tokens) - 293}, but"):
        pack_contexts(
            (tiny_gpt2(vocab_size=used), tokens), ["<extra7>" * 99], n_contexts=2, context_size=16
        )


@pytest.mark.parametrize("wrong", [-100, 512])
def test_token_ids_of_another_model_are_named(wrong: int) -> None:
    bridge = load_model((tiny_gpt2(), tiny_tokenizer()))
    good = torch.tensor([[1, 2, 3]])
    assert require_embedded(bridge, good) is good
    with pytest.raises(SaesubError, match=f"token id {wrong}, but"):
        require_embedded(bridge, torch.tensor([[1, wrong, 3]]))
    rows = Dataset.from_dict({"input_ids": [[5, wrong, 7] * 9]})
    with pytest.raises(SaesubError, match=f"token id {wrong}, but"):
        pack_contexts(bridge, rows, n_contexts=1, context_size=16)


# --- corpora that were tokenised before ----------------------------------------------------------


def _given(tokens: Any, how: str) -> Dataset:
    bos, eos, rows = tokens.bos_token_id, tokens.eos_token_id, []
    plain = tokens(tiny_texts(), add_special_tokens=False).input_ids
    for ids in plain:
        before, after = {
            "plain": ([], []),
            "bos": ([bos], []),
            "both": ([bos], [eos]),
            "padded right": ([bos], [eos] * 5),
            "padded left": ([eos] * 5 + [bos], []),
            "padded with its own token": ([], [tokens.pad_token_id] * 5),
            "gpt2": ([eos], [eos]),
        }[how.removesuffix(" masked").removesuffix(" tokens")]
        rows.append({"input_ids": before + ids + after})
        if how.endswith("masked"):
            mask = [0] * len(before) + [1] * len(ids) + [0] * len(after)
            rows[-1] |= {"attention_mask": mask}
    if how.endswith("tokens"):
        return Dataset.from_list(rows).rename_column("input_ids", "tokens")
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("how", "bos"),
    [
        ("plain", "<|bos|>"),
        ("plain", None),
        ("bos", "<|bos|>"),
        ("both", "<|bos|>"),
        ("padded right", "<|bos|>"),
        ("padded left", "<|bos|>"),
        ("padded left masked", "<|bos|>"),
        ("padded with its own token", "<|bos|>"),
        ("gpt2 tokens", "<|bos|>"),
        ("gpt2 tokens", None),
    ],
)
def test_token_ids_give_the_contexts_of_their_texts(how: str, bos: str | None) -> None:
    tokens = tiny_tokenizer(bos)
    if how.startswith("padded"):
        own = how.endswith("own token")
        tokens.add_special_tokens({"pad_token": "<|pad|>" if own else tokens.eos_token})
    expected = stream(tokens, tiny_texts()).take(50)
    assert torch.equal(stream(tokens, _given(tokens, how)).take(50), expected)


def test_a_text_beside_its_token_ids_is_taken() -> None:
    both = Dataset.from_dict({"input_ids": [[5] * 40, [6] * 40], "text": tiny_texts(2)})
    assert load_corpus(both).column_names == ["text"]


def test_an_empty_document_of_token_ids_is_left_out() -> None:
    rows = [[], [5] * 20, [0, 1], [6] * 20]  # 0 and 1 are BOS and EOS
    found = stream(tiny_tokenizer(), Dataset.from_dict({"input_ids": rows}), 8)
    assert body(found, 6) == ([5] * 20 + [1] + [6] * 20 + [1])[:42]


# --- arguments -----------------------------------------------------------------------------------


def test_whole_floats_count_as_numbers() -> None:
    pair = (tiny_gpt2(), tiny_tokenizer())
    assert pack_contexts(pair, tiny_texts(), n_contexts=3e0, context_size=16.0).shape == (3, 16)  # pyright: ignore


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_contexts": 0}, "n_contexts must be a whole number of at least 1, not 0"),
        ({"n_contexts": 1.5}, r"n_contexts must be a whole number of at least 1, not 1\.5"),
        ({"n_contexts": "3"}, "n_contexts must be a whole number"),
        ({"context_size": 1}, "context_size must be a whole number of at least 2"),
        ({"context_size": None}, "context_size must be a whole number"),
        ({"context_size": 129}, r"context_size must lie in 2\.\.128"),
    ],
)
def test_wrong_numbers(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SaesubError, match=message):
        pack_contexts(
            (tiny_gpt2(), tiny_tokenizer()),
            tiny_texts(),
            **{"n_contexts": 3, "context_size": 16, **settings},
        )


def test_a_negative_skip_first_is_refused() -> None:
    with pytest.raises(SaesubError, match="skip_first must be a whole number of at least 0"):
        kept_positions(load_model((tiny_gpt2(), tiny_tokenizer())), torch.tensor([[1, 5, 6]]), -1)


@pytest.mark.parametrize("given", ["texts", "ids"])
def test_a_tokenised_corpus_is_measured_like_its_texts(given: str, tmp_path: Path) -> None:
    tokens, hook = tiny_tokenizer(), "blocks.0.hook_attn_out"
    settings: dict[str, Any] = {"n_tokens": 99, "context_size": 16, "progress": False}
    corpus = tiny_texts() if given == "texts" else _given(tokens, "padded left masked")
    expected = measure_spectrum((tiny_gpt2(), tokens), tiny_texts(), hook, **settings)
    found = measure_spectrum((tiny_gpt2(), tokens), corpus, hook, **settings)
    assert torch.equal(found.covariance, expected.covariance)
    stores = [
        harvest((tiny_gpt2(), tokens), corpus, [hook], tmp_path, **settings) for _ in range(2)
    ]
    assert torch.equal(stores[0][hook].rows(0, 99), stores[1][hook].rows(0, 99))


def test_another_mask_is_another_text(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7] * 9, "attention_mask": [1] * 27} for _ in range(9)]
    settings: dict[str, Any] = {"n_tokens": 40, "context_size": 16, "progress": False}
    hook, pair = "blocks.0.hook_attn_out", (tiny_gpt2(), tiny_tokenizer())
    harvest(pair, Dataset.from_list(rows), [hook], tmp_path, **settings)
    rows[0]["attention_mask"] = [1] * 20 + [0] * 7
    with pytest.raises(SaesubError, match="text"):
        harvest(pair, Dataset.from_list(rows), [hook], tmp_path, **settings)
