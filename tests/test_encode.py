"""Features of given activations are SAELens' own, to the bit, and sparse."""

from __future__ import annotations

from importlib.util import find_spec

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
from saesub.topk import cpu_library, encode, int8_search, maxima, shadow, triton_backend
from saesub.topk.encode import autoencoder_of, encoder_of
from saesub.topk.ops import TOKENS_PER_BLOCK
from saesub.topk.sae import use_sparse_step

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


def with_twins(sae):
    """Every feature has an equal one, so that half of the active features are chosen from ties."""
    half = sae.cfg.d_sae // 2
    sae.W_enc.data[:, half:] = sae.W_enc.data[:, :half]
    sae.W_dec.data[half:] = sae.W_dec.data[:half]
    return sae


def of_smaller_k(sae):
    """As `KAnnealing` leaves a trainer's SAE in the middle of a run."""
    sae.activation_fn.k = 3
    return sae


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", ["training", "sparse", "inference", *NORMS, "hook_z"])
def test_features_and_reconstructions_are_those_of_saelens(activations, kind, centred, rescaled):
    torch.manual_seed(0)
    settings = SIZES | {"k": 16, "apply_b_dec_to_input": centred}
    settings["rescale_acts_by_decoder_norm"] = rescaled
    if kind in ("training", "sparse"):
        sae = spread(TopKTrainingSAE(TopKTrainingSAEConfig(**settings)))
        sae = use_sparse_step(sae) if kind == "sparse" else sae
    else:
        more = {"normalize_activations": kind} if kind in NORMS else {}
        sae = spread(TopKSAE(TopKSAEConfig(**settings, **more)))
    x = activations[: TOKENS_PER_BLOCK + 188]
    if kind == "hook_z":
        sae.turn_on_forward_pass_hook_z_reshaping()
        x = x.unflatten(1, (9, 64))
    with torch.no_grad():
        expected = torch.cat([sae.encode(rows) for rows in x.split(TOKENS_PER_BLOCK)])
        rebuilt = sae(x).flatten(1)
    found, decoded = autoencoder_of(sae)(x)
    assert found.is_sparse
    assert not found.requires_grad
    assert torch.equal(found.to_dense(), expected)
    assert torch.equal(encoder_of(sae)(x).to_dense(), expected)
    torch.testing.assert_close(decoded, rebuilt, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "sae",
    [
        StandardTrainingSAE(StandardTrainingSAEConfig(**SIZES)),
        BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**SIZES, k=16)),
        with_a_zero_row(TopKTrainingSAE(TopKTrainingSAEConfig(**SIZES, k=16))),
        with_twins(TopKTrainingSAE(TopKTrainingSAEConfig(**SIZES, k=15))),
        of_smaller_k(TopKTrainingSAE(TopKTrainingSAEConfig(**SIZES, k=16))),
        TopKTrainingSAE(TopKTrainingSAEConfig(**SIZES, k=16, dtype="float64")),
        TopKTrainingSAE(TopKTrainingSAEConfig(**SIZES, k=16, dtype="bfloat16")),
    ],
    ids=["relu", "batch topk", "zero row", "twins", "k annealed", "float64", "bfloat16"],
)
def test_every_sae_has_its_own_features(activations, sae):
    x = activations[:100].to(sae.W_enc.dtype)
    found, decoded = autoencoder_of(sae)(x)
    assert torch.equal(found.to_dense(), sae.encode(x))
    assert not found.requires_grad
    assert decoded.shape == x.shape


def test_a_listener_gets_all_pre_activations(activations):
    sae, shapes = TopKSAE(TopKSAEConfig(**SIZES, k=16)), []
    sae.hook_sae_acts_pre.add_hook(lambda tensor, hook: shapes.append(tensor.shape))
    encoder_of(sae)(activations[:10])
    assert shapes == [(10, 2048)]


def test_no_compiler_and_no_processor_has_a_part_in_a_judgement(activations, monkeypatch):
    torch.manual_seed(0)
    sizes = SIZES | {"d_sae": 16_384}  # wide enough for an 8-bit search
    sae = spread(TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=16)))

    def refuse(*given, **more):
        raise AssertionError("a judgement depends on the machine")

    monkeypatch.setattr(cpu_library, "library", refuse)
    monkeypatch.setattr(int8_search, "search", refuse)
    found = reconstruction(sae, activations.split(600))
    monkeypatch.setattr("saesub.topk.encode._is_plain_topk", lambda sae: False)
    plain = reconstruction(sae, activations.split(600))
    assert found.l0 == pytest.approx(plain.l0, rel=1e-5)
    assert found.fvu == pytest.approx(plain.fvu, rel=1e-6)


@pytest.mark.parametrize("kernels", [False, True])
def test_the_search_of_a_gpu_gives_saelens_features(monkeypatch, kernels):
    """Also of a decoder in another layout, and after the weights have changed."""
    if kernels and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    torch.manual_seed(0)
    device = triton_backend.BACKEND.device_type if kernels else "cpu"
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=24, d_sae=130, k=4)).to(device)
    sae.W_dec.data = (5 * torch.rand(130, 1, device=device) * sae.W_dec.data).T.contiguous().T
    backend = triton_backend.BACKEND if kernels else None
    monkeypatch.setattr(encode, "row_backend", lambda *_: backend)
    monkeypatch.setattr(shadow, "width_of", lambda k, _: k + 4)
    monkeypatch.setattr(shadow, "_GROUPS_PER_CHOSEN", 1)
    monkeypatch.setattr(maxima, "STRIDE", 16 if device == "cpu" else 256)
    kept, x = {}, torch.randn(5, 24, device=device)
    for _ in range(2):
        features, values = encode._searched(sae, kept)(sae.process_sae_in(x))
        found = torch.zeros(5, 130, device=device).scatter(1, features, values.relu())
        expected = sae.encode(x).to_dense().detach()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            sae.W_dec[::3] *= 4


def test_an_encoder_that_is_kept_follows_the_sae():
    """Its weights, also where torch keeps no count of a change, its k and its hooks."""
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=24, d_sae=130, k=4))
    read, x = encoder_of(sae), torch.randn(5, 24)
    read(x)

    def follows():
        expected = sae.encode(x).to_dense().detach()
        torch.testing.assert_close(read(x).to_dense(), expected)

    sae.W_dec.data[::3] *= 4
    follows()
    sae.activation_fn.k = 7
    follows()
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: acts * 2)
    follows()
