"""Dead features against brute force, and the test of overlap on cases with a known answer."""

from __future__ import annotations

import math

import pytest
import torch
from sae_lens import (
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

from saesub.errors import SaesubError
from saesub.evaluation.dead_features import dead_features, overlap, overlap_test
from saesub.evaluation.features import feature_density
from saesub.evaluation.passes import encoded
from saesub.topk.encode import encoder_of, times_fired


def _sae(sparse: bool = False) -> TopKTrainingSAE:
    torch.manual_seed(0)
    return TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=24, d_sae=512, k=4, use_sparse_activations=sparse)
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_dead_features_equal_brute_force_over_exactly_the_window(sparse):
    sae = _sae(sparse)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3000, 24, generator=generator)
    x[:, 6:] *= 0.05  # features outside the first six dimensions hardly ever win
    dense = _sae()
    with torch.no_grad():
        acts = torch.cat([dense.encode(row[None]) for row in x[:1500]])
    expected = (acts > 0).sum(0) == 0
    assert 0 < expected.sum() < 512
    assert torch.equal(dead_features(sae, x, n_tokens=1500), expected)
    blocks = iter(x.split(130))
    assert torch.equal(dead_features(sae, blocks, n_tokens=1500), expected)


def test_a_relu_sae_that_never_fires_is_all_dead():
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=24, d_sae=64))
    sae.b_enc.data -= 1e6
    assert dead_features(sae, torch.randn(100, 24), n_tokens=100).all()
    sae.b_enc.data += 2e6
    assert not dead_features(sae, torch.randn(100, 24), n_tokens=100).any()


def test_a_loaded_hook_z_sae_takes_concatenated_heads():
    flat = TopKSAE(TopKSAEConfig(d_in=24, d_sae=64, k=4))
    by_head = TopKSAE(TopKSAEConfig(d_in=24, d_sae=64, k=4, reshape_activations="hook_z"))
    by_head.load_state_dict(flat.state_dict())
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    expected = dead_features(flat, x, n_tokens=50)
    assert torch.equal(dead_features(by_head, x, n_tokens=50), expected)
    assert by_head.hook_z_reshaping_mode
    assert by_head(x.view(50, 3, 8)).shape == (50, 3, 8)


def test_a_hook_z_sae_is_handed_back_as_it_was():
    sae = TopKSAE(TopKSAEConfig(d_in=24, d_sae=64, k=4, reshape_activations="hook_z"))
    heads = torch.randn(50, 3, 8, generator=torch.Generator().manual_seed(0))
    features, expected = sae.encode(heads), sae(heads)
    dead = dead_features(sae, heads, n_tokens=50)
    assert torch.equal(dead, dead_features(sae, heads.flatten(1), n_tokens=50))
    torch.testing.assert_close(sae.decode(features), expected)
    unfinished = encoded(sae, [heads, heads], encoder_of(sae))
    next(unfinished)
    torch.testing.assert_close(sae(heads), expected)


@pytest.mark.parametrize("judge", [dead_features, feature_density])
def test_too_few_tokens_and_unusable_activations_are_refused(judge):
    x = torch.randn(10, 24)
    with pytest.raises(SaesubError, match="Only 10 of 20 tokens"):
        judge(_sae(), x, n_tokens=20)
    with pytest.raises(SaesubError, match="n_tokens must be a whole number of at least 1"):
        judge(_sae(), x, n_tokens=0)
    for wrong in (x[:, :9], x[0], x[None]):
        with pytest.raises(SaesubError, match=r"reads activations of shape \(n, 24\)"):
            judge(_sae(), [wrong], n_tokens=5)
    x[7, 3] = torch.nan
    with pytest.raises(SaesubError, match="NaN or infinite"):
        judge(_sae(), x.split(4), n_tokens=10)
    assert judge(_sae(), x.split(4), n_tokens=4).shape == (512,)


def test_times_fired_ignores_stored_zeros_of_sparse_activations():
    acts = torch.sparse_coo_tensor(torch.tensor([[0, 1], [2, 0]]), torch.tensor([0.0, 1.5]), (2, 4))
    assert times_fired(acts).tolist() == [1, 0, 0, 0]


def test_overlap_of_known_directions():
    basis = torch.eye(6)[:, :2]
    directions = torch.tensor([[2.0, 0, 0, 0, 0, 0], [0, 0, 5, 0, 0, 0], [1, 0, 1, 0, 0, 0]])
    torch.testing.assert_close(overlap(directions, basis), torch.tensor([1.0, 0.0, 0.5]))


def test_random_directions_overlap_by_r_over_d():
    directions = torch.randn(4000, 100, generator=torch.Generator().manual_seed(0))
    assert overlap(directions, torch.eye(100)[:, :30]).mean().item() == pytest.approx(
        0.3, abs=0.005
    )


def test_overlap_test_separates_inside_from_outside():
    directions, basis = torch.eye(8), torch.eye(8)[:, :4]
    dead = torch.tensor([False] * 4 + [True] * 4)
    found = overlap_test(directions, dead, basis)
    assert found.auc == 1.0
    assert found.p_value < 0.05
    assert overlap_test(directions, ~dead, basis).auc == 0.0
    with pytest.warns(UserWarning, match="0 of 8 features are dead"):
        assert math.isnan(overlap_test(directions, torch.zeros(8, dtype=torch.bool), basis).auc)
    with pytest.raises(SaesubError, match="5 directions and 8 features"):
        overlap_test(directions[:5], dead, basis)
    with pytest.raises(SaesubError, match="8 wide and the basis is 6 wide"):
        overlap_test(directions, dead, basis[:6])
