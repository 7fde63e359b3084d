"""Density, likeness and matching of features against brute force."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from transformer_lens.model_bridge import TransformerBridge

from saesub.activations.tokens import pack_contexts
from saesub.errors import SaesubError
from saesub.evaluation.dead_features import dead_features
from saesub.evaluation.features import feature_density, match_features
from saesub.evaluation.passes import site_activations

HOOK = "blocks.4.hook_attn_out"


@pytest.fixture(scope="module")
def sae() -> TopKTrainingSAE:
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=700, k=8))
    sae.cfg.metadata.hook_name = HOOK
    return sae


@pytest.fixture(scope="module")
def tokens(model: TransformerBridge, corpus: Dataset) -> torch.Tensor:
    return pack_contexts(model, corpus.select(range(500, 700)), n_contexts=2, context_size=40)


@pytest.mark.model
def test_density_is_the_share_of_tokens_a_feature_fires_on(
    sae: TopKTrainingSAE, activations: torch.Tensor
) -> None:
    x = activations[:2500]
    expected = (sae.encode(x) != 0).double().mean(0)
    got = feature_density(sae, iter(x.split(900)), n_tokens=2500)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(got == 0, dead_features(sae, x, n_tokens=2500))
    assert 0 < got.sum() <= 8.001  # k features a token at most
    with pytest.raises(SaesubError, match="Only 2500 of 2501"):
        feature_density(sae, x, n_tokens=2501)


@pytest.mark.model
def test_density_takes_saelens_sparse_activations(activations: torch.Tensor) -> None:
    torch.manual_seed(0)
    cfg = TopKTrainingSAEConfig(d_in=576, d_sae=300, k=4, use_sparse_activations=True)
    sae = TopKTrainingSAE(cfg)
    assert sae.encode(activations[:2]).is_sparse
    got = feature_density(sae, activations[:600], n_tokens=600)
    expected = (sae.encode(activations[:600]).to_dense() != 0).float().mean(0)
    torch.testing.assert_close(got, expected)


def test_matching_recovers_a_shuffled_dictionary_and_leaves_the_surplus_single() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(60, 32, generator=generator)
    order = torch.randperm(60, generator=generator)
    b = 5 * a[order][:40] + 0.01 * torch.randn(40, 32, generator=generator)
    matching = match_features(a, b)
    assert len(matching.cosine) == 40 == len(set(matching.of_a.tolist()))
    assert torch.equal(matching.of_a, order[matching.of_b])
    assert matching.cosine.min() > 0.99


def test_matching_is_the_best_assignment_not_each_features_favourite() -> None:
    """Both features of a like b's first best; one must take the second."""
    a = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    matching = match_features(a, b)
    assert matching.of_b[matching.of_a.argsort()].tolist() == [0, 1]
    assert sorted(matching.cosine.tolist()) == pytest.approx([0.6, 1.0])


def test_matching_refuses_what_cannot_be_matched() -> None:
    for a, b in ((torch.ones(3, 4), torch.ones(3, 5)), (torch.ones(0, 4), torch.ones(3, 4))):
        with pytest.raises(SaesubError, match="cannot be matched"):
            match_features(a, b)


@pytest.mark.model
def test_site_activations_are_those_of_a_whole_forward_pass(
    model: TransformerBridge, tokens: torch.Tensor
) -> None:
    name = "blocks.1.attn.hook_z"
    _, cache = model.run_with_cache(tokens[:1], names_filter=[name])
    got = site_activations(model, tokens[:1], name)
    assert got.shape == (1, 40, 576)
    torch.testing.assert_close(got, cache[name].flatten(2))
    with pytest.raises(SaesubError, match="no hook point"):
        site_activations(model, tokens[:1], "blocks.1.hook_attn_outt")
