"""One judgement of held-out activations: its windows against brute force, and no wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from torch import Tensor
from waiting import WaitingError, no_waiting

import saesub
from saesub import precision
from saesub.activations.store import ActivationStore
from saesub.errors import SaesubError
from saesub.evaluation import held_out
from saesub.evaluation.features import feature_density
from saesub.evaluation.held_out import judge
from saesub.evaluation.passes import encoded
from saesub.evaluation.reconstruction import reconstruction

KINDS = {
    "sparse": lambda: TopKSAE(TopKSAEConfig(d_in=16, d_sae=256, k=2)),
    "dense": lambda: StandardSAE(StandardSAEConfig(d_in=16, d_sae=256)),
}


def _sae(kind: str) -> Any:
    torch.manual_seed(0)
    sae = KINDS[kind]()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter))
        sae.b_enc -= 6 * (kind == "dense")  # so that few fire
    return sae


def _activations(n: int = 3000) -> Tensor:
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(1))
    x[:, 5:] *= 0.1
    return x


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Activations on the CPU are taken for some on a GPU."""
    monkeypatch.setattr(precision, "_WAITING", {"cpu"})


@pytest.mark.parametrize("size", [130, 1000, 3000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_silent_are_counted_after_each_window_by_brute_force(monkeypatch, kind, size):
    """Windows end in the middle of blocks, and two of them in one block."""
    monkeypatch.setattr(held_out, "_FIRST_WINDOW", 100)
    sae, x = _sae(kind), _activations()
    found = judge(sae, x.split(size), n_tokens=2500)
    with torch.no_grad():
        fired = sae.encode(x[:2500]).to_dense() != 0
    expected = {
        n: 1 - fired[:n].any(0).double().mean().item() for n in (100, 200, 400, 800, 1600, 2500)
    }
    assert found.silent == pytest.approx(expected)
    assert len({*expected.values()}) == 6
    assert torch.equal(found.counts, fired.sum(0))
    assert found.l0 == pytest.approx(fired.sum().item() / 2500)


@pytest.mark.parametrize(
    ("n", "windows"),
    [
        (10, [10]),
        (8192, [8192]),
        (8193, [8192, 8193]),
        (40_000, [8192, 16_384, 32_768, 40_000]),
    ],
)
def test_windows_double_up_to_all_tokens(n, windows):
    assert held_out._windows(n) == windows


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_judged_of_blocks_equals_the_three_measures(kind):
    sae, x = _sae(kind), _activations()
    found = saesub.judge(sae, iter(x.split(130)), n_tokens=2500)
    assert found[:3] == reconstruction(sae, [*x[:2470].split(130), x[2470:2500]])
    density = feature_density(sae, x.split(130), n_tokens=2500)
    assert torch.equal(found.counts.float() / 2500, density)
    store = ActivationStore.of(x, "h")
    assert judge(sae, store.rows(0, 2500), n_tokens=2500).silent == found.silent


def test_too_few_tokens_and_what_is_no_autoencoder_are_refused():
    with pytest.raises(SaesubError, match="Only 3000 of 4000 tokens"):
        judge(_sae("dense"), _activations(), n_tokens=4000)
    with pytest.raises(SaesubError, match="n_tokens must be a whole number"):
        judge(_sae("dense"), _activations(), n_tokens=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("measure", [judge, feature_density, reconstruction])
def test_bad_activations_on_a_gpu_give_an_error_and_no_number(as_on_cuda, measure, bad):
    x = _activations()
    x[2100, 3] = bad
    more = {} if measure is reconstruction else {"n_tokens": 3000}
    with pytest.raises(
        SaesubError, match=r"NaN or infinite .* the 1,024 tokens from number 2,048 on"
    ):
        measure(_sae("dense"), x, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_no_block_is_waited_for(as_on_cuda, monkeypatch, kind):
    monkeypatch.setattr(held_out, "_FIRST_WINDOW", 100)

    def watched(*given: Any, **more: Any) -> Iterator[Any]:
        for block in encoded(*given, **more):
            with no_waiting():
                yield block

    monkeypatch.setattr(held_out, "encoded", watched)
    assert judge(_sae(kind), _activations(), n_tokens=3000).n_tokens == 3000


def test_the_check_of_a_block_is_not_waited_for(monkeypatch):
    """Neither is the search for NaN, which on the CPU reads each block."""
    for waiting in ("cpu", "cuda"):
        monkeypatch.setattr(precision, "_WAITING", {waiting})
        blocks = encoded(_sae("dense"), _activations(), lambda x: x)
        if waiting == "cpu":
            with no_waiting():
                assert len(next(blocks)[0]) == 1024
        else:
            with pytest.raises(WaitingError), no_waiting():
                next(blocks)
