"""Activations found by the search are SAELens' own, on real activations."""

from __future__ import annotations

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

from saesub.evaluation.reconstruction import reconstruction
from saesub.topk import cpu, int8_search
from saesub.topk.encode import encoder_of

SIZES = {"d_in": 576, "d_sae": 2048}
NORMS = ["layer_norm", "constant_norm_rescale"]


def spread(sae):
    """Weights as after some training: biases, and decoder rows of different lengths."""
    generator = torch.Generator().manual_seed(1)
    sae.W_dec.data *= 0.5 + torch.rand(len(sae.W_dec), 1, generator=generator)
    sae.b_enc.data += 0.1 * torch.randn(len(sae.b_enc), generator=generator)
    sae.b_dec.data += torch.randn(len(sae.b_dec), generator=generator)
    return sae


def with_a_zero_row(sae):
    """Ranked by decoder norms, as SAELens does by default."""
    sae.W_dec.data[7] = 0
    return sae


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", ["training", "inference", *NORMS, "hook_z"])
def test_the_search_finds_what_saelens_finds(activations, kind, centred, rescaled):
    torch.manual_seed(0)
    settings = SIZES | {"k": 16, "apply_b_dec_to_input": centred}
    settings["rescale_acts_by_decoder_norm"] = rescaled
    if kind == "training":
        sae = spread(TopKTrainingSAE(TopKTrainingSAEConfig(**settings)))
    else:
        more = {"normalize_activations": kind} if kind in NORMS else {}
        sae = spread(TopKSAE(TopKSAEConfig(**settings, **more)))
    x = activations[:700]
    if kind == "hook_z":
        sae.turn_on_forward_pass_hook_z_reshaping()
        x = x.unflatten(1, (9, 64))
    with torch.no_grad():
        expected = sae.encode(x)
        reconstructed = sae.decode(expected)
        found = encoder_of(sae)(x)
        torch.testing.assert_close(sae.decode(found), reconstructed, rtol=1e-4, atol=1e-3)
    assert found.is_sparse
    assert not found.requires_grad
    dense = found.to_dense()
    assert ((dense != 0).sum(1) <= 16).all()
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "sae",
    [
        StandardTrainingSAE(StandardTrainingSAEConfig(**SIZES)),
        BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**SIZES, k=16)),
        with_a_zero_row(TopKTrainingSAE(TopKTrainingSAEConfig(**SIZES, k=16))),
        TopKTrainingSAE(TopKTrainingSAEConfig(**SIZES, k=16, dtype="float64")),
    ],
    ids=["relu", "batch topk", "zero row", "float64"],
)
def test_other_saes_are_asked_themselves(activations, sae):
    x = activations[:100].to(sae.W_enc.dtype)
    found = encoder_of(sae)(x)
    assert torch.equal(found, sae.encode(x))
    assert not found.requires_grad


def test_a_listener_gets_all_pre_activations(activations):
    sae, shapes = TopKSAE(TopKSAEConfig(**SIZES, k=16)), []
    sae.hook_sae_acts_pre.add_hook(lambda tensor, hook: shapes.append(tensor.shape))
    encoder_of(sae)(activations[:10])
    assert shapes == [(10, 2048)]


@pytest.mark.parametrize("compiled", [True, False])
def test_a_reconstruction_by_the_search_is_that_without_it(activations, monkeypatch, compiled):
    if compiled and cpu.library() is None:
        pytest.skip("needs a C++ compiler")
    torch.manual_seed(0)
    sizes = SIZES | {"d_sae": 16_384}  # wide enough for an 8-bit search
    sae = spread(TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=16)))
    blocks = activations.split(600)
    if not compiled:
        monkeypatch.setattr(cpu, "library", lambda: None)
    searched, (owner, name) = [], (cpu.BACKEND, "_search") if compiled else (int8_search, "search")
    find = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given: searched.append(1) or find(*given))
    found = reconstruction(sae, blocks)
    assert searched
    monkeypatch.setattr("saesub.topk.encode._suits_search", lambda sae: False)
    plain = reconstruction(sae, blocks)
    assert found.l0 == plain.l0 > 10
    assert found.fvu == pytest.approx(plain.fvu, rel=1e-6)
