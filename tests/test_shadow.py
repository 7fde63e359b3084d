"""The search by an encoder in few bits, in Triton's interpreter or on a card."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

from saesub.topk import triton_backend
from saesub.topk.eligibility import lay_out_by_feature
from saesub.topk.ops import dense_search
from saesub.topk.shadow import EncoderShadow

pytestmark = pytest.mark.skipif(not triton_backend.available(), reason="no Triton here")
DEVICE = triton_backend.BACKEND.device_type


def _sae(d: int, d_sae: int, *, scaled: bool = True, seed: int = 0) -> TopKTrainingSAE:
    torch.manual_seed(seed)
    cfg = TopKTrainingSAEConfig(d_in=d, d_sae=d_sae, k=4, rescale_acts_by_decoder_norm=scaled)
    sae = TopKTrainingSAE(cfg)
    sae.W_dec.data *= 5 * torch.rand(d_sae, 1)
    sae.b_enc.data.normal_(0, 0.1)
    sae.to(DEVICE)
    lay_out_by_feature(sae)
    return sae


def _shadow(sae: TopKTrainingSAE, *, eight_bits: bool = False) -> EncoderShadow:
    return EncoderShadow(sae, triton_backend.BACKEND.row_products, eight_bits=eight_bits)


@pytest.mark.parametrize("eight_bits", [False, True])
@settings(max_examples=4, deadline=None)
@given(
    n=st.integers(1, 20),
    d=st.integers(1, 40),
    d_sae=st.integers(1090, 1300),
    scaled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_search_finds_the_best_features(eight_bits, n, d, d_sae, scaled, seed):
    sae = _sae(d, d_sae, scaled=scaled, seed=seed)
    found = _shadow(sae, eight_bits=eight_bits)
    x = torch.randn(n, d, device=DEVICE)
    features, pre = found.search(x, sae.W_enc.detach(), sae.b_enc.detach(), 1, found.norms)
    expected, best = dense_search(x, sae.W_enc.detach(), sae.b_enc.detach(), 1, found.norms)
    assert (features == expected).float().mean() > 0.9
    same = features == expected
    torch.testing.assert_close(pre[same], best[same], rtol=1e-4, atol=1e-5)
