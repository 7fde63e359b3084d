"""What the initialiser is given: activations of another scale, padding, layer norms, gated SAEs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sae_lens import (
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from torch.nn.functional import layer_norm

import saesub
from saesub.errors import SaesubError

D, D_SAE = 32, 128


def _tokens(n: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, D, generator=generator) * torch.linspace(1, 0.3, D)


def _sae(normalize_activations: str = "none") -> TopKTrainingSAE:
    torch.manual_seed(0)
    settings = {"d_in": D, "d_sae": D_SAE, "k": 8}
    return TopKTrainingSAE(
        TopKTrainingSAEConfig(**settings, normalize_activations=normalize_activations)
    )


@pytest.mark.parametrize("how", ["center_biases", "initialize_in_subspace", "whitened_data"])
def test_a_layer_norms_own_offset_is_not_taken_off_again(how) -> None:
    x = _tokens() + 3.0  # common to all dimensions, which a layer norm takes off
    spectrum, sae = saesub.Spectrum.from_activations(x), _sae("layer_norm")
    if how == "center_biases":
        saesub.center_biases(sae, spectrum)
    elif how == "initialize_in_subspace":
        saesub.initialize_in_subspace(sae, spectrum, activations=x)
    else:
        saesub.initialize_in_subspace(sae, spectrum, directions=how, activations=x)
    read = layer_norm(x, (D,))
    assert torch.allclose(sae.b_dec, read.mean(0), atol=0.02)
    if how != "center_biases":
        assert saesub.reconstruction(sae, x, progress=False).fvu < 0.9
        inside = sae.W_dec.detach().mean(1).abs() / sae.W_dec.detach().norm(dim=1)
        assert inside.max() < 0.01  # no feature writes along the direction that is never there


def test_the_centre_of_a_layer_norm_is_refused() -> None:
    with pytest.raises(SaesubError, match="use center_biases"):
        saesub.center_at(_sae("layer_norm"), _tokens().mean(0), mean_norm=1.0)


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("what", ["fit_norm", "flat", "whitened_data"])
def test_activations_of_another_scale_are_refused(what, factor) -> None:
    x, sae = _tokens(), _sae()
    spectrum, before = saesub.Spectrum.from_activations(x), sae.W_dec.detach().clone()
    start = saesub.fit_norm
    if what != "fit_norm":
        start = partial(saesub.initialize_in_subspace, directions=what)
    with pytest.raises(SaesubError, match=rf"are {factor:.3g} times as long .* pass them unscaled"):
        start(sae, spectrum, activations=factor * x)
    assert torch.equal(sae.W_dec, before)


@pytest.mark.parametrize("directions", ["data", "whitened_data"])
def test_features_do_not_start_at_copies_of_a_few_tokens(directions) -> None:
    x = _tokens()
    spectrum = saesub.Spectrum.from_activations(x)
    with pytest.raises(
        SaesubError, match=r"Only \d\d of the \d+ tokens drawn for 128 features differ"
    ):
        saesub.initialize_in_subspace(
            _sae(), spectrum, directions=directions, activations=x[:50].repeat(40, 1)
        )
    some = torch.cat([x[:200], x[:50]])  # as a text repeats words
    saesub.initialize_in_subspace(_sae(), spectrum, directions=directions, activations=some)


def test_a_gated_saes_magnitudes_are_centred_at_their_own_length() -> None:
    x = _tokens() + 2.0
    torch.manual_seed(0)
    sae = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=D, d_sae=D_SAE, apply_b_dec_to_input=False))
    sae.r_mag.data.fill_(0.5)
    mean = x.mean(0)
    saesub.center_at(sae, mean)
    assert torch.allclose(mean @ sae.W_enc + sae.b_gate, torch.zeros(D_SAE), atol=1e-5)
    magnitude = mean @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag
    assert torch.allclose(magnitude, torch.zeros(D_SAE), atol=1e-5)


def test_weights_of_inference_mode_are_refused(tmp_path) -> None:
    with torch.inference_mode():
        _sae().save_model(tmp_path)
        loaded = TrainingSAE.load_from_disk(tmp_path)
    with pytest.raises(SaesubError, match="outside of it"):
        saesub.center_biases(loaded, saesub.Spectrum.from_activations(_tokens()))


def test_a_median_that_does_not_settle_settles_at_a_larger_tolerance() -> None:
    near, far = torch.randn(300, 3), 100 + 1e-3 * torch.randn(301, 3)
    x = torch.cat([near, far])
    with pytest.raises(SaesubError, match=r"not settled .* pass a larger tolerance than 1e-07"):
        saesub.geometric_median(x)
    found = saesub.geometric_median(x, tolerance=0.01)
    pull = torch.nn.functional.normalize(x.double() - found.double(), dim=1).sum(0)
    assert pull.norm() <= 0.01 * len(x)


@pytest.mark.parametrize("given", [list(_tokens().split(512)), iter(_tokens().split(512))])
def test_blocks_where_one_matrix_is_asked_for_are_to_be_joined(given) -> None:
    with pytest.raises(SaesubError, match=r"torch.cat\(list\(blocks\)\)"):
        saesub.geometric_median(given)


def test_arrays_of_integers_are_called_by_their_numbers() -> None:
    with pytest.raises(SaesubError, match=r"not int64: give x.astype\('float32'\)"):
        saesub.geometric_median(torch.arange(64).reshape(2, D).numpy())
