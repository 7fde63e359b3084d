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
    assert reconstruction(sae, x) == reconstruction(sae, [x])


def test_activations_without_variance_or_not_finite_are_refused() -> None:
    sae = SAES["topk"]()
    for flat in ([], torch.full((40, 12), 0.1)):
        with pytest.raises(SaesubError, match="FVU needs finite activations that vary"):
            reconstruction(sae, flat)
    with pytest.raises(SaesubError, match="NaN or infinite"):
        reconstruction(sae, torch.full((40, 12), torch.inf))
    with pytest.raises(SaesubError, match=r"of shape \(n, 12\), not \(40, 11\)"):
        reconstruction(sae, torch.randn(40, 11))


def test_a_hook_z_sae_is_judged_by_head_or_flat() -> None:
    sae = TopKSAE(TopKSAEConfig(d_in=12, d_sae=30, k=4, reshape_activations="hook_z"))
    heads = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = (heads - sae(heads)).detach().square().sum() / (heads - heads.mean(0)).square().sum()
    for x in (heads, heads.flatten(1)):
        assert reconstruction(sae, x).fvu == pytest.approx(expected.item(), rel=1e-5)
