"""Coherence of features: planted ones, peaks by brute force, snippets that end with their text."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.tokens import kept_positions, pack_contexts
from saesub.errors import SaesubError
from saesub.evaluation.top_activations import top_activations
from saesub.extras.coherence import (
    Peaks,
    coherence,
    embed,
    feature_coherence,
    snippet_spans,
    snippet_texts,
)
from saesub.loading.models import context_tokens

HOOK = "blocks.2.hook_attn_out"
N, AROUND = 3, 4


def of_letters(texts: list[str]) -> torch.Tensor:
    """A stand-in for a sentence encoder: how often each letter occurs."""
    letters = [chr(97 + i) for i in range(26)]
    return torch.tensor([[float(text.lower().count(c)) for c in letters] for text in texts])


def test_features_with_contexts_of_one_kind_are_coherent_and_others_are_at_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(4000) % 200  # snippets of 200 kinds, orthogonal to one another
    vectors = torch.eye(200)[kind]
    of_one_kind = torch.arange(100).unsqueeze(1) + 200 * torch.arange(8)
    of_any_kind = torch.randint(4000, (100, 8), generator=generator)
    found = coherence(vectors, torch.cat([of_one_kind, of_any_kind]))
    assert torch.allclose(found.by_feature[:100], torch.ones(100))
    assert found.by_feature[100:].mean().abs() < 0.02
    assert found.shuffled.mean().abs() < 0.02
    assert found.above_chance == pytest.approx(0.5, abs=0.03)
    exchanged = coherence(vectors, of_one_kind[torch.rand(100, 8, generator=generator).argsort(0),
                                               torch.arange(8)])  # fmt: skip
    assert abs(exchanged.above_chance) < 0.02


def test_a_feature_with_fewer_snippets_does_not_count() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(9, 5), dim=1)
    places = torch.tensor([[0, 1, 2], [3, 4, -1], [5, 6, 7], [-1, -1, -1]])
    found = coherence(vectors, places)
    assert found.by_feature.isnan().tolist() == [False, True, False, True]
    assert found.shuffled.isnan().tolist() == [False, True, False, True]
    a, b, c = vectors[:3]
    assert found.by_feature[0].item() == pytest.approx(((a @ b + a @ c + b @ c) / 3).item())
    with pytest.raises(SaesubError, match="no feature fires in 3 contexts"):
        coherence(vectors, places[1:2])


@pytest.mark.parametrize("sparse", [True, False])
def test_peaks_are_the_strongest_contexts(sparse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 7, generator=generator)  # a feature may be strong below 0
    features = torch.where(features.abs() > 1.2, features, 0)
    features[:, 6] = 0
    contexts, places = torch.arange(60) // 5, 100 + torch.arange(60)
    peaks = Peaks(7, 4)
    for part in range(0, 60, 20):
        rows = features[part : part + 20]
        rows = rows.to_sparse() if sparse else rows
        peaks.add(rows, contexts[part : part + 20], places[part : part + 20])
    for feature, found in enumerate(peaks.places()):
        strongest = features[:, feature].abs().view(12, 5).max(1)
        order = strongest.values.argsort(descending=True)[:4]
        expected = 100 + 5 * order + strongest.indices[order]
        expected[strongest.values[order] == 0] = -1
        assert found.tolist() == expected.tolist()
    with pytest.raises(SaesubError, match="a number of snippets"):
        Peaks(7, 1)


def test_equal_texts_are_encoded_once_and_come_back_in_order() -> None:
    heard: list[str] = []

    def encoder(texts: list[str]) -> torch.Tensor:
        heard.extend(texts)
        return of_letters(texts)

    texts = ["abba", "c", "abba", "dd ee"]
    vectors = embed(texts, encoder, batch_size=2, progress=False)
    assert sorted(heard) == ["abba", "c", "dd ee"]
    expected = torch.nn.functional.normalize(of_letters(texts), dim=1)
    torch.testing.assert_close(vectors, expected)


@pytest.mark.model
def test_snippets_stay_in_their_document(model: TransformerBridge, corpus: Dataset) -> None:
    tokens = pack_contexts(model, corpus, n_contexts=3, context_size=60)
    special = context_tokens(model).special_ids[0]
    tokens[tokens == special] = tokens[0, 1]
    tokens[1, 20] = tokens[1, 30] = special
    for stride in (1, 4):
        spans, numbers = snippet_spans(model, tokens, n_around=AROUND, stride=stride)
        assert torch.equal(numbers >= 0, kept_positions(model, tokens, 1))
        assert sorted({*numbers[numbers >= 0].tolist()}) == list(range(len(spans)))
        for context, position in (numbers >= 0).nonzero().tolist():
            where, start, stop = spans[numbers[context, position]].tolist()
            assert where == context
            assert start <= position < stop
            assert special not in tokens[context, start:stop]
            assert stop - start <= 2 * AROUND + 1
            if stride == 1:
                whole = range(max(0, position - AROUND), min(60, position + AROUND + 1))
                documents = [range(0, 20), range(21, 30), range(31, 60)]
                own = range(60) if context != 1 else next(d for d in documents if position in d)
                assert [*range(start, stop)] == [i for i in whole if i in own]
    texts = snippet_texts(model, tokens, spans)
    context, start, stop = spans[5].tolist()
    assert texts[5] == model.tokenizer.decode(tokens[context, start:stop])


@pytest.fixture(scope="module")
def sae() -> TopKTrainingSAE:
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=64, k=8))
    sae.cfg.metadata.hook_name = HOOK
    return sae


@pytest.mark.model
def test_the_coherence_of_an_sae_is_that_of_its_top_activations(
    model: TransformerBridge, corpus: Dataset, sae: TopKTrainingSAE
) -> None:
    tokens = pack_contexts(model, corpus, n_contexts=6, context_size=40)
    tokens[torch.isin(tokens, torch.tensor(context_tokens(model).special_ids))] = tokens[0, 1]
    settings = {"n_snippets": N, "n_around": AROUND}
    found = feature_coherence(
        model, sae, tokens, encoder=of_letters, batch_size=4, progress=False, **settings
    )
    shown = top_activations(model, sae, tokens, range(64), **settings).features
    counted = 0
    for feature, value in zip(shown, found.by_feature.tolist(), strict=True):
        if len(feature.snippets) < N:
            assert value != value
            continue
        texts = ["".join(snippet.tokens) for snippet in feature.snippets]
        cosines = (vectors := embed(texts, of_letters, progress=False)) @ vectors.T
        assert value == pytest.approx((cosines.sum() - N).item() / (N * (N - 1)), abs=1e-4)
        counted += 1
    assert counted > 5
    few = [shown[i].feature for i in (9, 3)]
    of_few = feature_coherence(
        model, sae, tokens, few, encoder=of_letters, progress=False, **settings
    )
    torch.testing.assert_close(of_few.by_feature, found.by_feature[few], equal_nan=True)
    with pytest.raises(SaesubError, match=r"features \[64\] do not exist"):
        feature_coherence(model, sae, tokens, [64], encoder=of_letters, progress=False)


@pytest.mark.model
def test_the_packaged_encoder_tells_what_a_text_is_about() -> None:
    texts = [
        "Whisk the eggs with the sugar and bake the cake for an hour.",
        "Stir the flour into the butter, then bake it in the oven.",
        "The parliament passed a law on the election of judges.",
    ]
    vectors = embed(texts, progress=False)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > cosines[0, 2] + 0.2
    alone = embed(texts[:1], progress=False)
    torch.testing.assert_close(alone[0], vectors[0], atol=1e-4, rtol=0)  # padding is not read
