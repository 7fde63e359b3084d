"""Top contexts: a feature's peaks by brute force, and text that cannot break the page."""

from __future__ import annotations

import re

import pytest
import torch
from datasets import Dataset
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.tokens import pack_contexts
from saesub.errors import SaesubError
from saesub.evaluation.passes import site_activations
from saesub.evaluation.top_activations import (
    FeatureSnippets,
    Snippet,
    TopActivations,
    top_activations,
)
from saesub.loading.models import context_tokens

HOOK = "blocks.2.hook_attn_out"


@pytest.fixture(scope="module")
def sae() -> TopKTrainingSAE:
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=400, k=8))
    sae.cfg.metadata.hook_name = HOOK
    return sae


@pytest.mark.model
def test_the_strongest_contexts_are_shown_around_their_peaks(
    model: TransformerBridge, corpus: Dataset, sae: TopKTrainingSAE
) -> None:
    tokens = pack_contexts(model, corpus.select(range(60)), n_contexts=5, context_size=40)
    tokens[1, 20] = context_tokens(model).special_ids[0]
    acts = sae.encode(site_activations(model, tokens, HOOK)).detach()
    left_out = torch.isin(tokens, torch.tensor(context_tokens(model).special_ids))
    left_out[:, 0] = True
    acts[left_out] = 0
    fires = (acts > 0).flatten(0, 1).sum(0)
    feature = int(fires.argmax())
    silent = int((fires == 0).nonzero()[0])
    page = top_activations(model, sae, tokens, [feature, silent], n_snippets=3, n_around=4)
    shown, none = page.features
    peaks = acts[..., feature].amax(1).sort(descending=True)
    assert [max(s.activations) for s in shown.snippets] == pytest.approx(
        peaks.values[:3].tolist(), rel=1e-3
    )
    counted = tokens.numel() - left_out.sum().item()
    assert counted <= tokens.numel() - 6
    assert shown.density == pytest.approx(fires[feature].item() / counted, rel=1e-6)
    best = int(peaks.indices[0])
    at = int(acts[best, :, feature].argmax())
    window = tokens[best, max(0, at - 4) : at + 5]
    assert "".join(shown.snippets[0].tokens) == model.tokenizer.decode(window)
    assert none.snippets == ()
    assert "silent in this text" in page._repr_html_()


@pytest.mark.model
def test_a_feature_outside_the_dictionary_is_refused(
    model: TransformerBridge, corpus: Dataset, sae: TopKTrainingSAE
) -> None:
    tokens = pack_contexts(model, corpus.select(range(20)), n_contexts=1, context_size=8)
    with pytest.raises(SaesubError, match=r"features \[400\] do not exist"):
        top_activations(model, sae, tokens, [3, 400])
    with pytest.raises(SaesubError, match="contexts of at least 2 positions"):
        top_activations(model, sae, tokens[0], [3])
    with pytest.raises(SaesubError, match="no ordinary token after the first 8 positions"):
        top_activations(model, sae, tokens, [3], skip_first=8)
    nowhere = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=400, k=8))
    with pytest.raises(SaesubError, match="does not say which hook point"):
        top_activations(model, nowhere, tokens, [3])


def test_text_is_escaped_and_shaded_by_its_activation() -> None:
    snippet = Snippet(("<script>", " & ", "\n", "peak", " 'q'\""), (0.0, 1.0, 0.0, 2.0, 0.0))
    page = TopActivations([FeatureSnippets(5, 0.01, (snippet,))])
    text = page._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "&amp;" in text
    assert "⏎" in text
    weak, strong = map(float, re.findall(r"rgba\(0,114,178,([\d.]+)\)", text))
    assert 0 < weak < strong <= 0.6  # black text stays readable on it
    assert text.count("text-decoration:underline") == 1
    assert re.search(r"underline' title='2'>peak<", text)
    assert "[peak]" in str(page)
    assert "feature 5, fires on 1 % of tokens" in str(page)
