"""FVU and L0 of real SAELens SAEs against brute force."""

from __future__ import annotations

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)

from saesub.errors import SaesubError
from saesub.evaluation.reconstruction import reconstruction

SAES = {
    "standard": lambda: StandardSAE(StandardSAEConfig(d_in=12, d_sae=30)),
    "topk": lambda: TopKSAE(TopKSAEConfig(d_in=12, d_sae=30, k=4)),
    "training": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=12, d_sae=30, k=4)),
}


@pytest.mark.parametrize("kind", SAES)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_fvu_and_l0_against_brute_force(kind: str, offset: float) -> None:
    torch.manual_seed(0)
    sae = SAES[kind]()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        sae.b_dec += offset
    x = torch.randn(700, 12) + offset
    blocks = x.split([200, 1, 499])
    got = reconstruction(sae, blocks)
    features = [sae.encode(b).detach() for b in blocks]
    rebuilt = torch.cat([sae.decode(f).detach() for f in features]).double()
    exact = x.double()
    expected = (exact - rebuilt).square().sum() / (exact - exact.mean(0)).square().sum()
    assert got.n_tokens == 700
    assert got.fvu == pytest.approx(expected.item(), rel=1e-5)
    assert got.l0 == pytest.approx(sum(int((f != 0).sum()) for f in features) / 700)
    with pytest.raises(SaesubError, match="FVU"):
        reconstruction(sae, [])
